"""`deltatune methods`: what there is to train, read from the index without torch. `deltatune schema`: for editors."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from deltatune import blocks
from deltatune.commands.shell import emit, machine, main, screen

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def listing(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method and preset as one flat record; found: what `surveyed` says of each on a model."""
    records = []
    for name, entry in blocks.methods().items():
        defaults = {field: about.get("default") for field, about in entry.get("fields", {}).items()}
        kept = {key: entry.get(key) for key in ("paper", "kind", "mergeable", "peft", "lr", "source")}
        records.append({"name": name, **kept, "defaults": defaults, "fields": entry.get("fields", {})})
    for name, entry in blocks.presets().items():
        made_of = blocks.preset(name)
        parts = [blocks.methods().get(next(iter(block)), {}) for block in made_of]
        mergeable = all(part.get("mergeable", False) for part in parts)
        kept = {"paper": entry.get("paper"), "kind": "preset", "mergeable": mergeable, "peft": None}
        more = {"source": entry.get("source"), "note": entry.get("note"), "method": made_of}
        records.append({"name": name, **kept, **more})
    return [{**record, **found.get(record["name"], {})} for record in records]


def surveyed(model: str | None) -> dict[str, dict[str, Any]]:
    """Each method and preset on one model: its sites and trainable numbers, or why the model's family refuses it
    ("refused"), or what its defaults leave open ("needs"). Empty without a model."""
    if model is None:
        return {}
    import torch

    from deltatune.core.delta import Refusal
    from deltatune.core.registry import survey

    with torch.device("meta"):  # the architecture decides: no weights are read, no memory is taken
        found = survey(skeleton(model))
    return {
        name: facts if isinstance(facts, dict) else {"refused" if isinstance(facts, Refusal) else "needs": str(facts)}
        for name, facts in found.items()
    }


def skeleton(ref: str) -> Any:
    """A model of the architecture that a reference names, without its weights."""
    import transformers

    from deltatune.zoo import model_path

    config = transformers.AutoConfig.from_pretrained(model_path(ref))
    kind = getattr(transformers, (config.architectures or ["?"])[0], None)
    return kind(config) if kind else transformers.AutoModel.from_config(config)


def spelled(record: dict[str, Any]) -> str:
    """What the model says of it; else defaults, or what a preset stands for, on one line."""
    for key in ("refused", "needs"):
        if key in record:
            return f"{key}: {record[key]}"
    if "sites" in record:
        return ", ".join(f"{count} {site}" for site, count in record["sites"].items())
    if record["kind"] == "preset":
        return json.dumps(record["method"])
    return ", ".join(f"{key}={value}" for key, value in record["defaults"].items())


def cells(record: dict[str, Any], counted: bool) -> list[str]:
    """One line of the table; counted: with the trainable numbers of a model."""
    paper = f"arXiv:{record['paper']}" if record["paper"] else ""
    found = [record["name"], paper, record["kind"] or "", "yes" if record["mergeable"] else "no", record["peft"] or "-"]
    found += [f"{record['parameters']:,}" if "parameters" in record else "-"] if counted else []
    return [*found, spelled(record).replace("[", r"\["), record["source"] or "-"]


@main.command()
def methods(
    model: Annotated[
        str | None, typer.Option(help="Count sites and parameters on this model, and say what its family refuses.")
    ] = None,
    json_: Json = False,
) -> None:
    """List methods and presets: paper, kind, whether they merge, peft type, sites or defaults, and whose those are."""
    records = listing(surveyed(model))
    if machine():
        emit(records)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    what = ["parameters", "sites"] if model else ["defaults"]
    for column in ("name", "paper", "kind", "merge", "peft", *what, "source"):
        wraps = column in ("defaults", "sites", "source")
        table.add_column(
            column, overflow="fold", no_wrap=not wraps, justify="right" if column == "parameters" else "left"
        )
    for record in records:
        table.add_row(*cells(record, model is not None))
    screen().print(table)


@main.command()
def schema(json_: Json = False) -> None:
    """Print the JSON Schema of the configuration file (for editors)."""
    from deltatune.config import schema as build

    emit(build())
