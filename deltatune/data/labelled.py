"""Rows that say one thing of a text, picture or sound: classes, tags, answers; and rows as a template reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .example import PARTS, Example, Label
from .fields import Faults, label, text, unpacked, what
from .media import media
from .problems import short
from .wanted import ANSWERS, LABELS, TAGS, Wanted

MAX_TEXT = 64_000_000
PAIRS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "passage"), ("question", "sentence"), ("text1", "text2"),
)  # fmt: skip
SINGLE = ("text", "sentence", "review", "content")
TRANSCRIPTS = ("text", "transcript", "transcription", "sentence", "completion")


def first(value: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the names that the row has."""
    return next((name for name in names if name in value), names[0])


def marked(value: Mapping[str, Any], faults: Faults) -> Label:
    """The row's label; None where it has no such column (a row that asks for one)."""
    name = first(value, LABELS)
    return label(value[name], faults) if name in value else None


def classified(value: Mapping[str, Any], faults: Faults) -> Example:
    pair = next((pair for pair in PAIRS if pair[0] in value and pair[1] in value), None)
    names = pair or (first(value, SINGLE),)
    if names[0] not in value:
        half = next(pair for pair in PAIRS if set(pair) & set(value))
        missing = half[1] if half[0] in value else half[0]
        faults.add("missing_field", missing, f"a pair of texts needs both: {' and '.join(half)}", "Add the other text")
        return Example(faults.where)
    texts = [text(value[name], name, faults) for name in names]
    return Example(faults.where, text=texts[0], text_pair=texts[1] if pair else None, label=marked(value, faults))


def labelled(kind: str) -> Callable[[Mapping[str, Any], Faults], Example]:
    """A picture or sound (`kind`) with its label."""

    def convert(value: Mapping[str, Any], faults: Faults) -> Example:
        return Example(faults.where, media=media(value[kind], kind, faults), label=marked(value, faults))

    return convert


def transcribed(value: Mapping[str, Any], faults: Faults) -> Example:
    name = first(value, TRANSCRIPTS)
    return Example(
        faults.where, media=media(value["audio"], "audio", faults), completion=text(value[name], name, faults)
    )


def untold(value: Mapping[str, Any], faults: Faults) -> Example:
    kind = first(value, ("image", "audio"))
    return Example(faults.where, media=media(value[kind], kind, faults))


def tagged(value: Mapping[str, Any], faults: Faults) -> Example:
    name = first(value, TAGS)
    given = {field: unpacked(value[field]) for field in ("tokens", name) if field in value}
    for field, entries in given.items():
        if not isinstance(entries, list | tuple) or not entries:
            faults.add("data_type", field, f"it is {what(entries)}: {short(entries)}", "Write a list, one entry a word")
            return Example(faults.where)
    words, tags = given["tokens"], given.get(name)
    if tags is not None and len(words) != len(tags):
        fix = "Give every word one tag"
        faults.add("data_type", name, f"{len(tags)} tags for {len(words)} words", fix)
    said = tuple(text(word, f"tokens[{i}]", faults) for i, word in enumerate(words))
    spaced = next((i for i, word in enumerate(said) if any(c.isspace() for c in word)), None)
    if spaced is not None:
        faults.add("data_type", f"tokens[{spaced}]", f"{short(said[spaced])} holds a space", "One word a token")
    marks = {} if tags is None else {"tags": tuple(label(tag, faults, f"{name}[{i}]") for i, tag in enumerate(tags))}
    return Example(faults.where, text=" ".join(said), extra={"tokens": said, **marks})


