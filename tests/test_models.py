"""The tiny models are what the other tests take them for: literal sizes, lively outputs, the same every time."""

from __future__ import annotations

import pytest
import torch

from models import FAMILIES, inputs, tiny

# family: (parameters of the language model, class of the classifier)
SIZES = {
    "llama": (21728, "LlamaForSequenceClassification"),
    "qwen": (21760, "Qwen3ForSequenceClassification"),
    "mistral": (21728, "MistralForSequenceClassification"),
    "gemma": (18752, "Gemma2ForSequenceClassification"),
    "phi3": (21728, "Phi3ForSequenceClassification"),
    "gpt2": (22272, "GPT2ForSequenceClassification"),
    "neox": (21280, "GPTNeoXForSequenceClassification"),
    "opt": (22336, "OPTForSequenceClassification"),
    "bert": (23553, "BertForSequenceClassification"),
    "roberta": (23553, "RobertaForSequenceClassification"),
    "distilbert": (23489, "DistilBertForSequenceClassification"),
    "electra": (23553, "ElectraForSequenceClassification"),
    "modernbert": (21825, "ModernBertForSequenceClassification"),
    "t5": (40416, "T5ForSequenceClassification"),
    "bart": (50144, "BartForSequenceClassification"),
}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**kwargs).logits


def test_the_tables_name_the_same_families():
    assert list(SIZES) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family):
    model = tiny(family)
    assert sum(p.numel() for p in model.parameters()) == SIZES[family][0]
    assert type(tiny(family, "classify")).__name__ == SIZES[family][1]
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_shapes(family):
    seq = 9 if FAMILIES[family].kind == "seq2seq" else 7
    model = tiny(family)
    out = model(**inputs(model))
    assert out.logits.shape == (2, seq, 97)
    assert out.loss.isfinite()
    trunk = tiny(family, "trunk")
    assert trunk(**inputs(trunk))[0].shape == (2, seq, 32)
    classifier = tiny(family, "classify")
    assert classifier(**inputs(classifier)).logits.shape == (2, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_by_seed_without_touching_the_global_generator(family):
    before = torch.random.get_rng_state()
    first, again, other = tiny(family, seed=3), tiny(family, seed=3), tiny(family, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    batch = inputs(first)
    assert torch.equal(logits(first, **batch), logits(again, **batch))
    assert not torch.equal(logits(first, **batch), logits(other, **batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_and_every_parameter_matters(family):
    model = tiny(family)
    batch = inputs(model)
    base = logits(model, **batch)
    changed = batch["input_ids"].clone()
    changed[:, 0] = (changed[:, 0] + 1) % 90 + 5
    assert (logits(model, **batch | {"input_ids": changed})[:, -1] - base[:, -1]).abs().max() > 1e-3
    model(**batch).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("family", FAMILIES)
def test_flags_say_what_the_model_has(family):
    names = [n for n, _ in tiny(family, "trunk").named_parameters() if "norm" not in n.lower()]
    assert any(n.endswith("bias") for n in names) == FAMILIES[family].biased
    fused = ("qkv", "query_key_value", "c_attn", "Wqkv")
    assert any(f in n for n in names for f in fused) == FAMILIES[family].fused


def test_overrides_and_dtype():
    assert tiny("llama", num_hidden_layers=3).config.num_hidden_layers == 3
    assert tiny("llama", dtype=torch.float64).lm_head.weight.dtype == torch.float64
