"""`deltatune data check`: what a data set is, what is wrong with it, and how the model will see one of its rows."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .encode import Encoded, Encoding, encoder, label_names, number_of
from .example import Example
from .formats import examples
from .problems import BadRow, Problem, Problems, short, split
from .sources import task_of
from .wanted import Intake

NGRAM, HASHES, BANDS = 5, 16, 4  # 4 bands of 4: two texts with Jaccard 0.9 meet in 98 % of cases, with 0.5 in 23 %
PRIME = (1 << 61) - 1
SHINGLES = 512  # of a long text: enough to tell, bounded
SHOWN = 5
WORD = re.compile(r"\w+")


@dataclass
class Tokens:
    """Statistics of the encoded rows, in tokens."""

    rows: int = 0
    total: int = 0
    learned: int = 0
    shortest: int = 0
    median: int = 0
    p95: int = 0
    longest: int = 0
    truncated: int = 0
    lost: int = 0


@dataclass
class Pairs:
    """Rows that are equal, or nearly so: how many, and the first of them as (row, earlier row)."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, later: str, earlier: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((later, earlier))


@dataclass
class Sample:
    """One encoded row: its tokens as text, and which are learned."""

    where: str
    pieces: list[tuple[str, bool]]


@dataclass
class Report:
    """What `check` found. `ok` when every row can be used."""

    ref: str
    problems: Problems
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    tokens: Tokens | None = None
    exact: Pairs = field(default_factory=Pairs)
    near: Pairs = field(default_factory=Pairs)
    leaked: Pairs | None = None  # None: not looked for, or the evaluation set cannot be used
    held: Problems | None = None  # of the evaluation set
    notes: list[str] = field(default_factory=list)
    sample: Sample | None = None

    @property
    def ok(self) -> bool:
        return all(not found.errors and found.good > 0 for found in (self.problems, self.held) if found)

    @property
    def errors(self) -> list[Problem]:
        """Of the training set, then of the evaluation set."""
        return [*self.problems.errors, *(self.held.errors if self.held else ())]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        pairs = {"duplicates": self.exact, "near_duplicates": self.near, "leaked": self.leaked}
        return {
            "ref": self.ref,
            "ok": self.ok,
            "rows": {"seen": self.problems.seen, "good": self.problems.good, "bad": self.problems.bad},
            "kinds": dict(self.kinds),
            "labels": dict(self.labels.most_common()),
            "tasks": dict(self.tasks),
            "tokens": vars(self.tokens) if self.tokens else None,
            **{name: vars(found) if found else None for name, found in pairs.items()},
            "errors": [problem.to_json() for problem in self.errors],
            "warnings": [problem.to_json() for problem in self.problems.warnings],
            "notes": [*self.problems.notes, *self.notes],
            "sample": {"where": self.sample.where, "pieces": self.sample.pieces} if self.sample else None,
        }

    def print(self, console: Any) -> None:
        """On a rich Console; data is shown as it is, its markup and control characters harmless."""
        from .show import show

        show(self, console)


@dataclass(frozen=True)
class Reading:
    """How a set is read, and how rows become tokens: as the objective `goal` makes them for a model of that `kind`
    ('seq2seq', 'masked' or 'causal'), or without one by what they hold."""

    intake: Intake = field(default_factory=Intake)
    encoding: Encoding = field(default_factory=Encoding)
    goal: Any = None
    kind: str = "causal"

    def fitted(self, found: Sequence[Example], tokenizer: Any) -> Reading:
        """With what the rows decide of the goal (class names, ...). ValueError where it cannot learn them."""
        if self.goal is None or not found:
            return self
        goal = self.goal.fit(found)
        binds = tokenizer is not None and hasattr(goal, "bind")
        return replace(self, goal=goal.bind(tokenizer, self.kind) if binds else goal)

    def rows(self, example: Example, tokenizer: Any, names: Sequence[str]) -> list[Encoded]:
        """The rows of an example as tokens; those of forms that only an objective knows are left out without one."""
        if self.goal is not None:
            return self.goal.encode(example, tokenizer, self.encoding)
        if example.kind == "classification":
            return [encoder(tokenizer, self.encoding).classified(example, names)]
        known = example.kind in ("chat", "pair", "text", "transcription")
        return encoder(tokenizer, self.encoding).all(example) if known else []


