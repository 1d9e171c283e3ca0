"""The untuned model at its best: zero-shot and few-shot prompts, label scores, calibration (arXiv:2102.09690)."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .cache import MANY, PASS, Front, alike, front, room
from .generate import (
    Decoding,
    can_generate,
    chat_text,
    fits,
    generate,
    grouped,
    measuring,
    open_ids,
    padded,
    padding_id,
)
from .metrics import answer, find

FREE = ("N/A", "", "[MASK]")  # content-free inputs of Zhao et al. 2021


@dataclass(frozen=True)
class Prompt:
    """One way to ask an untuned model.

    template: one question, with {text}, {text_pair}, {prompt}, {question} of the row ({question}: its last user turn,
    prompt or text).   labels: label -> the words scored for it (classification); empty: the answer is generated.
    instruction: put before the first question.   turns: fixed chat turns that come first and replace a row's own
    (demonstrations picked by hand, a system turn).   shots: demonstrations drawn from the training rows by `seed`,
    spread evenly over labels.   chat: render through the chat template (None: if the tokenizer has one).
    score: a label's log-probability, or its mean over tokens.   calibrate: divide by what the model says of
    content-free inputs.   stop: strings that end a generated answer (None: a blank line in plain prompts).
    """

    name: str
    template: str = "{question}"
    labels: Mapping[Any, str] = field(default_factory=dict)
    instruction: str = ""
    turns: tuple[Mapping[str, Any], ...] = ()
    shots: int = 0
    seed: int = 0
    chat: bool | None = None
    score: Literal["sum", "mean"] = "sum"
    calibrate: bool = False
    separator: str = "\n\n"
    stop: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.shots < 0 or self.score not in ("sum", "mean"):
            raise ValueError(
                f"prompt {self.name!r}: shots={self.shots} and score={self.score!r}; 0 or more, sum or mean"
            )
        if self.calibrate and not self.labels:
            raise ValueError(f"prompt {self.name!r}: calibrate needs labels to calibrate")
        words = list(self.labels.values())
        if len(set(words)) < len(words) or not all(words):
            raise ValueError(f"prompt {self.name!r}: every label needs words of its own, not {words}")


@dataclass(frozen=True)
class Search:
    """How the best prompt is found: by `metric` on `held_out` training rows drawn by `seed`; `decoding` for answers.

    `ties`: metrics that decide between prompts equal in `metric` (a task the model cannot do at all makes all equal).
    """

    metric: str
    ties: tuple[str, ...] = ()
    held_out: int = 64
    seed: int = 0
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        find(self.metric)
        if self.held_out < 1:
            raise ValueError(f"held_out must be at least 1 row, not {self.held_out}")


def question(prompt: Prompt, example: Any) -> str:
    """The template filled with a row; ValueError for a field the row does not have."""
    asked = [t.content for t in example.turns if t.role == "user"]
    known = {
        "text": example.text,
        "text_pair": example.text_pair,
        "prompt": example.prompt,
        "question": next((q for q in (*asked[-1:], example.prompt, example.text) if q is not None), None),
    }
    there = {k: v for k, v in known.items() if v is not None}
    try:
        return prompt.template.format_map(there)
    except (KeyError, IndexError) as error:
        has = ", ".join(there) or "no text"
        raise ValueError(
            f"{example.where}: prompt {prompt.name!r} wants {{{error.args[0]}}}; the row has {has}"
        ) from error


def demonstrations(train: Sequence[Any], prompt: Prompt) -> list[Any]:
    """`prompt.shots` training rows from a private generator, each label in turn; ValueError if there are too few."""
    if prompt.shots > len(train):
        raise ValueError(
            f"prompt {prompt.name!r} wants {prompt.shots} demonstrations; there are {len(train)} rows for them"
        )
    order = random.Random(prompt.seed).sample(range(len(train)), len(train))
    queues: dict[Any, list[int]] = {}
    for i in order:
        queues.setdefault(train[i].label if prompt.labels else None, []).append(i)
    rounds = sorted((place, nth) for nth, queue in enumerate(queues.values()) for place in range(len(queue)))
    lists = list(queues.values())
    return [train[lists[nth][place]] for place, nth in rounds[: prompt.shots]]


def reference(prompt: Prompt, example: Any) -> Any:
    """What a prediction is compared with: the label where labels are scored, else the wanted answer."""
    if prompt.labels:
        if example.label not in prompt.labels:
            raise ValueError(f"{example.where}: label {example.label!r} is none of {list(prompt.labels)}")
        return example.label
    wanted = answer(example)
    if wanted is None:
        raise ValueError(f"{example.where}: the row has no answer to compare with; give labels or a completion")
    return wanted


def render(prompt: Prompt, tokenizer: Any, example: Any, shown: Sequence[Any] = ()) -> str:
    """The text up to where the answer goes, with the demonstrations `shown` before the question."""
    return _render(
        prompt, tokenizer, [*(question(prompt, s) for s in shown), question(prompt, example)], shown, example
    )


def _render(prompt: Prompt, tokenizer: Any, questions: list[str], shown: Sequence[Any], example: Any = None) -> str:
    answers = [_words(prompt, s) for s in shown]
    if is_chat(prompt, tokenizer):
        return _chat(prompt, tokenizer, questions, answers, example)
    if prompt.turns:
        raise ValueError(f"prompt {prompt.name!r} has chat turns, but is rendered without a chat template")
    blocks = [q + a for q, a in zip(questions, [*answers, ""], strict=True)]
    return prompt.separator.join([prompt.instruction] * bool(prompt.instruction) + blocks)


def _words(prompt: Prompt, example: Any) -> str:
    wanted = reference(prompt, example)
    return prompt.labels[wanted] if prompt.labels else wanted


def is_chat(prompt: Prompt, tokenizer: Any) -> bool:
    """Whether the prompt goes through the chat template."""
    return bool(getattr(tokenizer, "chat_template", None)) if prompt.chat is None else prompt.chat


def _chat(prompt: Prompt, tokenizer: Any, questions: list[str], answers: list[str], example: Any) -> str:
    """System turns, demonstrations, the row's own earlier turns, the question."""
    own = _earlier(example)
    lead = [dict(t) for t in prompt.turns] or [t for t in own if t["role"] == "system"]
    if prompt.instruction:  # in the first user turn: not every template takes a system turn
        questions = [prompt.instruction + prompt.separator + questions[0], *questions[1:]]
    shown = [
        {"role": role, "content": content}
        for asked, said in zip(questions, answers, strict=False)
        for role, content in (("user", asked), ("assistant", said.strip()))
    ]
    history = [t for t in own if t["role"] != "system"]
    return chat_text(tokenizer, [*lead, *shown, *history, {"role": "user", "content": questions[-1]}])


