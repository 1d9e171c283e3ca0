"""What a soft prompt holds: vectors that virtual token ids, past the vocabulary, stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import Delta
from ..core.registry import choice, whole

DROPPED = "the matrices of its encoder are dropped at the end of the run"
COMBINES = ("vote", "average")
COMMON = 5000  # sub-word vocabularies put frequent tokens first; the paper samples from as many


def check_several(who: str, count: int, combine: str, tasks: Sequence[str]) -> None:
    """ValueError unless `count` prompts (for each of `tasks`) can be combined so."""
    whole(f"{who} count", count)
    choice(f"{who} combine", combine, COMBINES)
    if isinstance(tasks, str) or any(not isinstance(t, str) or not t for t in tasks) or len(set(tasks)) < len(tasks):
        raise ValueError(f"{who} tasks must be different names, got {tasks!r}")


class Rows(Delta):
    """`count` prompts of `length` vectors: ids in [offset, offset + count * length) mean them, in order.

    The layer itself sees id 0 in their place. `encode`: where the vectors come from until `fold` (P-tuning).
    """

    def __init__(self, layer: nn.Embedding, start: Tensor, length: int, encode: nn.Module | None = None):
        super().__init__()
        self.offset, self.size, self.length = layer.num_embeddings, len(start), length
        self.prompt_embeddings = nn.Parameter(start)  # [count * length, d]; what the encoder reads, where there is one
        self.ids: Tensor | None = None
        if encode is not None:
            self.encode, self.inputs, self.unpruned = encode, self.prompt_embeddings, DROPPED
            del self.prompt_embeddings

    def placed(self, layer: nn.Module) -> None:
        """Take the first ids that neither the vocabulary nor another prompt uses."""
        ends = [d.offset + d.size for d in layer.modules() if isinstance(d, Rows)]
        self.offset = max([int(layer.num_embeddings), *ends])  # type: ignore[arg-type]

    @property
    def count(self) -> int:
        return self.size // self.length

    @property
    def encoded(self) -> bool:
        return "encode" in self._modules

    def virtual_ids(self, prompt: int = 0) -> tuple[int, ...]:
        return tuple(self.offset + prompt * self.length + i for i in range(self.length))

    def vectors(self) -> Tensor:
        """[count * length, d]."""
        if not self.encoded:
            return self.prompt_embeddings
        return self.encode(self.inputs.view(self.count, self.length, -1)).flatten(0, 1)

    def ours(self, ids: Tensor) -> Tensor:
        return (ids >= self.offset) & (ids < self.offset + self.size)

    def before(self, layer: nn.Module, ids: Tensor) -> Tensor:
        self.ids = ids
        return ids.masked_fill(self.ours(ids), 0)

    def after(self, layer: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
        given, self.ids = self.ids, None
        if given is None:
            raise RuntimeError("the embedding's input was not seen: was the forward pass interrupted?")
        here = self.ours(given)
        # F.embedding: the backward of indexing by repeated ids is not deterministic on CPU
        rows = nn.functional.embedding((given - self.offset).masked_fill(~here, 0), self.vectors())
        return torch.where(here[..., None], rows.to(y.dtype), y)

    def fold(self) -> None:
        if self.encoded:
            with torch.no_grad():
                rows = self.vectors().clone()
            self.prompt_embeddings = nn.Parameter(rows, self.inputs.requires_grad)
            self.unpruned = ""
            del self.encode, self.inputs

    def take_form(self, tensors: Mapping[str, Tensor]) -> None:
        if "prompt_embeddings" in tensors:
            self.fold()
        super().take_form(tensors)


def sampled(layer: Any, count: int) -> list[tuple[int, ...]]:
    """`count` ids drawn from the common ones with torch's global generator, each once while they last."""
    common = min(COMMON, layer.num_embeddings)
    ids = [int(i) for _ in range(-(-count // common)) for i in torch.randperm(common, device="cpu")]
    return [(i,) for i in ids[:count]]
