"""Choice: answers of any length ranked by log p(y | x) / |y|, with the losses of T-Few (arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from ..core.delta import Refusal
from ..core.registry import choice
from ..data.batch import Batch
from ..data.encode import IGNORE, Encoded, Encoding, edges, label_names, target
from ..data.example import Example
from ..data.problems import BadRow
from ..data.wanted import LABELS, Wanted
from ..prompting.template import Filler
from .branches import continued
from .classify import refuse_mixed, refuse_several, spelled
from .cloze import parsed
from .common import FITTED, combined, kind_of, language_class, load, needs_words, shares
from .projection import Projection, states

SMALLEST = 1e-6  # 1 - p below this counts as this: a certain wrong answer has a finite loss


@dataclass(frozen=True)
class Choice:
    """The answer of each row is one of its choices: the column `choices`, or `labels`, {class: answer text}.

    Loss of a row: L_LM + unlikelihood * L_UL + length_normalised * L_LN (equations 3 and 4); both 0 leave plain
    likelihood. rank "mean" predicts the answer with the highest log-probability per token, "sum" the highest in all.
    template: {fields} of the row, the answer at its <mask>, at the end. Causal and encoder-decoder models.
    """

    template: str = "{text} <mask>"
    labels: Mapping[str, str] | tuple[tuple[str, str], ...] = field(default=(), metadata=FITTED)
    unlikelihood: float = 1.0
    length_normalised: float = 1.0
    rank: str = "mean"
    seq2seq: bool | None = field(default=None, metadata={"internal": True})  # set by `bind`

    name = "choice"
    packs = False
    task_head = False
    continues = True  # what is measured stands behind what rows begin with
    rereads = "choice reads every row with its answers behind it"  # why its forward pass is not over a batch's rows

    def __post_init__(self) -> None:
        pairs = self.labels.items() if isinstance(self.labels, Mapping) else self.labels
        object.__setattr__(self, "labels", tuple((str(k), str(v)) for k, v in pairs))
        choice("choice rank", self.rank, ("mean", "sum"))
        for name in ("unlikelihood", "length_normalised"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"choice {name} must be a finite number >= 0, got {value!r}")
        if parsed(self.template).text.split("<mask>")[1].strip(" ."):
            raise ValueError(f"template {self.template!r}: the answer stands at the end, nothing may follow <mask>")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.labels)  # type: ignore[str-unpack]

    @property
    def wants(self) -> Wanted:
        """What it reads of a row."""
        return parsed(self.template).wants(LABELS)

    def fit(self, examples: Sequence[Example]) -> Choice:
        """Rows without choices of their own: without answer texts, the class names themselves are the answers."""
        self.wants.demand(examples)
        refuse_several(self.name, examples)
        bring = sum(map(own, examples))
        if bring not in (0, len(examples)):
            where = next(e.where for e in examples if not own(e))
            raise ValueError(f"{where}: the row has no choices, {bring} other rows do")
        if bring or self.labels:
            return self
        refuse_mixed(examples)
        names = label_names(examples)
        if len(names) < 2:
            raise ValueError(f"choice needs two classes or more, the training set has {', '.join(names) or 'scores'}")
        return replace(self, labels=tuple((n, n) for n in names))

    def load(self, path: Any, config: Any, **options: Any) -> Any:
        """The model with the head this objective needs, its weights from `path`."""
        auto = language_class(config)
        if auto == "AutoModelForMaskedLM":
            raise masked(config)
        return load(auto, path, config, **options)

    def check(self, model: Any) -> None:
        """Refusal for a model that does not predict the next token."""
        if kind_of(model) == "masked":
            raise masked(model.config)
        needs_words(model, self.name)

    def bind(self, tokenizer: Any, kind: str) -> Choice:
        return replace(self, seq2seq=kind == "seq2seq")

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        """The filled template, its choices as tokens (each with the end-of-sequence token), and the right one."""
        texts, right = self.choices(example)
        ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        lead = "" if self.seq2seq else " "
        found = tuple((*tokenizer(lead + t, add_special_tokens=False)["input_ids"], *ends) for t in texts)
        if empty := [t for t, ids in zip(texts, found, strict=True) if len(ids) == len(ends)]:
            raise BadRow("data_type", example.where, "choices", f"{empty[0]!r} has no tokens", "Write an answer")
        after = edges(tokenizer)[1] if self.seq2seq else []
        longest = len(after) if self.seq2seq else max(map(len, found))
        room = None if encoding.max_length is None else encoding.max_length - longest
        ids = Filler(tokenizer, False, room, encoding.prompt_ids)(parsed(self.template), example).ids
        return [Encoded((*ids, *after), None, right, where=example.where, choices=found)]

    def choices(self, example: Example) -> tuple[tuple[str, ...], int]:
        """(answer texts, the right one's index); BadRow for fewer than two, repeated ones, or a label that is none."""
        given = example.extra.get("choices")
        if not own(example):
            return tuple(t for _, t in self.labels), int(target(example.label, self.classes, example.where))  # type: ignore
        texts = tuple(given) if isinstance(given, list | tuple) else ()
        if len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts) or len(set(texts)) < len(texts):
            fix = "Write two or more different texts"
            raise BadRow("data_type", example.where, "choices", f"no list of answers: {given!r}"[:200], fix)
        label = example.label
        index = texts.index(label) if label in texts else label
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            fix = f"Write one of them, or a number from 0 to {len(texts) - 1}"
            raise BadRow("unknown_label", example.where, "label", f"{label!r} is none of the choices", fix)
        return texts, index

    def scores(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(log-probability of every token [rows, choices, longest], which of them are real)."""
        assert batch.choices is not None, "Choice.bind must come before the first batch"
        real = batch.choices != IGNORE
        found, projection = (decoded if self.seq2seq else continued)(model, batch, real)
        losses = projection.losses(found, batch.choices[real])[0]
        return losses.new_zeros(real.shape).index_put((real,), -losses), real

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(sum over the rows, metrics)."""
        each, real = self.scores(model, batch)
        total = t_few(each, real, batch.labels, (self.unlikelihood, self.length_normalised))
        return total, {"accuracy": float((self.best(each, real) == batch.labels).float().mean())}

    def best(self, each: Tensor, real: Tensor) -> Tensor:
        return self.values(each, real).argmax(-1)

    def values(self, each: Tensor, real: Tensor) -> Tensor:
        """[rows, choices], the highest the best; minus infinity where a row has no such choice."""
        return means(each, real) if self.rank == "mean" else each.sum(-1).masked_fill(~real.any(-1), -torch.inf)

    @torch.no_grad()
    def parts(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The scores [choices] of each row, of all its prompts together; minus infinity where it has fewer choices."""
        return list(combined(self.values(*self.scores(model, batch)), batch).cpu())

    def joined(self, parts: Sequence[Tensor], example: Example) -> str:
        """The class of the best answer; of a row with choices of its own, their number."""
        best = int(parts[0].argmax())
        return str(best) if own(example) else self.classes[best]

    def shown(self, parts: Sequence[Tensor], example: Example) -> dict[str, Any]:
        """{"label", "answer": its text, "scores": {class: probability}}; the label of a row with choices of its own is
        their number, and the scores are by their texts."""
        texts, said = self.choices(example)[0], self.joined(parts, example)
        scores = shares(parts[0][: len(texts)], texts if own(example) else self.classes)
        answer = texts[int(parts[0].argmax())]
        return {"label": int(said) if own(example) else said, "answer": answer, "scores": scores}

    def asked(self, example: Example) -> Example:
        """The row with an answer that nothing reads, so that it can be encoded. BadRow for a row of which no answer is
        known."""
        if not self.labels and not own(example):
            fix = "Write them: choices: [...]"
            raise BadRow("missing_field", example.where, "choices", "the row has no answers to choose from", fix)
        return replace(example, label=0 if own(example) else self.classes[0])

    def reference(self, example: Example) -> str:
        """The row's label as `joined` spells it."""
        return str(self.choices(example)[1]) if own(example) else spelled(example.label)


def own(example: Example) -> bool:
    """Whether the row brings the answers to choose from."""
    return example.extra.get("choices") is not None


def means(each: Tensor, real: Tensor) -> Tensor:
    """beta(x, y) = sum_t log p(y_t) / T, [rows, choices]; minus infinity where a row has no such choice."""
    return (each.sum(-1) / real.sum(-1).clamp(min=1)).masked_fill(~real.any(-1), -torch.inf)


def t_few(each: Tensor, real: Tensor, right: Tensor, weights: tuple[float, float]) -> Tensor:
    """L_LM + a L_UL + b L_LN, summed over the rows. each, real [rows, choices, tokens], right [rows]."""
    beta, rows = means(each, real), torch.arange(len(right), device=right.device)
    wrong = real.clone()
    wrong[rows, right] = False
    missed = (-torch.expm1(each)).clamp(min=SMALLEST).log() * wrong
    unlikely = -missed.sum((1, 2)) / wrong.sum((1, 2)).clamp(min=1)
    return (-beta[rows, right] + weights[0] * unlikely).sum() + weights[1] * F.cross_entropy(
        beta, right, reduction="sum"
    )


def decoded(model: Any, batch: Batch, real: Tensor) -> tuple[Tensor, Projection]:
    """An encoder-decoder's: the input is encoded once for all its choices."""
    assert batch.choices is not None
    count = batch.choices.shape[1]
    hidden = model.get_encoder()(**batch.inputs)[0].repeat_interleave(count, 0)
    start = model.prepare_decoder_input_ids_from_labels(labels=batch.choices.flatten(0, 1))
    mask = batch.inputs["attention_mask"].repeat_interleave(count, 0)
    given = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask}
    at = real.flatten(0, 1).nonzero(as_tuple=True)
    return states(model, lambda: model(**given, decoder_input_ids=start, use_cache=False), at)


def masked(config: Any) -> Refusal:
    return Refusal(
        "choice scores answers token by token, which a masked language model does not.",
        found=f"model type {config.model_type}",
        instead="the objective cloze or classify, or a causal or encoder-decoder model",
    )
