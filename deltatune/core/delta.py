"""Delta: one change to one frozen layer, h' = compose(h, f(x)) (He et al. 2021, arXiv:2110.04366)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sparse import thin_as

if TYPE_CHECKING:
    from .site import Site

SLOT = "delta_slot"  # the name of the one child module an adapted layer gets


BLANK: ContextVar[bool] = ContextVar("BLANK", default=False)


@contextmanager
def overwritten() -> Iterator[None]:
    """Inside, starting values are about to be overwritten by a load: costly ones need not be made."""
    token = BLANK.set(True)
    try:
        yield
    finally:
        BLANK.reset(token)


def blank() -> bool:
    """Whether a delta made now needs the right shapes only."""
    return BLANK.get()


class Refusal(ValueError):
    """A combination that cannot work. Says why, what was found in the model, and what would work."""

    def __init__(self, why: str, *, found: str, instead: str):
        self.why, self.found, self.instead = why, found, instead
        super().__init__(f"{why} Found: {found}. What works: {instead}.")


@dataclass(frozen=True)
class Dense:
    """What merging sees of a layer, whatever its class: weight [d_out, d_in] ([vocab, d] of an embedding), bias.

    `base`: the layer as it runs without deltas, where deltas before this one have changed it; None: it is the same.
    """

    weight: Tensor
    bias: Tensor | None = None
    base: Dense | None = None


@dataclass(frozen=True)
class Given:
    """What a method may look at before step 1: `losses()` gives the loss of one batch of training rows after another,
    each a scalar with its graph; `by_row()` that of one row after another; `seed` for what is drawn."""

    losses: Callable[[], Iterator[Tensor]]
    seed: int = 0
    by_row: Callable[[], Iterator[Tensor]] | None = None


class Delta(nn.Module):
    """One change to one frozen layer. Override what the method needs; the defaults change nothing.

    `conditional` parameters may legitimately see no gradient for many steps (experts, gates, heads).
    """

    what = ""  # the method's name for messages; attach sets it
    conditional = False
    inplace = False  # True: trains the layer's own parameters (see core/inplace.py)
    on = False  # in-place: whether the layer holds the trained tensors now
    rates: Mapping[str, float] = MappingProxyType({})  # own parameter -> multiple of the run's learning rate
    ready = True  # False: `prepare` must see training rows first
    keeps: Mapping[str, float] = MappingProxyType({})  # own parameter -> share that trains once its method has chosen
    width: int | None = None  # of what it reads itself, where that is not its layer's input
    alone = ""  # why a batch's rows cannot hear this delta or not, one by one; "" where they can
    unpruned = ""  # why its matrices cannot be pruned before training; "" where they can
    dropout = 0.0  # of what it reads, in training
    waits: float = 0  # for so many of a text's first tokens, before it decides about them; inf: all, or it draws
    tied = False  # True: merging into a weight that other layers share is what is meant
    site: Site  # where attach put this delta
    tap: Any = None  # a span's reading end
    method: Any = None  # the method it came from

    def placed(self, layer: nn.Module) -> None:
        """Called when attach puts it into `layer`, where the deltas before it are already."""

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x [*, d_in] -> the x the layer will read."""
        return x

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """x [*, d_in] as read at `site.read`, y [*, d_out] -> the y that leaves `site.write`."""
        return y

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """(A [r, d_in], B [d_out, r], s) where `after` is y + s B A x, dropout aside; None: it is something else."""
        return None

    def own_input(self, x: Tensor, y: Tensor) -> Tensor:
        """Which of `after`'s x and y its change is computed from: a gate reads the same."""
        return x

    def shared(self, layer: nn.Module, given: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
        """`after` of given = (x, y) with g [*, 1] of its change."""
        x, y = given
        return y + g * (self.after(layer, x, y) - y)

    def attend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [batch, kv_heads, seq, head_dim] -> keys and values with learned positions in FRONT."""
        return k, v

    def look(self, layer: nn.Module, given: tuple[tuple, Mapping[str, Any]], pick: Callable[[Tensor], Tensor]) -> None:
        """See what `layer` (any module, a whole block too) is called with: (args, kwargs). `pick` takes, of a tensor
        [batch, ...], the rows this adapter runs on."""

    def wrap(self, layer: nn.Module, given: tuple[tuple, Mapping[str, Any]], output: Any) -> Any:
        """(args, kwargs) and what `layer` (a whole block, say) made of them -> the output that leaves it."""
        return output

    def visible(self, rows: int) -> Tensor | None:
        """Which of `rows` sequences see the positions that `attend` put in front, [rows]; None: all of them."""
        return None

    def shift(self) -> int:
        """How many positions the real tokens move back because of this delta (a prefix's length)."""
        return 0

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        """{parameter name: tensor} that make the layer alone behave like layer + delta. A Refusal by default."""
        raise Refusal(
            f"{self.what or type(self).__name__} has no equivalent weight, so it cannot be merged.",
            found=self.what or type(self).__name__,
            instead="keep it attached (save and load it), or use a mergeable method: see `deltatune methods`",
        )

    def penalty(self) -> Tensor | None:
        """A scalar added to every step's loss, or None."""
        return None

    def begin(self, steps: int) -> None:
        """Called when training of `steps` steps begins, and on resume before the state is put back."""

    def after_step(self, step: int) -> None:
        """Called after optimizer step `step` (from 1), while the parameters still hold its gradients."""

    def restart(self) -> None:
        """Its values were changed before training (pruned): what it starts from is what they are now."""

    def buffered(self) -> dict[str, Tensor]:
        """The buffers that are this delta's own to keep."""
        return dict(self.named_buffers(recurse=True))

    def state_extra(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the parameters: the buffers."""
        return {name: tensor.detach() for name, tensor in self.buffered().items()}

    def load_extra(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_extra` gave."""
        with torch.no_grad():
            for name, tensor in self.buffered().items():
                tensor.copy_(state[name])

    def fold(self) -> None:
        """Drop a training-time reparametrisation, keeping the function the same."""

    def recount(self) -> None:
        """Another pass over rows begins: what was counted for the report was not of these."""

    def swap(self, layer: nn.Module, on: bool) -> None:
        """In-place deltas: put the trained (on) or the original (off) tensors into `layer`."""

    def stored(self, layer: nn.Module) -> dict[str, Tensor]:
        """What save writes: everything trained, and the buffers that go with it."""
        return {n: t.detach() for n, t in self.state_dict().items()}

    def take_form(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what was stored: folded, pruned, resized. Called by load before the tensors are put in."""
        thin_as(self, tensors)

    def put(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put what `stored` gave back."""
        with torch.no_grad():
            for name, tensor in self.stored(layer).items():
                tensor.copy_(tensors[name])

    def trained(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """What the optimizer gets, by the names of `stored`."""
        return dict(self.named_parameters())


class Wrapped(Delta):
    """A delta around another, at the same place, which decides when and how much of `inner` is heard.

    Subclasses override `before`, `after` and `attend`; each runs only where `inner` has its own. The rest of a delta's
    life is the inner one's.
    """

    unpruned = "a gate or a policy steers it"

    def __init__(self, inner: Delta):
        super().__init__()
        self.inner, self.waits = inner, inner.waits
        self.rates = {f"inner.{name}": rate for name, rate in inner.rates.items()}
        self.keeps = {f"inner.{name}": share for name, share in inner.keeps.items()}
        self.conditional = inner.conditional

    @property
    def site(self) -> Site:
        return self.inner.site

    @site.setter
    def site(self, site: Site) -> None:
        self.inner.site = site

    @property
    def ready(self) -> bool:
        return self.inner.ready

    @ready.setter
    def ready(self, ready: bool) -> None:
        self.inner.ready = ready

    def placed(self, layer: nn.Module) -> None:
        self.inner.placed(layer)

    def look(self, layer: nn.Module, given: tuple[tuple, Mapping[str, Any]], pick: Callable[[Tensor], Tensor]) -> None:
        self.inner.look(layer, given, pick)

    def penalty(self) -> Tensor | None:
        return self.inner.penalty()

    def begin(self, steps: int) -> None:
        self.inner.begin(steps)

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)

    def shift(self) -> int:
        return self.inner.shift()

    def fold(self) -> None:
        self.inner.fold()

    def recount(self) -> None:
        self.inner.recount()

    def buffered(self) -> dict[str, Tensor]:
        """Without those of `inner`, which is a module of its own in every walk."""
        return {name: t for name, t in super().buffered().items() if not name.startswith("inner.")}

    def own(self) -> dict[str, nn.Parameter]:
        """The wrapper's own parameters."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("inner.")}

    def stored(self, layer: nn.Module) -> dict[str, Tensor]:
        inner = {f"inner.{name}": t for name, t in self.inner.stored(layer).items()}
        return {name: p.detach() for name, p in self.own().items()} | inner

    def take_form(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner.take_form(within(tensors))

    def put(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.inner.put(layer, within(tensors))
        with torch.no_grad():
            for name, parameter in self.own().items():
                parameter.copy_(tensors[name])

    def trained(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        return self.own() | {f"inner.{name}": p for name, p in self.inner.trained(layer).items()}


def named(method: Any, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
    """The deltas of `method`, knowing what their users call them."""
    for site, delta in method.deltas(model):
        delta.what = delta.what or type(method).__name__
        delta.method = method
        yield site, delta


def inmost(delta: Delta) -> Delta:
    """The delta that makes the change, out of all that gates and routes it."""
    return inmost(delta.inner) if isinstance(delta, Wrapped) else delta


def to_train(found: Sequence[tuple[nn.Module, Delta]]) -> int:
    """How many numbers of these (layer, delta) train once their methods have chosen; what is shared counts once.

    A method keeps a share of all its matrices together, so its numbers are rounded once. What it has chosen already
    goes by another name (core.sparse.thin), and counts as it is.
    """
    sizes: dict[tuple[int, float], dict[int, int]] = {}
    for layer, delta in found:
        for name, parameter in delta.trained(layer).items():
            share = delta.keeps.get(name, 1.0)
            group = (0 if share == 1 else id(inmost(delta).method), share)
            sizes.setdefault(group, {})[id(parameter)] = parameter.numel()
    return sum(math.ceil(share * sum(group.values())) for (_, share), group in sizes.items())


def within(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inner delta's tensors out of a wrapper's."""
    return {name.removeprefix("inner."): t for name, t in tensors.items() if name.startswith("inner.")}


def overrides(delta: Delta, name: str) -> bool:
    """Whether the delta's class has its own `name`, so that a slot only pays for the hooks it needs."""
    if isinstance(delta, Wrapped) and name in ("before", "after", "attend"):
        return overrides(delta.inner, name)
    if isinstance(delta, Wrapped) and getattr(type(delta), name) is getattr(Wrapped, name):
        return overrides(delta.inner, name) and getattr(Wrapped, name) is not getattr(Delta, name)
    return getattr(type(delta), name) is not getattr(Delta, name)
