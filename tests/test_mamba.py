"""State-space models: no attention, layers whose weights are read without a call; what works there, works."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
import transformers as hf

import conformance
from deltatune import IA3, Adapter, LoRA, Prefix, Prompt, attach, detach, disabled, rows
from deltatune.core.delta import Refusal
from deltatune.core.registry import survey
from deltatune.core.site import block_linears, find
from deltatune.methods import build
from models import HIDDEN, RECURRENT, VOCAB, enliven, inputs, tiny

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


# ---- fused kernels ---------------------------------------------------------------------------------------------------
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_BAMBA = _HEADS | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
                   "mamba_chunk_size": 4}  # fmt: skip
# every family of transformers that trains through a kernel which reads its layers' weights
FUSING: dict[str, tuple[type, dict[str, Any]]] = {
    "mamba": (hf.MambaConfig, {"state_size": 4}),
    "falcon_mamba": (hf.FalconMambaConfig, {"state_size": 4}),
    "mamba2": (hf.Mamba2Config, {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "bamba": (hf.BambaConfig, _BAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": (hf.FalconH1Config, _BAMBA | {"mamba_d_ssm": 64}),
    "granitemoehybrid": (hf.GraniteMoeHybridConfig, _BAMBA | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48}),
    "nemotron_h": (hf.NemotronHConfig, _HEADS | {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 4,
        "layers_block_type": ["mamba", "attention"]}),
    "zamba2": (hf.Zamba2Config, _HEADS | {
        "mamba_d_state": 4, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 4, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4}),
}  # fmt: skip
ROWS, SEQ = 2, 7


class Kernel:
    """What `mamba_ssm` puts in place of a function of transformers': one output from all the weights, no layer called.

    It answers with something that the layers would not compute, so that it cannot be taken for them.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, projected: torch.Tensor, *weights: Any, **more: Any) -> torch.Tensor:
        self.calls += 1
        return projected.mean() + torch.ones(ROWS, SEQ, HIDDEN)


@pytest.fixture
def kernel(monkeypatch):
    """The fused kernels of every family, as if they were installed."""
    found = Kernel()
    for family in FUSING:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        name = "mamba_inner_fn" if hasattr(module, "mamba_inner_fn") else "mamba2_split_conv1d_scan_combined"
        monkeypatch.setattr(module, name, found)
    return found


def training(family: str) -> tuple[Any, torch.Tensor]:
    """A tiny model of `family` in training mode, and ids for it."""
    kind, sizes = FUSING[family]
    config = kind(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, pad_token_id=0, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        enliven(model)
    return model.train(), torch.randint(5, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))


def targets(model) -> tuple[str, ...]:
    return tuple(n for n in ("x_proj", "out_proj") if any(m.endswith(f".{n}") for m, _ in model.named_modules()))


@pytest.mark.parametrize("family", FUSING)
def test_no_kernel_runs_past_adapted_layers(family, kernel):
    """A kernel that reads `out_proj.weight` would train a LoRA there as if it were not there."""
    model, ids = training(family)
    mixers = [m for m in model.modules() if hasattr(m, "conv1d")]
    model(ids, use_cache=False)
    assert kernel.calls == len(mixers)  # what the model does by itself
    attach(model, LoRA(r=2, init="gaussian", targets=targets(model)), name="mine")
    conformance.stir(model, "mine", 1)
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    assert kernel.calls == len(mixers)
    tuned = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert tuned
    assert all(grad is not None and grad.abs().max() > 0 for grad in tuned.values())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("family", FUSING)
def test_the_kernel_runs_where_nothing_is_adapted(family, kernel):
    """disabled(model) is exactly the base, in_proj is called with a kernel too, and detach leaves no trace."""
    model, ids = training(family)
    mixers = [m for m in model.modules() if hasattr(m, "conv1d")]
    base = model(ids, use_cache=False).logits
    attach(model, LoRA(r=2, targets=("out_proj",)), name="mine")
    model(ids, use_cache=False)
    with disabled(model):
        assert torch.equal(model(ids, use_cache=False).logits, base)
    assert kernel.calls == 2 * len(mixers)
    model(ids, use_cache=False)
    detach(model, "mine")
    assert all(m.training for m in model.modules())
    attach(model, LoRA(r=2, targets=("in_proj",)), name="mine")
    model(ids, use_cache=False)
    assert kernel.calls == 3 * len(mixers)
    model.eval()(ids, use_cache=False)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_blocks_that_run_again_call_the_same_layers(family, kernel):
    """Gradient checkpointing recomputes outside of the trunk's forward pass."""
    grads = []
    for again in (False, True):
        model, ids = training(family)
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        attach(model, LoRA(r=2, init="gaussian", targets=("out_proj",)), name="mine")
        conformance.stir(model, "mine", 1)
        model(ids, use_cache=False).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert kernel.calls == 0
    torch.testing.assert_close(*grads)


def test_rows_with_and_without_an_adapter(kernel):
    model, ids = training("mamba")
    attach(model, LoRA(r=2, init="gaussian"), name="a")
    conformance.stir(model, "a", 1)
    with torch.no_grad(), rows(model, ["a", None]):
        mixed = model(ids, use_cache=False).logits
        torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, mixed)
    assert kernel.calls == 0
