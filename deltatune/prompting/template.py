"""Template: text, {columns} of a row, one <mask> where the language model answers, and virtual tokens <soft:n>."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.example import PARTS, Example
from ..data.problems import nearest
from ..data.wanted import Wanted

MASK = "<mask>"
FIELD = re.compile(r"\{(\w+)\}")
SOFT = re.compile(r"<soft(?::(0*[1-9]\d*))?>")
PIECE = re.compile(r"(\{\{|\}\}|\{\w+\}|<mask>|<soft(?::0*[1-9]\d*)?>)")
ANSWERS = ("label", "labels", "completion", "answer", "answers")
BRACES = {"{{": "{", "}}": "}"}


@dataclass(frozen=True)
class Piece:
    """A part of a filled template: text (`own`: the row's, which may be cut), the gap, or `soft` virtual tokens."""

    text: str = ""
    own: bool = False
    gap: bool = False
    soft: int = 0


@dataclass(frozen=True)
class Template:
    """'<soft:3>{text}<soft> It was <mask>.': literal text, parts of the row, virtual tokens, one gap (or, without
    `gap`, none: the answer follows).

    {text}, {text_pair} and {prompt} are the row's parts whatever its format calls them; any other name is a column of
    the row. {{ and }} are braces. Other words in angle brackets are text, unless they look like a slot misspelt.
    """

    text: str
    gap: bool = True

    def __post_init__(self) -> None:
        if self.gap and self.text.count(MASK) != 1:
            raise ValueError(f"template {self.text!r} needs exactly one {MASK}, it has {self.text.count(MASK)}")
        if not self.gap and MASK in self.text:
            raise ValueError(f"template {self.text!r}: the answer follows the prompt here, leave {MASK} out")
        literal = "".join(self.pieces[::2])  # PIECE splits: what is between its matches
        if wrong := re.search(r"\{[^{}]*\}?|\}", literal):
            like = nearest(wrong[0].strip("{} "), PARTS)
            raise ValueError(
                f"template {self.text!r}: {wrong[0]!r} is no field: write {{name}}, a column of the row (letters, "
                f"digits and _; rename others with `columns`), or {{{{ and }}}} for braces.{like} "
                f"Always there: {', '.join(PARTS)}"
            )
        if odd := next(filter(misspelt, re.findall(r"<[^<>]*>|<(?:soft|mask)\b[^<>]*", literal)), None):
            raise ValueError(
                f"template {self.text!r}: {odd!r} is no slot; write <mask> for the gap, <soft> or <soft:3> for virtual "
                "tokens"
            )
        if told := next((f for f in self.fields if f in ANSWERS), None):
            raise ValueError(f"template {self.text!r}: {{{told}}} would tell the answer: leave it out")
        if not self.fields:
            raise ValueError(f"template {self.text!r} reads nothing of the row: write {{text}}, or another column")

    @property
    def pieces(self) -> list[str]:
        """Literal text at even places, slots, fields and doubled braces at odd ones."""
        return PIECE.split(self.text)

    @property
    def fields(self) -> list[str]:
        """The names of what it reads of the row."""
        return [f[1:-1] for f in self.pieces[1::2] if FIELD.fullmatch(f)]

    @property
    def slots(self) -> int:
        """How many virtual tokens it places."""
        return sum(int(n or 1) for n in SOFT.findall(self.text))

    def demand(self, virtual: int, placed: bool = False) -> None:
        """ValueError unless a method with `virtual` tokens fits; `placed`: one that has to be placed by a template."""
        if self.slots == virtual or (not self.slots and not placed):
            return
        places = f"write <soft:{virtual}> where they stand" + ", in one place or several" * (virtual > 1)
        fix = f"set the method's length to {self.slots}, or {places}" if self.slots else places
        fix = fix if virtual else "use the method prompt or ptuning"
        raise ValueError(f"template {self.text!r} has {self.slots} virtual tokens, the method has {virtual}: {fix}")

    def parts(self, example: Example) -> list[Piece]:
        """The pieces in order; <soft> and <mask> in the row's own text are letters."""
        return [self.part(piece, example) for piece in self.pieces if piece]

    def part(self, piece: str, example: Example) -> Piece:
        if piece == MASK:
            return Piece(gap=True)
        if soft := SOFT.fullmatch(piece):
            return Piece(soft=int(soft.group(1) or 1))
        field = FIELD.fullmatch(piece)
        return Piece(self.value(example, field[1]), own=True) if field else Piece(BRACES.get(piece, piece))

    def wants(self, answer: Sequence[str] = ()) -> Wanted:
        """What it reads of a row, with the names that the answer's column may have."""
        named = tuple(dict.fromkeys(self.fields))
        return Wanted(named, tuple(name for name in answer if name not in named), self.text)

    def value(self, example: Example, field: str) -> str:
        """The row's text under that name; BadRow where it has none."""
        value = example.column(field)
        if isinstance(value, str | int | float):
            return str(value)
        have = example.row or {part: getattr(example, part) for part in PARTS if getattr(example, part) is not None}
        raise self.wants().unread(example.where, field, have)


def misspelt(bracket: str) -> bool:
    """Whether '<...>' looks like a slot misspelt: <Soft:20>, <soft20>, <sfot:3>, <MASK>; but not <b> or <task>."""
    found = re.match(r"<\s*([A-Za-z]+)(.*)", bracket, re.DOTALL)
    if found is None:
        return False
    word = found[1].lower()
    if re.search(r"\d", found[2]) and nearest(word, ("soft", "mask"), 0.6):
        return True
    return any(word == slot or sorted(word) == sorted(slot) or one_more(word, slot) for slot in ("soft", "mask"))


def one_more(a: str, b: str) -> bool:
    """Whether one of the two is the other and one letter."""
    short_, long = sorted((a, b), key=len)
    return len(long) == len(short_) + 1 and any(long[:i] + long[i + 1 :] == short_ for i in range(len(long)))


@dataclass(frozen=True)
class Rendered:
    """Token ids of one filled template and the position whose logits answer."""

    ids: tuple[int, ...]
    mask_at: int


@dataclass(frozen=True)
class Filler:
    """Fills a template, tokenizes it and finds the gap.

    The gap is the mask token of a masked model, and the last token before it of a causal one (or of a template without
    gap). Only the row's own text is cut to fit `room` tokens, never the template. `front`: virtual ids, which stand in
    the template's <soft> slots, or where it has none after the leading special token. Without them slots are left out.
    `closed`: the tokenizer's own end follows, as in the encoder of an encoder-decoder.
    """

    tokenizer: Any
    masked: bool
    room: int | None = None
    front: Sequence[int] = ()
    closed: bool = False

    def __call__(self, template: Template, example: Example) -> Rendered:
        pieces = self.pieces(template, example)
        from ..data.encode import edges  # loads torch, which a template's text can be checked without

        before, after = edges(self.tokenizer)
        after = after if self.masked or self.closed else []
        if template.slots and self.front:
            template.demand(len(self.front))
        front = () if template.slots else self.front
        spare = None if self.room is None else self.room - len(before) - len(front) - len(after)
        body = self.body(fit(self.body, pieces, spare))
        ids = (*before, *front, *body, *after)
        return Rendered(tuple(ids), ids.index(self.tokenizer.mask_token_id) if self.masked else len(ids) - 1)

    def body(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids: the text between two slots as one text, the space before a slot left out."""
        ids: list[int] = []
        said, virtual = "", iter(self.front)
        for piece in pieces:
            said += piece.text
            if piece.soft:
                ids += self.tokens(said.rstrip(" "))
                ids += [i for _, i in zip(range(piece.soft), virtual, strict=False)]
                said = ""
        return ids + self.tokens(said)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def pieces(self, template: Template, example: Example) -> list[Piece]:
        """The pieces up to the gap of a causal model, or with the mask token of a masked one."""
        parts = template.parts(example)
        if not self.front:  # the base is measured without virtual tokens: the text around them stays one text
            parts = [p for p in parts if not p.soft]
        if not template.gap:
            return parts
        at = next(i for i, part in enumerate(parts) if part.gap)
        if self.masked:
            mask = self.tokenizer.mask_token
            # a row that spells the mask token means its letters, and must not move the gap
            parts = [replace(p, text=p.text.replace(mask, mask.strip("<>[]"))) if p.own else p for p in parts]
            return [*parts[:at], Piece(mask), *parts[at + 1 :]]
        if any(p.soft for p in parts[at + 1 :]) or "".join(p.text for p in parts[at + 1 :]).strip(" ."):
            raise ValueError(
                f"template {template.text!r}: a causal model answers at the end, nothing may follow {MASK}"
            )
        before = parts[:at]
        while before and not before[-1].soft and not before[-1].text.rstrip(" "):
            before.pop()
        # the space before the gap belongs to the answer's first token
        return [*before[:-1], replace(before[-1], text=before[-1].text.rstrip(" "))] if before else []


def fit(tokens: Callable[[Sequence[Piece]], list[int]], pieces: Sequence[Piece], room: int | None) -> list[Piece]:
    """The pieces, the row's own parts shortened, the longest first, until they fit."""
    found = list(pieces)
    own = [i for i, piece in enumerate(found) if piece.own]
    while room is not None and len(tokens(found)) > room:
        longest = max(own, key=lambda i: len(found[i].text), default=None)
        if longest is None or not found[longest].text:
            raise ValueError(f"max_length leaves no room for the template: it alone needs more than {room} tokens")
        text = found[longest].text
        found[longest] = replace(found[longest], text=text[: -max(1, len(text) // 20)].rstrip())
    return found
