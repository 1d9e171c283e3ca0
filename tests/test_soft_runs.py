"""Soft prompts, prefixes, tagging, question answering and mixed sets as whole tiny jobs, cut and resumed bitwise."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_run as t
from deltatune.train.run import evaluate_file, open_adapted, resume, run

NAMES, PLACES = ("good", "fine"), ("film", "plot")


class Stop:
    """SIGTERM to itself at a step."""

    def __init__(self, at: int):
        self.at = at

    def on_start(self, record):
        pass

    def on_step(self, record):
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    on_eval = on_end = on_save = on_start


def tag_rows(path: Path, count: int = 16) -> str:
    """'good' and 'fine' are names (of two words when they meet), 'film' and 'plot' places."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        words = [draw.choice((*NAMES, *PLACES, "was", "it", "the")) for _ in range(draw.randint(2, 7))]
        kinds = ["PER" if w in NAMES else "LOC" if w in PLACES else "" for w in words]
        tags = [f"{'I' if i and kinds[i - 1] == k else 'B'}-{k}" if k else "O" for i, k in enumerate(kinds)]
        rows.append({"tokens": words, "tags": tags})
    return t.lines(path, rows)


def answer_rows(path: Path, count: int = 16) -> str:
    """Which word follows 'was'?"""
    draw, rows = random.Random(0), []
    for _ in range(count):
        said = draw.choice(("good", "bad", "fine", "sad"))
        context = f"{draw.choice(('it', 'the film', 'a plot'))} was {said} it"
        where = context.index(said)
        rows.append({"question": "was it", "context": context, "answers": {"text": [said], "answer_start": [where]}})
    return t.lines(path, rows)


def pair_rows(path: Path, count: int = 12, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choice("abc") for _ in range(3)) for _ in range(count)]
    return t.lines(path, [{"prompt": w, "completion": w[::-1]} for w in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    d = tmp_path_factory.mktemp("soft")
    t.chat_model(d / "chat"), t.masked_model(d / "bert"), t.seq2seq_model(d / "t5")
    for name, write in {"chat": t.chat_rows, "label": t.label_rows, "tag": tag_rows, "qa": answer_rows}.items():
        write(d / f"{name}.jsonl")
    pair_rows(d / "pair.jsonl"), pair_rows(d / "few.jsonl", 3, 7)
    words = [{"prompt": "the film was good", "completion": "great"}, {"prompt": "a plot", "completion": "terrible"}]
    t.lines(d / "words.jsonl", words * 5)
    return d


LABELS = {"pos": ["good"], "neg": ["bad"]}
SOFT = {"cloze": {"template": "<soft:2>{text}<soft> it was <mask> .", "labels": LABELS}}
# name -> (model, rows, the job's own settings, tensor name endings that the deployed file holds)
JOBS = {
    "prefix-mlp": ("chat", "chat", {"method": {"prefix": {"length": 3, "reparam": "mlp", "hidden": 16}}}, 1),
    "prefix-words": (
        "chat", "chat",
        {"method": {"prefix": {"length": 3, "init": "words", "words": "Q: A:", "reparam": "mlp", "hidden": 16}}}, 1),
    "prefix-t5": ("t5", "words", {"method": {"prefix": {"length": 2, "reparam": "mlp", "hidden": 8}}}, 12),
    "p-tuning-v2": ("bert", "label", {"method": "p-tuning-v2", "objective": "classify"}, None),
    "tag": ("bert", "tag", {"method": {"prefix": {"length": 3}}, "objective": "tag"}, None),
    "qa": ("bert", "qa", {"method": {"prefix": {"length": 3}}, "objective": "qa"}, None),
    "prompt-labels": (
        "bert", "label",
        {"method": {"prompt": {"length": 3, "init": "labels", "labels": ["good", "bad"]}}, "objective": SOFT}, 1),
    "prompt-text": ("chat", "pair", {"method": {"prompt": {"length": 4, "init": "text", "text": "say it"}}}, 1),
    "prompts-vote": ("chat", "pair", {"method": {"prompt": {"length": 2, "count": 3}}}, 1),
    "prompts-average": (
        "bert", "label",
        {"method": {"prompt": {"length": 3, "count": 3, "combine": "average"}}, "objective": SOFT}, 1),
    "prompts-tag": ("bert", "tag", {"method": {"prompt": {"length": 2, "count": 2}}, "objective": "tag"}, None),
    "prompts-qa": ("bert", "qa", {"method": {"prompt": {"length": 2, "count": 2}}, "objective": "qa"}, None),
    "prompts-classify": (
        "bert", "label", {"method": {"prompt": {"length": 2, "count": 2}}, "objective": "classify"}, None),
    "ptuning": ("bert", "label", {"method": {"ptuning": {"length": 3}}, "objective": SOFT}, 1),
    "ptuning-sft": (
        "chat", "pair",
        {"method": {"ptuning": {"length": 4, "encoder": "mlp"}},
         "objective": {"sft": {"template": "<soft:3>{prompt}<soft>"}}}, 1),
    "template-t5": (
        "t5", "words",
        {"method": {"prompt": {"length": 2}}, "objective": {"sft": {"template": "<soft>{prompt}<soft>"}}}, 1),
    "dropout-head": (  # what is asked of the model before its first loss is asked elsewhere on resume
        "chat", "pair", {"method": {"lora": {"r": 4, "dropout": 0.3, "targets": ["q", "lm_head"]}}}, None),
    "prompts-packed": (
        "chat", "chat",
        {"method": {"prompt": {"length": 2, "count": 2}}, "train": {"batch_rows": None, "batch_tokens": 400}}, 1),
    "mixed": ("chat", "pair", {"method": {"prompt": {"length": 2}}, "data": {"mix": {"temperature": 0.5}}}, 1),
}  # fmt: skip


def job(made: Path, name: str):
    model, rows, over, _ = JOBS[name]
    train = {"steps": 5, "save_every": 2, "batch_tokens": None, "batch_rows": 4, **over.get("train", {})}
    found = {**over, "train": train}
    path = str(made / f"{rows}.jsonl")
    if "data" in over:
        found["data"] = {**over["data"], "train": [path, str(made / "few.jsonl")]}
    return t.config(made / model, path, path, **found)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "adapter").glob("*.safetensors")))


