"""UniPELT's gates: their equation in float64, prefixes, padding, causality; a hybrid is configuration."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import tiny_run as t
import tiny_tokenizers as tt
from conformance import logits
from deltatune import IA3, Adapter, BitFit, LoRA, Prefix, Prompt, attach
from deltatune.core.attach import packing, parameters
from deltatune.core.attention import packed, positions
from deltatune.core.delta import Refusal
from deltatune.core.registry import bound, spec
from deltatune.core.slot import deltas
from deltatune.methods import METHODS, build
from models import inputs, tiny

Gate = METHODS["gate"].cls
LAYER = "bert.encoder.layer.0.output.dense"


def stirred(family: str, *of, **fields):
    model = attach(tiny(family), Gate(of=of, **fields)).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters(model, "default").values():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def x_of(width: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_a_gate_multiplies_the_change(per):
    model = stirred("bert", LoRA(r=3, alpha=6, targets=(LAYER,)), per=per)
    layer, x = model.get_submodule(LAYER), x_of(48)
    (delta,) = (d for d in deltas(model) if hasattr(d, "gate"))
    g = 1 / (1 + torch.exp(-(x @ delta.gate.weight.T + delta.gate.bias)))
    g = g if per == "token" else g.mean(1, keepdim=True)
    low = 2.0 * x @ delta.inner.lora_A.T @ delta.inner.lora_B.T
    expected = x @ layer.weight.T + layer.bias + g * low
    ours = layer(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    chosen = list(delta.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(ours.sin().sum(), chosen), torch.autograd.grad(expected.sin().sum(), chosen), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
        assert mine.abs().max() > 1e-6


def test_a_gate_behind_the_feed_forward_layer_reads_its_output():
    """Section 3.2 of the paper: G_A is estimated from the adapter's direct input, which has the width of a token."""
    model = stirred("bert", Adapter(4, where=("ffn",), init="normal", init_std=0.3))
    layer, x = model.get_submodule(LAYER), x_of(48)
    (delta,) = (d for d in deltas(model) if hasattr(d, "gate") and d.site.write == LAYER)
    assert delta.gate.weight.shape == (1, 32)
    h = x @ layer.weight.T + layer.bias
    g = torch.sigmoid(delta.gate(h)).mean(1, keepdim=True)
    expected = h + g * delta.inner.up(torch.nn.functional.gelu(delta.inner.down(h)))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)
    assert delta.inner.up.weight.abs().max() > 0.1
    assert g.std() > 1e-3


def test_other_changes_are_gated_by_the_layers_input():
    widths = {"lora": (LoRA(2, targets=(LAYER,)), 48), "parallel": (Adapter(4, where=("ffn",), form="parallel"), 32),
              "block": (Adapter(4, where=("block",)), 32), "ia3": (IA3(outputs=(LAYER,), inputs=()), 48)}  # fmt: skip
    for method, width in widths.values():
        model = attach(tiny("bert"), Gate(of=(method,)))
        assert {d.gate.in_features for d in deltas(model) if hasattr(d, "gate")} == {width}
        logits(model, inputs(model))


def test_unipelt_on_bert_base_has_the_gates_of_the_paper():
    """Per layer: LoRA at query and value, the prefix and the adapter, each with a gate over 768 inputs and a bias."""
    with torch.device("meta"):
        found = [d for _, d in build("unipelt")[0].deltas(hf.AutoModel.from_config(hf.BertConfig()))]
    gates = [d.gate for d in found if hasattr(d, "gate")]
    assert len(gates) == 12 * 4
    assert {tuple(g.weight.shape) for g in gates} == {(1, 768)}


def test_a_gated_input_change():
    model = stirred("bert", IA3(outputs=(), inputs=(LAYER,)), per="token")
    layer, x = model.get_submodule(LAYER), x_of(48)
    (delta,) = (d for d in deltas(model) if hasattr(d, "gate"))
    g = torch.sigmoid(delta.gate(x))
    expected = (x + g * (x * delta.inner.ia3_l - x)) @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("where", ["ffn", "block"])
def test_an_adapters_gate_reads_what_the_adapter_reads(family, where):
    """h + g f(h), g from h too, not from what its layer reads; in front of a block's last norm, inside that norm."""
    model = stirred(family, Adapter(4, where=(where,)))
    delta = next(d for d in deltas(model) if hasattr(d, "gate"))
    assert delta.gate.weight.shape == (1, 32)
    layer, seen = model.get_submodule(delta.site.write), {}
    layer.forward = keeping(layer.forward, seen)
    layer.register_forward_hook(lambda m, args, y: seen.update(last=y))
    model(**{k: v for k, v in inputs(model).items() if k != "labels"})
    (x, h), *_ = seen["calls"]
    g = torch.sigmoid(delta.gate(h)).mean(1, keepdim=True)
    change = g * delta.inner.change(h, h)
    normed = family == "bert" and where == "block"
    expected = layer.forward(x + change) if normed else h + change
    torch.testing.assert_close(seen["last"], expected, rtol=0, atol=1e-9)
    assert (seen["last"] - h).abs().max() > 1e-2


