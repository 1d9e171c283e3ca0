"""Machine: the memory and the disk that this process has, and has used."""

from __future__ import annotations

import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil


def rss_bytes(maxrss: int, platform: str = sys.platform) -> int:
    """`ru_maxrss` in bytes: macOS counts bytes, Linux and the BSDs KiB."""
    return maxrss if platform == "darwin" else maxrss * 1024


def memory() -> dict[str, int]:
    """Bytes in use: `rss`, `peak` of this process, and `cuda`, `cuda_peak` of the device when torch uses one."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {"rss": psutil.Process().memory_info().rss, "peak": rss_bytes(usage.ru_maxrss)}
    torch: Any = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {"cuda": torch.cuda.memory_allocated(), "cuda_peak": torch.cuda.max_memory_allocated()}
    return found


def peak_bytes() -> int:
    """The most memory so far: of the device where torch uses one, else of this process."""
    found = memory()
    return found.get("cuda_peak") or found["peak"]


def free_memory() -> int:
    """Bytes of main memory that can still be had."""
    return int(psutil.virtual_memory().available)


def free_disk() -> int:
    """Bytes that temporary files may still take."""
    return shutil.disk_usage(tempfile.gettempdir()).free


def mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are pages of files: what lies there counts as free memory, because it can be
    read again. Linux says them; elsewhere none are known."""
    table = Path("/proc/self/maps")
    lines = (line.split(maxsplit=5) for line in (table.read_text().splitlines() if table.exists() else ()))
    files = [line[0] for line in lines if len(line) == 6 and re.match(r"/(?!dev/)", line[5])]
    return [(int(start, 16), int(end, 16)) for start, end in (span.split("-") for span in files)]
