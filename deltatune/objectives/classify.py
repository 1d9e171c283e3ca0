"""Classify: a linear head on the first token of an encoder or the last of a decoder (BERT, arXiv:1810.04805).

Models of pictures (ViT, CLIP) and sounds (Whisper's encoder) have the heads that transformers gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attention import packed, positions
from ..core.delta import Refusal
from ..core.registry import choice
from ..core.site import head_modules, trunk
from ..core.vocabulary import vocabulary
from ..data.batch import Batch
from ..data.check import mixed_labels
from ..data.encode import Encoded, Encoding, classified, label_names
from ..data.example import Example
from ..data.problems import BadRow, Problems
from ..data.wanted import WANTS
from .common import FITTED, class_head, combined, exact, load, name_classes, run, shares

Kind = Literal["auto", "single", "multi", "regression"]


@dataclass(frozen=True)
class Classify:
    """kind: 'single' label (cross-entropy), 'multi' (a sigmoid per label), 'regression' (squared error), 'auto'.

    labels: class names in order; left out, they are taken from the training set.
    """

    kind: Literal["auto", "single", "multi", "regression"] = field(default="auto", metadata=FITTED)
    labels: tuple[str, ...] | None = field(default=None, metadata=FITTED)

    name = "classify"
    packs = False
    task_head = True
    wants = WANTS["classify"]

    def __post_init__(self) -> None:
        choice("classify kind", self.kind, get_args(Kind))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))

    def fit(self, examples: Sequence[Example]) -> Classify:
        """Class names and kind from the training rows."""
        self.wants.demand(examples)
        if self.labels is None:
            refuse_mixed(examples)
        names = self.labels if self.labels is not None else label_names(examples)
        several = any(isinstance(e.label, tuple) for e in examples)
        kind = self.kind if self.kind != "auto" else "multi" if several else "single" if names else "regression"
        if several and kind != "multi":
            where = next(e.where for e in examples if isinstance(e.label, tuple))
            raise ValueError(
                f"{where}: the row has a list of labels, which kind {kind!r} does not take; kind: multi does"
            )
        if kind != "regression" and len(names) < 2:
            raise ValueError(
                f"classify needs two classes or more, the training set has {len(names)}: {', '.join(names)}"
            )
        return replace(self, kind=kind, labels=() if kind == "regression" else tuple(names))

    def load(self, path: Any, config: Any, **options: Any) -> Any:
        names = list(self.labels or ())
        model = load(class_head(config), path, config, num_labels=max(len(names), 1), **options)
        return name_classes(model, names)

    def check(self, model: Any) -> None:
        """Refusal or ValueError for a model whose head is missing or of another size."""
        if not head_modules(model):
            raise Refusal(
                "classify needs a task head.",
                found=type(model).__name__,
                instead="AutoModelForSequenceClassification and attach(model, [LoRA(), Head()])",
            )
        wanted, have = max(len(self.labels or ()), 1), int(model.config.num_labels)
        if wanted != have:
            names = ", ".join(self.labels or ()) or "one score"
            raise ValueError(f"the model's head has {have} outputs, the rows need {wanted} ({names}): set num_labels")

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        if self.kind == "multi" and not isinstance(example.label, tuple):
            example = replace(example, label=(example.label,))  # one label is a list of one
        return [classified(example, tokenizer, self.labels or (), encoding)]

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """[rows, classes]. A decoder is read at its last real token: the head's own rule would stop at the pad id."""
        if model.config.is_encoder_decoder and "input_ids" in batch.inputs:
            return run(model, batch, decoder_input_ids=shifted(model, batch.inputs["input_ids"])).logits
        if not hasattr(model, "score"):
            return run(model, batch).logits
        if batch.lens is not None:
            with packed(batch.lens):
                hidden = trunk(model)(**{**batch.inputs, "position_ids": positions(model, batch.lens)})[0][0]
            ends = torch.tensor(batch.lens, device=hidden.device).cumsum(0) - 1
            return model.score(hidden.index_select(0, ends))
        hidden = trunk(model)(**batch.inputs, use_cache=False)[0]
        mask = batch.inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return model.score(hidden[torch.arange(len(last), device=last.device), last])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(sum over the rows, metrics)."""
        logits = exact(self.logits(model, batch))
        if self.kind == "regression":
            return F.mse_loss(logits.squeeze(-1), batch.labels.to(logits.dtype), reduction="sum"), {}
        if self.kind == "multi":
            each = F.binary_cross_entropy_with_logits(logits, batch.labels.to(logits.dtype), reduction="none")
            return each.mean(-1).sum(), {}
        hits = float((logits.argmax(-1) == batch.labels).float().mean())
        return F.cross_entropy(logits, batch.labels, reduction="sum"), {"accuracy": hits}

    @torch.no_grad()
    def parts(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The scores [classes] of each row, of all its prompts together."""
        logits = self.logits(model, batch).float()
        if self.kind != "single":  # scores and several classes have no vote
            logits = logits.unflatten(0, (-1, batch.prompts)).mean(1)
        return list((combined(logits, batch) if self.kind == "single" else logits).cpu())

    def joined(self, parts: Sequence[Tensor], example: Example) -> Any:
        """A class name, a tuple of them, or a score."""
        (scores,), names = parts, self.labels or ()
        if self.kind == "regression":
            return float(scores)
        if self.kind == "multi":
            return tuple(name for name, score in zip(names, scores.tolist(), strict=True) if score > 0)
        return names[int(scores.argmax())]

    def shown(self, parts: Sequence[Tensor], example: Example) -> dict[str, Any]:
        """{"label", "scores": {class: probability}}; of several labels {"labels", "scores"}; or {"score"}."""
        said, names = self.joined(parts, example), self.labels or ()
        if self.kind == "regression":
            return {"score": said}
        if self.kind == "multi":
            return {"labels": said, "scores": dict(zip(names, parts[0].sigmoid().tolist(), strict=True))}
        return {"label": said, "scores": shares(parts[0], names)}

    def asked(self, example: Example) -> Example:
        """The row with an answer that nothing reads, so that it can be encoded. BadRow for one without an input."""
        if example.text is None and example.media is None:
            fix = "Name the column that holds it: data.columns: {yours: text}"
            raise BadRow("missing_field", example.where, "text", "classify reads a text (image or audio)", fix)
        return replace(example, label=self.labels[0] if self.labels else 0.0)

    def reference(self, example: Example) -> Any:
        """The row's label as `predict` spells it."""
        if self.kind == "regression":
            return float(example.label)  # type: ignore[arg-type]
        if self.kind == "multi":
            given = example.label if isinstance(example.label, tuple) else (example.label,)
            return tuple(n for n in self.labels or () if n in {spelled(x) for x in given})
        return spelled(example.label)


def shifted(model: Any, ids: Tensor) -> Tensor:
    """The decoder's input [rows, seq]: the encoder's, one place later. A soft prompt is the encoder's alone."""
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    real = ids.masked_fill(ids >= vocabulary(model), model.config.pad_token_id)
    return torch.cat([start, real[:, :-1]], 1)


def refuse_several(name: str, examples: Sequence[Example]) -> None:
    """ValueError for a row with a list of labels."""
    if wrong := next((e for e in examples if isinstance(e.label, tuple)), None):
        raise ValueError(f"{wrong.where}: {name} takes one label a row, this one has {wrong.label}")


def refuse_mixed(examples: Sequence[Example]) -> None:
    """ValueError with every row whose label is a word among scores, or a score among words."""
    problems = Problems()
    problems.good = len(examples)
    for fault in mixed_labels(examples):
        problems.retract(fault)
    problems.refuse()


def spelled(label: Any) -> str:
    return str(int(label)) if isinstance(label, float) and label == int(label) else str(label)