def check(
    ref: str | Path, tokenizer: Any = None, eval_ref: str | Path | None = None, how: Reading | None = None
) -> Report:
    """Read a whole set (and `eval_ref`, for leakage) and say what it is. Errors in the data are in the report."""
    how = how or Reading()
    report = Report(str(ref), Problems())
    found = list(_watched(rows_of(ref, report.problems, how), report))
    faults = mixed_labels(found)
    for fault in faults:
        report.problems.retract(fault)
    lost = {fault.where for fault in faults}
    found = [example for example in found if example.where not in lost]
    for example in found:
        report.tasks.update([example.task] if example.task else ())
        report.kinds[example.kind] += 1
        report.labels.update(_labels(example))
    seen = Seen()
    for example in found:
        _duplicates(example, seen, report)
    try:
        how = how.fitted(found, tokenizer)
        if tokenizer is not None:
            _encode(found, tokenizer, how, report)
    except ValueError as error:  # of the set as a whole: too few classes, words that are several tokens
        if not report.problems.errors:  # else it may be for want of the rows that are refused already
            fix = "Correct the rows or the objective"
            report.problems.retract(BadRow("objective", str(ref), "", str(error), fix))
        how = replace(how, goal=None)
    if eval_ref is not None:
        report.held = Problems()
        leaked = _leaks(eval_ref, how, seen, report, tokenizer)
        _demand_rows(report.held, eval_ref)
        report.leaked = None if report.held.errors else leaked
    _demand_rows(report.problems, ref)
    return report


def rows_of(ref: str | Path, problems: Problems, how: Reading) -> Iterator[Example]:
    """The rows of a reference as a run reads them: a file, a folder, ..., or `task=FILE`."""
    task, file = task_of(str(ref))
    return (row.in_task(task) for row in examples(file, problems, how.intake))


def _demand_rows(problems: Problems, ref: str | Path) -> None:
    if not problems.seen:
        problems.reject([BadRow("no_rows", str(ref), "", "there are no rows", "Write at least one row")])


def _watched(found: Iterable[Example], report: Report) -> Iterator[Example]:
    """Warn of ids that come twice in one file."""
    ids: dict[tuple[str, str], None] = {}
    for example in found:
        if example.extra.get("id") is not None:
            key = (split(example.where)[0], str(example.extra["id"]))
            if key in ids:
                fix = "Give every row its own id, or remove the copy"
                report.problems.warn(
                    BadRow("duplicate_id", example.where, "id", f"id {key[1]!r} was there before", fix)
                )
            ids[key] = None
        yield example


def _labels(example: Example) -> Iterable[str]:
    if example.label is None:
        return ()
    return map(str, example.label if isinstance(example.label, tuple) else (example.label,))


def mixed_labels(found: Sequence[Example]) -> list[BadRow]:
    """Faults of the rows whose label is a word among scores such as 0.5, or the other way round: the fewer of them."""
    words, numbers = dict[str, str](), dict[str, str]()  # where -> label
    for example in found if all(e.kind == "classification" for e in found) else ():
        for name in _labels(example):
            (words if number_of(name) is None else numbers)[example.where] = name
    if not words or all(float(name).is_integer() for name in numbers.values()):
        return []  # whole numbers beside words are names of classes
    few, most = (words, numbers) if len(words) <= len(numbers) else (numbers, words)
    kind, other = ("a word", "numbers") if few is words else ("a number", "words")
    fix = "Write scores in every row, or names in every row, or list the classes (objective: {classify: {labels: []}})"
    like = short(next(iter(most.values())))
    return [
        BadRow(
            "mixed_labels", where, "label", f"{short(name)} is {kind}, the other labels are {other} such as {like}", fix
        )
        for where, name in few.items()
    ]


