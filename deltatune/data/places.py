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


def answered(example: Example, tokenizer: Any, options: Encoding) -> Encoded:
    """Question and context as a pair; `target`: (first, last) token of the first answer, (0, 0) where there is none.

    Only the context is cut. Errors: BadRow when the answer is lost with what was cut.
    """
    coder = fast(tokenizer, options)
    found = coder.around(example, "only_second", return_offsets_mapping=True)
    ids, types, lead = coder.fronted(found)
    inside = [own == 1 for own in found.sequence_ids()]
    spans: list[Span | None] = [
        tuple(s) if own else None for s, own in zip(found["offset_mapping"], inside, strict=True)
    ]
    spans[lead:lead] = [None] * len(options.prompt_ids)
    place = position(example, spans)
    reading = Reading(example.text_pair or "", tuple(spans))
    return Encoded(ids, None, (float(place[0]), float(place[1])), types, where=example.where, reading=reading)


def position(example: Example, spans: Sequence[Span | None]) -> tuple[int, int]:
    """(first, last) token of the row's first answer."""
    if not example.extra["answers"]:
        return 0, 0
    text, start = example.extra["answers"][0]
    end = start + len(text)
    found = [i for i, span in enumerate(spans) if span and span[0] < end and span[1] > start]
    if not found or spans[found[-1]][1] < end:  # type: ignore[index]
        fix = "Raise max_length, shorten the context around the answer, or leave the row out"
        raise BadRow("answer_lost", example.where, "answers", f"the answer {text!r} was cut off with the context", fix)
    return found[0], found[-1]


def moved(place: int, lead: int, options: Encoding) -> int:
    return place if place < lead else place + len(options.prompt_ids)


def fast(tokenizer: Any, options: Encoding) -> Encoder:
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer gives no character offsets: load the fast one (use_fast=True)")
    return encoder(tokenizer, options)
