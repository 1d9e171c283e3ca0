"""Answers of a context that are given as texts: found, remarked on, or refused with file, line and answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_run as t
from deltatune.blocks import wanted
from deltatune.data.formats import load
from deltatune.data.wanted import Intake
from deltatune.objectives import OBJECTIVES, build
from deltatune.train.run import run

CONTEXT = "Paris is old. Paris is in France."
QA = Intake(wanted=wanted("qa"))
FOUND = [  # the row's columns beside question and context -> (text, start) of each answer
    ({"answer": "France"}, (("France", 26),)),
    ({"answers": "France"}, (("France", 26),)),
    ({"answers": ["old", "France"]}, (("old", 9), ("France", 26))),
    ({"answers": {"text": "France"}}, (("France", 26),)),
    ({"answers": {"text": ["old"]}}, (("old", 9),)),
    ({"answers": [{"text": "old"}, {"text": "Paris", "answer_start": 14}]}, (("old", 9), ("Paris", 14))),
    ({"answers": '["old"]'}, (("old", 9),)),  # a cell of a csv file
    ({"answers": []}, ()),
    ({"answers": {"text": [], "answer_start": []}}, ()),
    ({"answers": {"text": ["Paris"], "answer_start": [14]}}, (("Paris", 14),)),
    ({"answer": "[1]", "context": "see [1] there"}, (("[1]", 4),)),
]


def rows(path: Path, *given: dict) -> str:
    return t.lines(path, [{"question": "Where?", "context": CONTEXT, **row} for row in given])


@pytest.mark.parametrize(("row", "answers"), FOUND, ids=[json.dumps(row) for row, _ in FOUND])
def test_an_answer_given_as_a_text_is_found_in_the_context(tmp_path, row, answers):
    found, problems = load(rows(tmp_path / "qa.jsonl", row), QA)
    assert found[0].extra["answers"] == answers
    assert problems.warnings == []


def test_an_answer_that_stands_there_twice_is_remarked_on_with_its_lines(tmp_path):
    file = rows(tmp_path / "qa.jsonl", {"answer": "old"}, {"answer": "Paris"}, {"answer": "is"})
    found, problems = load(file, QA)
    assert [e.extra["answers"] for e in found] == [(("old", 9),), (("Paris", 0),), (("is", 3),)]
    (remark,) = problems.warnings
    assert (remark.kind, remark.count, remark.lines) == ("answer_ambiguous", 2, [2, 3])
    assert "qa.jsonl:2: [answer_ambiguous] answer: 'Paris' is 2 times in the context: the first counts" in str(remark)


LOST = [
    ({"answer": "Rome"}, r"qa\.jsonl:1: \[answer_lost\] answer: the answer 'Rome' does not stand in the context"),
    ({"answer": "france"}, r"'france' does not stand in the context.*Did you mean 'France'\?"),
    ({"answers": ["old", "new"]}, r"answers\[1\]: the answer 'new'"),
    ({"answer": ""}, r"answer: the answer is ''.*answers: \[\] says that there is none"),
    ({"answer": None}, r"answer: neither texts nor two lists of one length: None"),
    ({"answers": {"text": ["old", "is"], "answer_start": [9]}}, "two lists of one length"),
]


@pytest.mark.parametrize(("row", "said"), LOST, ids=[json.dumps(row) for row, _ in LOST])
def test_an_answer_that_is_not_there_is_an_error_with_file_line_and_answer(tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        load(rows(tmp_path / "qa.jsonl", row), QA)


def test_other_objectives_read_question_and_answer_as_before(tmp_path):
    found, _ = load(rows(tmp_path / "qa.jsonl", {"answer": "Rome"}))
    assert (found[0].prompt, found[0].completion) == ("Where?", "Rome")


def test_a_run_learns_from_texts_and_says_what_was_ambiguous(tmp_path):
    said = ["good", "film", "was"]
    given = [{"question": "was it", "context": "the film was good it was", "answer": word} for word in said] * 2
    file = t.lines(tmp_path / "qa.jsonl", given)
    config = t.config(
        t.masked_model(tmp_path / "bert"), file, file, objective="qa",
        train={"steps": 2, "batch_rows": 4, "batch_tokens": None},
    )  # fmt: skip
    done = run(config, out=tmp_path / "run")
    assert done.status == "done"
    assert any("answer_ambiguous" in note and "lines 3, 6" in note for note in done.summary["notes"])


# ---- what an objective reads, with and without torch -----------------------------------------------------------------
BLOCKS = [
    *({name: {}} for name in OBJECTIVES),
    {"sft": {"template": "{topic} <soft>"}},
    {"cloze": {"template": "{title} is <mask>"}},
    {"choice": {"template": "{title}: <mask>"}},
]


@pytest.mark.parametrize("block", BLOCKS, ids=json.dumps)
def test_what_an_objective_reads_is_known_without_torch(block):
    assert wanted(block) == build(block).wants


# ---- rows without what is learned ------------------------------------------------------------------------------------
BARE = [  # objective, a row, what the error says of it
    ("classify", {"text": "good", "gold": "pos"}, r"label: it is what the objective learns.*\(columns text, gold\)"),
    ("cloze", {"text": "good", "lable": "pos"}, r"\(columns text, lable\)\. Add it\. Did you mean 'lable'\?"),
    ("choice", {"text": "good", "choices": ["a", "b"]}, r"label: .*\(columns text, choices\)"),
    ("tag", {"text": "good", "label": "pos"}, r"tags: .*\(columns text, label\)"),
    ("qa", {"question": "who", "context": "ann"}, r"answers: .*\(columns question, context\)"),
]


@pytest.mark.parametrize(("name", "row", "said"), BARE, ids=[name for name, *_ in BARE])
def test_rows_without_what_is_learned_say_their_columns_and_the_way_out(tmp_path, name, row, said):
    goal = build(name)
    file = t.lines(tmp_path / "rows.jsonl", [row, row])
    if name == "qa":
        found = load(file, Intake(wanted=goal.wants, asks=True))[0]
    else:
        found = load(file, Intake(format=None if name == "tag" else "text"))[0]
    with pytest.raises(ValueError, match=said) as error:
        goal.fit(found)
    assert f"rows.jsonl:1: [missing_field] {goal.wants.answer[0]}: " in str(error.value)
    assert "(2 times: lines 1, 2)" in str(error.value)
    assert f"data.columns: {{yours: {goal.wants.answer[0]}}}" in str(error.value)
