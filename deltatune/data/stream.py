"""Sets too large to hold: shards read lazily, shuffled block by block, resumed at any row without reading the rest.

Rows are cut into blocks of `block` consecutive rows. The order of the blocks and of the rows in each is a pure function
of (seed, epoch, block number), so a position in the epoch is one integer: the cursor of a checkpoint. Plain .jsonl
shards are sought by byte offset; others (compressed, csv, parquet) are read in their own order and skipped row by row.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .example import Example
from .formats import attempt, converted, format_of, unknown
from .order import generator
from .problems import BadRow, Problems
from .readers import Row, json_row
from .sources import read, renamed
from .streams import container, extension, peek
from .wanted import AS_IT_COMES, Intake

BLOCK = 4096
CHUNK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """`cursor`: where to go on after this example."""

    cursor: int
    example: Example


@dataclass(frozen=True)
class Shard:
    """A file that can be sought: its lines, and the byte offset of every `block`-th."""

    path: Path
    rows: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """What the order of a stream depends on."""

    seed: int = 0
    epoch: int = 0
    block: int = BLOCK
    shuffle: bool = True

    def within(self, number: int, rows: int) -> list[int]:
        """The order of a block's rows."""
        return self._permutation(rows, number + 1)

    def blocks(self, count: int) -> list[int]:
        return self._permutation(count, 0)

    def _permutation(self, count: int, stream: int) -> list[int]:
        if not self.shuffle:
            return list(range(count))
        return [int(i) for i in generator(self.seed, self.epoch, stream).permutation(count)]


def index(path: Path, block: int = BLOCK) -> Shard:
    """Lines and offsets of a jsonl file, in one pass that parses nothing."""
    offsets, rows, position = [0], 0, 0
    with path.open("rb") as file:
        last = b"\n"
        while chunk := file.read(CHUNK):
            at = chunk.find(b"\n")
            while at >= 0:
                rows += 1
                if rows % block == 0:
                    offsets.append(position + at + 1)
                at = chunk.find(b"\n", at + 1)
            position, last = position + len(chunk), chunk[-1:]
    rows += last != b"\n"
    return Shard(path, rows, tuple(offsets[: -(-rows // block)]))


def stream(
    shards: Sequence[str | Path],
    problems: Problems,
    order: Order | None = None,
    start: int = 0,
    how: Intake = AS_IT_COMES,
) -> Iterator[Sample]:
    """Examples of one epoch from position `start`; every row exactly once. Bad rows are counted and move the cursor.

    Errors: none are raised here; ask `problems.refuse()`.
    """
    order = order or Order()
    paths = [Path(shard) for shard in shards]
    if all(map(seekable, paths)):
        yield from _sought([index(path, order.block) for path in paths], problems, order, start, how)
    else:
        yield from _sequential(paths, problems, order, start, how)


def seekable(path: Path) -> bool:
    """Whether a file is plain jsonl."""
    if not path.is_file() or extension(path) not in (".jsonl", ".ndjson") or path.suffix not in (".jsonl", ".ndjson"):
        return False
    try:
        with path.open("rb") as file:
            return container(peek(file, str(path)), str(path), extension(path), Problems()) == "jsonl"
    except BadRow:
        return False


def _sought(shards: Sequence[Shard], problems: Problems, order: Order, start: int, how: Intake) -> Iterator[Sample]:
    blocks = [(shard, k) for shard in shards for k in range(len(shard.offsets))]
    formats = {shard.path: _format(shard.path, how) for shard in shards}
    cursor = 0
    for number in order.blocks(len(blocks)):
        shard, k = blocks[number]
        rows = min(order.block, shard.rows - k * order.block)
        if cursor + rows > start:
            lines = _lines(shard, k * order.block, k, rows)
            for place, i in enumerate(order.within(number, rows)):
                if cursor + place >= start:
                    example = _example(*lines[i], problems, formats[shard.path], how)
                    if example:
                        yield Sample(cursor + place + 1, example)
        cursor += rows


def _format(path: Path, how: Intake) -> str | None:
    """The format of a shard, told by its first readable row: the same wherever a stream begins."""
    with path.open("rb") as file:
        for line in file:
            try:
                return format_of(_row(line, str(path), how), how)
            except BadRow:
                continue
    return None


def _row(line: bytes, where: str, how: Intake) -> Row:
    return how.taken(renamed(json_row(line.removeprefix(codecs.BOM_UTF8), where), how.names))


def _lines(shard: Shard, first: int, k: int, rows: int) -> list[tuple[bytes, str]]:
    with shard.path.open("rb") as file:
        file.seek(shard.offsets[k])
        return [(line, f"{shard.path}:{first + i + 1}") for i, line in enumerate(islice(file, rows))]


def _example(line: bytes, where: str, problems: Problems, format: str | None, how: Intake) -> Example | None:
    if not line.removeprefix(codecs.BOM_UTF8).strip():
        return None
    try:
        row = _row(line, where, how)
        name = format or format_of(row, how)
        if name is None:
            raise unknown(row, how)
    except BadRow as fault:
        problems.reject([fault])
        return None
    example, faults = attempt(row, name, how)
    if faults:
        problems.reject(faults)
        return None
    problems.accept()
    return example


def _sequential(paths: Sequence[Path], problems: Problems, order: Order, start: int, how: Intake) -> Iterator[Sample]:
    """Blocks in the files' order, each shuffled; what precedes `start` is read, but neither checked nor encoded."""
    cursor = start // order.block * order.block
    rows = islice((row for path in paths for row in read(path, problems, how.columns)), cursor, None)
    number = cursor // order.block
    while block := list(islice(rows, order.block)):
        for place, i in enumerate(order.within(number, len(block))):
            if cursor + place >= start:
                for example in converted([block[i]], problems, how):
                    yield Sample(cursor + place + 1, example)
        cursor += len(block)
        number += 1
