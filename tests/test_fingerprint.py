"""The identity of a base: the same however it was loaded, another as soon as a sampled value differs."""

from __future__ import annotations

import pytest
import torch
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


def test_samples_are_spread_over_the_tensor():
    values = torch.arange(1000.0)
    picked = sample(values).view(torch.bfloat16).float()
    assert len(picked) == SAMPLES
    assert picked[0] == 0
    assert picked[-1] == 1000  # 999 in bf16
    assert sample(torch.ones(3)).shape == (3,)
