"""Diff pruning (Guo et al. 2020, arXiv:2012.07463): theta = theta_0 + z * w, hard-concrete z under an L0 penalty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import Delta
from ..core.hardconcrete import Part, Sparse, keep_largest
from ..core.registry import finite, flag, method
from ..core.site import Site, linear_at, widths


@method("diffprune", paper="2012.07463", kind="selective", mergeable=True, tiny={"": {"alpha": 0.5}})
@dataclass(frozen=True)
class DiffPrune:
    """A sparse change of weights and biases: gates are learned, then only the largest changes stay and train on.

    density: the share of entries kept, over all targets together. l0: lambda. structured: one more gate per tensor,
    multiplied. prune_at: a share of the run, or a step (>= 1). alpha: where gates start. alpha_ratio: their learning
    rate as a multiple of the run's. Parameters: 2 per entry (+ 1 per tensor); stored: the kept values and indices.
    """

    density: float = 0.005
    l0: float = 1.25e-7
    structured: bool = True
    prune_at: float = 0.6
    alpha: float = 5.0
    alpha_ratio: float = 1000.0
    targets: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        flag("DiffPrune structured", self.structured)
        for name, above in (("density", 0.0), ("prune_at", 0.0), ("alpha_ratio", 0.0), ("alpha", -math.inf)):
            finite(f"DiffPrune {name}", getattr(self, name), above=above)
        finite("DiffPrune l0", self.l0)
        if self.density > 1:
            raise ValueError(f"DiffPrune density is a share in 0 < density <= 1, got {self.density!r}")
        if self.l0 < 0:
            raise ValueError(f"DiffPrune l0 must be >= 0, got {self.l0!r}")
        if self.prune_at >= 1 and self.prune_at != int(self.prune_at):
            raise ValueError(f"DiffPrune prune_at is a share of the run (< 1) or a whole step, got {self.prune_at!r}")

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        every: list[Diff] = []  # the largest changes are chosen over all layers together
        for site in linear_at(model, self.targets, "DiffPrune"):
            layer: Any = model.get_submodule(site.write)
            d_in, d_out = widths(layer)
            d_out = sum(b - a for a, b in site.columns) if site.columns else d_out
            shapes = {"weight": (d_out, d_in), **({"bias": (d_out,)} if layer.bias is not None else {})}
            every.append(Diff(shapes, self, every))
            yield site, every[-1]


class Diff(Sparse):
    """z * w of one layer: sampled gates in training, their deterministic value in evaluation, until pruned."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], settings: DiffPrune, every: list[Diff]):
        super().__init__({kind: Part(shape, settings.alpha, settings.structured) for kind, shape in shapes.items()})
        self.settings, self.every, self.at = settings, every, 0
        self.rates = {n: settings.alpha_ratio for n, _ in self.named_parameters() if not n.endswith(".w")}
        self.conditional = settings.l0 == 0  # without the penalty, a gate stuck at 1 sees no gradient

    def penalty(self) -> Tensor | None:
        """lambda times the expected number of open gates."""
        if self.pruned or not self.settings.l0:
            return None
        return self.settings.l0 * torch.stack([part.expected() for part in self.own.values()]).sum()

    def begin(self, steps: int) -> None:
        at = self.settings.prune_at
        self.at = int(at) if at >= 1 else max(1, round(at * steps))
        if self.at >= steps and not self.pruned:
            raise ValueError(
                f"DiffPrune prune_at {at:g}: pruning after step {self.at} of {steps} leaves no step to train what is "
                "kept; give a smaller one, or more steps"
            )

    def after_step(self, step: int) -> None:
        if step == self.at and self is self.every[0] and not self.pruned:
            keep_largest([part for delta in self.every for part in delta.own.values()], self.settings.density)
