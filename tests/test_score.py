"""Scores: the loss is the same however rows are batched, perplexity comes from it, predictions keep their order."""

import math
from collections import Counter

import pytest

import tiny_run as t
from deltatune.data.batch import pad
from deltatune.evaluate import score as room
from deltatune.evaluate.score import Scored, gain, intervals, mean_loss, score
from deltatune.objectives.sft import SFT
from deltatune.train.job import prepare


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
