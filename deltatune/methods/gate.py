"""UniPELT's gates (Mao et al. 2021, arXiv:2110.07577): y + g (f(y) - y), g = sigmoid(w x + b), for each sub-method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import Delta, Refusal, Wrapped, named, overrides
from ..core.registry import choice, method, whole
from ..core.routing import Now, Watch, per_token, pooled, readings, spread, width_of
from ..core.site import Site
from .adapter import Adapter
from .lora import LoRA
from .prefix import Prefix

SMALL = [{"lora": {"r": 2}}, {"prefix": {"length": 3}}, {"adapter": {"bottleneck": 4}}]
PER = ("sequence", "token")


@method("gate", paper="2110.07577", kind="adapter", identity=False, tiny={"": {"of": SMALL, "pool": 3}})
@dataclass(frozen=True)
class Gate:
    """A learned gate on each layer's change by each of the methods `of`, read from what the change is computed from.

    per "sequence": the mean of the tokens' gates, as in the paper; "token": each its own (but one for a prefix).
    pool: how many first tokens that mean takes; left out, all of an encoder's, 16 of a causal model's, always 1 of a
    decoder's beside an encoder. Parameters: (width of what is read) + 1 for each layer and method.
    """

    of: tuple[Any, ...] = field(default=(LoRA(), Prefix(), Adapter()), metadata={"methods": True})
    per: str = "sequence"
    pool: int | None = None

    def __post_init__(self) -> None:
        choice("Gate per", self.per, PER)
        if not self.of:
            raise ValueError("Gate of: [] gates nothing; give methods: [lora, prefix, adapter]")
        whole("Gate pool", 1 if self.pool is None else self.pool)

    def deltas(self, model: Any) -> Iterator[tuple[Site, Delta]]:
        watches, reading = readings(model, self.pool)
        yield from watches
        for site, delta in (pair for m in self.of for pair in named(m, model)):
            layer: Any = model.get_submodule(site.read)
            if isinstance(delta, Watch | Wrapped) or isinstance(layer, nn.Embedding) or delta.inplace or delta.alone:
                found = f"{type(delta).__name__} of {delta.what} at {site.write}"
                instead = "of: lora, ia3, adapter, prefix, ...; weights, embeddings and other gates stand beside it"
                raise Refusal("a gate scales a change of activations.", found=found, instead=instead)
            made = Front if overrides(delta, "attend") else Gated
            yield site, made(delta, width_of(delta, layer), (*reading(site), self.per))


class Gated(Wrapped):
    """y + g (f(y) - y) at one layer; x + g (f(x) - x) where the method changes the input."""

    def __init__(self, inner: Delta, width: int, how: tuple[Now, int | None, str]):
        super().__init__(inner)
        self.gate, (self.now, self.first, self.per), self.held = nn.Linear(width, 1), how, Now()
        self.waits = 0 if self.per == "token" and type(self) is Gated else self.first or float("inf")

    def weigh(self, x: Tensor, per: str) -> Tensor:
        """x [..., seq, d] -> [..., seq, 1] per token, else [sequences, 1], kept while a sequence is generated."""
        each = torch.sigmoid(self.gate(x.to(self.gate.weight.dtype)))
        if per == "token":
            return each
        if not self.now.past or self.held.soft is None:
            self.held.soft = pooled(each, self.now, self.first)
        return self.held.soft

    def share(self, x: Tensor) -> Tensor:
        g = self.weigh(x, self.per)
        return (g if self.per == "token" else spread(per_token(g, self.now)[:, 0], x)).to(x.dtype)

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x + self.share(x) * (self.inner.before(layer, x) - x)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.shared(layer, (x, y), self.share(self.inner.own_input(x, y)))


class Front(Gated):
    """[g P_k; K] and [g P_v; V]: the prefix's keys and values scaled, one gate per sequence."""

    def look(self, layer: nn.Module, given: tuple[tuple, Mapping[str, Any]], pick: Callable[[Tensor], Tensor]) -> None:
        self.weigh(pick(given[0][0] if given[0] else given[1]["hidden_states"]), "sequence")
        self.row = 0

    def attend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g, n = self.held.soft, k.shape[2]
        assert g is not None
        if len(g) > len(k) == 1:  # rows() runs one row after another
            g, self.row = g[self.row : self.row + 1], self.row + 1
        k, v = self.inner.attend(k, v)
        own, g = k.shape[2] - n, g.view(-1, 1, 1, 1).to(k.dtype)
        return torch.cat([g * k[:, :, :own], k[:, :, own:]], 2), torch.cat([g * v[:, :, :own], v[:, :, own:]], 2)
