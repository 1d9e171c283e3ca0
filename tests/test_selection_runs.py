"""Sparse adapters, selected base weights and adapters of every form, through a whole run from a configuration."""

from __future__ import annotations

import json
import math

import pytest
import torch

import tiny_run as t
from deltatune.core.store import read_tensors
from deltatune.train.run import resume, run

SMALL = {"adapter": {"bottleneck": 8, "init": "normal", "init_std": 0.1}}
RUNS = {
    "houlsby": {"adapter": {"bottleneck": 8, "init": "normal", "norms": True}},
    "pfeiffer": {"adapter": {"where": ["block"], "reduction": 4, "act": "relu", "skip": 1}},
    "learned scale": {"adapter": {"bottleneck": 8, "form": "parallel", "where": ["ffn"], "scale": "learned"}},
    "sparse snip": {"sparse": {"of": [SMALL], "density": 0.3, "batches": 2}},
    "sparse grasp": {"sparse": {"of": [SMALL], "density": 0.3, "by": "grasp", "batches": 2}},
    "sparse synflow": {"sparse": {"of": [SMALL], "density": 0.3, "by": "synflow", "rounds": 3}},
    "select fisher": {"select": {"density": 0.05, "rows": 8}},
    "select grad": [{"select": {"density": 0.05, "by": "grad", "rows": 8}}, {"adapter": {"bottleneck": 8}}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    t.chat_model(folder / "model")
    t.chat_rows(folder / "rows.jsonl")
    return folder


def job(made, method, **train):
    settings = {"weight_decay": 0.1, **train}
    return t.config(made / "model", str(made / "rows.jsonl"), method=method, train=settings)


def tensors(folder):
    return read_tensors(folder / "adapter", json.loads((folder / "adapter" / "deltatune.json").read_text()))


@pytest.mark.parametrize("method", RUNS.values(), ids=RUNS)
def test_a_run_is_verified_and_resumes_to_the_last_bit(made, method, tmp_path):
    assert run(job(made, method), out=tmp_path / "whole").status == "done"
    checks = json.loads((tmp_path / "whole" / "verified.json").read_text())["checks"]
    found = {check["name"]: check["ok"] for check in checks}
    assert [found[name] for name in ("saved", "reload", "base")] == [True] * 3, checks
    assert found["merge"] is (True if "select" in method else None), checks
    assert run(job(made, method), out=tmp_path / "cut", observers=[t.Stop()]).status == "interrupted"
    assert resume(tmp_path / "cut").status == "done"
    ours, theirs = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resuming_takes_the_choice_from_the_checkpoint_and_looks_at_no_row_again(made, tmp_path, monkeypatch):
    run(job(made, RUNS["select fisher"]), out=tmp_path / "cut", observers=[t.Stop()])
    monkeypatch.setattr("deltatune.methods.select.gradients", lambda *_: pytest.fail("rows were looked at again"))
    assert resume(tmp_path / "cut").status == "done"


def test_only_what_was_kept_is_in_the_file_and_in_the_optimizer(made, tmp_path):
    dense = run(job(made, {"adapter": {"bottleneck": 64}}), out=tmp_path / "dense")
    sparse = {"sparse": {"of": [{"adapter": {"bottleneck": 64, "init": "normal"}}], "density": 0.05, "batches": 2}}
    thin = run(job(made, sparse), out=tmp_path / "thin")
    matrices, vectors = 4 * 2 * 32 * 64, 4 * (64 + 32)
    assert dense.summary["trainable_parameters"] == matrices + vectors
    assert thin.summary["trainable_parameters"] == math.ceil(0.05 * matrices) + vectors
    ours = tensors(tmp_path / "thin")
    assert sum(t.numel() for k, t in ours.items() if k.endswith("index")) == math.ceil(0.05 * matrices)
    sizes = {x: (tmp_path / x / "adapter" / "adapter.safetensors").stat().st_size for x in ("dense", "thin")}
    # 4 bytes a value and 4 its position; the header names 16 tensors in one file and 24 in the other
    assert sizes["thin"] < 0.25 * sizes["dense"]
