"""A low-rank change: y = W x + s (B A - B0 A0) x, where B0 A0 is what a start of PiSSA or OLoRA would add to W."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.delta import Delta, Dense
from ..core.joint import added, summed
from .starts import READ, olora, pissa


class LowRank(Delta):
    """A [r, d_in] and B [d_out, r]. A start with B0 A0 != 0 is subtracted, frozen, so that the base stays as it is."""

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, d_in: int, d_out: int, settings: tuple[int, float, float], scaling: str = "standard"):
        """`settings`: (r, alpha, dropout)."""
        super().__init__()
        self.r, self.alpha, self.dropout = settings
        self.scale = self.alpha / (math.sqrt(self.r) if scaling == "rslora" else self.r)
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(self.r, d_in)), nn.Parameter(torch.zeros(d_out, self.r))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @torch.no_grad()
    def start(self, init: str, weight: Tensor | None) -> None:
        """Give A and B the values of `init`. `weight` [d_out, d_in]: what PiSSA and OLoRA start from; None when the
        values are about to be loaded, and only their shapes matter."""
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        if init == "orthogonal":
            nn.init.orthogonal_(self.lora_A)
        if init not in READ:
            return
        if weight is not None and not weight.is_meta:
            exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
            a, b = (pissa if init == "pissa" else olora)(exact, self.r, self.scale)
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    @torch.no_grad()
    def restart(self) -> None:
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(self.lora_A)
            self.start_B.copy_(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, B whose product is the change. B A - B0 A0 = (B - B0) A + B0 (A - A0): one product of rank 2r that is
        exactly zero at the start, and that loses no digits to a difference of large numbers later."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        low = torch.cat([self.lora_A, self.lora_A - self.start_A])
        return low, torch.cat([self.lora_B - self.start_B, self.start_B], 1)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """A, B as files hold them: [A; A0], [B, -B0], from which every part comes back to the last bit."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)

    def unstacked(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """What `stacked` gave, by the names of `stored`."""
        if self.start_A is None:
            return {"lora_A": a, "lora_B": b}
        r = self.r
        return {"lora_A": a[:r], "start_A": a[r:], "lora_B": b[:, :r], "start_B": -b[:, r:]}

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        return (*self.factors(), self.scale)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return added(self, x, y)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return summed(self, dense)
