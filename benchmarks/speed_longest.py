"""The longest sequence that one step trains on before so much memory is taken (benchmarks/speed.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deltatune import load
from deltatune.core.attach import packing
from deltatune.core.recompute import recomputing, units
from deltatune.data.batch import pack
from deltatune.objectives import SFT
from deltatune.train.step import Step
from speed_train import Peak, encoded, opened
from speed_train import prepare as written

Row = dict[str, Any]
ROOM = 8 * 2**30
prepare = written


def lengths(most: int) -> Iterator[int]:
    """1024, 1536, 2048, 3072, 4096, ... tokens."""
    n = 1024
    while n <= most:
        yield n
        if n + n // 2 <= most:
            yield n + n // 2
        n *= 2


def grown(case: Any, given: list[Row], peak: Peak, step: Callable[[Row], float]) -> Row:
    """Steps on ever more tokens of one row, until the peak is above ROOM or the row ends."""
    row, found, tried = given[0], 0, []
    for n in lengths(len(row["ids"])):
        loss = step({"ids": row["ids"][:n], "labels": [-100] * (3 * n // 4) + row["ids"][3 * n // 4 : n]})
        tried.append([n, peak.bytes(), loss])
        if peak.bytes() > ROOM:
            break
        found = n
    return {"speed": found, "unit": "tokens", "peak": tried[-1][1], "losses": [x[2] for x in tried], "tried": tried}


def ours(case: Any, folder: Path) -> Row:
    """As `train.checkpoint_gradients: auto` does where no more memory is free: all blocks are recomputed."""
    peak, model = Peak(), opened(case)
    load(model, folder / "start", "a")
    packing(model)
    step = Step(model, SFT()).train()

    def one(row: Row) -> float:
        batch = pack(encoded(model, [row])).to(model.device)
        loss = step(batch)[0] / batch.targets
        loss.backward()
        model.zero_grad()
        return float(loss)

    with recomputing(model, len(units(model))):
        return grown(case, json.loads((folder / "rows.json").read_text())["rows"], peak, one)


def peer(case: Any, folder: Path) -> Row:
    """As Trainer does by default: nothing is recomputed."""
    import peft

    peak, model = Peak(), opened(case)
    model = peft.PeftModel.from_pretrained(model, folder / "start", is_trainable=True).train()
    if case.recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def one(row: Row) -> float:
        ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("ids", "labels"))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        model.zero_grad()
        return float(loss)

    return grown(case, json.loads((folder / "rows.json").read_text())["rows"], peak, one)
