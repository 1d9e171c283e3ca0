"""Flow: the batches of a set too large to hold, read lazily and resumed at any step without starting over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.batch import Batching
from ..data.encode import Encoded
from ..data.example import Example
from ..data.problems import Problems
from ..data.stream import Order, stream
from ..data.wanted import AS_IT_COMES, Intake
from .sampler import Cursor

Encode = Callable[[Sequence[Example]], list[Encoded]]
CORRECT = "Correct it; `deltatune resume` goes on after the last whole step, which is saved"


class BadStream(ValueError):
    """A row that cannot be used, met while training."""


@dataclass(frozen=True)
class Source:
    """Where rows come from and how they become tokens."""

    refs: tuple[str, ...]
    encode: Encode
    how: Intake = AS_IT_COMES
    seed: int = 0

    def rows(self, epoch: int, start: int) -> Iterator[tuple[int, Encoded]]:
        """(position after the row, row) of one epoch. BadStream, with file and line, for a row that cannot be used."""
        problems = Problems()
        for sample in stream([Path(ref) for ref in self.refs], problems, Order(self.seed, epoch), start, self.how):
            refuse(problems)
            try:
                rows = self.encode([sample.example])
            except ValueError as error:
                raise BadStream(f"{error}. {CORRECT}") from error
            for row in rows:
                yield sample.cursor, row
        refuse(problems)


def refuse(problems: Problems) -> None:
    if problems.errors:
        raise BadStream("\n".join(["a row cannot be used:", *(f"  {found}" for found in problems.errors), CORRECT]))


class Flow:
    """As Sampler, but a step yields rows, not row numbers, and steps are asked for in order (one may be repeated).

    A step's batches are filled in the stream's order, so memory is one block of rows. An epoch's last, incomplete group
    is a step of its own.
    """

    def __init__(self, source: Source, batching: Batching, accumulate: int = 1):
        self.source, self.batching, self.accumulate = source, batching, accumulate
        self.start, self.next = Cursor(0, 0, 0), Cursor(0, 0, 0)  # of the step made last, and of the one after it
        self.made: list[list[Encoded]] = []
        self.groups: Iterator[tuple[Cursor, list[list[Encoded]]]] = iter(())
        self.fresh = True

    def __call__(self, step: int) -> list[list[Encoded]]:
        """The micro-batches of optimizer step `step`."""
        if step == self.start.step and self.made:
            return self.made
        if step != self.next.step:
            raise ValueError(f"a streamed set is read in order: step {step} was asked for, {self.next.step} comes next")
        if self.fresh:
            self.groups, self.fresh = self._steps(self.next), False
        self.start = self.next
        self.next, self.made = next(self.groups)
        return self.made

    def state(self, step: int) -> dict[str, int]:
        """Where `step` begins, as JSON."""
        found = next((c for c in (self.next, self.start) if c.step == step), None)
        if found is None:
            raise ValueError(f"the place of step {step} is not known: the stream stands at {self.next.step}")
        return asdict(found)

    def load(self, state: Mapping[str, int]) -> None:
        """Continue from `state`."""
        self.next, self.made, self.fresh = Cursor(**state), [], True

    def _steps(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[list[Encoded]]]]:
        """(where the next step begins, this step's batches), epoch after epoch."""
        step, epoch, position = cursor.step, cursor.epoch, cursor.position
        while True:
            group: list[list[Encoded]] = []
            empty = True
            for end, batch in self._batches(epoch, position):
                empty = False
                group.append(batch)
                if len(group) == self.accumulate:
                    step += 1
                    yield Cursor(step, epoch, end), group
                    group = []
            if empty and position == 0:
                raise ValueError(f"{', '.join(self.source.refs)}: no rows to train on")
            epoch, position = epoch + 1, 0
            if group:
                step += 1
                yield Cursor(step, epoch, 0), group

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[int, list[Encoded]]]:
        """(position after the batch's last row, rows)."""
        batch: list[Encoded] = []
        end = position
        for after, row in self.source.rows(epoch, position):
            if self.batching.tokens and row.length > self.batching.tokens:
                most = self.batching.tokens
                raise BadStream(
                    f"{row.where}: the row has {row.length} tokens, train.batch_tokens allows {most}. "
                    f"Shorten it, or start over with train.batch_tokens {row.length}. {CORRECT}"
                )
            # windows of one text share a position: a batch may only end where the next row begins a new example
            if batch and after != end and not self._fits(batch, row):
                yield end, batch
                batch = []
            batch.append(row)
            end = after
        if batch:
            yield end, batch

    def _fits(self, batch: Sequence[Encoded], row: Encoded) -> bool:
        if self.batching.rows:
            return len(batch) < self.batching.rows
        lengths = [r.length for r in (*batch, row)]
        used = sum(lengths) if self.batching.packing else max(lengths) * len(lengths)
        return used <= (self.batching.tokens or 0)
