"""Measure a model: one set of rows with loss and metrics, and what a run writes as eval.json."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .intervals import Interval, Resampling, difference, interval
from .metrics import METRICS, Metric, find, for_task

__all__ = [
    "METRICS",
    "Interval",
    "Metric",
    "Resampling",
    "Scoring",
    "difference",
    "evaluate",
    "find",
    "for_task",
    "interval",
    "numbers",
    "summary",
]

LossOf = Callable[[Any], tuple[Any, Any]]
Predict = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Scoring:
    """Which `metrics` are computed, the main one first, and `how` their intervals are made (None: no intervals)."""

    metrics: tuple[str, ...] = ()
    how: Resampling | None = field(default_factory=Resampling)

    def __post_init__(self) -> None:
        for name in self.metrics:
            find(name)


def evaluate(
    model: Any,
    examples: Sequence[Any],
    batches: Iterable[Any],
    loss_of: LossOf,
    answers: tuple[Predict, Callable[[Any], Any]] | None = None,
    settings: Scoring | None = None,
) -> dict[str, Any]:
    """{"loss", <metric>..., "rows", "seconds", "intervals": {<metric>: [low, high]}, "per_row": [...]} of one set.

    `loss_of(batch)` gives (sum of the losses, how many targets: a number, or the batch's own `targets` if a mapping
    comes back); the loss is the sum over the set by its targets. `answers` = (predict, reference): predictions for the
    examples, and what each is compared with; without it there are no metrics but the likelihood's own (nll,
    perplexity). In evaluation mode, without gradients, with a private random state. ValueError for a set without rows
    or targets, and for a loss that is not finite.
    """
    import torch

    from .generate import evaluating, private_rng

    settings = settings or Scoring()
    if not examples:
        raise ValueError("no rows to evaluate; is the evaluation set empty?")
    start = time.perf_counter()
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), private_rng(device, 0):
        sums = [_loss(batch, loss_of) for batch in batches]
        said = list(answers[0](examples)) if answers else None
    total, targets = (sum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    if targets <= 0:
        raise ValueError(f"{len(examples)} rows hold no supervised target: the loss is over nothing")
    found: dict[str, Any] = {"loss": total / targets, "rows": len(examples)}
    likelihood = tuple(n for n in settings.metrics if n in ("nll", "perplexity"))
    found |= numbers(likelihood, [s for s, _ in sums], [n for _, n in sums], settings.how)
    if answers and said is not None:
        wanted = [answers[1](e) for e in examples]
        rest = tuple(n for n in settings.metrics if n not in likelihood)
        more = numbers(rest, said, wanted, settings.how)
        found |= more | {"intervals": found["intervals"] | more["intervals"], "per_row": _rows(examples, said, wanted)}
    return found | {"seconds": time.perf_counter() - start}


def _loss(batch: Any, loss_of: LossOf) -> tuple[float, float]:
    total, targets = loss_of(batch)
    count = float(batch.targets if isinstance(targets, Mapping) else targets)
    value = float(total)
    if not math.isfinite(value):
        where = ", ".join(getattr(batch, "where", ())[:3]) or "an unnamed batch"
        raise ValueError(f"the loss of {where} is {value}; a set with such a row cannot be measured")
    return value, count


def _rows(examples: Sequence[Any], said: Sequence[Any], wanted: Sequence[Any]) -> list[dict[str, Any]]:
    triples = zip(examples, said, wanted, strict=True)
    return [{"where": getattr(e, "where", ""), "prediction": s, "reference": w} for e, s, w in triples]


def numbers(
    names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any], how: Resampling | None = None
) -> dict[str, Any]:
    """{<metric>: value, ..., "intervals": {<metric>: [low, high]}} of aligned predictions and references."""
    found: dict[str, Any] = {}
    bounds: dict[str, list[float | None]] = {}
    for name in names:
        if how is None:
            found[name] = plain(find(name).compute(predictions, references))
        else:
            measured = interval(find(name), predictions, references, how)
            found[name], bounds[name] = plain(measured.value), [plain(b) for b in measured.bounds]
    return found | {"intervals": bounds}


def plain(value: float) -> float | None:
    """A number JSON can hold, None for nan and infinity."""
    return float(value) if math.isfinite(value) else None


def summary(
    before: Mapping[str, Any], after: Mapping[str, Any], settings: Scoring, retention: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """eval.json: {"metric", "higher_is_better", "before", "after", "intervals", "gain", "retention"}.

    `before` and `after` come from `evaluate` on the same rows. `intervals` are those of `after`, `gain` is
    {<metric>: {"value", "interval"}}: after - before, paired by row. The main metric is the first, else the loss.
    """
    if before["rows"] != after["rows"]:
        raise ValueError(f"before has {before['rows']} rows, after {after['rows']}; measure both on the same set")
    main = settings.metrics[0] if settings.metrics else "loss"
    return {
        "metric": main,
        "higher_is_better": main != "loss" and find(main).higher_is_better,
        "before": _side(before, settings.metrics),
        "after": _side(after, settings.metrics),
        "intervals": dict(after.get("intervals", {})),
        "gain": _gains(before, after, settings),
        "retention": dict(retention or {}),
    }


def _side(measured: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    kept = ("loss", *names, "rows", "seconds", "intervals")
    return {name: measured[name] for name in kept if name in measured}


def _gains(before: Mapping[str, Any], after: Mapping[str, Any], settings: Scoring) -> dict[str, Any]:
    """Paired gains, for the metrics that compare predictions with references."""
    old, new = before.get("per_row", ()), after.get("per_row", ())
    if settings.how is None or not old or not new:
        return {}
    wanted = [row["reference"] for row in old]
    if wanted != [row["reference"] for row in new]:
        raise ValueError("before and after were measured on different rows; gains need the same ones in the same order")
    said = [[row["prediction"] for row in side] for side in (old, new)]
    gains = {}
    for name in (n for n in settings.metrics if n not in ("nll", "perplexity")):
        gap = difference(find(name), said[0], said[1], wanted, settings.how)
        gains[name] = {"value": plain(gap.value), "interval": [plain(b) for b in gap.bounds]}
    return gains
