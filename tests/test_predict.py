"""Asking trained models about new rows: what is said of each, in order, the same as what evaluation measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny_run as t
import tiny_tokenizers as tt
from conformance import stir
from deltatune import QA, Choice, Classify, Cloze, LoRA, Prompt, Tag, activate, attach, disabled, predict
from deltatune.cli import main
from deltatune.commands.predict import words
from deltatune.core.attach import rows as per_row
from deltatune.data.encode import Reading
from deltatune.evaluate.score import answered as with_references
from deltatune.evaluate.score import predict as measured
from deltatune.train.job import prepare
from deltatune.train.predict import Asked, given_fields, row_of
from deltatune.train.run import open_adapted, run
from models import tiny

WORDS = tt.bert_like(t.WORDS)
WORDS.add_special_tokens({"mask_token": "[MASK]"})
SHORT = {"steps": 2, "batch_rows": 4, "batch_tokens": None}


def call(*given, stdin: str = "", code: int = 0):
    found = CliRunner().invoke(main, [str(word) for word in given], input=stdin)
    assert found.exit_code == code, found.output
    return found


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# ---- what is said of a row, by hand ----------------------------------------------------------------------------------
TWO = torch.tensor([0.0, 1.0])
HALVES = {"neg": pytest.approx(0.268941, abs=1e-6), "pos": pytest.approx(0.731059, abs=1e-6)}
SPANS = (None, (0, 2), (2, 6), (6, 10), None)  # of "it was ann"
START = torch.tensor([[[0.0, 0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0, 0.0]]])
SHOWN = [  # objective, parts, row, what is said
    (Classify("single", ("neg", "pos")), [TWO], {}, {"label": "pos", "scores": HALVES}),
    (Classify("multi", ("neg", "pos")), [torch.tensor([-1.0, 1.0])], {}, {"labels": ("pos",), "scores": HALVES}),
    (Classify("regression", ()), [torch.tensor([2.5])], {}, {"score": 2.5}),
    (Cloze(labels={"neg": ["bad"], "pos": ["good", "fine"]}), [TWO], {},
     {"label": "pos", "words": ("good", "fine"), "scores": HALVES}),
    (Choice(labels={"neg": "it is bad", "pos": "it is good"}), [TWO], {},
     {"label": "pos", "answer": "it is good", "scores": HALVES}),
    (Choice(), [torch.tensor([0.0, 1.0, -torch.inf])], {"choices": ["neg", "pos"]},
     {"label": 1, "answer": "pos", "scores": HALVES}),
    (Tag(("O", "B-PER", "I-PER")), [[torch.tensor([0.0, 9.0, 0.0]), torch.tensor([0.0, 0.0, 9.0]), None]],
     {"tokens": ("ann", "lee", "was")}, {"words": ("ann", "lee", "was"), "tags": ("B-PER", "I-PER", "O"),
     "entities": [{"type": "PER", "text": "ann lee", "start": 0, "end": 2}]}),
    (QA(), [(START, Reading("it was ann", SPANS))], {}, {"answer": "ann", "start": 7, "end": 10}),
]  # fmt: skip


@pytest.mark.parametrize(("goal", "parts", "row", "said"), SHOWN, ids=[f"{c[0].name}-{i}" for i, c in enumerate(SHOWN)])
def test_what_is_shown_of_a_row(goal, parts, row, said):
    from deltatune.data.example import Example

    found = goal.shown(parts, goal.asked(Example("f:1", text="who", text_pair="it was ann", extra=row)))
    assert {key: found[key] for key in said} == said
    if goal.name == "tag":
        assert found["scores"][2] is None
        assert found["scores"][0]["B-PER"] == pytest.approx(0.99975, abs=1e-4)
    if goal.name == "qa":
        assert found["score"] == pytest.approx(float(START[0, 0].softmax(-1)[3]) ** 2, rel=1e-5)
        none = QA(unanswerable=True).shown([(-START, Reading("it was ann", SPANS))], Example("f:1"))
        assert (none["answer"], none["start"], none["end"]) == ("", None, None)


# ---- runs ------------------------------------------------------------------------------------------------------------
def labelled(said: list[str]) -> list[dict]:
    return [{"id": f"r{i}", "text": s, "label": "pos" if "good" in s else "neg"} for i, s in enumerate(said)]


TEXTS = ["it was good", "bad", "the film was good good good", "sad plot", "nice"]
TAGGED = [{"tokens": ["ann", "was", "good"], "tags": ["B-PER", "O", "O"]}, {"tokens": ["film"], "tags": ["I-PER"]}] * 3
ASKED = [
    {"question": "was it", "context": "the film was " + "very " * n + "good", "answers": {
        "text": ["good"], "answer_start": [13 + 5 * n]}} for n in (0, 3, 30)
]  # fmt: skip
RUNS = {  # rows, the column of the answer
    "classify": (labelled(TEXTS), "label"),
    "cloze": (labelled(TEXTS), "label"),
    "tag": (TAGGED, "tags"),
    "qa": (ASKED, "answers"),
}
OPTIONS = {"cloze": {"template": "{text} It was <mask>.", "labels": {"pos": ["good"], "neg": ["bad"]}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run of each objective on a tiny BERT."""
    folder = tmp_path_factory.mktemp("made")
    model = t.masked_model(folder / "bert")
    for name, (rows, _) in RUNS.items():
        file = t.lines(folder / f"{name}.jsonl", rows)
        block = {name: OPTIONS.get(name, {})}
        made = t.config(model, file, file, objective=block, train={**SHORT, "max_length": 20, "lr": 0.05})
        assert run(made, out=folder / name).status == "done"
        answer = RUNS[name][1]
        t.lines(folder / f"{name}-new.jsonl", [{k: v for k, v in r.items() if k != answer} for r in rows])
    return folder


