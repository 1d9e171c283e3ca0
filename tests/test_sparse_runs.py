"""Whole tiny runs, from YAML: diff pruning, SpotTune, gates, BitFit and choice; each cut short and resumed bitwise."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny_run as t
from deltatune.config import load
from deltatune.train.run import evaluate_file, open_adapted, resume, run


class Cut:
    """Stops a run after step `step`, as a user's Ctrl-C or a machine's end would."""

    def __init__(self, step: int):
        self.at = step

    def on_step(self, record):
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_start(self, record): ...

    def on_end(self, record): ...

    def on_eval(self, record): ...


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    t.chat_model(folder / "chat")
    t.masked_model(folder / "masked")
    t.seq2seq_model(folder / "seq2seq")
    t.label_rows(folder / "labels.jsonl")
    t.label_rows(folder / "labels-eval.jsonl", 8, seed=1)
    t.chat_rows(folder / "chat.jsonl")
    t.chat_rows(folder / "chat-eval.jsonl", 6, seed=1)
    answers = {"pos": "good film", "neg": "terrible"}
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    own = [{**r, "choices": list(answers.values()), "label": answers[r["label"]]} for r in rows]
    t.lines(folder / "choices.jsonl", own)
    return folder


SMALL = {"hidden": 8, "policy_ratio": 1.0}
CHOICE = {"choice": {"template": "{text} it was <mask>", "labels": {"pos": "good film", "neg": "terrible"}}}
RUNS = {  # method, objective, model, rows
    "diffprune": (
        {"diffprune": {"density": 0.05, "prune_at": 0.5, "alpha_ratio": 20.0}},
        "classify",
        "masked",
        "labels",
    ),
    "diffprune-sft": ({"diffprune": {"density": 0.05, "prune_at": 4, "l0": 1e-4}}, "sft", "chat", "chat"),
    "spottune": ({"spottune": {"of": [{"lora": {"r": 2}}], **SMALL}}, "sft", "chat", "chat"),
    "spottune-full": ({"spottune": {"of": "full", **SMALL}}, "classify", "masked", "labels"),
    "spottune-delta": ({"spottune": {"of": "ia3", "level": "delta", **SMALL}}, "classify", "masked", "labels"),
    "unipelt": ("unipelt", "sft", "chat", "chat"),
    "unipelt-paper": ("unipelt-paper", "sft", "chat", "chat"),
    "gate-seq2seq": ({"gate": {"of": ["ia3", {"prefix": {"length": 2}}]}}, CHOICE, "seq2seq", "labels"),
    "bitfit": ({"bitfit": {"targets": ["query", "intermediate"]}}, "classify", "masked", "labels"),
    "bitfit-create": ({"bitfit": {"targets": ["query", "intermediate"], "create": True}}, "sft", "chat", "chat"),
    "t-few": ("t-few", CHOICE, "seq2seq", "labels"),
    "choice-causal": ({"lora": {"r": 2}}, CHOICE, "chat", "labels"),
    "choice-rows": ({"lora": {"r": 2}}, {"choice": {"template": "{text} <mask>"}}, "chat", "choices"),
}


def config(made: Path, name: str, folder: Path):
    """Written as YAML and read back, as a user gives it."""
    method, objective, model, rows = RUNS[name]
    held = made / ("choices.jsonl" if rows == "choices" else f"{rows}-eval.jsonl")
    tree = {
        "model": str(made / model),
        "method": method,
        "objective": objective,
        "data": {"train": str(made / f"{rows}.jsonl"), "eval": str(held)},
        "train": {"steps": 6, "batch_tokens": 160, "lr": 5e-3, "precision": "fp32", "save_every": 2},
        "eval": {"retention": False, "max_new_tokens": 8},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return load(folder / "run.yaml").config


def saved(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_verified_and_resumes_bitwise(made, tmp_path, name):
    whole = run(config(made, name, tmp_path), out=tmp_path / "whole")
    assert whole.status == "done", whole.summary["failed"]
    for step in (2, 5) if "diffprune" in name else (3,):  # before and after it prunes
        cut = run(config(made, name, tmp_path), out=tmp_path / f"cut{step}", observers=[Cut(step)])
        assert cut.status == "interrupted"
        assert resume(tmp_path / f"cut{step}").status == "done"
        ours, theirs = saved(tmp_path / f"cut{step}"), saved(tmp_path / "whole")
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    evaluated = json.loads((tmp_path / "whole" / "eval.json").read_text())
    said = json.loads((tmp_path / f"cut{step}" / "eval.json").read_text())
    assert said["after"] == evaluated["after"]
    assert said.get("methods") == evaluated.get("methods")
    model, tokenizer, record = open_adapted(str(made / RUNS[name][2]), tmp_path / "whole" / "adapter")
    rows = made / ("choices.jsonl" if RUNS[name][3] == "choices" else f"{RUNS[name][3]}-eval.jsonl")
    section = load(tmp_path / "whole" / "config.yaml").config.eval
    again = evaluate_file(model, tokenizer, record, str(rows), section)
    assert again["loss"] == pytest.approx(evaluated["after"]["loss"], rel=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_policy_that_draws_in_evaluation_too_is_verified(made, tmp_path, seed):
    """The adapter from disk is compared under the same draws."""
    drawn = {"spottune": {"of": [{"lora": {"r": 2}}], "sample": True, **SMALL}}
    settings = t.config(made / "chat", str(made / "chat.jsonl"), method=drawn, train={"seed": seed, "steps": 4})
    done = run(settings, out=tmp_path / "run")
    assert done.status == "done", done.summary["failed"]


def test_what_diff_pruning_stores(made, tmp_path):
    run(config(made, "diffprune", tmp_path), out=tmp_path / "run")
    tensors = saved(tmp_path / "run")
    entries = 2 * (4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32)
    values = sum(v.numel() for k, v in tensors.items() if k.endswith(".values"))
    assert values == round(0.05 * entries)
    assert {k.rpartition(".")[2] for k in tensors if "classifier" not in k} == {"values", "indices"}


def test_routing_and_drift_are_in_the_report(made, tmp_path):
    run(config(made, "spottune", tmp_path), out=tmp_path / "spot")
    said = json.loads((tmp_path / "spot" / "eval.json").read_text())["methods"]["spottune"]
    assert set(said["share_tuned"]) == {"model.layers.0", "model.layers.1"}
    assert all(0 <= share <= 1 for share in said["share_tuned"].values())
    assert said["sequences"] >= 6
    assert "- spottune: share tuned " in (tmp_path / "spot" / "report.md").read_text()
    run(config(made, "bitfit", tmp_path), out=tmp_path / "bitfit")
    drift = json.loads((tmp_path / "bitfit" / "eval.json").read_text())["methods"]["bitfit"]["drift"]
    assert set(drift) == {"query", "intermediate"}
    assert min(drift.values()) > 1e-4
    assert "- bitfit: drift query 0.0" in (tmp_path / "bitfit" / "report.md").read_text()
