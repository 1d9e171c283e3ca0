"""Epochs after the first where only the top of a model learns (benchmarks/speed.py): with what the frozen blocks made
kept, and without. Whole runs, as a user starts them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from deltatune import zoo
from deltatune.config import Config
from deltatune.train.run import run
from speed_train import Peak

Row = dict[str, Any]


def prepare(case: Any, data: Path, folder: Path) -> None:
    """Write rows of a set as the library reads them."""
    path = data / case.source
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))[:: case.every][: case.rows]
        rows: Any = [{"text": line["text"], "label": line["category"]} for line in lines]
    else:
        rows = json.loads(path.read_text(encoding="utf-8"))[:: case.every][: case.rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(zoo.model_path(case.base), folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    calm = {key: 0.0 for key in config if key.endswith("dropout_prob")}  # with dropout there is nothing to keep
    (folder / "base" / "config.json").write_text(json.dumps(config | calm))


def cached(case: Any, folder: Path) -> Row:
    return trained(case, folder, "on")


def whole(case: Any, folder: Path) -> Row:
    return trained(case, folder, "off")


def trained(case: Any, folder: Path, how: str) -> Row:
    peak = Peak()
    said = "classify" if case.source.endswith("csv") else "sft"
    settings = {"epochs": case.epochs, "batch_rows": case.batch, "lr": case.lr, "cache_activations": how}
    given = Config(
        model=str(folder / "base"), method=case.method, objective=said, data={"train": str(folder / "rows.jsonl")},
        train=settings, eval={"retention": False},
    )  # fmt: skip
    out = folder / f"{how}-{len(list(folder.glob(how + '-*')))}"
    done = run(given, out=out, observers=())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    later = steps[len(steps) // case.epochs :]
    work = done.summary["work"]
    return {
        "speed": sum(s["tokens"] for s in later) / sum(s["seconds"] for s in later),
        "unit": "tokens/s",
        "losses": [s["loss"] for s in steps],
        "peak": peak.bytes(),
        "flops": work["flops"] / work["steps"],
        "first": median(s["seconds"] for s in steps[: len(steps) // case.epochs]),
        "later": median(s["seconds"] for s in later),
    }