@pytest.mark.parametrize("name", JOBS)
def test_a_job_cut_in_the_middle_goes_on_bitwise(made, tmp_path, name):
    config = job(made, name)
    straight = run(config, out=tmp_path / "straight")
    failed = [c for c in json.loads((tmp_path / "straight/verified.json").read_text())["checks"] if c["ok"] is False]
    assert (straight.status, failed) == ("done", [])
    cut = run(config, out=tmp_path / "cut", observers=[Stop(3)])
    assert (cut.status, cut.summary["step"]) == ("interrupted", 3)
    assert resume(tmp_path / "cut").status == "done"
    ours, theirs = tensors(tmp_path / "straight"), tensors(tmp_path / "cut")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    few = JOBS[name][3]
    assert few is None or len(ours) == few, list(ours)  # the folded form alone
    result = json.loads((tmp_path / "straight/eval.json").read_text())
    model, tokenizer, record = open_adapted(str(made / JOBS[name][0]), tmp_path / "straight/adapter")
    rows = str(made / f"{JOBS[name][1]}.jsonl")
    again = evaluate_file(model, tokenizer, record, rows, config.eval)
    assert again[result["metric"]] == result["after"][result["metric"]]
    assert again["loss"] == pytest.approx(result["after"]["loss"], rel=1e-5)


@pytest.mark.parametrize(("name", "metric"), [("tag", "span_f1"), ("qa", "squad_f1")])
def test_tags_and_answers_are_learned(made, tmp_path, name, metric):
    """The words alone say the tag, and the word after 'was' is the answer: both can be learned perfectly."""
    model, rows, over, _ = JOBS[name]
    settings = {"steps": 60, "batch_rows": 16, "batch_tokens": None, "lr": 1e-2, "schedule": "constant"}
    path = str(made / f"{rows}.jsonl")
    config = t.config(made / model, path, path, **{**over, "train": settings, "method": "full"})
    run(config, out=tmp_path / "run")
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert result["after"][metric] > 0.95 > result["before"][metric]


def test_answers_in_long_contexts_are_learned_through_windows(made, tmp_path):
    """Contexts of up to 6 words in windows of 4, which the answer's word and the one before it fit: one prediction a
    row, and an evaluation of the adapter alone says the same."""
    goal = {"qa": {"doc_stride": 1}}
    settings = {"steps": 60, "batch_rows": 16, "batch_tokens": None, "lr": 1e-2, "schedule": "constant"}
    path = str(made / "qa.jsonl")
    job = t.config(made / "bert", path, path, objective=goal, method="full", train={**settings, "max_length": 9})
    run(job, out=tmp_path / "run")
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert result["rows"] == 16
    assert result["after"]["squad_f1"] > 0.95 > result["before"]["squad_f1"]
    model, tokenizer, record = open_adapted(str(made / "bert"), tmp_path / "run" / "adapter")
    assert record["objective"]["qa"]["doc_stride"] == 1
    found = evaluate_file(model, tokenizer, record, path, job.eval)
    assert found["squad_f1"] == result["after"]["squad_f1"]
