"""AdaLoRA's change to one layer (arXiv:2303.10512): y = W x + s P diag(lambda) Q x, with P and Q kept orthogonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import Delta, Dense
from ..core.joint import added, summed
from ._importance import NAMES
from .budget import Budget


class Triplets(Delta):
    """lora_B = P [d_out, r] and lora_A = Q [r, d_in] start small and random, lora_E = lambda [r, 1] zero."""

    unpruned = "AdaLoRA moves its ranks as it trains"
    kept: Tensor
    rank = property(lambda self: self.lora_A.shape[0])

    def __init__(self, d_in: int, d_out: int, settings: Any, budget: Budget):
        super().__init__()
        r, self.settings, self.budget = settings.init_r, settings, budget
        self.dropout, self.scale = settings.dropout, settings.alpha / r
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(r, d_in)), nn.Parameter(torch.empty(d_out, r))
        self.lora_E = nn.Parameter(torch.zeros(r, 1))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool), persistent=False)
        self.seen: dict[str, Tensor] = {}  # what `observe` smooths
        for factor in (self.lora_A, self.lora_B):
            nn.init.normal_(factor, std=0.02)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return self.lora_A * self.lora_E, self.lora_B, self.scale

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return added(self, x, y)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return summed(self, dense)

    def penalty(self) -> Tensor | None:
        """gamma (|P^T P - I|^2 + |Q Q^T - I|^2) (equation 4); "distances": its share of the mean of all layers'."""
        if not self.rank or not self.settings.gamma:
            return None
        unit = torch.eye(self.rank, device=self.lora_A.device, dtype=self.lora_A.dtype)
        gaps = torch.stack([torch.addmm(unit, m, m.T, beta=-1) for m in (self.lora_A, self.lora_B.T)])
        if self.settings.penalty == "squares":
            return self.settings.gamma * gaps.square().sum()
        return self.settings.gamma / (2 * len(self.budget.members)) * torch.linalg.vector_norm(gaps, dim=(1, 2)).sum()

    def begin(self, steps: int) -> None:
        if self.lora_A.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"AdaLoRA ranks by gradients in fp32, its parameters are {self.lora_A.dtype}")
        self.seen = {}
        self.kept.fill_(True)
        self.budget.begin(steps)

    def after_step(self, step: int) -> None:
        self.budget.arrive(step)

    @torch.no_grad()
    def mask(self) -> None:
        """Zero the pruned lambdas. P and Q stay, so that a triplet may come back at the next allocation."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)

    def state_extra(self) -> dict[str, Any]:
        return {**self.seen, "kept": self.kept, "allocations": self.budget.allocations}

    def load_extra(self, state: Mapping[str, Any]) -> None:
        self.budget.allocations = state["allocations"]
        self.kept.copy_(state["kept"])
        self.seen = {k: t.to(self.kept.device) for k, t in state.items() if k not in ("kept", "allocations")}

    def fold(self) -> None:
        """Drop the triplets that were pruned and are zero."""
        self.seen = {}
        if self.budget.allocations:
            self.cut(self.kept | (self.lora_E != 0).view(-1))

    @torch.no_grad()
    def cut(self, keep: Tensor) -> None:
        for name in NAMES:
            p = getattr(self, name)
            setattr(self, name, nn.Parameter((p[:, keep] if name == "lora_B" else p[keep]).clone(), p.requires_grad))
        self.kept = self.kept[keep].clone()

    def stored(self, layer: nn.Module) -> dict[str, Tensor]:
        return super().stored(layer) if self.rank else {}  # a layer that lost every triplet is not in the file

    def trained(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        return super().trained(layer) if self.rank else {}

    def take_form(self, tensors: Mapping[str, Tensor]) -> None:
        if (rank := len(tensors.get("lora_A", ()))) < self.rank:
            self.cut(torch.arange(self.rank, device=self.kept.device) < rank)
