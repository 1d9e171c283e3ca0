"""Sampler: which rows make up optimizer step n, a pure function of (seed, epoch, position) and one global cursor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

Plan = Callable[[int], list[list[int]]]  # epoch -> micro-batches of row numbers, in order


@dataclass(frozen=True)
class Cursor:
    """Where step `step` lies: `position` counts optimizer steps inside `epoch`. All from 0."""

    step: int
    epoch: int
    position: int


class Sampler:
    """Groups the micro-batches of `plan(epoch)` into optimizer steps of `accumulate`, epoch after epoch.

    `plan` holds the seed (`lambda epoch: data.batch.plan(lengths, ..., seed=seed, epoch=epoch)`) and may give another
    number of micro-batches every epoch. A step never straddles two epochs: an epoch's last, incomplete group is a step
    of its own. Nothing is replayed on resume: a cursor names its epoch, so one call of `plan` finds the place.
    """

    def __init__(self, plan: Plan, accumulate: int = 1):
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate}: give a whole number of micro-batches per step, at least 1")
        self.plan, self.accumulate = plan, accumulate
        self._first = {0: 0}  # epoch -> its first step, for the epochs whose start is known
        self._groups: tuple[int, list[list[list[int]]]] = (-1, [])

    def __call__(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step `step`."""
        cursor = self.cursor(step)
        return self._epoch(cursor.epoch)[cursor.position]

    def cursor(self, step: int) -> Cursor:
        """Where `step` lies, found from the nearest epoch whose start is known."""
        epoch, first = max((item for item in self._first.items() if item[1] <= step), key=lambda item: item[1])
        while step - first >= (size := len(self._epoch(epoch))):
            epoch, first = epoch + 1, first + size
            self._first[epoch] = first
        return Cursor(step, epoch, step - first)

    def steps(self, epochs: int) -> int:
        """How many optimizer steps `epochs` whole epochs are."""
        while epochs not in self._first:
            last = max(self._first)
            self._first[last + 1] = self._first[last] + len(self._epoch(last))
        return self._first[epochs]

    def state(self, step: int) -> dict[str, int]:
        """The cursor as JSON: {"step", "epoch", "position"}."""
        return asdict(self.cursor(step))

    def load(self, state: Mapping[str, int]) -> None:
        """Continue from `state`, without visiting the epochs before it."""
        cursor = Cursor(**state)
        size = len(self._epoch(cursor.epoch))
        if not 0 <= cursor.position < size:
            raise ValueError(
                f"the checkpoint stands at step {cursor.position} of epoch {cursor.epoch}, which has {size} steps: "
                "these are not the data of that run. Give the same data and batch size, or start a new run"
            )
        self._first[cursor.epoch] = cursor.step - cursor.position

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        if self._groups[0] != epoch:
            parts = self.plan(epoch)
            if not parts:
                raise ValueError(f"epoch {epoch} has no batches: the training data are empty after filtering")
            n = self.accumulate
            self._groups = epoch, [parts[i : i + n] for i in range(0, len(parts), n)]
        return self._groups[1]