def _earlier(example: Any) -> list[dict[str, Any]]:
    """The row's turns before its last user turn."""
    turns = list(example.turns) if example is not None else []
    last = max((i for i, t in enumerate(turns) if t.role == "user"), default=0)
    return [t.message() for t in turns[:last]]


def predict(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    examples: Sequence[Any],
    train: Sequence[Any] = (),
    decoding: Decoding | None = None,
) -> list[Any]:
    """The untuned model's labels (or generated answers) for the rows; demonstrations come from `train`."""
    shown = demonstrations(train, prompt)
    texts = [render(prompt, tokenizer, example, shown) for example in examples]
    if prompt.labels:
        scores = label_scores(model, tokenizer, prompt, texts)
        if prompt.calibrate:
            scores = calibrated(scores, label_scores(model, tokenizer, prompt, _free(prompt, tokenizer, shown)))
        return [list(prompt.labels)[i] for i in scores.argmax(axis=1)]
    chat = is_chat(prompt, tokenizer)
    stop = prompt.stop if prompt.stop is not None else () if chat else (prompt.separator,)
    settings = replace(decoding or Decoding(), stop=stop)
    special = not chat or bool(model.config.is_encoder_decoder)
    ids = [open_ids(tokenizer, t, bool(model.config.is_encoder_decoder), special) for t in texts]
    return [text.strip() for text in generate(model, tokenizer, ids, settings)]


def _free(prompt: Prompt, tokenizer: Any, shown: Sequence[Any]) -> list[str]:
    fields = ("text", "text_pair", "prompt", "question")
    asked = [question(prompt, s) for s in shown]
    filled = [prompt.template.format(**dict.fromkeys(fields, x)) for x in FREE]
    texts = [_render(prompt, tokenizer, [*asked, f], shown) for f in filled]
    return [t for t in texts if t]


