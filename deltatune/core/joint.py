"""Low-rank changes of one layer by several adapters, each on its own rows of a batch, as one product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks

from .delta import Delta, Dense
from .site import Range, put, take

LEAST = 64  # summed ranks that are always multiplied as one
SHARE = 8  # of the layer's narrower side: other rows' adapters then cost less than a quarter of the layer


@dataclass(frozen=True)
class Onto:
    """What `Added` adds to. `weight` [d_out, d_in]: y is x W^T, plus a bias perhaps, of a frozen layer, fresh and
    nobody else's: it is written over, and its gradient passes on to x here, in the same product as the change's own.
    """

    scale: float
    weight: Tensor | None = None


class Added(torch.autograd.Function):
    """(x [*, d_in], y [*, d_out], A [r, d_in], B [d_out, r], onto) -> (y + s B A x, A x [*, r]).

    A product with r rows or columns is bound by memory: what is as wide as the layer is read or written once by each,
    and never scaled. The gradient of B is made as [r, d_out] and turned: the other way is up to nine times as slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, onto: Onto) -> Any:
        out, low = plus(x, y, a, b, onto)
        for_a, for_b = ctx.needs_input_grad[2:4]
        ctx.onto = onto
        ctx.save_for_backward(x if for_a else None, low if for_b else None, a, b, onto.weight)
        ctx.set_materialize_grads(False)
        if out is y:
            ctx.mark_dirty(y)
        return out, low

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_low: Tensor | None) -> Any:
        x, low, a, b, weight = ctx.saved_tensors
        if g is None and g_low is None:
            return None, None, None, None, None
        if g is None:  # asked of A x alone: by a second derivative, of what does not depend on y
            assert g_low is not None
            g = torch.zeros(*g_low.shape[:-1], len(b), dtype=b.dtype, device=b.device)
        for_x, for_y, for_a, for_b, _ = ctx.needs_input_grad
        flat, d_x, d_a, d_b = g.flatten(0, -2), None, None, None
        if for_b:
            d_b = times(low.flatten(0, -2).T, flat, ctx.onto.scale, b.T).T
        if for_x or for_a:
            # a product of so few columns reads rows of B^T twice as fast as columns of B
            back = times(flat, b.T.contiguous().T, ctx.onto.scale, b[:1])
            back = back if g_low is None else back + g_low.flatten(0, -2)
            d_a = back.T @ x.flatten(0, -2) if for_a else None
        if for_x:
            d_x = back @ a if weight is None else (flat @ weight).addmm_(back, a)
            d_x = d_x.unflatten(0, g.shape[:-1])
        return d_x, g if for_y and weight is None else None, d_a, d_b, None


def times(left: Tensor, right: Tensor, scale: float, like: Tensor) -> Tensor:
    """scale x left right, the factor within the product; `like`, of its shape, is not read."""
    return torch.addmm(like, left, right, beta=0, alpha=scale)


def plus(x: Tensor, y: Tensor, a: Tensor, b: Tensor, onto: Onto) -> tuple[Tensor, Tensor]:
    """(y + s B A x, A x); y itself where it may be written over and is no view, whose graph would change."""
    low = F.linear(x, a)
    flat, part = y.flatten(0, -2), low.flatten(0, -2)
    if onto.weight is None or y._is_view() or not y.is_contiguous():
        return torch.addmm(flat, part, b.T, alpha=onto.scale).view_as(y), low
    flat.addmm_(part, b.T, alpha=onto.scale)
    return y, low


def added(delta: Delta, x: Tensor, y: Tensor, layer: Any = None) -> Tensor:
    """y [*, d_out] + s B A x [*, d_in] of one delta that has such a product; x is dropped out in training.

    layer: `y` is what it has just made of `x`, and may be written over (see `plain`).
    """
    found = delta.low_rank()
    assert found is not None
    (a, b, scale), drops = found, bool(delta.dropout and delta.training)
    x = F.dropout(x, delta.dropout) if drops else x
    factors = a.to(x.dtype), b.to(x.dtype)
    own = layer is not None and not drops and x.dtype == y.dtype == layer.weight.dtype
    onto = Onto(scale, layer.weight if own else None)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or casts(x):
        return plus(x, y, *factors, onto)[0]
    return Added.apply(x, y, *factors, onto)[0]


def casts(x: Tensor) -> bool:
    """Whether products are cast now (autocast), which a backward pass of our own would not know of."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def plain(layer: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether what `hook`, of `layer`, is given is x W^T + bias of frozen parameters, which nobody else has seen."""
    if torch.compiler.is_compiling() or type(layer) is not nn.Linear:
        return False
    if "forward" in vars(layer) or _global_forward_hooks or casts(layer.weight):
        return False
    own = (p for p in layer._parameters.values() if p is not None)  # parameters() takes ten times as long
    frozen = not any(p.requires_grad or type(p) is not nn.Parameter for p in own)
    return frozen and next(iter(layer._forward_hooks.values())) == hook


