"""The attention function against transformers' own, one sequence at a time, and attention by the book."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltatune.core import attention
from deltatune.core.attention import (
    IMPLEMENTATION,
    Heads,
    attention_modules,
    heads,
    packed,
    positions,
    restore_attention,
    unpackable,
    use_attention,
)
from deltatune.core.delta import SLOT, Refusal
from deltatune.core.site import trunk
from models import FAMILIES, enliven, inputs, tiny

CAUSAL = [f for f, it in FAMILIES.items() if it.kind == "causal"]
PACKABLE = [f for f, it in FAMILIES.items() if it.kind != "seq2seq"]
SEQ2SEQ = [f for f, it in FAMILIES.items() if it.kind == "seq2seq"]
# transformers' sdpa has no soft cap, so it does not build Gemma 2 with it
STOCK = [(f, s) for f in FAMILIES for s in ("eager", "sdpa") if (f, s) != ("gemma", "sdpa")]
LENS = (6, 9, 6, 1)  # two of one length, all but one longer than the windows of 4, and a lone token

# family: (name of the first attention module, its heads, how many of each kind)
MODULES = {
    "llama": ("model.layers.0.self_attn", Heads(4, 2, 8), {"self": 2}),
    "qwen": ("model.layers.0.self_attn", Heads(4, 2, 8), {"self": 2}),
    "mistral": ("model.layers.0.self_attn", Heads(4, 2, 8), {"self": 2}),
    "gemma": ("model.layers.0.self_attn", Heads(4, 2, 8), {"self": 2}),
    "phi3": ("model.layers.0.self_attn", Heads(4, 2, 8), {"self": 2}),
    "gpt2": ("transformer.h.0.attn", Heads(4, 4, 8), {"self": 2}),
    "neox": ("gpt_neox.layers.0.attention", Heads(4, 4, 8), {"self": 2}),
    "opt": ("model.decoder.layers.0.self_attn", Heads(4, 4, 8), {"self": 2}),
    "bert": ("bert.encoder.layer.0.attention.self", Heads(4, 4, 8), {"self": 2}),
    "roberta": ("roberta.encoder.layer.0.attention.self", Heads(4, 4, 8), {"self": 2}),
    "distilbert": ("distilbert.transformer.layer.0.attention", Heads(4, 4, 8), {"self": 2}),
    "electra": ("electra.encoder.layer.0.attention.self", Heads(4, 4, 8), {"self": 2}),
    "modernbert": ("model.layers.0.attn", Heads(4, 4, 8), {"self": 2}),
    "t5": ("encoder.block.0.layer.0.SelfAttention", Heads(4, 4, 8), {"encoder": 2, "decoder": 2, "cross": 2}),
    "bart": ("model.encoder.layers.0.self_attn", Heads(4, 4, 8), {"encoder": 2, "decoder": 2, "cross": 2}),
}


class Front(nn.Module):
    """Learned keys and values in front, the plainest slot there is."""

    attends = True

    def __init__(self, module: nn.Module, p: int = 3, seed: int = 0, rows: tuple[bool, ...] = (), each: int = 1):
        super().__init__()
        shape, g = heads(module), torch.Generator().manual_seed(seed)
        self.k = nn.Parameter(torch.randn(each, shape.kv, p, shape.dim, generator=g))
        self.v = nn.Parameter(torch.randn(each, shape.kv, p, shape.dim, generator=g))
        self.rows = rows

    def attend(self, key, value):
        k, v = (x.expand(len(key), -1, -1, -1).to(key.dtype) for x in (self.k, self.v))
        visible = torch.tensor(self.rows)[:, None].expand(-1, k.shape[2]) if self.rows else None
        return torch.cat([k, key], dim=2), torch.cat([v, value], dim=2), visible


def ours(family, **options):
    model = tiny(family, **options)
    use_attention(model)
    return model


def prefixed(model, **options):
    for i, (_, module, _) in enumerate(attention_modules(model)):
        module.add_module(SLOT, Front(module, seed=i, **options))
    return model


def run(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def ids(lens=LENS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 97, (1, n), generator=g) for n in lens]


def pack(model, sequences, lens=None):
    """One packed forward pass -> logits per sequence."""
    true = [s.shape[1] for s in sequences]
    with packed(lens or true):
        out = model(input_ids=torch.cat(sequences, dim=1), position_ids=positions(model, true))
    return out.logits.split(true, dim=1)


def grads(model, outputs):
    """The gradient of a fixed function of every logit, per parameter."""
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    found = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, found)])


def apart(a, b):
    """Relative distance."""
    return float((a - b).detach().norm() / b.detach().norm())


# ---- nothing attached, nothing packed: transformers' own results -------------------------------------


@pytest.mark.parametrize(("family", "stock"), STOCK)
def test_alone_it_changes_nothing(family, stock):
    model = tiny(family, attn_implementation=stock)
    batch = inputs(model, seq=11)
    hide = {"right": batch["attention_mask"].clone(), "left": batch["attention_mask"].clone()}
    hide["right"][1, 8:], hide["left"][1, :3] = 0, 0
    cases = [batch, *(batch | {"attention_mask": m} for m in hide.values())]
    expected = [run(model, **case) for case in cases]
    use_attention(model)
    for side, case, want in zip(("none", "right", "left"), cases, expected, strict=True):
        got = run(model, **case)
        if side != "none" and FAMILIES[family].kind != "seq2seq":  # what padding itself predicts is nobody's business
            got, want = got[hide[side].bool()], want[hide[side].bool()]
        assert (got - want).abs().max() <= 5e-6, side


@pytest.mark.parametrize("family", CAUSAL + SEQ2SEQ)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_transformers(family, cache):
    model = tiny(family)
    batch = {k: v for k, v in inputs(model, seq=6).items() if k in ("input_ids", "attention_mask")}
    batch["attention_mask"][1, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**batch, **options)
    use_attention(model)
    assert torch.equal(model.generate(**batch, **options), expected)


def test_dropout_draws_in_training():
    model = ours("llama", attention_dropout=0.5)
    capped = ours("gemma", attention_dropout=0.5)
    for m in (model, capped):
        batch = inputs(m)
        assert torch.equal(run(m, **batch), run(m, **batch))
        m.train()
        assert not torch.equal(run(m, **batch), run(m, **batch))


# ---- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_equals_one_by_one(family):
    model, sequences = ours(family), ids()
    alone = [model(input_ids=s, attention_mask=torch.ones_like(s)).logits for s in sequences]
    together = pack(model, sequences)
    for a, b in zip(together, alone, strict=True):
        assert apart(a, b) <= 2e-6
    assert apart(grads(model, together), grads(model, alone)) <= 1e-5


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_equals_one_by_one_in_float64(family):
    model, sequences = ours(family, dtype=torch.float64), ids()
    alone = torch.cat([run(model, input_ids=s) for s in sequences], dim=1)
    # Rotary angles, T5-style norms and the soft cap's softmax run in fp32 inside transformers.
    limit = 1e-10 if family in ("gpt2", "opt", "bert", "roberta", "distilbert", "electra") else 1e-6
    assert apart(torch.cat(pack(model, sequences), dim=1), alone) <= limit


@pytest.mark.parametrize("family", PACKABLE)
def test_wrong_lengths_would_be_seen(family):
    """The fault the tests above guard against: a boundary one token off."""
    model, sequences = ours(family), ids()
    off = [LENS[0] + 1, LENS[1] - 1, *LENS[2:]]
    alone = torch.cat([run(model, input_ids=s) for s in sequences], dim=1)
    assert apart(torch.cat(pack(model, sequences, off), dim=1), alone) > 1e-3


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_with_checkpointing(family):
    model, sequences = ours(family).train(), ids()
    plain = grads(model, pack(model, sequences))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(grads(model, pack(model, sequences)), plain)


def test_equal_lengths_share_one_call_and_a_triangle_is_not_written_out():
    restart = torch.cat([torch.arange(n) for n in LENS])[None]
    config, embeds = tiny("llama", attn_implementation=IMPLEMENTATION).config, torch.zeros(1, sum(LENS), 32)
    with packed(LENS):
        mask = create_causal_mask(config, embeds, None, None, restart)
    assert [(g.order, g.starts, g.length, g.mask.see, g.mask.causal) for g in mask.groups] == [
        ((0, 2), (0, 15), 6, None, True),
        ((1,), (6,), 9, None, True),
        ((3,), (21,), 1, None, True),
    ]


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_refuse_packing(family):
    model = ours(family)
    batch = inputs(model, rows=1, seq=7)
    with pytest.raises(Refusal, match="padded batches"), packed((3, 4)):
        model(input_ids=batch["input_ids"], decoder_input_ids=batch["decoder_input_ids"])
    with pytest.raises(Refusal, match="takes no position_ids"):
        positions(model, (3, 4))


def test_chunked_attention_refuses_packing():
    config = tiny("llama", attn_implementation=IMPLEMENTATION, attention_chunk_size=4).config
    with pytest.raises(Refusal, match="attention_chunk_size 4"), packed((3, 4)):
        create_chunked_causal_mask(config, torch.zeros(1, 7, 32), None, None)


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "num_local_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4}
HYBRIDS = {
    "lfm2": (hf.Lfm2Config, {"layer_types": ["conv", "full_attention"]}, "carries"),
    "granite 4": (hf.GraniteMoeHybridConfig, STATES | {"layer_types": ["mamba", "attention"]}, "carries"),
    "bamba": (hf.BambaConfig, STATES | {"attn_layer_indices": [1]}, "carries"),
    "minimax": (hf.MiniMaxConfig, {"layer_types": ["linear_attention", "full_attention"]}, "carries"),
    "gpt-oss": (hf.GptOssConfig, {}, "sinks"),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_rows_that_would_see_each_other_past_attention_are_not_packed(name):
    config, fields, why = HYBRIDS[name]
    model = hf.AutoModelForCausalLM.from_config(config(**SMALL | fields))
    assert why in unpackable(model)


@pytest.mark.parametrize("family", PACKABLE)
def test_a_model_of_attention_alone_is_packed(family):
    fits = "position_ids" in inspect.signature(trunk(tiny(family)).forward).parameters
    assert (unpackable(tiny(family)) == "") is fits


def test_packing_that_nobody_reads_is_an_error():
    model = tiny("bert")
    with pytest.raises(RuntimeError, match="use_attention"):
        pack(model, ids())


@pytest.mark.parametrize(
    ("lens", "batch", "message"),
    [
        ((3, 5), {}, r"packed\(\[3, 5\]\) is for input_ids \[1, 8\], but the model got \[1, 7\]"),
        ((3, 4), {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])}, "has no padding"),
        ((7, 0), {}, "at least 1"),
        ((), {}, "at least 1"),
    ],
)
def test_packing_mistakes(lens, batch, message):
    model = ours("llama")
    with pytest.raises(ValueError, match=message), packed(lens):
        model(**{"input_ids": ids((7,))[0], **batch})


def test_a_mask_of_ones_is_none():
    model, sequences = ours("llama"), ids((3, 4))
    given = {"input_ids": torch.cat(sequences, dim=1), "position_ids": positions(model, (3, 4))}
    with packed((3, 4)):
        masked = model(**given, attention_mask=torch.ones(1, 7, dtype=torch.long)).logits
    assert torch.equal(masked, torch.cat(pack(model, sequences), dim=1))


def test_biogpt_makes_a_mask_itself_and_is_packed():
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 1}
    with torch.random.fork_rng():
        model = hf.AutoModelForCausalLM.from_config(hf.BioGptConfig(**sizes, **more)).eval()
    enliven(model)
    assert unpackable(model) == ""
    use_attention(model)
    sequences = ids()
    alone = torch.cat([run(model, input_ids=s) for s in sequences], dim=1)
    assert apart(torch.cat(pack(model, sequences), dim=1), alone) <= 2e-6
    off = [LENS[0] + 1, LENS[1] - 1, *LENS[2:]]
    assert apart(torch.cat(pack(model, sequences, off), dim=1), alone) > 1e-3


def test_one_position_row_per_sequence_is_an_error():
    model = ours("llama")
    with pytest.raises(ValueError, match=r"a packed batch is one row.*\[2, 2, 1\]"), packed((3, 4)):
        model(input_ids=ids((7,))[0], position_ids=positions(model, (3, 4)).repeat(2, 1))


def test_a_packed_cache_cannot_be_continued():
    model = ours("llama")
    (first,) = ids((7,))
    cache = model(input_ids=first).past_key_values
    with pytest.raises(Refusal, match="key-value cache"), packed((3, 4)):
        model(input_ids=first, past_key_values=cache)


# family: position_ids of lengths (3, 2)
POSITIONS = {"llama": [0, 1, 2, 0, 1], "bert": [0, 1, 2, 0, 1], "opt": [0, 1, 2, 0, 1], "roberta": [2, 3, 4, 2, 3]}


@pytest.mark.parametrize("family", POSITIONS)
def test_positions(family):
    assert positions(tiny(family), (3, 2)).tolist() == [POSITIONS[family]]


# ---- prefixes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen", "phi3", "gpt2", "neox"])
def test_a_prefix_equals_a_filled_cache(family):
    """transformers' own cache, filled by hand with the prefix, positions not moved."""
    model = ours(family)
    batch = {"input_ids": ids((7,))[0].repeat(2, 1), "position_ids": torch.arange(7)[None]}
    cache = DynamicCache(config=model.config)
    for layer, (_, module, _) in enumerate(attention_modules(model)):
        front = Front(module, seed=layer)
        cache.update(front.k.expand(2, -1, -1, -1), front.v.expand(2, -1, -1, -1), layer)
    expected, without = run(model, **batch, past_key_values=cache), run(model, **batch)
    got = run(prefixed(model), **batch)
    assert apart(got, expected) <= 2e-6
    assert apart(got, without) > 1e-2


