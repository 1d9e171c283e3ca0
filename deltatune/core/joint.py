"""Low-rank changes of one layer by several adapters, each on its own rows of a batch, as one product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .delta import Delta, Dense
from .site import Range, put, take

LEAST = 64  # summed ranks that are always multiplied as one
SHARE = 8  # of the layer's narrower side: other rows' adapters then cost less than a quarter of the layer


def added(delta: Delta, x: Tensor, y: Tensor) -> Tensor:
    """y [*, d_out] + s B A x [*, d_in] of one delta that has such a product; x is dropped out in training."""
    found = delta.low_rank()
    assert found is not None
    (a, b, scale), x = found, F.dropout(x, delta.dropout, delta.training) if delta.dropout else x
    low = F.linear(x, a.to(x.dtype)).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), low, b.to(x.dtype).T, alpha=scale).view_as(y)


def summed(delta: Delta, dense: Dense) -> dict[str, Tensor]:
    """W + s B A, added in fp32."""
    found = delta.low_rank()
    assert found is not None
    a, b, scale = found
    return {"weight": (dense.weight.float() + (scale * (b @ a)).to(dense.weight.device)).to(dense.weight.dtype)}


class Joint:
    """y + s_i B_i A_i x on the rows of each adapter i: every row is multiplied with all A, and keeps its own share.

    A loop over adapters takes rows out and puts them back for every adapter of every layer, which is most of a decoded
    token's time; here are two products, however many adapters share the batch.
    """

    def __init__(self, parts: Sequence[tuple[str, Delta]], rows: Mapping[str, Tensor], count: int):
        self.parts, self.rows, self.count = parts, rows, count
        self.columns: tuple[Range, ...] | None = parts[0][1].site.columns
        self.params = [p for _, delta in parts for p in delta.parameters()]
        self.kept: tuple[Any, tuple[Tensor, Tensor, Tensor] | None] | None = None

    def __call__(self, x: Tensor, y: Tensor, by_row: Any) -> Tensor | None:
        """x [*, d_in], y [*, d_out]; `by_row` splits the first axis into `count` rows. None where each adapter must run
        alone now: it draws a dropout of its own, or has values that are no numbers, which are for its own rows."""
        if any(delta.dropout and delta.training for _, delta in self.parts):
            return None
        if (found := self.factors(x)) is None:
            return None
        a, b, others = found
        low = by_row(F.linear(x, a), self.count)
        # not a product with 0: what overflows for another row's adapter stays out
        low = low.masked_fill(others.view(self.count, *[1] * (low.dim() - 2), -1), 0.0).flatten(0, -2)
        part = take(y, self.columns)
        return put(y, self.columns, torch.addmm(part.flatten(0, -2), low, b.T).view_as(part))

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """(A [r, d_in], s B [d_out, r], what of r is other rows' [count, r]), kept while no gradient is recorded."""
        if torch.is_grad_enabled() or any(p.is_inference() for p in self.params):
            self.kept = None
            return self.made(x)
        now = (x.dtype, x.device, *((p.data_ptr(), p._version) for p in self.params))
        if self.kept is None or self.kept[0] != now:
            self.kept = (now, self.made(x))
        return self.kept[1]

    def made(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [(name, low) for name, delta in self.parts if (low := delta.low_rank())]
        if not all(bool(t.isfinite().all()) for _, (a, b, _) in found for t in (a, b)):
            return None
        others = torch.ones(self.count, sum(len(a) for _, (a, _, _) in found), dtype=torch.bool, device=x.device)
        at = 0
        for name, (a, _, _) in found:
            others[self.rows[name].to(x.device), at : at + len(a)] = False
            at += len(a)
        down = [a for _, (a, _, _) in found]
        exact = [b.to(torch.promote_types(b.dtype, x.dtype)) for _, (_, b, _) in found]  # scaled, then rounded
        up = [scale * b for b, (_, (_, _, scale)) in zip(exact, found, strict=True)]
        return torch.cat(down).to(x.dtype), torch.cat(up, 1).to(x.dtype), others


def split(
    running: Sequence[tuple[str, Delta]], rows: Mapping[str, Tensor] | None, count: int
) -> tuple[list[Joint], list[tuple[str, Delta]]]:
    """What of `running` is multiplied as one, and the rest in order.

    Of one adapter only what nothing else of it comes before may go first.
    """
    groups: dict[Any, list[tuple[str, Delta]]] = {}
    rest: list[tuple[str, Delta]] = []
    for name, delta in running:
        first = rows is not None and name not in {n for n, _ in rest}
        if first and delta.tap is None and delta.low_rank():
            groups.setdefault(delta.site.columns, []).append((name, delta))
        else:
            rest.append((name, delta))
    joined = [parts for parts in groups.values() if len(parts) > 1 and small(parts)]
    taken = {id(d) for parts in joined for _, d in parts}
    alone = [(n, d) for n, d in running if id(d) not in taken]
    return [Joint(parts, rows or {}, count) for parts in joined], alone


def small(parts: Sequence[tuple[str, Delta]]) -> bool:
    """Whether multiplying every row with all of them costs little beside the layer itself."""
    found = [low for _, d in parts if (low := d.low_rank())]
    (a, b, _), rank = found[0], sum(len(a) for a, _, _ in found)
    return rank <= max(LEAST, min(a.shape[1], b.shape[0]) // SHARE)
