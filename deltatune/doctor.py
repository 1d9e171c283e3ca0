"""Doctor: what this machine offers a run, and whether a run folder is whole."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from deltatune.marks import read_file

INDEX_SECONDS = 8.0  # how long an unreachable package index is waited for
PACKAGES = ("torch", "transformers", "safetensors", "datasets", "peft")
JSON_FILES = ("env.json", "eval.json", "verified.json", "summary.json")
GONE = "the run is finished and should have it: delete eval.json, and resume writes it anew"
NEEDED_GB = 2.0  # a small model, its data and a few checkpoints


@dataclass(frozen=True)
class Check:
    """One finding. `ok`: True, False, or None where it is only worth knowing; `note` says the way out."""

    name: str
    value: str
    ok: bool | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same as a mapping."""
        return asdict(self)


def supported() -> dict[str, Any]:
    """The version ranges this package was made for, by package; empty when it runs from a bare source folder."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("deltatune") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [Requirement(text) for text in wanted]
    return {requirement.name: requirement.specifier for requirement in found if requirement.specifier}


def version(name: str, ranges: dict[str, Any]) -> Check:
    """A package's version against its supported range; a missing one is wrong only when it is needed."""
    wanted = ranges.get(name)
    try:
        have = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed", None if name == "peft" else False, f"pip install '{name}{wanted or ''}'")
    if wanted is None:
        return Check(name, have)
    fits = wanted.contains(have, prereleases=True)
    return Check(name, have, fits, "" if fits else f"supported: {wanted}; pip install '{name}{wanted}'")


def python() -> Check:
    """The interpreter."""
    fits = sys.version_info >= (3, 11)
    return Check("python", platform.python_version(), fits, "" if fits else "Python 3.11 or later is needed")


def system() -> list[Check]:
    """Operating system, cores and memory."""
    memory = psutil.virtual_memory()
    untested = "macOS is supported, not tested" if sys.platform == "darwin" else ""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free, whole = memory.available / 2**30, memory.total / 2**30
    few = "" if free >= NEEDED_GB else "close other programs, or train with checkpoint_gradients: on"
    return [
        Check("system", f"{platform.system()} {platform.release()} {platform.machine()}", None, untested),
        Check("cores", f"{usable} usable, {psutil.cpu_count(logical=False) or '?'} physical"),
        Check("memory", f"{free:.1f} of {whole:.1f} GiB free", free >= NEEDED_GB or None, few),
    ]


def disk(folder: Path, name: str) -> Check:
    """Whether a folder can be written to and has room; it need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free / 2**30
    except OSError as error:
        return Check(name, str(folder), False, str(error))
    if not os.access(there, os.W_OK):
        return Check(name, str(folder), False, "cannot be written to")
    return Check(
        name, f"{folder}, {free:.1f} GiB free", free >= NEEDED_GB or None, "" if free >= NEEDED_GB else "little"
    )


def cache_folder() -> Check:
    """Where downloads are kept."""
    from deltatune.fetch import cache

    return disk(cache(), "cache")


def milliseconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The best time of a piece of work, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def arithmetic() -> list[Check]:
    """bf16 against fp32 on the processor, measured, and the accelerator."""
    import torch

    from deltatune import zoo

    single = torch.ones(192, 192)  # small: a processor without bf16 instructions is 100 times slower
    half = single.bfloat16()
    ratio = milliseconds(lambda: single @ single) / max(milliseconds(lambda: half @ half), 1e-6)
    advice = f"precision: auto trains in {'bf16' if zoo.dtype() == torch.bfloat16 else 'fp32'}"
    kind = torch.backends.cpu.get_cpu_capability()
    found = [
        Check("threads", f"{torch.get_num_threads()} of torch"),
        Check("bf16", f"matrix product {ratio:.2g}x the speed of fp32 ({kind})", None, advice),
    ]
    return [*found, gpu(torch)]


def gpu(torch: Any) -> Check:
    """The accelerator, if there is one."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        return Check("gpu", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}")
    if torch.backends.mps.is_available():
        return Check("gpu", "Apple MPS", None, "not tested")
    return Check("gpu", "none", None, "small models train on the processor")


