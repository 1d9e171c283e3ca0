"""New tokens: the embedding rows (and tied output rows) of chosen token ids are trained; only those rows are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta, Dense
from ..core.registry import method
from ..core.site import Site, embedding, name_of


@method("tokens", paper="", kind="embedding", mergeable=True, lr=1e-3)
@dataclass(frozen=True)
class NewTokens:
    """Train the rows of `ids`. Grow the model first: `add_tokens(model, tokenizer, ["<term>"])` returns their ids.

    A tied output projection uses the same trained rows; an untied one gets rows of its own. Parameters: n d (or 2 n d).
    """

    ids: tuple[int, ...] = (0,)

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        name, output = embedding(model), model.get_output_embeddings()
        layer = model.get_submodule(name)
        if not self.ids or max(self.ids) >= len(layer.weight) or min(self.ids) < 0:
            raise ValueError(
                f"NewTokens ids {self.ids} must be in 0..{len(layer.weight) - 1}: "
                "call add_tokens(model, tokenizer, ...) first"
            )
        rows = TokenRows(layer.weight, self.ids)
        yield Site(name, name), rows
        if output is not None:
            place = name_of(model, output)
            tied = output.weight is layer.weight
            yield Site(place, place), OutputRows(output.weight, self.ids, rows if tied else None)


class TokenRows(Delta):
    """E(x) with the rows of `ids` replaced; `rows` [n, d]."""

    tied = True  # merging rows into a tied embedding changes the output projection as it should

    def __init__(self, weight: Tensor, ids: tuple[int, ...]):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.rows = nn.Parameter(weight.detach()[list(ids)].float().clone())

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        match = x[..., None] == self.ids
        picked = F.embedding(match.long().argmax(-1), self.rows)
        scale = getattr(
            layer, "scalar_embed_scale", getattr(layer, "embed_scale", 1.0)
        )  # Gemma and BART scale what they return
        return torch.where(match.any(-1)[..., None], (picked * scale).to(y.dtype), y)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"weight": dense.weight.index_copy(0, self.ids, self.rows.to(dense.weight.dtype))}


class OutputRows(Delta):
    """The logits of `ids`: from the embedding's trained rows when tied, from rows of its own otherwise."""

    tied = True

    def __init__(self, weight: Tensor, ids: tuple[int, ...], shared: TokenRows | None):
        super().__init__()
        self.source = [shared] if shared is not None else []  # a list: the rows are stored once, with the embedding
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        if shared is None:
            self.rows = nn.Parameter(weight.detach()[list(ids)].float().clone())

    def weights(self) -> Tensor:
        return self.source[0].rows if self.source else self.rows

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(x, self.weights().to(x.dtype))
        bias = getattr(layer, "bias", None)
        return y.index_copy(-1, self.ids, (logits if bias is None else logits + bias[self.ids]).to(y.dtype))

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"weight": dense.weight.index_copy(0, self.ids, self.weights().to(dense.weight.dtype))}
