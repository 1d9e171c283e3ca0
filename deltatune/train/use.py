"""Use: a trained adapter opened with its base, its tokenizer and what its run recorded, and measured on other rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import over
from ..config import READ, Config, resolve
from ..core.attach import disabled, running
from ..core.manifest import record_in
from ..core.merging import merge
from ..core.quant import scheme
from ..core.site import pairs
from ..core.store import load as load_adapter
from ..core.store import read_manifest
from ..data.encode import Encoding
from ..data.example import Example
from ..data.formats import used
from ..data.media import parted
from ..evaluate.generate import Decoding
from ..evaluate.incontext import Prompt, predict, reference
from ..evaluate.retention import default_texts
from ..evaluate.score import Scored, intervals, metrics_for, said_as_text, score, tasks_of
from ..objectives import build as build_objective
from ..zoo import model_path
from .evidence import forgotten, general, known_bounds
from .job import Job, settle_encoding, told
from .lengths import unread
from .opening import model_config, open_model, open_weights
from .sets import intake, measured, read

WINDOW, WINDOWS = 128, 16  # tokens of a piece of text that a merge is measured on, and how many pieces


def record_of(job: Job) -> dict[str, Any]:
    """What the manifest keeps of a run: the objective with its labels, how rows are read ("read": the columns of the
    question, as the file calls them), and how they become tokens."""
    from ..objectives import record

    data = job.config.data
    rows = {key: value for key in READ if (value := getattr(data, key))}
    plain = {"plain": True} if any(e.completion is not None for e in job.train) else {}
    reads = used(job.train[0], intake(job.config)) if job.train else ()
    rows |= {"read": list(reads)} if reads else {}
    return {"objective": record(job.objective), "max_length": job.encoding.max_length} | plain | rows


def open_adapted(
    ref: str, folder: Path | None, objective: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(model with the adapter on it, tokenizer, what its run recorded), for eval, generate, chat and merge. Without a
    folder, the record is that of the run whose adapter was merged into the model, where there was one.

    `objective`: a block that goes before the recorded one; without either, sft.
    """
    manifest = read_manifest(folder) if folder else None
    record = record_in(folder or model_path(ref))
    if objective:
        record["objective"] = over(objective, record.get("objective") or {})
    record.setdefault("objective", {"sft": {}})
    ((kind, fields),) = record["objective"].items()
    if kind in OWN_HEADS and not (fields or {}).get("labels"):
        record["objective"] = {kind: own_labels(ref, kind, fields or {})}
    goal = build_objective(record["objective"])
    quant = ((manifest or {}).get("base") or {}).get("quant")
    config = resolve(Config(model={"name": ref, "quant": quant}, data="none")).config
    model, tokenizer = open_model(config, goal)
    if folder is not None:
        load_adapter(model, folder, "default", tokenizer=tokenizer)
    return model.eval(), tokenizer, record


def merged(model: nn.Module, record: Mapping[str, Any], base: str | None, name: str) -> nn.Module:
    """Adapter `name` of `model` merged into a copy of its base, or onto the model that `base` refers to."""
    if base is None:
        return merge(model, name).eval()
    number = {torch.float32: "fp32", torch.bfloat16: "bf16"}[next(model.parameters()).dtype]
    config = resolve(Config(model={"name": base, "dtype": number}, data="none")).config
    return merge(model, name, base=open_weights(config, build_objective(record["objective"]))).eval()


def cost_text(model: nn.Module, tokenizer: Any, examples: Sequence[Any] | None) -> list[dict[str, Tensor]] | None:
    """What a merge is measured on: pieces of the examples' text, or over a packed base of general text.

    None over a plain base without examples: merging changes nothing but rounding there.
    """
    if scheme(model) is None and examples is None:
        return None
    texts = default_texts() if examples is None else [spoken(example) for example in examples]
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, return_tensors="pt").input_ids[0]
    device = next(model.parameters()).device
    pieces = [piece for piece in ids.split(WINDOW)[:WINDOWS] if len(piece) > 1]
    if not pairs(model):
        return [{"input_ids": piece[None].to(device)} for piece in pieces]
    end = ids.new_tensor([tokenizer.eos_token_id])  # where a classifier reads its class
    both = [torch.cat([piece[piece != end], end])[None].to(device) for piece in pieces]
    return [{"input_ids": piece, "decoder_input_ids": piece} for piece in both]


def spoken(example: Any) -> str:
    """All the words of a row."""
    parts = [turn.content for turn in example.turns]
    parts += [example.prompt, example.completion, example.text, example.text_pair]
    return "\n".join(part for part in parts if part)


