"""Bottleneck adapters: each place and form in float64, the presets' published counts, and where libraries depart."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from conformance import logits
from deltatune import Adapter, attach
from deltatune.core.attach import parameters, trainable
from deltatune.core.site import block_ends, block_of
from deltatune.core.slot import deltas
from deltatune.methods import build
from deltatune.methods._bottleneck import BeforeNorm, Bottleneck
from models import FAMILIES, inputs, tiny

ENDS = {
    "llama": "model.layers.1", "qwen": "model.layers.1", "mistral": "model.layers.1", "gemma": "model.layers.1",
    "phi3": "model.layers.1", "gpt2": "transformer.h.1", "neox": "gpt_neox.layers.1", "opt": "model.decoder.layers.1",
    "bert": "bert.encoder.layer.1.output.LayerNorm", "roberta": "roberta.encoder.layer.1.output.LayerNorm",
    "distilbert": "distilbert.transformer.layer.1.output_layer_norm",
    "electra": "electra.encoder.layer.1.output.LayerNorm", "modernbert": "model.layers.1",
    "t5": "decoder.block.1.layer.2", "bart": "model.decoder.layers.1.final_layer_norm",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_block_ends(family):
    """Changing the last block's end by a constant changes the trunk's output; nothing of the block runs after it."""
    model = tiny(family)
    assert block_ends(model)[-1].write == ENDS[family]
    order = []
    block = model.get_submodule(".".join(ENDS[family].split(".")[: 4 if "encoder" in ENDS[family] else 3]))
    for name, module in block.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: order.append(name))
    logits(model, inputs(model))
    end = next(name for name, m in block.named_modules() if m is model.get_submodule(ENDS[family]))
    after = [name for name in order[order.index(end) + 1 :] if name and "dropout" not in name]
    assert all(end.startswith(name) for name in after), after


def test_opt_has_both_kinds_of_block():
    assert block_ends(tiny("opt", do_layer_norm_before=False))[0].write == "model.decoder.layers.0.final_layer_norm"


def drawn(model: nn.Module) -> nn.Module:
    """float64, every parameter of the adapter drawn anew."""
    g = torch.Generator().manual_seed(0)
    for p in parameters(model.double(), "default").values():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model


def bottleneck(delta: Bottleneck, h: torch.Tensor) -> torch.Tensor:
    """W2 relu(W1 h + b1) + b2, from the delta's tensors."""
    z = (h @ delta.down.weight.T + delta.down.bias).clamp(min=0)
    return z @ delta.up.weight.T + delta.up.bias


def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    z = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + layer.eps)
    return z * layer.weight + layer.bias


