"""Intervals over rows: Wilson for proportions, percentile bootstrap (Efron 1979) for the rest; paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from .metrics import Metric, check

Systems = Sequence[Sequence[Any]]
Draws = np.ndarray


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: `resamples` bootstrap draws at confidence `level`, from a private generator of `seed`."""

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, not {self.level}; 0.95 is usual")
        if self.resamples < 20:
            raise ValueError(f"resamples must be at least 20, not {self.resamples}; 1000 is usual")


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> list[float | None]:
        """[low, high], the form of eval.json; None where rows say nothing about spread."""
        return [plain(self.low), plain(self.high)]


def plain(value: float) -> float | None:
    """A number JSON can hold, None for nan and infinity."""
    return float(value) if math.isfinite(value) else None


def interval(
    metric: Metric, predictions: Sequence[Any], references: Sequence[Any], how: Resampling | None = None
) -> Interval:
    """The metric with its interval over rows; nan bounds below two rows, where rows say nothing about spread."""
    how = how or Resampling()
    value = metric.compute(predictions, references)
    if metric.proportion:
        return wilson(round(value * len(references)), len(references), how.level)
    if len(references) < 2:
        return Interval(value, math.nan, math.nan)
    return _percentiles(value, _resampled(metric, [predictions], references, how)[:, 0], how.level)


def difference(
    metric: Metric,
    before: Sequence[Any],
    after: Sequence[Any],
    references: Sequence[Any],
    how: Resampling | None = None,
) -> Interval:
    """after - before on the same rows, resampled together (paired), so that hard rows cancel out."""
    how = how or Resampling()
    check(metric.name, before, references)
    value = metric.compute(after, references) - metric.compute(before, references)
    if metric.proportion:
        old, new = (metric.table(system, references)[:, 0] for system in (before, after))
        return _paired_proportions(old, new, how.level)
    if len(references) < 2:
        return Interval(value, math.nan, math.nan)
    scores = _resampled(metric, [before, after], references, how)
    return _percentiles(value, scores[:, 1] - scores[:, 0], how.level)


def mean_difference(before: np.ndarray, after: np.ndarray, how: Resampling | None = None) -> Interval:
    """Difference of two ratios of sums: `before`, `after` [units, 2] hold (sum, count) of the same units, in order."""
    how = how or Resampling()
    if before.shape != after.shape or before.ndim != 2 or before.shape[1] != 2 or not len(before):
        raise ValueError(f"paired sums must both be [units, 2] with units > 0, not {before.shape} and {after.shape}")
    value = float(after[:, 0].sum() / after[:, 1].sum() - before[:, 0].sum() / before[:, 1].sum())
    if len(before) < 2:
        return Interval(value, math.nan, math.nan)
    draws = []
    for weights in _weights(len(before), how):
        old, new = weights @ before, weights @ after
        draws.append(new[:, 0] / new[:, 1] - old[:, 0] / old[:, 1])
    return _percentiles(value, np.concatenate(draws), how.level)


def wilson(right: int, rows: int, level: float = 0.95) -> Interval:
    """Wilson's score interval (1927) for `right` of `rows`; never empty, also at 0 and at all."""
    if rows <= 0 or not 0 <= right <= rows:
        raise ValueError(f"wilson: {right} right of {rows} rows is no proportion")
    z, p = _z(level), right / rows
    centre = (p + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def _z(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def _paired_proportions(before: np.ndarray, after: np.ndarray, level: float) -> Interval:
    """Bonett & Price 2012: one row added to each kind of change, so that no change observed is not certainty."""
    n, z = len(before), _z(level)
    gained, lost = (int((after > before).sum()) + 1) / (n + 2), (int((after < before).sum()) + 1) / (n + 2)
    half = z * math.sqrt((gained + lost - (gained - lost) ** 2) / (n + 2))
    centre = gained - lost
    return Interval(float(after.mean() - before.mean()), max(-1.0, centre - half), min(1.0, centre + half))


def _weights(rows: int, how: Resampling) -> Iterator[np.ndarray]:
    """How often each row is drawn, in pieces [draws, rows] of bounded size."""
    rng = np.random.default_rng(how.seed)
    piece = max(1, 2_000_000 // rows)
    for start in range(0, how.resamples, piece):
        yield rng.multinomial(rows, np.full(rows, 1 / rows), size=min(piece, how.resamples - start))


def _resampled(metric: Metric, systems: Systems, references: Sequence[Any], how: Resampling) -> Draws:
    """Each system's scores under the same draws [resamples, systems]."""
    if metric.stats is None:
        return _rescored(metric, systems, references, how)
    tables = [metric.table(system, references) for system in systems]
    pieces = [
        np.stack([[metric.of(row) for row in weights @ table] for table in tables], axis=1)
        for weights in _weights(len(references), how)
    ]
    return np.concatenate(pieces)


def _rescored(metric: Metric, systems: Systems, references: Sequence[Any], how: Resampling) -> Draws:
    scores = []
    for weights in _weights(len(references), how):
        for row in weights:
            drawn = [i for i, times in enumerate(row.tolist()) for _ in range(times)]
            truth = [references[i] for i in drawn]
            scores.append([metric.compute([system[i] for i in drawn], truth) for system in systems])
    return np.array(scores, dtype=np.float64)


def _percentiles(value: float, draws: np.ndarray, level: float) -> Interval:
    """Percentile bounds over the draws in which the metric exists (a constant resample has no correlation)."""
    usable = draws[~np.isnan(draws)]
    if not len(usable):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(usable, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(value, float(low), float(high))