OWN_HEADS = {
    "classify": ("SequenceClassification", "ImageClassification", "AudioClassification"),
    "tag": ("TokenClassification",),
}


def own_labels(ref: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Class names as the base's own configuration has them: for a folder that is a classifier already."""
    if fields.get("kind") == "regression":
        return dict(fields)
    config = model_config(model_path(ref))
    if not any(head in name for name in config.architectures or () for head in OWN_HEADS[kind]):
        raise ValueError(f"{ref} is no classifier, and no run says which classes there are: give --adapter RUN")
    if config.num_labels < 2:
        return {**fields, "kind": "regression"}
    return {**fields, "labels": [config.id2label[i] for i in range(config.num_labels)]}


def evaluate_file(
    model: nn.Module, tokenizer: Any, record: Mapping[str, Any], ref: str, section: Any, shown: str | None = None
) -> dict[str, Any]:
    """Loss and metrics of `model` on one data reference, with the labels and lengths of the run that trained it.

    record: as `open_adapted` returns it, or an objective's block; section: the `eval` section of a configuration, whose
    retention is measured where it was asked for.   shown: the rows that the examples of `eval.shots` are drawn from.
    """
    config, notes = configured(record, ref).model_copy(update={"eval": section}), list[str]()
    rows = read([ref], config, notes, run=record.get("read", ()))
    examples = measured("eval", rows, config, notes)
    if not examples:
        raise ValueError(f"{ref}: no rows to measure on")
    objective = build_objective(config.objective)
    objective = settled(objective, examples) if decided(objective) else objective.fit(examples)
    job = job_of(model, tokenizer, objective, config, examples)
    job.notes[:0] = notes
    if shown is not None:
        unread(job)
    told(job, "data", examples)
    scored = score(job, examples) if shown is None else few_shot(job, examples, read([shown], config, job.notes))
    found = {"rows": len(examples), **scored.numbers, "intervals": known_bounds(intervals(scored))}
    if scored.by_task:
        found["tasks"] = scored.by_task
    if section.retention and "retention" in section.model_fields_set:
        found["retention"] = kept(job)
    return found | {"notes": job.notes}


def configured(record: Mapping[str, Any], ref: str = "rows") -> Config:
    """What an adapter's run recorded (or an objective's block), as the configuration of a job on other rows."""
    how = {key: record[key] for key in READ if record.get(key)}
    length = {"max_length": record["max_length"]} if record.get("max_length") else {}
    return Config(model="any", data={"train": ref, **how}, train=length, objective=record.get("objective", record))


def decided(objective: Any) -> bool:
    """Whether an objective knows already what it would have to read off rows: its classes."""
    return objective.name in ("sft", "qa") or bool(objective.labels) or getattr(objective, "kind", "") == "regression"


def job_of(model: nn.Module, tokenizer: Any, objective: Any, config: Config, examples: Sequence[Example]) -> Job:
    """A job that trains nothing: `examples` for a model, with the adapters that run. Refusal or ValueError where it has
    not the head that the objective reads."""
    objective.check(model)
    name = next(iter(running(model)), "")
    tokenizer, processor = parted(tokenizer)
    job = Job(config, model, tokenizer, objective, name, Encoding(), [], list(examples), {}, processor=processor)
    return settle_encoding(job)


def few_shot(job: Job, examples: Sequence[Example], shown: Sequence[Example]) -> Scored:
    """As `score`, with `eval.shots` examples out of `shown` in every prompt. ValueError where nothing is generated."""
    if job.objective.name != "sft":
        raise ValueError(f"eval.shots puts examples into a prompt, which only sft has, not {job.objective.name}")
    own, asked = score(job, examples, predicts=False), Prompt("few-shot", shots=job.config.eval.shots)
    wanted = [reference(asked, example) for example in examples]
    decoding = Decoding(job.config.eval.max_new_tokens)
    said = predict(job.model, job.tokenizer, asked, examples, shown, decoding)
    return replace(said_as_text(own, metrics_for(job, examples), said, wanted), tasks=tasks_of(examples))


def kept(job: Job) -> dict[str, Any]:
    """How well general text is read: by the base alone, or by base and adapter with what was forgotten."""
    if not job.adapter:
        return general(job) or {}
    with disabled(job.model):
        first = general(job)
    return forgotten(first, lambda: general(job, compare=True))


def settled(objective: Any, examples: Any) -> Any:
    """An objective with recorded labels, which a file need not hold all. A `kind` left open is read off the rows."""
    objective.wants.demand(examples)
    return objective.fit(examples) if getattr(objective, "kind", "") == "auto" else objective