def reference(module, query, key, value, attention_mask, position_bias=None, is_causal=None, **how):
    """Attention by the book with the module's Front, in plain tensor code."""
    front = module._modules[SLOT]
    causal = (module.is_causal if is_causal is None else is_causal) and query.shape[2] > 1
    mask = torch.zeros(len(query), 1, query.shape[2], key.shape[2])
    if attention_mask is not None:
        mask = mask.masked_fill(~attention_mask, -torch.inf)
    elif causal:
        mask = mask.masked_fill(~torch.ones_like(mask, dtype=torch.bool).tril(), -torch.inf)
    if position_bias is not None:
        mask = mask + position_bias
    n = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(n, dim=1) for x in (key, value))
    fk, fv = (x.repeat_interleave(n, dim=1) for x in (front.k, front.v))
    scale, cap = how.get("scaling") or query.shape[-1] ** -0.5, how.get("softcap")
    before, real = (torch.einsum("bhqd,bhkd->bhqk", query, x.expand(len(query), -1, -1, -1)) * scale for x in (fk, k))
    if cap:
        before, real = cap * (before / cap).tanh(), cap * (real / cap).tanh()
    if front.rows:
        before = before.masked_fill(~torch.tensor(front.rows)[:, None, None, None], -torch.inf)
    weights = torch.cat([before, real + mask], dim=-1).softmax(-1).nan_to_num()
    return (weights @ torch.cat([fv.expand(len(query), -1, -1, -1), v], dim=2)).transpose(1, 2), None


