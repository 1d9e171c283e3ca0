"""Scores: the loss is the same however rows are batched, perplexity comes from it, predictions keep their order."""

import json
import math
from collections import Counter

import pytest
import torch

import tiny_run as t
from deltatune.core.attach import parameters
from deltatune.data.batch import pad
from deltatune.evaluate import score as room
from deltatune.evaluate.incontext import Prompt, label_scores
from deltatune.evaluate.retention import Windows, retention
from deltatune.evaluate.score import Scored, gain, intervals, mean_loss, score
from deltatune.objectives.sft import SFT
from deltatune.train.job import prepare
from deltatune.train.run import resume, run


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    d = tmp_path_factory.mktemp("made")
    return prepare(
        t.config(t.chat_model(d / "model"), t.chat_rows(d / "rows.jsonl", 8), t.chat_rows(d / "e.jsonl", 6, 1))
    )


def test_the_loss_does_not_depend_on_batches(job, monkeypatch):
    rows = job.encode(job.eval)
    sums = [float(job.objective.loss(job.model, pad([row], 0))[0].detach()) for row in rows]
    wanted = sum(sums) / sum(row.targets for row in rows)
    for room_ in (1, 64, 4096):
        monkeypatch.setattr(room, "BATCH_TOKENS", room_)
        assert mean_loss(job, rows) == pytest.approx(wanted, rel=1e-5)


def test_perplexity_beside_metrics_of_predictions(job):
    found = score(job, job.eval, ("perplexity", "exact_match"))
    assert found.metrics["perplexity"] == pytest.approx(math.exp(found.loss))
    assert list(found.metrics) == ["exact_match", "perplexity"]
    assert len(found.predictions) == len(found.references) == 6
    assert intervals(found).keys() == gain(found, found).keys() == {"exact_match"}
    assert score(job, job.eval, predicts=False).predictions == []


def test_each_tasks_metric_stands_beside_the_mean():
    scored = Scored(1.0, {"exact_match": 0.5, "loss": 1.0}, ["a", "b", "c", "d"], ["a", "x", "c", "y"],
                    tasks=("left", "right", "left", None))  # fmt: skip
    assert scored.by_task == {
        "left": {"rows": 2, "exact_match": 1.0},
        "right": {"rows": 1, "exact_match": 0.0},
        "no task": {"rows": 1, "exact_match": 0.0},
    }
    assert Scored(1.0, {"exact_match": 0.5}, ["a"], ["a"]).by_task == {}


def test_numbers_json_cannot_hold_are_none():
    assert Scored(float("nan"), {"perplexity": math.inf}, [], []).numbers == {"loss": None, "perplexity": None}


def test_a_row_becomes_tokens_once_a_way(tmp_path, monkeypatch):
    """Whole and up to its answer: for the checks before a run, the untuned model, the middle of the run and the end."""
    seen = []
    encode = SFT.encode

    def counted(self, example, tokenizer, encoding):
        seen.append((example.where, encoding.train_on))
        return encode(self, example, tokenizer, encoding)

    monkeypatch.setattr(SFT, "encode", counted)
    d = tmp_path
    job = prepare(
        t.config(t.chat_model(d / "model"), t.chat_rows(d / "rows.jsonl", 4), t.chat_rows(d / "e.jsonl", 3, 1))
    )
    for _ in range(2):
        score(job, job.eval)
    counts = {count for (where, _), count in Counter(seen).items() if "e.jsonl" in where}
    assert counts == {1}
    assert len({way for where, way in seen if "e.jsonl" in where}) == 2


# ---- a method that draws in evaluation -------------------------------------------------------------------------------
DRAWS = {"spottune": {"of": [{"lora": {"r": 2}}], "hidden": 4, "pool": 3, "sample": True}}
MEASURES = {
    "score": lambda job: score(job, job.eval).numbers,
    "loss alone": lambda job: score(job, job.eval, predicts=False).loss,
    "retention": lambda job: retention(job.model, job.tokenizer, ["the cat sat on the mat " * 4], Windows(8))["nll"],
    "label words": lambda job: label_scores(
        job.model, job.tokenizer, Prompt("p", "{text}", {"a": " good", "b": " bad"}), ["the film is", "it was"]
    ).tolist(),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run's model whose blocks change what they say, each for about half of the sequences."""
    d = tmp_path_factory.mktemp("drawn")
    held = t.chat_rows(d / "e.jsonl", 6, 1)
    job = prepare(t.config(t.chat_model(d / "model"), t.chat_rows(d / "rows.jsonl", 8), held, method=DRAWS))
    g = torch.Generator().manual_seed(1)
    for name, p in parameters(job.model, job.adapter).items():
        p.data += 0.5 * torch.randn(p.shape, generator=g)
        if name.endswith("up.bias"):
            p.data.zero_()
    return job


@pytest.mark.parametrize("name", MEASURES)
def test_a_model_that_draws_is_measured_alike_twice_and_leaves_the_generator_alone(drawn, name):
    said = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        said.append(MEASURES[name](drawn))
        assert torch.equal(torch.get_rng_state(), before)
    assert said[0] == said[1]


def test_the_model_of_these_tests_does_draw(drawn):
    found = set()
    for seed in range(3):
        torch.manual_seed(seed)
        drawn.model.eval()
        found.add(mean_loss(drawn, drawn.encode(drawn.eval)))
    assert len(found) == 3


def test_what_is_measured_after_training_does_not_depend_on_a_cut(tmp_path):
    held = t.chat_rows(tmp_path / "e.jsonl", 6, 1)
    settings = t.config(t.chat_model(tmp_path / "model"), t.chat_rows(tmp_path / "rows.jsonl", 8), held, method=DRAWS)
    run(settings, out=tmp_path / "straight", observers=())
    assert run(settings, out=tmp_path / "cut", observers=[t.Stop()]).status == "interrupted"
    assert resume(tmp_path / "cut").status == "done"
    one, two = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("straight", "cut"))
    assert one["after"] == two["after"]
    assert one["before"] == two["before"]