def test_pfeiffer_adds_before_the_final_norm_of_a_post_norm_block():
    """h = LN(f + x); out = LN(f + x + A(h)): forward, and the gradient of both projections."""
    model = drawn(attach(tiny("bert"), Adapter(5, where=("block",), act="relu")))
    out = model.bert.encoder.layer[1].output
    (delta,) = out.LayerNorm.delta_slot.of("default")
    assert type(delta) is BeforeNorm
    g = torch.Generator().manual_seed(1)
    f, x, dy = (torch.randn(2, 5, n, generator=g, dtype=torch.float64) for n in (48, 32, 32))
    total = f @ out.dense.weight.T + out.dense.bias + x
    expected = norm(out.LayerNorm, total + bottleneck(delta, norm(out.LayerNorm, total)))
    found = out(f, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    ends = [delta.down.weight, delta.down.bias, delta.up.weight, delta.up.bias]
    for ours, theirs in zip(
        torch.autograd.grad((found * dy).sum(), ends), torch.autograd.grad((expected * dy).sum(), ends), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma", "t5"])
def test_pfeiffer_reads_the_residual_sum_of_a_pre_norm_block(family):
    """out = h + A(h), h the block's own output."""
    model = drawn(attach(tiny(family), Adapter(5, where=("block",), act="relu")))
    seen = {}
    for site in block_ends(model):
        layer = model.get_submodule(site.write)
        (delta,) = layer.delta_slot.of("default")
        assert type(delta) is Bottleneck
        layer.forward = keeping(layer.forward, seen, site.write)
        layer.register_forward_hook(lambda m, a, y, name=site.write: seen.__setitem__(f"{name} after", y))
    model(**{k: v for k, v in inputs(model).items() if k != "labels"})
    for site in block_ends(model):
        (delta,) = model.get_submodule(site.write).delta_slot.of("default")
        h = seen[site.write]
        torch.testing.assert_close(seen[f"{site.write} after"], h + bottleneck(delta, h), rtol=0, atol=1e-9)


def keeping(forward, seen, name):
    def kept(*args, **kwargs):
        seen[name] = forward(*args, **kwargs)
        return seen[name]

    return kept


# ---- where existing libraries depart (METHODS.md, section 4) ---------------------------------------------------------
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_deviation_8_the_scale_really_scales(form):
    """s = 4 is not s = 1: the added part is four times as large, and its gradient too."""
    added, grads = [], []
    for s in (1.0, 4.0):
        model = drawn(attach(tiny("llama"), Adapter(5, where=("ffn",), form=form, scale=s)))
        mlp = model.model.layers[0].mlp
        (delta,) = mlp.down_proj.delta_slot.of("default")
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = mlp(x)
        delta.scale = 0.0
        plain = mlp(x)
        delta.scale = s
        added.append((y - plain).detach())
        grads.append(torch.autograd.grad(mlp(x).sum(), delta.up.weight)[0])
    torch.testing.assert_close(added[1], 4 * added[0], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(grads[1], 4 * grads[0], rtol=1e-12, atol=1e-10)
    assert added[0].abs().max() > 0.1


def test_deviation_9_houlsby_starts_near_the_base_with_two_adapters_a_block():
    model = tiny("bert", hidden_size=64, intermediate_size=128)
    plain = logits(model, inputs(model))
    attach(model, build("houlsby"))
    assert [d.site.write.removeprefix("bert.encoder.layer.") for d in deltas(model) if isinstance(d, Bottleneck)] == [
        "0.attention.output.dense", "0.output.dense", "1.attention.output.dense", "1.output.dense",
    ]  # fmt: skip
    gap = (logits(model, inputs(model)) - plain).abs().max()
    assert 0 < gap < 1e-2 * plain.abs().max()


def test_deviation_10_houlsby_is_gelu_with_a_deviation_of_a_hundredth_cut_at_two():
    model = attach(tiny("bert", hidden_size=512, intermediate_size=512), build("houlsby"))
    delta = next(d for d in deltas(model) if isinstance(d, Bottleneck))
    assert delta.act is F.gelu
    assert delta.down.bias.abs().max() == delta.up.bias.abs().max() == 0
    for weight in (delta.down.weight, delta.up.weight):
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.01 * 0.8796, rel=0.02)  # of a normal cut at two deviations
    small = attach(tiny("bert", hidden_size=512, intermediate_size=512), Adapter(64, init="normal", init_std=1e-3))
    assert deltas(small)[0].up.weight.std().item() == pytest.approx(8.796e-4, rel=0.02)  # the repository's own value


# ---- scale, norms, skip ----------------------------------------------------------------------------------------------
def test_a_learned_scale_starts_at_one_and_trains():
    model = drawn(attach(tiny("llama"), Adapter(5, where=("ffn",), form="parallel", act="relu", scale="learned")))
    mlp = model.model.layers[0].mlp
    (delta,) = mlp.down_proj.delta_slot.of("default")
    assert deltas(attach(tiny("llama"), Adapter(5, scale="learned")))[0].scale.tolist() == [1.0]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mlp(x).sum(), delta.scale)
    torch.testing.assert_close(gradient, bottleneck(delta, x).sum()[None], rtol=1e-10, atol=1e-9)


def test_norms_train_beside_the_adapters():
    names = [k for k in trainable(attach(tiny("bert"), Adapter(4, norms=True))) if "LayerNorm" in k]
    assert len(names) == 10  # two a block and the embeddings', weight and bias each; not the head's
    assert not [k for k in names if k.startswith("cls")]


def test_the_down_projection_starts_uniform_within_one_over_the_root_of_its_inputs():
    """Kaiming's uniform with a = sqrt 5, torch's own start of a linear layer: gain^2 = 2 / (1 + 5), bound gain sqrt(3 /
    d)."""
    for delta in deltas(attach(tiny("bert"), Adapter(64))):
        assert 0.98 * 32**-0.5 < delta.down.weight.abs().max() <= 32**-0.5
        assert delta.down.weight.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.05)


