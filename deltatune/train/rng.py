"""Random generators of a run: seeded from (seed, step), captured without pickle, fenced off from observers.

Dropout at step n is a function of (seed, n) and of nothing else. A checkpointed generator would resume as exactly, but
then one more draw anywhere (an evaluation, a log line, a skipped step, another device count) would move every later
mask; a seeded step cannot be moved. The captured states are for what draws between steps: `random` and NumPy.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mix(*parts: object) -> int:
    """A 63-bit seed from any parts: neighbouring steps and seeds get unrelated streams."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_step(seed: int, step: int) -> None:
    """Put torch's generators (CPU and every accelerator) where step `step` of run `seed` starts."""
    torch.manual_seed(mix(seed, step, "step"))


def seed_run(seed: int) -> None:
    """Put every global generator where run `seed` starts."""
    random.seed(mix(seed, "python"))
    np.random.seed(mix(seed, "numpy") % 2**32)
    seed_step(seed, 0)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of torch (CPU, CUDA), `random` and NumPy, as tensors and as JSON."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": [version, list(words), gauss], "numpy": [kind, [int(k) for k in keys], *rest]}


def restore(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Undo `capture`. Accelerators that are not here any more are left out: every step seeds them anyway."""
    torch.set_rng_state(tensors["rng.torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if f"rng.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


@contextmanager
def forked() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace outside."""
    tensors, state = capture()
    try:
        yield
    finally:
        restore(tensors, state)
