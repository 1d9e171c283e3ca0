"""Where deltas go: roles, names, patterns, fused columns, spans."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import LoRA, attach, detach
from deltatune.core.delta import Refusal
from deltatune.core.site import (
    Site,
    at,
    block_of,
    embedding,
    embeddings,
    find,
    head_modules,
    linear_at,
    matches,
    put,
    spans,
    stem,
    take,
    twins,
)  # fmt: skip
from models import FAMILIES, inputs, tiny

# family -> the first layer of each role (q, k, v, o, up, down), and how many layers play it
FIRST = {
    "llama": ("model.layers.0.", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj "
              "mlp.down_proj", (2, 2, 2, 2, 4, 2)),
    "phi3": ("model.layers.0.", "self_attn.qkv_proj self_attn.qkv_proj self_attn.qkv_proj self_attn.o_proj "
             "mlp.gate_up_proj mlp.down_proj", (2, 2, 2, 2, 2, 2)),
    "gpt2": ("transformer.h.0.", "attn.c_attn attn.c_attn attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
             (2, 2, 2, 2, 2, 2)),
    "neox": ("gpt_neox.layers.0.", "attention.query_key_value attention.query_key_value attention.query_key_value "
             "attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h", (2, 2, 2, 2, 2, 2)),
    "opt": ("model.decoder.layers.0.", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
            (2, 2, 2, 2, 2, 2)),
    "bert": ("bert.encoder.layer.0.", "attention.self.query attention.self.key attention.self.value "
             "attention.output.dense intermediate.dense output.dense", (2, 2, 2, 2, 2, 2)),
    "distilbert": ("distilbert.transformer.layer.0.", "attention.q_lin attention.k_lin attention.v_lin "
                   "attention.out_lin ffn.lin1 ffn.lin2", (2, 2, 2, 2, 2, 2)),
    "modernbert": ("model.layers.0.", "attn.Wqkv attn.Wqkv attn.Wqkv attn.Wo mlp.Wi mlp.Wo", (2, 2, 2, 2, 2, 2)),
    "t5": ("encoder.block.0.layer.", "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v 0.SelfAttention.o "
           "1.DenseReluDense.wi 1.DenseReluDense.wo", (6, 6, 6, 6, 4, 4)),
    "bart": ("model.encoder.layers.0.", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
             (6, 6, 6, 6, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("family", FIRST)
def test_roles(family):
    start, names, counts = FIRST[family]
    model = tiny(family)
    for role, name, count in zip(("q", "k", "v", "o", "up", "down"), names.split(), counts, strict=True):
        found = find(model, role)
        # named_modules() lists BART's decoder after its encoder, so the first is always the encoder's
        assert start + name in [site.write for site in found], role
        assert len(found) == count, role


@pytest.mark.parametrize("family", FAMILIES)
def test_all_takes_every_linear_layer_of_the_blocks_once(family):
    model = tiny(family)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert [site.write for site in find(model, "all")] == [n for n in linear if block_of(n)]
    assert len(find(model, "attention")) + len(find(model, "ffn")) == len(find(model, "all"))
    assert all(block_of(site.write) for site in find(model, "norm"))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("transformer.h.11.mlp.c_fc", "transformer.h.11"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.0"),
        ("model.layers.3", None),
        ("lm_head", None),
        ("cls.predictions.decoder", None),
    ],
)
def test_block_of(name, block):
    assert block_of(name) == block


def test_names_endings_and_regexes():
    model = tiny("llama")
    whole = "model.layers.1.mlp.down_proj"
    assert find(model, whole) == [Site(whole, whole)]
    assert [s.write for s in find(model, "mlp.down_proj")] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert [s.write for s in find(model, r".*\.1\.self_attn\.[qv]_proj")] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    # in the model's order, each once, whatever the order of the targets
    assert [s.write for s in at(model, ("down", "mlp.down_proj", "lm_head", "q"))][-1] == "lm_head"
    assert len(at(model, ("down", "mlp.down_proj"))) == 2


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("q_porj", "Did you mean 'q_proj'"),
        ("dwon", "Did you mean 'down'"),
        ("layers.1", "A regex must match a whole name"),
        ("(", "nor a valid regular expression"),
    ],
)
def test_a_target_that_matches_nothing(target, said):
    with pytest.raises(ValueError, match=r"matches no layer|neither a layer") as error:
        at(tiny("llama"), ("q", target))  # the other target matches: one typo among several is still an error
    assert said in str(error.value)
    assert repr(target) in str(error.value)


def test_experts_are_named_in_the_error():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))

    model = tiny("llama")
    model.model.layers[0].mlp = nn.Module()
    model.model.layers[0].mlp.experts = Experts()
    with pytest.raises(ValueError, match=r"experts are 3-D parameters such as 'model\.layers\.0\.mlp\.experts"):
        at(model, ("experts.gate_up_proj",))


def test_linear_targets_only():
    with pytest.raises(Refusal, match="changes linear layers") as refusal:
        attach(tiny("llama"), LoRA(targets=("embed_tokens",)))
    assert "model.embed_tokens: Embedding" in refusal.value.found
    with pytest.raises(Refusal, match="LlamaRMSNorm"):
        linear_at(tiny("llama"), ("input_layernorm",), "LoRA")


@pytest.mark.parametrize(
    ("site", "pattern", "covered"),
    [
        (Site("a.q_proj", "a.q_proj"), "q", True),
        (Site("a.q_proj", "a.q_proj"), "attention", True),
        (Site("a.q_proj", "a.q_proj"), "v", False),
        (Site("a.q_proj", "a.q_proj"), r".*proj", True),
        (Site("h.0.attn.c_attn", "h.0.attn.c_attn", ((0, 4),), "q"), "q", True),
        (Site("h.0.attn.c_attn", "h.0.attn.c_attn", ((4, 8),), "k"), "q", False),  # another part of the same layer
        (Site("h.0.attn.c_attn", "h.0.attn.c_attn", ((4, 8),), "k"), "c_attn", True),
    ],
)
def test_patterns(site, pattern, covered):
    assert matches(site, pattern) is covered


def test_patterns_give_layers_their_own_rank():
    model = attach(tiny("gpt2"), LoRA(r=2, targets=("q", "v", "down"), patterns={"v": {"r": 4}, "down": {"alpha": 4}}))
    ranks = {d.site.key.rsplit(".", 1)[-1]: (d.r, d.scale) for d in model.transformer.h[1].modules() if hasattr(d, "r")}
    assert ranks == {"c_attn[q]": (2, 8.0), "c_attn[v]": (4, 4.0), "c_proj": (2, 2.0)}
    with pytest.raises(ValueError, match="pattern 'up' matches none of the 4 targets"):
        attach(tiny("llama"), LoRA(targets=("q", "v"), patterns={"up": {"r": 1}}))


# ---- fused projections ---------------------------------------------------------------------------------------------
def reference_slices(family: str) -> dict[str, list[int]]:
    """Output features of q, k and v, from how each family's own forward cuts its fused projection."""
    if family == "neox":  # view(..., heads, 3 * dim).chunk(3)
        of = [(i // 8) % 3 for i in range(96)]
        return {role: [i for i in range(96) if of[i] == j] for j, role in enumerate("qkv")}
    ends = {"phi3": (0, 32, 48, 64)}.get(family, (0, 32, 64, 96))
    return {role: list(range(ends[j], ends[j + 1])) for j, role in enumerate("qkv")}


@pytest.mark.parametrize("role", "qkv")
@pytest.mark.parametrize("family", ["gpt2", "phi3", "neox", "modernbert"])
def test_a_part_of_a_fused_projection_is_changed_by_hand_and_by_delta(family, role):
    model, by_hand = tiny(family, dtype=torch.float64), tiny(family, dtype=torch.float64)
    attach(model, LoRA(r=3, alpha=6, targets=(role,)))
    chosen = reference_slices(family)[role]
    for site in find(by_hand, role):
        (delta,) = model.get_submodule(site.write).delta_slot.of("default")
        delta.double()
        nn.init.normal_(delta.lora_B, generator=torch.Generator().manual_seed(1))
        layer = by_hand.get_submodule(site.write)
        change = 2.0 * delta.lora_B.detach() @ delta.lora_A.detach()
        weight = layer.weight.data.T if family == "gpt2" else layer.weight.data
        weight[chosen] += change
    given = inputs(model)
    with torch.no_grad():
        base = tiny(family, dtype=torch.float64)(**given).logits
        assert (by_hand(**given).logits - base).abs().max() > 1e-2
        torch.testing.assert_close(model(**given).logits, by_hand(**given).logits, rtol=0, atol=1e-12)


def test_take_and_put():
    y = torch.arange(12.0).view(2, 6)
    columns = ((1, 2), (4, 6))
    assert take(y, columns).tolist() == [[1, 4, 5], [7, 10, 11]]
    assert put(y, columns, -take(y, columns)).tolist() == [[0, -1, 2, 3, -4, -5], [6, -7, 8, 9, -10, -11]]
    assert take(y, None) is y


# ---- spans -----------------------------------------------------------------------------------------------------------
def test_spans_pair_self_with_self_and_cross_with_cross():
    pairs = {s.write: s.read for s in spans(tiny("bart"), "q", "o")}
    block = "model.decoder.layers.1."
    assert pairs[block + "self_attn.out_proj"] == block + "self_attn.q_proj"
    assert pairs[block + "encoder_attn.out_proj"] == block + "encoder_attn.q_proj"
    assert len(pairs) == 6
    pairs = {s.write: s.read for s in spans(tiny("t5"), "q", "o")}
    block = "decoder.block.0.layer."
    assert pairs[block + "0.SelfAttention.o"] == block + "0.SelfAttention.q"
    assert pairs[block + "1.EncDecAttention.o"] == block + "1.EncDecAttention.q"


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_stay_in_their_block(family):
    model = tiny(family)
    for read, write in (("q", "o"), ("up", "down")):
        found = spans(model, read, write)
        assert len(found) == len(find(model, write))
        assert all(block_of(s.read) == block_of(s.write) and s.is_span for s in found)


def test_a_span_without_a_partner_in_its_block():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj has no .* layer in its block"):
        spans(model, r"model\.layers\.0\.mlp\.up_proj", "down")


# ---- embeddings, heads, positions ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_is_the_module_that_runs(family):
    model = tiny(family)
    names = embeddings(model)
    assert names[0] == embedding(model)
    ran = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: ran.append(name))
    model(**inputs(model))
    assert ran == names


@pytest.mark.parametrize("family", FAMILIES)
def test_heads(family):
    assert head_modules(tiny(family)) == []  # the vocabulary projection was pre-trained: it is no task head
    heads = head_modules(tiny(family, "classify"))
    assert heads
    assert not set(heads) & {"model", "bert", "transformer"}


def test_twins_are_the_layers_that_share_a_weight():
    model = tiny("gpt2")
    assert twins(model, model.lm_head.weight) == ["transformer.wte", "lm_head"]
    attach(model, LoRA(targets=("q",)))
    assert twins(model, model.lm_head.weight) == ["transformer.wte", "lm_head"]
    detach(model, "default")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stem_runs_in_every_forward_pass(family):
    model = tiny(family)
    ran = []
    stem(model).register_forward_hook(lambda *_: ran.append(1))
    model(**inputs(model))
    assert ran == [1]
