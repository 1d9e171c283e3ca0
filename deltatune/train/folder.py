"""Folder: what a run leaves behind, each file whole or absent: env.json, verified.json, eval.json, report.md."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.attach import known
from ..core.delta import SLOT
from ..core.quant import size
from ..core.registry import METHODS
from ..core.store import state
from ..data.example import PARTS
from ..data.stream import index, seekable
from ..evaluate.score import FROM_LOSS
from ..report import page
from .job import Job
from .measure import PARTS_OF_STEP
from .place import Run
from .recompute import count
from .sets import streamed
from .verify import Check, sample


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """`folder` exists and can be written to, or ValueError; what was made for it goes again where the body fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"a run writes here")
        except OSError as error:
            raise ValueError(f"{folder} cannot be written to ({error.strerror}): give another --out") from error
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # what is not empty stays
                path.rmdir()
        raise


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    seconds: dict[str, float]  # by phase
    memory: dict[str, int]  # the most bytes up to the end of a phase
    work: dict[str, Any]  # of its steps (train.work)


@dataclass
class Finished:
    """What the end of a run knows."""

    checks: list[Check]
    result: dict[str, Any]
    cost: Cost
    steps: int
    trained: Mapping[str, nn.Parameter]


def finish(job: Job, folder: Path, done: Finished) -> Run:
    """Write the reports; a failed check makes the run 'unverified'."""
    status = verified(folder, done.checks)
    summary = summarise(job, folder, done)
    write_json(folder / "summary.json", summary)
    write(folder / "report.md", page.markdown(job.config, summary, done.checks))
    write_json(folder / "eval.json", done.result)  # last: its presence says that the run is finished
    return Run(folder, status, summary)


def verified(folder: Path, checks: Sequence[Check], whole: bool = True) -> str:
    """Write verified.json; returns 'done', or 'unverified' where a check failed, or 'unfinished' where not `whole`."""
    status = "unverified" if any(c.ok is False for c in checks) else "done" if whole else "unfinished"
    write_json(folder / "verified.json", {"status": status, "checks": [asdict(c) for c in checks]})
    return status


def summarise(job: Job, folder: Path, done: Finished) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [r for r in map(json.loads, lines) if r.get("event") == "step"]
    seconds = sum(r["seconds"] for r in steps)
    seen = sum(r.get("rows", 0) for r in steps) // job.prompts
    return {
        **{key: done.result.get(key) for key in FROM_RESULT},
        "objective": job.objective.name,
        "reads": [name for name in job.objective.wants.columns if name not in PARTS],
        "mergeable": all(METHODS[name].mergeable for name, _ in job.config.parts if name in METHODS),
        "eval_rows": len(job.eval),
        "generates": job.objective.name == "sft" and any(name not in FROM_LOSS for name in done.result["after"]),
        "train_rows": training_rows(job)["rows"],
        "rows_seen": seen,
        "epochs": seen / len(job.rows) if job.rows else None,
        "steps": done.steps,
        "trainable_parameters": sum(p.numel() for p in done.trained.values()),
        "stored_parameters": sum(t.numel() for t in state(job.model, job.adapter).values() if t.is_floating_point()),
        "parameters": together(job.model, done.trained),
        "peak_memory_bytes": max(done.cost.memory.values()),
        "memory": done.cost.memory,
        "seconds": done.cost.seconds,
        "step_seconds": {part: sum(r.get(f"{part}_s", 0.0) for r in steps) for part in PARTS_OF_STEP},
        "work": done.cost.work,
        "tokens_per_s": sum(r["tokens"] for r in steps) / seconds if seconds else 0.0,
        "rows_per_s": sum(r.get("rows", 0) for r in steps) / seconds if seconds else 0.0,
        "adapter": str(folder / "adapter"),
        "model": job.config.model.name,
        "notes": job.notes,
        "sample": sample(job),
        "unchecked": [str(c) for c in done.checks if c.ok is None],
        "failed": [str(c) for c in done.checks if c.ok is False],
    }


def together(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> int:
    """How many numbers the model had while it trained: what was trained may be pruned or folded since."""
    base = [p for name, p in model.named_parameters() if SLOT not in name.split(".")]
    return sum(size(p) for p in {id(p): p for p in (*base, *trained.values())}.values())


FROM_RESULT = (
    "metric", "before", "after", "intervals", "intervals_before", "gain", "measured_on", "retention", "untuned_prompts",
    "ood", "tasks", "methods",
)  # fmt: skip


def base_of(job: Job) -> str:
    """The fingerprint of the base as it was loaded."""
    return known(job.model, job.adapter).base


def environment(job: Job) -> dict[str, Any]:
    """What a reader needs to reproduce the run: versions, seed, data digests, the commit. No user or host name."""
    packages = ("deltatune", "torch", "transformers", "safetensors", "tokenizers", "numpy", "datasets")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
        "seed": job.config.train.seed,
        "recomputed_blocks": count(job),
        "base": base_of(job),
        "data": {"train": training_rows(job), "eval": digest(job.eval)}
        | {name: digest(rows) for name, rows in job.ood.items()},
        "commit": commit(),
    }


def digest(examples: Sequence[Any]) -> dict[str, Any]:
    """Rows and their sha256, whatever file they came from."""
    found = hashlib.sha256()
    for e in examples:
        found.update(
            repr((e.turns, e.prompt, e.completion, e.text, e.text_pair, e.label, e.tools)).encode("utf-8", "replace")
        )
        if e.media is not None:
            found.update(e.media.digest.encode())
    return {"rows": len(examples), "sha256": found.hexdigest()}


def training_rows(job: Job) -> dict[str, Any]:
    """As `digest`; of a stream, the digest is of its files' bytes, and rows are counted where a line is a row."""
    if not job.config.data.streaming:
        return digest(job.train)
    paths, found = [Path(ref) for ref in streamed(job.config.data.train)], hashlib.sha256()
    for path in paths:
        about = path.stat()
        found.update(file_digest(path, about.st_size, about.st_mtime_ns).encode())
    counted = sum(index(path).rows for path in paths) if all(map(seekable, paths)) else None
    return {"rows": counted, "sha256": found.hexdigest()}


@lru_cache(maxsize=256)
def file_digest(path: Path, size: int, changed: int) -> str:
    """sha256 of a file's bytes, read once as long as the file stays as it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str | None:
    """The git commit of the working folder, where there is one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(plain(value), indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What is no JSON number (nan, infinities) as null."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
