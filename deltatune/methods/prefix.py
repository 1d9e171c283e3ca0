"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): attention over [P_k; K], [P_v; V] in every layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.attention import attention_modules, heads
from ..core.delta import Delta
from ..core.registry import method, whole
from ..core.site import Site, trunk


@method(
    "prefix",
    paper="2101.00190",
    kind="attention",
    peft="PREFIX_TUNING",
    lr=1e-2,
    identity=False,
    tiny={"": {"length": 3}},
)
@dataclass(frozen=True)
class Prefix:
    """Learned keys and values in front of every layer's own. Parameters: 2 layers kv_heads length head_dim.

    `offset_positions`: real tokens of a causal model stand after the prefix (as in peft); off, they keep their places.
    """

    length: int = 20
    offset_positions: bool = True

    def __post_init__(self) -> None:
        whole("Prefix length", self.length)

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        takes = "position_ids" in inspect.signature(trunk(model).forward).parameters
        for name, module, kind in attention_modules(model):
            shape = heads(module)
            causal = kind == "self" and bool(getattr(module, "is_causal", False))
            offset = self.length if causal and takes and self.offset_positions else 0
            yield Site(name, name), KeysValues((shape.kv, self.length, shape.dim), offset)


class KeysValues(Delta):
    """k, v [kv_heads, length, head_dim], small random values as in the paper's random initialisation."""

    def __init__(self, shape: tuple[int, int, int], offset: int):
        super().__init__()
        self.k, self.v = nn.Parameter(torch.randn(shape) * 0.02), nn.Parameter(torch.randn(shape) * 0.02)
        self.offset = offset

    def attend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return front(self.k, k), front(self.v, v)

    def shift(self) -> int:
        return self.offset


def front(own: Tensor, kept: Tensor) -> Tensor:
    """own [kv_heads, length, dim] in front of kept [batch, kv_heads, seq, dim]."""
    return torch.cat([own.to(kept.dtype).expand(kept.shape[0], -1, -1, -1), kept], 2)
