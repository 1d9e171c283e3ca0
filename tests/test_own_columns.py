"""Rows of the user's own columns under a template: every reader takes the same rows, and names the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_run as t
from deltatune import SFT, Classify, Cloze, LoRA, attach, train
from deltatune.cli import main
from deltatune.data.check import Reading, check
from deltatune.data.formats import converted, examples, load
from deltatune.data.problems import Problems
from deltatune.data.readers import Row
from deltatune.data.sources import renamed
from deltatune.data.stream import Order, stream
from deltatune.data.wanted import Intake, Wanted
from deltatune.train.run import run
from deltatune.train.sets import read_sets
from models import tiny

ABOUT = "{title}: {body} It was <mask>."
CLOZE = Cloze(ABOUT, {"pos": ["good"], "neg": ["bad"]})
BLOCK = {"cloze": {"template": ABOUT, "labels": {"pos": ["good"], "neg": ["bad"]}}}
ROW = {"title": "the film", "body": "was nice", "label": "pos"}
INTAKE = Intake(wanted=CLOZE.wants)


def own_rows(path, name: str = "label", count: int = 8) -> str:
    said = (("nice", "pos"), ("sad", "neg"))
    rows = [{"title": f"a film {i}", "body": f"it was {said[i % 2][0]}", name: said[i % 2][1]} for i in range(count)]
    return t.lines(path, rows)


def kinds(path, how: Intake) -> list[tuple[str, str, list[int]]]:
    problems = Problems()
    list(examples(path, problems, how))
    return [(p.kind, p.field, p.lines) for p in problems.errors]


READ = [  # template, objective, row -> (what the template reads of it, label, completion)
    (CLOZE, ROW, ["the film", "was nice"], "pos", None),
    (CLOZE, {**ROW, "body": ""}, ["the film", ""], "pos", None),
    (CLOZE, {**ROW, "text": None, "prompt": "p"}, ["the film", "was nice"], "pos", None),  # what is not named
    (Cloze("{year} {title} <mask>"), {**ROW, "year": 1990}, ["1990", "the film"], "pos", None),
    (Cloze("{title} {text} <mask>"), {**ROW, "text": "x"}, ["the film", "x"], "pos", None),
    (
        Cloze("{title} {text} <mask>"),
        {**ROW, "review": "x"},
        ["the film", "x"],
        "pos",
        None,
    ),  # a text by its other name
    (SFT(template="{title}: {text}"), {"title": "a", "text": "b", "output": "c"}, ["a", "b"], None, "c"),
    (SFT(template="{instruction} {output}"), {"instruction": "a", "output": "b", "answer": "c"}, ["a", "b"], None, "c"),
]


@pytest.mark.parametrize(("goal", "row", "said", "label", "completion"), READ)
def test_a_row_with_the_columns_that_are_named_is_read_as_it_is(tmp_path, goal, row, said, label, completion):
    (found,), _ = load(t.lines(tmp_path / "a.jsonl", [row]), Intake(wanted=goal.wants))
    assert [found.column(name) if name in found.row else found.text for name in goal.wants.columns] == [
        row.get(name, "x") for name in goal.wants.columns
    ]
    from deltatune.prompting.template import Template

    parts = Template(goal.template, gap=goal.name == "cloze").parts(found)
    assert [p.text for p in parts if p.own] == said
    assert (found.label, found.completion) == (label, completion)


FAULTS = [  # row -> kind, column, words
    ({"title": "a", "label": "pos"}, "missing_field", "body", "this row does not have it. Its columns: title, label."),
    ({"title": "a", "bdy": "b", "label": "pos"}, "missing_field", "body", "Did you mean 'bdy'?"),
    ({**ROW, "body": ["b"]}, "data_type", "body", "it is no text here: ['b']"),
    ({**ROW, "body": None}, "null_field", "body", "the value is null"),
    ({**ROW, "title": " ", "body": ""}, "empty_field", "title, body", "every column that the template reads is empty"),
    ({"title": "a", "body": "b"}, "missing_field", "label", "Name yours: data.columns: {yours: label}"),
    ({**ROW, "label": None}, "missing_label", "label", "the label is empty"),
]


@pytest.mark.parametrize(("row", "kind", "column", "words"), FAULTS)
def test_what_a_row_lacks_is_told_with_file_line_column_and_way_out(tmp_path, row, kind, column, words):
    path = t.lines(tmp_path / "a.jsonl", [ROW, row, ROW])
    problems = Problems()
    assert len(list(examples(path, problems, INTAKE))) == 2
    (fault,) = problems.errors
    assert (fault.kind, fault.field, fault.where) == (kind, column, f"{path}:2")
    assert words in str(fault)


@pytest.mark.parametrize("row", [case[0] for case in FAULTS], ids=range(len(FAULTS)))
def test_the_check_the_stream_and_the_run_refuse_the_same_rows(tmp_path, row):
    other = {**ROW, "label": "neg", "body": "was sad"}
    path = t.lines(tmp_path / "a.jsonl", [ROW, other, row])
    report = check(path, how=Reading(INTAKE, goal=CLOZE))
    assert (report.problems.good, report.problems.bad) == (2, 1)
    problems = Problems()
    assert len(list(stream([path], problems, Order(shuffle=False), how=INTAKE))) == 2
    assert [p.lines for p in problems.errors] == [p.lines for p in report.problems.errors] == [[3]]
    with pytest.raises(ValueError, match=r"1 of 3 rows cannot be used:\n.*a\.jsonl:3"):
        load(path, INTAKE)
    good = t.lines(tmp_path / "b.jsonl", [ROW, other])
    assert check(good, how=Reading(INTAKE, goal=CLOZE)).ok


OTHERS = [  # how rows are read, the first row, a row of another form: what is wrong with it, None where nothing is
    (Intake(columns={"q": "prompt", "a": "completion"}), {"q": "x", "a": "y"}, {"text": "z"}, "mixed_schema"),
    (INTAKE, ROW, {"text": "z", "title": "t", "label": "pos"}, "missing_field"),
    (Intake("text"), {"text": "x", "prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"},
     "mixed_schema"),
    (Intake("text"), {"text": "x", "prompt": "p", "completion": "c"}, {"text": "z"}, None),
    (Intake(wanted=Classify.wants, asks=True), {"text": "x"}, {"text": "z", "label": "pos"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("how", "first", "other", "fault"), OTHERS, ids=range(len(OTHERS)))
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("broken", [0, 1])
def test_the_first_row_tells_the_form_of_a_stream_wherever_it_begins(tmp_path, how, first, other, fault, start, broken):
    """As it is read: under its columns' other names, as a template names them, in the format that is given."""
    path = Path(t.lines(tmp_path / "a.jsonl", [first, first, other]))
    path.write_text("3\n" * broken + path.read_text())
    problems = Problems()
    found = [s.example for s in stream([path], problems, Order(shuffle=False), start + broken, how)]
    whole = list(examples(path, Problems(), how))
    assert found == whole[start:]
    assert [(p.kind, p.lines) for p in problems.errors if p.kind != "json_syntax"] == (
        [(fault, [3 + broken])] if fault else []
    )
    assert len({example.kind for example in whole}) == 1


