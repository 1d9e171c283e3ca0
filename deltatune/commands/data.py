"""`deltatune data check`: what a file holds, before a run finds out."""

from __future__ import annotations

from typing import Annotated

import typer

from deltatune.commands.adapted import READING
from deltatune.commands.methods import Json
from deltatune.commands.shell import BAD_INPUT, emit, machine, main, screen
from deltatune.commands.train import Sets, chosen
from deltatune.config import Train

MAX_LENGTH = Train().max_length

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
    max_length: Annotated[int, typer.Option(min=2, help="train.max_length of the run to come.")] = MAX_LENGTH,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Say what was inferred, what is wrong and where, and how long the rows are."""
    reads = chosen(set_, READING).data
    from deltatune.data.check import Encoding, Reading
    from deltatune.data.check import check as look

    tokenizer, encoding = None, Encoding()
    if model is not None:
        from deltatune.core.places import places
        from deltatune.data.media import reader
        from deltatune.train.opening import model_config, open_tokenizer
        from deltatune.zoo import model_path

        path = model_path(model)
        tokenizer, about = open_tokenizer(path), model_config(path)
        room = min(max_length, places(about) or max_length)
        encoding = Encoding(max_length=room, decoder=bool(about.is_encoder_decoder), media=reader(about))
    how = Reading(None if reads.format == "auto" else reads.format, reads.columns, encoding)
    report = look(file, tokenizer, eval_, how)
    if machine():
        emit(report.to_json())
    else:
        report.print(screen())
    if not report.ok:
        raise typer.Exit(BAD_INPUT)
