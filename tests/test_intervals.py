"""Intervals: published values for Wilson, coverage by simulation, pairing, degenerate samples, private generators."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from deltatune.evaluate.intervals import Resampling, difference, interval, mean_difference, wilson
from deltatune.evaluate.metrics import METRICS, find

FAST = Resampling(resamples=300)


# right, rows -> bounds as in Newcombe 1998, table I (method 3)
@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_table(right: int, rows: int, low: float, high: float) -> None:
    got = wilson(right, rows)
    assert (got.value, got.low, got.high) == pytest.approx((right / rows, low, high), abs=5e-5)


def test_proportions_get_wilson_and_never_an_empty_interval() -> None:
    got = interval(METRICS["accuracy"], ["a"] * 10, ["a"] * 10)
    assert got.value == got.high == 1.0
    assert got.low == pytest.approx(0.7225, abs=1e-4)
    assert got.bounds == [got.low, got.high]


def test_bootstrap_covers_the_mean() -> None:
    covered = 0
    for seed in range(100):
        x = np.random.default_rng(seed).normal(0.3, 1.0, 60)
        got = interval(METRICS["nll"], x, np.ones(60), Resampling(200, seed=seed))
        covered += got.low <= 0.3 <= got.high
    assert 88 <= covered <= 99


@pytest.mark.parametrize("name", ["macro_f1", "mcc"])
def test_resampled_sums_equal_recomputation(name: str) -> None:
    rng = np.random.default_rng(0)
    said, true = rng.integers(0, 3, (2, 40))
    whole = find(name)
    again = type(whole)("again", True, whole=whole.compute)
    assert interval(whole, said, true, FAST).bounds == pytest.approx(interval(again, said, true, FAST).bounds)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_have_intervals(name: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=80)
    got = interval(find(name), x + rng.normal(size=80), x, FAST)
    assert 0.4 < got.low < got.value < got.high < 0.9


@pytest.mark.parametrize("name", ["bleu", "rouge_l", "json_f1"])
def test_text_metrics_have_intervals(name: str) -> None:
    true = [f'{{"a": {i}, "b": {i}}}' for i in range(20)]
    said = [t if i % 3 else t.replace('"b"', '"c"') for i, t in enumerate(true)]
    got = interval(find(name), said, true, FAST)
    assert got.low < got.value < got.high


def test_a_paired_difference_is_narrower_than_two_apart() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(3, 2, 50)  # rows differ a lot, the two systems by a constant and a little noise
    ones = np.ones(50)
    after = hard + 0.2 + rng.normal(0, 0.05, 50)
    got = difference(METRICS["nll"], hard, after, ones, FAST)
    alone = interval(METRICS["nll"], hard, ones, FAST)
    assert 0.17 < got.low < got.high < 0.23
    assert alone.high - alone.low > 0.5
    table = [np.stack([x, ones], axis=1) for x in (hard, after)]
    assert mean_difference(*table, FAST).bounds == pytest.approx(got.bounds)


def test_paired_proportions() -> None:
    true = ["a"] * 100
    before = ["a"] * 50 + ["b"] * 50
    after = ["a"] * 45 + ["b"] * 5 + ["a"] * 30 + ["b"] * 20  # 30 gained, 5 lost
    got = difference(METRICS["accuracy"], before, after, true)
    spread = 1.959964 * math.sqrt((31 / 102 + 6 / 102 - (25 / 102) ** 2) / 102)
    assert got.value == pytest.approx(0.25)
    assert got.bounds == pytest.approx([25 / 102 - spread, 25 / 102 + spread], abs=1e-6)
    same = difference(METRICS["accuracy"], before, before, true)
    assert same.value == 0.0
    assert same.low < 0 < same.high


def test_the_generator_is_private_and_seeded() -> None:
    said, true = np.random.default_rng(0).integers(0, 2, (2, 30))
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = interval(METRICS["mcc"], said, true, FAST)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert interval(METRICS["mcc"], said, true, FAST) == first
    assert interval(METRICS["mcc"], said, true, Resampling(300, seed=1)) != first


def test_one_row_has_no_spread() -> None:
    got = interval(METRICS["rouge_l"], ["a b"], ["a c"])
    assert got.value == 0.5
    assert math.isnan(got.low)
    assert math.isnan(got.high)


REFUSED = [
    (lambda: wilson(3, 2), "3 right of 2"),
    (lambda: wilson(0, 0), "0 right of 0"),
    (lambda: Resampling(level=95), "level must lie between 0 and 1, not 95"),
    (lambda: Resampling(resamples=1), "at least 20, not 1"),
    (lambda: difference(METRICS["mcc"], [1], [1, 0], [1, 0]), "1 predictions for 2 references"),
    (lambda: mean_difference(np.ones((2, 2)), np.ones((3, 2))), r"\(2, 2\) and \(3, 2\)"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_refusals(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
