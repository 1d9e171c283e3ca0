"""`deltatune methods`: what there is to train, read from the index without torch. `deltatune schema`: for editors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from deltatune import about
from deltatune.commands.shell import emit, machine, main, screen

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


START = """Start here: --method lora, which suits every objective. ia3 trains the fewest
numbers, for few rows; qlora where the model does not fit into memory.
"""


ORDINAL = re.compile(r"((?:[^.]*\.)*?)(\d+)((?:\..*)?)")  # the first part of a dotted name that is a number
ORIGIN = "(peft type; source of defaults)"


def listing(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method and preset as one flat record; found: what `surveyed` says of each on a model."""
    return [{**about.record(name), **found.get(name, {})} for name in about.names()]


def surveyed(model: str | None, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Each method and preset (or one) on one model: its sites and trainable numbers, or why the model's family refuses
    it ("refused"), or what its defaults leave open ("needs"). Empty without a model."""
    if model is None:
        return {}
    import torch

    import deltatune.methods  # noqa: F401 (fills the registry)
    from deltatune.core.delta import Refusal
    from deltatune.core.registry import survey

    with torch.device("meta"):  # the architecture decides: no weights are read, no memory is taken
        base = skeleton(model)
        found = survey(base, only)
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
    """What the model says of it; else what it is, in a sentence."""
    for key in ("refused", "needs"):
        if key in record:
            return f"{key}: {record[key]}"
    if "sites" in record:
        return ", ".join(f"{count} {site}" for site, count in ranged(record["sites"]).items())
    return str(record.get("doc") or record.get("note") or "")


def ranged(sites: Mapping[str, int]) -> dict[str, int]:
    """Sites whose names differ in the first number only as one, with how many they are together: {"h.5-11": 7}."""
    alike: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        found = ORDINAL.fullmatch(site)
        before, number, after = found.groups() if found else (site, "", "")
        alike.setdefault((before, after), []).append(number)
    return {
        f"{before}{spans(int(n) for n in numbers if n)}{after}": sum(sites[f"{before}{n}{after}"] for n in numbers)
        for (before, after), numbers in alike.items()
    }


def spans(numbers: Iterable[int]) -> str:
    """5, 6, 7, 9 -> '5-7,9'."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def origin(record: Mapping[str, Any]) -> str:
    """The peft type of its saved form, where it has one, and whose the defaults are."""
    return "; ".join(part for part in (record["peft"] and f"peft {record['peft']}", record["source"]) if part)


def cells(record: dict[str, Any], counted: bool) -> list[str]:
    """One line of the table; counted: with the trainable numbers of a model."""
    found = [record["name"], record["paper"] or "", record["kind"] or "", "yes" if record["mergeable"] else "no"]
    found += [f"{record['parameters']:,}" if "parameters" in record else "-"] if counted else []
    said, more = escape(spelled(record)), origin(record)
    return [*found, f"{said} [dim]({escape(more)})[/dim]" if more and "refused" not in record else said]


def page(found: dict[str, Any], model: str | None) -> Table:
    """One method or preset on one page of the terminal."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    paper = f"arXiv:{found['paper']}" if found["paper"] else "no paper"
    lines = [(found["name"], f"{found['kind']}, {paper}"), ("", found.get("doc") or found.get("note") or "")]
    fields = found.get("fields", {}).items()
    lines += [(f"  {name}", f"{brief(kind['default'])} ({kind['type']})") for name, kind in fields]
    lines += [("learning rate", about.span(found)), ("source", found["source"] or "-")]
    if own := about.recipe(found):
        lines += [("paper's recipe", own["name"] if own["name"] == found["name"] else f"{own['name']}: {own['note']}")]
        lines += [("  method", json.dumps(own["method"])), ("  settings", about.settings(own))]
    lines += [("merges", "yes" if found["mergeable"] else "no"), ("peft type", found["peft"] or "-")]
    lines += [("presets", ", ".join(there))] if (there := about.related(found["name"])) else []
    if model:
        counted = f"{found['parameters']:,} parameters; " if "parameters" in found else ""
        lines += [(f"on {model}", f"{counted}{spelled(found)}")]
    for left, right in lines:
        table.add_row(left, escape(right))
    return table


def brief(default: Any) -> str:
    """A field's default; methods inside by their names, which have pages of their own."""
    nested = isinstance(default, list) and all(isinstance(block, dict) for block in default)
    return ", ".join(name for block in default for name in block) if nested and default else repr(default)


@main.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method or preset: everything about it on one page.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Count sites and parameters on this model, and say what its family refuses.")
    ] = None,
    json_: Json = False,
) -> None:
    """List methods and presets: paper, kind, merging, peft type, whose the defaults are. With NAME: its page."""
    if name is not None:
        one(name, model)
        return
    records = listing(surveyed(model))
    if machine():
        emit(records)
        return
    screen().print(START, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    what = ["parameters", f"sites {ORIGIN}"] if model else [f"what it is {ORIGIN}"]
    for column in ("name", "arXiv", "kind", "merge", *what):
        wraps, right = column.endswith(ORIGIN), column == "parameters"
        width = 20 if wraps else None
        table.add_column(
            column, overflow="fold", no_wrap=not wraps, justify="right" if right else "left", min_width=width
        )
    for record in records:
        table.add_row(*cells(record, model is not None))
    screen().print(table)
    screen().print("\nfields, defaults, the paper's recipe: deltatune methods NAME")
    screen().print("sites and trainable parameters on a model: deltatune methods --model REF")


def one(name: str, model: str | None) -> None:
    """A method or preset: its page, or its record with the recipe's."""
    found = about.record(name)
    found |= surveyed(model, name).get(name, {})
    if machine():
        emit({**found, "paper_recipe": about.recipe(found), "presets": about.related(name)})
    else:
        screen().print(page(found, model))


@main.command()
def schema(json_: Json = False) -> None:
    """Print the JSON Schema of the configuration file (for editors)."""
    from deltatune.config import schema as build

    emit(build())
