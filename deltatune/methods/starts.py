"""What A and B start as, and r's limit: PiSSA (arXiv:2404.02948), W = U S V^T; OLoRA (arXiv:2406.01775), W = Q R."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.registry import finite
from ..core.site import Site, widths

SCALINGS = ("standard", "rslora")
DRAWN, READ = ("kaiming", "gaussian", "orthogonal"), ("pissa", "olora")  # READ: from the layer's own weight
INITS = (*DRAWN, *READ)


def sized(model: nn.Module, site: Site, r: int, what: str) -> tuple[int, int]:
    """(d_in, d_out) of what `site` changes. ValueError when r is above its rank: more could not say more."""
    d_in, d_out = widths(model.get_submodule(site.write))
    if site.columns:
        d_out = sum(b - a for a, b in site.columns)
    if r > min(d_in, d_out):
        raise ValueError(
            f"{what}={r} is above the rank of {site.key}, which is {d_in} -> {d_out}: "
            f"{min(d_in, d_out)} is the most there, or leave that layer out of the targets"
        )
    return d_in, d_out


def check_dropout(who: str, dropout: float) -> None:
    finite(f"{who} dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"{who} dropout must be in 0 <= dropout < 1, got {dropout!r}")


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = S^1/2 V^T, B = U S^1/2 of the r largest singular values of W / s."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root[:, None] * v[:r], u[:, :r] * root


def olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = R's first r rows, B = Q's first r columns, of W = Q R."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]
