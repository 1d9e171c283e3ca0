"""How many numbers train: what is foreseen before any row was seen, and what a finished run says, are what it was."""

from __future__ import annotations

import pytest
import torch

import tiny_run as t
from deltatune import attach
from deltatune.core.attach import each, parameters, prepare
from deltatune.core.delta import Given, to_train
from deltatune.core.registry import survey
from deltatune.methods import build
from deltatune.report import page
from deltatune.train import memory
from deltatune.train.job import prepare as prepare_job
from deltatune.train.run import plan, run
from models import inputs, tiny

made = t.made


def losses_of(model):
    return lambda: (model(**inputs(model, seed=seed)).loss for seed in range(2))


def trained(model) -> int:
    return sum(p.numel() for p in parameters(model, "default").values())


LISTED = {"select": 77, "sparse": 3661, "sparse-adapter": 3661, "large-sparse": 17536, "ia3": 160, "lora-qv": 1792}


@pytest.mark.parametrize("name", LISTED)
def test_the_registry_counts_what_is_left_to_train(name):
    """Of a tiny Llama: select 0.5 % of 15,360; adapters of 4 x (2 x 32 x 64) weights, a fifth kept, and 384 biases."""
    with torch.device("meta"):
        shown = survey(type(tiny("llama"))(tiny("llama").config), name)[name]
    model = attach(tiny("llama"), build(name))
    assert to_train(list(each(model, "default"))) == shown["parameters"] == LISTED[name]
    prepare(model, "default", Given(losses_of(model)))
    assert trained(model) == LISTED[name]
    assert to_train(list(each(model, "default"))) == LISTED[name]


NORMAL = {"adapter": {"bottleneck": 5, "init": "normal"}}
NESTED = {  # each method rounds its own share up
    "one": [{"sparse": {"of": [NORMAL], "density": 0.303}}],
    "in a gate": [{"gate": {"of": [{"sparse": {"of": [NORMAL], "density": 0.303}}, {"lora": {"r": 2}}]}}],
    "two of a kind": [{"select": {"density": 0.0303, "targets": [role]}} for role in ("q", "down")],
    "three rounds": [{"sparse": {"of": [NORMAL], "density": 0.303, "rounds": 3}}],
    "no rows": [{"sparse": {"of": [NORMAL], "density": 0.303, "by": "magnitude"}}, {"select": {"by": "magnitude"}}],
    "all": [{"select": {"density": 1, "targets": ["q"]}}, {"bitfit": {"create": True}}],
}


@pytest.mark.parametrize("spec", NESTED.values(), ids=NESTED)
def test_what_is_foreseen_comes_true_however_methods_are_nested(spec):
    model = attach(tiny("llama"), build(spec))
    foreseen = to_train(list(each(model, "default")))
    prepare(model, "default", Given(losses_of(model)))
    assert trained(model) == foreseen


def test_a_choice_without_rows_is_foreseen_without_weights(monkeypatch):
    """On the meta device nothing can be chosen; how much will be is known."""
    chosen = {"no-rows": {"method": [{"select": {"by": "magnitude", "density": 0.01}}]}}
    monkeypatch.setattr("deltatune.core.registry.PRESETS", chosen)
    with torch.device("meta"):
        shown = survey(type(tiny("llama"))(tiny("llama").config), "no-rows")["no-rows"]
    assert shown["parameters"] == 154  # of 15,360


THIN = {"sparse": {"of": [{"adapter": {"bottleneck": 64, "init": "normal"}}], "density": 0.05, "batches": 2}}
DENSE, LEFT = 4 * (2 * 32 * 64 + 64 + 32), 820 + 4 * (64 + 32)  # 5 % of 16,384 weights


def test_a_dry_run_counts_what_the_run_trains(made, tmp_path):
    predicted = plan(t.run_of(made, THIN))
    assert predicted["trainable_parameters"] == LEFT
    need = predicted["predicted_memory_bytes"]
    assert (need["gradients"], need["optimizer"], need["choosing"]) == (4 * LEFT, 8 * LEFT, 12 * (DENSE - LEFT))
    done = run(t.run_of(made, THIN, steps=2), out=tmp_path / "run")
    assert done.summary["trainable_parameters"] == done.summary["stored_parameters"] == LEFT
    assert "stored" not in trained_line(done)


def test_once_all_is_chosen_memory_is_foreseen_for_training_alone(made):
    job = prepare_job(t.run_of(made, "ia3"))
    assert "choosing" not in memory.estimate(job)


def trained_line(done) -> str:
    return next(line for line in page.facts(done.summary) if line.startswith("trained: "))


STORED = {  # method, numbers it trains, numbers it stores
    "pruned": ({"diffprune": {"density": 0.05, "prune_at": 0.5, "alpha_ratio": 20.0}}, 2 * 15360 + 14, 768),
    "folded": ({"prefix": {"length": 3, "reparam": "mlp", "hidden": 16}}, 96 + 528 + 2 * 17 * 32, 2 * 2 * 16 * 3),
    "with its start": ({"lora": {"r": 2, "targets": ["q"], "init": "pissa"}}, 2 * 2 * 64, 4 * 2 * 64),
}


@pytest.mark.parametrize(("method", "numbers", "stored"), STORED.values(), ids=STORED)
def test_a_finished_run_says_what_was_trained_and_what_is_stored(made, tmp_path, method, numbers, stored):
    done = run(t.run_of(made, method, steps=4), out=tmp_path / "run")
    base = sum(p.numel() for p in prepare_job(t.run_of(made, "ia3")).model.parameters()) - 160
    assert trained_line(done).startswith(f"trained: {numbers:,} of {base + numbers:,} parameters (")
    assert f"), {stored:,} stored, 4 steps" in trained_line(done)