def keeping(forward, seen):
    def kept(x, *args, **kwargs):
        out = forward(x, *args, **kwargs)
        seen.setdefault("calls", []).append((x, out))
        return out

    return kept


def test_a_gated_prefix_has_scaled_keys_and_values():
    model = stirred("bert", Prefix(3))
    attention, x = model.bert.encoder.layer[0].attention.self, x_of(32)
    (delta,) = attention.delta_slot.of("default")
    g = torch.sigmoid(delta.gate(x)).mean(1).view(2, 1, 1, 1)
    q, k, v = (m(x).view(2, 5, 4, 8).transpose(1, 2) for m in (attention.query, attention.key, attention.value))
    k, v = torch.cat([g * delta.inner.k, k], 2), torch.cat([g * delta.inner.v, v], 2)
    expected = (torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1) @ v).transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(attention(x)[0], expected, rtol=0, atol=1e-9)


def test_padding_moves_no_gate():
    model = stirred("bert", LoRA(r=2), Prefix(2))
    given = {k: v for k, v in inputs(model).items() if k != "labels"}
    live = logits(model, given)
    padded = {
        "input_ids": torch.nn.functional.pad(given["input_ids"], (0, 4), value=9),
        "attention_mask": torch.nn.functional.pad(given["attention_mask"], (0, 4)),
    }
    torch.testing.assert_close(logits(model, padded)[:, :7], live, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_no_gate_reads_what_is_predicted(family):
    model = stirred(family, LoRA(r=2), Prefix(2), pool=3)
    given = inputs(model)
    live = logits(model, given)
    key = "decoder_input_ids" if family == "t5" else "input_ids"
    given[key][:, 5:] = 11
    torch.testing.assert_close(logits(model, given)[:, :5], live[:, :5], rtol=0, atol=1e-10)


def test_unipelt_is_configuration():
    (method,) = build("unipelt")
    assert [type(m) for m in method.of] == [LoRA, Prefix, Adapter]
    assert method.of[0].alpha == method.of[0].r  # the gate stands in place of alpha / r
    model = attach(tiny("bert"), method)
    assert sum("gate.weight" in k for k in parameters(model, "default")) == 4 + 2 + 2


def test_what_cannot_be_gated_is_refused():
    for method, said in ((BitFit(), "InPlace"), (Prompt(2), "Rows")):
        with pytest.raises(Refusal, match=said):
            attach(tiny("bert"), Gate(of=(method,)))
    with pytest.raises(ValueError, match="Gate per 'layer': choose from sequence, token"):
        Gate(per="layer")
    with pytest.raises(ValueError, match=r"Gate of: \[\] gates nothing"):
        Gate(of=())


@pytest.mark.parametrize("outer", ["gate", "spottune", "spottune over gate"])
def test_words_of_what_is_inside_become_ids(outer):
    """What a method holds is bound with it, however deep."""
    tokenizer = tt.bert_like(t.WORDS)
    method = Prefix(2, init="words", words="good film")
    for name in reversed(outer.split(" over ")):
        method = METHODS[name].cls(of=(method, LoRA(r=2)))
    model = tiny("bert", vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="not token ids yet"):
        attach(model, method)
    found = [bound(m, tokenizer) for m in (method, Prompt(3, init="text", text="it was"))]
    attach(model, found)
    inside = found[0]
    while not isinstance(inside, Prefix):
        inside = inside.of[0]
    assert inside.ids == tuple(tokenizer("good film", add_special_tokens=False)["input_ids"])
    assert len(found[1].ids) == 2
    assert build(spec(found)) == tuple(found)  # what the manifest keeps


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_every_packed_sequence_has_a_gate_of_its_own(family):
    """OPT's feed-forward layers see tokens without their rows."""
    model = stirred(family, Adapter(4), LoRA(2, targets=("up",)), pool=3)
    ids = inputs(model, rows=2)["input_ids"]
    sequences = [ids[0], ids[1, :5]]
    with torch.no_grad():
        alone = [model(input_ids=own[None]).logits[0] for own in sequences]
        packing(model)
        with packed((7, 5)):
            row = {"input_ids": torch.cat(sequences)[None], "position_ids": positions(model, (7, 5))}
            together = model(**row, use_cache=False).logits[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)
