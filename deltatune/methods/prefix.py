"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): attention over [P_k; K], [P_v; V] in every layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attention import Heads, Seen, attention_modules, heads
from ..core.delta import Delta, blank
from ..core.registry import choice, flag, method, whole
from ..core.routing import hidden_size
from ..core.site import Site, embedding, trunk
from ._keys_values import KeysValues, Root, activations
from ._place import reads_words
from ._rows import sampled

INITS = ("vocab", "words", "random")
REPARAMS = ("none", "mlp")


@method(
    "prefix",
    paper="2101.00190",
    kind="attention",
    peft="PREFIX_TUNING",
    identity=False,
    tiny={"": {"length": 3}, "prefix-mlp": {"length": 3, "reparam": "mlp", "hidden": 16}},
)
@dataclass(frozen=True)
class Prefix:
    """Learned keys and values in front of every layer's own. Parameters: 2 layers kv_heads length head_dim.

    `offset_positions`: the real tokens of a model with one stack stand after the prefix, as in peft and P-tuning v2;
    off, they keep their places.
    Starts at the base's own keys and values, which leave its attention in order: init "words": of `words`, repeated or
    cut to `length`; "vocab": of words sampled from the 5,000 commonest tokens (a model that reads no words starts as
    "random"); "random": N(0, 0.02).
    reparam "mlp": trained as an MLP of `hidden` units over l d inputs (one for each stack of an encoder-decoder, and
    one for cross-attention), dropped at the end of the run; without it `hidden` says nothing.
    """

    length: int = 20
    offset_positions: bool = True
    init: str = "vocab"
    words: str = ""
    reparam: str = "none"
    hidden: int = 512
    ids: tuple[int, ...] = ()  # the words' token ids: `bind` finds them

    def __post_init__(self) -> None:
        whole("Prefix length", self.length)
        whole("Prefix hidden", self.hidden)
        flag("Prefix offset_positions", self.offset_positions)
        choice("Prefix init", self.init, INITS)
        choice("Prefix reparam", self.reparam, REPARAMS)
        if (self.init == "words") != bool(self.words or self.ids):
            raise ValueError(f"Prefix init 'words' needs words, and only it: init {self.init!r}, words {self.words!r}")

    def bind(self, tokenizer: Any) -> Prefix:
        """The prefix with its words as token ids."""
        if not self.words:
            return self
        ids = tuple(tokenizer(self.words, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"Prefix words {self.words!r} are no token of this tokenizer")
        return replace(self, ids=ids)

    def deltas(self, model: Any) -> Iterator[tuple[Site, Delta]]:
        takes = "position_ids" in inspect.signature(trunk(model).forward).parameters
        found, start = attention_modules(model), self.start(model)
        roots: dict[str, Root] = {}
        for name, module, kind in found:
            offset = self.length if kind == "self" and takes and self.offset_positions else 0
            delta = KeysValues(*(start[module] if start else self.drawn(heads(module))), offset)
            if self.reparam == "mlp":
                owns = kind not in roots
                if owns:
                    roots[kind] = Root(self.length, hidden_size(module), self.hidden)
                delta.reparametrise(roots[kind], owns, keep=bool(start))
            yield Site(name, name), delta

    def drawn(self, shape: Heads) -> tuple[Tensor, Tensor]:
        """Small random keys and values, as in the paper's random initialisation."""
        size = (shape.kv, self.length, shape.dim)
        return torch.randn(size) * 0.02, torch.randn(size) * 0.02

    def start(self, model: nn.Module) -> Seen:
        """module -> the keys and values to start from; {} for random ones."""
        if self.init == "words" and not self.ids:
            raise ValueError("Prefix words are not token ids yet: attach(model, Prefix(...).bind(tokenizer))")
        random = self.init == "random" or (self.init == "vocab" and not reads_words(model))
        if random or blank() or next(model.parameters()).is_meta:
            return {}
        ids = self.ids or [i for (i,) in sampled(model.get_submodule(embedding(model)), self.length)]
        return activations(model, [ids[i % len(ids)] for i in range(self.length)])
