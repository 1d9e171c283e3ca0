"""New tokens: the embedding rows (and tied output rows) of chosen token ids are trained; only those rows are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta, Dense, Refusal
from ..core.registry import method, whole
from ..core.site import Site, embeddings, name_of, output_layer, scaled, widths


@method("tokens", paper="", kind="embedding", mergeable=True, tiny={"": {"ids": [5, 7]}})
@dataclass(frozen=True)
class NewTokens:
    """Train the rows of `ids`. Grow the model first: `add_tokens(model, tokenizer, ["<term>"])` returns their ids.

    A tied output projection uses the same trained rows; an untied one gets rows of its own. Parameters: n d (or 2 n d).
    """

    ids: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for i in self.ids:
            whole("NewTokens id", i, least=0)
        if twice := [i for i in self.ids if self.ids.count(i) > 1]:
            raise ValueError(f"NewTokens id {twice[0]} is given {self.ids.count(twice[0])} times: give each id once")

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        names, output = embeddings(model), output_layer(model)
        if not names:
            raise Refusal(
                "NewTokens trains rows of a token embedding, and this model reads no tokens.",
                found=type(model).__name__,
                instead="VisualPrompt for images, LoRA, adapters, Prefix",
            )
        size = widths(model.get_submodule(names[0]))[0]
        if not self.ids or max(self.ids) >= size or min(self.ids) < 0:
            raise ValueError(
                f"NewTokens ids {self.ids} must be in 0..{size - 1}: call add_tokens(model, tokenizer, ...) first"
            )
        own: dict[int, TokenRows] = {}  # one set of rows per weight: tied layers share theirs
        for name in (*names, *([name_of(model, output)] if output is not None else [])):
            weight = model.get_submodule(name).get_parameter("weight")
            rows = TokenRows(weight, self.ids, own.get(id(weight)))
            own.setdefault(id(weight), rows)
            yield Site(name, name), rows


class TokenRows(Delta):
    """The rows of `ids` in an embedding E(x), or in the output projection; `rows` [n, d] fp32."""

    tied = True  # merging rows into a tied embedding changes the output projection as it should
    ids: Tensor

    def __init__(self, weight: Tensor, ids: tuple[int, ...], shared: TokenRows | None):
        super().__init__()
        self.source = [shared] if shared is not None else []  # a list: the rows are stored once, with their owner
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        if shared is None:
            self.rows = nn.Parameter(weight.detach()[list(ids)].float().clone())

    def weights(self) -> Tensor:
        return self.source[0].rows if self.source else self.rows

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.embedded(layer, x, y) if isinstance(layer, nn.Embedding) else self.projected(layer, x, y)

    def embedded(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        match = x[..., None] == self.ids
        picked = scaled(layer, F.embedding(match.long().argmax(-1), self.weights()).to(y.dtype))
        return torch.where(match.any(-1)[..., None], picked, y)

    def projected(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        bias = getattr(layer, "bias", None)
        logits = F.linear(x, self.weights().to(x.dtype), None if bias is None else bias[self.ids])
        return y.index_copy(-1, self.ids, logits.to(y.dtype))

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"weight": dense.weight.index_copy(0, self.ids, self.weights().to(dense.weight.dtype))}