@pytest.mark.parametrize("rows", [(), (True, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_equals_attention_by_the_book(family, rows, monkeypatch):
    model = prefixed(ours(family), rows=rows)
    batch = inputs(model)
    padded = batch | {"attention_mask": batch["attention_mask"].clone()}
    padded["attention_mask"][1, -2:] = 0
    got = [run(model, **batch), run(model, **padded)]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, reference)
    for a, b in zip(got, [run(model, **batch), run(model, **padded)], strict=True):
        assert apart(a, b) <= 3e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_see_no_prefix_are_the_base(family):
    base, model = ours(family), prefixed(ours(family), rows=(True, False))
    batch = inputs(model)
    expected, got = run(base, **batch), run(model, **batch)
    assert apart(got[1], expected[1]) <= 2e-6
    assert apart(got[0], expected[0]) > 1e-3


@pytest.mark.parametrize("family", CAUSAL + SEQ2SEQ)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_prefix_and_a_cache(family, cache):
    model = prefixed(ours(family))
    batch = {k: v for k, v in inputs(model, seq=6).items() if k in ("input_ids", "attention_mask")}
    batch["attention_mask"][1, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with_cache = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    expected = model.generate(**batch, **options, use_cache=False)
    got = model.generate(**batch, **options, **with_cache)
    assert torch.equal(got.sequences, expected.sequences)
    assert apart(torch.stack(got.logits), torch.stack(expected.logits)) <= 1e-5


def test_a_prefill_into_a_longer_static_cache_keeps_the_prefix():
    """transformers leaves the mask out here: query i is at position i, the cache's tail is empty."""
    model = prefixed(ours("llama"))
    (text,) = ids((5,))
    cache = StaticCache(config=model.config, max_cache_len=9)
    assert apart(run(model, input_ids=text, past_key_values=cache), run(model, input_ids=text)) <= 2e-6


@pytest.mark.parametrize("family", PACKABLE)
def test_a_prefix_in_a_packed_batch(family):
    model, sequences = prefixed(ours(family)), ids()
    alone = [model(input_ids=s, attention_mask=torch.ones_like(s)).logits for s in sequences]
    together = pack(model, sequences)
    for a, b in zip(together, alone, strict=True):
        assert apart(a, b) <= 3e-6
    assert apart(grads(model, together), grads(model, alone)) <= 1e-5


def test_each_packed_sequence_has_its_own_prefix_or_none():
    sees, sequences = (True, False, True, True), ids()
    got = pack(prefixed(ours("llama"), rows=sees, each=4), sequences)
    for i, sequence in enumerate(sequences):
        alone = ours("llama") if not sees[i] else prefixed(ours("llama"), each=4)
        for _, module, _ in attention_modules(alone) if sees[i] else ():
            front = module.get_submodule(SLOT)
            front.k, front.v = (nn.Parameter(x[i : i + 1]) for x in (front.k, front.v))
        assert apart(got[i], run(alone, input_ids=sequence)) <= 3e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_with_checkpointing(family):
    model = prefixed(ours(family)).train()
    batch = inputs(model)
    plain = grads(model, [model(**batch).logits])
    model.activation_checkpointing_enable({"use_reentrant": False})
    # T5 adds the gradients of its shared position bias in another order, so not bit-equal
    assert apart(grads(model, [model(**batch).logits]), plain) <= 1e-6


# ---- which modules, and back ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_found_are_the_modules_that_attend(family, monkeypatch):
    model, called = ours(family), []

    def spy(module, *args, **how):
        called.append(module)
        return attention.attend(module, *args, **how)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, spy)
    run(model, **inputs(model))
    found = attention_modules(model)
    assert {id(m) for _, m, _ in found} == {id(m) for m in called}
    assert len(found) == len(called)
    name, shape, kinds = MODULES[family]
    assert (found[0][0], heads(found[0][1])) == (name, shape)
    assert {k: sum(kind == k for _, _, kind in found) for k in kinds} == kinds
    assert sum(kinds.values()) == len(found)


@pytest.mark.parametrize(("family", "stock"), STOCK)
def test_restore(family, stock):
    model = tiny(family, attn_implementation=stock)
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    previous = use_attention(model)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {IMPLEMENTATION}
    twin = copy.deepcopy(model)
    restore_attention(model, previous)
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    assert twin.config._attn_implementation == IMPLEMENTATION
    assert use_attention(twin)[""] == IMPLEMENTATION


def test_other_attention_is_refused():
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Refusal, match=r"flash_attention_2.*attn_implementation=.sdpa"):
        use_attention(model)
    with pytest.raises(Refusal, match="no transformers configuration"):
        use_attention(nn.Linear(2, 2))


def test_sinks_are_refused():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(Refusal, match="sinks"):
        attention.attend(nn.Identity(), q, q, q, None, s_aux=q)