# ---- renamed columns -------------------------------------------------------------------------------------------------
def test_a_renamed_column_has_both_its_names(tmp_path):
    path = t.lines(tmp_path / "a.jsonl", [{"headline": "h", "story": "s", "category": "pos", "text": "old"}])
    how = Intake(columns={"story": "text", "category": "label"}, wanted=Cloze("{headline} {story} {text} <mask>").wants)
    (found,), _ = load(path, how)
    assert [found.column(name) for name in ("headline", "story", "text")] == ["h", "s", "s"]  # the new name goes first
    assert found.label == "pos"
    (plain,), _ = load(path, Intake(columns={"story": "text", "category": "label"}))
    assert (plain.text, plain.kind) == ("s", "classification")


@pytest.mark.parametrize("wanted", [CLOZE.wants, Cloze().wants, Wanted()], ids=["own", "text", "none"])
def test_a_renamed_column_that_is_not_there_is_named(tmp_path, wanted):
    path = own_rows(tmp_path / "a.jsonl", "category")
    problems = Problems()
    list(examples(path, problems, Intake(columns={"storey": "text", "catgory": "label"}, wanted=wanted)))
    said = str(problems.errors[0])
    assert "data.columns names 'catgory', which is no column here. Did you mean 'category'?" in said


def test_a_renamed_column_of_no_row_is_refused(tmp_path):
    """Its rows could be read without it, so that nothing else would say so."""
    rows = t.lines(tmp_path / "rows.jsonl", [{"text": "good film", "label": "pos"}] * 4)
    config = t.config("any", rows, objective="classify", data={"columns": {"txet": "text"}})
    with pytest.raises(ValueError, match=r"\{txet: text\}: no training row has .*'txet'.* text, label.*mean 'text'"):
        read_sets(config, [])


