"""Checkpoint: complete or absent. safetensors and JSON in a temporary folder, manifest last, fsync, one rename."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltatune.train.journal import Journal

SCHEMA = 1
MANIFEST = "manifest.json"
TENSORS = ("trainable", "optimizer", "extra")
NAME = re.compile(r"ckpt-(\d{8,})")
TAIL = b',\n "digest": "%s"\n}\n'  # the manifest's own: sha256 of every byte before it

log = logging.getLogger("deltatune")


class SaveFailed(OSError):
    """A checkpoint could not be written. The previous one is untouched."""


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on: tensors by canonical key, and `state` as JSON."""

    step: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)  # random generators, deltas' own state


def _sync(path: Path) -> None:
    """Bring a file or a folder to the disk, not only to the disk's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # macOS: fsync alone stops at the drive's own cache
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
    _sync(path)


def _own(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor that shares its memory with nothing but (perhaps) the live one."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _short(text: str) -> str:
    """A text no longer than a digest as it is, a longer one as its sha256."""
    return text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()


def _seal(manifest: dict[str, Any]) -> bytes:
    body = json.dumps(manifest, indent=1)[:-2].encode()
    return body + TAIL % hashlib.sha256(body).hexdigest().encode()


def _unseal(path: Path) -> dict[str, Any]:
    """The manifest, or ValueError with what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing: the save was not finished")
    data = path.read_bytes()
    body = data[: max(len(data) - len(TAIL % (b"0" * 64)), 0)]
    expected, actual = body + TAIL % hashlib.sha256(body).hexdigest().encode(), data
    if actual != expected:
        digests = hashlib.sha256(expected).hexdigest(), hashlib.sha256(actual).hexdigest()
        raise ValueError(f"{path.name} is damaged: expected sha256 {digests[0]}, actual {digests[1]}")
    manifest: dict[str, Any] = json.loads(data)
    if manifest["schema"] != SCHEMA:
        raise ValueError(f"{path.name} has schema {manifest['schema']}, this version reads {SCHEMA}")
    return manifest


def problems(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in `folder`, file by file; empty when every byte is as it was written."""
    try:
        manifest = _unseal(folder / MANIFEST)
    except (ValueError, OSError) as error:
        return [str(error)]
    wrong = [] if folder.name == f"ckpt-{manifest['step']:08d}" else [f"holds step {manifest['step']}"]
    return wrong + [fault for name, facts in manifest["files"].items() if (fault := _fault(folder / name, facts))]


def _fault(path: Path, facts: dict[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if (size := path.stat().st_size) != facts["size"]:
            return f"{path.name}: expected {facts['size']} bytes, actual {size}"
        if (digest := _digest(path)) != facts["sha256"]:
            return f"{path.name}: expected sha256 {facts['sha256']}, actual {digest}"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return None


class Store:
    """The checkpoints of one run in `folder`: `ckpt-<step>/`, the newest valid one wins, no pointer to go stale.

    base, template: the base model's fingerprint and the chat template; another one on resume is an error.
    """

    def __init__(self, folder: Path | str, *, base: str = "", template: str = "", keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must stay")
        self.folder, self.keep = Path(folder), keep
        self.identity = {"base": _short(base), "template": _short(template)}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder.parent / "metrics.jsonl")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process trains in a run folder. The lock dies with its process, so it is never stale."""
        import fcntl

        with open(self.folder / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise ValueError(
                    f"{self.folder.parent} is being trained by process {owner}: wait, stop it, or use another folder"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for path in self.folder.glob("*.tmp-*"):  # unfinished saves and deletions of a process that died
                shutil.rmtree(path, ignore_errors=True)
            yield

    def all(self) -> list[Path]:
        """Every checkpoint folder, newest first, valid or not."""
        return sorted((p for p in self.folder.iterdir() if NAME.fullmatch(p.name)), key=_step, reverse=True)

    def save(self, snapshot: Snapshot, protect: Collection[int | None] = ()) -> Path:
        """Write, check, and only then delete older ones beyond `keep` (never a step in `protect`). Or SaveFailed."""
        final = self.folder / f"ckpt-{snapshot.step:08d}"
        temporary = self.folder / f"{final.name}.tmp-{uuid.uuid4().hex}"
        try:
            if final.exists() and not problems(final):
                return final  # this step is already safe
            self._fill(temporary, snapshot)
            if final.exists():
                self._remove(final)
            os.rename(temporary, final)
            _sync(self.folder)
            if wrong := problems(final):
                raise OSError(f"reading it back: {'; '.join(wrong)}")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if final.exists() and problems(final):
                shutil.rmtree(final, ignore_errors=True)  # or it would count as one of those to keep
            raise SaveFailed(f"checkpoint {final.name} was not saved: {error}") from error
        self._prune(snapshot.step, protect)
        return final

    def _fill(self, folder: Path, snapshot: Snapshot) -> None:
        folder.mkdir()
        for part in TENSORS:
            path = folder / f"{part}.safetensors"
            save_file({key: _own(t) for key, t in getattr(snapshot, part).items()}, path)
            _sync(path)
        _write(folder / "state.json", json.dumps(snapshot.state).encode())
        files = {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in sorted(folder.iterdir())}
        manifest = {"schema": SCHEMA, "step": snapshot.step, "world": 1, **self.identity, "files": files}
        _write(folder / MANIFEST, _seal(manifest))
        _sync(folder)

    def _remove(self, folder: Path) -> None:
        """Out of sight in one step, so that no half-deleted checkpoint is ever seen."""
        doomed = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _prune(self, step: int, protect: Collection[int | None]) -> None:
        older = [p for p in self.all() if _step(p) < step][self.keep - 1 :]
        try:
            for path in older:
                if _step(path) not in protect:
                    self._remove(path)
        except OSError as error:
            log.warning("old checkpoints could not be deleted: %s", error)

    def latest(self) -> tuple[Snapshot | None, list[str]]:
        """The newest valid checkpoint, and what was wrong with newer ones. All of them invalid: ValueError."""
        notes: list[str] = []
        for path in self.all():
            if not (wrong := problems(path)):
                if notes:
                    notes.append(f"falling back to {path.name}: the steps after it are trained again")
                return self.load(path), notes
            notes.append(f"{path.name} is not usable: {'; '.join(wrong)}")
        if notes:
            raise ValueError(
                f"{self.folder} has checkpoints, but none is valid, and starting over silently would lose the run. "
                f"{'. '.join(notes)}. To discard them and start over, use --restart"
            )
        return None, []

    def load(self, path: Path) -> Snapshot:
        """Read one checkpoint, checked byte by byte and against this store's base and template."""
        if wrong := problems(path):
            raise ValueError(f"{path.name} is not usable: {'; '.join(wrong)}")
        manifest = _unseal(path / MANIFEST)
        for what, ours in self.identity.items():
            if ours != manifest[what]:
                raise ValueError(
                    f"{path} was made with another {what}: {manifest[what] or 'none'}, this run has {ours or 'none'}. "
                    "Use the model and tokenizer of that run, or another run folder"
                )
        parts = {part: load_file(path / f"{part}.safetensors") for part in TENSORS}
        return Snapshot(manifest["step"], state=json.loads((path / "state.json").read_bytes()), **parts)

    def discard(self) -> None:
        """Delete every checkpoint (`--restart`)."""
        for path in self.all():
            self._remove(path)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[1])
