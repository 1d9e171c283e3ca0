"""What is known before torch is loaded: run folders, rows, references, adapters that a command cannot take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tiny_run as t
from deltatune.commands.ahead import asks_well, is_weights
from deltatune.data.ahead import look
from deltatune.data.wanted import WANTS, Intake

EARLY = """
import contextlib, io, json, sys
from deltatune.cli import main
for words, said in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(words)
        except SystemExit as end:
            assert end.code == 2, (words, end.code, out.getvalue())
    text = " ".join(out.getvalue().split())
    assert said in text, (words, said, text)
    heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def adapter(folder: Path, *methods: str, **record) -> None:
    folder.mkdir(parents=True)
    base = {"reference": "o/m", "fingerprint": "f", "class": "C"}
    blocks = [{name: {}} for name in methods]
    (folder / "deltatune.json").write_text(json.dumps({"methods": blocks, "base": base, "record": record}))


def made(here: Path) -> None:
    t.lines(here / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    t.lines(here / "other.jsonl", [{"subjct": "a"}, {"subjct": "b"}])
    t.lines(here / "bare.jsonl", [{"text": "a", "gold": "x"}])
    t.lines(here / "letters.jsonl", [{"id": 1, "letter": "dear sir", "dept": "a"}])
    (here / "empty.jsonl").write_text("")
    (here / "header.csv").write_text("text,label\n")
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text("")
    mail = {"objective": {"classify": {"labels": ["x", "y"]}}, "columns": {"subject": "text"}, "read": ["subject"]}
    adapter(here / "mail" / "adapter", "lora", "head", **mail)
    adapter(here / "words" / "adapter", "prefix", objective={"sft": {}})
    adapter(here / "bare" / "adapter", "gate")
    (here / "peft").mkdir()
    (here / "peft" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    (here / "whole").mkdir()
    (here / "whole" / "config.json").write_text("{}")


TRAIN = ["train", "--model", "o/m", "--objective", "classify"]
CLOZE = "{cloze: {template: '<soft:4> {text} <mask>', labels: {x: a, y: b}}}"
LINES = [
    ([*TRAIN, "--data", "rows.jsonl", "--out", "run"], "run holds a run already: `deltatune resume run`"),
    ([*TRAIN, "--data", "rows.jsonl", "--out", "rows.jsonl"], "rows.jsonl is a file"),
    (["train", "--out", "run"], "run holds a run already"),
    ([*TRAIN, "--data", "empty.jsonl"], "empty.jsonl: [empty_file] the file is empty"),
    ([*TRAIN, "--data", "header.csv"], "header.csv: there are no rows"),
    ([*TRAIN, "--data", "rows.jsonl", "--eval", "header.csv"], "header.csv: there are no rows"),
    ([*TRAIN, "--data", "bare.jsonl"], "bare.jsonl:1: [missing_field] label: it is what the objective learns"),
    ([*TRAIN, "--data", "other.jsonl"], "other.jsonl:1: [unknown_columns]"),
    ([*TRAIN, "--data", "letters.jsonl"], "lacks text|sentence|review|content|sentence1|premise|question1|question|"
     "text1, label|labels. Name yours, for instance data.columns={letter: text, dept: label}, or choose a format"),
    ([*TRAIN, "--data", "rows.jsonl", "--set", "eval.shots=2"], "eval.shots puts examples into a prompt"),
    ([*TRAIN, "--data", "rows.jsonl", "--method", "{lora: {dropout: 1.5}}"],
     "--method: method.lora.dropout: 1.5: a number >= 0 and below 1 is wanted"),
    ([*TRAIN, "--data", "rows.jsonl", "--method", "{select: {density: 1.5}}"],
     "--method: method.select.density: 1.5: a number above 0 and <= 1 is wanted"),
    ([*TRAIN, "--data", "pypi:nope"], "'pypi:nope' was not found"),
    (["train", "--model", "pypi:nope", "--data", "rows.jsonl"], "'pypi:nope' was not found"),
    ([*TRAIN, "--data", "rows.jsonl", "--method", "{prompt: {init: vocb}}"], "(did you mean 'vocab'?)"),
    ([*TRAIN, "--data", "rows.jsonl", "--method", "{adapter: {where: [fnn]}}"], "(did you mean 'ffn'?)"),
    (["train", "--model", "o/m", "--data", "rows.jsonl", "--objective", CLOZE, "--method", "{prompt: {length: 3}}"],
     "has 4 virtual tokens, the method has 3: set the method's length to 4"),
    (["train", "--model", "o/m", "--data", "rows.jsonl", "--objective", CLOZE], "4 virtual tokens, the method has 0"),
    (["predict", "--adapter", "words", "hi"], "deltatune generate --adapter words --data FILE"),
    (["predict", "--adapter", "bare", "hi"], "does not say what its run learned: add --objective classify"),
    (["generate", "--adapter", "mail", "--prompt", "hi"], "deltatune predict --adapter mail --data FILE"),
    (["chat", "--adapter", "mail"], "its run learned to classify: deltatune predict --adapter mail"),
    (["predict", "--adapter", "mail", "--data", "empty.jsonl"], "the file is empty"),
    (["predict", "--adapter", "mail", "--data", "other.jsonl"],
     "other.jsonl:1: [missing_field] subject: the adapter's run read subject, and this row has subjct. Name yours: "
     "data.columns: {subjct: text}. Did you mean 'subjct'? (2 times: lines 1, 2)"),
    (["eval", "--adapter", "mail", "--data", "other.jsonl"], "the adapter's run read subject"),
    (["predict", "--model", "pypi:nope", "--objective", "classify", "a"], "'pypi:nope' was not found"),
    (["merge", "words", "--out", "new"], "words/adapter cannot be merged: prefix adds to the computation"),
    (["merge", "mail", "--with", "words", "--out", "new"], "words/adapter cannot be merged"),
    (["merge", "peft", "--out", "new"], "peft cannot be merged: PREFIX_TUNING adds"),
    (["export", "bare", "--lora", "--out", "new"], "cannot be exported as a LoRA: gate adds"),
    (["export", "run", "--lora", "--out", "new"], "run is a run that has no adapter yet: deltatune resume run"),
    (["predict", "--adapter", "whole", "hi"], "whole holds a whole model, no adapter: --model whole"),
]  # fmt: skip


def test_what_a_command_cannot_take_is_said_before_torch_is_loaded(tmp_path):
    made(tmp_path)
    repo = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {repo!r})\n{EARLY}"], input=json.dumps(LINES),
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


ALLOWED = [("predict", "classify"), ("predict", "qa"), ("generate", "sft"), ("chat", "cloze"), ("generate", ""),
           ("eval", "classify"), ("merge", "")]  # fmt: skip


@pytest.mark.parametrize(("command", "goal"), ALLOWED)
def test_what_can_be_asked_passes(command, goal):
    asks_well(command, "--adapter a", {"objective": {goal: {}}} if goal else {})


def test_changes_of_weights_pass(tmp_path):
    adapter(tmp_path / "a", "lora", "head")
    is_weights(tmp_path / "a", "merged")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    is_weights(tmp_path / "b", "merged")


def test_only_the_first_row_is_read_where_it_can_be_used(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b"}]
    look(t.lines(tmp_path / "a.jsonl", rows), Intake(wanted=WANTS["classify"]))
    file = t.lines(tmp_path / "b.jsonl", [{"text": "b"}] * 4)
    with pytest.raises(ValueError, match=r"4 of 4 rows cannot be used"):
        look(file, Intake(wanted=WANTS["classify"]))
    with pytest.raises(ValueError, match=r"2 of 2 rows cannot be used"):
        look(file, Intake(wanted=WANTS["classify"]), most=2)
    look(file, Intake(wanted=WANTS["classify"], asks=True))
    look("-", Intake(wanted=WANTS["classify"]))  # standard input can be read once


def test_a_pipe_is_left_to_the_one_who_reads_it(tmp_path):
    """A first look would take its rows away."""
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    looked = threading.Thread(target=look, args=(str(pipe), Intake()), daemon=True)
    looked.start()
    looked.join(10)
    assert not looked.is_alive()
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        look(str(tmp_path / "gone.jsonl"), Intake())
