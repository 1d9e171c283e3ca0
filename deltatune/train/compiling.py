"""Compiling: whether a run's blocks run compiled, and from which step on: asked for, measured, or read again.

Compiling costs seconds to minutes once. `auto` looks at what is left of the run first and times one block only where
that much does not matter; it switches on where what is saved is several times what is paid. Steps before and after
differ in their last bits, so the step is written to env.json and into checkpoints, and a resumed run does the same.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.compiling import Compiled, programs
from ..core.delta import Refusal
from ..core.recompute import held
from . import memory
from .folder import write_json
from .job import Job
from .worth import SEEN, Gain, Verdict, kept_in, key_of, measurements, middle, verdict

log = logging.getLogger("deltatune")

REPEATS = 5
BATCHES = 3  # of different lengths; the last of them must not need a program of its own


# ---- one block, timed ------------------------------------------------------------------------------------------------
def called(job: Job, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What block `name` is called with in the first training batch, let go of whatever made it."""
    found: list[Any] = []
    block = job.model.get_submodule(name)
    handle = block.register_forward_pre_hook(lambda _, args, given: found.append((args, given)), with_kwargs=True)
    try:
        next(losses(job))
    finally:
        handle.remove()
    args, given = found[0]
    return tuple(cut_off(x) for x in args), {key: cut_off(x) for key, x in given.items()}


