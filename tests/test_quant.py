"""4-bit bases: NF4's levels and its 4.127 bits, the re-packing trap, every additive method, merging and its cost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance import stir
from deltatune import IA3, DoRA, LoRA
from deltatune.core import quant
from deltatune.core.attach import attach, attached, detach, disabled, parameters, trainable
from deltatune.core.cost import cost
from deltatune.core.delta import SLOT, Refusal
from deltatune.core.fingerprint import fingerprint, rescaled
from deltatune.core.fuse import fuse
from deltatune.core.merging import merge
from deltatune.core.store import load, save, state, virtual_ids
from deltatune.methods import build
from models import inputs
from packed import layers, needs_packing, nf4, plain, weights

pytestmark = needs_packing
FAMILIES = ("llama", "opt")
# the 16 levels of the paper's appendix E
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
METHODS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "lora": [{"lora": {"r": 4}}],
    "ia3": [{"ia3": {}}],
    "adapter": [{"adapter": {"bottleneck": 4}}],
    "parallel": [{"adapter": {"bottleneck": 4, "form": "parallel", "where": ["ffn"]}}],
    "prefix": [{"prefix": {"length": 3}}],
    "prompt": [{"prompt": {"length": 3}}],
    "bitfit": [{"bitfit": {}}],
    "norm-tuning": [{"freeze": {"names": [r".*[nN]orm.*"]}}],
    "mam": [{"prefix": {"length": 3}}, {"adapter": {"bottleneck": 4, "form": "parallel", "where": ["ffn"]}}],
}
CELLS = [(name, family) for name in METHODS for family in FAMILIES if (name, family) != ("bitfit", "llama")]


def packed_layer(d_in: int = 128, d_out: int = 96, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """A 4-bit layer, and the dense weight it was made from."""
    made = quant.library().nn.LinearNF4(d_in, d_out, compute_dtype=dtype)
    original = 0.1 * torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    made.weight.data = original.clone()
    return made.to("cpu"), original


def batch(model: Any, name: str | None = "default") -> dict[str, Tensor]:
    """inputs() with the adapter's virtual ids in front."""
    given = inputs(model)
    front = virtual_ids(model, name) if name else ()
    if front:
        ids = torch.tensor(front).expand(len(given["input_ids"]), -1)
        given = {
            "input_ids": torch.cat([ids, given["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(ids), given["attention_mask"]], 1),
            "labels": torch.cat([torch.full_like(ids, -100), given["labels"]], 1),
        }
    return given


def logits(model: Any, name: str | None = "default") -> Tensor:
    return model(**batch(model, name)).logits


# ---- one layer -------------------------------------------------------------------------------------------------------
def test_a_layer_is_read_as_nf4_says():
    """W = scale * level[code], recomputed from the packed bytes; the scale itself costs at most its 8 bits."""
    layer, original = packed_layer()
    codes = layer.weight.data.flatten()
    codes = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
    blocks, dense = torch.tensor(LEVELS)[codes].view(-1, 64), quant.weight(layer)
    assert dense.dtype == torch.float32
    assert dense.shape == (96, 128)
    scales = dense.view(-1, 64).abs().amax(1, keepdim=True)
    torch.testing.assert_close(dense.view(-1, 64), blocks * scales, rtol=1e-6, atol=0)
    exact = original.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((scales - exact).abs() / exact).max() < 0.03
    nearest = (original.view(-1, 64, 1) / exact[..., None] - torch.tensor(LEVELS)).abs().argmin(-1)
    assert (nearest.flatten() == codes).float().mean() > 0.999


def test_reading_does_not_round_to_the_compute_type():
    layer, original = packed_layer(dtype=torch.bfloat16)
    layer.weight.quant_state.dtype = torch.bfloat16
    dense = quant.weight(layer)
    assert not torch.equal(dense, dense.bfloat16().float())
    assert layer.weight.quant_state.dtype == torch.bfloat16
    assert (dense - original).norm() / original.norm() < 0.12


def test_bits_per_weight_are_the_papers():
    """4 + 8 / 64 + 32 / (64 * 256) = 4.127."""
    layer, _ = packed_layer(1024, 1024)
    assert quant.bits(layer) == pytest.approx(4.127, abs=5e-4)
    assert quant.size(layer.weight) == 1024 * 1024
    assert layer.weight.numel() == 1024 * 512


def test_writing_packs_anew():
    layer, _ = packed_layer()
    bytes_before, other = layer.weight.data.clone(), torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    quant.write(layer, "weight", other)
    assert not torch.equal(layer.weight.data, bytes_before)
    fresh = quant.library().nn.LinearNF4(128, 96, compute_dtype=torch.float32)
    fresh.weight.data = other.clone()
    assert torch.equal(quant.weight(layer), quant.weight(fresh.to("cpu")))
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), F.linear(x, quant.weight(layer), layer.bias), rtol=1e-5, atol=1e-5)


def test_writing_some_outputs_leaves_the_others_near():
    layer, _ = packed_layer()
    before = quant.weight(layer)
    quant.write(layer, "weight", torch.zeros(32, 128), ((32, 64),))
    after = quant.weight(layer)
    assert after[32:64].abs().max() < 0.01 * before.abs().max()
    assert (after[:32] - before[:32]).norm() / before[:32].norm() < 0.02


def test_a_packing_that_is_not_read_is_refused():
    layer = nn.Linear(4, 4)
    layer.weight.SCB = torch.ones(4)  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match="packed in a way that is not read here"):
        quant.weight(layer)


