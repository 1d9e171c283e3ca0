"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W x + (alpha / r0) P diag(lambda) Q x, ranks moved as it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..core.delta import Delta
from ..core.registry import choice, finite, method, whole
from ..core.site import Site, linear_at
from .budget import Budget
from .starts import check_dropout, sized
from .triplets import Triplets

PENALTIES = ("squares", "distances")


@method(
    "adalora", paper="2303.10512", kind="linear", peft="ADALORA", mergeable=True,
    tiny={"": {"init_r": 6, "r": 4}},
)  # fmt: skip
@dataclass(frozen=True)
class AdaLoRA:
    """LoRA whose ranks start at `init_r` and end at `r` on average, most where the loss needs them most.

    `tinit`, `tfinal`, `delta_t`: steps before the budget shrinks, steps after, and between two allocations, each a
    share of the run's steps below 1. `gamma` weighs the penalty that keeps P and Q orthogonal, `beta1` and `beta2`
    smooth sensitivity and uncertainty. `penalty`: "squares" of the distances, summed over layers (the paper's equation
    4), or their mean, "distances" (the authors' program, and peft). Parameters: init_r (d_in + d_out + 1) per layer
    while training.
    """

    init_r: int = 12
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    gamma: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85
    tinit: float = 0.1
    tfinal: float = 0.3
    delta_t: float = 0.01
    penalty: str = "squares"

    def __post_init__(self) -> None:
        whole("AdaLoRA init_r", self.init_r)
        whole("AdaLoRA r", self.r)
        if self.r > self.init_r:
            raise ValueError(f"AdaLoRA r={self.r} is above init_r={self.init_r}: ranks only shrink on average")
        finite("AdaLoRA alpha", self.alpha, above=0)
        check_dropout("AdaLoRA", self.dropout)
        choice("AdaLoRA penalty", self.penalty, PENALTIES)
        for name in ("gamma", "beta1", "beta2", "tinit", "tfinal", "delta_t"):
            value = getattr(self, name)
            finite(f"AdaLoRA {name}", value)
            if value < 0 or (name.startswith("beta") and value >= 1):
                raise ValueError(f"AdaLoRA {name} must be >= 0{' and < 1' * name.startswith('beta')}, got {value!r}")

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        budget = Budget(self.r, (self.tinit, self.tfinal, self.delta_t))
        for site in linear_at(model, self.targets, "AdaLoRA"):
            made = Triplets(*sized(model, site, self.init_r, "AdaLoRA init_r"), self, budget)
            budget.members.append(made)
            yield site, made