def test_columns_the_wrong_way_round_are_seen(tmp_path):
    path = own_rows(tmp_path / "a.jsonl", "category")
    assert kinds(path, Intake(columns={"category": "label"}, wanted=CLOZE.wants)) == []
    for wanted in (CLOZE.wants, Cloze().wants):
        problems = Problems()
        list(examples(path, problems, Intake(columns={"label": "category"}, wanted=wanted)))
        assert "Did you mean columns: {category: label}? The left side is the column in your file" in str(
            problems.errors[-1]
        )


def test_a_template_does_not_read_the_answer_under_its_own_name():
    with pytest.raises(ValueError, match=r"\{category\} would tell the answer"):
        Intake(columns={"category": "label"}, wanted=Cloze("{title} {category} <mask>").wants)


@pytest.mark.parametrize(
    "columns",
    [{"body": "text", "text": "label"}, {"label": "text", "y": "label"}, {"body": "text", "folder": "label"}],
    ids=str,
)
def test_rows_that_ask_lose_the_answer_alone(columns):
    """A new name of one column may be the old name of another."""
    row = Row({old: {"text": "it was", "label": "pos"}[new] for old, new in columns.items()}, "f:1")
    for asks, label in ((False, "pos"), (True, None)):
        how = Intake(columns=columns, wanted=Classify().wants, asks=asks)
        (found,) = converted([renamed(row, columns)], Problems(), how)
        assert (found.text, found.label) == ("it was", label)
        assert asks is ("pos" not in found.row.values())


@pytest.mark.parametrize("streaming", [False, True])
def test_two_columns_of_a_row_cannot_get_one_name(tmp_path, streaming):
    path = t.lines(tmp_path / "a.jsonl", [{"review": "a"}, {"body": "b"}, {"review": "a", "body": "b"}])
    problems, how = Problems(), Intake(columns={"review": "text", "body": "text"})
    found = [s.example for s in stream([path], problems, how=how)] if streaming else examples(path, problems, how)
    assert sorted(row.text for row in found) == ["a", "b"]
    assert [(p.kind, p.field, p.lines) for p in problems.errors] == [("renamed_twice", "text", [3])]


# ---- whole runs ------------------------------------------------------------------------------------------------------
def call(*words, code: int = 0):
    found = CliRunner().invoke(main, [str(word) for word in words])
    assert found.exit_code == code, found.output
    return found


