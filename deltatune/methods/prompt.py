"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): [P; E(x)]; ids past the vocabulary stand for rows of P."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.delta import Delta, Refusal
from ..core.registry import method, whole
from ..core.site import Site, embedding

INITS = ("vocab", "uniform")


@method(
    "prompt",
    paper="2104.08691",
    kind="embedding",
    peft="PROMPT_TUNING",
    lr=3e-2,
    identity=False,
    tiny={"": {"length": 3}},
)
@dataclass(frozen=True)
class Prompt:
    """`length` learned vectors that virtual token ids stand for. Parameters: length d.

    init "vocab": evenly spaced rows of the embedding, as the layer returns them; "uniform": U(-0.5, 0.5).
    Put `virtual_ids(model, name)` in front of the input ids; the encoder's, where there is one.
    """

    length: int = 20
    init: str = "vocab"

    def __post_init__(self) -> None:
        whole("Prompt length", self.length)
        if self.init not in INITS:
            raise ValueError(f"Prompt init {self.init!r}: choose from {', '.join(INITS)}")

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        name = embedding(model)
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Embedding):
            raise Refusal(
                "soft prompts stand for rows of a token embedding.",
                found=f"{name}: {type(layer).__name__}",
                instead="Prefix, which needs no embedding",
            )
        yield Site(name, name), Rows(layer, first_free(layer), self.start(layer))

    def start(self, layer: nn.Embedding) -> Tensor:
        """[length, d]: taken through the layer, because some families scale what it returns."""
        if self.init == "uniform":
            return torch.rand(self.length, layer.embedding_dim) - 0.5
        ids = torch.linspace(0, layer.num_embeddings - 1, self.length, device=layer.weight.device).long()
        return layer(ids).detach().float()


def first_free(layer: nn.Embedding) -> int:
    """The first id that neither the vocabulary nor another adapter's prompt uses."""
    taken = [d.offset + d.prompt_embeddings.shape[0] for d in layer.modules() if isinstance(d, Rows)]
    return max([layer.num_embeddings, *taken])


class Rows(Delta):
    """Ids in [offset, offset + length) mean this prompt's rows; the layer itself sees id 0 in their place."""

    def __init__(self, layer: nn.Embedding, offset: int, start: Tensor):
        super().__init__()
        self.vocab, self.offset = layer.num_embeddings, offset
        self.prompt_embeddings = nn.Parameter(start)
        self.ids: Tensor | None = None

    def ours(self, ids: Tensor) -> Tensor:
        return (ids >= self.offset) & (ids < self.offset + len(self.prompt_embeddings))

    def before(self, layer: nn.Module, ids: Tensor) -> Tensor:
        self.ids = ids
        return ids.masked_fill(self.ours(ids), 0)

    def after(self, layer: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
        given, self.ids = self.ids, None
        if given is None:
            raise RuntimeError("the embedding's input was not seen: was the forward pass interrupted?")
        here = self.ours(given)
        # F.embedding: the backward of indexing by repeated ids is not deterministic on CPU
        rows = nn.functional.embedding((given - self.offset).masked_fill(~here, 0), self.prompt_embeddings)
        return torch.where(here[..., None], rows.to(y.dtype), y)
