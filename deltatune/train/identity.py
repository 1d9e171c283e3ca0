"""Identity: what a run was started with, so that a resumed one is the same run or is refused."""

from __future__ import annotations

import json
from typing import Any

from ..objectives import record
from .checkpoint import Store
from .folder import base_of, training_rows, write_json
from .job import Job

ROWS = "training rows"
FILE = "identity.json"  # in checkpoints/, written when step 1 is still to come


def described(job: Job) -> dict[str, Any]:
    """What decides the steps of a run besides the loop's own settings, in words a person can compare."""
    t, batching = job.config.train, job.batching()
    found = {
        "base model": base_of(job),
        ROWS: training_rows(job),
        "streaming": job.config.data.streaming,
        "method": [dict(block) for block in job.config.method],
        "objective": record(job.objective),
        "batch_tokens": t.batch_tokens,
        "batch_rows": t.batch_rows,
        "accumulate": t.accumulate,
        "pass_tokens": t.pass_tokens,
        "packing": batching.packing,
        "max_length": job.encoding.max_length,
        "precision": t.precision,
    }
    if words := job.config.model.add_tokens:
        found["added tokens"] = words
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def demand_same(job: Job, store: Store) -> None:
    """ValueError where `store` holds checkpoints of a run on other rows, or with another method, objective or base."""
    path, ours = store.folder / FILE, described(job)
    if store.all() and path.exists():
        try:
            theirs = {"pass_tokens": "off"} | json.loads(path.read_text(encoding="utf-8"))  # as it was before the key
        except ValueError:
            theirs = None  # damaged: there is nothing to compare with
        corrected = theirs and theirs.get(ROWS, "") is None
        same = {ROWS} if corrected else set()
        changed = [
            f"{k} was {theirs.get(k)}, is now {v}"
            for k, v in ours.items()
            if theirs and k not in same and theirs.get(k) != v
        ]
        if changed:
            folder = store.folder.parent
            raise ValueError(
                f"{folder} was started with something else: {'; '.join(changed)}. Put back what it was, "
                f"or discard its checkpoints and start over with `deltatune resume {folder} --restart`"
            )
    write_json(path, ours)


def rows_will_change(store: Store) -> None:
    """A run that ended at a row which cannot be used is resumed on corrected rows."""
    path = store.folder / FILE
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {ROWS: None})
