"""What a prefix holds in one layer: k, v as they are, or as (k, v) = W2 tanh(W1 p + b1) + b2 (arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attention import Seen, keys_values
from ..core.delta import Delta, Refusal
from ..core.places import tabled
from ..core.site import embedding
from ._place import reads_words


class Root(nn.Module):
    """The part of the reparametrisation that the layers share: p [length, d] -> tanh(W1 p + b1) [length, hidden]."""

    def __init__(self, length: int, d: int, hidden: int):
        super().__init__()
        self.p, self.up = nn.Parameter(torch.randn(length, d)), nn.Linear(d, hidden)

    def forward(self) -> Tensor:
        return torch.tanh(self.up(self.p))


class KeysValues(Delta):
    """k, v [kv_heads, length, head_dim]; reparametrised until `fold`, where `reparametrise` was called."""

    def __init__(self, k: Tensor, v: Tensor, offset: int):
        super().__init__()
        self.k, self.v = nn.Parameter(k), nn.Parameter(v)
        self.offset, self.shape = offset, tuple(k.shape)
        self.source: list[Root] = []  # a list: the root is stored once, with the layer that owns it

    def reparametrise(self, root: Root, owns: bool, keep: bool) -> None:
        """k, v come out of `root` from now on; `keep`: as they are now (exactly, where length <= hidden)."""
        heads, length, dim = self.shape
        out = nn.Linear(root.up.out_features, 2 * heads * dim)
        if keep:
            with torch.no_grad():
                wanted = torch.stack([self.k, self.v]).permute(2, 0, 1, 3).reshape(length, -1)
                inner = torch.linalg.pinv(root().double())
                out.weight.copy_((inner @ (wanted - out.bias).double()).T)
        del self.k, self.v
        self.out, self.source, self.unpruned = out, [root], "what makes keys and values is dropped at the run's end"
        if owns:
            self.root = root

    def now(self) -> tuple[Tensor, Tensor]:
        """k, v [kv_heads, length, head_dim]."""
        if not self.source:
            return self.k, self.v
        heads, length, dim = self.shape
        k, v = self.out(self.source[0]()).view(length, 2, heads, dim).permute(1, 2, 0, 3)
        return k, v

    def attend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mine = self.now()
        return front(mine[0], k), front(mine[1], v)

    def shift(self) -> int:
        return self.offset

    def fold(self) -> None:
        if not self.source:
            return
        trains = self.out.weight.requires_grad
        with torch.no_grad():
            k, v = (t.contiguous() for t in self.now())
        self.k, self.v = nn.Parameter(k, trains), nn.Parameter(v, trains)
        self.source, self.unpruned = [], ""
        self._modules.clear()

    def take_form(self, tensors: Mapping[str, Tensor]) -> None:
        if "k" in tensors:
            self.fold()
        super().take_form(tensors)


def front(own: Tensor, kept: Tensor) -> Tensor:
    """own [kv_heads, length, dim] in front of kept [batch, kv_heads, seq, dim]."""
    return torch.cat([own.to(kept.dtype).expand(kept.shape[0], -1, -1, -1), kept], 2)


def activations(model: Any, ids: Sequence[int]) -> Seen:
    """module -> keys and values [kv_heads, length, head_dim] of token `ids`, from one pass through the base."""
    if not reads_words(model):
        raise Refusal(
            "a prefix cannot start from words in a model that reads none.",
            found=type(model.get_submodule(embedding(model))).__name__, instead='Prefix(init="random")',
        )  # fmt: skip
    most = min(len(ids), tabled(model) or len(ids))  # past the table of positions, they begin again
    given = torch.tensor([list(ids)[:most]], device=next(model.parameters()).device)
    decoder = {"decoder_input_ids": given} if model.config.is_encoder_decoder else {}
    seen = keys_values(model, {"input_ids": given, **decoder})
    every = torch.arange(len(ids), device=given.device) % most  # a copy laid out in order: resumed sums stay bitwise
    return {module: (k[0].float()[:, every], v[0].float()[:, every]) for module, (k, v) in seen.items()}
