"""Choosing among words after a long shared prompt (benchmarks/speed.py): ours, and a plain loop over batches."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from deltatune import zoo
from deltatune.evaluate.incontext import Prompt, label_scores
from speed_train import Peak, opened

Row = dict[str, Any]
WORDS = {
    "card_arrival": "arrival", "lost_or_stolen_card": "lost", "request_refund": "refund", "exchange_rate": "rate",
    "pending_transfer": "pending", "failed_transfer": "failed", "transfer_timing": "timing", "change_pin": "PIN",
}  # fmt: skip
SHOTS = 24


def prepare(case: Any, data: Path, folder: Path) -> None:
    """Write the shared prompt (examples with their word), the rows behind it and the words."""
    with (data / case.source).open(encoding="utf-8", newline="") as file:
        found = [(line["text"], WORDS[line["category"]]) for line in csv.DictReader(file) if line["category"] in WORDS]
    found = found[::3]
    shown, asked = found[:: len(found) // SHOTS][:SHOTS], found[1 :: len(found) // case.rows][: case.rows]
    front = "".join(f"Message: {text.strip()}\nTopic: {word}\n\n" for text, word in shown)
    rows = [f"{front}Message: {text.strip()}\nTopic:" for text, _ in asked]
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path(case.base))
    long = [w for w in WORDS.values() if len(tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) != 1]
    assert not long, f"the plain loop compares words of one token: {long}"
    (folder / "asked.json").write_text(json.dumps({"rows": rows, "words": list(WORDS.values())}))


def read(case: Any, folder: Path) -> tuple[Any, Any, list[str], list[str]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path(case.base))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    given = json.loads((folder / "asked.json").read_text())
    return opened(case).eval(), tokenizer, given["rows"], given["words"]


def result(peak: Peak, began: float, said: list[int]) -> Row:
    seconds = time.perf_counter() - began
    return {"speed": len(said) / seconds, "unit": "rows/s", "said": said, "seconds": seconds, "peak": peak.bytes()}


def ours(case: Any, folder: Path) -> Row:
    peak = Peak()
    model, tokenizer, rows, words = read(case, folder)
    began = time.perf_counter()
    prompt = Prompt("shots", template="{text}", labels={word: f" {word}" for word in words}, chat=False)
    scores = label_scores(model, tokenizer, prompt, rows)
    return result(peak, began, scores.argmax(1).tolist())


def peer(case: Any, folder: Path) -> Row:
    """Every word is one token: one forward pass over each padded batch, logits of its last position only."""
    peak = Peak()
    model, tokenizer, rows, words = read(case, folder)
    tokenizer.padding_side = "left"
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
    began, said = time.perf_counter(), list[int]()
    with torch.no_grad():
        for i in range(0, len(rows), case.batch):
            batch = tokenizer(rows[i : i + case.batch], padding=True, return_tensors="pt").to(model.device)
            said += model(**batch, logits_to_keep=1).logits[:, -1, ids].argmax(-1).tolist()
    return result(peak, began, said)
