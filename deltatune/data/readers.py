"""Rows out of one container: jsonl, json, csv/tsv, parquet, arrow, txt; a bad row is counted and the next is read."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .problems import BadRow, Problems, short
from .squad import is_article, questions
from .streams import BROKEN, HEAD, ROW_KEYS, broken, decode

MAX_CSV_FIELD = 2**27
TRUNCATED = "Copy or write the file again: it ends in the middle"


@dataclass(frozen=True)
class Row:
    """One record as found. `where` is 'file:line' (line of its first character; row number in binary files).

    given: the columns by the names they have in the file, where some were renamed.
    """

    value: dict[str, Any]
    where: str
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """Every column, a renamed one under both its names."""
        return {**self.given, **self.value}


@dataclass(frozen=True)
class Place:
    """The file a reader works on: its name in messages, where its problems go, names for columns without a header."""

    path: str
    problems: Problems
    header: tuple[str, ...] = ()
    first_line: int = 1

    def at(self, line: int) -> str:
        return f"{self.path}:{line}"


def lines(stream: io.BufferedReader, place: Place) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without the line end); a damaged archive is one counted problem at the line it stops."""
    number = place.first_line
    while True:
        try:
            line = stream.readline()
        except BROKEN as error:
            place.problems.reject([broken(error, place.at(number))])
            return
        if not line:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line.rstrip(b"\r\n")
        number += 1


def read_jsonl(stream: io.BufferedReader, place: Place) -> Iterator[Row]:
    for number, line in lines(stream, place):
        if line.strip():
            yield from kept(partial(json_row, line, place.at(number)), place)


def json_row(line: bytes, where: str) -> Row:
    """One line of jsonl. Errors: BadRow."""
    return as_row(parse(decode(line, where), where), where)


def kept(make: Callable[[], Row], place: Place) -> Iterator[Row]:
    """The row that `make` returns, or one counted problem."""
    try:
        yield make()
    except BadRow as fault:
        place.problems.reject([fault])