def leaks(train: Sequence[Example], held: Sequence[Example]) -> Pairs:
    """The rows of `held` whose question is word for word in `train`."""
    seen: dict[bytes, str] = {}
    for example in train:
        seen.setdefault(_digest(_words(asked(example)), asked(example)), example.where)
    found = Pairs()
    for example in held:
        earlier = seen.get(_digest(_words(asked(example)), asked(example)))
        if earlier and asked(example):
            found.add(example.where, earlier)
    return found


def remarks(train: Sequence[Example], held: Sequence[Example], objective: str) -> list[str]:
    """What a run should say of its rows before it trains: leakage, and labels that nothing learns."""
    found, leaked = [], leaks(train, held)
    if leaked.count:
        later, earlier = leaked.first[0]
        many = f"{leaked.count} of {len(held)} evaluation rows are in the training set too ({later} = {earlier})"
        found.append(f"warning: {many}: the scores on them say how much was memorised")
    labelled = sum(example.kind == "classification" for example in train)
    if objective == "sft" and labelled:
        found.append(
            f"warning: {labelled} rows have a label, which sft does not use: it learns the text alone; "
            "the objectives classify and cloze learn the label"
        )
    return found


def said(example: Example) -> str:
    """All the text of an example."""
    parts = [example.prompt, example.completion, example.text, example.text_pair, _seen(example)]
    for answer in (example.turns, example.extra.get("chosen"), example.extra.get("rejected")):
        parts += [answer] if isinstance(answer, str) else [turn.content for turn in answer or ()]
    return "\n".join(part for part in parts if part)


def asked(example: Example) -> str:
    """What the model is given: an evaluation row leaks when it was asked in training, whatever the answer."""
    if example.turns:
        return "\n".join(turn.content for turn in example.turns if turn.role == "user")
    return "\n".join(part for part in (example.prompt, example.text, example.text_pair, _seen(example)) if part)


def _seen(example: Example) -> str:
    """A row's picture or sound as a word: two rows that hold the same one hold the same word."""
    return example.media.digest if example.media is not None else ""


class Seen:
    """Texts met so far: exact ones by hash of their words, near ones by minhash bands."""

    def __init__(self) -> None:
        self.exact: dict[bytes, str] = {}
        self.asked: dict[bytes, str] = {}
        self.bands: dict[tuple, str] = {}


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _digest(words: Sequence[str], raw: str) -> bytes:
    return hashlib.blake2b((" ".join(words) or raw).encode(), digest_size=12).digest()


