"""Retention against the models' own losses and hand-made distributions; comparable only when measured alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from deltatune.evaluate.retention import (
    Windows,
    cut,
    default_texts,
    forgotten,
    kind_of,
    out_of_domain,
    read_texts,
    retention,
)
from letters import letters
from models import FAMILIES, tiny

TOK = letters()
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "hello there",
    "what a day it was, and then it was not any more",
]
SETTINGS = Windows(window=20, batch_tokens=50)
KIND = {"causal": "perplexity", "masked": "pseudo-perplexity", "seq2seq": "continuation"}


class Change:
    """Adds a fixed vector to a layer's output while it is on: a tuned model that can be the base again."""

    def __init__(self, layer: nn.Module, size: float) -> None:
        self.on, self.size = True, size
        layer.register_forward_hook(self.add)

    def add(self, layer: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(1))
        return out + self.size * noise if self.on else out

    @contextmanager
    def off(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_kind_follows_the_model(family: str) -> None:
    assert kind_of(tiny(family)) == KIND[FAMILIES[family].kind]


def test_models_with_other_heads_have_no_likelihood() -> None:
    assert kind_of(tiny("bert", "classify")) == "drift"
    assert kind_of(tiny("llama", "classify")) == "drift"
    assert kind_of(tiny("bert", "trunk")) == "drift"


@pytest.mark.parametrize("family", [n for n, f in FAMILIES.items() if f.kind == "causal"])
def test_causal_likelihood_equals_the_models_own_loss(family: str) -> None:
    model = tiny(family)
    got = retention(model, TOK, TEXTS, SETTINGS)
    total = tokens = 0.0
    for row in cut(model, TOK, TEXTS, SETTINGS):
        ids = torch.tensor([row])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
        tokens += len(row) - 1
    assert got["tokens"] == tokens == 19 + 19 + 10 + 19 + 19 + 6  # the last 3 letters of the first text are too short
    assert got["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert len(got["windows"]) == got["rows"] == 6
    assert sum(n for _, n in got["windows"]) == tokens
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_continue_the_first_half(family: str) -> None:
    model = tiny(family)
    got = retention(model, TOK, TEXTS, SETTINGS)
    total = tokens = 0.0
    for row in cut(model, TOK, TEXTS, SETTINGS):
        half = len(row) // 2
        ids, labels = torch.tensor([row[:half]]), torch.tensor([row[half:]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * labels.numel()
        tokens += labels.numel()
    assert (got["tokens"], got["nll"]) == (tokens, pytest.approx(total / tokens, rel=1e-5))


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_masked_models_guess_the_same_tokens_in_any_batch(family: str) -> None:
    model = tiny(family)
    got = retention(model, TOK, TEXTS, SETTINGS)
    rows = cut(model, TOK, TEXTS, SETTINGS)
    assert got["tokens"] == sum(max(1, round(0.15 * len(r))) for r in rows)
    alone = retention(model, TOK, TEXTS, Windows(window=20, batch_tokens=4))
    assert got["nll"] == pytest.approx(alone["nll"], rel=1e-5)
    other = retention(model, TOK, TEXTS, Windows(window=20, seed=1))
    assert other["nll"] != pytest.approx(got["nll"], rel=1e-3)


def test_special_tokens_are_not_asked_for() -> None:
    ends = letters(ends=True)
    got = retention(tiny("bert"), ends, ["abc"], Windows(window=20, masked=0.99))
    assert got["tokens"] == 3


def test_kl_is_zero_for_the_base_and_equals_the_definition() -> None:
    model = tiny("llama")
    assert retention(model, TOK, TEXTS, SETTINGS, base=contextmanager(lambda: iter([None])))["kl"] == 0.0
    change = Change(model.lm_head, 0.5)
    got = retention(model, TOK, TEXTS, SETTINGS, base=change.off)
    total, tokens = 0.0, 0
    for row in cut(model, TOK, TEXTS, SETTINGS):
        with torch.no_grad():
            q = model(input_ids=torch.tensor([row])).logits[0, :-1].double().softmax(-1)
            with change.off():
                p = model(input_ids=torch.tensor([row])).logits[0, :-1].double().softmax(-1)
        total += float((p * (p / q).log()).sum())
        tokens += len(row) - 1
    assert got["kl"] == pytest.approx(total / tokens, rel=1e-4)
    assert got["kl"] > 0.01


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_what_was_forgotten(family: str) -> None:
    model = tiny(family)
    head = model.get_output_embeddings()
    change = Change(head, 3.0)
    with change.off():
        before = retention(model, TOK, TEXTS * 4, SETTINGS)
    after = retention(model, TOK, TEXTS * 4, SETTINGS, base=change.off)
    lost = forgotten(before, after)
    assert lost["forgotten"] == pytest.approx(after["nll"] - before["nll"])
    assert lost["interval"][0] < lost["forgotten"] < lost["interval"][1]
    assert lost["before"] == {"nll": before["nll"], "perplexity": before["perplexity"]}
    assert lost["kl"] > 0
    same = forgotten(before, before)
    assert (same["forgotten"], same["interval"]) == (0.0, [0.0, 0.0])
    json.dumps(lost, allow_nan=False)


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "classify"), ("llama", "classify"), ("bert", "trunk"), ("bart", "classify")]
)
def test_models_without_a_language_head_drift(family: str, task: str) -> None:
    model = tiny(family, task)
    tok = letters(ends=True)
    layer = next(m for n, m in model.named_modules() if n.endswith(("1.output.dense", "1.mlp.down_proj", "1.fc2")))
    still = retention(model, tok, TEXTS[:2], Windows(), base=contextmanager(lambda: iter([None])))
    assert still["drift"] == pytest.approx(0.0, abs=1e-6)
    change = Change(layer, 1.0)
    moved = retention(model, tok, TEXTS[:2], Windows(), base=change.off)
    assert moved["kind"] == "drift"
    assert 0.001 < moved["drift"] < 2
    assert forgotten(still, moved)["forgotten"] == moved["drift"]


def test_windows() -> None:
    model = tiny("llama")
    assert [len(r) for r in cut(model, TOK, ["a" * 43, "b" * 11], Windows(window=20))] == [20, 20, 11]
    assert [len(r) for r in cut(model, TOK, ["a" * 43, "b" * 11], Windows(window=20, limit=30))] == [20, 10]
    assert [len(r) for r in cut(model, TOK, ["a" * 300], Windows())] == [128, 128, 44]
    assert [len(r) for r in cut(tiny("t5"), TOK, ["a" * 700], Windows())] == [512, 188]


def test_windows_keep_within_the_positions() -> None:
    assert retention(tiny("roberta"), TOK, ["a" * 300])["rows"] == 3


def test_nothing_global_moves() -> None:
    model = tiny("bert").train()
    state = torch.get_rng_state()
    retention(model, TOK, TEXTS, SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_reading_texts(tmp_path) -> None:
    cases = {"a\nb\n": ["a", "b"], "a\nb\n\nc\n\n\n": ["a\nb", "c"], " x ": ["x"]}
    for text, documents in cases.items():
        (tmp_path / "general.txt").write_text(text)
        assert read_texts(tmp_path / "general.txt") == documents
    (tmp_path / "general.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"general\.txt: no text"):
        read_texts(tmp_path / "general.txt")


def test_default_texts_are_the_quickstarts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltatune import quickstart

    (tmp_path / "general.txt").write_text("one\ntwo\n")
    monkeypatch.setattr(quickstart, "rows", lambda: {"general": tmp_path / "general.txt"})
    assert default_texts() == ["one", "two"]


def test_out_of_domain_gaps_point_the_bad_way() -> None:
    numbers = {
        "near": {"loss": 1.5, "accuracy": 0.75, "perplexity": 4.0, "rows": 2, "per_row": []},
        "far": {"loss": 2.0, "accuracy": 0.5, "perplexity": 9.0, "rows": 2},
    }
    inside = {"loss": 1.0, "accuracy": 1.0, "perplexity": 3.0, "rows": 9}
    got = out_of_domain(lambda rows: numbers[rows[0]], inside, {"near": ["near"], "far": ["far"]})
    assert got["near"]["gap"] == {"loss": 0.5, "accuracy": 0.25, "perplexity": 1.0}
    assert got["far"] == {"loss": 2.0, "accuracy": 0.5, "perplexity": 9.0, "rows": 2} | {
        "gap": {"loss": 1.0, "accuracy": 0.5, "perplexity": 6.0}
    }
    with pytest.raises(ValueError, match="'far' has no rows"):
        out_of_domain(lambda rows: {}, inside, {"far": []})


def maskless() -> Any:
    tok = letters()
    tok.mask_token = None
    return tok


def pair(**other: Any) -> tuple[dict, dict]:
    one = {"kind": "perplexity", "sha256": "x", "rows": 1, "windows": [[1.0, 2]], "nll": 0.5, "perplexity": 1.6}
    return one, one | other


REFUSED = [
    (lambda: retention(tiny("bert", "classify"), TOK, TEXTS), "BertForSequenceClassification has no language head"),
    (lambda: retention(tiny("llama"), TOK, ["ab"]), "no window of at least 4"),
    (lambda: retention(tiny("llama"), TOK, TEXTS, Windows(window=200)), "window=200 is more than the model's 128"),
    (lambda: retention(tiny("bert"), maskless(), TEXTS), "no mask token"),
    (lambda: Windows(window=2), "at least 4 tokens"),
    (lambda: Windows(masked=1), "masked between 0 and 1"),
    (lambda: forgotten(*pair(sha256="y")), "differ in sha256: 'x' and 'y'"),
    (lambda: forgotten(*pair(rows=2)), "differ in rows: 1 and 2"),
    (lambda: forgotten(*pair(kind="drift")), "differ in kind"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_refusals(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_one_window_has_no_interval() -> None:
    assert forgotten(*pair())["interval"] == [None, None]