def as_row(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return Row(value, where)
    kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
    fix = 'Write objects: {"prompt": ..., "completion": ...}'
    raise BadRow("data_type", where, "", f"the row is {kind}, not an object: {short(value)}", fix)


def parse(text: str, where: str) -> Any:
    """One JSON value; refuses duplicate keys, explains the usual mistakes."""
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except _Repeated as error:
        raise BadRow("duplicate_key", where, str(error), "the key is there twice", "Keep one of the two") from None
    except RecursionError:
        raise BadRow("json_syntax", where, "", "nested too deeply", "Flatten the row") from None
    except json.JSONDecodeError as error:
        raise BadRow("json_syntax", where, "", f"{error.msg} at column {error.colno}", hint(text, error)) from None


class _Repeated(Exception):
    """A key occurs twice in an object."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return value


def hint(text: str, error: json.JSONDecodeError) -> str:
    """The way out of a JSON error."""
    body = text.strip()
    if body.startswith("{'") or "': '" in body:
        return "This looks like Python's repr: write rows with json.dumps(row)"
    if error.msg.startswith(("Invalid control character", "Invalid \\escape")):
        return "Escape line breaks, tabs and backslashes: write rows with json.dumps(row)"
    if error.msg == "Extra data":
        return "Put one object on each line"
    if error.msg.startswith("Illegal trailing comma") or body.endswith((",}", ",]", "},")):
        return "Remove the trailing comma"
    if error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string"):
        return f"{TRUNCATED} of a row"
    return "Write rows with json.dumps(row), one object on each line"


def read_json(stream: io.BufferedReader, place: Place) -> Iterator[Row]:
    """An array of objects, an object with a list of them under `data`, or objects one after the other."""
    try:
        text = decode(stream.read().removeprefix(codecs.BOM_UTF8), place.path)
        start = _rows_start(text, place)
    except BROKEN as error:
        place.problems.reject([broken(error, place.path)])
        return
    except BadRow as fault:
        place.problems.reject([fault])
        return
    yield from _elements(text, start, place)


def _rows_start(text: str, place: Place) -> int:
    """Offset of the first element."""
    start = len(text) - len(text.lstrip())
    if start == len(text):
        raise BadRow("empty_file", place.path, "", "the file is empty", "Write an array of rows")
    if text[start] == "[":
        return start + 1
    head = text[start : start + HEAD]
    for key in ROW_KEYS:
        at = head.find(f'"{key}"')
        colon = head[at + len(key) + 2 :].lstrip() if at >= 0 else ""
        if colon.startswith(":") and colon[1:].lstrip().startswith("["):
            return text.index("[", start + at) + 1
    return start


def _elements(text: str, position: int, place: Place) -> Iterator[Row]:
    decoder = json.JSONDecoder(object_pairs_hook=_pairs)
    in_array = text[position - 1 : position] == "["
    line, counted, asked = 1, 0, 0
    while True:
        position = _skip(text, position)
        if position >= len(text) or text[position] == "]":
            if in_array and position >= len(text):
                line = 1 + text.rstrip().count("\n")
                fault = BadRow("json_syntax", place.at(line), "", "the array is never closed", f"{TRUNCATED}")
                place.problems.reject([fault])
            return
        line += text.count("\n", counted, position)
        counted, where = position, place.at(line)
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, _Repeated, RecursionError) as error:
            place.problems.reject([_element_fault(error, text, place)])
            return
        if is_article(value):
            for row in _asked(value, text[counted:position], line, place, asked):
                asked += 1
                yield row
        else:
            yield from kept(partial(as_row, value, where), place)


def _asked(article: dict, text: str, line: int, place: Place, before: int) -> Iterator[Row]:
    """The questions of one article of a SQuAD document."""
    try:
        for row, number in questions(article, text, (place.path, line), before):
            yield Row(row, place.at(number))
    except BadRow as fault:
        place.problems.reject([fault])


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position


def _element_fault(error: Exception, text: str, place: Place) -> BadRow:
    """Where a JSON document stops being one; what follows cannot be read."""
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}; nothing after it could be read"
        return BadRow("json_syntax", place.at(error.lineno), "", reason, hint(text, error))
    kind = "duplicate_key" if isinstance(error, _Repeated) else "json_syntax"
    return BadRow(kind, place.at(1), str(error), "the document cannot be read", "Keep each key once")


def read_csv(stream: io.BufferedReader, place: Place, delimiter: str = "") -> Iterator[Row]:
    """A header line, then a row a record. Tabs: no quoting (GLUE's form); else RFC 4180 with `,` or `;`."""
    csv.field_size_limit(MAX_CSV_FIELD)
    source = _Texts(stream, place)
    first = source.peek()
    delimiter = delimiter or max(",;\t", key=first.count)
    reader = csv.reader(
        source, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL, strict=True
    )
    header: Sequence[str] = place.header
    if not header:
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, place)
        except (BadRow, csv.Error) as fault:
            place.problems.reject([fault if isinstance(fault, BadRow) else _csv_fault(fault, place.at(1))])
            return
    yield from _records(reader, source, header, place)


class _Texts:
    """Decoded lines for csv.reader; remembers the line a record began at and whether a line could be decoded."""

    def __init__(self, stream: io.BufferedReader, place: Place):
        self.place, self.source, self.line, self.began = place, lines(stream, place), 0, 0
        self.fault: BadRow | None = None
        self.ahead: list[tuple[int, bytes]] = []

    def peek(self) -> str:
        self.ahead = [item for item in [next(self.source, None)] if item]
        return self.ahead[0][1].decode("utf-8", "replace") if self.ahead else ""

    def __iter__(self) -> _Texts:
        return self

    def __next__(self) -> str:
        self.line, data = self.ahead.pop() if self.ahead else next(self.source)
        self.began = self.began or self.line
        try:
            return decode(data, self.place.at(self.line)) + "\n"
        except BadRow as fault:
            self.fault = fault
            return data.decode("utf-8", "replace") + "\n"


def _records(reader: Any, source: _Texts, header: Sequence[str], place: Place) -> Iterator[Row]:
    while True:
        source.began, source.fault = 0, None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place.problems.reject([_csv_fault(error, place.at(source.began))])
            continue
        if not cells:
            continue
        where = place.at(source.began)
        fault = source.fault or (_ragged(cells, header, where) if len(cells) != len(header) else None)
        if fault:
            place.problems.reject([fault])
        else:
            yield Row(dict(zip(header, cells, strict=True)), where)


def _check_header(header: Sequence[str], place: Place) -> None:
    if "" in header:
        reason = f"column {header.index('') + 1} of the header has no name: {short(list(header))}"
        raise BadRow("csv_header", place.at(1), "", reason, "Name every column in the first line")
    for name in header:
        if header.count(name) > 1:
            raise BadRow("csv_header", place.at(1), name, "the header has this name twice", "Rename one of the two")


def _csv_fault(error: csv.Error, where: str) -> BadRow:
    text = str(error)
    if "unexpected end of data" in text:
        text = "a quote that opens here is never closed, so everything after it was one cell"
    elif "expected after" in text:
        text = "text follows a closing quote"
    return BadRow("csv_quoting", where, "", text, 'Quote a cell that holds quotes and double them: "say ""hi"""')


def _ragged(cells: list[str], header: Sequence[str], where: str) -> BadRow:
    reason = f"{len(cells)} cells, but the header names {len(header)} columns"
    fix = 'Quote cells that hold the delimiter or a line break: "a, b"' if len(cells) > len(header) else "Fill the row"
    return BadRow("ragged_row", where, "", reason, fix)


def read_parquet(stream: io.BufferedReader, place: Place) -> Iterator[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    file = pyarrow.parquet.ParquetFile(_seekable(stream))
    yield from _tables(file.iter_batches(1024), place)


def read_arrow(stream: io.BufferedReader, place: Place) -> Iterator[Row]:
    """Arrow IPC: the file form or the stream form (which `datasets` writes)."""
    import pyarrow

    source = _seekable(stream)
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        batches: Iterable = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        source.seek(0)
        batches = pyarrow.ipc.open_stream(source)
    yield from _tables(batches, place)


def _seekable(stream: io.BufferedReader) -> Any:
    return stream if stream.seekable() else io.BytesIO(stream.read())


def _tables(batches: Iterable, place: Place) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # damaged offsets or text would crash the conversion instead of raising
        for value in batch.to_pylist():
            number += 1
            yield Row(value, place.at(number))


def read_txt(stream: io.BufferedReader, place: Place) -> Iterator[Row]:
    """Paragraphs (blank lines between them) as texts; without a blank line in the first 64 kB, every line is one."""
    head = stream.peek(HEAD)[:HEAD].replace(b"\r\n", b"\n").strip()
    by_line = b"\n\n" not in head
    texts: list[str] = []
    began, fault = 0, None
    for number, line in lines(stream, place):
        try:
            text = decode(line, place.at(number))
        except BadRow as error:
            fault, text = fault or error, "?"
        if text.strip():
            began = began or number
            texts.append(text)
        if texts and (by_line or not text.strip()):
            yield from _paragraph(texts, began, fault, place)
            texts, began, fault = [], 0, None
    if texts:
        yield from _paragraph(texts, began, fault, place)


def _paragraph(texts: list[str], began: int, fault: BadRow | None, place: Place) -> Iterator[Row]:
    if fault:
        place.problems.reject([fault])
    else:
        yield Row({"text": "\n".join(texts)}, place.at(began))


READERS: dict[str, Callable[[io.BufferedReader, Place], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": lambda stream, place: read_csv(stream, place),
    "tsv": lambda stream, place: read_csv(stream, place, "\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
    "txt": read_txt,
}
