"""One set measured by callables, and eval.json made of two such measurements."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltatune.evaluate import Resampling, Scoring, evaluate, numbers, plain, summary
from models import tiny

MODEL = tiny("bert", "classify").train()
ROWS = [SimpleNamespace(where=f"f:{i}", label="ab"[i % 2]) for i in range(20)]
BATCHES = [SimpleNamespace(total=6.0, targets=4, where=("f:0",)), SimpleNamespace(total=1.0, targets=1, where=("f:4",))]
HOW = Scoring(("accuracy", "macro_f1"), Resampling(100))


def loss_of(batch: Any) -> tuple[Any, Any]:
    return torch.tensor(batch.total), batch.targets


def always(label: str) -> tuple:
    return lambda rows: [label for _ in rows], lambda row: row.label


def test_loss_is_over_targets_and_metrics_over_rows() -> None:
    got = evaluate(MODEL, ROWS, BATCHES, loss_of, always("a"), HOW)
    assert got["loss"] == pytest.approx(7 / 5)  # not the mean of 6/4 and 1/1
    assert (got["accuracy"], got["macro_f1"], got["rows"]) == (0.5, pytest.approx(1 / 3), 20)
    assert got["intervals"]["accuracy"] == pytest.approx([0.299, 0.701], abs=1e-3)
    assert got["per_row"][1] == {"where": "f:1", "prediction": "a", "reference": "b"}
    json.dumps(got, allow_nan=False)


def test_an_objectives_own_metrics_may_come_back_with_the_loss() -> None:
    got = evaluate(MODEL, ROWS, BATCHES, lambda b: (torch.tensor(b.total), {"accuracy": 1.0}))
    assert got["loss"] == pytest.approx(7 / 5)
    assert "per_row" not in got


def test_likelihood_metrics_come_from_the_loss_sums() -> None:
    got = evaluate(MODEL, ROWS, BATCHES, loss_of, settings=Scoring(("perplexity",), Resampling(100)))
    assert got["perplexity"] == pytest.approx(math.exp(7 / 5))
    assert got["intervals"]["perplexity"] == pytest.approx([math.exp(1.0), math.exp(1.5)])


def test_the_model_is_evaluated_and_left_as_it_was() -> None:
    seen = []

    def look(batch: Any) -> tuple[Any, Any]:
        seen.append((MODEL.training, torch.is_grad_enabled(), float(torch.rand(1))))
        return loss_of(batch)

    state = torch.get_rng_state()
    evaluate(MODEL, ROWS, BATCHES, look)
    evaluate(MODEL, ROWS, BATCHES, look)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen[:2] == seen[2:]
    assert {s[:2] for s in seen} == {(False, False)}
    assert MODEL.training


def test_eval_json() -> None:
    before = evaluate(MODEL, ROWS, BATCHES, loss_of, always("a"), HOW)
    after = evaluate(MODEL, ROWS, BATCHES[1:], loss_of, (lambda rows: [r.label for r in rows], lambda r: r.label), HOW)
    got = summary(before, after, HOW, {"kind": "perplexity", "forgotten": 0.1})
    assert (got["metric"], got["higher_is_better"]) == ("accuracy", True)
    assert {k: got["before"][k] for k in ("loss", "accuracy")} == {"loss": pytest.approx(1.4), "accuracy": 0.5}
    assert {k: got["after"][k] for k in ("loss", "accuracy")} == {"loss": 1.0, "accuracy": 1.0}
    assert got["intervals"]["accuracy"] == pytest.approx([0.8389, 1.0], abs=1e-4)
    assert got["gain"]["accuracy"]["value"] == 0.5
    assert got["gain"]["accuracy"]["interval"][0] > 0.2
    assert got["gain"]["macro_f1"]["value"] == pytest.approx(2 / 3)
    assert got["retention"] == {"kind": "perplexity", "forgotten": 0.1}
    json.dumps(got, allow_nan=False)


def test_without_metrics_the_loss_is_the_number() -> None:
    one = evaluate(MODEL, ROWS, BATCHES, loss_of, settings=Scoring())
    got = summary(one, one, Scoring())
    assert (got["metric"], got["higher_is_better"], got["gain"], got["retention"]) == ("loss", False, {}, {})


def test_numbers_without_intervals_and_without_nan() -> None:
    assert numbers(("pearson",), [1.0, 1.0], [1.0, 2.0]) == {"pearson": None, "intervals": {}}
    assert [plain(x) for x in (1, math.nan, math.inf)] == [1.0, None, None]


def swapped() -> tuple[dict, dict]:
    one = evaluate(MODEL, ROWS, BATCHES, loss_of, always("a"), HOW)
    return one, evaluate(MODEL, ROWS[::-1], BATCHES, loss_of, always("a"), HOW)


NAN = [SimpleNamespace(total=math.nan, targets=2, where=("f:7", "f:8"))]
REFUSED = [
    (lambda: evaluate(MODEL, [], BATCHES, loss_of), "no rows to evaluate"),
    (lambda: evaluate(MODEL, ROWS, [], loss_of), "no supervised target"),
    (lambda: evaluate(MODEL, ROWS, NAN, loss_of), "the loss of f:7, f:8 is nan"),
    (
        lambda: evaluate(MODEL, ROWS, BATCHES, loss_of, (lambda _: ["a"], lambda r: r.label), HOW),
        "1 predictions for 20",
    ),
    (lambda: Scoring(("acuracy",)), "did you mean 'accuracy'"),
    (lambda: summary({"rows": 1}, {"rows": 2}, HOW), "before has 1 rows, after 2"),
    (lambda: summary(*swapped(), HOW), "different rows"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_refusals(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
