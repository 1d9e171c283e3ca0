"""The data report: every damaged set is explained with its place and a way out; no row disappears."""

import io
import json
import random

import pytest
from rich.console import Console

from deltatune.data.check import Reading, check, remarks
from deltatune.data.encode import Encoding
from deltatune.data.formats import load
from deltatune.data.problems import split
from deltatune.objectives import Classify
from malformed import LEGAL, Case, cases
from tiny_tokenizers import CHATML, byte_level

TOKENIZER = byte_level(CHATML)


def written(tmp_path, rows, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def place(case: Case, root):
    path = root / case.file
    if case.data is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(case.data)
    return path.parent if "/" in case.file else path


MIXED = [
    ([0.5, 1.5, "x"], [3], "'x' is a word, the other labels are numbers such as '"),
    (["a", "b", 0.5], [3], "'0.5' is a number, the other labels are words such as '"),
    (["0.5", "x", "2.5", "y", "1"], [2, 4], "is a word"),
    ([1, 2, "x"], [], ""),
    (["a", "inf", "b"], [], ""),
    ([0.5, 1.0], [], ""),
]


@pytest.mark.parametrize(("labels", "lines", "said"), MIXED)
def test_words_among_scores_are_an_error_with_their_lines(tmp_path, labels, lines, said):
    path = written(tmp_path, [{"text": f"row {i}", "label": label} for i, label in enumerate(labels)])
    report = check(path, TOKENIZER)
    assert [(p.kind, p.lines) for p in report.problems.errors] == ([("mixed_labels", lines)] if lines else [])
    assert (report.problems.good, report.problems.bad) == (len(labels) - len(lines), len(lines))
    assert all(said in p.reason for p in report.problems.errors)
    if lines:
        with pytest.raises(ValueError, match="mixed_labels"):
            Classify().fit(load(path)[0])
    Classify("single", tuple(map(str, labels))).fit(load(path)[0])


def test_a_run_is_told_of_leaked_rows_and_unused_labels(tmp_path):
    train, _ = load(written(tmp_path, [{"text": "One, two!", "label": "a"}, {"text": "three", "label": "b"}]))
    held, _ = load(written(tmp_path, [{"text": "one two", "label": "b"}, {"text": "four", "label": "b"}], "e.jsonl"))
    (leak,) = remarks(train, held, "classify")
    where = f"({tmp_path / 'e.jsonl'}:1 = {tmp_path / 'a.jsonl'}:1)"
    assert f"1 of 2 evaluation rows are in the training set too {where}" in leak
    assert remarks(train, held[1:], "classify") == []
    (label,) = remarks(train, [], "sft")
    assert "2 rows have a label, which sft does not use" in label
    assert "classify and cloze" in label


def test_there_are_two_hundred_malformed_inputs():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    assert sum(case.kind != LEGAL for case in cases()) >= 200


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_malformed(case: Case, tmp_path):
    path = place(case, tmp_path)
    problems = check(path, TOKENIZER, how=Reading(encoding=Encoding(max_length=case.max_length))).problems
    if case.good >= 0:  # how far a damaged archive can be read is the decompressor's affair
        assert (problems.good, problems.bad) == (case.good, case.bad), [str(p) for p in problems.errors]
    assert problems.bad == case.bad
    if case.kind == LEGAL:
        assert not problems.errors
        assert any(case.reason in note for note in problems.notes), problems.notes
        return
    found = [p for p in problems.errors + problems.warnings if p.kind == case.kind and case.reason in p.reason]
    assert found, [str(p) for p in problems.errors]
    problem = found[0]
    assert problem.file == str(path)
    assert problem.fix
    assert case.field in problem.field
    if case.line is None:
        assert problem.lines == []
    elif case.line > 0:
        assert problem.lines[0] == case.line
    else:
        assert problem.lines[0] == problems.good + 1
    assert split(problem.where)[0] == str(path)


def test_counts_labels_tokens_and_duplicates(tmp_path):
    long = "the quick brown fox jumps over the lazy dog and then runs far away from all of the other animals there"
    rows = [
        {"prompt": "Ask", "completion": "Say"},
        {"prompt": "ask!", "completion": "say"},
        {"prompt": "q", "completion": long},
    ]
    rows += [{"prompt": "q", "completion": long + " today"}, {"prompt": "other", "completion": "thing"}]
    report = check(
        written(tmp_path, rows),
        TOKENIZER,
        written(tmp_path, [rows[0], {"prompt": "new", "completion": "x"}], "b.jsonl"),
    )
    where = f"{tmp_path}/a.jsonl"
    assert report.exact.first == [(f"{where}:2", f"{where}:1")]
    assert report.near.first == [(f"{where}:4", f"{where}:3")]
    assert report.leaked.first == [(f"{tmp_path}/b.jsonl:1", f"{where}:1")]
    assert report.kinds == {"pair": 5}
    assert (report.tokens.rows, report.tokens.shortest, report.tokens.truncated) == (5, 7, 0)
    assert report.sample.pieces == [("Ask", False), ("Say<|im_end|>", True)]
    assert report.ok
    assert json.loads(json.dumps(report.to_json()))["rows"] == {"seen": 5, "good": 5, "bad": 0}


def test_a_set_named_as_a_task_is_read_as_a_run_reads_it(tmp_path):
    train = written(tmp_path, [{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}])
    dev = written(tmp_path, [{"text": "Good film!", "label": "pos"}], "dev.jsonl")
    report = check(f"sst={train}", eval_ref=f"sst={dev}")
    assert report.ok
    assert (report.tasks, report.leaked.count) == ({"sst": 2}, 1)
    assert report.to_json()["tasks"] == {"sst": 2}
    assert "tasks: sst 2" in shown(report)
    assert check(train).to_json()["tasks"] == {}


def test_leakage_is_by_question_and_labels_are_compared(tmp_path):
    train = written(tmp_path, [{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}])
    dev = written(tmp_path, [{"text": "Good film!", "label": "positive"}], "dev.jsonl")
    report = check(train, eval_ref=dev)
    assert report.labels == {"pos": 1, "neg": 1}
    assert report.leaked.count == 1
    assert [w.kind for w in report.problems.warnings] == ["unknown_label"]


HELD_ROWS = [{"text": "Good film!", "label": "pos"}, {"text": "new", "label": "neg"}]
ODD = {"text": "bad film", "label": "odd"}  # asked in training too, and of a class that no one has
MEASURED = [  # goal, tokenizer, the evaluation set: faults of it as (kind, lines), rows asked in training
    (Classify(), TOKENIZER, HELD_ROWS, [], 1),
    (Classify(), TOKENIZER, [*HELD_ROWS, ODD], [("unknown_label", [3])], None),
    (Classify(), TOKENIZER, [ODD], [("unknown_label", [1])], None),
    (Classify(), None, [*HELD_ROWS, ODD], [], 2),  # without a model nothing is encoded,
    (None, TOKENIZER, [*HELD_ROWS, ODD], [], 2),  # and without an objective nothing is measured
    (None, None, [*HELD_ROWS, ODD], [], 2),
]


@pytest.mark.parametrize(("goal", "tokenizer", "held", "faults", "leaked"), MEASURED, ids=range(len(MEASURED)))
def test_an_evaluation_row_that_could_not_be_measured_is_an_error(tmp_path, goal, tokenizer, held, faults, leaked):
    train = written(tmp_path, [{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}])
    dev = written(tmp_path, held, "dev.jsonl")
    report = check(train, tokenizer, dev, Reading(goal=goal))
    assert [(p.kind, p.lines) for p in report.held.errors] == faults
    assert report.ok is not bool(faults)
    assert (report.leaked.count if report.leaked else None) == leaked
    assert report.held.good == len(held) - len(faults)
    warned = ODD in held and not faults  # an error is not a warning too
    assert [w.kind for w in report.problems.warnings] == ["unknown_label"] * warned


def shown(report, **options):
    out = io.StringIO()
    report.print(Console(file=out, width=200, **options))
    return out.getvalue()


def test_the_sample_is_shown_with_its_mask(tmp_path):
    path = written(tmp_path, [{"prompt": "[bold]Ask[/bold] \x1b[31m", "completion": "Say [red]"}])
    plain = shown(check(path, TOKENIZER))
    assert "[bold]Ask[/bold] \\x1b[31m>>Say [red]<|im_end|><<" in plain
    assert "\x1b" not in plain
    colour = shown(check(path, TOKENIZER), force_terminal=True, color_system="truecolor")
    assert "\x1b[1;32mSay [red]<|im_end|>\x1b[0m" in colour
    assert "\x1b[31m" not in colour


def test_problems_are_printed_with_place_reason_and_fix(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] + [{"prompt": "a", "completion": ""}] * 7
    text = shown(check(written(tmp_path, rows)))
    assert "a.jsonl: 8 rows, 1 usable (1 pair), 7 not" in text
    assert "a.jsonl:2: [empty_field] completion: the text is empty. Write a text, or leave the row out" in text
    assert "(7 times: lines 2, 3, 4, 5, 6, ...)" in text


def damaged(data, draw):
    """The bytes with a few random edits."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 30])):
        at = draw.randrange(len(data) + 1)
        other = draw.randrange(len(data) + 1)
        edit = draw.choice(["flip", "drop", "insert", "copy", "cut"])
        if edit == "flip" and data:
            data[min(at, len(data) - 1)] = draw.randrange(256)
        elif edit == "drop":
            del data[at : at + draw.choice([1, 2, 10, 100])]
        elif edit == "insert":
            data[at:at] = draw.choice(
                [b'"', b"{", b"\n", b"null", b"\\", b"\xff", b"\0", b"1e999", b"NaN", b"\\ud800", b"}]"]
            )
        elif edit == "copy":
            data[at:at] = data[other : other + 50]
        elif draw.random() < 0.2:
            del data[at:]
    return bytes(data)


def test_random_damage_never_raises(tmp_path):
    draw = random.Random(0)
    small = [case for case in cases() if case.data and len(case.data) < 20_000]
    for _ in range(500):
        case = draw.choice(small)
        path = tmp_path / case.file.replace("/", "-")
        path.write_bytes(damaged(case.data, draw))
        report = check(path, TOKENIZER, how=Reading(encoding=Encoding(max_length=64)))
        assert report.problems.good >= 0
        assert report.problems.good or report.problems.errors
        assert json.dumps(report.to_json())


HELD = [
    ("nowhere.jsonl", None, "missing_file"),
    ("empty.jsonl", "", "empty_file"),
    ("broken.jsonl", '{"prompt": \n', "broken_json"),
    ("half.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": 1\n', "broken_json"),
]


@pytest.mark.parametrize(("name", "text", "kind"), HELD)
def test_an_evaluation_set_that_cannot_be_used_is_an_error_and_no_claim(tmp_path, name, text, kind):
    rows = written(tmp_path, [{"prompt": "a", "completion": "b"}])
    if text is not None:
        (tmp_path / name).write_text(text)
    report = check(rows, eval_ref=tmp_path / name)
    shown = Console(file=io.StringIO(), width=200)
    report.print(shown)
    assert not report.ok
    assert report.to_json()["leaked"] is None
    assert "no leakage" not in shown.file.getvalue()
    assert [p.count for p in report.errors] == [1]
    assert name in report.to_json()["errors"][0]["file"]


def test_a_row_without_its_answer_names_keys_there_are(tmp_path):
    rows = written(tmp_path, [{"prompt": "ab " * 50, "completion": "b"}])
    (problem,) = check(rows, TOKENIZER, how=Reading(encoding=Encoding(max_length=16))).errors
    assert "Raise train.max_length to " in problem.fix
    assert "truncate" not in problem.fix