# ---- the re-packing trap ---------------------------------------------------------------------------------------------
def seed_fault(model: nn.Module) -> None:
    """What bitsandbytes sees on a CPU with AVX-512-bf16."""
    for layer in layers(model):
        assert hasattr(layer, quant.REPACKS), "bitsandbytes renamed its switch: the guard guards nothing"
        setattr(layer, quant.REPACKS, True)


def repack(layer: Any) -> None:
    """What its forward pass does there."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def run_once(layer: Any) -> None:
    """One forward pass in eval mode; the kernel for the other packing may be missing here, the re-packing is not."""
    try:
        with torch.no_grad():
            layer.eval()(torch.ones(1, layer.in_features))
    except (NotImplementedError, RuntimeError, AttributeError):
        assert layer.weight.quant_state.packing_format_for_cpu


def test_the_fault_is_real_and_is_prevented():
    loose, kept = packed_layer()[0], packed_layer()[0]
    before = kept.weight.data.clone(), quant.weight(kept)
    seed_fault(loose)
    seed_fault(kept)
    quant.steady(kept)
    run_once(loose)
    run_once(kept)
    assert getattr(loose.weight.quant_state, "packing_format_for_cpu", False)  # without the guard it happens
    assert not getattr(kept.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(kept.weight.data, before[0])
    assert torch.equal(quant.weight(kept), before[1])


def test_attaching_is_enough_to_be_safe():
    """A model that came from elsewhere, never seen by `steady`."""
    model = nf4("llama")
    seed_fault(model)
    attach(model, LoRA(r=2))
    before = weights(model)
    with torch.no_grad():
        logits(model.eval())
        logits(merge(model).eval(), None)
    assert not any(getattr(layer, quant.REPACKS) for layer in layers(model))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_repacked_weight_is_never_read_or_trained_through():
    model = nf4("llama")
    repack(layers(model)[0])
    for act in (lambda: quant.weight(layers(model)[0]), lambda: attach(model, LoRA(r=2)), lambda: quant.steady(model)):
        with pytest.raises(Refusal, match="re-packed this 4-bit weight") as caught:
            act()
        assert "quant.steady(model)" in caught.value.instead
    assert attached(model) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_train_evaluate_dora_merge(family: str):
    """The whole story on an AVX-512-bf16 machine: gradients in every block, every packed weight bitwise as it was."""
    model = nf4(family)
    seed_fault(model)
    quant.steady(model)  # what open_model and attach do
    before, codes = weights(model), [layer.weight.data.clone() for layer in layers(model)]
    with torch.no_grad():
        base = logits(model, None)
    attach(model, DoRA(r=4))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-4)
    tuned = trainable(model)
    optimizer, losses = torch.optim.AdamW(tuned.values(), lr=3e-3), []
    for _ in range(8):
        loss = model.train()(**batch(model)).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in tuned.values())
        for block in (".0.", ".1."):
            assert any(p.grad.abs().sum() > 0 for key, p in tuned.items() if block in key)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        after = logits(model.eval())
    assert (after - base).abs().max() > 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert all(torch.equal(a, layer.weight.data) for a, layer in zip(codes, layers(model), strict=True))
    merged, dense = merge(model), merge(model, base=unpacked(model, family))
    assert len(layers(merged)) == len(layers(model))
    with torch.no_grad():  # nothing rounded: the same function; into NF4: each weight is off by its rounding alone
        torch.testing.assert_close(logits(dense, None), after, rtol=1e-3, atol=1e-3)
    for name, layer in merged.named_modules():
        if quant.is_quantised(layer):
            exact = dense.get_submodule(name).weight
            assert 0 < (quant.weight(layer) - exact).norm() < 0.12 * exact.norm(), name
    with disabled(model), torch.no_grad():
        assert torch.equal(logits(model, None), base)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


# ---- every additive method -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "family"), CELLS)
def test_a_method_over_nf4(name: str, family: str, tmp_path: Path):
    """Forward, gradients exactly where declared, base bitwise when off, save and load bitwise, detach restores."""
    model = nf4(family)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    requires = {key: p.requires_grad for key, p in model.named_parameters()}
    with torch.no_grad():
        base = logits(model, None)
    torch.manual_seed(0)
    attach(model, build(METHODS[name]))
    stir(model, "default", 0)
    loss = model(**batch(model)).loss
    loss.backward()
    declared = {id(p) for p in parameters(model, "default").values()}
    for key, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in declared), key
    assert all(torch.isfinite(p.grad).all() for p in parameters(model, "default").values())
    for block in ("layers.0.", "layers.1."):
        mine = [p for key, p in parameters(model, "default").items() if block in key]
        assert not mine or any(p.grad.abs().sum() > 0 for p in mine)
    with torch.no_grad():
        live = logits(model)
        with disabled(model):
            assert torch.equal(logits(model, None), base)
    save(model, "default", tmp_path / "a")
    assert json.loads((tmp_path / "a/deltatune.json").read_text())["base"]["quant"] == "nf4"
    again = nf4(family)
    load(again, tmp_path / "a", "default")
    assert all(torch.equal(t, state(again)[key]) for key, t in state(model).items())
    with torch.no_grad():
        assert torch.equal(logits(again), live)
    assert (live[:, -3:] - base[:, -3:]).abs().max() > 1e-3
    detach(model, "default")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, after[key]) for key, t in before.items())
    assert {key: p.requires_grad for key, p in model.named_parameters()} == requires
    assert not [n for n, _ in model.named_modules() if SLOT in n.split(".")]
    with torch.no_grad():
        assert torch.equal(logits(model, None), base)


@pytest.mark.parametrize("method", ["full", {"freeze": {"last": 1}}])
def test_packed_weights_are_not_trained_in_place(method: Any):
    model = nf4("llama")
    with pytest.raises(Refusal, match="packed 4-bit weight cannot be trained in place"):
        attach(model, build(method))
    assert attached(model) == ()


def test_gradients_are_those_of_the_dequantised_model():
    """The same adapter over dense copies of the packed weights: same loss, same gradients up to rounding."""
    model = nf4("opt")
    dense = unpacked(model, "opt")
    found = []
    for one in (model, dense):
        torch.manual_seed(0)
        attach(one, [LoRA(r=4), *build("bitfit")])
        stir(one, "default", 0)
        one(**batch(one)).loss.backward()
        found.append(parameters(one, "default"))
    assert found[0].keys() == found[1].keys()
    for key, p in found[0].items():
        torch.testing.assert_close(p.grad, found[1][key].grad, rtol=1e-3, atol=1e-5, msg=key)


# ---- identity --------------------------------------------------------------------------------------------------------
def test_fingerprints_of_packed_bases():
    model, other = nf4("llama"), nf4("llama")
    assert fingerprint(model) == fingerprint(other)
    assert fingerprint(model) != fingerprint(plain("llama"))
    layer = layers(other)[3]
    quant.set_weight(layer, quant.weight(layer) + 0.02 * torch.randn(quant.weight(layer).shape))
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize("fault", ["one code", "all blocks", "none"])
def test_another_scale_is_noticed(fault: str, tmp_path: Path):
    """The same codes under other scales are other weights: of one block, or of a whole layer."""
    model, other = nf4("llama"), nf4("llama")
    attach(model, LoRA(r=2))
    save(model, "default", tmp_path / "a")
    held = layers(other)[3].weight.quant_state
    before = quant.scales(layers(other)[3])
    if fault == "one code":
        held.absmax[5] += 100 if held.absmax[5] < 128 else -100
        assert (quant.scales(layers(other)[3]) != before).sum() == 1
    elif fault == "all blocks":
        held.offset *= 1.05
    assert fingerprint(other) == fingerprint(nf4("llama"))  # the codes are the same
    if fault == "none":
        assert load(other, tmp_path / "a") == "a"
        return
    name = next(n for n, m in other.model.named_modules() if m is layers(other)[3])
    with pytest.raises(ValueError, match=f"another base: the 4-bit codes.*scales of 1 layers.*{name}"):
        load(other, tmp_path / "a")
    assert attached(other) == ()
    assert load(other, tmp_path / "a", verify=False) == "a"


def test_scales_are_what_the_codes_are_multiplied_by():
    layer, _ = packed_layer()
    found = quant.scales(layer)
    torch.testing.assert_close(found, quant.weight(layer).view(-1, 64).abs().amax(1), rtol=1e-6, atol=0)
    assert rescaled({"a": [1.0, 2.0]}, {"a": [1.001, 2.0]}) == []  # the rounding of another machine
    assert rescaled({"a": [1.0, 2.0], "b": [1.0]}, {"a": [1.0, 2.02]}) == ["a", "b"]


@pytest.mark.parametrize("trained", ["packed", "plain"])
def test_another_packing_is_rejected_with_the_way_out(trained: str, tmp_path: Path):
    first, second = nf4("llama"), copy.deepcopy(plain("llama"))
    if trained == "plain":
        first, second = second, first
    attach(first, LoRA(r=2))
    save(first, "default", tmp_path / "a")
    words = ["packed as nf4", "in plain bf16 or fp32"]
    words = words if trained == "packed" else words[::-1]
    with pytest.raises(ValueError, match=f"trained on a base {words[0]}, this one is {words[1]}.*model.quant.*--base"):
        load(second, tmp_path / "a")
    assert attached(second) == ()
    assert load(second, tmp_path / "a", verify=False) == "a"


# ---- merging ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def tuned() -> Any:
    model = nf4("llama")
    torch.manual_seed(0)
    attach(model, [LoRA(r=4), IA3()])
    for key, p in parameters(model, "default").items():
        p.data.add_((0.1 if "lora" in key else 0.05) * torch.randn_like(p))
    return model.eval()


def test_merging_rounds_each_weight_once(tuned: Any):
    """A union of two on one layer: the merged weight is the 4-bit rounding of the exact result, not of a rounding."""
    name = "model.layers.0.self_attn.v_proj"
    layer = tuned.get_submodule(name)
    low, scale = layer.delta_slot.of("default")
    exact = scale.ia3_l[:, None] * (quant.weight(layer) + low.scale * low.lora_B @ low.lora_A)
    expected = packed_layer(64, 32)[0]
    quant.set_weight(expected, exact.detach())
    assert torch.equal(quant.weight(merge(tuned).get_submodule(name)), quant.weight(expected))


def test_merging_says_what_it_costs(tuned: Any):
    given = [{key: t for key, t in inputs(tuned, seed=s).items() if key != "labels"} for s in range(3)]
    paid = cost(tuned, merge(tuned).eval(), given)
    with torch.no_grad():
        ours, theirs = (torch.cat([m(**g).logits for g in given]).double() for m in (tuned, merge(tuned).eval()))
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    ids = torch.cat([g["input_ids"] for g in given])
    nll = -p[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert paid.tokens == 3 * 2 * 7
    assert paid.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert paid.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
    assert paid.merged_perplexity != paid.perplexity
    assert paid.kl > 1e-4  # 4 bits are coarse
    assert "perplexity" in str(paid)
    assert cost(tuned, tuned, given).kl == 0.0


def test_merging_onto_the_full_precision_base(tuned: Any):
    """W16 + change, exactly: the same change that was learned over the 4-bit weights, nothing rounded to 4 bits."""
    base = copy.deepcopy(plain("llama"))
    whole = merge(tuned, base=base)
    assert layers(whole) == []
    assert type(whole.model.layers[0].mlp.up_proj) is nn.Linear
    (low,) = tuned.model.layers[0].mlp.up_proj.delta_slot.of("default")
    original = base.model.layers[0].mlp.up_proj.weight
    expected = original + low.scale * low.lora_B @ low.lora_A
    torch.testing.assert_close(whole.model.layers[0].mlp.up_proj.weight, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(original, plain("llama").model.layers[0].mlp.up_proj.weight)
    assert attached(base) == ()


def unpacked(model: Any, family: str) -> Any:
    """A dense model of exactly the packed weights."""
    base = copy.deepcopy(plain(family))
    for name, layer in model.named_modules():
        if quant.is_quantised(layer):
            base.get_submodule(name).weight.data.copy_(quant.weight(layer))
    return base


def test_merging_onto_a_dense_copy_of_the_packed_weights_is_exact(tuned: Any):
    base = unpacked(tuned, "llama")
    given = [{"input_ids": inputs(tuned)["input_ids"]}]
    assert cost(tuned, merge(tuned, base=base).eval(), given).kl < 1e-9


def test_fusing_has_no_exact_way_back_over_nf4(tuned: Any):
    before = weights(tuned)
    with pytest.raises(Refusal, match="no exact way back"):
        fuse(tuned, "default")
    assert all(torch.equal(a, b) for a, b in zip(before, weights(tuned), strict=True))


def test_merging_onto_a_stranger_is_refused(tuned: Any):
    from models import tiny
    from packed import SIZES

    with pytest.raises(ValueError, match=r"another model: \d+ tensors differ, such as"):
        merge(tuned, base=tiny("llama", seed=1, **SIZES["llama"]))
    near = copy.deepcopy(plain("llama"))  # the same embeddings and norms: somebody's LoRA was merged into it
    with torch.no_grad():
        up = near.model.layers[1].mlp.up_proj.weight
        up += 0.3 * up.std() * torch.randn_like(up)
    with pytest.raises(ValueError, match=r"another model: 1 tensors differ, such as layers.1.mlp.up_proj.weight"):
        merge(tuned, base=near)
    taken = attach(copy.deepcopy(plain("llama")), LoRA(r=2), "other")
    with pytest.raises(ValueError, match="has adapters attached: other"):
        merge(tuned, base=taken)
    with pytest.raises(ValueError, match="no text"):
        cost(tuned, tuned, [])