def summed(delta: Delta, dense: Dense) -> dict[str, Tensor]:
    """W + s B A, added in fp32."""
    found = delta.low_rank()
    assert found is not None
    a, b, scale = found
    return {"weight": (dense.weight.float() + (scale * (b @ a)).to(dense.weight.device)).to(dense.weight.dtype)}


@dataclass(frozen=True)
class Factors:
    """R summed ranks: down [R, d_in] and up [R, d_out], scaled. others [rows, 1, R]: which of them are not a row's.

    own [rows, r]: the numbers of those that are, r of the row with the most; spare [rows, 1, r]: which of them only
    fill a row that has fewer (None: no row has).
    """

    down: Tensor
    up: Tensor
    others: Tensor
    own: Tensor
    spare: Tensor | None

    def add(self, x: Tensor, y: Tensor, over: bool) -> Tensor:
        """x [rows, n, d_in], y [rows, n, d_out] -> y + its rows' own products; over: y may be written over.

        With fewer tokens than ranks a row's own factors are more numbers than what they are multiplied with: all rows
        are then multiplied with all ranks, which reads every factor once. With more, each row takes its own out: as few
        operations as one adapter's.
        """
        few = x.shape[1] < self.own.shape[1]
        low = F.linear(x, self.down) if few else x @ F.embedding(self.own, self.down).mT
        out = self.others if few else self.spare
        # not a product with 0: what overflows for another row's adapter stays out
        low = low if out is None else low.masked_fill_(out, 0.0)
        if few:
            flat, low = y.flatten(0, 1), low.flatten(0, 1)
            return (flat.addmm_(low, self.up) if over else torch.addmm(flat, low, self.up)).view(y.shape)
        up = F.embedding(self.own, self.up)
        return y.baddbmm_(low, up) if over else torch.baddbmm(y, low, up)


class Joint:
    """y + s_i B_i A_i x on the rows of each adapter i, in two products, however many adapters share the batch.

    A loop over adapters takes rows out and puts them back for every adapter of every layer, which is most of a decoded
    token's time.
    """

    def __init__(self, parts: Sequence[tuple[str, Delta]], rows: Mapping[str, Tensor], count: int):
        self.parts, self.rows, self.count = parts, rows, count
        self.columns: tuple[Range, ...] | None = parts[0][1].site.columns
        self.dropping = [delta for _, delta in parts if delta.dropout]
        self.params = [p for _, delta in parts for p in delta.parameters()]
        self.kept: tuple[Any, Factors | None] | None = None

    def __call__(self, x: Tensor, y: Tensor, by_row: Any, own: bool = False) -> Tensor | None:
        """x [*, d_in], y [*, d_out]; `by_row` splits the first axis into `count` rows. own: y is nobody else's (see
        `plain`). None where each adapter must run alone now: it draws a dropout of its own, or has values that are no
        numbers, which are for its own rows."""
        if any(delta.training for delta in self.dropping):
            return None
        if (found := self.factors(x)) is None:
            return None
        part = take(y, self.columns)
        over = own and self.columns is None and y.is_contiguous() and not torch.is_grad_enabled()
        wide, made = (by_row(t, self.count).reshape(self.count, -1, t.shape[-1]) for t in (x, part))
        return put(y, self.columns, found.add(wide, made, over).view(part.shape))

    def factors(self, x: Tensor) -> Factors | None:
        """What is multiplied, kept while no gradient is recorded and nothing in it changes."""
        if torch.is_grad_enabled() or any(p.is_inference() for p in self.params):
            self.kept = None
            return self.made(x)
        now = (x.dtype, x.device, [(p.data_ptr(), p._version) for p in self.params])
        if self.kept is None or self.kept[0] != now:
            self.kept = (now, self.made(x))
        return self.kept[1]

    def made(self, x: Tensor) -> Factors | None:
        found = [(name, low) for name, delta in self.parts if (low := delta.low_rank())]
        others = torch.ones(self.count, sum(len(a) for _, (a, _, _) in found), dtype=torch.bool)
        at = 0
        for name, (a, _, _) in found:
            others[self.rows[name].cpu(), at : at + len(a)] = False
            at += len(a)
        down = [a for _, (a, _, _) in found]
        exact = [b.to(torch.promote_types(b.dtype, x.dtype)) for _, (_, b, _) in found]  # scaled, then rounded
        up = [scale * b.T for b, (_, (_, _, scale)) in zip(exact, found, strict=True)]
        first, then = torch.cat(down).to(x.dtype), torch.cat(up).to(x.dtype)
        if not bool(first.isfinite().all() and then.isfinite().all()):  # after rounding: 0 x inf is no number
            return None
        own = others.byte().argsort(stable=True, dim=1)[:, : int((~others).sum(1).max())]
        spare = others.gather(1, own)
        return Factors(
            first,
            then,
            others[:, None].to(x.device),
            own.to(x.device),
            spare[:, None].to(x.device) if spare.any() else None,
        )


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
