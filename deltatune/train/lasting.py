"""Lasting: a run's configuration as it can be read again, from any working folder and without what was piped in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import Config
from ..data.sources import task_of

STDIN = "stdin.jsonl"  # in the run folder: the rows of standard input, whatever their format


@contextmanager
def lasting(config: Config, folder: Path) -> Iterator[Config]:
    """Local references as absolute paths; standard input copied into `folder`, and out again where the body fails.

    ValueError where standard input is asked for twice, or streamed.
    """
    data, copy = config.data, folder / STDIN
    named = [ref for refs in (data.train, data.eval, *data.ood.values()) for ref in refs]
    piped = sum(task_of(ref)[1] == "-" for ref in named)
    if piped > 1:
        raise ValueError(f"- is standard input, which can be read once, not {piped} times: give files")
    if data.streaming and "-" in data.train:
        raise ValueError("data.streaming is for local files, not for standard input: give a file")
    if piped:
        copy.write_bytes(sys.stdin.buffer.read())

    def refs(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            f"{task}={whole}" if task else whole
            for task, ref in map(task_of, given)
            for whole in [absolute(str(copy) if ref == "-" else ref)]
        )

    try:
        found = {"train": refs(data.train), "eval": refs(data.eval), "ood": {k: refs(v) for k, v in data.ood.items()}}
        model = config.model.model_copy(update={"name": absolute(config.model.name)})
        yield config.model_copy(update={"model": model, "data": data.model_copy(update=found)})
    except BaseException:
        if piped:
            copy.unlink(missing_ok=True)
        raise


def absolute(ref: str) -> str:
    """A local file or folder by its whole path; any other reference as it is."""
    path = Path(ref).expanduser()
    return str(path.absolute()) if not ref.startswith("pypi:") and path.exists() else ref
