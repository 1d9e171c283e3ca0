"""Template: text with {fields} of a row and one <mask>, the place where the language model answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.example import Example
from ..data.problems import nearest

MASK = "<mask>"
FIELD = re.compile(r"\{(\w+)\}")
FIELDS = ("text", "text_pair", "prompt")


@dataclass(frozen=True)
class Template:
    """'{text} It was <mask>.' : literal text, fields of the row, one gap."""

    text: str

    def __post_init__(self) -> None:
        if self.text.count(MASK) != 1:
            raise ValueError(f"template {self.text!r} needs exactly one {MASK}, it has {self.text.count(MASK)}")
        unknown = [f for f in FIELD.findall(self.text) if f not in FIELDS]
        if unknown:
            hint = nearest(unknown[0], FIELDS)
            raise ValueError(f"template {self.text!r}: no field {{{unknown[0]}}}.{hint} Fields: {', '.join(FIELDS)}")

    def parts(self, example: Example) -> list[tuple[str, bool]]:
        """(piece, whether it is the row's own text) in order; the gap is the piece '<mask>'."""
        found: list[tuple[str, bool]] = []
        for piece in re.split(rf"(\{{\w+\}}|{MASK})", self.text):
            field = FIELD.fullmatch(piece)
            if field:
                found.append((self.value(example, field.group(1)), True))
            elif piece:
                found.append((piece, False))
        return found

    def value(self, example: Example, field: str) -> str:
        value = getattr(example, field)
        if value is None:
            raise ValueError(
                f"{example.where}: the template {self.text!r} needs {field!r}, which this row does not have"
            )
        return value


@dataclass(frozen=True)
class Rendered:
    """Token ids of one filled template and the position whose logits answer."""

    ids: tuple[int, ...]
    mask_at: int


def render(template: Template, example: Example, tokenizer: Any, room: int | None, front: Sequence[int]) -> Rendered:
    """Fill, tokenize and find the gap: the mask token of a masked LM, the last token before the gap of a causal one.

    Only the row's own text is cut to fit `room` tokens, never the template. `front`: virtual ids.
    """
    masked = tokenizer.mask_token is not None
    parts = template.parts(example)
    at = next(i for i, (piece, _) in enumerate(parts) if piece == MASK)
    if not masked and "".join(p for p, _ in parts[at + 1 :]).strip(" ."):
        raise ValueError(f"template {template.text!r}: a causal model answers at the end, nothing may follow {MASK}")
    before, after = edges(tokenizer)
    kept = parts if masked else parts[:at]
    pieces = [(piece, own) for piece, own in kept]
    if not masked and pieces:  # the space before the gap belongs to the answer's first token
        pieces[-1] = (pieces[-1][0].rstrip(" "), pieces[-1][1])
    text = fit(tokenizer, pieces, None if room is None else room - len(before) - len(front) - len(after))
    text = text.replace(MASK, tokenizer.mask_token) if masked else text
    body = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = (*before, *front, *body, *(after if masked else ()))
    return Rendered(tuple(ids), ids.index(tokenizer.mask_token_id) if masked else len(ids) - 1)


def edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special ids the tokenizer itself puts before and after a text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(inner)] == inner), 0)
    return full[:at], full[at + len(inner) :]


def fit(tokenizer: Any, pieces: Sequence[tuple[str, bool]], room: int | None) -> str:
    """The pieces as one text, the row's own parts shortened evenly until it fits."""
    texts = [piece for piece, _ in pieces]
    own = [i for i, (_, mine) in enumerate(pieces) if mine]
    while room is not None and len(tokenizer("".join(texts), add_special_tokens=False)["input_ids"]) > room:
        longest = max(own, key=lambda i: len(texts[i]), default=None)
        if longest is None or not texts[longest]:
            raise ValueError(f"max_length leaves no room for the template: it alone needs more than {room} tokens")
        texts[longest] = texts[longest][: -max(1, len(texts[longest]) // 20)].rstrip()
    return "".join(texts)
