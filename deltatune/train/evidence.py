"""Evidence: what was measured before step 1 and after the last, and what eval.json says of the two."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.attach import disabled, each, known
from ..data.example import Example
from ..evaluate import retention as kept
from ..evaluate.metrics import find
from ..evaluate.score import Scored, gain, intervals, score, untuned
from ..objectives import record
from .folder import base_of, digest, write_json
from .job import Job


@dataclass
class Before:
    """What was measured before step 1."""

    scored: dict[str, Any]
    prompts: dict[str, Any] = field(default_factory=dict)
    retention: dict[str, Any] | None = None

    def as_scored(self) -> Scored:
        """The score; JSON holds nan as null."""
        metrics = {name: math.nan if value is None else value for name, value in self.scored["metrics"].items()}
        loss = math.nan if self.scored["loss"] is None else self.scored["loss"]
        return Scored(**{**self.scored, "loss": loss, "metrics": metrics})


def before(job: Job, path: Path) -> Before:
    """The untuned model, measured once and kept in `path`, where a resumed run on the same rows reads it."""
    key = key_of(job)
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("key") == key:
                return Before(**kept)
            job.notes.append("what is measured has changed since the run began: the untuned model is measured anew")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            job.notes.append(f"{path} is damaged ({error}): the untuned model is measured anew")
    plain = replace(job, encoding=replace(job.encoding, prompt_ids=()))  # a base has no virtual tokens
    with disabled(job.model):
        if job.eval:
            scored, tried = untuned(plain, job.eval)
        else:
            scored, tried = score(plain, job.sample(), predicts=False), {}
        found = Before(asdict(scored), tried, general(job))
    write_json(path, {"key": key, **asdict(found)})
    return found


def key_of(job: Job) -> dict[str, Any]:
    """What the numbers before step 1 depend on: the base, the rows, and how they are measured."""
    found = {
        "base": base_of(job),
        "rows": digest(job.sample()),
        "eval": job.config.eval.model_dump(),
        "objective": record(job.objective),
    }
    key: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return key


def general(job: Job, compare: bool = False) -> dict[str, Any] | None:
    """How well the model reads general text now; None when the user turned it off or the model reads no text.

    A note when there is no text to be had.

    compare: the KL to the base too, a second forward pass. A model without a language head has nothing else.
    """
    if not job.config.eval.retention or job.media is not None:
        return None
    try:
        texts = kept.default_texts()
    except (ValueError, OSError) as error:
        return {"error": f"general text could not be had: {error}"}
    base = (lambda: disabled(job.model)) if compare or kept.kind_of(job.model) == "drift" else None
    return kept.retention(job.model, job.tokenizer, texts, base=base)


def after(job: Job, first: Before) -> dict[str, Any]:
    """eval.json: before, after, intervals, what was forgotten, and how far it carries out of domain."""
    was, now = first.as_scored(), score(job, job.sample(), predicts=bool(job.eval))
    said = told(job)  # before anything else is read: what methods count is of these rows
    metric = next(iter(now.metrics), "loss") if job.eval else "loss"
    result = {
        "metric": metric,
        "higher_is_better": metric != "loss" and find(metric).higher_is_better,
        "before": was.numbers,
        "after": now.numbers,
        "intervals": known_bounds(intervals(now)),
        "intervals_before": known_bounds(intervals(was)),
        "gain": gain(was, now),
        "rows": len(job.sample()),
        "measured_on": "eval" if job.eval else "train",
        "untuned_prompts": first.prompts,
        "generated_tokens_per_s": now.tokens_per_s,
        "retention": forgotten(first.retention, lambda: general(job, compare=True)),
    }
    if job.ood:

        def measure(rows: Sequence[Example]) -> Mapping[str, Any]:
            return score(job, rows).numbers

        result["ood"] = kept.out_of_domain(measure, now.numbers, job.ood)
    if each_task := now.by_task:
        was_by = was.by_task
        result["tasks"] = {task: {"before": was_by.get(task, {}), "after": found} for task, found in each_task.items()}
    if said:
        result["methods"] = said
    return result


def told(job: Job) -> dict[str, Any]:
    """What the methods have to say after training, where they have a `report(model, deltas)`: drift, routing, ..."""
    own = [delta for _, delta in each(job.model, job.adapter)]
    return {
        m.method_name: m.report(job.model, [delta for delta in own if delta.method is m])
        for m in known(job.model, job.adapter).methods[job.adapter]
        if hasattr(m, "report")
    }


def known_bounds(found: Mapping[str, Any]) -> dict[str, Any]:
    """The intervals there are: one row has none for some metrics, and what is written is plain numbers."""
    return {name: bounds for name, bounds in found.items() if None not in bounds}


def forgotten(first: Mapping[str, Any] | None, again: Any) -> dict[str, Any]:
    """What eval.json says of general text; `again()` measures it anew, if it was measured before."""
    if not first or "error" in first:
        return dict(first or {})
    return kept.forgotten(first, again() or {})
