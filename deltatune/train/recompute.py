"""How many blocks a run recomputes in its backward pass: as asked, or as few as let the predicted peak fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.recompute import WHOLE, marked, units
from ..core.site import blocks
from . import memory

if TYPE_CHECKING:
    from .job import Job


def chosen(job: Job) -> int:
    """Of the model's `units`, the number to recompute. ValueError where more is asked for than there is."""
    wanted, there = job.config.train.checkpoint_gradients, units(job.model)
    if wanted == "off":
        return 0
    if wanted == "auto":
        return fewest(job, there)
    if not getattr(job.model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"train.checkpoint_gradients: {wanted} is not possible for {type(job.model).__name__}; leave it auto"
        )
    if not there:
        job.notes.append("gradient checkpointing: no block holds anything for a backward pass, so none is recomputed")
    if there == WHOLE and wanted != "on":
        job.notes.append(f"gradient checkpointing: {type(job.model).__name__} recomputes all blocks or none: here all")
    if wanted == "on" or there == WHOLE or not there:
        return len(there)
    if wanted > len(there):
        raise ValueError(
            f"train.checkpoint_gradients: {wanted}, and {len(there)} of the {len(blocks(job.model))} blocks hold "
            "something for a backward pass: give a smaller number, a share below 1, or on"
        )
    return math.ceil(wanted * len(there)) if wanted < 1 else int(wanted)


def fewest(job: Job, there: Sequence[str]) -> int:
    """As many as a model that came so recomputes already, else as few as fit the free memory."""
    already = sum(marked(job.model, unit) for unit in there)
    none, room = memory.estimate(replace(job, recompute=0))["total"], memory.room(job)
    if already or not there or none <= room:
        return already
    each = none - memory.estimate(replace(job, recompute=1))["total"]
    count = min(len(there), math.ceil((none - room) / each)) if len(there) > 1 else 1
    what = "all blocks, which the family does not tell apart" if there == WHOLE else f"{count} of {len(there)} blocks"
    job.notes.append(
        f"gradient checkpointing is on for {what}: {none / 2**30:.1f} GiB would not fit without, where there are "
        f"{room / 2**30:.1f} GiB, the loaded weights' included"
    )
    return count


def count(job: Job) -> int:
    """Of all blocks, the number that are recomputed."""
    return len(blocks(job.model)) if job.recompute and units(job.model) == WHOLE else job.recompute


def pinned(job: Job) -> str | int:
    """The choice as a configuration says it, so that a resumed run does the same."""
    if not job.recompute:
        return "off"
    return "on" if job.recompute == len(units(job.model)) else job.recompute
