"""What an objective reads of a row beside its format (Wanted), and how the rows of a set are read (Intake)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .example import Example
from .problems import BadRow, Problems, nearest, short
from .readers import Row

LABELS = ("label", "labels")
COMPLETIONS = ("completion", "response", "answer", "output")
TAGS = ("tags", "ner_tags", "labels")
ANSWERS = ("answers", "answer")


@dataclass(frozen=True)
class Wanted:
    """columns: those that a template names. answer: the names under which a row may hold what is learned. template: the
    text of the template, for messages. format: the one that rows with its columns are read in, whatever else fits."""

    columns: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    template: str = ""
    format: str | None = None

    def unread(self, where: str, name: str, have: Mapping[str, Any], more: str = "") -> BadRow:
        """The fault of a row whose column `name`, which the template reads, is missing or no text. have: its columns;
        more: a hint."""
        value = have.get(name)
        kind = "missing_field" if value is None else "data_type"
        why = "this row does not have it" if value is None else f"it is no text here: {short(value)}"
        names = [str(column) for column in have]
        fix = f"Its columns: {', '.join(names)}.{more or nearest(name, names)}"
        return BadRow(kind, where, name, f"the template {self.template!r} reads it, and {why}", fix)

    def untold(self, where: str, have: Mapping[str, Any], more: str = "") -> BadRow:
        """The fault of a row without the column that is learned."""
        name, names = self.answer[0], [str(column) for column in have]
        like = more or nearest(name, names, 0.6)
        seen = f" (columns {', '.join(names)})" if names else ""
        reason = f"it is what the objective learns, and this row does not have it{seen}"
        fix = f"Add it.{like} Name yours: data.columns: {{yours: {name}}}"
        return BadRow("missing_field", where, name, reason, fix)

    def told(self, example: Example) -> bool:
        """Whether a row says what is learned; true where any row does."""
        said = {LABELS: example.label is not None, TAGS: "tags" in example.extra, ANSWERS: "answers" in example.extra}
        return said.get(self.answer, True)

    def demand(self, examples: Iterable[Example]) -> None:
        """ValueError with every row that does not say what is learned."""
        problems = Problems()
        for example in examples:
            problems.accept()
            if not self.told(example):
                problems.retract(self.untold(example.where, example.row))
        problems.refuse()


NOTHING = Wanted()
WANTS = {  # of the objectives that no template can change
    "classify": Wanted(answer=LABELS),
    "tag": Wanted(answer=TAGS),
    "qa": Wanted(answer=ANSWERS, format="question_answering"),
}


@dataclass(frozen=True)
class Intake:
    """How rows are read.

    format: None: told by the columns. columns: {name in the file: name wanted}, or a list of names for a csv file
    without a header. asks: the rows ask for an answer, and what they say of it is not read. run: the columns that the
    run of an adapter read, for messages. Errors: ValueError for a template that would read the answer under the name it
    has in the file.
    """

    format: str | None = None
    columns: Sequence[str] | Mapping[str, str] = ()
    wanted: Wanted = NOTHING
    asks: bool = False
    run: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        told = next(
            (old for old, new in self.names.items() if new in self.wanted.answer and old in self.wanted.columns), ""
        )
        if told:
            raise ValueError(
                f"template {self.wanted.template!r}: {{{told}}} would tell the answer, which data.columns takes from "
                f"{told!r}: leave it out"
            )

    @property
    def names(self) -> Mapping[str, str]:
        """{name in the file: name wanted}; {} where `columns` is a list."""
        return self.columns if isinstance(self.columns, Mapping) else {}

    @property
    def left(self) -> tuple[str, ...]:
        """The columns that a row need not have, and that are not read."""
        return self.wanted.answer if self.asks else ()

    def taken(self, row: Row) -> Row:
        """The row without what it says of an answer that it asks for."""
        if not self.left:
            return row
        value = {name: v for name, v in row.value.items() if name not in self.left}
        given = {k: v for k, v in row.given.items() if not {k, self.names.get(k)} & set(self.left)}
        return replace(row, value=value, given=given)

    def doubled(self, row: Row) -> list[BadRow]:
        """The fault of a row of which several columns would get one name."""
        by: dict[str, list[str]] = {}
        for old in row.given:
            by.setdefault(self.names.get(old, ""), []).append(old)
        return [
            BadRow("renamed_twice", row.where, new, f"columns names {' and '.join(olds)} so", "Keep one of them")
            for new, olds in by.items()
            if new and len(olds) > 1
        ]

    def strange(self, row: Row) -> BadRow | None:
        """The fault of a row without a column that the adapter's run read, or None."""
        have = [str(name) for name in row.given or row.value]
        lacks = next((name for name in self.run if name not in have), None)
        if lacks is None:
            return None
        near = next((c for c in have if nearest(lacks, [c], 0.6)), "yours")
        reason = f"the adapter's run read {', '.join(self.run)}, and this row has {', '.join(have) or 'no columns'}"
        fix = f"Name yours: data.columns: {{{near}: {self.names.get(lacks, lacks)}}}.{nearest(lacks, have, 0.6)}"
        return BadRow("missing_field", row.where, lacks, reason, fix)

    def untold(self, example: Example) -> BadRow:
        """The fault of a row that does not say what is learned."""
        row = Row(dict(example.row), example.where)
        return self.wanted.untold(example.where, example.row, self.turned(row))

    def turned(self, row: Row) -> str:
        """A hint where `columns` is the wrong way round for a row, or names what it does not have; or nothing."""
        columns = row.given or row.value
        strange = [old for old, new in self.names.items() if old not in columns and new not in columns]
        pairs = [(old, new) for old, new in self.names.items() if old not in columns and new in columns]
        said = ", ".join(f"{new}: {old}" for old, new in pairs)
        if pairs:
            return f" Did you mean columns: {{{said}}}? The left side is the column in your file"
        return "".join(
            f" data.columns names {old!r}, which is no column here.{nearest(old, [str(c) for c in columns], 0.6)}"
            for old in strange
        )


AS_IT_COMES = Intake()
