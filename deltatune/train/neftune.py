"""NEFTune (Jain et al. 2023, arXiv:2310.05914): y = E[ids] + u alpha / sqrt(L d), u uniform in [-1, 1], in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.site import embeddings, input_layer
from deltatune.train import rng


class Noise:
    """The hook on an embedding and its private generator, seeded by (seed, step): nothing to checkpoint."""

    def __init__(self, alpha: float, seed: int):
        self.alpha, self.seed, self.calls = alpha, seed, 0
        self.lens: tuple[int, ...] | None = None  # of a packed batch: L is each sequence's own length
        self.generator = torch.Generator()

    def start(self, step: int) -> None:
        """Begin optimizer step `step`."""
        self.generator.manual_seed(rng.mix(self.seed, step, "neftune"))

    def add(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """y [rows, seq, d] -> y with noise; None (unchanged) outside training."""
        if not module.training:
            return None
        self.calls += 1
        lens = torch.tensor(self.lens if self.lens else (y.shape[1],))
        length = torch.repeat_interleave(lens, lens)[:, None]  # [seq, 1]
        u = torch.empty(y.shape).uniform_(-1, 1, generator=self.generator)  # on the CPU: the same on every device
        return y + (u * self.alpha / (length * y.shape[-1]).sqrt()).to(y)


@contextmanager
def noise(module: nn.Module, alpha: float, seed: int) -> Iterator[Noise]:
    """Noise on the input embedding of `module.model` (or of `module` itself) for the time of the context."""
    hook = Noise(alpha, seed)
    if not alpha:
        yield hook
        return
    inner = getattr(module, "model", None)
    model = inner if isinstance(inner, nn.Module) else module
    tokens = embeddings(model) if input_layer(model) is not None else []
    if not tokens:
        raise ValueError(f"neftune={alpha}: {type(model).__name__} has no token embedding; set neftune to 0")
    # of an encoder-decoder the encoder's own module, though both share the table
    handle = model.get_submodule(tokens[0]).register_forward_hook(hook.add)
    try:
        yield hook
    finally:
        handle.remove()