def calibrated(scores: np.ndarray, free: np.ndarray) -> np.ndarray:
    """log(p / p_free): p over the labels [rows, labels], p_free its mean over content-free inputs [inputs, labels]."""
    return _log_softmax(scores) - np.log(np.exp(_log_softmax(free)).mean(axis=0))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def label_scores(model: Any, tokenizer: Any, prompt: Prompt, texts: Sequence[str]) -> np.ndarray:
    """log p(words | text), summed or averaged over the words' tokens [rows, labels] float64.

    For a decoder, words and text are tokenised together, as a reader would see them; where a token spans the seam it is
    scored with the words. ValueError for a model without a language head or a text that does not fit.
    """
    can_generate(model)
    seq2seq, chat = bool(model.config.is_encoder_decoder), is_chat(prompt, tokenizer)
    words = [w.strip() if chat or seq2seq else w for w in prompt.labels.values()]
    cut = _apart if seq2seq else _seams
    pairs = [pair for text in texts for pair in cut(tokenizer, text, words, chat)]
    fits([before for before, _ in pairs[:: len(words)]], model, max(len(after) for _, after in pairs))
    sums = (_seq2seq if seq2seq else _causal)(model, tokenizer, pairs)
    if prompt.score == "mean":
        sums = sums / np.array([len(after) for _, after in pairs])
    return sums.reshape(len(texts), len(words))


Pair = tuple[tuple[int, ...], tuple[int, ...]]


def _seams(tokenizer: Any, text: str, words: Sequence[str], chat: bool) -> list[Pair]:
    """(ids before, ids of the words) for each of the words: all start at the same place, so that they compare."""
    alone = open_ids(tokenizer, text, special=not chat)
    whole = [open_ids(tokenizer, text + w, special=not chat) for w in words]
    seam = min(_common([alone, ids]) for ids in whole)
    for word, ids in zip(words, whole, strict=True):
        if len(ids) == seam:
            raise ValueError(f"the label words {word!r} add no token to a prompt that ends in {text[-20:]!r}")
    return [(tuple(ids[:seam]), tuple(ids[seam:])) for ids in whole]


def _apart(tokenizer: Any, text: str, words: Sequence[str], chat: bool) -> list[Pair]:
    """The encoder's ids, and the words as a decoder of its own writes them."""
    before = tuple(open_ids(tokenizer, text, seq2seq=True))
    return [(before, tuple(open_ids(tokenizer, w, special=False))) for w in words]


def _common(rows: Sequence[Sequence[int]]) -> int:
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


BATCH_TOKENS = 2048


