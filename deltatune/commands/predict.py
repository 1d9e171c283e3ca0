"""`deltatune predict`: what a trained classifier, tagger or question answering model says of new rows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.commands.adapted import (
    READING,
    Adapter,
    Combine,
    Model,
    Objective,
    SoftPrompt,
    Task,
    asked_for,
    opened,
    row,
    told,
)
from deltatune.commands.ahead import intake, rows_there
from deltatune.commands.methods import Json
from deltatune.commands.shell import emit, machine, main, note, screen, strict
from deltatune.commands.train import Sets, chosen
from deltatune.terminal import plain


@main.command()
def predict(
    text: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help='Texts, or rows such as \'{"title": "..."}\'.')
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    data: Annotated[str | None, typer.Option(help="Rows to ask about, - for standard input; no labels needed.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A new file for the predictions, a JSON line a row.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows at once; left out: as many as fit 4096 tokens.")
    ] = None,
    objective: Objective = None,
    soft_prompt: SoftPrompt = None,
    task: Task = None,
    combine: Combine = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Ask a classifier, tagger or question answerer about new rows: a JSON line each, in their order."""
    if bool(text) == (data is not None):
        raise ValueError("give TEXT or --data FILE (- for standard input), one of them")
    if out is not None and (out.exists() or not out.parent.is_dir()):
        reason = "is there already" if out.exists() else f"cannot be written: there is no folder {out.parent}"
        raise ValueError(f"--out {out} {reason}; choose another name")
    reads = chosen(set_, READING).data.model_dump(include={"format", "columns"}, exclude_unset=True)
    block = asked_for(objective)
    early = {**told("predict", model, adapter, block), **reads}
    if data is not None:
        rows_there([data], intake(early, asks=True))
    loaded, tokenizer, record = opened(model, adapter, block)
    from deltatune.train.predict import Asked, answered

    how = Asked(batch, soft_prompt, task, combine, **reads)
    rows = data if data is not None else [row(one) for one in text or ()]
    found, notes = answered(loaded, tokenizer, record, rows, how)
    for line in notes:
        note(line)
    deliver(found, out, notes)


def deliver(found: list[dict[str, Any]], out: Path | None, notes: list[str]) -> None:
    """Predictions to a file; or as one document, as a line of words a row (on a terminal), or as JSON lines."""
    if out is not None:
        fresh = out.with_name(f".{out.name}.part")
        fresh.write_text("".join(f"{line(one)}\n" for one in found), encoding="utf-8")
        os.replace(fresh, out)
        note(f"{len(found)} predictions are in {out}")
    if machine():
        emit({"rows": len(found), "notes": notes, **({"out": str(out)} if out else {"predictions": found})})
    elif out is None:
        for one in found:
            screen().print(plain(words(one)) if sys.stdout.isatty() else line(one), markup=False, soft_wrap=True)


def line(one: dict[str, Any]) -> str:
    """A prediction as a line of JSON."""
    return json.dumps(strict(one), allow_nan=False)


def words(one: dict[str, Any]) -> str:
    """A prediction for a reader: which row, what is said, and how sure of it the model is."""
    row = f"{one.get('id', one['index'])}: "
    if "tags" in one:
        return row + ("; ".join(f"{e['text']} ({e['type']})" for e in one["entities"]) or "nothing")
    if "end" in one:
        return f"{row}{one['answer'] or 'no answer'}  {one['score']:.3f}"
    if "scores" not in one:
        return f"{row}{one['score']:.4g}"
    said = ", ".join(one["labels"]) or "none" if "labels" in one else one.get("answer", one["label"])
    shares = sorted(one["scores"].items(), key=lambda pair: -pair[1])
    return f"{row}{said}  ({', '.join(f'{name} {share:.3f}' for name, share in shares[:5])})"
