"""Use: a trained adapter opened with its base, its tokenizer and what its run recorded, and measured on other rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import Config, Train, resolve
from ..core.attach import attached
from ..core.store import load as load_adapter
from ..core.store import read_manifest, virtual_ids
from ..data.encode import Encoding
from ..evaluate.score import intervals, score
from ..objectives import build as build_objective
from ..objectives.common import kind_of
from ..zoo import model_path
from .job import Job, measured, model_config, open_model, read


def record_of(job: Job) -> dict[str, Any]:
    """What the manifest keeps of a run: the objective with its labels, and how rows become tokens."""
    from ..objectives import record

    return {"objective": record(job.objective), "max_length": job.encoding.max_length}


def open_adapted(
    ref: str, folder: Path | None, objective: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(model with the adapter on it, tokenizer, what its run recorded), for eval, generate, chat and merge.

    `objective`: a block that goes before the recorded one; without either, sft.
    """
    manifest = read_manifest(folder) if folder else None
    record = dict((manifest or {}).get("record") or {})
    if objective:
        record["objective"] = recorded_fields(objective, record.get("objective") or {})
    record.setdefault("objective", {"sft": {}})
    if "classify" in record["objective"] and not (record["objective"]["classify"] or {}).get("labels"):
        record["objective"] = {"classify": own_labels(ref, record["objective"]["classify"] or {})}
    goal = build_objective(record["objective"])
    config = resolve(Config(model=ref, data="none")).config
    model, tokenizer = open_model(config, goal)
    if folder is not None:
        load_adapter(model, folder, "default", tokenizer=tokenizer)
    return model.eval(), tokenizer, record


def recorded_fields(asked: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The asked block with the recorded one's fields beneath it, where both are the same objective."""
    ((name, fields),) = asked.items()
    return {name: {**(found.get(name) or {}), **(fields or {})}}


def own_labels(ref: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Class names as the base's own configuration has them: for a folder that is a classifier already."""
    if fields.get("kind") == "regression":
        return dict(fields)
    config = model_config(model_path(ref))
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        raise ValueError(f"{ref} is no classifier, and no run says which classes there are: give --adapter RUN")
    if config.num_labels < 2:
        return {**fields, "kind": "regression"}
    return {**fields, "labels": [config.id2label[i] for i in range(config.num_labels)]}


def evaluate_file(
    model: nn.Module, tokenizer: Any, record: Mapping[str, Any], ref: str, section: Any
) -> dict[str, Any]:
    """Loss and metrics of `model` on one data reference, with the labels and lengths of the run that trained it.

    record: as `open_adapted` returns it, or an objective's block; section: the `eval` section of a configuration.
    """
    block = record.get("objective", record)
    config = Config(model="any", data=ref).model_copy(update={"eval": section})
    examples = measured("eval", read([ref], config, []), config, [])
    if not examples:
        raise ValueError(f"{ref}: no rows to measure on")
    objective = build_objective(block)
    known = objective.name == "sft" or bool(objective.labels) or getattr(objective, "kind", "auto") == "regression"
    objective = settled(objective, examples) if known else objective.fit(examples)
    if hasattr(objective, "bind"):
        objective = objective.bind(tokenizer, kind_of(model))
    name = next(iter(attached(model)), "")
    encoding = Encoding(
        max_length=record.get("max_length") or Train().max_length,
        train_on=getattr(objective, "train_on", "assistant"),
        decoder=kind_of(model) == "seq2seq" and not objective.task_head,
        prompt_ids=virtual_ids(model, name) if name else (),
    )
    scored = score(Job(config, model, tokenizer, objective, name, encoding, [], examples, {}), examples)
    return {"rows": len(examples), **scored.numbers, "intervals": intervals(scored)}


def settled(objective: Any, examples: Any) -> Any:
    """An objective with recorded labels, which a file need not hold all. A `kind` left open is read off the rows."""
    unlabelled = next((e.where for e in examples if objective.name != "sft" and e.label is None), None)
    if unlabelled:
        raise ValueError(f"{unlabelled}: the row has no label to compare with (columns text and label)")
    return objective.fit(examples) if getattr(objective, "kind", "") == "auto" else objective
