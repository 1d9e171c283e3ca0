"""Row -> Example: the formats people have, told apart by their columns. One table, one small function a format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import labelled as by
from .example import PARTS, Example, Label, Turn
from .fields import Faults, conversation, messages, text, unpacked, what
from .labelled import MAX_TEXT, PAIRS, SINGLE, TRANSCRIPTS, first
from .problems import BadRow, Problems, nearest, short
from .readers import Row
from .sources import read, renamed
from .wanted import ANSWERS, AS_IT_COMES, COMPLETIONS, LABELS, TAGS, Intake, Wanted

__all__ = ["FORMATS", "Example", "Label", "Turn", "convert", "examples", "load", "sniff"]

SIDE = ("id", "idx", "source", "weight", "choices", "task")  # columns that travel along without a note


@dataclass(frozen=True)
class Format:
    """Columns that must be there (each group: one of them), columns that may be, and how a row becomes an Example."""

    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], Faults], Example]

    def missing(self, columns: Iterable[str], left: Sequence[str] = ()) -> list[str]:
        """The groups of which no column is there; those that are all among `left` need none."""
        found = set(columns)
        return ["|".join(group) for group in self.needs if not found & set(group) and not set(group) <= set(left)]

    @property
    def columns(self) -> set[str]:
        return {name for group in self.needs for name in group} | set(self.may)


def _messages(value: Mapping[str, Any], faults: Faults) -> Example:
    name = first(value, ("messages", "conversation"))
    return _chat(value, messages(value[name], name, faults), name, faults)


def _sharegpt(value: Mapping[str, Any], faults: Faults) -> Example:
    name = first(value, ("conversations", "conversation"))
    turns = conversation(value[name], name, faults)
    if value.get("system"):
        turns = (Turn("system", text(value["system"], "system", faults)), *turns)
    return _chat(value, turns, name, faults)


def _chat(value: Mapping[str, Any], turns: tuple[Turn, ...], field: str, faults: Faults) -> Example:
    extra = _unpaired_mark(value, faults)
    if turns and not any(turn.role == "assistant" for turn in turns):
        reason = "no message is from the assistant, so there is nothing to learn"
        fix = "Add the assistant's answer, or leave the conversation out"
        faults.add("example_missing_assistant_message", field, reason, fix)
    elif turns and not faults and not any(turn.learned for turn in turns):
        fix = "Set weight to 1 on the messages to learn"
        faults.add("nothing_to_learn", field, "every assistant message has weight 0", fix)
    return Example(faults.where, turns, tools=_tools(value, faults), extra=extra)


def _unpaired_mark(value: Mapping[str, Any], faults: Faults) -> dict[str, Any]:
    name = "label" if isinstance(value.get("label"), bool) else "kto_tag"
    return {} if value.get(name) is None else {"desirable": _truth(value[name], name, faults)}


def _truth(value: Any, field: str, faults: Faults) -> bool:
    if value not in (True, False, "true", "false", "True", "False", "0", "1"):
        faults.add("data_type", field, f"{short(value)} is neither true nor false", "Write true or false")
    return value in (True, "true", "True", "1")


def _tools(value: Mapping[str, Any], faults: Faults) -> tuple | None:
    tools = unpacked(value.get("tools"))
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        fix = 'Write [{"type": "function", "function": {"name": ...}}]'
        faults.add("data_type", "tools", f"the tools are {what(tools)}: {short(tools)}", fix)
        return None
    return tuple(tools)


def _alpaca(value: Mapping[str, Any], faults: Faults) -> Example:
    turns = _alpaca_prompt(value, faults)
    name = first(value, ("output", "response"))
    answer = Turn("assistant", text(value[name], name, faults))
    return Example(faults.where, (*turns, answer), extra=_unpaired_mark(value, faults))


def _alpaca_prompt(value: Mapping[str, Any], faults: Faults) -> list[Turn]:
    turns = []
    if value.get("system"):
        turns.append(Turn("system", text(value["system"], "system", faults)))
    for i, pair in enumerate(unpacked(value.get("history")) or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            faults.add("data_type", f"history[{i}]", f"not a [question, answer] pair: {short(pair)}", "Write two texts")
            continue
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(role, text(said, f"history[{i}]", faults)))
    question = text(value["instruction"], "instruction", faults)
    if value.get("input") not in (None, ""):
        question = f"{question}\n{text(value['input'], 'input', faults, empty=True)}".rstrip()
    return [*turns, Turn("user", question)]


def _pair(*names: tuple[str, str]) -> Callable[[Mapping[str, Any], Faults], Example]:
    """prompt and completion as texts, or both as messages."""

    def convert(value: Mapping[str, Any], faults: Faults) -> Example:
        prompt, completion = next((pair for pair in names if pair[0] in value and pair[1] in value), names[0])
        asked, said = unpacked_list(value[prompt]), unpacked_list(value[completion])
        if isinstance(asked, list) or isinstance(said, list):
            before = (
                messages(asked, prompt, faults) if isinstance(asked, list) else _as_turn("user", asked, prompt, faults)
            )
            after = (
                messages(said, completion, faults)
                if isinstance(said, list)
                else _as_turn("assistant", said, completion, faults)
            )
            before = tuple(Turn(t.role, t.content, False, t.extra) for t in before)
            return _chat(value, before + after, completion, faults)
        return Example(faults.where, prompt=text(asked, prompt, faults), completion=text(said, completion, faults))

    return convert


def unpacked_list(value: Any) -> Any:
    """A list of messages, also one that a csv cell holds as JSON; any other value as it is."""
    found = unpacked(value)
    is_messages = isinstance(found, list) and found and all(isinstance(i, Mapping) and "role" in i for i in found)
    return found if is_messages or isinstance(value, list) else value


def _as_turn(role: str, value: Any, field: str, faults: Faults) -> tuple[Turn, ...]:
    return (Turn(role, text(value, field, faults)),)


def _prompt(value: Mapping[str, Any], faults: Faults) -> Example:
    asked = unpacked_list(value["prompt"])
    if isinstance(asked, list):
        return Example(faults.where, messages(asked, "prompt", faults))
    return Example(faults.where, prompt=text(asked, "prompt", faults))


def _unpaired(value: Mapping[str, Any], faults: Faults) -> Example:
    mark = first(value, ("label", "kto_tag"))
    extra = {"desirable": _truth(value[mark], mark, faults)}
    prompt = text(value["prompt"], "prompt", faults)
    return Example(faults.where, prompt=prompt, completion=text(value["completion"], "completion", faults), extra=extra)


def _stepwise(value: Mapping[str, Any], faults: Faults) -> Example:
    steps, labels = value["completions"], value["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        faults.add("data_type", "completions", "steps and labels are not two lists of one length", "Label every step")
        steps, labels = [], []
    extra = {"completions": tuple(text(step, "completions", faults) for step in steps), "labels": tuple(labels)}
    return Example(faults.where, prompt=text(value["prompt"], "prompt", faults), extra=extra)


def _text(value: Mapping[str, Any], faults: Faults) -> Example:
    name = first(value, ("text", "content"))
    return Example(faults.where, text=text(value[name], name, faults, limit=MAX_TEXT))


def _preference(value: Mapping[str, Any], faults: Faults) -> Example:
    """TRL, alpaca with ranked answers, ms-swift's rejected_response, LLaMA-Factory's ranking."""
    turns, prompt = _asked(value, faults)
    if "chosen" in value:
        chosen, rejected = _answer(value["chosen"], "chosen", faults), _answer(value["rejected"], "rejected", faults)
    else:
        name = first(value, ("rejected_response", "rejected_messages"))
        turns, chosen = turns[:-1], (Turn("assistant", turns[-1].content),) if turns else ()
        rejected = _answer(value[name], name, faults)
        rejected = (Turn("assistant", rejected),) if isinstance(rejected, str) else rejected
    if not faults and _said(chosen) == _said(rejected):
        faults.add("identical_preference", "rejected", "chosen and rejected are the same", "Leave the row out")
    if not turns and prompt is None and isinstance(chosen, tuple):
        turns, chosen, rejected = _common(chosen, rejected, faults)
    extra = {"chosen": chosen, "rejected": rejected}
    return Example(faults.where, turns, prompt=prompt, tools=_tools(value, faults), extra=extra)


def _said(answer: str | tuple[Turn, ...]) -> tuple:
    return (
        (answer,) if isinstance(answer, str) else tuple((turn.role, turn.content, str(turn.extra)) for turn in answer)
    )


def _asked(value: Mapping[str, Any], faults: Faults) -> tuple[tuple[Turn, ...], str | None]:
    if "instruction" in value:
        return tuple(_alpaca_prompt(value, faults)), None
    for name, convert in (("messages", messages), ("conversations", conversation), ("conversation", conversation)):
        if name in value:
            return convert(value[name], name, faults), None
    name = first(value, ("prompt", "question", "query"))
    asked = unpacked_list(value.get(name))
    if isinstance(asked, list):
        return messages(asked, name, faults), None
    return (), text(asked, name, faults) if name in value else None


def _answer(value: Any, field: str, faults: Faults) -> str | tuple[Turn, ...]:
    value = unpacked_list(value)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list):
        said = isinstance(value[0], Mapping) and "from" in value[0] if value else False
        return conversation(value, field, faults) if said else messages(value, field, faults)
    return text(value, field, faults)


def _common(chosen: tuple, rejected: str | tuple, faults: Faults) -> tuple[tuple, tuple, tuple]:
    """TRL's implicit prompt: the turns both conversations begin with."""
    if isinstance(rejected, str):
        faults.add("data_type", "rejected", "chosen is a conversation and rejected a text", "Write both the same way")
        return (), chosen, ()
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


