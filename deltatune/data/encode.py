"""Example -> token ids and the loss mask: which tokens are learned, exactly, for every objective's shape of row."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

from torch import Tensor

from .chat import PLAIN, Chat, Span
from .example import Example, Label, Turn
from .media import Reader
from .problems import BadRow, nearest

__all__ = [
    "Encoded",
    "Encoder",
    "Encoding",
    "classified",
    "encode",
    "encode_all",
    "encoder",
    "label_names",
    "target",
]

IGNORE = -100
TRAIN_ON = ("assistant", "last", "all")
TRUNCATE = ("refuse", "right", "left")


@dataclass(frozen=True)
class Reading:
    """How a row's tokens lie in its text, for answers that are parts of it.

    spans: each token's characters in `text`, None outside it.   words: the position of each word's first token, -1
    where it was cut off.   fullest: of the windows of a text, the tokens that this one has most context for.
    """

    text: str = ""
    spans: tuple[Span | None, ...] = ()
    words: tuple[int, ...] = ()
    fullest: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One row as tokens. `labels[i] == ids[i]` where learned, else -100; not shifted; `labels[0]` is -100.

    With `decoder`, `labels` are the decoder's own target ids. `target`: a class, a score, or 0/1 for every class.
    `choices`: the tokens of every answer to choose from, of which `target` is the right one.
    `read`: the model's inputs of a picture or sound, made when its batch comes; it takes `size` positions, and no ids.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...] | None
    target: int | float | tuple[float, ...] | None = None
    type_ids: tuple[int, ...] | None = None
    mask_at: int | None = None
    where: str = ""
    decoder: bool = False
    choices: tuple[tuple[int, ...], ...] = ()
    reading: Reading | None = None
    read: Callable[[], dict[str, Tensor]] | None = None
    size: int = 0

    @property
    def length(self) -> int:
        """Tokens of the row, or of its answer where that is a sequence of its own and longer."""
        return max(len(self.ids), len(self.labels or ()), self.size)

    @property
    def targets(self) -> int:
        """Supervised tokens."""
        return sum(label != IGNORE for label in self.labels or ())


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens. `max_length` in tokens, virtual ones included; None: no limit.

    template: 'chatml', 'plain', Jinja text, or None for the tokenizer's own.   train_on: 'assistant' turns, the 'last'
    of them, or 'all' tokens.   truncate: 'refuse' long rows, or cut them on the 'right' or the 'left'.
    decoder: the model is an encoder-decoder.   prompt_ids: virtual tokens put in front, never learned as targets.
    prompt_sets: the ids of several prompts (prompt_ids is the first), each of which reads every row; combine: how.
    tasks: each has as many of prompt_sets as the others, one task after the other, and its rows are read by those.
    media: what reads the pictures or sounds of a model that takes these; None: the model reads text.
    """

    max_length: int | None = None
    template: str | None = None
    train_on: str = "assistant"
    truncate: str = "right"
    decoder: bool = False
    prompt_ids: tuple[int, ...] = ()
    prompt_sets: tuple[tuple[int, ...], ...] = ()
    combine: str = "vote"
    tasks: tuple[str, ...] = ()
    media: Reader | None = None

    def __post_init__(self) -> None:
        for field, choices in (("train_on", TRAIN_ON), ("truncate", TRUNCATE)):
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field}: {value!r} is none of {', '.join(choices)}.{nearest(value, choices)}")
        if self.max_length is not None and self.max_length <= len(self.prompt_ids) + 1:
            raise ValueError(
                f"max_length {self.max_length} leaves no room beside {len(self.prompt_ids)} virtual tokens"
            )

    @property
    def several(self) -> int:
        """How many prompts read every row side by side."""
        return max(len(self.prompt_sets) // max(len(self.tasks), 1), 1) if self.prompt_ids else 1

    def of(self, task: str | None, where: str = "") -> Encoding:
        """With the first prompt of `task` in front. BadRow for a task that has none."""
        if not self.tasks or not self.prompt_ids:
            return self
        task = self.tasks[0] if task is None and len(self.tasks) == 1 else task
        if task not in self.tasks:
            found = "no task is named" if task is None else f"unknown task {task!r}"
            fix = "Name the set (sst=FILE), give rows a column task, or choose one (--task)."
            reason = f"{found}; there are prompts for {', '.join(self.tasks)}"
            raise BadRow("unknown_task", where, "task", reason, fix + nearest(str(task), list(self.tasks)))
        return replace(self, prompt_ids=self.prompt_sets[self.tasks.index(task) * self.several])

    def each(self) -> list[Encoding]:
        """One for each task; itself where there are none."""
        return [self.of(task) for task in self.tasks] if self.prompt_ids and self.tasks else [self]


class Encoder:
    """A tokenizer and options; counts what was cut. `notes` say what was decided for the whole set."""

    def __init__(self, tokenizer: Any, options: Encoding | None = None):
        self.tokenizer = tokenizer
        self.options = options or Encoding()
        self.truncated = 0
        self.lost_tokens = 0

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer, self.options.template)

    @property
    def notes(self) -> list[str]:
        return list(self.chat.notes) if "chat" in vars(self) else []

    @cached_property
    def edges(self) -> tuple[list[int], list[int]]:
        return edges(self.tokenizer)

    @cached_property
    def eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so a model could not learn to stop: set one")
        return self.tokenizer.eos_token_id

    def tokens(self, text: str) -> list[int]:
        # a long text is no error here: it is cut below
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def __call__(self, example: Example) -> Encoded:
        """One row for one example. A text longer than max_length is cut; `all` makes windows of it."""
        if self.senses(example):
            return self.transcribed(example)
        ids, labels = self.decoder_row(example) if self.options.decoder else self.row(example)
        return self.finish(ids, labels, example.where)

    def all(self, example: Example) -> list[Encoded]:
        """Every row of an example: windows of a long text; one row a turn where a template drops earlier reasoning."""
        if self.senses(example):
            return [self(example)]
        if not self.options.decoder and example.turns and self.options.train_on == "assistant":
            turns = self.chat.fitted(example.turns, example.tools, example.where)
            if not self.chat.keeps_reasoning(turns, example.tools, example.where):
                return [self(part) for part in each_turn(replace(example, turns=turns))]
        if self.options.decoder or example.text is None or self.options.truncate == "refuse":
            return [self(example)]
        return self.windows(example)

    def windows(self, example: Example) -> list[Encoded]:
        """A text in windows of max_length that share one token, so that every token is predicted exactly once."""
        ids, _ = self.row(example)
        room = len(ids) if self.room is None else self.room
        starts = range(0, max(len(ids) - 1, 1), max(room - 1, 1))
        return [self.finish(part, part, example.where) for start in starts if (part := ids[start : start + room])]

    def row(self, example: Example) -> tuple[list[int], list[int]]:
        if example.turns:
            return self.conversation(example)
        before, _ = self.edges
        if example.completion is not None and example.prompt is not None:
            prompt, answer = self.joined(example.prompt, example.completion)
            ids = [*before, *prompt, *answer, self.eos]
            learned = len(answer) + 1
            hidden = 0 if self.options.train_on == "all" else len(ids) - learned
            return ids, [IGNORE] * hidden + ids[hidden:]
        if example.text is None:
            fix = "Give a prompt with a completion, messages, or a text"
            raise BadRow("nothing_to_learn", example.where, "completion", f"a {example.kind!r} row has no target", fix)
        ids = [*before, *self.tokens(example.text), self.eos]
        return ids, list(ids)

    def joined(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of both, as generation sees them: the prompt's own tokens, then what follows them."""
        first, whole = self.tokens(prompt), self.tokens(prompt + answer)
        if whole[: len(first)] == first:
            return first, whole[len(first) :]
        return first, self.tokens(answer)  # a token would span the border: generation could never make it

    def conversation(self, example: Example) -> tuple[list[int], list[int]]:
        turns = self.chat.fitted(example.turns, example.tools, example.where)
        text, spans = self.chat.spans(turns, example.tools, example.where)
        if spans and not self.ends(text, spans[-1]) and turns[-1].learned:
            text = text[: spans[-1][1]]
        if self.options.train_on == "last":
            spans = spans[-1:]
        ids, labels = self.masked(text, spans)
        if text and spans and spans[-1][1] == len(text) and not self.ends(text, spans[-1]):
            ids, labels = [*ids, self.eos], [*labels, self.eos]
        return ids, list(ids) if self.options.train_on == "all" else labels

    def ends(self, text: str, span: Span) -> bool:
        """Whether a span ends with the end-of-turn token."""
        return bool(self.chat.stop) and text[: span[1]].endswith(self.chat.stop)

    def masked(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Ids of a rendered text, and labels inside the spans. A token across a span's start is cut there."""
        ids, offsets = self.with_offsets(text)
        cuts = [start for start, _ in spans if any(s < start < e for s, e in offsets)]
        if cuts:
            cut_ids, cut_offsets = self.pieces(text, cuts)
            if self.tokenizer.decode(cut_ids) == self.tokenizer.decode(ids):
                ids, offsets = cut_ids, cut_offsets
        return ids, _labels(ids, offsets, spans)

    def with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        if not self.tokenizer.is_fast:
            raise ValueError("the tokenizer gives no character offsets: load the fast one (use_fast=True)")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], [(int(s), int(e)) for s, e in found["offset_mapping"]]

    def pieces(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[Span]]:
        """The text tokenized piece by piece, as generation meets it."""
        ids: list[int] = []
        offsets: list[Span] = []
        borders = [0, *cuts, len(text)]
        for start, end in pairwise(borders):
            part, places = self.with_offsets(text[start:end])
            ids += part
            offsets += [(s + start, e + start) for s, e in places]
        return ids, offsets

    def classified(self, example: Example, names: Sequence[str]) -> Encoded:
        """A labelled text or pair: the tokenizer's own special tokens around it, no labels but a target.

        Virtual ids stand after the leading special tokens: an encoder's head reads the first token, which stays [CLS].
        """
        if self.senses(example):
            return Encoded(
                (), None, target(example.label, names, example.where), where=example.where, **self.seen(example)
            )
        found = self.around(example)
        ids, types, _ = self.fronted(found)
        return Encoded(ids, None, target(example.label, names, example.where), types, where=example.where)

    def fronted(self, found: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None, int]:
        """(ids, segment ids, place of the first virtual id): virtual ids stand behind the leading special tokens."""
        front, ids, types = tuple(self.options.prompt_ids), tuple(found["input_ids"]), found.get("token_type_ids")
        special = set(self.tokenizer.all_special_ids)
        lead = next((k for k, i in enumerate(ids) if i not in special), 0) if front else 0
        types = (0,) * len(front) + tuple(types) if types is not None else None
        return ids[:lead] + front + ids[lead:], types, lead

    def around(self, example: Example, truncation: bool | str = True, **more: Any) -> Any:
        """The tokenizer's own encoding of a text or pair, cut to max_length within the special tokens."""
        texts, room = (example.text, example.text_pair), self.room
        found = self.tokenizer(*texts, verbose=False, **more)
        longest = len(found["input_ids"])
        if room is None or longest <= room:
            return found
        self.refuse_long(longest, room, example.where)
        before = self.tokenizer.truncation_side
        self.tokenizer.truncation_side = self.options.truncate
        try:
            return self.tokenizer(*texts, truncation=truncation, max_length=room, verbose=False, **more)
        finally:
            self.tokenizer.truncation_side = before

    def decoder_row(self, example: Example) -> tuple[list[int], list[int]]:
        """Encoder ids of the prompt; the decoder's targets end with eos."""
        prompt, answer = self.prompt_and_answer(example)
        ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        labels = self.tokenizer(text_target=answer, verbose=False)["input_ids"]
        return ids, labels if labels[-1:] == [self.eos] else [*labels, self.eos]

    def senses(self, example: Example) -> bool:
        """Whether row or model is of pictures or sounds; `seen` refuses those of unlike kinds."""
        return example.media is not None or self.options.media is not None

    def seen(self, example: Example) -> dict[str, Any]:
        """How a row's picture or sound is read. BadRow where row and model are of different kinds."""
        if self.options.media is not None:
            return self.options.media.row(example.media, example.where)
        assert example.media is not None
        kind = example.media.kind
        fix = "Choose a model that does (a ViT or CLIP for pictures, a Whisper for sound), or rows of text"
        raise BadRow("wrong_input", example.where, kind, f"the model reads text, the row holds an {kind}", fix)

    def transcribed(self, example: Example) -> Encoded:
        """A sound and its text: the decoder's targets, without the token that the decoder begins with."""
        read = self.seen(example)
        if example.completion is None:
            fix = "Add a column 'text' with what is said; labels are for the objective classify"
            raise BadRow("nothing_to_learn", example.where, "text", f"a {example.kind!r} row has no text", fix)
        labels = list(self.tokenizer(text_target=example.completion, verbose=False)["input_ids"])
        labels = labels[1:] if labels[:1] == self.edges[0][:1] else labels
        labels = labels if labels[-1:] == [self.eos] else [*labels, self.eos]
        _, labels = self.cut([], labels, self.options.max_length, example.where)
        return Encoded((), tuple(labels), where=example.where, decoder=True, **read)

    def prompt_and_answer(self, example: Example) -> tuple[str, str]:
        if example.prompt is not None and example.completion is not None:
            return example.prompt, example.completion
        last = max((k for k, turn in enumerate(example.turns) if turn.learned), default=0)
        before = example.turns[:last]
        if not before:
            fix = "Give a prompt and a completion"
            raise BadRow("nothing_to_learn", example.where, "prompt", "an encoder-decoder reads a prompt", fix)
        one = len(before) == 1
        prompt = before[0].content if one else self.prompt_text(before, example.tools)
        return prompt, example.turns[last].content

    def prompt_text(self, turns: Sequence[Turn], tools: tuple | None) -> str:
        own = self.tokenizer.chat_template or self.options.template
        return (self.chat if own else Chat(self.tokenizer, PLAIN)).render(turns, tools, prompt=True)

    def finish(self, ids: Sequence[int], labels: Sequence[int], where: str) -> Encoded:
        """Cut to max_length, put virtual ids in front, and refuse a row with nothing left to learn."""
        room, length = self.room, len(ids)
        ids, labels = self.cut(list(ids), list(labels), room, where)
        front = list(self.options.prompt_ids)
        if not self.options.decoder:
            labels = [IGNORE] * len(front) + labels
            labels[0] = IGNORE
        if all(label == IGNORE for label in labels):
            raise _all_masked(where, length, room)
        return Encoded(tuple(front + ids), tuple(labels), where=where, decoder=self.options.decoder)

    @property
    def room(self) -> int | None:
        """Tokens a row may have beside the virtual ones."""
        return None if self.options.max_length is None else self.options.max_length - len(self.options.prompt_ids)

    def refuse_long(self, longest: int, room: int, where: str) -> None:
        """Count a row that will be cut. Errors: BadRow when rows are not to be cut."""
        if self.options.truncate == "refuse":
            fix = f"Raise max_length to {longest + len(self.options.prompt_ids)}, or set truncate to right or left"
            raise BadRow("too_many_tokens", where, "", f"the row has {longest} tokens, max_length allows {room}", fix)
        self.truncated += 1
        self.lost_tokens += longest - room

    def cut(self, ids: list[int], labels: list[int], room: int | None, where: str) -> tuple[list[int], list[int]]:
        longest = max(len(ids), len(labels))
        if room is None or longest <= room:
            return ids, labels
        self.refuse_long(longest, room, where)
        if self.options.decoder:
            # the eos stays: a target without an end teaches never to stop
            return _sided(ids, room, self.options.truncate), [*labels[: room - 1], labels[-1]][:room]
        before = self.edges[0]
        keep = len(before) if self.options.truncate == "left" and ids[: len(before)] == before else 0
        left = self.options.truncate
        return tuple([*row[:keep], *_sided(row[keep:], room - keep, left)] for row in (ids, labels))  # type: ignore[return-value]


def edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special ids the tokenizer itself puts before and after a text."""
    inner, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(inner)] == inner)
    return full[:at], full[at + len(inner) :]


def _sided(row: list[int], room: int, side: str) -> list[int]:
    return row[:room] if side == "right" else row[max(len(row) - room, 0) :]


def _labels(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """The ids whose characters lie within a span, -100 elsewhere. Offsets are in order."""
    labels = [IGNORE] * len(ids)
    starts = [s for s, _ in offsets]
    for start, end in spans:
        for i in range(bisect_left(starts, start), bisect_left(starts, end)):
            if offsets[i][1] <= end:
                labels[i] = ids[i]
    return labels


def _all_masked(where: str, length: int, room: int | None) -> BadRow:
    if room is not None and length > room:
        fix = f"Raise train.max_length to {length} (what is learned stands at the row's end), or leave the row out"
        return BadRow("all_masked", where, "", f"nothing to learn is left after cutting the row to {room} tokens", fix)
    fix = "Give the row an answer that is learned"
    return BadRow("all_masked", where, "", "no token of the row is learned", fix)


def each_turn(example: Example) -> list[Example]:
    """One example for every learned turn, in which only that turn, the last, is learned."""
    parts = []
    for k, turn in enumerate(example.turns):
        if turn.learned:
            before = tuple(replace(t, learn=False) for t in example.turns[:k])
            parts.append(replace(example, turns=(*before, turn)))
    return parts


def encoder(tokenizer: Any, options: Encoding | None = None) -> Encoder:
    """The encoder that `encode` and `encode_all` use: its `notes`, and how many rows and tokens it has cut so far."""
    return _encoder(tokenizer, options or Encoding(), repr(tokenizer.chat_template))


@lru_cache(maxsize=64)
def _encoder(tokenizer: Any, options: Encoding, template: str) -> Encoder:
    return Encoder(tokenizer, options)


def encode(example: Example, tokenizer: Any, options: Encoding | None = None) -> Encoded:
    """One example as one row. Errors: BadRow (a ValueError with file:line) when nothing can be learned from it."""
    return encoder(tokenizer, options)(example)


def encode_all(example: Example, tokenizer: Any, options: Encoding | None = None) -> list[Encoded]:
    """One example as rows: windows of a long text, or one row a turn (see `Encoder.all`)."""
    return encoder(tokenizer, options).all(example)


def label_names(examples: Iterable[Example]) -> tuple[str, ...]:
    """Class names of a training set in a fixed order (numbers by value, else by name); () for scores (regression).

    Build it over the training set once and use it for every other set.
    """
    found: dict[str, None] = {}
    for example in examples:
        labels = example.label if isinstance(example.label, tuple) else (example.label,)
        found.update((_name(label), None) for label in labels if label is not None)
    numbers = [number_of(name) for name in found]
    if numbers and all(number is not None for number in numbers):
        if any(number != int(number) for number in numbers if number is not None):
            return ()
        return tuple(sorted(found, key=float))
    return tuple(sorted(found))


def _name(label: Label) -> str:
    return str(int(label)) if isinstance(label, float) and label == int(label) else str(label)


def number_of(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None  # "inf" is a word


def target(label: Label, names: Sequence[str], where: str) -> int | float | tuple[float, ...]:
    """A class index, a 0/1 for every class (a list of labels), or the score itself when there are no names."""
    if isinstance(label, tuple):
        chosen = {_index(one, names, where) for one in label}
        return tuple(float(i in chosen) for i in range(len(names)))
    if names:
        return _index(label, names, where)
    number = number_of(str(label))
    if number is None:
        fix = "Write a number, or name the classes"
        raise BadRow("unknown_label", where, "label", f"{label!r} is not a number, the other labels are", fix)
    return number


def _index(label: Label, names: Sequence[str], where: str) -> int:
    name = _name(label)
    if name not in names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        reason = f"unknown label {name!r}; the training set has {shown}"
        raise BadRow(
            "unknown_label", where, "label", reason, f"Correct it or leave it out.{nearest(name, list(names))}"
        )
    return list(names).index(name)


def classified(example: Example, tokenizer: Any, names: Sequence[str], options: Encoding | None = None) -> Encoded:
    """A labelled text, or pair of texts, with the tokenizer's own special tokens and segment ids."""
    return encoder(tokenizer, options).classified(example, names)
