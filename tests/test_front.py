"""What all rows begin with is computed once: the same scores from a fraction of the tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers as hf

import tiny_tokenizers as tt
from deltatune import IA3, Choice, Cloze, Gate, LoRA, Prefix, SpotTune, activate, disabled, predict, rows
from deltatune.evaluate import cache
from deltatune.evaluate.incontext import label_scores
from models import tiny
from test_combine import shaken
from test_incontext import LABEL, PLAIN

SHARED = "a long instruction that every row begins with "  # 46 tokens of one letter, and two more of each text
TEXTS = ["it is", "it is a much longer text", "it", "it was"]
TOLD = "it was the film " * 12
WORDS = tt.bert_like("it was the film good bad fine sad , very [MASK]")
FIELDS = {"max_position_embeddings": 256}


class Seen:
    """The tokens that a model reads."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.get_input_embeddings().register_forward_pre_hook(self.add, prepend=True)

    def add(self, _, args):
        self.count += args[0].numel()

    def since(self) -> int:
        found, self.count = self.count, 0
        return found


def both(model, monkeypatch, ask):
    """(what `ask` finds, tokens read) with a front and without."""
    ask()  # a model is asked once how it finishes its logits
    seen, found = Seen(model), []
    for least in (20, 10**9):
        monkeypatch.setattr(cache, "SHARED", least)
        found.append((ask(), seen.since()))
    seen.handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox", "phi3", "gemma", "mistral", "mamba"])
def test_labels_score_alike(family, monkeypatch):
    """Sliding windows (gemma, mistral) and states (mamba) are read whole."""
    model = tiny(family, **({} if family == "mamba" else {"max_position_embeddings": 128}))
    texts = [SHARED + text for text in TEXTS]
    (got, few), (wanted, all_) = both(model, monkeypatch, lambda: label_scores(model, PLAIN, LABEL, texts))
    assert got == pytest.approx(wanted, abs=2e-5)
    assert (few < all_ / 2) is (family not in ("gemma", "mistral", "mamba"))


def test_labels_of_rows_of_unlike_lengths_are_scored_with_hardly_any_padding(monkeypatch):
    model = tiny("llama", max_position_embeddings=128)
    texts = ["it was a film " * 6, "it", "a film", "it was a film " * 6 + "so"]
    found, seen = [], Seen(model)
    for least in (3, 10**9):  # tokens that take as long as another pass
        monkeypatch.setitem(cache.PASS, "cpu", least)
        found.append((label_scores(model, PLAIN, LABEL, texts), seen.since()))
    (got, few), (wanted, padded) = found
    assert got == pytest.approx(wanted, abs=2e-5)
    assert few < 0.7 * padded


OBJECTIVES = {
    "cloze": Cloze(TOLD + "{text} <mask>", {"pos": ["good", "fine"], "neg": ["bad", "sad"]}),
    "choice": Choice(TOLD + "{text} <mask>", {"pos": "very good , very fine", "neg": "bad"}),
}
METHODS = {
    "base": None,
    "lora": LoRA(r=2),
    "prefix": Prefix(3),
    "ia3": IA3(),
    "routed by the first tokens": SpotTune((LoRA(r=2),), pool=4),
    "gated": Gate((LoRA(r=2),), pool=8),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_an_objective_says_the_same_of_every_row(objective, method, monkeypatch):
    model, given = tiny("llama", **FIELDS), ["good film", "it was", "very very bad film was it", "fine"] * 2
    if method:
        shaken(model, method, "a", 1)
    (got, few), (wanted, all_) = both(model, monkeypatch, lambda: predict(model, objective, given, tokenizer=WORDS))
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
        assert mine["label"] == theirs["label"]
    assert few < all_ / 2


LATE = {
    "a gate over more tokens than rows share": Gate((LoRA(r=2),), pool=60),
    "a policy that draws": SpotTune((LoRA(r=2),), pool=4, sample=True),
}


@pytest.mark.parametrize("method", LATE.values(), ids=LATE)
def test_what_decides_by_more_than_rows_share_sees_each_row_whole(method, monkeypatch):
    model = shaken(tiny("llama", **FIELDS), method, "a", 1)
    monkeypatch.setattr(cache, "SHARED", 20)
    assert cache.front(model, [tuple(range(3, 53)), (*range(3, 50), 1, 2)]) is None
    with disabled(model):
        assert cache.front(model, [tuple(range(3, 53)), (*range(3, 50), 1, 2)]).length == 47


def test_a_front_is_cut_into_batches_that_fit(monkeypatch):
    """One row of keys and values at a time, and many, say the same; no batch holds more than its room."""
    model, given = tiny("llama", **FIELDS), ["good", "bad film", "it was", "film"]
    ask = partial(predict, model, OBJECTIVES["cloze"], given, tokenizer=WORDS)
    monkeypatch.setattr(cache, "SHARED", 20)
    wanted, seen = ask(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(cache, "MOST_TOKENS", 60)
    got = ask()
    assert seen == [1] * 5  # the front, then each row alone
    assert [g["scores"] for g in got] == [pytest.approx(w["scores"], abs=1e-5) for w in wanted]


def test_rows_on_adapters_of_their_own_share_nothing(monkeypatch):
    model, given = tiny("llama", **FIELDS), ["good", "bad film"]
    for seed, name in enumerate("ab", 1):
        shaken(model, LoRA(r=2), name, seed)
    monkeypatch.setattr(cache, "SHARED", 20)
    with rows(model, ["a", "b"]):
        together = predict(model, OBJECTIVES["cloze"], given, tokenizer=WORDS)
    for i, name in enumerate("ab"):
        activate(model, name)
        alone = predict(model, OBJECTIVES["cloze"], given, tokenizer=WORDS)[i]
        assert together[i]["scores"] == pytest.approx(alone["scores"], abs=1e-5)


def test_a_model_that_keeps_nothing_has_no_front():
    """GPT-1 takes whatever it is called with, and leaves the cache empty."""
    model = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()
    assert cache.front(model, [tuple(range(3, 63)), tuple(range(3, 65))]) is None


def test_a_front_stays_as_it_was():
    """Going on from it, in one row or several, writes nothing into it."""
    model = tiny("llama", **FIELDS)
    ids = torch.arange(3, 63)[None]
    begun = cache.front(model, [tuple(range(3, 63)), tuple(range(3, 65))])
    assert begun.length == 59
    kept = [layer.keys.clone() for layer in begun.cache.layers]
    for count in (1, 3, 1):
        going = begun.of(count)
        with torch.no_grad():
            model(input_ids=ids[:, -1:].expand(count, 1), past_key_values=going, use_cache=True)
        assert going.get_seq_length() == 60
    assert all(torch.equal(layer.keys, before) for layer, before in zip(begun.cache.layers, kept, strict=True))
    assert replace(begun).cache.get_seq_length() == 59
