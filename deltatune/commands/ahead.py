"""Ahead: what a command can know of its model, its rows and its adapter before torch is loaded or anything fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltatune import blocks
from deltatune.commands.runs import read_json
from deltatune.config import READ, Config, ConfigError
from deltatune.core.manifest import CONFIG, MANIFEST

HEADS = ("classify", "tag", "qa")  # objectives whose models have a task head, and no words


def model_there(ref: str) -> None:
    """ValueError for a model that is not there, or a package that nobody knows."""
    from deltatune.zoo import HUB_ID, MODELS, model_path, package

    if ref.startswith("pypi:"):
        package(ref, MODELS)
    elif (Path(ref).expanduser().exists() or not HUB_ID.match(ref)) and not ref.endswith(".gguf"):
        model_path(ref)


def rows_there(refs: Sequence[str], how: Any, most: int | None = None) -> None:
    """ValueError for rows that are not there, or the first of which cannot be used. how: an Intake."""
    from deltatune.data.ahead import look
    from deltatune.data.sources import task_of
    from deltatune.zoo import DATA, package

    for ref in refs:
        if (file := task_of(ref)[1]).startswith("pypi:"):
            package(file, DATA)
        look(ref, how, most)


def run_there(config: Config) -> None:
    """ValueError where a run's keys do not go together, its model or rows are not there, its rows cannot be used, or
    its methods do not fit."""
    from deltatune.data.wanted import Intake
    from deltatune.train.supported import check_supported

    check_supported(config)
    if problems := blocks.soft_problems(config.method, config.objective, ("objective",)):  # of a default method too
        raise ConfigError(problems)
    model_there(config.model.name)
    data = config.data
    refs = [*data.train, *data.eval, *(ref for named in data.ood.values() for ref in named)]
    rows_there(refs, Intake(data.format, data.columns, blocks.wanted(config.objective)), 1 if data.streaming else None)


def intake(record: Mapping[str, Any], asks: bool = False) -> Any:
    """How the rows of an adapter's run are read, by what is recorded of it."""
    from deltatune.data.wanted import Intake

    read = {key: record[key] for key in READ if key in record}
    wanted = blocks.wanted(record.get("objective") or "sft")
    return Intake(wanted=wanted, asks=asks, run=tuple(record.get("read", ())), **read)


def asks_well(command: str, what: str, record: Mapping[str, Any]) -> None:
    """ValueError where `command` ("predict", "generate", "chat") is not how `what`, a model of this objective, is
    asked."""
    goal = next(iter(record.get("objective") or {}), "")
    if command == "predict" and not goal:
        raise ValueError(
            f"{what} does not say what its run learned: add --objective classify (or cloze, choice, tag, qa). One that "
            f"answers in words is asked with: {asking('generate', what)}"
        )
    if command == "predict" and goal == "sft":
        raise ValueError(f"{what} answers in words of its own (sft): {asking('generate', what)}")
    if command in ("generate", "chat") and goal in HEADS:
        raise ValueError(f"{what} does not answer in words, its run learned to {goal}: {asking('predict', what)}")


def asking(command: str, what: str) -> str:
    return f"deltatune {command} {what} --data FILE"


def is_weights(folder: Path, verb: str) -> None:
    """ValueError for an adapter whose methods are no change of weights, with what works instead."""
    known = blocks.methods()
    names = [name for block in read_json(folder / MANIFEST).get("methods") or () for name in block]
    fixed = [name for name in names if not known.get(name, {"mergeable": True})["mergeable"]]
    peft = read_json(folder / CONFIG).get("peft_type")
    if not names and peft in {entry["peft"] for entry in known.values() if entry["peft"] and not entry["mergeable"]}:
        fixed = [peft]
    if fixed:
        able = ", ".join(name for name, entry in known.items() if entry["mergeable"])
        raise ValueError(
            f"{folder} cannot be {verb}: {', '.join(fixed)} adds to the computation and has no equivalent weights. "
            f"Keep it attached (--adapter {folder}). These are changes of weights: {able}"
        )
