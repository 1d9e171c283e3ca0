"""QA: the answer as a span of the context, p(start, end) = softmax(w_s h) softmax(w_e h) (BERT, arXiv:1810.04805)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Refusal
from ..core.registry import whole
from ..core.site import head_modules
from ..data.batch import Batch
from ..data.encode import Encoded, Encoding, Reading
from ..data.example import Example
from ..data.places import answered
from ..data.problems import BadRow
from ..data.wanted import WANTS
from .common import FITTED, exact, load, run

Part = tuple[Tensor, Reading]  # scores [prompts, 2, seq] of one window, and how its tokens lie in the context


@dataclass(frozen=True)
class QA:
    """Extractive question answering on rows of question, context and answers (the form of SQuAD, or plain texts).

    longest: the most tokens of an answer. doc_stride: a context longer than train.max_length is read in windows, each
    so many tokens after the one before; the best span over all of them answers (the practice of BERT's run_squad). A
    row without answers points at position 0; `unanswerable` lets predictions do so too, and is set where the training
    rows have such rows.
    """

    longest: int = 30
    doc_stride: int = 128
    unanswerable: bool = field(default=False, metadata=FITTED)

    name = "qa"
    packs = False
    task_head = True
    metrics = ("squad_f1", "squad_exact")
    wants = WANTS["qa"]

    def __post_init__(self) -> None:
        for name in ("longest", "doc_stride"):
            whole(f"qa {name}", getattr(self, name))

    def fit(self, examples: Sequence[Example]) -> QA:
        self.wants.demand(examples)
        return replace(self, unanswerable=self.unanswerable or any(not e.extra["answers"] for e in examples))

    def load(self, path: Any, config: Any, **options: Any) -> Any:
        return load("AutoModelForQuestionAnswering", path, config, num_labels=2, **options)

    def check(self, model: Any) -> None:
        """Refusal for a model without the two scores of every position."""
        if not head_modules(model) or int(model.config.num_labels) != 2:
            raise Refusal(
                "qa needs a head with a start and an end score.",
                found=type(model).__name__,
                instead="AutoModelForQuestionAnswering and attach(model, [LoRA(), Head()])",
            )

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        return answered(example, tokenizer, encoding, self.doc_stride)

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
    def parts(self, model: nn.Module, batch: Batch) -> list[Part]:
        """The scores of each row, of which `joined` takes those of one example together."""
        scores = self.logits(model, batch).float().cpu().unflatten(0, (-1, batch.prompts))
        return [(own, reading) for own, reading in zip(scores, batch.reading[:: batch.prompts], strict=True) if reading]

    def joined(self, parts: Sequence[Part], example: Example) -> str:
        """The text of `found`; "" where there is none."""
        return self.found(parts)[0]

    def found(self, windows: Sequence[Part]) -> tuple[str, int, float]:
        """(text, its first character in the context, log-probability) of the likeliest span over the windows of a
        context, with one softmax over all of them (the mean over prompts); ("", 0, ...) where position 0 scores higher
        in every window and that is allowed."""
        total = torch.cat([scores for scores, _ in windows], -1).logsumexp(-1, keepdim=True)
        each = [((scores - total).exp().mean(0).log(), reading) for scores, reading in windows]
        best, text, start = max((self.best(scores, reading) for scores, reading in each), key=lambda one: one[0])
        none = min(float(scores[:, 0].sum()) for scores, _ in each)
        return ("", 0, none) if self.unanswerable and none >= best else (text, start, best)

    def shown(self, parts: Sequence[Part], example: Example) -> dict[str, Any]:
        """{"answer", "start", "end": its characters in the context, "score": p(start) p(end)}; start and end are null
        for no answer."""
        text, start, score = self.found(parts)
        place = {"start": start, "end": start + len(text)} if text else {"start": None, "end": None}
        return {"answer": text, **place, "score": math.exp(score)}

    def asked(self, example: Example) -> Example:
        """The row with an answer that nothing reads, so that it can be encoded. BadRow for a row without a context."""
        if example.text is None or example.text_pair is None:
            fix = "Write both: question and context"
            raise BadRow("missing_field", example.where, "context", "qa reads a question and a context", fix)
        return replace(example, extra={**example.extra, "answers": ()})

    def best(self, scores: Tensor, reading: Reading) -> tuple[float, str, int]:
        """scores [2, seq] of one window -> (score, text, its first character) of its best span; it begins where the
        window sees most."""
        places = [i for i, span in enumerate(reading.spans) if span]
        if not places:
            return -torch.inf, "", 0
        n, begins = len(places), torch.tensor([not reading.fullest or reading.fullest[i] for i in places])
        start, end = scores[0, places].masked_fill(~begins, -torch.inf), scores[1, places]
        far = torch.arange(n)[None] - torch.arange(n)[:, None]
        both = (start[:, None] + end[None]).masked_fill((far < 0) | (far >= self.longest), -torch.inf)
        first, last = divmod(int(both.argmax()), n)
        chosen = [span for i in (first, last) if (span := reading.spans[places[i]])]
        text, at = reading.text[chosen[0][0] : chosen[-1][1]], chosen[0][0]
        return float(both.max()), text.strip(), at + len(text) - len(text.lstrip())

    def reference(self, example: Example) -> tuple[str, ...]:
        """Every accepted answer; () where there is none."""
        return tuple(text for text, _ in example.extra["answers"])

    def perfect(self, reference: tuple[str, ...]) -> str:
        """The prediction that a reference wants."""
        return reference[0] if reference else ""
