"""Place: the folder that a run is to have, and the finished run that a folder holds, known before torch is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..blocks import called
from ..config import Config
from ..report import page


@dataclass
class Run:
    """A finished (or interrupted) run: its folder, how it ended, and what is on the end screen."""

    dir: Path
    status: str
    summary: dict[str, Any] = field(default_factory=dict)

    def screen(self) -> Any:
        return page.screen(self)


def place(config: Config, out: Path | None) -> Path:
    """The run folder; a folder that holds another run is never written over."""
    name = called(config.presets, [name for name, _ in config.parts])
    model = Path(config.model.name.removeprefix("pypi:")).name
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out or Path(config.output.dir or "runs") / f"{stamp}-{name}-{model}"
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"{folder} holds a run already: `deltatune resume {folder}` goes on with it, or give another --out"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a run needs a folder of its own: give another --out")
    if folder.exists() and (there := sorted(path.name for path in folder.iterdir())):
        raise ValueError(
            f"{folder} holds other files ({there[0]}{', ...' * (len(there) > 1)}), and a run needs its own folder: "
            f"give a new one, for instance --out {folder / 'run'}"
        )
    return folder


def finished(folder: Path) -> Run | None:
    """The run that `folder` holds, if it came to its end."""
    measured = folder / "eval.json"
    if not measured.exists() or not read_json(measured).get("after"):
        return None
    status = read_json(folder / "verified.json").get("status")
    if status not in ("done", "unverified"):
        raise ValueError(unreadable(folder / "verified.json", f"has the status {status!r}"))
    if not (folder / "adapter").is_dir():
        raise ValueError(unreadable(folder / "adapter", "is missing"))
    return Run(folder, status, read_json(folder / "summary.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a finished run; ValueError that names the file and the way out."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(unreadable(path, "is missing")) from None
    except (OSError, ValueError) as error:
        raise ValueError(unreadable(path, f"is damaged ({error})")) from error
    if not isinstance(found, dict):
        raise ValueError(unreadable(path, "is damaged (no JSON object)"))
    return found


def unreadable(path: Path, what: str) -> str:
    return f"{path} {what}: delete {path.with_name('eval.json')}, and `deltatune resume {path.parent}` writes it anew"
