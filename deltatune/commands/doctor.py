"""`deltatune doctor`: the machine, or a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from deltatune import doctor as findings
from deltatune.commands.methods import Json
from deltatune.commands.runs import check_run
from deltatune.commands.shell import BAD_INPUT, UNVERIFIED, emit, machine, main, screen
from deltatune.terminal import plain

MARKS = {True: ("ok", "green"), False: ("wrong", "red"), None: ("", "dim")}


@main.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A run folder to check instead.")] = None,
    json_: Json = False,
) -> None:
    """Say what this machine offers, or whether a run folder is whole."""
    if folder is not None:
        check_run(folder)
    checks = findings.environment() if folder is None else findings.run_folder(folder)
    ok = all(check.ok is not False for check in checks)
    if machine():
        emit({"ok": ok, "checks": [check.to_json() for check in checks]})
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for check in checks:
            word, style = MARKS[check.ok]
            cells = (Text(plain(part)) for part in (check.name, check.value, check.note))
            table.add_row(Text(word, style=style), *cells)
        screen().print(table)
    if not ok:
        raise typer.Exit(BAD_INPUT if folder is None else UNVERIFIED)
