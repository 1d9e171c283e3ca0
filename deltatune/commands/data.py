"""`deltatune data check`: what a file holds, before a run finds out."""

from __future__ import annotations

from typing import Annotated

import typer

from deltatune.commands.adapted import READING, asked_for
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
    objective: Annotated[
        str | None,
        typer.Option(help="Check the rows as this objective of a run reads them: a name, or YAML with its template."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="train.max_length of the run to come.")] = MAX_LENGTH,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Say what was inferred, what is wrong and where, and how long the rows are."""
    reads, block = chosen(set_, READING).data, asked_for(objective)
    from deltatune.data.check import Encoding, Reading
    from deltatune.data.check import check as look
    from deltatune.data.wanted import Intake, Wanted

    goal = None
    if block is not None:
        from deltatune.objectives import build

        goal = build(block)
    tokenizer, encoding, kind = None, Encoding(), "causal"
    if model is not None:
        from deltatune.core.places import places
        from deltatune.data.media import reader
        from deltatune.objectives.common import family
        from deltatune.train.opening import model_config, open_tokenizer
        from deltatune.zoo import model_path

        path = model_path(model)
        tokenizer, about = open_tokenizer(path), model_config(path)
        room = min(max_length, places(about) or max_length)
        decoder = bool(about.is_encoder_decoder) and not getattr(goal, "task_head", False)
        encoding, kind = Encoding(max_length=room, decoder=decoder, media=reader(about)), family(about)
    intake = Intake(reads.format, reads.columns, goal.wants if goal else Wanted())
    how = Reading(intake, encoding, goal, kind)
    report = look(file, tokenizer, eval_, how)
    if machine():
        emit(report.to_json())
    else:
        report.print(screen())
    if not report.ok:
        raise typer.Exit(BAD_INPUT)
