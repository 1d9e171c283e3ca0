"""Bottleneck adapters: h + s W2 act(W1 h), after a layer (arXiv:1902.00751) or beside it (arXiv:2110.04366)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..core.delta import Delta
from ..core.inplace import pick
from ..core.registry import choice, finite, flag, method, whole
from ..core.site import Site, block_ends, block_of, find, is_norm, lowest, norms_above, spans, widths
from ._bottleneck import ACTS, INITS, BeforeNorm, Bottleneck, Shape

ENDS = {"attention": ("q", "o"), "ffn": ("up", "down"), "block": ("", "")}
FORMS = ("sequential", "parallel")
TINY = {
    "": {"bottleneck": 4},
    "parallel": {"bottleneck": 4, "form": "parallel", "scale": 4.0},
    "houlsby": {"bottleneck": 4, "init": "normal", "init_std": 0.2, "norms": True},
    "pfeiffer": {"reduction": 8, "where": ("block",), "act": "relu", "skip": 1, "scale": "learned"},
}


@method("adapter", paper="1902.00751", kind="adapter", tiny=TINY)
@dataclass(frozen=True)
class Adapter:
    """Two small layers with a non-linearity after (sequential) or beside (parallel) attention and feed-forward.

    Parameters: 2 d m + m + d per adapter, m = `bottleneck` (64) or d // `reduction`. `where: [block]` is Pfeiffer's
    place (arXiv:2005.00247): one per block, reading the block's output, added before the norm that ends it (post-norm
    models) or to the residual sum (pre-norm). `init: zero` starts as the base; `normal` is Houlsby's near-identity.
    `norms` trains the norms too, `skip` leaves out the lowest n blocks (AdapterDrop, arXiv:2010.11918) and their norms.
    """

    bottleneck: int | None = None
    where: tuple[str, ...] = ("attention", "ffn")
    form: str = "sequential"
    act: str = "gelu"
    scale: float | str = 1.0
    reduction: int | None = None
    init: str = "zero"
    init_std: float = 1e-2
    norms: bool = False
    skip: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", (self.where,) if isinstance(self.where, str) else tuple(self.where))
        flag("Adapter norms", self.norms)
        for what, size in (("bottleneck", self.bottleneck), ("reduction", self.reduction)):
            if size is not None:
                whole(f"Adapter {what}", size)
        if self.bottleneck is not None and self.reduction is not None:
            raise ValueError(f"Adapter bottleneck {self.bottleneck!r} and reduction {self.reduction!r}: give one")
        if self.scale != "learned":
            finite("Adapter scale (or 'learned')" if isinstance(self.scale, str) else "Adapter scale", self.scale)
        finite("Adapter init_std", self.init_std, above=0)
        whole("Adapter skip", self.skip, least=0)
        chosen = [("form", self.form, FORMS), ("act", self.act, ACTS), ("init", self.init, INITS)]
        for what, value, choices in [*chosen, *(("where", place, ENDS) for place in self.where)]:
            choice(f"Adapter {what}", value, choices)
        if self.form == "parallel" and "block" in self.where:
            raise ValueError("Adapter form 'parallel' with where 'block': a block's output has nothing beside it")

    @property
    def identity(self) -> bool:
        return self.init == "zero"

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        left_out = lowest(model, self.skip)
        for place in self.where:
            for site in self.sites(model, place):
                if block_of(f"{site.write}.") not in left_out:
                    yield site, self.delta(model, site, place)
        if self.norms:
            above = norms_above(model, left_out)
            yield from pick(model, lambda name, layer: id(layer) in above)

    def sites(self, model: nn.Module, place: str) -> list[Site]:
        read, write = ENDS[place]
        if place == "block":
            return block_ends(model)
        return spans(model, read, write) if self.form == "parallel" else find(model, write)

    def delta(self, model: nn.Module, site: Site, place: str) -> Delta:
        layer = model.get_submodule(site.write)
        inner = next(s for s in find(model, "down") if block_of(s.write) == block_of(f"{site.write}."))
        d_out = widths(layer if place != "block" else model.get_submodule(inner.write))[1]
        d_in = widths(model.get_submodule(site.read))[0] if site.is_span else d_out
        width = self.bottleneck if self.bottleneck is not None else 64
        if self.reduction is not None:
            width = d_out // self.reduction
            whole(f"Adapter reduction {self.reduction} of width {d_out}: the bottleneck", width)
        scale = None if isinstance(self.scale, str) else self.scale
        shape = Shape(d_in, d_out, width, self.act, scale, self.init_std if self.init == "normal" else None)
        return (BeforeNorm if is_norm(layer) else Bottleneck)(shape)