def _causal(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Summed log-probabilities [pairs]. Labels of one row that differ only in their last token share one input."""
    inputs: dict[tuple[int, ...], list[int]] = {}
    for i, (before, after) in enumerate(pairs):
        inputs.setdefault(before + after[:-1], []).append(i)
    rows = list(inputs)
    found = np.zeros(len(pairs))
    with measuring(model):
        begun = front(model, [before for before, _ in pairs])
        known = begun.length if begun else 0
        budget = min(BATCH_TOKENS, room(model) * (max(map(len, rows)) - known) // max(map(len, rows)))
        for group in _batches([len(r) - known for r in rows], max(1, budget), PASS.get(model.device.type, MANY)):
            chosen = [rows[g] for g in group]
            first = min(len(pairs[i][0]) for row in chosen for i in inputs[row]) - 1
            logits = _logits(model, tokenizer, chosen, (first, begun))
            for row, at in zip(chosen, logits, strict=True):
                for i in inputs[row]:
                    start = len(pairs[i][0]) - 1 - first
                    found[i] = _sum(at[start : start + len(pairs[i][1])], pairs[i][1])
    return found


def _batches(lengths: Sequence[int], budget: int, pad: int) -> list[list[int]]:
    """Row numbers in batches of at most `budget` tokens and of like lengths: a batch has logits from the end of its
    shortest row to that of its longest."""
    return [
        [group[i] for i in part]
        for group in grouped(lengths, 0, budget)
        for part in alike([lengths[i] for i in group], pad)
    ]


def _logits(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], places: tuple[int, Front | None]) -> Tensor:
    """Logits of right-padded rows from position `first` on [rows, longest - first, vocab]. places: (first, what all
    rows begin with, at most so far)."""
    first, begun = places
    ids, mask = (t.to(model.device) for t in padded(rows, padding_id(model, tokenizer), left=False))
    keep = ids.shape[1] - first
    partly = "logits_to_keep" in inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"logits_to_keep": keep} if partly else {}
    if begun:
        ids, more = ids[:, begun.length :], more | {"past_key_values": begun.of(len(ids))}
    return model(input_ids=ids, attention_mask=mask, use_cache=bool(begun), **more).logits[:, -keep:]


def _sum(logits: Tensor, ids: Sequence[int]) -> float:
    """Summed log-probability of `ids` under logits [len(ids), vocab]."""
    wanted = torch.tensor(ids, device=logits.device)[:, None]
    return float(logits.float().log_softmax(-1).gather(1, wanted).double().sum())


def _seq2seq(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> np.ndarray:
    pad = padding_id(model, tokenizer)
    start = model.config.decoder_start_token_id
    found = np.zeros(len(pairs))
    with measuring(model):
        for group in grouped([len(b) + len(a) for b, a in pairs], 0, BATCH_TOKENS):
            ids, mask = padded([pairs[g][0] for g in group], pad, left=False)
            fed, _ = padded([(pad if start is None else start, *pairs[g][1][:-1]) for g in group], pad, left=False)
            inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": fed}
            logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits
            for g, at in zip(group, logits, strict=True):
                found[g] = _sum(at[: len(pairs[g][1])], pairs[g][1])
    return found


def candidates(examples: Sequence[Any], shots: Sequence[int] = (0, 4)) -> list[Prompt]:
    """A few prompts worth trying on these rows: labels by their own names, or answers as the rows give them.

    Hand-written prompts usually do better; add them. Each comes once for every number of shots the rows allow.
    """
    labels = sorted({e.label for e in examples if isinstance(e.label, str)})
    pair = any(e.text_pair for e in examples)
    body = "{text}\n{text_pair}" if pair else "{text}"
    if labels:
        words = {label: f" {label.replace('_', ' ')}" for label in labels}
        choices = f"Answer with one of: {', '.join(w.strip() for w in words.values())}."
        asked = [
            Prompt("label", f"{body}\nLabel:", words, choices),
            Prompt("label, calibrated", f"{body}\nLabel:", words, choices, calibrate=True),
            Prompt("text-label", f"Text: {body}\nLabel:", words, score="mean"),
        ]
    else:
        asked = [Prompt("as asked"), Prompt("question-answer", "Question: {question}\nAnswer: ", chat=False)]
    usable = [s for s in shots if s < len(examples)]
    return [replace(p, name=f"{p.name}, {s}-shot", shots=s) for p in asked for s in usable]


def best_untuned(
    model: Any, tokenizer: Any, train: Sequence[Any], rows: Sequence[Any], prompts: Sequence[Prompt], search: Search
) -> dict[str, Any]:
    """The prompt that is best on held-out TRAINING rows, and its score on the evaluation `rows`.

    {"prompt": name, <metric>: on rows, "held_out": {name: score or None}, "skipped": {name: why}, "predictions",
    "references"}. The evaluation rows choose nothing: the honest baseline is the best untuned prompt that could have
    been known. A prompt that does not fit the model is skipped with the reason; ValueError if none is left.
    """
    asked, rest = _held_out(train, search)
    held: dict[str, float | None] = {}
    ranks: dict[str, tuple[float, ...]] = {}
    skipped: dict[str, str] = {}
    for prompt in prompts:
        try:
            held[prompt.name], said, wanted = _scored(model, tokenizer, prompt, (asked, rest), search)
        except ValueError as error:
            held[prompt.name], skipped[prompt.name] = None, str(error)
        else:
            ranks[prompt.name] = _rank(said, wanted, search)
    usable = {name: rank for name, rank in ranks.items() if not math.isnan(rank[0])}
    if not usable:
        raise ValueError(f"no prompt could be measured: {skipped or 'there is none'}")
    best = max(usable, key=lambda name: usable[name])
    prompt = next(p for p in prompts if p.name == best)
    score, said, wanted = _scored(model, tokenizer, prompt, (rows, rest), search)
    ties = {name: list(rank[1:]) for name, rank in ranks.items()}
    found = {"prompt": best, search.metric: score, "held_out": held, "ties": ties, "skipped": skipped}
    return found | {"predictions": said, "references": wanted}


def _rank(said: Sequence[Any], wanted: Sequence[Any], search: Search) -> tuple[float, ...]:
    """Every metric of the search, signed so that more is better."""
    metrics = [find(name) for name in (search.metric, *search.ties)]
    return tuple(m.compute(said, wanted) * (1 if m.higher_is_better else -1) for m in metrics)


def _held_out(train: Sequence[Any], search: Search) -> tuple[list[Any], list[Any]]:
    """(rows to choose on, rows left for demonstrations): disjoint, by a private generator."""
    order = random.Random(search.seed).sample(range(len(train)), len(train))
    size = min(search.held_out, max(1, len(train) // 2))
    if len(train) < 2:
        raise ValueError(f"{len(train)} training rows are too few to choose a prompt on; give at least 2")
    return [train[i] for i in order[:size]], [train[i] for i in order[size:]]


def _scored(
    model: Any, tokenizer: Any, prompt: Prompt, sets: tuple[Sequence[Any], Sequence[Any]], search: Search
) -> tuple[float, list[Any], list[Any]]:
    examples, shown = sets
    wanted = [reference(prompt, e) for e in examples]
    said = predict(model, tokenizer, prompt, examples, shown, search.decoding)
    return find(search.metric).compute(said, wanted), said, wanted
