"""Two hundred damaged data sets, and some odd but legal ones: what is in them, and what has to be said about each."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet

LEGAL = "legal"


@dataclass(frozen=True)
class Case:
    """`kind` and `reason` of the expected problem (LEGAL: of a note), its `line` (None: the whole file), and how many
    rows there are: usable ones and others. `files` None: `name` itself is not there."""

    name: str
    file: str
    data: bytes | None
    kind: str
    reason: str
    line: int | None = None
    good: int = 2
    bad: int = 1
    field: str = ""
    max_length: int | None = None


GOOD: dict[str, dict[str, Any]] = {
    "text": {"text": "A text."},
    "pair": {"prompt": "Ask", "completion": "Say"},
    "alpaca": {"instruction": "Do", "input": "", "output": "Done"},
    "query": {"query": "Ask", "response": "Say"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
    "preference": {"prompt": "Ask", "chosen": "Good", "rejected": "Bad"},
    "class": {"text": "Fine", "label": "pos"},
    "pairs": {"premise": "It rains", "hypothesis": "It is wet", "label": 0},
    "unpaired": {"prompt": "Ask", "completion": "Say", "label": True},
}
FIELDS = {
    "text": ["text"], "pair": ["prompt", "completion"], "alpaca": ["instruction", "output"],
    "query": ["query", "response"], "preference": ["prompt", "chosen", "rejected"], "class": ["text"],
    "pairs": ["premise", "hypothesis"], "unpaired": ["completion"],
}  # fmt: skip
VALUES = [
    ("null", None, "null_field", "the value is null"),
    ("number", 7, "data_type", "the value is a number"),
    ("object", {"answer": "x"}, "data_type", "the value is an object"),
    ("empty", "", "empty_field", "the text is empty"),
    ("blank", " \n\t ", "empty_field", "the text is empty"),
    ("surrogate", "half \ud83d", "lone_surrogate", "half a character (\\ud83d)"),
    ("nul", "a\0b", "nul_character", "NUL"),
]


def lines(*rows: Any) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def around(kind: str, row: Any) -> bytes:
    """The row as line 2, between two good ones."""
    return lines(GOOD[kind], row, GOOD[kind])


def fields() -> Iterator[Case]:
    """Every text field of every format with every bad value."""
    for format, names in FIELDS.items():
        for name in names:
            for what, value, kind, reason in VALUES:
                row = {**GOOD[format], name: value}
                yield Case(f"{format}.{name} {what}", "a.jsonl", around(format, row), kind, reason, 2, field=name)


def chat(*turns: Any) -> dict:
    return {"messages": list(turns)}


def messages() -> Iterator[Case]:
    user, said = GOOD["messages"]["messages"]
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    rows = [
        ("no assistant", chat(user), "example_missing_assistant_message", "no message is from the assistant"),
        ("empty list", chat(), "missing_messages_list", "no messages"),
        ("null list", {"messages": None}, "missing_messages_list", "no messages"),
        ("text for a list", {"messages": "Hi"}, "data_type", "the messages are a str"),
        ("object for a list", {"messages": user}, "data_type", "the messages are a"),
        ("number in the list", chat(user, 3), "data_type", "the message is a number"),
        ("list in the list", chat([user], said), "data_type", "the message is an array"),
        ("no role", chat({"content": "Hi"}, said), "message_missing_key", "no role"),
        ("null role", chat({"role": None, "content": "Hi"}, said), "message_missing_key", "no role"),
        ("unknown role", chat({"role": "asistant", "content": "Hi"}, said), "unrecognized_role", "'asistant'"),
        ("role with a capital", chat({"role": "User", "content": "Hi"}, said), "unrecognized_role", "'User'"),
        ("role is a number", chat({"role": 1, "content": "Hi"}, said), "unrecognized_role", "unknown role 1"),
        ("no content", chat(user, {"role": "assistant"}), "missing_content", "no content"),
        ("null content", chat(user, {"role": "assistant", "content": None}), "missing_content", "no content"),
        ("empty content", chat(user, {"role": "assistant", "content": ""}), "empty_field", "empty"),
        ("content is an object", chat(user, {"role": "assistant", "content": {"a": 1}}), "data_type", "an object"),
        ("content is a number", chat({"role": "user", "content": 5}, said), "data_type", "a number"),
        ("surrogate", chat({"role": "user", "content": "\udc00"}, said), "lone_surrogate", "\\udc00"),
        ("unknown key", chat({**user, "contents": "x"}, said), "message_unrecognized_key", "not known"),
        ("image part", chat({"role": "user", "content": [{"type": "image_url"}]}, said), "data_type", "not text"),
        ("no parts", chat({"role": "user", "content": []}, said), "missing_content", "no content"),
        ("weight 0.5", chat(user, {**said, "weight": 0.5}), "data_type", "not 0 or 1"),
        ("loss is a text", chat(user, {**said, "loss": "yes"}), "data_type", "not 0 or 1"),
        ("all weights 0", chat(user, {**said, "weight": 0}), "nothing_to_learn", "weight 0"),
        ("calls not a list", chat(user, {**said, "tool_calls": call}), "tool_calls", "it is an object"),
        ("call is a text", chat(user, {**said, "tool_calls": ["add"]}), "tool_calls", "names no function"),
        ("call without a name", chat(user, {**said, "tool_calls": [{"function": {}}]}), "tool_calls", "no function"),
        ("call with bad JSON", chat(user, {**said, "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}),
         "tool_calls", "not JSON"),
        ("call with list arguments", chat(user, {**said, "tool_calls": [{"function": {"name": "a", "arguments": []}}]}),
         "tool_calls", "an array, not an object"),
        ("function_call is null text", chat(user, {**said, "function_call": "x"}), "tool_calls", "no function"),
        ("tools are a text", {**chat(user, said), "tools": "add"}, "data_type", "the tools are"),
        ("tools hold a text", {**chat(user, said), "tools": ["add"]}, "data_type", "the tools are"),
        ("kto_tag is a text", {**chat(user, said), "kto_tag": "good"}, "data_type", "neither true nor false"),
    ]  # fmt: skip
    for name, row, kind, reason in rows:
        yield Case(f"messages: {name}", "a.jsonl", around("messages", row), kind, reason, 2)


def sharegpt() -> Iterator[Case]:
    human, gpt = GOOD["sharegpt"]["conversations"]
    for name, turns, kind, reason in [
        ("no turns", [], "missing_messages_list", "no turns"),
        ("null", None, "missing_messages_list", "no turns"),
        ("a text", "Hi", "data_type", "it is a str"),
        ("unknown speaker", [{"from": "alien", "value": "x"}, gpt], "unrecognized_role", "'alien'"),
        ("no speaker", [{"value": "x"}, gpt], "message_missing_key", "no 'from'"),
        ("no value", [human, {"from": "gpt"}], "missing_content", "no 'value'"),
        ("null value", [human, {"from": "gpt", "value": None}], "missing_content", "no 'value'"),
        ("empty value", [human, {"from": "gpt", "value": ""}], "empty_field", "empty"),
        ("object value", [human, {"from": "gpt", "value": {"a": 1}}], "data_type", "an object"),
        ("unknown key", [{**human, "vale": "x"}, gpt], "message_unrecognized_key", "not known"),
        ("number for a turn", [human, 4], "data_type", "the turn is a number"),
        ("only a human", [human], "example_missing_assistant_message", "nothing to learn"),
        ("a pair without an answer", [{"human": "Hi"}], "null_field", "null"),
        ("a bad function call", [human, {"from": "function_call", "value": "add"}], "tool_calls", "no function"),
    ]:
        yield Case(f"sharegpt: {name}", "a.jsonl", around("sharegpt", {"conversations": turns}), kind, reason, 2)


def syntax() -> Iterator[Case]:
    good = json.dumps(GOOD["pair"])
    for name, line, kind, reason in [
        ("python repr", str(GOOD["pair"]), "json_syntax", "Expecting property name"),
        ("cut row", good[:-3], "json_syntax", "Unterminated string"),
        ("cut after a comma", '{"prompt": "a",', "json_syntax", "column"),
        ("trailing comma", '{"prompt": "a", "completion": "b",}', "json_syntax", "column"),
        ("no comma", '{"prompt": "a" "completion": "b"}', "json_syntax", "delimiter"),
        ("two rows on a line", good + " " + good, "json_syntax", "Extra data"),
        ("raw tab in a text", '{"prompt": "a\tb", "completion": "c"}', "json_syntax", "control character"),
        ("bad escape", '{"prompt": "\\d", "completion": "c"}', "json_syntax", "escape"),
        ("bare word", "hello", "json_syntax", "Expecting value"),
        ("comment", "// " + good, "json_syntax", "Expecting value"),
        ("number", "3", "data_type", "the row is a int"),
        ("text", '"x"', "data_type", "the row is a string"),
        ("null", "null", "data_type", "the row is null"),
        ("array", '["a", "b"]', "data_type", "the row is an array"),
        ("array of rows", f"[{good}]", "data_type", "the row is an array"),
        ("same key twice", '{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate_key", "twice"),
        ("a thousand brackets", "[" * 200_000, "json_syntax", "nested too deeply"),
        ("empty object", "{}", "missing_field", "needs it"),
    ]:
        yield Case(f"jsonl: {name}", "a.jsonl", lines(good, line, good), kind, reason, 2)
    array = f"[\n{good},\n{good},\n"
    yield Case("json: cut array", "a.json", array.encode(), "json_syntax", "never closed", 3)
    yield Case("json: cut element", "a.json", (array + good[:20]).encode(), "json_syntax", "column", 4)
    yield Case("json: a number in the array", "a.json", (array + "3]").encode(), "data_type", "a int", 4)
    yield Case("json: null content", "a.json", (array + '{"prompt": "a", "completion": null}]').encode(),
               "null_field", "null", 4)  # fmt: skip
    yield Case("json: same key twice", "a.json", (array + '{"prompt": "a", "prompt": "b"}]').encode(),
               "duplicate_key", "cannot be read", 1)  # fmt: skip
    yield Case("json: a bare number", "a.json", b"42", "data_type", "a int", 1, 0)
    yield Case("json: an object of nothing known", "a.json", b'{"a": {"b": 1}}', "unknown_columns", "['a']", 1, 0)


def encodings() -> Iterator[Case]:
    text, row = "naïve café – “so”", json.dumps({"text": "naïve café"}, ensure_ascii=False) + "\n"
    for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        for file, plain in [("a.jsonl", row), ("a.csv", "text\nplain\n"), ("a.txt", "plain text\n")]:
            data = plain.encode(code)
            yield Case(f"{code} {file}", file, data, "encoding", "utf-", None, 0)
    good = lines(GOOD["text"])
    yield Case("latin-1 row", "a.jsonl", good + row.encode("latin-1") + good, "encoding", "latin-1 (byte 0xef", 2)
    yield Case("cp1252 row", "a.jsonl", good + lines('{"text": "x"}').replace(b"x", text.encode("cp1252")) + good,
               "encoding", "cp1252", 2)  # fmt: skip
    chinese = json.dumps({"text": "深度学习很有意思"}, ensure_ascii=False) + "\n"
    yield Case("gb18030 row", "a.jsonl", good + chinese.encode("gb18030") + good, "encoding", "gb18030", 2)
    yield Case("latin-1 csv", "a.csv", b"text\nfine\ncaf\xe9\nfine\n", "encoding", "latin-1", 3)
    yield Case("latin-1 txt", "a.txt", b"fine\ncaf\xe9\nfine\n", "encoding", "latin-1", 2)
    yield Case("latin-1 json", "a.json", b'[{"text": "caf\xe9"}]', "encoding", "latin-1", None, 0)
    yield Case("cut character", "a.jsonl", good * 2 + b'{"text": "\xe2\x82', "encoding", "byte 0xe2", 3)


def archives() -> Iterator[Case]:
    body = b"".join(lines({"text": f"row {i} {i * 7919}"}) for i in range(7_000))
    packed = gzip.compress(body, mtime=0)
    zst = pa.compress(body, codec="zstd", asbytes=True)
    for file in ("a.jsonl.gz", "a.txt.gz", "a.csv.gz"):
        yield Case(f"truncated {file}", file, packed[: len(packed) // 2], "broken_archive", "ends early", -1, -1)
    yield Case("gzip with a wrong checksum", "a.jsonl.gz", packed[:-8] + b"\0" * 8, "broken_archive", "damaged", -1, -1)
    yield Case("gzip with a damaged middle", "a.jsonl.gz", packed[:-3000] + b"\xff" * 50 + packed[-2950:],
               "broken_archive", "damaged", -1, -1)  # fmt: skip
    yield Case("gzip header only", "a.jsonl.gz", packed[:6], "broken_archive", "ends early", None, 0)
    yield Case("truncated json.gz", "a.json.gz", gzip.compress(b"[" + b'{"text": "x"},' * 50000, mtime=0)[:-30],
               "broken_archive", "ends early", None, 0)  # fmt: skip
    yield Case("empty gzip", "a.jsonl.gz", gzip.compress(b"", mtime=0), "empty_file", "empty", None, 0)
    yield Case("truncated zst", "a.jsonl.zst", zst[: len(zst) // 2], "broken_archive", "damaged", None, 0)
    yield Case("damaged zst", "a.jsonl.zst", zst[:40] + b"\xff" * 40 + zst[80:], "broken_archive", "damaged", None, 0)
    for name, magic, reason in [
        ("zip", b"PK\x03\x04....", "a zip archive"), ("bzip2", b"BZh91AY&SY", "a bzip2 archive"),
        ("xz", b"\xfd7zXZ\0....", "an xz archive"), ("png", b"\x89PNG\r\n", "a PNG image"),
        ("pdf", b"%PDF-1.7\n", "a PDF document"), ("pickle", b"\x80\x04\x95....", "a Python pickle"),
        ("sqlite", b"SQLite format 3\0", "a SQLite data base"), ("noise", bytes(range(256)) * 4, "binary data"),
    ]:  # fmt: skip
        for file in ("a.jsonl", "a.csv"):
            yield Case(f"{name} as {file}", file, magic, "binary_file", reason, None, 0)


def tables() -> Iterator[Case]:
    head = "prompt,completion\n"
    for name, rows, kind, reason, line in [
        ("too many cells", "a,b\nc,d,e\nf,g\n", "ragged_row", "3 cells", 3),
        ("too few cells", "a,b\nc\nf,g\n", "ragged_row", "1 cells", 3),
        ("text after a quote", 'a,b\n"c"x,d\nf,g\n', "csv_quoting", "follows a closing quote", 3),
        ("an empty cell", "a,b\nc,\nf,g\n", "empty_field", "empty", 3),
        ("a bad row after a cell of two lines", '"a\na",b\nc\nf,g\n', "ragged_row", "1 cells", 4),
    ]:
        yield Case(f"csv: {name}", "a.csv", (head + rows).encode(), kind, reason, line)
        semicolons = (head + rows).replace(",", ";").encode()
        yield Case(f"csv with semicolons: {name}", "a.csv", semicolons, kind, reason, line)
    yield Case("csv: open quote", "a.csv", (head + 'a,b\nc,d\n"e,f\ng,h\n').encode(), "csv_quoting", "never closed", 4)
    yield Case("csv: no header", "a.csv", b"I like it,pos\nNot at all,neg\nGood one,pos\n", "unknown_columns",
               "no known format has the columns", 2, 0, 2)  # fmt: skip
    yield Case("csv: name twice", "a.csv", b"text,text\na,b\n", "csv_header", "twice", 1, 0)
    yield Case("csv: column without a name", "a.csv", b"text,\na,b\n", "csv_header", "has no name", 1, 0)
    yield Case("csv: quote in the header", "a.csv", b'"text\na,b\n', "csv_quoting", "never closed", 1, 0)
    yield Case("csv: header only", "a.csv", b"text,label\n", "no_rows", "no rows", None, 0)
    yield Case("csv: messages that are no JSON", "a.csv", b"messages\nHi\n", "data_type", "a str", 2, 0)
    yield Case("tsv: ragged", "a.tsv", b"text\tlabel\na\tx\nb\nc\ty\n", "ragged_row", "1 cells", 3)
    yield Case("tsv: no header", "a.tsv", b"I like it\t1\nNot me\t0\n", "unknown_columns", "no known format", 2, 0)
    yield Case("tsv: no label", "a.tsv", b"text\tlabel\na\tx\nb\t\nc\ty\n", "missing_label", "empty", 3)


def columns(**values: list) -> pa.Table:
    return pa.table(values)


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def arrow(table: pa.Table, file: bool = False) -> bytes:
    out = io.BytesIO()
    make = pa.ipc.new_file if file else pa.ipc.new_stream
    with make(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return out.getvalue()


def binaries() -> Iterator[Case]:
    texts = columns(text=["a" * 50, "b" * 50, "c" * 50])
    data = parquet(texts)
    yield Case("parquet: truncated", "a.parquet", data[: len(data) // 2], "broken_file", "damaged after row 0", 1, 0)
    yield Case("parquet: no footer", "a.parquet", data[:-8], "broken_file", "damaged after row 0", 1, 0)
    yield Case(
        "parquet: overwritten start", "a.parquet", b"\0" * 8 + data[8:], "broken_file", "not start like", None, 0
    )
    yield Case("parquet: text inside", "a.parquet", b'{"text": "a"}\n', "broken_file", "does not start like", None, 0)
    yield Case("parquet: empty", "a.parquet", b"", "empty_file", "empty", None, 0)
    yield Case("parquet: no rows", "a.parquet", parquet(texts.slice(0, 0)), "no_rows", "no rows", None, 0)
    for name, table, kind, reason in [
        ("null", columns(text=["a", None, "c"]), "null_field", "null"),
        ("empty text", columns(text=["a", "", "c"]), "empty_field", "empty"),
        ("NaN label", columns(text=["a", "b", "c"], label=[1.0, float("nan"), 0.0]), "nan_label", "nan"),
        ("null label", columns(text=["a", "b", "c"], label=[1, None, 0]), "missing_label", "empty"),
        ("infinite label", columns(text=["a", "b", "c"], label=[1.0, float("inf"), 0.0]), "nan_label", "inf"),
    ]:
        for file, made in [("a.parquet", parquet(table)), ("a.arrow", arrow(table)), ("b.arrow", arrow(table, True))]:
            yield Case(f"{file}: {name}", file, made, kind, reason, 2)
    for file, made in [("a.parquet", parquet), ("a.arrow", arrow)]:
        data = made(columns(text=["fine", "cafe", "more"])).replace(b"cafe", b"caf\xe9")
        yield Case(f"{file}: text that is not UTF-8", file, data, "broken_file", "UTF8", -1, -1)
    yield Case("json: only a form feed", "a.json", b"\x0c\n", "empty_file", "empty", None, 0)
    numbers = columns(text=[1, 2, 3])
    yield Case("parquet: numbers", "a.parquet", parquet(numbers), "data_type", "a number", 1, 0, 3)
    stream = arrow(texts)
    yield Case("arrow: truncated stream", "a.arrow", stream[: len(stream) * 3 // 4], "broken_file", "damaged", -1, -1)
    yield Case("arrow: truncated file", "a.arrow", arrow(texts, True)[:-40], "broken_file", "damaged", 1, 0)
    yield Case("arrow: text inside", "a.arrow", b"hello there", "broken_file", "does not start like", None, 0)


def files() -> Iterator[Case]:
    for file in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"):
        yield Case(f"empty {file}", file, b"", "empty_file", "empty", None, 0)
        yield Case(f"blank {file}", file, b" \n\n \n", "empty_file", "empty", None, 0)
    yield Case("only a byte order mark", "a.jsonl", b"\xef\xbb\xbf", "empty_file", "empty", None, 0)
    yield Case("json: empty array", "a.json", b"[]", "no_rows", "no rows", None, 0)
    yield Case("no such file", "missing.jsonl", None, "missing_file", "no such file", None, 0)
    yield Case("a folder without data", "folder.jsonl/notes.docx", b"x", "empty_folder", "notes.docx", None, 0)
    yield Case(
        "a folder with a manifest only", "set/dataset_info.json", b"{}", "empty_folder", "no data files", None, 0
    )
    yield Case("unknown extension", "a.dat", b"hello there\n", "unknown_container", "'.dat'", None, 0)
    yield Case("no extension", "data", b"hello there\n", "unknown_container", "unknown file type", None, 0)


def labels() -> Iterator[Case]:
    for name, value, kind, reason in [
        ("null", None, "missing_label", "empty"), ("empty", "", "missing_label", "empty"),
        ("NaN", float("nan"), "nan_label", "nan"), ("infinite", float("-inf"), "nan_label", "inf"),
        ("the text nan", "nan", "nan_label", "nan"), ("an object", {"a": 1}, "data_type", "an object"),
        ("NaN in a list", ["a", float("nan")], "nan_label", "nan"),
        ("null in a list", [None], "missing_label", "empty"),
        ("an object in a list", [{}], "data_type", "an object"),
    ]:  # fmt: skip
        row = {"text": "Fine", "label": value}
        yield Case(f"label: {name}", "a.jsonl", around("class", row), kind, reason, 2, field="label")
    yield Case("half a pair of texts", "a.jsonl", around("pairs", {"premise": "It rains", "label": 0}), "missing_field",
               "needs both: premise and hypothesis", 2, field="hypothesis")  # fmt: skip
    yield Case("label: none there", "a.jsonl", around("class", {"text": "Fine"}), "mixed_schema", "'text'", 2)


def preferences() -> Iterator[Case]:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    for name, row in [
        ("texts", {"prompt": "Ask", "chosen": "Same", "rejected": "Same"}),
        ("conversations", {"chosen": said, "rejected": said}),
        ("alpaca", {"instruction": "Do", "chosen": "Same", "rejected": "Same"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "A"},
                      "rejected": {"from": "gpt", "value": "A"}}),
    ]:  # fmt: skip
        yield Case(
            f"preference: identical {name}", "a.jsonl", around("preference", row), "identical_preference", "same", 2
        )
    swift = {"messages": said, "rejected_response": "No"}
    yield Case("preference: identical swift", "a.jsonl", lines(swift, {**swift, "rejected_response": "Yo"}, swift),
               "identical_preference", "same", 2)  # fmt: skip
    yield Case("preference: text against messages", "a.jsonl",
               around("preference", {"chosen": said, "rejected": "No"}), "data_type", "a text", 2)  # fmt: skip
    yield Case("preference: nothing rejected", "a.jsonl", around("preference", {"prompt": "a", "chosen": "b"}),
               "mixed_schema", "'prompt'", 2)  # fmt: skip
    yield Case("unpaired: label is a text", "a.jsonl", around("unpaired", {**GOOD["unpaired"], "label": "good"}),
               "data_type", "neither true nor false", 2)  # fmt: skip


def schemas() -> Iterator[Case]:
    kinds = ["pair", "alpaca", "sharegpt", "messages", "class", "query"]
    for first in kinds:
        for other in kinds:
            if first != other and (first, other) not in [("query", "pair")]:
                data = around(first, GOOD[other])
                yield Case(f"{other} among {first}", "a.jsonl", data, "mixed_schema", "the rows before it are", 2)
    for name, row, reason in [
        ("misspelled", {"promt": "a", "completion": "b"}, "lacks prompt"),
        ("half a pair", {"completion": "b"}, "lacks prompt"),
        ("nothing known", {"foo": 1, "bar": 2}, "['foo', 'bar']"),
        ("no columns", {}, "no columns"),
        ("instruction only", {"instruction": "Do"}, "'alpaca', which lacks output"),
        ("chosen only", {"chosen": "b"}, "lacks rejected"),
        ("conversation misspelled", {"conversatons": []}, "'sharegpt'"),
    ]:
        yield Case(f"columns: {name}", "a.jsonl", lines(row, row), "unknown_columns", reason, 1, 0, 2)


def tokens() -> Iterator[Case]:
    long = {"prompt": "x" * 40, "completion": "y"}
    yield Case("masked after the cut", "a.jsonl", around("pair", long), "all_masked", "cutting the row to 20", 2,
               max_length=20)  # fmt: skip
    for format, name in [("pair", "completion"), ("alpaca", "output"), ("class", "text")]:
        row = {**GOOD[format], name: "z" * 10_000_000}
        yield Case(f"ten megabytes in {name}", "a.jsonl", around(format, row), "too_long", "10,000,000", 2)
    yield Case("ten megabytes in a csv cell", "a.csv", b"prompt,completion\na,b\nc," + b"d" * 10_000_000 + b"\ne,f\n",
               "too_long", "10,000,000", 3)  # fmt: skip
    yield Case("a special token in a text", "a.jsonl", around("pair", {"prompt": "a<|im_end|>b", "completion": "c"}),
               "control_token", "'<|im_end|>'", 2, 3, 0)  # fmt: skip
    row = {**GOOD["pair"], "id": 7}
    yield Case("an id twice", "a.jsonl", lines(row, {**GOOD["pair"], "id": 8}, row), "duplicate_id", "'7' was", 3, 3, 0)


def legal() -> Iterator[Case]:
    two = lines(GOOD["pair"], GOOD["pair"])
    table = b"prompt,completion\na,b\nc,d\n"
    array = json.dumps([GOOD["pair"]] * 2, indent=1).encode()
    for name, file, data, note in [
        ("byte order mark", "a.jsonl", b"\xef\xbb\xbf" + two, "byte order mark"),
        ("byte order mark", "a.csv", b"\xef\xbb\xbf" + table, "byte order mark"),
        ("byte order mark", "a.json", b"\xef\xbb\xbf" + array, "byte order mark"),
        ("byte order mark", "a.txt", b"\xef\xbb\xbfone\ntwo\n", "byte order mark"),
        ("CRLF", "a.jsonl", two.replace(b"\n", b"\r\n"), "CRLF"),
        ("CRLF", "a.csv", table.replace(b"\n", b"\r\n"), "CRLF"),
        ("CRLF", "a.json", array.replace(b"\n", b"\r\n"), "CRLF"),
        ("CRLF", "a.txt", b"one\r\n\r\ntwo\r\n", "CRLF"),
        ("an array", "a.jsonl", array, "its content is json"),
        ("rows", "a.json", two, "its content is jsonl"),
        ("rows", "a.csv", two, "its content is jsonl"),
        ("an object", "a.json", b'{"data": ' + array + b"}", "read as 'prompt_completion'"),
        ("blank lines", "a.jsonl", b"\n" + two.replace(b"\n", b"\n\n"), "read as"),
        ("no line end", "a.jsonl", two[:-1], "read as"),
        ("gzip", "a.jsonl.gz", gzip.compress(two, mtime=0), "read as"),
        ("gzip unsaid", "a.jsonl", gzip.compress(two, mtime=0), "read as"),
        ("zstd", "a.jsonl.zst", pa.compress(two, codec="zstd", asbytes=True), "read as"),
        ("quoted cells", "a.csv", b'prompt,completion\n"a, ""b""","c\nd"\ne,f\n', "read as"),
        ("unused columns", "a.jsonl", lines({**GOOD["pair"], "topic": 1}, GOOD["pair"]), "not used: topic"),
    ]:
        yield Case(f"{name} in {file}", file, data, LEGAL, note, good=2, bad=0)


PARTS = (fields, messages, sharegpt, syntax, encodings, archives, tables, binaries, files, labels, preferences, schemas,
         tokens, legal)  # fmt: skip


@cache
def cases() -> list[Case]:
    return [case for part in PARTS for case in part()]
