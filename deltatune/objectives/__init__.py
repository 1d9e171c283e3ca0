"""Objectives: loss(model, batch) -> (the sum over batch.targets targets, metrics)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ..data.problems import nearest
from .choice import Choice
from .classify import Classify
from .cloze import Cloze
from .qa import QA
from .sft import SFT
from .tag import Tag

__all__ = ["OBJECTIVES", "QA", "SFT", "Choice", "Classify", "Cloze", "Tag", "build", "record"]

OBJECTIVES: dict[str, type] = {
    "sft": SFT,
    "classify": Classify,
    "cloze": Cloze,
    "choice": Choice,
    "tag": Tag,
    "qa": QA,
}


def build(block: Any) -> Any:
    """'sft', {'classify': {...}} or an objective -> the objective. ValueError with the nearest name."""
    if not isinstance(block, str | Mapping):
        return block
    name, given = (block, {}) if isinstance(block, str) else next(iter(block.items()))
    if name not in OBJECTIVES:
        raise ValueError(
            f"unknown objective {name!r}.{nearest(name, list(OBJECTIVES))} There are: {', '.join(OBJECTIVES)}"
        )
    have = [f.name for f in fields(OBJECTIVES[name])]
    for key in given or {}:
        if key not in have:
            raise ValueError(
                f"objective {name!r} has no field {key!r}.{nearest(key, have)} Its fields: {', '.join(have)}"
            )
    given = {k: v for k, v in (given or {}).items() if v is not None}
    return OBJECTIVES[name](**given)


def record(objective: Any) -> dict[str, dict[str, Any]]:
    """The objective as the plain block that a configuration and a manifest hold."""
    hidden = {f.name for f in fields(objective) if f.metadata.get("internal")}
    found = {key: value for key, value in asdict(objective).items() if key not in hidden}
    if isinstance(found.get("labels"), tuple) and objective.name == "cloze":
        found["labels"] = {name: list(words) for name, words in found["labels"]}
    if objective.name == "choice":
        found["labels"] = dict(found["labels"])
    return {objective.name: found}
