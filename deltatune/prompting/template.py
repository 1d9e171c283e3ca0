"""Template: text with {fields} of a row and one <mask>, the place where the language model answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.encode import edges
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


@dataclass(frozen=True)
class Filler:
    """Fills a template, tokenizes it and finds the gap.

    The gap is the mask token of a masked model, and the last token before it of a causal one. Only the row's own text
    is cut to fit `room` tokens, never the template. `front`: virtual ids, which stand after the leading special token.
    """

    tokenizer: Any
    masked: bool
    room: int | None = None
    front: Sequence[int] = ()

    def __call__(self, template: Template, example: Example) -> Rendered:
        pieces = self.pieces(template, example)
        before, after = edges(self.tokenizer)
        after = after if self.masked else []
        spare = None if self.room is None else self.room - len(before) - len(self.front) - len(after)
        body = self.tokens(fit(self.tokens, pieces, spare))
        ids = (*before, *self.front, *body, *after)
        return Rendered(tuple(ids), ids.index(self.tokenizer.mask_token_id) if self.masked else len(ids) - 1)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def pieces(self, template: Template, example: Example) -> list[tuple[str, bool]]:
        """(text, whether it is the row's own) up to the gap of a causal model, with the mask token of a masked one."""
        parts = template.parts(example)
        at = next(i for i, part in enumerate(parts) if part == (MASK, False))
        if self.masked:
            mask = self.tokenizer.mask_token
            # a row that spells the mask token means its letters, and must not move the gap
            parts = [(piece.replace(mask, mask.strip("<>[]")) if own else piece, own) for piece, own in parts]
            return [*parts[:at], (mask, False), *parts[at + 1 :]]
        if "".join(piece for piece, _ in parts[at + 1 :]).strip(" ."):
            raise ValueError(
                f"template {template.text!r}: a causal model answers at the end, nothing may follow {MASK}"
            )
        before = parts[:at]
        while before and not (stripped := before[-1][0].rstrip(" ")):
            before.pop()
        # the space before the gap belongs to the answer's first token
        return [*before[:-1], (stripped, before[-1][1])] if before else []


def fit(tokens: Callable[[str], list[int]], pieces: Sequence[tuple[str, bool]], room: int | None) -> str:
    """The pieces as one text, the row's own parts shortened, the longest first, until it fits."""
    texts = [piece for piece, _ in pieces]
    own = [i for i, (_, mine) in enumerate(pieces) if mine]
    while room is not None and len(tokens("".join(texts))) > room:
        longest = max(own, key=lambda i: len(texts[i]), default=None)
        if longest is None or not texts[longest]:
            raise ValueError(f"max_length leaves no room for the template: it alone needs more than {room} tokens")
        texts[longest] = texts[longest][: -max(1, len(texts[longest]) // 20)].rstrip()
    return "".join(texts)