def test_a_run_its_check_its_resume_and_its_evaluation_read_the_same_rows(tmp_path):
    model = t.masked_model(tmp_path / "bert")
    rows, held = own_rows(tmp_path / "a.jsonl", "category"), own_rows(tmp_path / "e.jsonl", "category", 4)
    more = {"data": {"columns": {"category": "label"}, "ood": {"far": held}}, "objective": BLOCK}
    made = t.config(
        model, rows, held, **more, train={"steps": 2, "batch_rows": 4, "batch_tokens": None, "save_every": 1}
    )
    done = run(made, out=tmp_path / "run")
    assert done.status == "done"
    assert call("resume", tmp_path / "run").exit_code == 0
    words = ["--objective", json.dumps(BLOCK), "--model", model, "--json"]
    named = ["--set", "data.columns={category: label}"]
    said = json.loads(call("data", "check", rows, "--eval", held, *words, *named).stdout)
    assert (said["ok"], said["rows"]["good"], said["labels"]) == (True, 8, {"pos": 4, "neg": 4})
    assert "[MASK]" in "".join(text for text, _ in said["sample"]["pieces"])  # the row as the objective makes it
    refused = json.loads(call("data", "check", rows, *words, code=2).stdout)
    assert [(e["kind"], e["field"], e["count"]) for e in refused["errors"]] == [("missing_field", "label", 8)]
    found = json.loads(call("eval", "--adapter", tmp_path / "run", "--data", held, "--json").stdout)
    assert found["accuracy"] == done.summary["after"]["accuracy"]


def test_the_check_refuses_what_only_the_objective_can_tell(tmp_path):
    model = t.masked_model(tmp_path / "bert")
    rows = own_rows(tmp_path / "a.jsonl")
    odd = json.dumps({"cloze": {"template": ABOUT, "labels": {"pos": ["good film"], "neg": ["bad"]}}})
    said = json.loads(call("data", "check", rows, "--objective", odd, "--model", model, "--json", code=2).stdout)
    assert "'good film' is 2 tokens" in said["errors"][0]["reason"]
    short = json.dumps({"cloze": {"template": ABOUT, "labels": {"pos": ["good"]}}})
    said = json.loads(call("data", "check", rows, "--objective", short, "--json", code=2).stdout)
    assert "objective.cloze.labels has no words for the class 'neg'" in said["errors"][0]["reason"]


@pytest.mark.parametrize("streaming", [False, True])
def test_sft_learns_and_answers_from_own_columns(tmp_path, streaming):
    model = t.chat_model(tmp_path / "llama")
    rows = t.lines(tmp_path / "a.jsonl", [{"topic": f"t{i}", "story": "abc", "summary": "x"} for i in range(8)])
    objective = {"sft": {"template": "{topic}: {story}\n"}}
    data = {"columns": {"summary": "completion"}, "streaming": streaming}
    made = t.config(model, rows, objective=objective, data=data, train={"steps": 2, "save_every": None})
    assert run(made, out=tmp_path / "run").status == "done"
    asked = t.lines(tmp_path / "q.jsonl", [{"topic": "t1", "story": "abc"}])
    said = call("generate", "--adapter", tmp_path / "run", "--data", asked, "--max-new-tokens", "2", "--json")
    assert len(json.loads(said.stdout)["answers"]) == 1
    gap = t.lines(tmp_path / "gap.jsonl", [{"topic": "t1"}])
    refused = call("generate", "--adapter", tmp_path / "run", "--data", gap, code=2)
    assert "gap.jsonl:1: [missing_field] story" in " ".join(refused.stderr.split())


def test_from_python(tmp_path):
    tokenizer = t.tt.bert_like(t.WORDS)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    model = attach(tiny("bert", vocab_size=len(tokenizer)), LoRA(r=2))
    rows = own_rows(tmp_path / "a.jsonl", "category")
    given = {"columns": {"category": "label"}, "steps": 1, "batch_rows": 4, "retention": False, "observers": ()}
    done = train(model, CLOZE, data=rows, tokenizer=tokenizer, out=tmp_path / "run", **given)
    assert done.status == "done"
    del given["columns"]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: \[missing_field\] label"):
        train(model, CLOZE, data=rows, tokenizer=tokenizer, out=tmp_path / "other", **given)