ABOVE = {  # the norms that train when the lowest block of each stack is left out, layers of two blocks
    "bert": {"bert.encoder.layer.1.attention.output.LayerNorm", "bert.encoder.layer.1.output.LayerNorm"},
    "llama": {"model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"},
    "bart": {f"model.{s}.layers.1.{n}" for s, n in [
        ("encoder", "self_attn_layer_norm"), ("encoder", "final_layer_norm"), ("decoder", "self_attn_layer_norm"),
        ("decoder", "encoder_attn_layer_norm"), ("decoder", "final_layer_norm"),
    ]},
}  # fmt: skip


@pytest.mark.parametrize("family", ABOVE)
def test_skip_leaves_the_norms_of_lower_blocks_alone_so_that_no_gradient_goes_there(family):
    model = attach(tiny(family), Adapter(4, norms=True, skip=1))
    assert {d.site.write for d in deltas(model) if d.inplace} == ABOVE[family]
    lowest = next(m for n, m in model.named_modules() if block_of(f"{n}.") == n)
    seen = []
    lowest.register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    model(**inputs(model))
    assert not seen[0].requires_grad


@pytest.mark.parametrize("family", ["llama", "t5", "bart", "bert"])
def test_skip_leaves_out_the_lowest_blocks_of_each_stack(family):
    model = attach(tiny(family), Adapter(4, skip=1))
    blocks = {block_of(d.site.write) for d in deltas(model)}
    assert blocks == {b for b in map(block_of, dict(model.named_modules())) if b and b.endswith(".1")}
    with pytest.raises(ValueError, match=r"2 blocks left out, .* has 2: none is left"):
        attach(tiny(family), Adapter(4, skip=2))


def test_one_place_needs_no_tuple():
    assert Adapter(where="ffn") == Adapter(where=("ffn",)) == build({"adapter": {"where": "ffn"}})[0]


MISTAKES = [
    ({"bottleneck": 8, "reduction": 2}, "Adapter bottleneck 8 and reduction 2: give one"),
    ({"reduction": 0}, "Adapter reduction must be a whole number >= 1, got 0"),
    ({"init": "norml"}, "Adapter init 'norml': choose from zero, normal. Did you mean 'normal'"),
    ({"init_std": 0}, "Adapter init_std must be a finite number > 0, got 0"),
    ({"scale": "lerned"}, r"Adapter scale \(or 'learned'\) must be a finite number, got 'lerned'"),
    ({"skip": -1}, "Adapter skip must be a whole number >= 0, got -1"),
    ({"where": "fnn"}, "Adapter where 'fnn': choose from attention, ffn, block. Did you mean 'ffn'"),
    ({"norms": "no"}, "Adapter norms must be true or false, got 'no'"),
    ({"norms": 1}, "Adapter norms must be true or false, got 1"),
    ({"where": ("fnn",)}, "Adapter where 'fnn': choose from attention, ffn, block. Did you mean 'ffn'"),
    ({"where": ("block",), "form": "parallel"}, "a block's output has nothing beside it"),
]


@pytest.mark.parametrize(("fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(fields, said):
    with pytest.raises(ValueError, match=said):
        Adapter(**fields)


def test_a_reduction_above_the_width_leaves_no_bottleneck():
    with pytest.raises(ValueError, match=r"Adapter reduction 64 of width 32: the bottleneck must be .* got 0"):
        attach(tiny("llama"), Adapter(reduction=64))


# ---- published counts ------------------------------------------------------------------------------------------------
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
COUNTS = {
    "Houlsby 64, base": ({}, Adapter(64), 2_379_264),
    "Houlsby 64 with norms, base": ({}, build("houlsby")[0], 2_417_664),
    "Houlsby 8, large": (LARGE, Adapter(8), 835_968),
    "Houlsby 64, large": (LARGE, Adapter(64), 6_343_680),
    "Houlsby 256, large": (LARGE, Adapter(256), 25_227_264),
    "Pfeiffer 48 = H/16, base": ({}, build("pfeiffer")[0], 894_528),
    "Pfeiffer 64, base": ({}, Adapter(64, where=("block",), act="relu"), 1_189_632),
    "AdapterDrop 5 of 12": ({}, build("adapter-drop")[0], 894_528 * 7 // 12),
}


@pytest.mark.parametrize(("sizes", "method", "published"), COUNTS.values(), ids=COUNTS)
def test_published_counts(sizes, method, published):
    with torch.device("meta"):
        model = hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**sizes))
        found = list(method.deltas(model))
    counted = sum(p.numel() for site, d in found for p in d.trained(model.get_submodule(site.write)).values())
    assert counted == published
