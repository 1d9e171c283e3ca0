"""QA: the answer as a span of the context, p(start, end) = softmax(w_s h) softmax(w_e h) (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Refusal
from ..core.site import head_modules
from ..data.batch import Batch
from ..data.encode import Encoded, Encoding, Reading
from ..data.example import Example
from ..data.places import answered
from .common import exact, load, run


@dataclass(frozen=True)
class QA:
    """Extractive question answering on rows of question, context and answers (the form of SQuAD).

    longest: the most tokens of an answer. A row without answers points at position 0; `unanswerable` lets predictions
    do so too, and is set where the training rows have such rows.
    """

    longest: int = 30
    unanswerable: bool = False

    name = "qa"
    packs = False
    task_head = True
    metrics = ("squad_f1", "squad_exact")

    def __post_init__(self) -> None:
        if isinstance(self.longest, bool) or self.longest < 1:
            raise ValueError(f"qa longest must be a whole number >= 1, got {self.longest!r}")

    def has(self, example: Example) -> bool:
        """Whether the row has what is learned."""
        return "answers" in example.extra

    def fit(self, examples: Sequence[Example]) -> QA:
        bare = next((e.where for e in examples if not self.has(e)), None)
        if bare:
            raise ValueError(f"{bare}: qa needs columns question, context and answers in every row")
        return replace(self, unanswerable=self.unanswerable or any(not e.extra["answers"] for e in examples))

    def load(self, path: Any, config: Any, **options: Any) -> Any:
        return load("AutoModelForQuestionAnswering", path, num_labels=2, **options)

    def check(self, model: Any) -> None:
        """Refusal for a model without the two scores of every position."""
        if not head_modules(model) or int(model.config.num_labels) != 2:
            raise Refusal(
                "qa needs a head with a start and an end score.",
                found=type(model).__name__,
                instead="AutoModelForQuestionAnswering and attach(model, [LoRA(), Head()])",
            )

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        return [answered(example, tokenizer, encoding)]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[rows, 2, seq]: start and end, padding at minus infinity."""
        out = run(model, batch)
        both = exact(torch.stack([out.start_logits, out.end_logits], 1))
        return both.masked_fill(batch.inputs["attention_mask"][:, None] == 0, -torch.inf)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(sum over the rows of the mean cross-entropy of start and end, metrics)."""
        scores, wanted = self.logits(model, batch), batch.labels.long()
        hits = float((scores.argmax(-1) == wanted).all(-1).float().mean())
        return F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum") / 2, {"span_accuracy": hits}

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        """The likeliest span of the context; "" where position 0 scores higher and that is allowed."""
        scores = self.logits(model, batch).float().log_softmax(-1)
        scores = scores.exp().unflatten(0, (-1, batch.prompts)).mean(1).log()
        readings = batch.reading[:: batch.prompts]
        return [self.best(row, reading) for row, reading in zip(scores, readings, strict=True) if reading]

    def best(self, scores: Tensor, reading: Reading) -> str:
        """scores [2, seq] of one row -> the text of its best span."""
        places = [i for i, span in enumerate(reading.spans) if span]
        start, end = scores[0, places], scores[1, places]
        n = len(places)
        far = torch.arange(n)[None] - torch.arange(n)[:, None]
        both = (start[:, None] + end[None]).masked_fill(
            ((far < 0) | (far >= self.longest)).to(start.device), -torch.inf
        )
        if not n or (self.unanswerable and scores[:, 0].sum() >= both.max()):
            return ""
        first, last = divmod(int(both.argmax()), n)
        chosen = [span for i in (first, last) if (span := reading.spans[places[i]])]
        return reading.text[chosen[0][0] : chosen[-1][1]].strip()

    def reference(self, example: Example) -> tuple[str, ...]:
        """Every accepted answer; () where there is none."""
        return tuple(text for text, _ in example.extra["answers"])

    def perfect(self, reference: tuple[str, ...]) -> str:
        """The prediction that a reference wants."""
        return reference[0] if reference else ""
