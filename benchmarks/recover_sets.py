"""The rows of the recovery runs: each task's training, dev and test rows, out of the sets of docs/evidence/data.md."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = 512  # the budget of a run
Row = dict[str, Any]
Table = Mapping[str, Any]


def sst2(data: Path, counts: Mapping[str, int]) -> dict[str, list[Row]]:
    """SST-2's own splits: short sentences, positive or negative."""
    found = {}
    for name in ("train", "dev", "test"):
        lines = (data / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        pairs = [line.rpartition("\t") for line in lines if "\t" in line]
        found[name] = drawn(
            [{"text": text, "label": ("negative", "positive")[int(n)]} for text, _, n in pairs], counts[name]
        )
    return found


def wnut17(data: Path, counts: Mapping[str, int]) -> dict[str, list[Row]]:
    """WNUT 2017's own splits; the training rows are drawn from those that name something."""
    files = {"train": "wnut17train.conll", "dev": "emerging.dev.conll", "test": "emerging.test.annotated"}
    found = {}
    for name, file in files.items():
        rows = list(sentences((data / "wnut17" / file).read_text(encoding="utf-8")))
        rows = [row for row in rows if name != "train" or set(row["tags"]) != {"O"}]
        found[name] = drawn(rows, counts[name])
    return found


def sentences(text: str) -> Iterator[Row]:
    """Rows of tokens and tags; some blank lines hold a tab. A tag that names two types at once keeps the first."""
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        pairs = [line.split("\t")[:2] for line in block.split("\n") if line.count("\t") and line.split("\t")[0].strip()]
        if pairs:
            yield {"tokens": [word for word, _ in pairs], "tags": [tag.split(",")[0].strip() for _, tag in pairs]}


TOPICS = (
    "card_arrival", "lost_or_stolen_card", "request_refund", "exchange_rate",
    "pending_transfer", "failed_transfer", "transfer_timing", "change_pin",
)  # fmt: skip


def banking(data: Path, counts: Mapping[str, int]) -> dict[str, list[Row]]:
    """Eight of Banking77's topics, evenly; dev is a part of its training file, test is its test file."""
    files = {
        name: (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") for name in ("train", "test")
    }
    rows = {
        name: [{"text": r["text"], "label": r["category"]} for r in csv.DictReader(file)]
        for name, file in files.items()
    }
    test = even(rows["test"], counts["test"])
    seen = {row["text"].lower() for row in test}
    rest = [row for row in rows["train"] if row["text"].lower() not in seen]
    dev = even(rest, counts["dev"])
    seen |= {row["text"].lower() for row in dev}
    return {
        "train": even([row for row in rest if row["text"].lower() not in seen], counts["train"]),
        "dev": dev,
        "test": test,
    }


def even(rows: Sequence[Row], count: int) -> list[Row]:
    """As many rows of each topic."""
    each = [drawn([row for row in rows if row["label"] == topic], count // len(TOPICS)) for topic in TOPICS]
    return drawn([row for part in each for row in part], count)


def spoken(data: Path, counts: Mapping[str, int]) -> dict[str, list[Row]]:
    """Banking77's questions as sounds (benchmarks/speak.py); no text of one split is in another."""
    place = data / "spoken77"
    if not place.is_dir():
        raise ValueError(f"there is no {place}: python benchmarks/speak.py --data {data}")
    rows = given(place, counts)
    return {name: [{**row, "audio": f"spoken77/{row['audio']}"} for row in found] for name, found in rows.items()}


def given(data: Path, counts: Mapping[str, int]) -> dict[str, list[Row]]:
    """train.jsonl, dev.jsonl and test.jsonl as they lie in the folder."""
    lines = {
        name: (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "dev", "test")
    }
    return {name: [json.loads(line) for line in found][: counts[name]] for name, found in lines.items()}


def drawn(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows by a private generator, no row twice."""
    unique = list({json.dumps(row, sort_keys=True): row for row in rows}.values())
    return random.Random(0).sample(unique, min(count, len(unique)))


MAKERS: dict[str, Callable[[Path, Mapping[str, int]], dict[str, list[Row]]]] = {
    "sst2": sst2, "wnut17": wnut17, "banking": banking, "spoken": spoken, "given": given,
}  # fmt: skip


def splits(task: Table, data: Path, into: Path) -> str:
    """The task's rows as files in `into`; returns their digest. Test rows that are training or dev rows go."""
    counts = task["rows"]
    rows = MAKERS[counts["make"]](data, counts)
    if len(rows["train"]) > ROWS:
        raise ValueError(f"{len(rows['train'])} training rows; the budget is {ROWS}")
    kept = {json.dumps(row, sort_keys=True) for row in (*rows["train"], *rows["dev"])}
    rows["test"] = [row for row in rows["test"] if json.dumps(row, sort_keys=True) not in kept]
    digest = hashlib.sha256()
    for name, found in sorted(rows.items()):
        text, placed = lines(found), lines([located(row, data) for row in found])
        (into / f"{name}.jsonl").write_text(placed, encoding="utf-8")
        digest.update(f"{name}\n{text}".encode())
        for row in found:
            if "audio" in row:
                digest.update((data / row["audio"]).read_bytes())
    return digest.hexdigest()[:16]


def lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def located(row: Row, data: Path) -> Row:
    """A row with the whole path of its sound: the file that holds the row lies elsewhere."""
    return {**row, "audio": str((data / row["audio"]).absolute())} if "audio" in row else row
