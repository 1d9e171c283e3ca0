"""Measure: the figures of a step, and evaluation in the middle of a run, which leaves no trace in the training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from deltatune.train import guard, resume, rng

if TYPE_CHECKING:
    from deltatune.data.batch import Batch
    from deltatune.train.loop import Loop

T = TypeVar("T")
PARTS_OF_STEP = ("data", "gradients", "update")


class Laps:
    """Where a step's time goes: `lap(part, what it made)` hands that on, and notes the seconds since the last one."""

    def __init__(self) -> None:
        self.at, self.seconds = time.perf_counter(), dict[str, float]()

    def __call__(self, part: str, made: T) -> T:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a step reads its loss and norm anyway
        began, self.at = self.at, time.perf_counter()
        self.seconds[part] = self.at - began
        return made


def figures(batches: Sequence[Batch], losses: Sequence[Tensor], laps: Mapping[str, float], step: int) -> dict[str, Any]:
    """A step's loss per target, sizes, seconds by part and speed (real tokens per second: no padding, no pictures)."""
    seconds = sum(laps.values())
    targets, tokens = sum(batch.targets for batch in batches), sum(_tokens(batch.inputs) for batch in batches)
    loss = float(torch.stack([x.double() for x in losses]).sum()) / targets
    rows = sum(len(batch.lens or batch.labels) for batch in batches)
    sizes = {"targets": targets, "tokens": tokens, "rows": rows, "seconds": seconds}
    parts = {f"{part}_s": lap for part, lap in laps.items()}
    return {
        "step": step,
        "loss": loss,
        **sizes,
        **parts,
        "tokens_per_s": tokens / seconds,
        "rows_per_s": rows / seconds,
    }


def _tokens(inputs: Mapping[str, Tensor]) -> int:
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return inputs["input_ids"].numel() if "input_ids" in inputs else 0


def better(result: Mapping[str, float], metric: str, higher: bool, best: float | None) -> bool:
    """Whether `result[metric]` beats `best`; nan beats nothing."""
    if metric not in result:
        raise ValueError(f"metric={metric!r} is not among what the evaluation measures: {', '.join(sorted(result))}")
    value = float(result[metric])
    if best is None:
        return value == value
    return value > best if higher else value < best


def validate(loop: Loop) -> None:
    """Evaluate if step and settings say so; a stop request cuts it short, and resume does it again."""
    p, s = loop.progress, loop.settings
    due = s.eval_every and (p.step % s.eval_every == 0 or p.step == s.steps)
    if not (loop.evaluate and due and p.step > p.evaluated):
        return
    modes = [(module, module.training) for module in loop.step.modules()]
    try:
        with rng.forked(), torch.no_grad(), loop.stop.aborting():
            loop.step.eval()
            result = dict(loop.evaluate())
    except guard.Interrupted:
        return  # done again on resume
    finally:
        for module, mode in modes:
            module.training = mode
    p.evaluated = p.step
    best = better(result, s.metric, s.higher_is_better, p.best)
    p.stale = 0 if best else p.stale + 1
    if best:
        p.best, p.best_step = float(result[s.metric]), p.step
    loop.tell("eval", result | {"step": p.step, "best": p.best, "best_step": p.best_step})
    if best and s.keep_best:
        resume.save(loop)