_PROMPTS = ("prompt", "system", "instruction", "input", "history", "question", "query", "tools")
# order matters: the first format whose columns are all there is the row's
FORMATS: dict[str, Format] = {
    "preference": Format((("chosen",), ("rejected",)), (*_PROMPTS, "messages", "conversations"), _preference),
    "rejected": Format((("messages",), ("rejected_response", "rejected_messages")), ("tools",), _preference),
    "messages": Format((("messages",),), ("tools", "kto_tag", "label"), _messages),
    "sharegpt": Format((("conversations", "conversation"),), ("system", "tools", "kto_tag"), _sharegpt),
    "alpaca": Format((("instruction",), ("output", "response")), ("input", "system", "history", "kto_tag"), _alpaca),
    "unpaired": Format((("prompt",), ("completion",), ("label", "kto_tag")), (), _unpaired),
    "stepwise": Format((("prompt",), ("completions",), ("labels",)), (), _stepwise),
    "tagging": Format((("tokens",), TAGS), (), by.tagged),
    "prompt_completion": Format((("prompt",), ("completion",)), ("tools",), _pair(("prompt", "completion"))),
    "query_response": Format(
        (("query", "question", "prompt"), ("response", "answer")), (),
        _pair(*((q, r) for q in ("query", "question", "prompt") for r in ("response", "answer"))),
    ),
    "question_answering": Format((("question",), ("context",), ANSWERS), ("title",), by.answered),
    "image_classification": Format((("image",), LABELS), (), by.labelled("image")),
    "audio_classification": Format((("audio",), LABELS), (), by.labelled("audio")),
    "transcription": Format((("audio",), TRANSCRIPTS), (), by.transcribed),
    "classification": Format(
        (tuple(dict.fromkeys((*SINGLE, *(pair[0] for pair in PAIRS)))), LABELS), tuple(pair[1] for pair in PAIRS),
        by.classified,
    ),
    "prompt": Format((("prompt",),), ("tools",), _prompt),
    "text": Format((("text", "content"),), (), _text),
    "media": Format((("image", "audio"),), (), by.untold),
}  # fmt: skip


