"""Tag: a class for every word, read at its first token, p(y_t | x) = softmax(W h_t + b) (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import Refusal
from ..core.site import head_modules
from ..data.batch import Batch
from ..data.encode import Encoded, Encoding
from ..data.example import Example
from ..data.places import tagged
from ..data.problems import BadRow
from ..data.wanted import WANTS
from ..evaluate.spans import spans
from .common import FITTED, combined, load, name_classes, run, shares, token_loss

OUTSIDE = "O"
Part = list[Tensor | None]  # scores [classes] of each word of a row


@dataclass(frozen=True)
class Tag:
    """Token classification (named entities and the like) on rows of tokens and tags.

    labels: tag names in order, which tags given as numbers count into; left out, they are taken from the training set.
    """

    labels: tuple[str, ...] | None = field(default=None, metadata=FITTED)

    name = "tag"
    packs = False
    task_head = True
    metrics = ("span_f1", "tag_accuracy")
    wants = WANTS["tag"]

    def __post_init__(self) -> None:
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))

    def fit(self, examples: Sequence[Example]) -> Tag:
        """Tag names from the training rows, the one for words outside first."""
        self.wants.demand(examples)
        if self.labels is not None:
            return self
        found = {str(tag) for e in examples for tag in e.extra["tags"]}
        numbers = all(name.isdigit() for name in found)
        names = sorted(found, key=lambda n: (n != OUTSIDE, int(n) if numbers else 0, n))
        if len(names) < 2:
            raise ValueError(f"tag needs two tags or more, the training set has {', '.join(names) or 'none'}")
        return replace(self, labels=tuple(names))

    def load(self, path: Any, config: Any, **options: Any) -> Any:
        names = list(self.labels or ())
        model = load("AutoModelForTokenClassification", path, config, num_labels=max(len(names), 1), **options)
        return name_classes(model, names)

    def check(self, model: Any) -> None:
        """Refusal or ValueError for a model whose head is missing or of another size."""
        if not head_modules(model):
            raise Refusal(
                "tag needs a task head.",
                found=type(model).__name__,
                instead="AutoModelForTokenClassification and attach(model, [LoRA(), Head()])",
            )
        if (wanted := len(self.labels or ())) != (have := int(model.config.num_labels)):
            raise ValueError(f"the model's head has {have} outputs, the rows need {wanted}: set num_labels")

    def named(self, tag: Any) -> str:
        """A tag as a name: a number counts into `labels`, unless it is one of them."""
        names = self.labels or ()
        if isinstance(tag, int) and str(tag) not in names and 0 <= tag < len(names):
            return names[tag]
        return str(tag)

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        tags = tuple(self.named(tag) for tag in example.extra["tags"])
        example = replace(example, extra={**example.extra, "tags": tags})
        return [tagged(example, tokenizer, self.labels or (), encoding)]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(sum over the words, metrics)."""
        loss, metrics = token_loss(run(model, batch).logits, batch.labels)
        return loss, {"tag_accuracy": metrics["token_accuracy"]}

    @torch.no_grad()
    def parts(self, model: nn.Module, batch: Batch) -> list[Part]:
        """The scores [classes] of every word of each row, of all its prompts together; None for words cut off."""
        found = combined(run(model, batch).logits.float(), batch).cpu()
        words = [reading.words if reading else () for reading in batch.reading[:: batch.prompts]]
        return [[row[at] if at >= 0 else None for at in places] for row, places in zip(found, words, strict=True)]

    def joined(self, parts: Sequence[Part], example: Example) -> tuple[str, ...]:
        (words,), names = parts, self.labels or ()
        lost = OUTSIDE if OUTSIDE in names else names[0]
        return tuple(lost if scores is None else names[int(scores.argmax())] for scores in words)

    def shown(self, parts: Sequence[Part], example: Example) -> dict[str, Any]:
        """{"words", "tags", "entities": [{"type", "text", "start", "end"}], in words, "scores": {tag: probability} of
        every word}; null for the scores of a word that was cut off."""
        words, tags, names = example.extra["tokens"], self.joined(parts, example), self.labels or ()
        found = [
            {"type": kind, "text": " ".join(words[a:b]), "start": a, "end": b}
            for kind, a, b in sorted(spans(tags), key=lambda span: span[1:])
        ]
        scores = [None if own is None else shares(own, names) for own in parts[0]]
        return {"words": words, "tags": tags, "entities": found, "scores": scores}

    def asked(self, example: Example) -> Example:
        """The row with an answer that nothing reads, so that it can be encoded. BadRow for a row without words."""
        if "tokens" not in example.extra:
            fix = "Write its words as a list: tokens"
            raise BadRow("missing_field", example.where, "tokens", "tag reads words", fix)
        return replace(
            example, extra={**example.extra, "tags": (self.labels or ("",))[:1] * len(example.extra["tokens"])}
        )

    def reference(self, example: Example) -> tuple[str, ...]:
        return tuple(self.named(tag) for tag in example.extra["tags"])
