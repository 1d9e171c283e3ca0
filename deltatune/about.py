"""What the index says of a method or preset: one flat record, and the lines that pages and the terminal show of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltatune import blocks
from deltatune.marks import nearest


def names() -> list[str]:
    """Every method, then every preset."""
    return [*blocks.methods(), *blocks.presets()]


def record(name: str) -> dict[str, Any]:
    """A method or preset with everything that a program may want to know. Unknown: ValueError with the nearest name."""
    known = blocks.methods()
    if name in known:
        entry = known[name]
        defaults = {field: about.get("default") for field, about in entry.get("fields", {}).items()}
        kept = ("paper", "kind", "mergeable", "peft", "lr", "lr_range", "source", "recipe", "doc")
        return {"name": name, **{k: entry.get(k) for k in kept}, "defaults": defaults, "fields": entry["fields"]}
    if name not in blocks.presets():
        raise ValueError(f"no method or preset {name!r}{nearest(name, names())}; there are {', '.join(names())}")
    entry, made_of = blocks.presets()[name], blocks.preset(name)
    parts = [known.get(next(iter(block)), {}) for block in made_of]
    mergeable, peft = all(part.get("mergeable", False) for part in parts), None
    if len(parts) == 1:  # a peft folder holds one method
        peft = parts[0].get("peft")
    own = ("paper", "lr", "lr_range", "note", "model", "objective", "train")
    whose = "paper" if "lr" in entry.get("train", {}) else "swept" if "swept" in entry else "default of its methods"
    facts = {"name": name, "kind": "preset", "mergeable": mergeable, "peft": peft, "source": f"lr: {whose}"}
    return {**facts, **{k: entry.get(k) for k in own}, "method": made_of}


def recipe(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The preset that trains as the paper does: a method names it; a preset has it under its own name and `-paper`, or
    is one itself."""
    own = found["name"]
    name = found.get("recipe") or next((n for n in (f"{own}-paper", own) if n in blocks.presets()), "")
    return record(name) if name else None


def related(name: str) -> list[str]:
    """The presets that a method is part of."""
    return [p for p in blocks.presets() if any(name in block for block in blocks.preset(p))]


def settings(found: Mapping[str, Any]) -> str:
    """What a preset says of a run beside its method: `lr 0.0003, epochs 5`; lr first."""
    said = [f"{k} {v}" for k, v in blocks.lr_first(found.get("train") or {})]
    said += [f"model.{k} {v}" for k, v in (found.get("model") or {}).items()]
    said += [f"objective {found['objective']}"] if found.get("objective") else []
    return ", ".join(said) or "none beside the method's fields"


def span(found: Mapping[str, Any]) -> str:
    """`0.001; a run is warned outside 0.0001 to 0.005`."""
    low, high = found["lr_range"]
    return f"{found['lr']:g}; a run is warned outside {low:g} to {high:g}"


def sourced(name: str) -> str:
    """What a method's page in docs/methods says of the learning rate, of whose the defaults are, and of the recipe."""
    found = record(name)
    paper = recipe(found)
    own = f"`method: {paper['name']}` ({settings(paper)}): {paper['note']}." if paper else "none: there is no paper."
    return f"Learning rate: {span(found)}. Defaults: {found['source']}.\n\nThe paper's recipe: {own}"
