"""State-space models: no attention, layers whose weights are read without a call; what works there, works."""

from __future__ import annotations

import re

import pytest
import torch

import conformance
from deltatune import IA3, Adapter, LoRA, Prefix, Prompt, attach, rows
from deltatune.core.delta import Refusal
from deltatune.core.registry import survey
from deltatune.core.site import block_linears, find
from deltatune.methods import build
from models import RECURRENT, inputs, tiny

FORMS = {
    "lora": [{"lora": {"r": 2}}],
    "in_proj": [{"lora": {"r": 2, "targets": ["in_proj"]}}],
    "dora": [{"dora": {"r": 2}}],
    "ia3": [{"ia3": {"outputs": ["down"]}}],
    "adapter": [{"adapter": {"bottleneck": 4, "where": ["ffn"]}}],
    "beside": [{"adapter": {"bottleneck": 4, "where": ["ffn"], "form": "parallel"}}],
    "pfeiffer": [{"adapter": {"bottleneck": 4, "where": ["block"]}}],
    "gate": [{"gate": {"of": [{"adapter": {"where": ["ffn"], "init": "normal", "init_std": 0.2}}], "pool": 3}}],
    "bitfit": [{"bitfit": {}}],
    "prompt": [{"prompt": {"length": 3}}],
}
NONLINEAR = ("adapter", "beside", "pfeiffer", "gate", "prompt")
# variant, family -> what peft refuses of it: out_proj, and soft prompts of models without attention heads
NO_PEFT = {(form, family): "refused" for form in ("lora", "prompt") for family in RECURRENT}
PROMISES = (
    conformance.identity_at_init,
    conformance.gradients_on_exactly_the_declared,
    conformance.base_untouched,
    conformance.disabled_is_the_base,
    conformance.save_then_load,
    conformance.detach_restores,
    conformance.merge_equals_attached,
    conformance.deepcopy_is_independent,
    conformance.peft_agrees,
)
# Mamba's products of frozen weights run in another kernel than of trainable ones: one ulp apart, adapter or none
ULP = 2e-6


# what the other forms have in peft is the suite's to show
CASES = [
    (f, p) for f in FORMS for p in PROMISES if p is not conformance.peft_agrees or f in ("lora", "in_proj", "prompt")
]


@pytest.mark.parametrize(("form", "promise"), CASES, ids=[f"{form}-{promise.__name__}" for form, promise in CASES])
@pytest.mark.parametrize("family", RECURRENT)
def test_what_it_takes_keeps_its_promises(family, form, promise, monkeypatch):
    monkeypatch.setitem(conformance.VARIANTS, form, FORMS[form])
    monkeypatch.setattr(conformance, "EXACT", ULP)
    monkeypatch.setitem(conformance.UNMERGEABLE, form, "") if form in NONLINEAR else None
    monkeypatch.setattr(conformance, "NO_PEFT_FORM", NO_PEFT)
    monkeypatch.setattr(conformance, "stored", lambda cell: cell.size)
    monkeypatch.setattr(conformance.Cell, "size", property(size), raising=False)
    promise(conformance.Cell(form, family))


def size(cell):
    """Counted from the deltas themselves: the suite's own counts know attention's layers."""
    return sum(t.numel() for t in conformance.state(cell.attached()).values())


@pytest.mark.parametrize("family", RECURRENT)
def test_its_projections_play_the_parts_of_a_gated_feed_forward_layer(family):
    model = tiny(family)
    for role, name in (("up", "in_proj"), ("down", "out_proj")):
        assert [s.write for s in find(model, role)] == [f"backbone.layers.{i}.mixer.{name}" for i in (0, 1)]
    assert len(find(model, "all")) == 4
    assert len(block_linears(model)) == (8 if family == "mamba" else 4)


@pytest.mark.parametrize("family", RECURRENT)
def test_every_refusal_recommends_what_works_there(family):
    model = tiny(family)
    said = {name: why for name, why in survey(model).items() if isinstance(why, Refusal)}
    assert {"adapter", "ia3", "prefix"} <= set(said)
    assert not {"lora", "dora", "prompt", "bitfit"} & set(said)
    for name in ("adapter", "ia3", "prefix"):
        for way in re.findall(r"(LoRA|Adapter|IA3|Prompt)(\(.*?\)\)|\(.*?\)|)", said[name].instead):
            attach(tiny(family), build(method(*way)))


def method(name, arguments):
    """'IA3', '(outputs=("down",))' -> the method object."""
    return eval(f"{name}{arguments or '()'}", {"LoRA": LoRA, "Adapter": Adapter, "IA3": IA3, "Prompt": Prompt})


def test_a_layer_that_is_never_called_is_refused_with_the_reason():
    with pytest.raises(Refusal, match=r"never called.*mixer\.dt_proj.*in_proj"):
        attach(tiny("mamba"), LoRA(r=2, targets=("dt_proj",)))
    with pytest.raises(Refusal, match="no attention"):
        attach(tiny("mamba"), Prefix(3))


def test_rows_cannot_have_biases_of_their_own_where_the_model_reads_them():
    model = tiny("mamba")
    attach(model, build({"bitfit": {}}), name="mine")
    with pytest.raises(Refusal, match="rows"), rows(model, ["mine", None]):
        pass


@pytest.mark.parametrize("family", RECURRENT)
def test_rows_of_one_batch(family):
    model = tiny(family)
    attach(model, LoRA(r=2, init="gaussian"), name="a")
    conformance.stir(model, "a", 1)
    given = inputs(model)
    with torch.no_grad():
        changed = model(**given).logits
        with rows(model, ["a", None]):
            mixed = model(**given).logits
    torch.testing.assert_close(mixed[0], changed[0])
    assert (mixed[1] - changed[1]).abs().max() > 1e-3
