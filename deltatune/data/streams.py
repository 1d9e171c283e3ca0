"""Bytes of a data file: decompression, text encoding, and which container it really is."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import IO, Any

from .problems import BadRow, Problems, short

CONTAINERS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt")
EXTENSIONS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".txt": "txt", ".text": "txt",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
FOREIGN = {
    b"PK\x03\x04": ("a zip archive", "Unpack it and give the file inside"),
    b"BZh": ("a bzip2 archive", "Run bunzip2 on it, or compress with gzip or zstd"),
    b"\xfd7zXZ": ("an xz archive", "Run unxz on it, or compress with gzip or zstd"),
    b"\x89PNG": ("a PNG image", "Give a text data file"),
    b"%PDF": ("a PDF document", "Extract its text first"),
    b"\x80\x04": ("a Python pickle, which is never loaded", "Export it as jsonl or parquet"),
    b"\x80\x05": ("a Python pickle, which is never loaded", "Export it as jsonl or parquet"),
    b"SQLite": ("a SQLite data base", "Export the table as csv or jsonl"),
}
BOMS = {
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
HEAD = 65536
# what reading a damaged archive raises: zlib.error and EOFError are no OSErrors
BROKEN = (OSError, EOFError, zlib.error)


def extension(path: Path) -> str:
    """'a.jsonl.gz' -> '.jsonl'."""
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def decompress(raw: Any) -> io.BufferedReader:
    """The plain bytes of an open stream, peekable, by its magic number (gzip, zstd)."""
    stream: Any = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
    head = stream.peek(4)[:4]
    if head[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=stream), HEAD)
    if head == b"\x28\xb5\x2f\xfd":
        import pyarrow  # type: ignore[import-untyped]

        plain = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
        return io.BufferedReader(_Pull(plain), HEAD)
    return stream


class _Pull(io.RawIOBase):
    """A pyarrow input stream as a raw Python one (its own `peek` is missing)."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def peek(stream: io.BufferedReader, where: str) -> bytes:
    """The first bytes, or a BadRow that says why there are none."""
    try:
        head = stream.peek(HEAD)
    except BROKEN as error:
        raise broken(error, where) from None
    if not head.strip(b"\0 \t\r\n\xef\xbb\xbf"):
        raise BadRow("empty_file", where, "", "the file is empty", "Write one row a line, or leave the file out")
    return head


def broken(error: BaseException, where: str) -> BadRow:
    """A damaged archive as a fault with its place."""
    return BadRow(
        "broken_archive", where, "", f"the compressed data ends early or is damaged ({error})",
        "Copy or download the file again; `gzip -t FILE` or `zstd -t FILE` checks it",
    )  # fmt: skip


def check_encoding(head: bytes, where: str, problems: Problems) -> None:
    """Refuse what is not UTF-8 text by its first bytes; note a byte order mark and Windows line ends."""
    for magic, (what, fix) in FOREIGN.items():
        if head.startswith(magic):
            raise BadRow("binary_file", where, "", f"this is {what}, not text", fix)
    for bom, name in BOMS.items():
        if head.startswith(bom):
            raise wrong_encoding(name, where)
    if b"\0" in head[:1024]:
        even, odd = head[0:1024:2].count(0), head[1:1024:2].count(0)
        half = len(head[:1024]) // 4
        if max(even, odd) > half and min(even, odd) < half // 4:
            raise wrong_encoding("utf-16-le" if odd > even else "utf-16-be", where)
        raise BadRow("binary_file", where, "", "this is binary data, not text", f"Give one of {', '.join(CONTAINERS)}")
    if head.startswith(codecs.BOM_UTF8):
        problems.note(f"{where}: the byte order mark was skipped")
    if b"\r\n" in head:
        problems.note(f"{where}: Windows line ends (CRLF) were read as line ends")


def wrong_encoding(name: str, where: str, detail: str = "") -> BadRow:
    fix = f"Convert it: iconv -f {name} -t utf-8 FILE > NEW (on Windows: save as UTF-8)"
    return BadRow("encoding", where, "", f"not UTF-8, it looks like {name}{detail}", fix)


def decode(data: bytes, where: str) -> str:
    """UTF-8, or a BadRow that names the likely encoding and the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise wrong_encoding(guess(data), where, f" (byte 0x{bad:02x} at position {error.start})") from None


def guess(data: bytes) -> str:
    """The likely encoding of text that is not UTF-8."""
    high = bytes(b for b in data if b >= 0x80)
    for name in ("gb18030", "shift_jis"):
        if len(high) >= 4 and _is_cjk(data, name):
            return name
    return "cp1252" if any(0x80 <= b < 0xA0 for b in high) else "latin-1"


def _is_cjk(data: bytes, name: str) -> bool:
    try:
        text = data.decode(name)
    except UnicodeDecodeError:
        return False
    wide = [c for c in text if ord(c) > 0x7F]
    return bool(wide) and all("\u3000" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" or c >= "\uff00" for c in wide)


def container(head: bytes, path: str, ext: str, problems: Problems) -> str:
    """Which container the bytes are: magic numbers and the first character before the extension."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    said = EXTENSIONS.get(ext, "")
    if said in ("parquet", "arrow"):
        raise BadRow("broken_file", path, "", f"named {ext} but it does not start like one", "Write the file again")
    check_encoding(head, path, problems)
    found = _json_kind(head.removeprefix(codecs.BOM_UTF8).lstrip()) if said in ("jsonl", "json", "") else ""
    if said in ("txt", "csv", "tsv") and _first_line_is_object(head):
        found = "jsonl"
    if found and said and found != said:
        problems.note(f"{path}: named {ext}, but its content is {found}; read as {found}")
    if not found and not said:
        fix = f"Rename it to say what it is: {', '.join(EXTENSIONS)} (.gz and .zst of those)"
        raise BadRow("unknown_container", path, "", f"unknown file type {short(ext)}", fix)
    return found or said


def _json_kind(head: bytes) -> str:
    """'jsonl' when the first line is a whole object or array with another line after it, 'json' for a document."""
    if head[:1] not in (b"{", b"["):
        return ""
    line, end, rest = head.partition(b"\n")
    if not end and len(head) > HEAD // 2:
        return ""  # one line longer than what was peeked: trust the name
    whole = _parses(line)
    if head[:1] == b"[":
        return "jsonl" if whole and rest.strip() else "json"
    if not whole:
        return "json" if line.rstrip()[-1:] in (b"{", b"[", b",") else "jsonl"
    return "json" if _holds_rows(line) else "jsonl"


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


ROW_KEYS = ("data", "rows", "examples", "train", "instances")


def _holds_rows(line: bytes) -> bool:
    value = json.loads(line)
    return isinstance(value, dict) and len(value) <= 4 and any(isinstance(value.get(k), list) for k in ROW_KEYS)


def _first_line_is_object(head: bytes) -> bool:
    line = head.removeprefix(codecs.BOM_UTF8).partition(b"\n")[0].strip()
    return line.startswith(b"{") and _parses(line)
