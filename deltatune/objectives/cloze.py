"""Cloze: a class's score is the language model's logit of its words at the gap, q(l | x) = softmax_l M(v(l) | T(x))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Refusal
from ..data.batch import Batch
from ..data.encode import Encoded, Encoding, label_names, target
from ..data.example import Example
from ..data.wanted import LABELS, Wanted
from ..prompting.template import Filler, Template
from .classify import refuse_mixed, refuse_several, spelled
from .common import FITTED, combined, language_class, load, needs_words, shares, states_at


@dataclass(frozen=True)
class Cloze:
    """A manual template and manual label words (Schick & Schuetze 2020, arXiv:2001.07676).

    template: '{text} It was <mask>.'; a causal model answers at the end. labels: {class: [words]}, each word one token
    for this tokenizer; a class with several words scores their mean log-probability.
    """

    template: str = "{text} It was <mask>."
    labels: Mapping[str, Sequence[str]] | tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), metadata=FITTED)
    words: tuple[tuple[int, ...], ...] = field(default=(), metadata={"internal": True})  # token ids by class
    masked: bool | None = field(default=None, metadata={"internal": True})  # a masked language model; set by `bind`

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
    def pairs(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(class, its words): `labels` as __post_init__ leaves them."""
        assert isinstance(self.labels, tuple)
        return self.labels

    @property
    def continues(self) -> bool:
        """Whether what is measured stands behind what rows begin with."""
        return self.masked is False

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.pairs)

    @property
    def wants(self) -> Wanted:
        """What it reads of a row."""
        return parsed(self.template).wants(LABELS)

    def fit(self, examples: Sequence[Example]) -> Cloze:
        """Without label words, the class names themselves are the words."""
        self.wants.demand(examples)
        refuse_several(self.name, examples)
        if not self.labels:
            refuse_mixed(examples)
        names = label_names(examples)
        if len(names) < 2:
            raise ValueError(f"cloze needs two classes or more, the training set has {', '.join(names) or 'scores'}")
        if not self.labels:
            return replace(self, labels=tuple((n, (n,)) for n in names))
        missing = [n for n in names if n not in self.classes]
        if missing:
            where = next(e.where for e in examples if spelled(e.label) == missing[0])
            raise ValueError(
                f"{where}: objective.cloze.labels has no words for the class{'es' * (len(missing) > 1)} "
                f"{', '.join(map(repr, missing))}; it has {', '.join(self.classes)}. Add a line for each: "
                f"{missing[0]}: [WORD]"
            )
        return self

    def load(self, path: Any, config: Any, **options: Any) -> Any:
        """The model with the head this objective needs, its weights from `path`."""
        if config.is_encoder_decoder:
            raise halved(config)
        return load(language_class(config), path, config, **options)

    def check(self, model: Any) -> None:
        """Refusal for a model without one place where it answers."""
        if model.config.is_encoder_decoder:
            raise halved(model.config)
        needs_words(model, self.name)

    def bind(self, tokenizer: Any, kind: str) -> Cloze:
        """For a 'masked' or 'causal' model: label words as token ids.

        ValueError for a word of several tokens, or one that two classes share.
        """
        found = tuple(tuple(word_id(tokenizer, w) for w in words) for _, words in self.pairs)
        every = [i for ids in found for i in ids]
        if len(set(every)) < len(every):
            raise ValueError(f"cloze label words must differ between classes: {dict(self.labels)}")
        if kind == "masked" and tokenizer.mask_token is None:
            raise ValueError("cloze needs a mask token, which this model's tokenizer does not have")
        return replace(self, words=found, masked=kind == "masked")

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        assert self.masked is not None, "Cloze.bind must come before the first row"
        filled = Filler(tokenizer, self.masked, encoding.max_length, encoding.prompt_ids)(
            parsed(self.template), example
        )
        index = target(example.label, self.classes, example.where)
        return [Encoded(filled.ids, None, index, mask_at=filled.mask_at, where=example.where)]

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """[rows, classes]: the mean log-probability of each class's words at the gap."""
        assert batch.mask_at is not None
        assert self.words, "Cloze.bind must come before the first batch"
        rows = torch.arange(len(batch.mask_at), device=batch.mask_at.device)
        found, projection = states_at(model, batch, (rows, batch.mask_at))
        at_gap = projection.logits(found).log_softmax(-1)
        columns = [at_gap[:, list(ids)].mean(-1) for ids in self.words]
        return torch.stack(columns, -1)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(sum over the rows of the cross-entropy among the classes, metrics)."""
        scores = self.scores(model, batch)
        hits = float((scores.argmax(-1) == batch.labels).float().mean())
        return F.cross_entropy(scores, batch.labels, reduction="sum"), {"accuracy": hits}

    @torch.no_grad()
    def parts(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The scores [classes] of each row, of all its prompts together."""
        return list(combined(self.scores(model, batch), batch).cpu())

    def joined(self, parts: Sequence[Tensor], example: Example) -> str:
        return self.classes[int(parts[0].argmax())]

    def shown(self, parts: Sequence[Tensor], example: Example) -> dict[str, Any]:
        """{"label", "words": those that stand for it, "scores": {class: probability}}."""
        said = self.joined(parts, example)
        return {"label": said, "words": dict(self.pairs)[said], "scores": shares(parts[0], self.classes)}

    def asked(self, example: Example) -> Example:
        """The row with an answer that nothing reads, so that it can be encoded."""
        return replace(example, label=self.classes[0])

    def reference(self, example: Example) -> str:
        return spelled(example.label)


@lru_cache(maxsize=8)
def parsed(text: str) -> Template:
    return Template(text)


def word_id(tokenizer: Any, word: str) -> int:
    """The one token of a label word, with the space before it where the tokenizer keeps one."""
    tried = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (f" {word.strip()}", word.strip())]
    single = next((ids for ids in tried if len(ids) == 1 and ids[0] != tokenizer.unk_token_id), None)
    if single is None and any(len(ids) == 1 for ids in tried):
        raise ValueError(f"label word {word!r} is unknown to this tokenizer: choose a word of its vocabulary")
    if single is None:
        pieces = tokenizer.convert_ids_to_tokens(tried[0])
        raise ValueError(
            f"label word {word!r} is {len(pieces)} tokens for this tokenizer ({' '.join(pieces)}): "
            "choose a word of one token"
        )
    return int(single[0])


def halved(config: Any) -> Refusal:
    return Refusal(
        "cloze reads one place of one sequence, and an encoder-decoder has two sequences.",
        found=f"model type {config.model_type}",
        instead="a masked or a causal model, or the objective sft with the word as the completion",
    )
