"""From imports to the end of the first step (benchmarks/speed.py): load the base, attach, train one short row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import speed_train

Row = dict[str, Any]
prepare = speed_train.prepare


def ours(case: Any, folder: Path) -> Row:
    return started(speed_train.ours(case, folder))


def peer(case: Any, folder: Path) -> Row:
    return started(speed_train.peer(case, folder))


def started(found: Row) -> Row:
    return found | {"speed": 60 / found["first"], "unit": "starts/min"}
