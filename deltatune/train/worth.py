"""Worth: the rule by which `train.compile: auto` decides, and what was measured for it, kept between runs."""

from __future__ import annotations

import json
import math
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ..core.recompute import held
from ..core.site import blocks
from ..fetch import cache
from . import memory

if TYPE_CHECKING:
    from .job import Job

SEEN = 5  # steps that are timed before `auto` decides, after one that warms up
GUESS = 60.0  # seconds that compiling may take where it has not been measured
SHARE = 0.05  # of the rest of a run that compiling may take
TIMES = 3.0  # what is saved must be so many times what is paid


@dataclass(frozen=True)
class Gain:
    """What compiling was measured to bring. saved: share of a step's seconds; seconds: what it takes, once."""

    saved: float
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """on: None where a block must be timed first."""

    on: bool | None
    why: str


def verdict(rest: float, gain: Gain | None) -> Verdict:
    """Whether to compile where `rest` seconds of eager steps are left, and compiling was measured to bring `gain`."""
    cost = gain.seconds if gain else GUESS
    if rest <= 0 or cost > SHARE * rest:
        return Verdict(False, f"{rest:.0f} s are left, compiling {'takes' if gain else 'may take'} {cost:.0f} s")
    if gain is None:
        return Verdict(None, "not measured")
    saves = f"it saves {100 * gain.saved:.1f} % of the {rest:.0f} s that are left and takes {cost:.0f} s"
    if gain.saved * rest < TIMES * cost:
        return Verdict(False, saves if gain.saved > 0 else f"blocks are not faster compiled ({100 * gain.saved:.1f} %)")
    return Verdict(True, saves)


def pinned(job: Job) -> str:
    """`train.compile` as far as it is known before step 1."""
    t = job.config.train
    longest = t.steps or math.ceil(t.epochs or 1.0) * len(job.rows)
    settled = t.deterministic or longest <= SEEN + 1 or t.neftune or not blocks(job.model)
    return "off" if t.compile == "auto" and settled else t.compile


# ---- what was measured, between runs ---------------------------------------------------------------------------------
def key_of(job: Job) -> str:
    """What a measurement holds for: the machine, the versions, the block's shapes with its adapter, the batches."""
    t, block = job.config.train, job.model.get_submodule(middle(job.model))
    shapes = [f"{n}{tuple(p.shape)}{p.dtype}{p.requires_grad:d}" for n, p in block.named_parameters()]
    found = {
        "machine": [processor(), torch.get_num_threads()],
        "versions": [torch.__version__, transformers.__version__],
        "block": [type(block).__name__, len(blocks(job.model)), *shapes],
        "method": [dict(part) for part in job.config.method],
        "batch": [
            t.batch_tokens,
            t.batch_rows,
            t.accumulate,
            job.batching().packing,
            memory.at_once(job),
            job.recompute,
        ],
        "run": [job.objective.name, len(held(job.model)), job.known is not None],
    }
    return json.dumps(found, default=str)


def processor() -> str:
    """The device's name, as precise as the system tells it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", told.read_text(encoding="utf-8")) if told.exists() else None
    return f"{named[1] if named else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def kept_in() -> Path:
    return cache("compile.json")


def measurements(notes: list[str]) -> dict[str, Any]:
    """Every measurement kept between runs; a file that cannot be read is as good as none, and a note says so."""
    path = kept_in()
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {key: asdict(Gain(float(kept["saved"]), float(kept["seconds"]))) for key, kept in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"{path} cannot be read ({error}): what compiling brings is measured anew")
        return {}


def middle(model: nn.Module) -> str:
    """A block that stands for the others: the middle one of those that have a backward pass."""
    names = held(model) or blocks(model)
    return names[len(names) // 2]
