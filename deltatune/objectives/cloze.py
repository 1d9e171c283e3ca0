"""Cloze: a class's score is the language model's logit of its words at the gap, q(l | x) = softmax_l M(v(l) | T(x))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch
from ..data.encode import Encoded, Encoding, label_names, target
from ..data.example import Example
from ..prompting.template import Template, render
from .classify import spelled
from .common import kept_logits, language_class, load


@dataclass(frozen=True)
class Cloze:
    """A manual template and manual label words (Schick & Schuetze 2020, arXiv:2001.07676).

    template: '{text} It was <mask>.'; a causal model answers at the end. labels: {class: [words]}, each word one token
    for this tokenizer; a class with several words scores their mean log-probability.
    """

    template: str = "{text} It was <mask>."
    labels: Mapping[str, Sequence[str]] | tuple[tuple[str, tuple[str, ...]], ...] = ()
    words: tuple[tuple[int, ...], ...] = field(default=(), metadata={"internal": True})  # token ids by class

    name = "cloze"
    packs = False
    task_head = False

    def __post_init__(self) -> None:
        if isinstance(self.labels, Mapping):
            pairs = tuple((str(k), (v,) if isinstance(v, str) else tuple(v)) for k, v in self.labels.items())
            object.__setattr__(self, "labels", pairs)
        object.__setattr__(self, "words", tuple(tuple(w) for w in self.words))
        Template(self.template)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.labels)

    def fit(self, examples: Sequence[Example]) -> Cloze:
        """Without label words, the class names themselves are the words."""
        names = label_names(examples)
        if not self.labels:
            return replace(self, labels=tuple((n, (n,)) for n in names))
        missing = [n for n in names if n not in self.classes]
        if missing:
            raise ValueError(f"cloze has no words for the class {missing[0]!r}; it has {', '.join(self.classes)}")
        return self

    def load(self, path: Any, config: Any, **options: Any) -> Any:
        return load(language_class(config), path, **options)

    def bind(self, tokenizer: Any) -> Cloze:
        """Label words as token ids. ValueError for a word of several tokens, or one that two classes share."""
        found = tuple(tuple(word_id(tokenizer, w) for w in words) for _, words in self.labels)
        every = [i for ids in found for i in ids]
        if len(set(every)) < len(every):
            raise ValueError(f"cloze label words must differ between classes: {dict(self.labels)}")
        return replace(self, words=found)

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        filled = render(parsed(self.template), example, tokenizer, encoding.max_length, encoding.prompt_ids)
        index = target(example.label, self.classes, example.where)
        return [Encoded(filled.ids, None, index, mask_at=filled.mask_at, where=example.where)]

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """[rows, classes]: the mean log-probability of each class's words at the gap."""
        assert batch.mask_at is not None
        assert self.words, "Cloze.bind(tokenizer) must come before the first batch"
        keep, place = torch.unique(batch.mask_at, return_inverse=True)
        logits = kept_logits(model, batch, keep)
        at_gap = logits[torch.arange(len(place), device=place.device), place].float().log_softmax(-1)
        columns = [at_gap[:, list(ids)].mean(-1) for ids in self.words]
        return torch.stack(columns, -1)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(sum over the rows of the cross-entropy among the classes, metrics)."""
        scores = self.scores(model, batch)
        hits = float((scores.argmax(-1) == batch.labels).float().mean())
        return F.cross_entropy(scores, batch.labels, reduction="sum"), {"accuracy": hits}

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        return [self.classes[i] for i in self.scores(model, batch).argmax(-1).tolist()]

    def reference(self, example: Example) -> str:
        return spelled(example.label)


@lru_cache(maxsize=8)
def parsed(text: str) -> Template:
    return Template(text)


def word_id(tokenizer: Any, word: str) -> int:
    """The one token of a label word, with the space before it where the tokenizer keeps one."""
    tried = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (f" {word.strip()}", word.strip())]
    single = next((ids for ids in tried if len(ids) == 1 and ids[0] != tokenizer.unk_token_id), None)
    if single is None:
        pieces = tokenizer.convert_ids_to_tokens(tried[0])
        raise ValueError(
            f"label word {word!r} is {len(pieces)} tokens for this tokenizer ({' '.join(pieces)}): "
            "choose a word of one token"
        )
    return int(single[0])