def within(seconds: float, work: Callable[[], str]) -> str:
    """The result of `work`, or why there is none after `seconds`; a lookup that hangs is left behind."""
    found: list[str] = [f"no answer in {seconds:g} s"]

    def attempt() -> None:
        try:
            found[0] = work()
        except Exception as error:  # whatever goes wrong is the answer
            found[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def package_index(seconds: float = INDEX_SECONDS) -> Check:
    """Whether pip's index answers; addresses are shown without their credentials."""
    from deltatune import fetch

    def reach() -> str:
        settings = fetch.pip_settings()
        address = fetch.indexes(settings)[0]
        with fetch.open_url(f"{address.rstrip('/')}/pip/", settings, {}) as answer:
            answer.read(1)
        return f"{fetch.shown(address)} answers"

    said = within(seconds, reach)
    reached = said.endswith(" answers")
    return Check("index", said, reached or None, "" if reached else "pypi: references need it; local folders do not")


def environment() -> list[Check]:
    """Everything about this machine."""
    from deltatune.commands.shell import ENVIRONMENT

    ranges = supported()
    variables = " ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ)
    return [
        python(),
        *(version(name, ranges) for name in PACKAGES),
        *system(),
        *arithmetic(),
        disk(Path("runs"), "runs"),
        cache_folder(),
        package_index(),
        Check("variables", variables or "none set", None, "set by the command line where you have not set them"),
    ]


def run_folder(folder: Path) -> list[Check]:
    """Whether the files of a run are readable, its adapter whole and its checkpoints valid."""
    looks = {
        "config.yaml": config_file,
        "run": json_files,
        "metrics.jsonl": journal,
        "adapter": adapter,
        "checkpoints": checkpoints,
    }
    return [check for name, look in looks.items() for check in guarded(name, look, folder)]


def guarded(name: str, look: Callable[[Path], Iterable[Check]], folder: Path) -> list[Check]:
    """What `look` finds; whatever it stumbles over is a finding, and the other checks go on."""
    found = []
    try:
        for check in look(folder):
            found.append(check)
    except Exception as error:  # damage takes any shape
        found.append(Check(name, "damaged", False, f"{type(error).__name__}: {error}"))
    return found


def config_file(folder: Path) -> Iterator[Check]:
    """config.yaml reads as a configuration of this version."""
    from deltatune.config import load

    try:
        read_file(folder / "config.yaml")
        load(folder / "config.yaml")
    except (ValueError, OSError) as error:
        yield Check("config.yaml", "does not load", False, str(error))
    else:
        yield Check("config.yaml", "loads", True)


def json_files(folder: Path) -> Iterator[Check]:
    """The JSON files parse; one that is missing may be still to come."""
    for name in JSON_FILES:
        path = folder / name
        if not path.is_file():
            ended = name != "eval.json" and (folder / "eval.json").is_file()
            yield Check(name, "not there", False if ended else None, GONE if ended else "written by a finished run")
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"no JSON object: {str(found)[:60]}")
        except (ValueError, OSError) as error:
            yield Check(name, "damaged", False, str(error))
        else:
            failed = name == "verified.json" and found.get("status") == "unverified"
            yield Check(name, "a check failed" if failed else "readable", not failed, "see report.md" * failed)


def journal(folder: Path) -> Iterator[Check]:
    """metrics.jsonl has whole lines only; a torn last one is what a crash leaves, and resume mends it."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        yield Check(path.name, "not there", None)
        return
    bad, count = [], 0
    with path.open("rb") as file:
        for count, line in enumerate(file, 1):
            try:
                json.loads(line)
            except ValueError:
                bad.append(count)
    if not bad:
        yield Check(path.name, f"{count} lines", True)
        return
    torn = bad == [count]
    yield Check(path.name, f"line {bad[0]} of {count} is no JSON", None if torn else False, "resume mends it" * torn)


def adapter(folder: Path) -> Iterator[Check]:
    """The adapter's tensors are the ones its manifest describes."""
    saved = folder / "adapter"
    if not saved.is_dir():
        ended = (folder / "eval.json").is_file()
        yield Check("adapter", "not there", False if ended else None, GONE if ended else "written by a finished run")
        return
    from deltatune.core.store import read_manifest, read_tensors

    try:
        manifest = read_manifest(saved)
        tensors = read_tensors(saved, manifest)
    except (ValueError, OSError) as error:
        yield Check("adapter", "damaged", False, str(error))
        return
    known = "" if manifest else "no manifest: the base cannot be verified"
    yield Check("adapter", f"{len(tensors)} tensors", True if manifest else None, known)


def checkpoints(folder: Path) -> Iterator[Check]:
    """Every checkpoint, byte by byte."""
    found = sorted((folder / "checkpoints").glob("ckpt-*"))
    if not found:
        yield Check("checkpoints", "none", None)
        return
    from deltatune.train.checkpoint import problems

    for path in found:
        if ".tmp-" in path.name:
            yield Check(path.name, "an unfinished save", None, "the next resume removes it")
            continue
        wrong = problems(path)
        yield Check(path.name, "damaged" if wrong else "valid", not wrong, "; ".join(wrong))