def signature(words: Sequence[str]) -> list[int]:
    """MinHash of word 5-grams (Broder 1997): equal positions estimate the Jaccard similarity."""
    grams = {" ".join(words[i : i + NGRAM]) for i in range(min(max(len(words) - NGRAM + 1, 1), SHINGLES))}
    base = [int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big") % PRIME for gram in grams]
    return [min((a * (2 * k + 1) + k * 0x9E3779B97F4A7C15) % PRIME for a in base) for k in range(HASHES)]


def _duplicates(example: Example, seen: Seen, report: Report) -> None:
    text = said(example)
    words = _words(text)
    digest = _digest(words, f"{text}{example.label}")
    question = asked(example)
    seen.asked.setdefault(_digest(_words(question), question), example.where)
    if digest in seen.exact:
        report.exact.add(example.where, seen.exact[digest])
        return
    seen.exact[digest] = example.where
    if len(words) < 2 * NGRAM:
        return  # too short to be nearly something else
    marks = signature(words)
    wide = HASHES // BANDS
    bands = [(k, *marks[k * wide : (k + 1) * wide]) for k in range(BANDS)]
    earlier = next((seen.bands[band] for band in bands if band in seen.bands), None)
    if earlier:
        report.near.add(example.where, earlier)
    for band in bands:
        seen.bands.setdefault(band, example.where)


def _leaks(eval_ref: str | Path, how: Reading, seen: Seen, report: Report, tokenizer: Any) -> Pairs:
    """Evaluation rows whose question is in the training set; what is wrong with them joins `report.held`."""
    leaked, problems = Pairs(), report.held or Problems()
    names = set(report.labels)
    for example in rows_of(eval_ref, problems, how):
        try:  # a row that a run could not measure is an error of it
            how.rows(example, tokenizer, ()) if how.goal is not None and tokenizer is not None else None
        except BadRow as fault:
            problems.retract(fault)
            continue
        question = asked(example)
        earlier = seen.asked.get(_digest(_words(question), question))
        if earlier:
            leaked.add(example.where, earlier)
        for name in _labels(example):
            if names and name not in names and not _is_score(names):
                fix = f"The training set has {', '.join(sorted(names)[:10])}"
                report.problems.warn(
                    BadRow("unknown_label", example.where, "label", f"label {name!r} is not trained", fix)
                )
    return leaked


def _is_score(names: Iterable[str]) -> bool:
    return any("." in name for name in names)


def _encode(found: Sequence[Example], tokenizer: Any, how: Reading, report: Report) -> None:
    coder = encoder(tokenizer, how.encoding)
    cut, lost = coder.truncated, coder.lost_tokens
    names = label_names(e for e in found if e.kind == "classification")
    lengths: list[int] = []
    learned = 0
    for example in found:
        _control_tokens(example, tokenizer, report)
        try:
            rows = how.rows(example, tokenizer, names)
        except BadRow as fault:
            report.problems.retract(fault)
            continue
        lengths += [row.length for row in rows]
        learned += sum(row.targets if row.labels else 1 for row in rows)
        if report.sample is None and rows:
            report.sample = Sample(example.where, pieces(rows[0], tokenizer))
    report.tokens = _statistics(lengths, learned, (coder.truncated - cut, coder.lost_tokens - lost))
    report.notes += coder.notes


def _control_tokens(example: Example, tokenizer: Any, report: Report) -> None:
    """Warn of texts that hold a special token: it would be read as one, and could end or open a turn."""
    text = said(example)
    found = next((token for token in tokenizer.all_special_tokens if token in text), None)
    if found:
        fix = "Remove it, or write it differently, unless it is meant"
        reason = f"the text holds the special token {found!r}"
        report.problems.warn(BadRow("control_token", example.where, "", reason, fix))


def pieces(row: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, learned) of each run of tokens; virtual tokens are shown as such."""
    labels = row.labels if row.labels and not row.decoder else (-100,) * len(row.ids)
    runs: list[tuple[list[int], bool]] = []
    for i, label in zip(row.ids, labels, strict=True):
        if not runs or runs[-1][1] != (label != -100):
            runs.append(([], label != -100))
        runs[-1][0].append(i)
    if row.decoder:
        runs.append((list(row.labels or ()), True))
    return [(_text(ids, tokenizer), learned) for ids, learned in runs]


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    real = [i for i in ids if i < len(tokenizer)]
    virtual = len(ids) - len(real)
    return (f"[{virtual} virtual tokens]" if virtual else "") + tokenizer.decode(real)


def _statistics(lengths: list[int], learned: int, cut: tuple[int, int]) -> Tokens:
    ordered = sorted(lengths) or [0]
    shortest, median, p95, longest = (ordered[int(q * (len(ordered) - 1))] for q in (0, 0.5, 0.95, 1))
    spread = {"shortest": shortest, "median": median, "p95": p95, "longest": longest}
    return Tokens(len(lengths), sum(lengths), learned, **spread, truncated=cut[0], lost=cut[1])
