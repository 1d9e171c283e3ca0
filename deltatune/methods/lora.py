"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + (alpha / r) B A x."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta, Dense
from ..core.registry import finite, method, nearest, whole
from ..core.site import Site, linear_at, matches, widths


@method("lora", paper="2106.09685", kind="linear", peft="LORA", mergeable=True, lr=1e-3, tiny={"": {"r": 4}})
@dataclass(frozen=True)
class LoRA:
    """A low-rank update beside each target layer. Parameters: r (d_in + d_out) per layer.

    `patterns` gives targets their own rank and alpha: {"down": {"r": 16}}; every pattern must match a target.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    patterns: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole("LoRA r", self.r)
        finite("LoRA alpha", self.alpha, above=0)
        finite("LoRA dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be in 0 <= dropout < 1, got {self.dropout!r}")
        for pattern, own in self.patterns.items():
            self.check(pattern, own)

    def check(self, pattern: str, own: Any) -> None:
        """ValueError unless `own` is {"r": ..., "alpha": ...}, or one of the two."""
        if not isinstance(own, Mapping):
            raise ValueError(f'LoRA pattern {pattern!r} must be like {{"r": 16, "alpha": 32}}, got {own!r}')
        for key in own:
            if key not in ("r", "alpha"):
                near = nearest(str(key), ("r", "alpha", "rank")).replace("'rank'", "'r'")
                raise ValueError(f"LoRA pattern {pattern!r} has no field {key!r}.{near} Its fields: r, alpha")
        whole(f"LoRA pattern {pattern!r}: r", own.get("r", 1))
        finite(f"LoRA pattern {pattern!r}: alpha", own.get("alpha", 1.0), above=0)

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        sites = linear_at(model, self.targets, "LoRA")
        for pattern in self.patterns:
            if not any(matches(site, pattern) for site in sites):
                raise ValueError(
                    f"LoRA pattern {pattern!r} matches none of the {len(sites)} targets, such as {sites[0].write!r}"
                )
        for site in sites:
            d_in, d_out = widths(model.get_submodule(site.write))
            if site.columns:
                d_out = sum(b - a for a, b in site.columns)
            yield site, LowRank(d_in, d_out, self.settings(site))

    def settings(self, site: Site) -> tuple[int, float, float]:
        """(r, alpha, dropout) at one site: the last matching pattern wins."""
        r, alpha = self.r, self.alpha
        for pattern, own in self.patterns.items():
            if matches(site, pattern):
                r, alpha = int(own.get("r", r)), own.get("alpha", alpha)
        return r, alpha, self.dropout


class LowRank(Delta):
    """A [r, d_in] with uniform Kaiming values, B [d_out, r] zero: the layer starts as it was."""

    def __init__(self, d_in: int, d_out: int, settings: tuple[int, float, float]):
        super().__init__()
        self.r, self.alpha, self.dropout = settings
        self.scale = self.alpha / self.r
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(self.r, d_in)), nn.Parameter(torch.zeros(d_out, self.r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(x, self.lora_A.to(x.dtype))
        flat = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.to(x.dtype).T, alpha=self.scale)
        return flat.view_as(y)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        change = self.scale * (self.lora_B @ self.lora_A)
        return {"weight": (dense.weight.float() + change.to(dense.weight.device)).to(dense.weight.dtype)}
