"""The identity of a base: the same however it was loaded, another as soon as a sampled value differs."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from deltatune import LoRA, attach
from deltatune.core.fingerprint import SAMPLES, fingerprint, sample
from models import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_one_base_has_one_fingerprint(family):
    model = tiny(family)
    mark = fingerprint(model)
    assert len(mark) == 64
    assert fingerprint(tiny(family)) == mark
    assert fingerprint(tiny(family, dtype=torch.bfloat16)) == mark  # the same checkpoint, loaded in half the bytes
    assert fingerprint(attach(tiny(family), LoRA())) == mark  # slots are not the base
    assert fingerprint(tiny(family, seed=1)) != mark


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart"])
def test_every_tensor_counts(family):
    model = tiny(family)
    mark = fingerprint(model)
    trunk = [n for n, _ in model.base_model.named_parameters()]
    for name in trunk:
        parameter = model.base_model.get_parameter(name)
        with torch.no_grad():
            kept = parameter.view(-1)[-1].clone()  # the last value is among the sampled ones
            parameter.view(-1)[-1] += 1.0
            assert fingerprint(model) != mark, name
            parameter.view(-1)[-1] = kept
    assert fingerprint(model) == mark


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_do_not_count(family):
    """A classifier and a language model on the same trunk are the same base: adapters of one fit the other's trunk."""
    model = tiny(family)
    mark = fingerprint(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() + 1.0)  # untied, where it was tied
    assert fingerprint(model) == mark
    assert fingerprint(tiny(family, "trunk")) == fingerprint(tiny(family, "trunk", seed=0))


def test_architecture_counts():
    assert fingerprint(tiny("llama")) != fingerprint(tiny("llama", num_attention_heads=2, num_key_value_heads=2))


CHANGED = [
    ("llama", {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}),
    ("llama", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rms_norm_eps": 1e-5}),
    ("llama", {"hidden_act": "relu"}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None}),
    ("gemma", {"attn_logit_softcapping": 3.0}),
    ("gemma", {"final_logit_softcapping": None}),
    ("gemma", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma", {"query_pre_attn_scalar": 16}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("neox", {"use_parallel_residual": False}),
    ("bert", {"is_decoder": True}),
    ("bert", {"layer_norm_eps": 1e-5}),
    ("modernbert", {"local_attention": 8}),
    ("t5", {"relative_attention_max_distance": 32}),
    ("bart", {"scale_embedding": True}),
]


@pytest.mark.parametrize(("family", "fields"), CHANGED, ids=str)
def test_what_changes_the_function_counts(family, fields):
    """The same weights under another configuration are another base."""
    model, other = tiny(family), tiny(family, **fields)
    weights = dict(other.base_model.named_parameters())
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert fingerprint(model) != fingerprint(other)


SAME = [
    ("llama", {"attention_dropout": 0.1, "use_cache": False, "attn_implementation": "eager", "pad_token_id": 3}),
    ("gpt2", {"resid_pdrop": 0.1, "num_labels": 7, "problem_type": "regression", "summary_use_proj": False}),
    ("bert", {"classifier_dropout": 0.5, "output_hidden_states": True, "chunk_size_feed_forward": 2}),
    ("bart", {"decoder_layerdrop": 0.2, "forced_eos_token_id": 2, "return_dict": False}),
]


@pytest.mark.parametrize(("family", "fields"), SAME, ids=str)
def test_what_changes_from_load_to_load_does_not_count(family, fields):
    assert fingerprint(tiny(family, **fields)) == fingerprint(tiny(family))


@pytest.mark.parametrize("family", ["llama", "roberta", "bart", "gpt2"])
def test_every_way_to_load_a_checkpoint_agrees(tmp_path, family):
    model = tiny(family)
    mark = fingerprint(model)
    model.save_pretrained(tmp_path)
    auto = hf.AutoModelForSequenceClassification
    for again in (
        type(model).from_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager"),
        auto.from_pretrained(tmp_path, num_labels=5, problem_type="single_label_classification"),
    ):
        assert fingerprint(again) == mark, type(again)


def test_samples_are_spread_over_the_tensor():
    values = torch.arange(4000.0)
    picked = sample(values).view(torch.bfloat16).float()
    assert len(picked) == SAMPLES == 1024
    assert picked[0] == 0
    assert picked[-1] == 4000  # 3999 in bf16
    assert sample(torch.ones(3)).shape == (3,)