OWN = "template"  # the format of rows whose columns a template names


def own(wanted: Wanted) -> Format:
    """The format of rows as a template reads them: the columns that it names, and the answer."""
    return Format((*((name,) for name in wanted.columns), wanted.answer), (), partial(by.templated, wanted))


def sniff(columns: Iterable[str], left: Sequence[str] = ()) -> str | None:
    """The name of the known format that has these columns, or None. left: columns that it need not have."""
    found = list(columns)
    return next((name for name, form in FORMATS.items() if not form.missing(found, left)), None)


def format_of(row: Row, how: Intake) -> str | None:
    """The name of a row's format: as given; the objective's own where its columns are there; OWN where every column
    that a template names is there, or no known format's are; else the first known one whose columns are there."""
    if how.format not in (None, "auto"):
        return how.format
    fixed = how.wanted.format
    if fixed and not FORMATS[fixed].missing(row.value, how.left):
        return fixed
    known, named = sniff(row.value, how.left), set(how.wanted.columns)
    if named and (named <= set(row.columns) or (known is None and not named <= set(PARTS))):
        return OWN
    return known


def convert(row: Row, format: str | None = None) -> Example:
    """One row in a known format, or in the one its columns tell. Errors: BadRow, the first fault of the row."""
    name = format or sniff(row.value)
    if name is None:
        raise unknown(row)
    example, faults = attempt(row, name)
    if faults:
        raise faults[0]
    return example


