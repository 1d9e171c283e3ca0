"""Ahead: whether rows can be used, as far as the first of them tells, before a model is opened."""

from __future__ import annotations

from pathlib import Path

from .formats import examples
from .problems import BadRow, Problems
from .sources import files, is_hub, task_of
from .wanted import Intake


def look(ref: str, how: Intake, most: int | None = None) -> None:
    """ValueError for local rows that are not there, or the first of which cannot be used; then every row that cannot
    is listed, of the first `most`. What has to be fetched or piped in is not looked at."""
    _, file = task_of(ref)
    if file == "-" or file.startswith("pypi:") or is_hub(file):
        return
    path = Path(file).expanduser()
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe can be read but once
        return
    problems = Problems()
    files(file, problems)
    for example in examples(file, problems, how):
        if not (how.asks or how.wanted.told(example)):
            problems.retract(how.untold(example))
        if not problems.bad:
            return
        if most is not None and problems.seen >= most:
            break
    if not problems.seen:
        fix = "Write at least one, below the header line where the file has one"
        raise BadRow("no_rows", file, "", "there are no rows", fix)
    problems.refuse()
