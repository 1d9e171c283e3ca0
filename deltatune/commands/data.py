"""`deltatune data check`: what a file holds, before a run finds out."""

from __future__ import annotations

from typing import Annotated

import typer

from deltatune.commands.methods import Json
from deltatune.commands.shell import BAD_INPUT, emit, machine, main, screen

data = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
main.add_typer(data, name="data")


@data.callback()
def room() -> None:
    """Look at data before training on it."""


@data.command()
def check(
    file: Annotated[str, typer.Argument(help="File, folder, - (standard input), hub id or pypi: reference.")],
    model: Annotated[str | None, typer.Option(help="Count tokens and show the loss mask with its tokenizer.")] = None,
    eval_: Annotated[str | None, typer.Option("--eval", help="Look for rows of this set in the training set.")] = None,
    json_: Json = False,
) -> None:
    """Say what was inferred, what is wrong and where, and how long the rows are."""
    from deltatune.data.check import check as look

    tokenizer = None
    if model is not None:
        from transformers import AutoTokenizer

        from deltatune.zoo import model_path

        tokenizer = AutoTokenizer.from_pretrained(model_path(model))
    report = look(file, tokenizer=tokenizer, eval_ref=eval_)
    if machine():
        emit(report.to_json())
    else:
        report.print(screen())
    if not report.ok:
        raise typer.Exit(BAD_INPUT)