def cut_off(x: Any) -> Any:
    """A tensor without its graph; it wants a gradient as before."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def timing(block: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> Callable[[], float]:
    """Seconds of one pass of `block` forward and backward; no gradient is added to anything."""
    wanted = [x for x in (*args, *given.values(), *block.parameters()) if isinstance(x, Tensor) and x.requires_grad]

    def once() -> float:
        synchronise()
        began = time.perf_counter()
        output = block(*args, **given)
        y = output[0] if isinstance(output, tuple) else output
        torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
        synchronise()
        return time.perf_counter() - began

    return once


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(job: Job, step: float) -> Gain:
    """The gain of compiling, from one block forward and backward, in alternation with itself as it is.

    step: seconds of an optimizer step. What compiling takes counts twice: the lowest block, whose input wants no
    gradient, has programs of its own.
    """
    name, times = middle(job.model), list[tuple[float, float]]()
    once, made = timing(job.model.get_submodule(name), *called(job, name)), Compiled(job.model, [name])
    for _ in range(REPEATS + 1):
        eager = once()
        with made:
            times.append((eager, once()))
    saved = sorted(eager - fast for eager, fast in times[1:])[1]  # the second least: noise alone seldom saves so much
    often = job.config.train.accumulate * math.ceil(memory.batch_tokens(job) / memory.at_once(job))  # passes of a step
    return Gain(saved=often * len(held(job.model)) * saved / step, seconds=2 * max(times[0][1] - times[1][1], 0.0))


# ---- of a run --------------------------------------------------------------------------------------------------------
class Compiling(nn.Module):
    """A run's choice: an observer of its loop, and a part of its step, so that checkpoints hold the choice.

    found: {} as long as nothing is decided, then {"from_step": number or None (never), "why": ...}.
    """

    def __init__(self, job: Job, folder: Path):
        super().__init__()
        self.job, self.path, self.steps = job, folder / "env.json", 0
        self.seconds: list[float] = []
        self.running = ExitStack()
        self.ready: int | None = None  # programs that there were when the first batches had been compiled
        self.found: dict[str, Any] = self.environment().get("compile") or {}

    def state_extra(self) -> dict[str, Any]:
        return {"found": self.found}

    def load_extra(self, state: Mapping[str, Any]) -> None:
        self.found = dict(state["found"]) or self.found

    def decide(self, start: int | None, why: str) -> None:
        self.found = {"from_step": start, "why": why}
        if (env := self.environment()).get("compile") != self.found:
            write_json(self.path, env | {"compile": self.found})

    def environment(self) -> dict[str, Any]:
        """What env.json holds; nothing where it is gone or damaged, since a checkpoint has the choice too."""
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    # ---- of the loop -------------------------------------------------------------------------------------------------
    def on_start(self, record: Mapping[str, Any]) -> None:
        self.steps, asked = record["steps"], self.job.config.train.compile
        if not self.found and asked != "auto":
            self.decide(1 if asked == "on" else None, f"train.compile: {asked}")
        start = self.found.get("from_step")
        if start is not None and start <= record["step"] + 1 <= self.steps:
            self.begin()

    def on_step(self, record: Mapping[str, Any]) -> None:
        if not self.found:
            self.seconds.append(record["seconds"])
        if not self.found and len(self.seconds) > SEEN:
            self.choose(record["step"])
        if self.found.get("from_step") == record["step"] + 1:
            self.begin()

    def on_eval(self, record: Mapping[str, Any]) -> None: ...

    def on_end(self, record: Mapping[str, Any]) -> None:
        if self.ready is not None and (late := programs() - self.ready):
            self.note(f"compiled blocks: {late} programs more were compiled on the way, for batches unlike the first")
        self.close()

    def close(self) -> None:
        self.ready = None
        self.running.close()

    # ---- on and off --------------------------------------------------------------------------------------------------
    def choose(self, step: int) -> None:
        """After `step` steps: compile from the next one on, or never. A run is never lost to the question."""
        try:
            said = self.judged(step)
        except Exception as error:  # whatever a tracer, a C++ compiler or a folder that cannot be written raises
            self.give_up(error)
            return
        self.decide(step + 1 if said.on else None, said.why)

    def judged(self, step: int) -> Verdict:
        """By what was measured before, or is measured now."""
        seconds = statistics.median(self.seconds[1:])
        rest, notes = (self.steps - step) * seconds, list[str]()
        key = key_of(self.job)
        kept = measurements(notes).get(key)
        said = verdict(rest, Gain(**kept) if kept else None)
        for note in notes:
            self.note(note)
        if said.on is not None:
            return said
        with kept_buffers(self.job.model):
            gain = measured(self.job, seconds)
        write_json(kept_in(), measurements([]) | {key: asdict(gain)})
        return verdict(rest, gain)

    def begin(self) -> None:
        """Compile; blocks stay as they are where that fails."""
        began = time.perf_counter()
        try:
            self.running.enter_context(Compiled(self.job.model))
            with kept_buffers(self.job.model):
                rehearse(self.job)
        except Exception as error:
            self.give_up(error)
            return
        self.ready = programs()
        self.note(f"blocks compiled ({self.found['why']}): {time.perf_counter() - began:.0f} s", logging.INFO)

    def give_up(self, error: Exception) -> None:
        self.close()
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        self.decide(None, f"blocks could not be compiled: {first}")
        self.note(f"blocks run as they are, for they could not be compiled: {first}")

    def note(self, text: str, level: int = logging.WARNING) -> None:
        self.job.notes.append(text)
        log.log(level, "%s", text)


def losses(job: Job) -> Iterator[Tensor]:
    """Of one pass after another, in the run's order."""
    sampler = job.sampler()
    batches = job.batches(sampler)
    for step in range(job.steps(sampler)):
        for batch in batches(step):
            if batch.targets:
                yield job.objective.loss(job.model, batch)[0] / batch.targets


def rehearse(job: Job) -> None:
    """Compile by the run's first batches, forward and backward; what trains gets no gradient of it.

    The same batches whenever a run begins or is resumed, because the lengths of the first one are in the programs.
    Refusal where every batch would be compiled anew.
    """
    found, parameters = losses(job), list(job.trainable().values())
    for _ in range(BATCHES):
        before = programs()
        if (loss := next(found, None)) is None:
            break
        torch.autograd.grad(loss, parameters, allow_unused=True)
        if (new := programs() - before) == 0:
            break
    else:
        why = f"each of {BATCHES} batches needed programs of its own ({new} for the last one)."
        raise Refusal(why, found=type(job.model).__name__, instead="train.compile: off")


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """What passes inside write into buffers (running averages) is undone."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, was in before:
                if not torch.equal(buffer, was):
                    buffer.copy_(was)
