"""Settings: what a run does; Progress: how far it is; Outcome: how it ended; Observer: who is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deltatune.train import optim

Record = Mapping[str, Any]


class Observer(Protocol):
    """The four events. Whatever an observer draws from a random generator is undone; records are plain JSON."""

    def on_start(self, record: Record) -> None: ...
    def on_step(self, record: Record) -> None: ...
    def on_eval(self, record: Record) -> None: ...
    def on_end(self, record: Record) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Settings(optim.Optim):
    """What a run does. `eval_every`, `save_every`: in optimizer steps, 0 is never (but a run always saves its end).

    `patience`: evaluations without a better `metric` before the run ends, 0 is off; `keep_best`: save at every better
    evaluation and end with those weights; `nonfinite`: "stop" the run or "skip" the step; `neftune`: noise alpha.
    """

    steps: int
    clip: float = 1.0  # of the gradient's L2 norm over all trainable tensors; 0 is off
    eval_every: int = 0
    save_every: int = 0
    save_seconds: float = 0.0  # or by time, 0 is never; when a run saves does not change what it learns
    metric: str = "loss"
    higher_is_better: bool = False
    patience: int = 0
    keep_best: bool = False
    nonfinite: str = "stop"
    most_skips: int = 10  # in a row
    neftune: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        optim.among("nonfinite", self.nonfinite, ("stop", "skip"))


@dataclass
class Progress:
    """How far a run is. `step` counts finished optimizer steps."""

    step: int = 0
    evaluated: int = 0
    saved: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0  # evaluations since the best
    skips: int = 0  # steps skipped in a row
    failures: int = 0  # saves failed in a row


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "done", "early" (patience) or "interrupted" (exit with 128 + signal)."""

    status: str
    progress: Progress
    signal: int | None = None