KEY = {"classify": "label", "cloze": "label", "tag": "tags", "qa": "answer"}


@pytest.mark.parametrize("name", list(RUNS))
def test_predictions_are_what_evaluation_measures_whatever_the_batch(made, name):
    model, tokenizer, record = open_adapted(str(made / "bert"), made / name / "adapter")
    job = prepare(t.config(made / "bert", str(made / f"{name}.jsonl"), objective=record["objective"],
                           train={**SHORT, "max_length": 20}))  # fmt: skip
    job.model, job.tokenizer = model, tokenizer
    wanted, _ = measured(job, with_references(job, job.train)[0])
    found = predict(model, None, made / f"{name}-new.jsonl", tokenizer=tokenizer)
    assert [one["index"] for one in found] == list(range(len(RUNS[name][0])))
    assert [one[KEY[name]] for one in found] == [w if isinstance(w, str) else tuple(w) for w in wanted]
    assert predict(model, None, RUNS[name][0], tokenizer=tokenizer) == found  # rows in memory; answers are not read
    alone = predict(model, name, made / f"{name}.jsonl", tokenizer=tokenizer, batch=1)
    assert [one[KEY[name]] for one in alone] == [one[KEY[name]] for one in found]
    if name in ("classify", "cloze"):
        assert [one["id"] for one in found] == [f"r{i}" for i in range(5)]
        for one in found:
            assert sum(one["scores"].values()) == pytest.approx(1)
            assert one["label"] == max(one["scores"], key=one["scores"].get)
        with disabled(model):
            base = predict(model, record["objective"], RUNS[name][0], tokenizer=tokenizer)
        assert base != found
    if name == "qa":
        for row, one in zip(ASKED, found, strict=True):
            assert row["context"][one["start"] : one["end"]] == one["answer"]


