"""What DoRA (arXiv:2402.09353) does with rows of V = W + s B A: their lengths, and a factor for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20  # weights in half precision that are fp32 at once


@dataclass
class Held:
    """What a norm was made of last, for as long as it holds."""

    weight: Tensor  # an alias: it keeps the weight's address from being given to another one
    facts: Any
    own: Tensor  # ||W||^2 [d_out]
    factors: list[Tensor]
    norm: Tensor | None = None  # while no gradient is recorded (decoding)


@dataclass(frozen=True)
class Product:
    """s B A x, without dropout, for `core.joint.added`: (A, B, s)."""

    found: tuple[Tensor, Tensor, float]
    dropout = 0.0

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        return self.found


@torch.no_grad()
def squares(weight: Tensor) -> Tensor:
    """||w||^2 of every row [d_out], in fp32 at least."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32)).square()


@torch.no_grad()
def lengths(weight: Tensor, own: Tensor, found: tuple[Tensor, Tensor, float]) -> Tensor:
    """||W + s B A|| of every row [d_out], from ||w||^2 (`own`) + (2 s w A^T + s^2 b^T A A^T) b, without a matrix of W's
    size. In own's dtype; the relative error grows as ||W||^2 / ||V||^2 times its rounding."""
    a, b = (t.to(weight.device, own.dtype) for t in found[:2])
    rows = len(weight) if weight.dtype == own.dtype else max(1, PIECE // weight.shape[1])
    parts = [part.to(own.dtype) @ a.T for part in weight.split(rows)]
    cross = parts[0] if len(parts) == 1 else torch.cat(parts)
    low = torch.addmm(cross, b, a @ a.T, beta=2 * found[2], alpha=found[2] ** 2)
    # where B and W cancel, rounding may leave less than nothing
    return (own + (low * b).sum(1)).clamp_min(torch.finfo(own.dtype).tiny).sqrt()


class Grown(torch.autograd.Function):
    """u + k v, of u and v [*, d_out] (None: u itself) and k [d_out]. One kernel; k, and not 1 + k, is rounded to u's
    dtype."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor | None, k: Tensor) -> Tensor:
        ctx.alone = v is None
        ctx.save_for_backward(u if v is None else v, k)
        return torch.addcmul(u, u if v is None else v, k.to(u.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (v, k), (g,) = ctx.saved_tensors, grads
        of_k = (g * v).flatten(0, -2).sum(0, dtype=k.dtype) if ctx.needs_input_grad[2] else None
        if ctx.alone:
            return torch.addcmul(g, g, k.to(g.dtype)), None, of_k
        return g, g * k.to(g.dtype), of_k
