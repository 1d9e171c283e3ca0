"""BitFit: the paper's terms, counts, drift, and the key bias that softmax cannot see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml

from conformance import logits
from deltatune import BitFit, attach, detach, load, save
from deltatune.core.attach import trainable
from deltatune.core.delta import Refusal
from deltatune.core.merging import merge
from deltatune.core.registry import build
from deltatune.core.slot import deltas
from models import inputs, tiny

BERT = {
    "query": {"attention.self.query"},
    "key": {"attention.self.key"},
    "value": {"attention.self.value"},
    "intermediate": {"intermediate.dense"},
    "output": {"attention.output.dense", "output.dense"},
    "attention_layernorm": {"attention.output.LayerNorm"},
    "output_layernorm": {"output.LayerNorm"},
}


@pytest.mark.parametrize("term", BERT)
def test_the_papers_terms_name_biases_of_bert(term):
    names = trainable(attach(tiny("bert"), BitFit((term,))))
    expected = {f"bert.encoder.layer.{i}.{layer}.bias" for i in (0, 1) for layer in BERT[term]}
    assert set(names) == expected


NORMS = {
    "distilbert": ({"sa_layer_norm"}, {"output_layer_norm"}),
    "opt": ({"self_attn_layer_norm"}, {"final_layer_norm"}),
    "gpt2": ({"ln_1"}, {"ln_2"}),
    "neox": ({"input_layernorm"}, {"post_attention_layernorm"}),
    "bart": ({"self_attn_layer_norm", "encoder_attn_layer_norm"}, {"final_layer_norm"}),
}


@pytest.mark.parametrize("family", NORMS)
def test_the_norms_of_other_families(family):
    for term, names in zip(("attention_layernorm", "output_layernorm"), NORMS[family], strict=True):
        found = trainable(attach(tiny(family), BitFit((term,))))
        assert {key.split(".")[-2] for key in found} == names


def test_all_is_every_bias_of_the_body():
    whole = set(trainable(attach(tiny("bert"), BitFit())))
    assert set(trainable(attach(tiny("bert"), BitFit(("all",))))) == whole
    assert "bert.embeddings.LayerNorm.bias" in whole


OUTSIDE = {  # and of a model without a pooler, a decoder, two stacks
    ("bert", "classify"): {"bert.embeddings.LayerNorm", "bert.pooler.dense"},
    ("bert", "lm"): {"bert.embeddings.LayerNorm"},
    ("gpt2", "lm"): {"transformer.ln_f"},
    ("bart", "lm"): {"model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding"},
}


@pytest.mark.parametrize("place", OUTSIDE, ids=str)
def test_what_stands_outside_the_blocks_can_be_named(place):
    """No head's: of a classifier's own bias BitFit knows nothing."""
    names = trainable(attach(tiny(*place), BitFit(("outside",))))
    assert set(names) == {f"{layer}.bias" for layer in OUTSIDE[place]}


ALL = (*BERT, "outside")


@pytest.mark.parametrize("left_out", ALL)
def test_all_terms_but_one_are_all_biases_but_those(left_out):
    named = set(trainable(attach(tiny("bert", "classify"), BitFit(tuple(term for term in ALL if term != left_out)))))
    whole = set(trainable(attach(tiny("bert", "classify"), BitFit())))
    assert whole - named == set(trainable(attach(tiny("bert", "classify"), BitFit((left_out,)))))
    assert named < whole


def test_the_ablation_that_is_measured_leaves_out_exactly_what_it_says():
    """On the shape of its base (6 blocks of 384, a head of two classes, which has 770): 384 and 1,536 a block."""
    entries = yaml.safe_load((Path(__file__).parents[1] / "benchmarks" / "recover.yaml").read_text())["methods"]
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    counts = {}
    for name in ("bitfit-without-query", "bitfit-without-intermediate"):
        with torch.device("meta"):
            model = hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**sizes))
            (method,) = build(entries[name]["method"])
            found = list(method.deltas(model))
        counts[name] = 770 + sum(model.get_submodule(site.write).bias.numel() for site, _ in found)
    assert counts == {"bitfit-without-query": 26_882 - 2_304, "bitfit-without-intermediate": 26_882 - 9_216}


def test_terms_roles_and_names_go_together():
    names = trainable(attach(tiny("bert"), BitFit(("query", "up", r".*layer\.0\.output\.LayerNorm"))))
    assert len(names) == 2 + 2 + 1
    with pytest.raises(ValueError, match=r"target .intermediat. .*Did you mean .intermediate."):
        attach(tiny("bert"), BitFit(("intermediat",)))


def test_a_fused_bias_is_trained_whole_or_not_at_all():
    with pytest.raises(Refusal, match=r"share one bias.*c_attn as k, q"):
        attach(tiny("gpt2"), BitFit(("query", "key")))
    names = trainable(attach(tiny("gpt2"), BitFit(("query", "key", "value"))))
    assert list(names) == [f"transformer.h.{i}.attn.c_attn.bias" for i in (0, 1)]


PUBLISHED = [
    ((), False, 102_912), ((), True, 272_384),
    (("query", "intermediate"), False, 46_080), (("query", "intermediate"), True, 122_880),
]  # fmt: skip


@pytest.mark.parametrize(("targets", "large", "count"), PUBLISHED)
def test_published_counts(targets, large, count):
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**(sizes if large else {})))
        found = list(BitFit(targets).deltas(model))
    assert sum(p.numel() for s, d in found for p in d.trained(model.get_submodule(s.write)).values()) == count


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-15), (torch.float32, 1e-7)])
def test_the_gradient_of_a_key_bias_is_zero_up_to_rounding(dtype, most):
    """softmax(q (k + b)^T) = softmax(q k^T + q b^T): every score of a query moves by the same q b^T."""
    model = attach(tiny("bert", dtype=dtype), BitFit())
    model(**inputs(model)).loss.backward()
    size = {k: p.grad.abs().max().item() for k, p in trainable(model).items() if p.grad is not None}
    keys = [v for k, v in size.items() if "self.key" in k]
    queries = [v for k, v in size.items() if "self.query" in k]
    assert len(keys) == len(queries) == 2
    assert max(keys) < most
    assert min(queries) > 1e-4


def test_the_bases_own_biases_are_trained_from_where_they_are():
    """Not a copy with random values, not two layers of a block: deviation 7."""
    model = tiny("bert")
    plain = logits(model, inputs(model))
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    attach(model, BitFit())
    assert torch.equal(logits(model, inputs(model)), plain)
    own = trainable(model)
    assert len(own) == sum(n.startswith("bert.") for n in before)
    assert all(p is model.get_parameter(n) for n, p in own.items())
    with torch.no_grad():
        for p in own.values():
            p.add_(0.1)
    plain = merge(model)
    assert all(torch.equal(plain.get_parameter(n), before[n] + 0.1) for n in own)
    detach(model, "default")
    assert all(torch.equal(model.get_parameter(n), t) for n, t in before.items())


def test_a_merged_half_precision_bias_is_unmerged_to_the_last_bit():
    """Deviation 13: not W + D - D."""
    model = tiny("bert", dtype=torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    attach(model, BitFit())
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape).to(p.dtype))
    key = "bert.embeddings.LayerNorm.bias"
    assert not torch.equal(merge(model).get_parameter(key), before[key])
    detach(model, "default")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_drift_by_kind():
    method = BitFit()
    model = attach(tiny("bert"), method)
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.add_(0.25 if "query" in name else -0.5 if "intermediate" in name else 0.0)
    expected = {"query": 0.25, "key": 0.0, "value": 0.0, "intermediate": 0.5, "output": 0.0}
    expected |= {"attention_layernorm": 0.0, "output_layernorm": 0.0, "outside": 0.0}
    assert method.report(model, deltas(model))["drift"] == pytest.approx(expected, abs=1e-6)


def test_missing_biases_are_made_only_where_asked(tmp_path):
    model = tiny("llama")
    plain = logits(model, inputs(model))
    with pytest.raises(Refusal, match=r"has none.*BitFit\(create=True\)"):
        attach(model, BitFit(("query", "intermediate")))
    method = BitFit(("query", "intermediate"), create=True)
    attach(model, method)
    assert torch.equal(logits(model, inputs(model)), plain)
    own = trainable(model)
    assert sum(p.numel() for p in own.values()) == 2 * (32 + 2 * 48)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        for p in own.values():
            p.fill_(0.5)
    x = torch.randn(2, 32)
    assert torch.equal(layer(x), x @ layer.weight.T + 0.5)
    assert method.report(model, deltas(model)) == {"drift": {"query": 0.5, "intermediate": 0.5}}
    other = tiny("llama")
    load(other, save(model, "default", tmp_path / "a"), "default")
    assert torch.equal(logits(other, inputs(other)), logits(model, inputs(model)))
    with pytest.raises(Refusal, match="cannot be merged"):
        merge(model)


def test_create_leaves_the_biases_there_are_in_place():
    model = attach(tiny("bert"), BitFit(create=True))
    assert set(trainable(model)) == set(trainable(attach(tiny("bert"), BitFit())))
