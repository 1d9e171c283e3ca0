"""A whole tiny job for tests: a model folder with a tokenizer, rows in files, a run that trains in seconds."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import models
import tiny_tokenizers as tt
from deltatune.config import Config

WORDS = "good fine nice bad poor sad it was the film a plot great terrible [MASK]"


def chat_model(
    folder: Path, family: str = "llama", template: str | None = tt.CHATML, seed: int = 0, **fields: Any
) -> Path:
    """A tiny causal model with a byte-level tokenizer, saved as an ordinary folder. fields: of its configuration."""
    tokenizer = tt.byte_level(template)
    model = models.tiny(family, vocab_size=len(tokenizer), max_position_embeddings=512, seed=seed, **fields)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return saved(model, tokenizer, folder)


def masked_model(folder: Path, task: str = "lm") -> Path:
    """A tiny BERT with a word tokenizer that has a mask token."""
    tokenizer = tt.bert_like(WORDS)
    tokenizer.mask_token = "[MASK]"
    return saved(models.tiny("bert", task, vocab_size=len(tokenizer)), tokenizer, folder)


def seq2seq_model(folder: Path) -> Path:
    tokenizer = tt.t5_like(WORDS)
    return saved(models.tiny("t5", vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1), tokenizer, folder)


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_rows(path: Path, count: int = 24, seed: int = 0) -> str:
    """'abc' -> 'cba': short conversations of unlike lengths."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        word = "".join(draw.choice("abcdef") for _ in range(draw.randint(2, 9)))
        turns = [{"role": "user", "content": f"{word} {seed}{i}"}, {"role": "assistant", "content": word[::-1]}]
        rows.append({"messages": turns})
    return lines(path, rows)


def label_rows(path: Path, count: int = 24, seed: int = 0) -> str:
    draw = random.Random(seed)
    good, bad = ("good", "fine", "nice"), ("bad", "poor", "sad")
    rows = []
    for i in range(count):
        said, label = (draw.choice(good), "pos") if i % 2 else (draw.choice(bad), "neg")
        rows.append({"text": f"the film {'was ' * draw.randint(1, 3)}{said}", "label": label})
    return lines(path, rows)


def config(model: Path, rows: str, held: str = "", **over: Any) -> Config:
    """A short run in fp32. `over`: further sections; their keys win."""
    sections: dict[str, Any] = {
        "train": {"steps": 6, "batch_tokens": 160, "lr": 5e-3, "precision": "fp32", "save_every": 2},
        "eval": {"retention": False, "max_new_tokens": 8},
        "method": "lora",
        "objective": "sft",
    }
    for key, value in over.items():
        mapping = isinstance(value, dict) and isinstance(sections.get(key), dict)
        sections[key] = {**sections[key], **value} if mapping else value
    data = {"train": rows, **({"eval": held} if held else {}), **sections.pop("data", {})}
    return Config(model=str(model), data=data, **sections)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny chat model and 12 rows; a test module takes it as `made = tiny_run.made`."""
    folder = tmp_path_factory.mktemp("made")
    chat_model(folder / "model")
    chat_rows(folder / "rows.jsonl", 12)
    return folder


def run_of(folder: Path, method: Any, **train: Any) -> Config:
    """A short run of `method` on what `made` has made."""
    return config(folder / "model", str(folder / "rows.jsonl"), method=method, train=train)


class Stop:
    """An observer that asks the run to stop after its third step."""

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_start(self, record: dict[str, Any]) -> None: ...
    def on_eval(self, record: dict[str, Any]) -> None: ...
    def on_end(self, record: dict[str, Any]) -> None: ...
