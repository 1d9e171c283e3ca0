"""Rows come out of every container the same, with their place; nothing is lost without a count."""

import gzip
import io
import json
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pytest

from deltatune.data.sources import Hub, Problems, hub, is_hub, read
from malformed import arrow, parquet

ROWS = [{"prompt": "Ask", "completion": "Say"}, {"prompt": "Why", "completion": "So\nit is"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist(ROWS)

CONTAINERS = [
    ("a.jsonl", JSONL, [1, 2]),
    ("a.ndjson", JSONL, [1, 2]),
    ("a.json", json.dumps(ROWS).encode(), [1, 1]),
    ("a.json", b"[" + JSONL.replace(b"}\n{", b"},\n{") + b"]", [1, 2]),
    ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=0).encode(), [4, 8]),
    ("a.json", b'{"prompt": "Ask", "completion": "Say"}\n\n' + JSONL.splitlines()[1], [1, 3]),
    ("a.csv", b'prompt,completion\nAsk,Say\nWhy,"So\nit is"\n', [2, 3]),
    ("a.csv", b'prompt;completion\nAsk;Say\nWhy;"So\nit is"\n', [2, 3]),
    ("a.parquet", parquet(TABLE), [1, 2]),
    ("a.arrow", arrow(TABLE), [1, 2]),
    ("a.arrow", arrow(TABLE, file=True), [1, 2]),
    ("a.jsonl.gz", gzip.compress(JSONL), [1, 2]),
    ("a.jsonl.zst", pa.compress(JSONL, codec="zstd", asbytes=True), [1, 2]),
    ("a.parquet.gz", gzip.compress(parquet(TABLE)), [1, 2]),
    ("noname", JSONL, [1, 2]),
]


@pytest.mark.parametrize(("file", "data", "lines"), CONTAINERS, ids=[f"{c[0]}-{i}" for i, c in enumerate(CONTAINERS)])
def test_every_container_gives_the_same_rows(file, data, lines, tmp_path):
    path = tmp_path / file
    path.write_bytes(data)
    rows = list(read(path))
    assert [row.value for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"one\ntwo\n", [("one", 1), ("two", 2)]),
        (b"one\nmore\n\n\ntwo\n", [("one\nmore", 1), ("two", 5)]),
        (b"one\r\nmore\r\n\r\ntwo", [("one\nmore", 1), ("two", 4)]),
    ],
)
def test_text_is_paragraphs_or_lines(data, texts, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert [(row.value["text"], row.where) for row in read(path)] == [(t, f"{path}:{line}") for t, line in texts]


def test_tabs_need_no_quotes(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\na "fine" one\t1\n"open\t0\n')
    assert [row.value["text"] for row in read(path)] == ['a "fine" one', '"open']
    path.write_text("good\t1\nbad\t0\n")
    assert next(read(path, columns=["text", "label"])).value == {"text": "good", "label": "1"}


def test_columns_can_be_renamed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,category\nhi,greeting\n")
    assert next(read(path, columns={"category": "label"})).value == {"text": "hi", "label": "greeting"}


def test_a_folder_is_its_data_files_in_order(tmp_path):
    for name in ("b.jsonl", "sub/a.jsonl.gz", "LICENSE.txt", "README.md", ".hidden.jsonl", "dataset_info.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(JSONL) if name.endswith("gz") else JSONL)
    problems = Problems()
    rows = list(read(tmp_path, problems))
    files = [f"{tmp_path}/b.jsonl", f"{tmp_path}/sub/a.jsonl.gz"]
    assert [row.where for row in rows] == [f"{file}:{line}" for file in files for line in (1, 2)]
    assert any("3 files are no data" in note for note in problems.notes)


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(JSONL))))
    assert [row.where for row in read("-")] == ["<stdin>:1", "<stdin>:2"]


def test_all_bad_rows_are_told_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nx\n{"text": "b"}\n[1]\ny\n')
    with pytest.raises(ValueError, match="3 of 5 rows cannot be used") as error:
        list(read(path))
    assert "a.jsonl:2: [json_syntax]" in str(error.value)
    assert "(2 times: lines 2, 5)" in str(error.value)
    assert "a.jsonl:4: [data_type]" in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(JSONL)
    with pytest.raises(ValueError, match=r"trian.jsonl: .*no such file.* Did you mean 'train.jsonl'\?"):
        list(read(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("owner/name", True), ("owner/name@main:train", True), ("owner/name#main@abc123:test[:10%]", True),
        ("owner/name.jsonl", False), ("./owner/name", False), ("name", False), ("a/b/c", False), ("/tmp/x", False),
    ],
)  # fmt: skip
def test_hub_references(ref, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub(ref) is expected


def test_hub_rows_come_through_the_datasets_library(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(JSONL)
    problems = Problems()
    rows = list(hub(Hub(str(tmp_path)), problems))
    assert [row.value for row in rows] == ROWS
    assert rows[1].where == f"{tmp_path}:2"
    assert list(hub(Hub(str(tmp_path), split="nope"), problems)) == []
    assert problems.errors[0].kind == "hub"


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        for _ in range(50):
            file.write(JSONL * 100)
    tracemalloc.start()
    count = sum(1 for _ in read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < path.stat().st_size / 3


def test_reading_imports_neither_torch_nor_transformers():
    code = "import sys, deltatune.data.formats; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
