"""Words and answers as token positions: rows for token classification and for extractive question answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .chat import Span
from .encode import IGNORE, Encoded, Encoder, Encoding, Reading, encoder, target
from .example import Example
from .problems import BadRow


def tagged(example: Example, tokenizer: Any, names: Sequence[str], options: Encoding) -> Encoded:
    """Words joined by spaces; the label of each word stands at its first token, -100 at all others.

    Words that max_length cuts off have no label, and position -1 in `reading.words`.
    """
    coder, words = fast(tokenizer, options), example.extra["tokens"]
    found = coder.around(replace(example, text=" ".join(words), text_pair=None), return_offsets_mapping=True)
    ids, types, lead = coder.fronted(found)
    starts = first_tokens(words, found["offset_mapping"])
    at = [p if p < 0 else moved(p, lead, options) for p in starts]
    labels = [IGNORE] * len(ids)
    for place, tag in zip(at, example.extra["tags"], strict=True):
        if place >= 0:
            labels[place] = int(target(tag, names, example.where))  # type: ignore[arg-type]
    if all(label == IGNORE for label in labels):
        raise BadRow("all_masked", example.where, "tags", "no word of the row is left", "Raise max_length")
    return Encoded(ids, tuple(labels), None, types, where=example.where, reading=Reading(words=tuple(at)))


def first_tokens(words: Sequence[str], offsets: Sequence[Span]) -> list[int]:
    """The position of each word's first token; -1 for a word without one."""
    found, start, k = [], 0, 0
    for word in words:
        while k < len(offsets) and offsets[k][1] <= start:  # special tokens cover (0, 0)
            k += 1
        inside = k < len(offsets) and offsets[k][0] < start + len(word)
        found.append(k if inside else -1)
        start += len(word) + 1
    return found


def answered(example: Example, tokenizer: Any, options: Encoding, stride: int = 128) -> list[Encoded]:
    """Question and context as a pair; `target`: (first, last) token of the first answer, (0, 0) where there is none.

    A context longer than max_length is read in windows of it, each at most `stride` tokens after the one before; a
    window that does not hold the whole answer has (0, 0). Errors: BadRow where no window holds it.
    """
    coder = fast(tokenizer, options)
    found = [window(example, coder, encoding, options) for encoding in windows(example, coder, stride)]
    spans = [reading.spans for *_, reading in found]
    places = [position(example, own) for own in spans]
    if example.extra["answers"] and not any(places):
        text, fix = example.extra["answers"][0][0], "Raise max_length, shorten the answer, or leave the row out"
        reason = f"the answer {text!r} is longer than a window of max_length holds"
        raise BadRow("answer_lost", example.where, "answers", reason, fix)
    most = fullest(spans)
    return [
        Encoded(ids, None, tuple(map(float, place or (0, 0))), types, where=example.where,
                reading=replace(reading, fullest=own))
        for (ids, types, reading), place, own in zip(found, places, most, strict=True)
    ]  # fmt: skip


def windows(example: Example, coder: Encoder, stride: int) -> list[Any]:
    """The tokenizer's encodings of question and context, the context in as many windows as it takes."""
    tokenizer, texts, room = coder.tokenizer, (example.text, example.text_pair), coder.room
    whole = tokenizer(*texts, verbose=False, return_offsets_mapping=True)
    if room is None or len(whole["input_ids"]) <= room:
        return list(whole.encodings)
    length = room - sum(own != 1 for own in whole.sequence_ids())
    if length < 1:
        fix = "Raise max_length, or shorten the question"
        raise BadRow("too_many_tokens", example.where, "question", f"it leaves no room of {room} tokens", fix)
    how = {"truncation": "only_second", "max_length": room, "stride": length - min(stride, length)}
    before = tokenizer.truncation_side
    tokenizer.truncation_side = "right"
    try:
        return list(tokenizer(*texts, verbose=False, return_overflowing_tokens=True, **how).encodings)
    finally:
        tokenizer.truncation_side = before


def window(example: Example, coder: Encoder, found: Any, options: Encoding) -> tuple[tuple, tuple | None, Reading]:
    """(ids, segment ids, how they lie in the context) of one window."""
    typed = {"token_type_ids": found.type_ids} if "token_type_ids" in coder.tokenizer.model_input_names else {}
    ids, types, lead = coder.fronted({"input_ids": found.ids, **typed})
    spans: list[Span | None] = [
        tuple(span) if own == 1 else None for span, own in zip(found.offsets, found.sequence_ids, strict=True)
    ]
    spans[lead:lead] = [None] * len(options.prompt_ids)
    return ids, types, Reading(example.text_pair or "", tuple(spans))


def position(example: Example, spans: Sequence[Span | None]) -> tuple[int, int] | None:
    """(first, last) token of the row's first answer; None where the spans do not hold all of it."""
    if not example.extra["answers"]:
        return None
    text, start = example.extra["answers"][0]
    start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    found = [i for i, span in enumerate(spans) if span and span[0] < end and span[1] > start]
    seen = [span for span in spans if span and span[1] > span[0]]
    if not found or seen[0][0] > start or seen[-1][1] < end:
        return None
    return found[0], found[-1]


def fullest(spans: Sequence[Sequence[Span | None]]) -> list[tuple[bool, ...]]:
    """For each window, which of its tokens have the most context there: tokens on the shorter side, of all windows."""
    best: dict[Span, tuple[float, int]] = {}
    for k, own in enumerate(spans):
        inside = [span for span in own if span]
        for i, span in enumerate(inside):
            score = min(i, len(inside) - i - 1) + 0.01 * len(inside)
            if score > best.get(span, (-1.0, 0))[0]:
                best[span] = (score, k)
    return [tuple(bool(span) and best[span][1] == k for span in own) for k, own in enumerate(spans)]  # type: ignore[index]


def moved(place: int, lead: int, options: Encoding) -> int:
    return place if place < lead else place + len(options.prompt_ids)


def fast(tokenizer: Any, options: Encoding) -> Encoder:
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer gives no character offsets: load the fast one (use_fast=True)")
    return encoder(tokenizer, options)
