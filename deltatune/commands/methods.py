"""`deltatune methods`: what there is to train, read from the index without torch. `deltatune schema`: for editors."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from deltatune import blocks
from deltatune.commands.shell import emit, machine, main, screen

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def listing(refused: dict[str, str]) -> list[dict[str, Any]]:
    """Every method and preset as one flat record."""
    records = []
    for name, entry in blocks.methods().items():
        defaults = {field: about.get("default") for field, about in entry.get("fields", {}).items()}
        kept = {key: entry.get(key) for key in ("paper", "kind", "mergeable", "peft", "lr")}
        records.append({"name": name, **kept, "defaults": defaults, "fields": entry.get("fields", {})})
    for name, entry in blocks.presets().items():
        made_of = blocks.preset(name)
        parts = [blocks.methods().get(next(iter(block)), {}) for block in made_of]
        mergeable = all(part.get("mergeable", False) for part in parts)
        kept = {"paper": entry.get("paper"), "kind": "preset", "mergeable": mergeable, "peft": None}
        records.append({"name": name, **kept, "note": entry.get("note"), "method": made_of})
    return [
        {**record, "refused": refused[record["name"]]} if record["name"] in refused else record for record in records
    ]


def refusals(model: str | None) -> dict[str, str]:
    """Why the model's family refuses a method, or a preset that holds it; empty without a model."""
    if model is None:
        return {}
    import torch

    from deltatune.core.registry import refused

    with torch.device("meta"):  # the architecture decides: no weights are read, no memory is taken
        found = {name: str(reason) for name, reason in refused(skeleton(model)).items()}
    for name in blocks.presets():
        parts = [part for block in blocks.preset(name) for part in block]
        found.update((name, found[part]) for part in parts if part in found)
    return found


def skeleton(ref: str) -> Any:
    """A model of the architecture that a reference names, without its weights."""
    import transformers

    from deltatune.zoo import model_path

    config = transformers.AutoConfig.from_pretrained(model_path(ref))
    kind = getattr(transformers, (config.architectures or ["?"])[0], None)
    return kind(config) if kind else transformers.AutoModel.from_config(config)


def spelled(record: dict[str, Any]) -> str:
    """Defaults, or what a preset stands for, on one line."""
    if record["kind"] == "preset":
        return json.dumps(record["method"])
    return ", ".join(f"{key}={value}" for key, value in record["defaults"].items())


@main.command()
def methods(
    model: Annotated[str | None, typer.Option(help="Say which methods this model's family refuses, and why.")] = None,
    json_: Json = False,
) -> None:
    """List methods and presets: paper, kind, whether they merge, peft type, defaults."""
    records = listing(refusals(model))
    if machine():
        emit(records)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "paper", "kind", "merge", "peft", "defaults"):
        table.add_column(column, overflow="fold", no_wrap=column != "defaults")
    for record in records:
        what = f"refused: {record['refused']}" if "refused" in record else spelled(record)
        paper = f"arXiv:{record['paper']}" if record["paper"] else ""
        cells = (record["name"], paper, record["kind"] or "", "yes" if record["mergeable"] else "no")
        table.add_row(*cells, record["peft"] or "-", what.replace("[", r"\["))
    screen().print(table)


@main.command()
def schema(json_: Json = False) -> None:
    """Print the JSON Schema of the configuration file (for editors)."""
    from deltatune.config import schema as build

    emit(build())
