"""Manifest: the file beside an adapter, or a merged model, that says what it is and what its run recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST, CONFIG, OWN = "deltatune.json", "adapter_config.json", "adapter.safetensors"
FORMAT = 1
AGAIN = "Copy the folder again from where it was whole, or save the adapter anew"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError with the path and the way out."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {AGAIN}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {json.dumps(found)[:40]} where an object belongs. {AGAIN}")
    return found


def record_in(folder: Path) -> dict[str, Any]:
    """What was recorded of the run behind an adapter's folder or a merged model's; {} where nothing was."""
    path = folder / MANIFEST
    return dict(read_object(path).get("record") or {}) if path.is_file() else {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Leave the record of a run beside the model that its adapter was merged into."""
    if record:
        text = json.dumps({"format": FORMAT, "record": dict(record)}, indent=2, sort_keys=True)
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def adapter_in(folder: Path) -> Path:
    """The adapter's own folder: of a run folder, the one inside. ValueError for a run that has none yet."""
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is a run that has no adapter yet: deltatune resume {folder} goes on to its end")
    return folder


def is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model rather than an adapter."""
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in (CONFIG, OWN))
