"""What is wrong with a data set: faults of single rows, collected and counted, none dropped without a count."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHOWN_LINES = 5
SHOWN_VALUE = 60


class BadRow(ValueError):
    """One fault: where it is, which field, why it cannot be used, and the way out."""

    def __init__(self, kind: str, where: str, field: str, reason: str, fix: str):
        super().__init__(f"{where}: {field + ': ' if field else ''}{reason}. {fix}")
        self.kind, self.where, self.field, self.reason, self.fix = kind, where, field, reason, fix

    def __reduce__(self) -> tuple:
        return BadRow, (self.kind, self.where, self.field, self.reason, self.fix)


@dataclass
class Problem:
    """All faults of one kind in one field of one file: how many, the first lines, one reason and the fix."""

    kind: str
    file: str
    field: str
    reason: str
    fix: str
    count: int = 0
    lines: list[int] = dataclasses.field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.lines[0]}" if self.lines else self.file

    def __str__(self) -> str:
        more = ""
        if self.count > 1:
            lines = ", ".join(map(str, self.lines)) + (", ..." if self.count > len(self.lines) else "")
            more = f" ({self.count} times: lines {lines})"
        return f"{self.where}: [{self.kind}] {self.field + ': ' if self.field else ''}{self.reason}. {self.fix}{more}"

    def to_json(self) -> dict:
        names = ("kind", "file", "field", "reason", "fix", "count", "lines")
        return {name: getattr(self, name) for name in names}


class Problems:
    """Counts rows: `seen == good + bad` always holds once a source is read to its end.

    `errors` make a row unusable, `warnings` do not, `notes` say what was done silently elsewhere (a BOM skipped).
    Memory is bounded by the number of kinds, not of rows.
    """

    def __init__(self) -> None:
        self.good = 0
        self.bad = 0
        self._errors: dict[tuple, Problem] = {}
        self._warnings: dict[tuple, Problem] = {}
        self._notes: dict[str, None] = {}

    @property
    def seen(self) -> int:
        return self.good + self.bad

    @property
    def errors(self) -> list[Problem]:
        return list(self._errors.values())

    @property
    def warnings(self) -> list[Problem]:
        return list(self._warnings.values())

    @property
    def notes(self) -> list[str]:
        return list(self._notes)

    def reject(self, faults: Iterable[BadRow]) -> None:
        """One row (or one unreadable rest of a file) is lost, for these reasons."""
        self.bad += 1
        for fault in faults:
            _count(self._errors, fault)

    def retract(self, fault: BadRow) -> None:
        """A row that was good until a later stage (its tokens) refused it."""
        self.good -= 1
        self.reject([fault])

    def accept(self) -> None:
        self.good += 1

    def warn(self, fault: BadRow) -> None:
        _count(self._warnings, fault)

    def note(self, text: str) -> None:
        self._notes[text] = None

    def refuse(self) -> None:
        """Raise a ValueError that prints every problem, if there is one."""
        if self._errors:
            head = f"{self.bad} of {self.seen} rows cannot be used:"
            raise ValueError("\n  ".join([head, *map(str, self.errors)]))


def _count(found: dict[tuple, Problem], fault: BadRow) -> None:
    file, line = split(fault.where)
    key = (fault.kind, file, fault.field)
    problem = found.setdefault(key, Problem(fault.kind, file, fault.field, fault.reason, fault.fix))
    problem.count += 1
    if line is not None and len(problem.lines) < SHOWN_LINES:
        problem.lines.append(line)


def split(where: str) -> tuple[str, int | None]:
    """'a.jsonl:12' -> ('a.jsonl', 12); a place without a line gives None."""
    file, _, line = where.rpartition(":")
    return (file, int(line)) if file and line.isdigit() else (where, None)


def short(value: object) -> str:
    """A value on one line, cut to a readable length, without control characters."""
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."


def nearest(name: object, choices: Sequence[str], cutoff: float = 0.5) -> str:
    """' Did you mean ...?' for the closest choice, or nothing."""
    found = difflib.get_close_matches(str(name), choices, n=1, cutoff=cutoff)
    return f" Did you mean {found[0]!r}?" if found else ""