def attempt(row: Row, format: str, how: Intake = AS_IT_COMES) -> tuple[Example, Faults]:
    """(example, faults): the example only counts when there are no faults."""
    faults, wanted = Faults(row.where), how.wanted
    if doubled := how.doubled(row):
        faults += doubled
        return Example(row.where), faults
    form, value = (own(wanted), row.columns) if format == OWN else (FORMATS[format], row.value)
    if missing := form.missing(value, how.left):
        faults += _lacking(row, missing, how) if format == OWN else [how.strange(row) or _lacks(row, format, missing)]
        return Example(row.where), faults
    example = form.convert(value, faults)
    side = {name: row.value[name] for name in SIDE if name in row.value}
    example = Example(**{**vars(example), "extra": {**side, **example.extra}, "row": row.columns})
    if not (faults or format == OWN or example.turns or example.media):  # these say with their tokens what they lack
        faults += [
            wanted.unread(row.where, name, row.columns) for name in wanted.columns if not _readable(example, name)
        ]
    return example, faults


def _readable(example: Example, name: str) -> bool:
    return isinstance(example.column(name), str | int | float)


def _lacking(row: Row, missing: Sequence[str], how: Intake) -> list[BadRow]:
    """What a row lacks of the columns that a template names, and of the answer."""
    wanted, columns, turned = how.wanted, row.columns, how.turned(row)
    faults = [wanted.unread(row.where, name, columns, turned) for name in missing if name in wanted.columns]
    told = "|".join(wanted.answer) not in missing
    return faults if told else [*faults, wanted.untold(row.where, columns, turned)]


def _lacks(row: Row, format: str, missing: Sequence[str]) -> BadRow:
    other = sniff(row.value)
    columns = short(sorted(map(str, row.value)))
    if other and other != format:
        reason = f"the row has the columns of {other!r}, the rows before it are {format!r} (columns {columns})"
        return BadRow("mixed_schema", row.where, "", reason, "Put rows of different formats in different files")
    reason = f"a row of the format {format!r} needs it (columns {columns})"
    return BadRow("missing_field", row.where, missing[0], reason, f"Add it.{nearest(missing[0], list(row.value))}")


def unknown(row: Row, how: Intake = AS_IT_COMES) -> BadRow:
    """No format has these columns: what was found, the nearest format and what it lacks."""
    columns = [str(name) for name in row.value]
    if strange := how.strange(row):
        return strange
    if not columns:
        fix = "Write at least a prompt and a completion, messages, or a text"
        return BadRow("unknown_columns", row.where, "", "the row has no columns", fix)
    there = {name: form for name, form in FORMATS.items() if how.wanted.answer in form.needs} or FORMATS
    seen = ("image", "audio")  # of equals, the one for texts
    name, form = min(there.items(), key=lambda item: (_distance(item[1], columns), item[0].startswith(seen)))
    if _distance(form, columns) >= len(form.needs) and there is FORMATS:  # nothing in common with any: the plainest
        name, form = "prompt_completion", FORMATS["prompt_completion"]
    missing = form.missing(columns, how.left)
    like = next((near for gap in missing for near in [nearest(gap.split("|")[0], columns, 0.6)] if near), "")
    reason = (
        f"no known format has the columns {short(columns)}; the nearest is {name!r}, which lacks {', '.join(missing)}"
    )
    like += how.turned(row)
    yours = ", ".join(f"{column}: {gap.split('|')[0]}" for gap, column in matched(missing, row).items())
    fix = f"Name yours, for instance data.columns={{{yours}}}, or choose a format: {', '.join(there)}.{like}"
    if not set(columns) & _KNOWN and not all(c.isidentifier() for c in columns):
        fix = f"If the file has no header line, name its columns (columns: [text, label]). {fix}"
    return BadRow("unknown_columns", row.where, "", reason, fix)