def test_the_command_says_them_as_lines_a_document_or_a_file(made, tmp_path):
    words_ = ["predict", "--adapter", made / "classify"]
    said = lines(call(*words_, "--data", made / "classify-new.jsonl").stdout)
    assert [one["id"] for one in said] == [f"r{i}" for i in range(5)]
    piped = call(*words_, "--data", "-", stdin=(made / "classify-new.jsonl").read_text())
    assert lines(piped.stdout) == said
    document = json.loads(call(*words_, "--data", made / "classify-new.jsonl", "--batch", "2", "--json").stdout)
    assert [one["label"] for one in document["predictions"]] == [one["label"] for one in said]
    out = tmp_path / "p.jsonl"
    told = call(*words_, "--data", made / "classify-new.jsonl", "--out", out)
    assert (lines(out.read_text()), told.stdout) == (said, "")
    assert "5 predictions are in" in told.stderr
    assert "is there already" in call(*words_, "x", "--out", out, code=2).stderr
    (one,) = lines(call(*words_, TEXTS[0]).stdout)
    assert one["scores"] == pytest.approx(said[0]["scores"], rel=1e-4)
    (tagged,) = lines(call("predict", "--adapter", made / "tag", "ann was good").stdout)
    assert tagged["words"] == ["ann", "was", "good"]
    row = json.dumps({"question": "was it", "context": "the film was good"})
    (answer,) = lines(call("predict", "--adapter", made / "qa", row).stdout)
    assert "the film was good"[answer["start"] : answer["end"]] == answer["answer"]


REFUSED = [
    (["--adapter", "classify"], "give TEXT or --data FILE"),
    (["--adapter", "classify", "a", "--data", "x"], "give TEXT or --data FILE"),
    (["--adapter", "classify", "a", "--out", "none/p.jsonl"], "there is no folder none"),
    (["--adapter", "classify", "a", "--set", "train.lr=1"], "only data.format, data.columns can be set here"),
    (["--adapter", "classify", "a", "--soft-prompt", "1"], "prompt 1: there are 1, counted from 0"),
    (["--adapter", "classify", "a", "--combine", "vot"], "Did you mean 'vote'?"),
    (["--adapter", "classify", "a", "--task", "sst"], "no task 'sst'"),
    (["--adapter", "qa", "was it"], 'give {"question": "...", "context": "..."}'),
    (
        ["--adapter", "qa", "--data", "classify.jsonl"],
        "classify.jsonl:1: [missing_field] question: the adapter's run read question, context",
    ),
    (["--adapter", "tag", "--data", "classify.jsonl"], "classify.jsonl:1: [missing_field] tokens"),
    (["--adapter", "classify", "--data", "none.jsonl"], "there is no such file"),
    (["--model", "bert", "--objective", "classify", "a"], "no run says which classes there are: give --adapter RUN"),
    (["--model", "bert", "--objective", "cloze", "a"], "cloze does not know which classes there are"),
    (["--model", "llama", "a"], "deltatune generate --model llama --data FILE"),
]