def answered(value: Mapping[str, Any], faults: Faults) -> Example:
    """SQuAD: answers {"text": [...], "answer_start": [...]}, or a list of such pairs; empty: unanswerable. A plain
    text, or a list of them, stands where it comes first in the context."""
    question, context = (text(value[name], name, faults, limit=MAX_TEXT) for name in ("question", "context"))
    name = first(value, ANSWERS)
    if name not in value:  # a row that asks
        return Example(faults.where, text=question, text_pair=context)
    pairs, found = spans_of(value[name], name, faults), []
    for i, (said, start) in enumerate(pairs):
        spot = f"{name}[{i}]" if isinstance(value[name], list | Mapping) else name
        if not isinstance(said, str) or not said.strip():
            fix = "Write a text of the context; answers: [] says that there is none"
            faults.add("data_type", spot, f"the answer is {short(said)}", fix)
        elif start is None:
            found.append((said, located(said, context, spot, faults)))
        elif not isinstance(start, int) or start < 0:
            faults.add("data_type", spot, f"{short(said)} at {short(start)}", "Write a text and its start")
        elif context[start : start + len(said)] != said:
            reason = f"the context has {short(context[start : start + len(said)])} at {start}, not {short(said)}"
            fix = "Correct answer_start (in characters, from 0), or leave it out: the answer is looked for"
            faults.add("answer_lost", spot, reason, fix)
        else:
            found.append((said, start))
    return Example(faults.where, text=question, text_pair=context, extra={"answers": tuple(found)})


def spans_of(value: Any, field: str, faults: Faults) -> list[tuple[Any, Any]]:
    """(text, its start or None where none is given) of every accepted answer, in whatever form they came."""
    given = unpacked(value)
    several = isinstance(given, list) and all(isinstance(one, str | Mapping) for one in given)
    if isinstance(value, str) and not (several or isinstance(given, Mapping)):
        return [(value, None)]
    if isinstance(given, Mapping):
        texts, starts = (listed(given.get(key)) for key in ("text", "answer_start"))
        starts = starts if "answer_start" in given else [None] * len(texts)
        if "text" in given and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
    if isinstance(given, list | tuple):
        return [
            (one.get("text"), one.get("answer_start")) if isinstance(one, Mapping) else (one, None) for one in given
        ]
    fix = 'Write the answer as a text, or {"text": ["..."], "answer_start": [0]}'
    faults.add("data_type", field, f"neither texts nor two lists of one length: {short(given)}", fix)
    return []


def listed(value: Any) -> list[Any]:
    """One value as a list of one; none as an empty list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def located(said: str, context: str, field: str, faults: Faults) -> int:
    """Where an answer first comes in the context; a remark where it comes more than once, a fault where it does not."""
    start, times = context.find(said), context.count(said)
    if start < 0:
        other = context.lower().find(said.strip().lower())
        like = f" Did you mean {context[other : other + len(said.strip())]!r}?" if other >= 0 else ""
        reason = f"the answer {short(said)} does not stand in the context"
        faults.add("answer_lost", field, reason, f"Write it as the context does, letter for letter.{like}")
    elif times > 1:
        fix = f"Where another one is meant, say so: answers: {{text: [{said!r}], answer_start: [...]}}"
        faults.remark(
            "answer_ambiguous", field, f"{short(said)} is {times} times in the context: the first counts", fix
        )
    return start


def templated(wanted: Wanted, value: Mapping[str, Any], faults: Faults) -> Example:
    """The columns that a template names, and the answer; the row's text (or prompt) is all of them, a line each."""
    said: dict[str, str] = {}
    for name in wanted.columns:
        if isinstance(value[name], int | float):
            said[name] = str(value[name])
        elif isinstance(value[name], str) or value[name] is None:
            said[name] = text(value[name], name, faults, empty=True)
        else:
            faults.append(wanted.unread(faults.where, name, value))
    whole = "\n".join(part for part in said.values() if part.strip())
    if not faults and not whole:
        fix = "Write a text, or leave the row out"
        faults.add("empty_field", ", ".join(said), "every column that the template reads is empty", fix)
    own, pair, asked = (said.get(name) for name in PARTS)
    mark = next((name for name in wanted.answer if name in value), "")
    if mark in LABELS:
        own = whole if own is None else own
        return Example(faults.where, text=own, text_pair=pair, prompt=asked, label=marked(value, faults))
    answer, asked = text(value[mark], mark, faults) if mark else None, whole if asked is None else asked
    return Example(faults.where, text=own, text_pair=pair, prompt=asked, completion=answer)
