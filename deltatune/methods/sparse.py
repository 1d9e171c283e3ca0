"""SparseAdapter (He et al. 2022, arXiv:2210.04284): W * M, the mask M fixed before step 1 by a score of each weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import nn

from ..core.delta import Delta, Given, Refusal, blank
from ..core.registry import choice, finite, method, whole
from ..core.registry import identity as same
from ..core.scores import SCORES, Seen
from ..core.site import Site
from ..core.sparse import keep, matrices, only, thin
from .adapter import Adapter

DATA_FREE = ("random", "magnitude", "synflow")
BY = (*DATA_FREE, "snip", "grasp")
SMALL = {"adapter": {"bottleneck": 4, "init": "normal", "init_std": 0.3}}
TINY = {
    "": {"of": [SMALL], "by": "magnitude", "density": 0.5},
    "sparse-lora": {"of": [{"lora": {"r": 4}}], "by": "random", "density": 0.5},
}


@method("sparse", paper="2210.04284", kind="adapter", tiny=TINY)
@dataclass(frozen=True)
class Sparse:
    """Any methods with their matrices pruned before training: only the `density` share of values trains and is stored.

    `by`: random, magnitude |w|, snip |g w|, grasp (keeps the largest w Hg), synflow (|W| chains fed with ones). Snip
    and grasp look at `batches` micro-batches of training rows. `rounds` prunes step by step, density^(round / rounds).
    """

    of: tuple[Any, ...] = field(default=(Adapter(init="normal"),), metadata={"methods": True})
    density: float = 0.2
    by: str = "snip"
    rounds: int = 1
    batches: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", self.of if isinstance(self.of, tuple) else (self.of,))
        finite("Sparse density", self.density, above=0)
        if self.density > 1:
            raise ValueError(f"Sparse density is the share that is kept, 0 < density <= 1, got {self.density!r}")
        whole("Sparse rounds", self.rounds)
        whole("Sparse batches", self.batches)
        choice("Sparse by", self.by, BY)
        if not self.of:
            raise ValueError("Sparse of () prunes nothing: give the methods, such as of=(Adapter(init='normal'),)")

    @property
    def identity(self) -> bool:
        return all(same(m) for m in self.of)

    def bind(self, tokenizer: Any) -> Sparse:
        return dataclasses.replace(self, of=tuple(m.bind(tokenizer) if hasattr(m, "bind") else m for m in self.of))

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        found = [pair for m in self.of for pair in m.deltas(model)]
        parts, why = parts_of([d for _, d in found]), [f"; {d.unpruned}" for _, d in found if d.unpruned][:1]
        if why or not parts or not all(delta.ready for _, delta in found):
            raise Refusal(
                f"Sparse prunes matrices that a method adds and draws by itself{''.join(why)}.",
                found=", ".join(dict.fromkeys(type(m).__name__ for m in self.of)),
                instead="Adapter, LoRA, Prefix or Prompt, also inside Gate and SpotTune; Select for the base's weights",
            )
        if self.by in DATA_FREE and not blank():
            self.prune(parts, None)
        for delta, path in parts:
            delta.ready, delta.keeps = self.by in DATA_FREE, {**delta.keeps, path: self.density}
        yield from found

    def prepare(self, model: nn.Module, deltas: Sequence[Delta], given: Given) -> None:
        self.prune(parts_of(deltas), given)

    def prune(self, parts: list[tuple[Delta, str]], given: Given | None) -> None:
        params = [delta.get_parameter(path) for delta, path in parts]
        seen = Seen(params, [delta for delta, _ in parts], given.losses if given else lambda: iter(()), self.batches)
        for n in range(1, self.rounds + 1):
            # what went in an earlier round stays gone, whatever its new score
            gone = [p == 0 if n > 1 else torch.zeros_like(p, dtype=torch.bool) for p in params]
            found = [v.masked_fill(g, -inf) for v, g in zip(SCORES[self.by](seen), gone, strict=True)]
            kept = keep(found, self.density ** (n / self.rounds), f"Sparse by {self.by}")
            for p, index in zip(params, kept, strict=True):
                only(p, index)
        for (delta, path), index in zip(parts, kept, strict=True):
            thin(delta, path, index)
            delta.ready = True
        for delta in dict.fromkeys(delta for delta, _ in parts):
            delta.restart()


def parts_of(deltas: Sequence[Delta]) -> list[tuple[Delta, str]]:
    return [(delta, path) for delta in deltas for path in matrices(delta)]
