"""`deltatune runs`: the run folders there are, what they changed, and where they stand."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from deltatune.blocks import called
from deltatune.commands.methods import Json
from deltatune.commands.shell import emit, machine, main, screen
from deltatune.marks import nearest, read_file
from deltatune.terminal import plain


def check_run(folder: Path) -> None:
    """ValueError unless `folder` is a run folder; the nearest one beside it is named."""
    if (folder / "config.yaml").is_file():
        return
    beside = [f.parent.name for f in folder.parent.glob("*/config.yaml")] if folder.parent.is_dir() else []
    what = "has no config.yaml, so it is no run folder" if folder.is_dir() else "there is no such run folder"
    raise ValueError(f"{folder}: {what}{nearest(folder.name, beside)}; `deltatune runs {folder.parent}` lists them")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where the file is missing or broken: listing runs must not fail for one of them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def settings(folder: Path) -> dict[str, Any]:
    """Model and method of a run, read leniently: runs of other versions are listed too."""
    try:
        tree, _ = read_file(folder / "config.yaml")
    except (ValueError, OSError):
        return {"model": None, "method": None}
    model, method = tree.get("model"), tree.get("method") or "lora"
    parts = method if isinstance(method, list) else [method]
    names = [next(iter(part), "?") if isinstance(part, dict) else str(part) for part in parts]
    chosen = [str(name) for name in tree.get("presets") or ()]
    return {
        "model": model.get("name") if isinstance(model, dict) else model,
        "method": called(chosen, [str(name) for name in names]),
    }


def status(folder: Path, measured: dict[str, Any]) -> str:
    """done, unverified, unfinished (checks or checkpoints are there) or empty; only a measured run came to its end."""
    verified = read_json(folder / "verified.json")
    if measured.get("after"):
        return "done" if verified.get("status") == "done" else "unverified"
    return "unfinished" if verified or any(folder.glob("checkpoints/ckpt-*")) else "empty"


def describe(folder: Path) -> dict[str, Any]:
    """One run as a flat record."""
    measured = read_json(folder / "eval.json")
    metric = str(measured.get("metric") or "loss")
    sides = [measured.get(when) for when in ("before", "after")]
    before, after = (side.get(metric) if isinstance(side, dict) else None for side in sides)
    when = datetime.fromtimestamp((folder / "config.yaml").stat().st_mtime).astimezone().isoformat(timespec="minutes")
    scores = {"metric": metric, "before": before, "after": after}
    return {"name": folder.name, "when": when, **settings(folder), **scores, "status": status(folder, measured)}


def change(record: dict[str, Any]) -> str:
    """`accuracy 0.412 -> 0.871`, or nothing before the run was measured."""
    numbers = [f"{x:.3f}" if isinstance(x, (int, float)) else "?" for x in (record["before"], record["after"])]
    return f"{record['metric']} {numbers[0]} -> {numbers[1]}" if numbers != ["?", "?"] else ""


@main.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder of run folders.")] = Path("runs"),
    json_: Json = False,
) -> None:
    """List run folders, newest first."""
    if not folder.is_dir() and folder != Path("runs"):
        raise ValueError(f"{folder}: there is no such folder")
    found = [describe(path.parent) for path in folder.glob("*/config.yaml")]
    found.sort(key=lambda record: str(record["when"]), reverse=True)
    if machine():
        emit(found)
        return
    if not found:
        screen().print(f"no runs in {folder}; start one with: deltatune train", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "when", "method", "model", "before -> after", "status"):
        table.add_column(column, overflow="fold")
    for record in found:
        cells = (record["name"], record["when"], record["method"], record["model"], change(record), record["status"])
        table.add_row(*(Text(plain(str(cell or "?"))) for cell in cells))
    screen().print(table)
