"""How many tokens a run computes at once: a micro-batch that has more is computed in several passes.

Gradients are those of the micro-batch whole (sums of losses, divided by the targets of the step). What a pass holds for
its backward pass shrinks with its tokens, where a product of matrices loses nothing above some hundred rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.order import Batching, together
from . import memory

if TYPE_CHECKING:
    from ..data.encode import Encoded
    from .job import Job

ON_CPU = 1024  # tokens: what a layer makes of them stays in the processor's cache
LEAST = 512  # below, products of matrices are slower for each token


def chosen(job: Job) -> int | None:
    """Tokens computed at once; None: each micro-batch whole."""
    wanted = job.config.train.pass_tokens
    if wanted == "off":
        return None
    if wanted != "auto":
        return int(wanted)
    if job.config.train.rounding == "stochastic":  # a sum would be rounded by chance once more with every pass
        return None
    most = memory.batch_tokens(job)
    if job.device.type == "cpu":
        return ON_CPU if most > ON_CPU or job.config.data.streaming else None
    return fitting(job, most)


def fitting(job: Job, most: int) -> int | None:
    """A half, a quarter, ... of a micro-batch of `most` tokens, until it fits the free memory."""
    now, longest = most, memory.at_once(replace(job, pass_tokens=1))
    while now >= 2 * LEAST and memory.estimate(replace(job, pass_tokens=now, recompute=0))["total"] > memory.room(job):
        if now <= longest:  # a row is never parted
            break
        now //= 2
    return now if now < most else None


def parts(job: Job, rows: Sequence[Encoded]) -> list[list[int]]:
    """Of a micro-batch, the places of the rows of each pass."""
    if job.pass_tokens is None:
        return [list(range(len(rows)))]
    lengths = [job.prompts * job.reads.tokens(row) for row in rows]
    return cut(lengths, job.pass_tokens, packing=job.batching().packing)


def cut(lengths: Sequence[int], most: int | None, packing: bool) -> list[list[int]]:
    """Places of the rows of each pass of `most` tokens, rows of like length together; a row is never parted."""
    if most is None:
        return [list(range(len(lengths)))]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return together(longest_first, lengths, Batching(tokens=most, packing=packing))