@pytest.mark.parametrize(
    ("given", "said"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_cannot_be_asked_says_why(made, monkeypatch, given, said):
    monkeypatch.chdir(made)
    if not Path("llama").exists():
        t.chat_model(Path("llama"))
    assert said in " ".join(call("predict", *given, code=2).stderr.split())


def test_from_python_errors_name_the_row_and_the_keyword(made):
    model, tokenizer, _ = open_adapted(str(made / "bert"), made / "classify" / "adapter")
    with pytest.raises(ValueError, match=r"predict\(\) has no keyword 'bach'. Did you mean 'batch'"):
        predict(model, None, ["a"], tokenizer=tokenizer, bach=2)
    with pytest.raises(ValueError, match="predict batch must be a whole number >= 1, got 0"):
        predict(model, None, ["a"], tokenizer=tokenizer, batch=0)
    with pytest.raises(ValueError, match=r"row:2: \[empty_field\] text"):
        predict(model, None, ["a", {"text": ""}], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="rows are texts or"):
        predict(model, None, [3], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="give the objective"):
        predict(tiny("bert"), None, ["a"], tokenizer=tokenizer)
    assert predict(model, None, [], tokenizer=tokenizer) == []
    assert Asked() == Asked(None, None, None, None)
    renamed = predict(model, None, [{"body": "good"}], tokenizer=tokenizer, columns={"body": "text"})
    assert renamed == predict(model, None, ["good"], tokenizer=tokenizer)


def test_a_pair_without_its_label_and_a_template_of_one_column(made):
    model, tokenizer, _ = open_adapted(str(made / "bert"), made / "classify" / "adapter")
    (pair,) = predict(model, None, [{"premise": "good", "hypothesis": "bad", "label": None}], tokenizer=tokenizer)
    assert set(pair) == {"index", "label", "scores"}
    assert row_of("x", Cloze("{headline} <mask>")) == {"headline": "x"}
    assert row_of({"a": 1}, Cloze()) == {"a": 1}


USUAL = Cloze().template
GIVEN = [  # objective, what it says: fields that are read off training rows are left open
    ("qa", {"qa": {}}),
    ({"qa": None}, {"qa": {}}),
    ({"cloze": {"template": USUAL}}, {"cloze": {"template": USUAL}}),
    ({"cloze": {"template": None}}, {"cloze": {}}),
    (Cloze(), {"cloze": {"template": USUAL}}),
    (Cloze(labels={"a": ["x"]}), {"cloze": {"template": USUAL, "labels": {"a": ["x"]}}}),
    (Classify(), {"classify": {}}),
    (Classify(labels=("a", "b")), {"classify": {"labels": ("a", "b")}}),
    (Classify("single"), {"classify": {"kind": "single"}}),
    (Tag(), {"tag": {}}),
    (QA(), {"qa": {"longest": 30, "doc_stride": 128}}),
    (QA(unanswerable=True), {"qa": {"longest": 30, "doc_stride": 128, "unanswerable": True}}),
    (Choice(), {"choice": {"template": "{text} <mask>", "unlikelihood": 1.0, "length_normalised": 1.0,
                           "rank": "mean"}}),
]  # fmt: skip


@pytest.mark.parametrize(("goal", "said"), GIVEN, ids=[f"{i}" for i in range(len(GIVEN))])
def test_what_a_given_objective_says(goal, said):
    assert given_fields(goal) == said


def test_a_given_objective_wins_over_the_recorded_one(tmp_path):
    """Also where it is what the objective is without being told; class names are the record's."""
    model, file = t.masked_model(tmp_path / "bert"), t.lines(tmp_path / "rows.jsonl", labelled(TEXTS))
    block = {"cloze": {"template": "<mask> film: {text}", "labels": {"pos": ["good"], "neg": ["bad"]}}}
    run(t.config(model, file, objective=block, train={**SHORT, "lr": 0.05}), out=tmp_path / "run")
    opened, tokenizer, record = open_adapted(str(model), tmp_path / "run/adapter")

    def said(goal) -> list[float]:
        return [one["scores"]["pos"] for one in predict(opened, goal, TEXTS, tokenizer=tokenizer)]

    assert record["objective"]["cloze"]["template"] == block["cloze"]["template"]
    usual = said({"cloze": {"template": USUAL}})
    assert said(Cloze(template=USUAL)) == usual
    assert said(Cloze()) == usual
    assert said(None) == said("cloze") == said(block)
    assert said(None) != pytest.approx(usual, rel=1e-3)


# ---- several prompts -------------------------------------------------------------------------------------------------
def test_several_prompts_answer_together_or_alone():
    goal = Cloze(labels={"pos": ["good"], "neg": ["bad"]})
    model = attach(tiny("bert", vocab_size=len(WORDS)), Prompt(2, count=3))
    stir(model, "default", 0)
    ask = {"tokenizer": WORDS}
    alone = [predict(model, goal, TEXTS, prompt=k, **ask) for k in range(3)]
    assert len({json.dumps(one) for one in alone}) == 3  # the prompts disagree, or this could not fail
    mean = predict(model, goal, TEXTS, combine="average", **ask)
    for i, one in enumerate(mean):
        wanted = sum(said[i]["scores"]["pos"] for said in alone) / 3
        assert one["scores"]["pos"] == pytest.approx(wanted, rel=1e-4)
    voted = predict(model, goal, TEXTS, combine="vote", **ask)
    for i, one in enumerate(voted):
        said = [own[i]["label"] for own in alone]
        assert one["label"] == max(set(said), key=said.count)
    with pytest.raises(ValueError, match="prompt 3: there are 3, counted from 0"):
        predict(model, goal, TEXTS, prompt=3, **ask)


def test_the_active_adapter_answers():
    goal = Cloze(labels={"pos": ["good"], "neg": ["bad"]})
    model = attach(tiny("bert", vocab_size=len(WORDS)), LoRA(r=2), "first")
    attach(model, Prompt(2), "second")
    for name in ("first", "second"):
        stir(model, name, 0)
    said = []
    for name in ("first", "second"):
        activate(model, name)
        said.append(predict(model, goal, TEXTS, tokenizer=WORDS))
    with disabled(model):
        base = predict(model, goal, TEXTS, tokenizer=WORDS)
    assert base not in said
    assert said[0] != said[1]


def test_one_of_several_prompts_is_one_of_the_rows_own_task():
    goal = Cloze(labels={"pos": ["good"], "neg": ["bad"]})
    model = attach(tiny("bert", vocab_size=len(WORDS)), Prompt(2, count=2, tasks=("a", "b")))
    stir(model, "default", 0)
    asked = [{"text": "nice", "task": task} for task in "ab"]

    def scores(**how) -> list[float]:
        return [one["scores"]["pos"] for one in predict(model, goal, asked, tokenizer=WORDS, **how)]

    first, second, both = scores(prompt=0), scores(prompt=1), scores(combine="average")
    assert both == pytest.approx([(x + y) / 2 for x, y in zip(first, second, strict=True)], rel=1e-4)
    assert len({round(x, 4) for x in (*first, *second)}) == 4


def test_the_model_says_whether_a_row_may_have_several_labels():
    model = tiny("bert", "classify", vocab_size=len(WORDS))
    goal = Classify(labels=("a", "b", "c"))
    assert set(predict(model, goal, ["good"], tokenizer=WORDS)[0]) == {"index", "label", "scores"}
    model.config.problem_type = "multi_label_classification"
    assert set(predict(model, goal, ["good"], tokenizer=WORDS)[0]) == {"index", "labels", "scores"}


def test_the_prompts_of_all_active_adapters_ask_whichever_is_first():
    goal = Cloze(labels={"pos": ["good"], "neg": ["bad"]})
    model = attach(tiny("bert", vocab_size=len(WORDS)), LoRA(r=2, init="gaussian"), "change")
    attach(model, Prompt(2), "prompt")
    for name in ("change", "prompt"):
        stir(model, name, 0)
    said = {}
    for names in (("change",), ("prompt",), ("change", "prompt"), ("prompt", "change")):
        activate(model, *names)
        said[names] = [one["scores"]["pos"] for one in predict(model, goal, TEXTS, tokenizer=WORDS)]
    together = said["change", "prompt"]
    assert together == pytest.approx(said["prompt", "change"], rel=1e-4)
    assert together != pytest.approx(said["change",], rel=1e-3)
    assert together != pytest.approx(said["prompt",], rel=1e-3)


def test_rows_of_unlike_adapters_keep_theirs_whatever_the_batch():
    """Batches go longest first, so the rows of one are not in the order of the names."""
    goal = Cloze(labels={"pos": ["good"], "neg": ["bad"]})
    model = attach(tiny("bert", vocab_size=len(WORDS)), LoRA(r=2), "a")
    attach(model, LoRA(r=2), "b")
    for seed, name in enumerate("ab"):
        stir(model, name, seed)
    alone = {}
    for name in "ab":
        activate(model, name)
        alone[name] = [one["scores"]["pos"] for one in predict(model, goal, TEXTS, tokenizer=WORDS)]
    for names in ("abbab", "a"):
        wanted = [alone[name][i] for i, name in enumerate(names if len(names) > 1 else "aaaaa")]
        for batch in (None, 2):
            with per_row(model, list(names)):
                found = predict(model, goal, TEXTS, tokenizer=WORDS, batch=batch)
            assert [one["scores"]["pos"] for one in found] == pytest.approx(wanted, rel=1e-3)
    with per_row(model, ["a", "b"]), pytest.raises(ValueError, match="2 names for 5 rows"):
        predict(model, goal, TEXTS, tokenizer=WORDS)


def test_a_head_of_another_size_and_rows_without_a_text(made):
    model, tokenizer, _ = open_adapted(str(made / "bert"), made / "classify" / "adapter")
    with pytest.raises(ValueError, match=r"head has 2 outputs, the rows need 3 \(a, b, c\)"):
        predict(model, Classify(labels=("a", "b", "c")), ["good"], tokenizer=tokenizer)
    rows_ = [{"text": "good"}, {"prompt": "good", "completion": "bad"}]
    for number, given in ((2, rows_), (1, rows_[1:])):
        said = (
            rf"row:{number}: \[missing_field\] text: the adapter's run read text, and this row has prompt, completion"
        )
        with pytest.raises(ValueError, match=said):
            predict(model, None, given, tokenizer=tokenizer)
    model.deltatune_state.records["default"].pop("read")  # an adapter of an older version
    with pytest.raises(ValueError, match=r"row:1: \[missing_field\] text: classify reads a text"):
        predict(model, None, rows_[1:], tokenizer=tokenizer)


READERS = [
    ({"index": 0, "id": "a", "label": "pos", "scores": {"neg": 0.25, "pos": 0.75}}, "a: pos  (pos 0.750, neg 0.250)"),
    ({"index": 1, "labels": (), "scores": {"x": 0.25}}, "1: none  (x 0.250)"),
    ({"index": 1, "score": 2.5}, "1: 2.5"),
    ({"index": 1, "answer": "", "start": None, "end": None, "score": 0.5}, "1: no answer  0.500"),
    ({"index": 1, "label": 0, "answer": "it is", "scores": {"it is": 1.0}}, "1: it is  (it is 1.000)"),
    ({"index": 2, "tags": ("O",), "entities": [], "scores": []}, "2: nothing"),
    ({"index": 2, "tags": ("B-X",), "entities": [{"type": "X", "text": "ann"}], "scores": []}, "2: ann (X)"),
]


@pytest.mark.parametrize(("one", "said"), READERS)
def test_a_terminal_gets_a_line_of_words(one, said):
    assert words(one) == said


# ---- other models and rows -------------------------------------------------------------------------------------------
def test_prompts_of_tasks_answer_their_own_rows(tmp_path):
    model = t.masked_model(tmp_path / "bert")
    rows = [{"text": said, "label": "xy"[i % 2], "task": "ab"[i % 2]} for i, said in enumerate(TEXTS[:4])]
    method = {"prompt": {"length": 2, "tasks": ["a", "b"]}}
    file = t.lines(tmp_path / "rows.jsonl", rows)
    run(t.config(model, file, file, objective="classify", method=method, train=SHORT), out=tmp_path / "run")
    opened, tokenizer, _ = open_adapted(str(model), tmp_path / "run/adapter")
    stir(opened, "default", 0)
    by_column = predict(opened, None, [{"text": "good", "task": task} for task in "ab"], tokenizer=tokenizer)
    by_name = [predict(opened, None, ["good"], tokenizer=tokenizer, task=task)[0] for task in "ab"]
    for one, other in zip(by_column, by_name, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)
    assert by_name[0]["scores"] != pytest.approx(by_name[1]["scores"], rel=1e-4)
    with pytest.raises(ValueError, match=r"row:1.*no task is named; there are prompts for a, b"):
        predict(opened, None, ["good"], tokenizer=tokenizer)


@pytest.mark.parametrize(("make", "labels"), [(t.chat_model, "xy"), (t.seq2seq_model, "xy")])
def test_decoders_and_encoder_decoders_classify_alone_as_together(tmp_path, make, labels):
    model = make(tmp_path / "model")
    file = t.lines(tmp_path / "rows.jsonl", [{"text": s, "label": labels[i % 2]} for i, s in enumerate(TEXTS)])
    run(t.config(model, file, file, objective="classify", train=SHORT), out=tmp_path / "run")
    opened, tokenizer, _ = open_adapted(str(model), tmp_path / "run/adapter")
    together = predict(opened, None, TEXTS, tokenizer=tokenizer)
    for text, one in zip(TEXTS, together, strict=True):
        (alone,) = predict(opened, None, [text], tokenizer=tokenizer)
        assert alone["scores"] == pytest.approx(one["scores"], rel=1e-3)
