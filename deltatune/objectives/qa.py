"""QA: the answer as a span of the context, p(start, end) = softmax(w_s h) softmax(w_e h) (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from ..data.wanted import ANSWERS, Wanted
from .common import exact, load, run

Part = tuple[Tensor, Reading]  # scores [prompts, 2, seq] of one window, and how its tokens lie in the context


@dataclass(frozen=True)
class QA:
    """Extractive question answering on rows of question, context and answers (the form of SQuAD).

    longest: the most tokens of an answer. doc_stride: a context longer than train.max_length is read in windows, each
    so many tokens after the one before; the best span over all of them answers (the practice of BERT's run_squad). A
    row without answers points at position 0; `unanswerable` lets predictions do so too, and is set where the training
    rows have such rows.
    """

    longest: int = 30
    doc_stride: int = 128
    unanswerable: bool = False

    name = "qa"
    packs = False
    task_head = True
    metrics = ("squad_f1", "squad_exact")
    wants = Wanted(answer=ANSWERS)

    def __post_init__(self) -> None:
        for name in ("longest", "doc_stride"):
            whole(f"qa {name}", getattr(self, name))

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
    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        """An answer for each row, as if it were a window alone."""
        return [self.joined([part]) for part in self.parts(model, batch)]

    @torch.no_grad()
    def parts(self, model: nn.Module, batch: Batch) -> list[Part]:
        """The scores of each row, of which `joined` takes those of one example together."""
        scores = self.logits(model, batch).float().cpu().unflatten(0, (-1, batch.prompts))
        return [(own, reading) for own, reading in zip(scores, batch.reading[:: batch.prompts], strict=True) if reading]

    def joined(self, windows: Sequence[Part]) -> str:
        """The likeliest span over the windows of a context, with one softmax over all of them (the mean over prompts);
        "" where position 0 scores higher in every window and that is allowed."""
        total = torch.cat([scores for scores, _ in windows], -1).logsumexp(-1, keepdim=True)
        found = [((scores - total).exp().mean(0).log(), reading) for scores, reading in windows]
        best, text = max((self.best(scores, reading) for scores, reading in found), key=lambda pair: pair[0])
        none = min(float(scores[:, 0].sum()) for scores, _ in found)
        return "" if self.unanswerable and none >= best else text

    def best(self, scores: Tensor, reading: Reading) -> tuple[float, str]:
        """scores [2, seq] of one window -> (score, text) of its best span; it begins where the window sees most."""
        places = [i for i, span in enumerate(reading.spans) if span]
        if not places:
            return -torch.inf, ""
        n, begins = len(places), torch.tensor([not reading.fullest or reading.fullest[i] for i in places])
        start, end = scores[0, places].masked_fill(~begins, -torch.inf), scores[1, places]
        far = torch.arange(n)[None] - torch.arange(n)[:, None]
        both = (start[:, None] + end[None]).masked_fill((far < 0) | (far >= self.longest), -torch.inf)
        first, last = divmod(int(both.argmax()), n)
        chosen = [span for i in (first, last) if (span := reading.spans[places[i]])]
        return float(both.max()), reading.text[chosen[0][0] : chosen[-1][1]].strip()

    def reference(self, example: Example) -> tuple[str, ...]:
        """Every accepted answer; () where there is none."""
        return tuple(text for text, _ in example.extra["answers"])

    def perfect(self, reference: tuple[str, ...]) -> str:
        """The prediction that a reference wants."""
        return reference[0] if reference else ""
