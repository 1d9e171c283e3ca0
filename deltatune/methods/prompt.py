"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): [P; E(x)]; ids past the vocabulary stand for rows of P."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.delta import Delta
from ..core.registry import choice, method, whole
from ..core.site import Site
from ._place import looked_up, place
from ._rows import Rows, check_several, sampled


@method(
    "prompt",
    paper="2104.08691",
    kind="embedding",
    peft="PROMPT_TUNING",
    virtual=True,
    identity=False,
    tiny={
        "": {"length": 3},
        "prompts": {"length": 2, "count": 3},
        "prompt-tasks": {"length": 2, "count": 2, "tasks": ("a", "b")},
    },
)
@dataclass(frozen=True)
class Prompt:
    """`length` learned vectors that virtual token ids stand for. Parameters: tasks count length d.

    init "vocab": words sampled from the 5,000 commonest tokens; "uniform": U(-0.5, 0.5); "text": the tokens of `text`,
    repeated or cut to `length`; "labels": a vector for each of the class names `labels` (the mean of its tokens), the
    rest sampled. count: so many prompts are trained on every row in one batch; their answers are combined by majority
    "vote", or their scores by "average". tasks: each has prompts of its own, which its rows alone train.
    """

    INITS: ClassVar = ("vocab", "uniform", "text", "labels")

    length: int = 20
    init: str = "vocab"
    text: str = ""
    labels: tuple[str, ...] = ()
    count: int = 1
    combine: str = "vote"
    tasks: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()  # the words' token ids, by vector: `bind` finds them

    def __post_init__(self) -> None:
        who = type(self).__name__
        whole(f"{who} length", self.length)
        check_several(who, self.count, self.combine, self.tasks)
        choice(f"{who} init", self.init, self.INITS)
        if not isinstance(self.text, str) or isinstance(self.labels, str):
            raise ValueError(f"{who} text is a text, labels a list of words: got {self.text!r} and {self.labels!r}")
        if self.ids and self.init not in ("text", "labels"):
            raise ValueError(f"{who} ids start an init text or labels, not {self.init!r}, which reads none")
        object.__setattr__(self, "ids", tuple(tuple(i) for i in self.ids))
        for kind, given in (("text", self.text), ("labels", self.labels)):
            if (self.init == kind) != bool(given or (self.ids and self.init == kind)):
                raise ValueError(f"{who} init {kind!r} needs {kind}, no other: init={self.init!r}, {kind}={given!r}")
        if (named := len(self.labels)) > self.length:
            raise ValueError(f"{who} length {self.length} is too short for {named} labels")
        if self.count > 1 and (self.init == "text" or named == self.length):
            same = f"{self.count} prompts that start from the same words would stay the same"
            raise ValueError(f"{same}: choose init vocab, or labels with a greater length")

    def bind(self, tokenizer: Any) -> Self:
        """The prompt with its words as token ids."""
        if not (self.text or self.labels):
            return self
        found = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in self.labels]
        found += [[i] for i in tokenizer(self.text, add_special_tokens=False)["input_ids"]] if self.text else []
        if not found or not all(found):
            raise ValueError(
                f"{type(self).__name__} {self.init} {self.text or self.labels!r}: a word is no token of this tokenizer"
            )
        return replace(self, ids=tuple(map(tuple, found)))

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        site, layer = place(model)
        yield site, Rows(layer, self.starts(layer), self.length)

    def starts(self, layer: nn.Embedding) -> Tensor:
        """[prompts length, d] of all prompts, those of the first task before the second's."""
        return torch.cat([self.start(layer) for _ in range(self.count * max(len(self.tasks), 1))])

    def start(self, layer: nn.Embedding) -> Tensor:
        """[length, d] of one prompt."""
        if self.init == "uniform":
            return torch.rand(self.length, layer.embedding_dim) - 0.5
        if self.init != "vocab" and not self.ids:
            raise ValueError(f"init {self.init} is not token ids yet: attach(model, method.bind(tokenizer))")
        if self.init == "text":
            return looked_up(layer, [self.ids[i % len(self.ids)] for i in range(self.length)])
        return looked_up(layer, [*self.ids, *sampled(layer, self.length - len(self.ids))])