def matched(missing: Sequence[str], row: Row) -> dict[str, str]:
    """{what is missing: the row's column that may be it}: the nearest by name, else the next that no format knows,
    texts first; 'yours' where none is left."""
    free = [str(name) for name in row.value if name not in _KNOWN]
    free.sort(key=lambda name: not isinstance(row.value.get(name), str))
    near = {gap: next((c for c in free for n in gap.split("|") if nearest(n, [c], 0.6)), "") for gap in missing}
    left = (name for name in free if name not in near.values())
    return {gap: near[gap] or next(left, "yours") for gap in missing}


def used(example: Example, how: Intake) -> tuple[str, ...]:
    """The columns, by the names they have in the file, that a row's question was read from."""
    copies = {new for old, new in how.names.items() if old in example.row}
    given = {name: value for name, value in example.row.items() if name not in copies}
    row = renamed(Row(given, example.where), how.names)
    format = format_of(row, how)
    if format is None:
        return ()
    reads = set(how.wanted.columns) if format == OWN else FORMATS[format].columns
    reads -= {*(how.wanted.answer or COMPLETIONS)}
    return tuple(name for name in given if name in reads or how.names.get(name) in reads)


def _distance(form: Format, columns: Sequence[str]) -> float:
    """Missing groups, less a little for every column that the format knows or nearly knows."""
    close = sum(bool(nearest(gap.split("|")[0], columns, 0.6)) for gap in form.missing(columns))
    return len(form.missing(columns)) - 0.5 * close - 0.6 * len(form.columns & set(columns))


_KNOWN = {name for form in FORMATS.values() for name in form.columns}


def examples(ref: str | Path, problems: Problems, how: Intake = AS_IT_COMES) -> Iterator[Example]:
    """Examples of a reference; each file's format is told by its first known row, or given.

    Afterwards `problems.seen == problems.good + problems.bad`, and `problems.refuse()` raises what is wrong.
    """
    if how.format not in (None, "auto", *FORMATS):
        raise ValueError(
            f"unknown format {how.format!r}; choose from {', '.join(FORMATS)}.{nearest(how.format, list(FORMATS))}"
        )
    yield from converted(read(ref, problems, how.columns), problems, how)


def converted(rows: Iterable[Row], problems: Problems, how: Intake = AS_IT_COMES) -> Iterator[Example]:
    """Rows, their columns renamed, -> examples, counting what cannot be used."""
    found: dict[str, str] = {}
    for row in map(how.taken, rows):
        file = row.where.rpartition(":")[0]
        name = found.get(file) or format_of(row, how)
        if name is None:
            problems.reject([unknown(row, how)])
            continue
        if file not in found:
            found[file] = name
            _tell(file, name, row, problems, how.wanted)
        example, faults = attempt(row, name, how)
        if faults:
            problems.reject(faults)
        else:
            problems.accept()
            for remark in faults.remarks:
                problems.warn(remark)
            yield example


def _tell(file: str, name: str, row: Row, problems: Problems, wanted: Wanted) -> None:
    named = f"the columns that the template {wanted.template!r} names: {', '.join(wanted.columns)}"
    known = f"as {name!r} from its columns {', '.join(map(str, row.value))}"
    problems.note(f"{file}: read {named if name == OWN else known}")
    used = {*wanted.columns, *(wanted.answer if name == OWN else FORMATS[name].columns), *SIDE}
    unused = [str(column) for column in row.value if column not in used]
    if unused:
        hint = "" if wanted.columns else " (unless a template names them)"
        problems.note(f"{file}: these columns are not used: {', '.join(unused)}{hint}")


def load(ref: str | Path, how: Intake = AS_IT_COMES, skip_bad: bool = False) -> tuple[list[Example], Problems]:
    """All examples of a reference. Errors: one ValueError with every problem, unless `skip_bad` (then counted)."""
    problems = Problems()
    found = list(examples(ref, problems, how))
    if not skip_bad:
        problems.refuse()
    return found, problems
