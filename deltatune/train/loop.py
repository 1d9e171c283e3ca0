"""Loop: the one training loop, for every objective. Weights after step n depend on (start, data, settings) alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune.train import guard, neftune, optim, resume, rng
from deltatune.train.measure import Laps, figures, validate
from deltatune.train.settings import Observer, Outcome, Progress, Settings
from deltatune.train.step import Step

if TYPE_CHECKING:
    from deltatune.data.batch import Batch
    from deltatune.train.checkpoint import Store

__all__ = ["Loop", "Observer", "Outcome", "Progress", "Settings", "Step"]


@dataclass(eq=False)
class Loop:
    """`Loop(...).run()` trains, resuming from `store` if it holds checkpoints.

    trainable: canonical key -> parameter; batches: step (from 0) -> its micro-batches, on the model's device, a pure
    function; evaluate: called without gradients in eval mode; conditional: patterns of keys that may see no gradient.
    """

    step: Step
    trainable: dict[str, nn.Parameter]
    batches: Callable[[int], Sequence[Batch]]
    settings: Settings
    evaluate: Callable[[], Mapping[str, float]] | None = None
    store: Store | None = None
    sampler: Any = None  # Sampler or Flow: its cursor goes into the checkpoint
    observers: Sequence[Observer] = ()
    conditional: Sequence[str] = ()
    progress: Progress = field(default_factory=Progress, init=False)
    optimizer: optim.Optimizer = field(init=False)
    watch: guard.Watch = field(init=False)
    saved_at: float = field(default_factory=time.monotonic, init=False)

    def run(self) -> Outcome:
        """Train to the end, to a stop request (SIGINT, SIGTERM) or to a GuardStop / VerificationError."""
        s = self.settings
        with (
            self.store.lock() if self.store else nullcontext(),
            rng.forked(),
            guard.signals() as self.stop,
            neftune.noise(self.step, s.neftune, s.seed) as self.noise,
        ):
            try:
                self._open()
                while not (status := self._status()):
                    self._advance()
                return self._close(status)
            except BaseException as error:
                self.tell("end", {"status": "failed", "step": self.progress.step, "error": str(error)})
                raise

    def _open(self) -> None:
        self.optimizer = optim.Optimizer(self.trainable, self.settings)
        self.watch = guard.Watch(self.trainable, self.conditional)
        self.deltas = guard.active(self.step, self.trainable, self.settings.steps)
        self.others = guard.outside(self.step, self.trainable)
        guard.covers(self.step, self.trainable, self.optimizer.model)
        self.optimizer.zero()
        rng.seed_run(self.settings.seed)
        notes = resume.restore(self) if self.store else []
        self.step.train()
        self.tell("start", {"step": self.progress.step, "steps": self.settings.steps, "notes": notes})
        validate(self)  # a stop request may have cut the last one short

    def _status(self) -> str:
        p, s = self.progress, self.settings
        if self.stop.signal is not None:
            return "interrupted"
        return "done" if p.step >= s.steps else "early" if 0 < s.patience <= p.stale else ""

    def _advance(self) -> None:
        lap, n, s = Laps(), self.progress.step, self.settings
        batches = lap("data", resume.drawn(self))
        rng.seed_step(s.seed, n)
        self.noise.start(n)
        losses, metrics = lap("gradients", self._backward(batches))
        rate = optim.factor(s, n, s.steps)
        metrics |= lap("update", self._update(losses, batches, rate))
        self.progress.step += 1
        self.tell("step", metrics | figures(batches, losses, lap.seconds, n + 1) | {"lr": s.lr * rate})
        validate(self)
        resume.periodic(self)

    def _backward(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Any]]:
        """Gradients of (sum of all losses) / (all targets): the same however a step is cut into micro-batches."""
        total = sum(batch.targets for batch in batches)
        if not total:
            raise guard.GuardStop(f"step {self.progress.step + 1} has no supervised target: every label is masked")
        losses, means = [], dict[str, Any]()
        for i, batch in enumerate(batches):
            self.noise.lens = batch.lens
            loss_sum, metrics = self.step(batch)
            loss = loss_sum / total
            for delta in self.deltas if i == 0 else ():
                loss = loss if (penalty := delta.penalty()) is None else loss + penalty
            guard.reachable(loss)
            loss.backward()
            self.optimizer.gather()
            losses.append(loss_sum.detach())
            for key, value in metrics.items():
                means[key] = means.get(key, 0.0) + value * (batch.targets / total)
        return losses, means

    def _update(self, losses: Sequence[Tensor], batches: Sequence[Batch], rate: float) -> dict[str, Any]:
        p, s, grads = self.progress, self.settings, self.optimizer.grads()
        guard.frozen(self.others)
        norm = self.optimizer.norm()
        fault = guard.finite(losses, norm, grads, [row for batch in batches for row in batch.where])
        if fault is None:
            self.watch.see(p.step, grads)
            if s.clip:
                self.optimizer.scale(norm, s.clip)
            self.optimizer.step(rate)
            for delta in self.deltas:
                delta.after_step(p.step + 1)
        p.skips = p.skips + 1 if fault else 0
        if fault and (s.nonfinite == "stop" or p.skips > s.most_skips):
            raise guard.GuardStop(f"step {p.step + 1}: {fault}. The weights are those of step {p.step}")
        self.optimizer.zero()
        return {"grad_norm": float(norm)} | ({"skipped": fault} if fault else {})

    def _close(self, status: str) -> Outcome:
        p = self.progress
        if status != "interrupted" and p.step:
            self.watch.check()
        resume.finish(self, best=self.settings.keep_best and status != "interrupted")
        self.tell("end", {"status": status, "step": p.step, "best": p.best, "best_step": p.best_step})
        return Outcome(status, p, self.stop.signal)

    def tell(self, event: str, record: dict[str, Any]) -> None:
        """Write an event to the journal and to every observer, whose random draws are undone."""
        if self.store:
            self.store.journal.append({"event": event, **record})
        with rng.forked() if self.observers else nullcontext():
            for observer in self.observers:
                getattr(observer, f"on_{event}")(record)
