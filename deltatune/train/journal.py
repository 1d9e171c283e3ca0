"""Journal: metrics.jsonl, one JSON object a line, readable after any crash and free of repeats after a resume."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("deltatune")


class Journal:
    """Appends to `path`. A full disk costs lines, never the run: the first lost line is announced, all are counted."""

    def __init__(self, path: Path):
        self.path, self.lost = path, 0
        self.size = path.stat().st_size if path.exists() else 0  # bytes known to be whole lines

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. What is not a JSON number (nan, inf) is written as text, for strict readers."""
        line = json.dumps({k: _plain(v) for k, v in record.items()}, default=str).encode() + b"\n"
        try:
            with open(self.path, "ab") as file:
                file.truncate(self.size)  # drops what a failed write may have left
                file.write(line)
            self.size += len(line)
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                log.warning("%s cannot be written, lines are being lost: %s", self.path, error)

    def sync(self) -> int:
        """Make the lines durable; the size in bytes, to be kept in a checkpoint."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
        return self.size

    def rewind(self, step: int, offset: int) -> None:
        """Drop what was written after step `step`: the bytes past `offset`, or else torn lines and later steps."""
        if not self.path.exists():
            self.size = 0
            return
        with open(self.path, "rb+") as file:
            data = file.read(offset)
            if len(data) < offset or not (data.endswith(b"\n") or not data):
                data = b"".join(line for line in data.splitlines(True) if _step(line) <= step)
                file.seek(0)
                file.write(data)
            file.truncate(len(data))
        self.size = len(data)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value


def _step(line: bytes) -> float:
    """The step of a line; infinity for one that is torn."""
    try:
        return float(json.loads(line).get("step", 0)) if line.endswith(b"\n") else float("inf")
    except (ValueError, AttributeError):
        return float("inf")
