"""Where rows come from: files, folders, standard input, hub data sets, PyPI packages; no row is dropped silently."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .problems import BadRow, Problems, nearest, short
from .readers import READERS, Place, Row
from .streams import BROKEN, COMPRESSED, EXTENSIONS, container, decompress, extension, peek

__all__ = ["BadRow", "Hub", "Problems", "Row", "files", "hub", "read", "read_file"]

# beside data in a folder: what `datasets` and LLaMA-Factory keep there
METADATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json", "requirements.txt")
LEGAL = ("license", "licence", "readme", "notice", "cc-by", "copying", "changelog")
HUB = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:#(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w\[\]%:]+))?"
)
TASK = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)


def task_of(ref: str) -> tuple[str | None, str]:
    """'sst=a.jsonl' -> ('sst', 'a.jsonl'), a set that is named as a task; (None, ref) for others. A file may have '='
    in its own name."""
    found = TASK.fullmatch(ref)
    return (found[1], found[2]) if found and not Path(ref).exists() else (None, ref)


def read(ref: str | Path, problems: Problems | None = None, columns: Sequence[str] | Mapping = ()) -> Iterator[Row]:
    """Rows of a reference: path, folder, `-` (standard input), `pypi:...`, `owner/name[#config][@revision][:split]`.

    columns: {name in the file: name wanted}, or a list of names for a csv file without a header.
    problems: collects bad rows; without it they raise together as one ValueError after the last row.
    Memory is constant for jsonl, csv, txt, parquet and arrow; a .json document is held whole.
    """
    found = Problems() if problems is None else problems
    rename = columns if isinstance(columns, Mapping) else {}
    header = () if isinstance(columns, Mapping) else tuple(columns)
    for row in _rows(str(ref), found, header):
        if problems is None:
            found.accept()
        yield renamed(row, rename)
    if problems is None:
        found.refuse()


def renamed(row: Row, names: Mapping[str, str]) -> Row:
    """The row with its columns under the names wanted; a column that has such a name already gives way."""
    if not names:
        return row
    new = {names[key] for key in row.value if key in names}
    found = {names.get(key, key): value for key, value in row.value.items() if key in names or key not in new}
    return Row(found, row.where, row.value)


def _rows(ref: str, problems: Problems, header: tuple[str, ...]) -> Iterator[Row]:
    try:
        if ref == "-":
            yield from _read(sys.stdin.buffer, Place("<stdin>", problems, header), "")
        elif is_hub(ref):
            yield from hub(ref, problems)
        else:
            for path in files(ref, problems):
                yield from read_file(path, problems, header)
    except BadRow as fault:
        problems.reject([fault])


def files(ref: str, problems: Problems) -> list[Path]:
    """The data files of a path or package reference; others in a folder are named in a note."""
    if ref.startswith("pypi:"):
        from deltatune.zoo import data_path

        path = Path(data_path(ref))
    else:
        path = Path(ref).expanduser()
    if not path.exists():
        raise _missing(ref, path)
    return _folder(path, problems) if path.is_dir() else [path]


def _missing(ref: str, path: Path) -> BadRow:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    fix = (
        f"Give a file, a folder, '-' for standard input, 'pypi:PACKAGE' or 'owner/name'.{nearest(path.name, siblings)}"
    )
    return BadRow("missing_file", ref, "", "there is no such file or folder", fix)


def _folder(root: Path, problems: Problems) -> list[Path]:
    shown = [p for p in sorted(root.rglob("*")) if p.is_file() and not _hidden(p.relative_to(root))]
    data = [p for p in shown if extension(p) in EXTENSIONS and not _beside(p.name.lower())]
    if not data:
        names = ", ".join(p.name for p in shown[:5]) or "nothing"
        fix = f"Put files with one of {', '.join(EXTENSIONS)} there, or give the right folder"
        raise BadRow("empty_folder", str(root), "", f"the folder has no data files (it holds {names})", fix)
    left = [p.name for p in shown if p not in data]
    if left:
        problems.note(f"{root}: {len(left)} files are no data and were not read: {', '.join(left[:5])}")
    return data


def _beside(name: str) -> bool:
    return name in METADATA or name.startswith(LEGAL)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_file(path: Path, problems: Problems, header: tuple[str, ...] = ()) -> Iterator[Row]:
    """Rows of one file."""
    place = Place(str(path), problems, header)
    try:
        with path.open("rb") as file:
            yield from _read(file, place, extension(path))
    except PermissionError:
        reason, fix = "the file may not be read", f"Run: chmod u+r {path}"
        problems.reject([BadRow("permission", str(path), "", reason, fix)])


def _read(raw: Any, place: Place, ext: str) -> Iterator[Row]:
    """Sniff the container and read it; what ends a whole file early is one counted problem."""
    number = 0
    try:
        stream = decompress(raw)
        head = peek(stream, place.path)
        kind = container(head, place.path, ext or (".jsonl" if place.path == "<stdin>" else ""), place.problems)
        for row in READERS[kind](stream, place):
            number += 1
            yield row
    except BadRow as fault:
        place.problems.reject([fault])
    except BROKEN as error:
        place.problems.reject([_damaged(error, place, number)])
    except ValueError as error:
        if not isinstance(error, UnicodeDecodeError) and not type(error).__module__.startswith("pyarrow"):
            raise
        place.problems.reject([_damaged(error, place, number)])


def _damaged(error: BaseException, place: Place, number: int) -> BadRow:
    reason = f"the file is damaged after row {number}: {short(str(error))}"
    return BadRow("broken_file", place.at(number + 1), "", reason, "Copy, download or write the file again")


@dataclass(frozen=True)
class Hub:
    """A data set on a hub: `owner/name[#config][@revision][:split]`."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"


def is_hub(ref: str) -> bool:
    """Whether a reference names a hub data set: no such path here, `owner/name`, no data file's extension."""
    if Path(ref).expanduser().exists() or not HUB.fullmatch(ref):
        return False
    suffix = Path(ref).suffix.lower()
    return suffix not in EXTENSIONS and suffix not in COMPRESSED and not Path(ref).parent.is_dir()


def hub(ref: str | Hub, problems: Problems) -> Iterator[Row]:
    """Rows of a hub data set, streamed through the `datasets` library (which runs no code of the data set)."""
    if isinstance(ref, str):
        match = HUB.fullmatch(ref)
        assert match
        given = {key: value for key, value in match.groupdict().items() if value}
        ref = Hub(**given)
    import datasets

    try:
        rows = datasets.load_dataset(ref.name, ref.config, revision=ref.revision, split=ref.split, streaming=True)
        for number, value in enumerate(rows, 1):
            yield Row(dict(value), f"{ref.name}:{number}")
    # the library raises a dozen unrelated types (HTTP, parsing, missing splits); each is one problem of this source
    except Exception as error:
        reason = f"the hub data set cannot be read: {type(error).__name__}: {short(str(error))}"
        fix = f"Check the name, the revision and the split {ref.split!r}; offline, give a local file or 'pypi:PACKAGE'"
        problems.reject([BadRow("hub", ref.name, "", reason, fix)])
