"""SFT: next-token cross-entropy on the supervised tokens (chat, prompt and completion, plain text, encoder-decoder)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.delta import Refusal
from ..data.batch import Batch
from ..data.encode import Encoded, Encoding, encode_all, encoder
from ..data.example import Example
from ..data.problems import BadRow
from ..data.wanted import COMPLETIONS, Wanted
from ..prompting.template import Filler, Template
from .common import IGNORE, decoder_inputs, kind_of, language_class, load, needs_words, states_at, summed


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning. What is learned is decided when rows are encoded (`train_on`), not here.

    template: '<soft:3>{prompt}<soft:2>', how a row of prompt and completion is asked, with a soft prompt's tokens where
    it says; the completion follows. Left out, virtual tokens stand in front.
    """

    train_on: Literal["assistant", "last", "all"] = "assistant"
    template: str | None = None

    name = "sft"
    packs = True
    task_head = False

    def __post_init__(self) -> None:
        if self.template is not None:
            Template(self.template, gap=False)

    @property
    def wants(self) -> Wanted:
        """What a template reads of a row; without one, rows of every form are read."""
        return Wanted() if self.template is None else Template(self.template, gap=False).wants(COMPLETIONS)

    def fit(self, examples: Sequence[Example]) -> SFT:
        """What the training set decides; nothing here."""
        return self

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

    def encode(self, example: Example, tokenizer: Any, encoding: Encoding) -> list[Encoded]:
        if self.template is not None and example.media is not None:
            fix = "Leave objective.sft.template out"
            raise BadRow("wrong_input", example.where, example.media.kind, "a template asks with words alone", fix)
        if self.template is None:
            return encode_all(example, tokenizer, encoding)
        return [templated(example, tokenizer, encoding, Template(self.template, gap=False))]

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """(sum over the supervised tokens, metrics). Logits are made only at the positions that predict one."""
        seq2seq = kind_of(model) == "seq2seq"
        more = {"decoder_input_ids": decoder_inputs(model, batch.labels)} if seq2seq else {}
        wanted = batch.labels if seq2seq else batch.labels[:, 1:]  # a decoder's position t predicts token t + 1
        at = (wanted != IGNORE).nonzero(as_tuple=True)
        found, projection = states_at(model, batch, at, **more)
        return summed(*projection.losses(found, wanted[at]))

    def reference(self, example: Example) -> str | None:
        """The answer that a generated one is compared with; None: plain text, or a last turn of weight 0."""
        if example.completion is not None:
            return example.completion
        last = example.turns[-1] if example.turns else None
        asked = last is not None and last.role == "assistant" and last.learn is not False
        return last.content if last is not None and asked else None

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        raise TypeError("SFT answers by generation: see evaluate.generate")


def templated(example: Example, tokenizer: Any, encoding: Encoding, template: Template) -> Encoded:
    """One row: the filled template, which is cut to fit, then the completion and the end of the sequence."""
    if example.completion is None:
        fix = "Give columns prompt and completion, or leave the template out"
        raise BadRow("nothing_to_learn", example.where, "completion", "a template asks, and the row has no answer", fix)
    coder = encoder(tokenizer, encoding)
    answer, room = [*coder.tokens(example.completion), coder.eos], encoding.max_length
    if not encoding.decoder and room is not None:
        room -= len(answer)
    filler = Filler(tokenizer, False, room, encoding.prompt_ids, closed=encoding.decoder)
    ids = filler(template, example).ids
    if encoding.decoder:
        return Encoded(ids, tuple(answer[:room]), where=example.where, decoder=True)
    return Encoded((*ids, *answer), (*(IGNORE,) * len(ids), *answer), where=example.where)


def masked(config: Any) -> Refusal:
    return Refusal(
        "SFT predicts the next token, which a masked language model does not.",
        found=f"model type {config.model_type}",
        instead="the objective classify or cloze, or a causal or encoder-decoder model",
    )
