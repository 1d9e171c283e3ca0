"""Each method against its paper's equation in float64, and against published parameter counts."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch import nn

from conformance import logits
from deltatune import IA3, AdaLoRA, Adapter, BitFit, DoRA, Freeze, Full, LoRA, NewTokens, Prefix, Prompt, attach
from deltatune.core.attach import parameters, trainable
from deltatune.core.delta import Refusal
from deltatune.core.slot import deltas
from deltatune.core.store import virtual_ids
from deltatune.methods.freeze import Head
from models import inputs, tiny

LAYER = "model.layers.0.self_attn.q_proj"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(model: nn.Module, seed: int = 7) -> list:
    """The deltas of "default" in float64, every parameter drawn anew."""
    model.double()
    for i, parameter in enumerate(parameters(model, "default").values()):
        parameter.data = drawn(*parameter.shape, seed=seed + i)
    return deltas(model)


def test_lora_adds_a_scaled_low_rank_product():
    model = attach(tiny("llama"), LoRA(r=3, alpha=12, targets=(LAYER,)))
    (delta,) = fill(model)
    layer, x = model.get_submodule(LAYER), drawn(2, 5, 32)
    expected = x @ layer.weight.T + (12 / 3) * (x @ delta.lora_A.T) @ delta.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


def test_lora_starts_with_kaiming_a_and_zero_b():
    model = attach(tiny("llama", hidden_size=512, num_attention_heads=4), LoRA(r=64, targets=(LAYER,)))
    (delta,) = deltas(model)
    bound = 1 / math.sqrt(512)  # kaiming_uniform_(a = sqrt 5)
    assert bound * 0.98 < delta.lora_A.abs().max() <= bound
    assert abs(delta.lora_A.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    assert not delta.lora_B.any()


def test_lora_drops_its_input_only_in_training():
    model = attach(tiny("llama"), LoRA(r=3, dropout=0.5, targets=(LAYER,)))
    fill(model)
    layer, x = model.get_submodule(LAYER), drawn(2, 5, 32)
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    model.train()
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))


def test_ia3_multiplies_keys_values_and_the_hidden_layer():
    model = attach(tiny("bert"), IA3())
    fill(model)
    block = model.bert.encoder.layer[0]
    x, h = drawn(2, 5, 32), drawn(2, 5, 48)
    for layer in (block.attention.self.key, block.attention.self.value):
        (delta,) = layer.delta_slot.of("default")
        torch.testing.assert_close(layer(x), delta.ia3_l * (x @ layer.weight.T + layer.bias), rtol=0, atol=1e-10)
    layer = block.output.dense
    (delta,) = layer.delta_slot.of("default")
    torch.testing.assert_close(layer(h), (delta.ia3_l * h) @ layer.weight.T + layer.bias, rtol=0, atol=1e-10)


def test_ia3_cannot_scale_the_input_of_one_part_of_a_fused_layer():
    with pytest.raises(Refusal, match="share that input"):
        attach(tiny("gpt2"), IA3(outputs=(), inputs=("q",)))


ACTS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": torch.tanh,
}


def by_hand(delta, h: torch.Tensor, act: str, scale: float) -> torch.Tensor:
    down, up = delta.down, delta.up
    return scale * (ACTS[act](h @ down.weight.T + down.bias) @ up.weight.T + up.bias)


@pytest.mark.parametrize("act", ACTS)
def test_a_sequential_adapter_reads_its_layers_output(act):
    model = attach(tiny("bert"), Adapter(5, where=("ffn",), act=act, scale=2.0))
    fill(model)
    layer, x = model.bert.encoder.layer[1].output.dense, drawn(2, 5, 48)
    (delta,) = layer.delta_slot.of("default")
    y = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), y + by_hand(delta, y, act, 2.0), rtol=0, atol=1e-9)


def test_a_parallel_adapter_reads_the_blocks_input():
    model = attach(tiny("llama"), Adapter(5, where=("ffn",), form="parallel", act="relu", scale=4.0))
    fill(model)
    mlp, x = model.model.layers[0].mlp, drawn(2, 5, 32)
    (delta,) = mlp.down_proj.delta_slot.of("default")
    up, gate = x @ mlp.up_proj.weight.T, x @ mlp.gate_proj.weight.T
    plain = (ACTS["silu"](gate) * up) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), plain + by_hand(delta, x, "relu", 4.0), rtol=0, atol=1e-9)


def test_a_prefix_is_attended_to_like_tokens():
    """softmax(q [P_k; K]^T / sqrt d) [P_v; V], for one layer of BERT, every head by hand."""
    model = attach(tiny("bert"), Prefix(3))
    fill(model)
    attention, x = model.bert.encoder.layer[0].attention.self, drawn(2, 5, 32)
    (delta,) = attention.delta_slot.of("default")
    q, k, v = (m(x).view(2, 5, 4, 8).transpose(1, 2) for m in (attention.query, attention.key, attention.value))
    k = torch.cat([delta.k.expand(2, -1, -1, -1), k], 2)
    v = torch.cat([delta.v.expand(2, -1, -1, -1), v], 2)
    expected = (torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8), -1) @ v).transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(attention(x)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("offset", [True, False])
def test_prefix_positions(offset):
    model = attach(tiny("gpt2"), Prefix(3, offset_positions=offset))
    seen = []
    model.transformer.wpe.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(model, inputs(model))
    assert seen[0][0].tolist() == [i + 3 * offset for i in range(7)]


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert", "t5", "bart"])
def test_a_prompt_stands_for_rows_anywhere_in_the_input(family):
    """Rows that are copies of the words' own embeddings give the words' logits."""
    model = tiny(family)
    given = inputs(model)
    base = logits(model, given)
    attach(model, Prompt(97, init="text", ids=tuple((i,) for i in range(97))))  # row i is word i
    ids = virtual_ids(model)
    assert ids == tuple(range(97, 194))
    given["input_ids"] = torch.where(torch.arange(7) % 2 == 0, given["input_ids"] + 97, given["input_ids"])
    torch.testing.assert_close(logits(model, given), base, rtol=0, atol=1e-5)
    second = attach(model, Prompt(2, init="uniform"), "b")
    assert virtual_ids(second, "b") == (194, 195)
    assert max(p.abs().max() for p in parameters(model, "b").values()) <= 0.5


def test_bitfit_trains_biases_and_nothing_else():
    model = tiny("bert")
    biases = {id(p) for n, p in model.bert.named_parameters() if n.endswith("bias")}
    assert {id(p) for p in trainable(attach(model, BitFit())).values()} == biases
    subset = attach(tiny("bert"), BitFit(targets=("q", "up")))
    assert {n.rsplit(".", 2)[-2] for n in trainable(subset)} == {"query", "dense"}
    assert len(trainable(subset)) == 4
    with pytest.raises(Refusal, match="the layers down of LlamaForCausalLM has none"):
        attach(tiny("llama"), BitFit(targets=("down",)))


@pytest.mark.parametrize(
    ("method", "layers"),
    [(Freeze(last=1), ["1"]), (Freeze(first=1), ["0"]), (Freeze(), ["0", "1"]), (Freeze(last=1, first=1), ["0", "1"])],
    ids=str,
)
def test_freeze_trains_blocks(method, layers):
    names = list(trainable(attach(tiny("llama"), method)))
    assert sorted({n.split(".")[2] for n in names}) == layers
    assert len(names) == 9 * len(layers)


def test_freeze_by_name():
    names = trainable(attach(tiny("llama"), Freeze(names=(r"model\.norm\..*", r".*layernorm\.weight"))))
    assert len(names) == 5
    assert Freeze(names="lm_head.weight") == Freeze(names=("lm_head.weight",))
    with pytest.raises(ValueError, match="matches no whole parameter name"):
        attach(tiny("llama"), Freeze(names=("model.norm",)))
    with pytest.raises(ValueError, match="asks for 3 blocks, LlamaForCausalLM has 2"):
        attach(tiny("llama"), Freeze(last=3))


def test_head_trains_the_head_and_says_so_where_there_is_none():
    assert set(trainable(attach(tiny("roberta", "classify"), Head()))) == {
        f"classifier.{layer}.{name}" for layer in ("dense", "out_proj") for name in ("weight", "bias")
    }
    with pytest.raises(Refusal, match="this model has none"):
        attach(tiny("roberta"), Head())


# ---- published counts: shapes from real configurations, on the meta device -----------------------------------------
def roberta_base():
    return hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)


def bert(large: bool = False):
    return hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096) \
        if large else hf.BertConfig()  # fmt: skip


def llama_3b():
    return hf.LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip


def qwen_3b():
    return hf.Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip


def gpt2(d: int, n: int):
    return hf.GPT2Config(n_embd=d, n_layer=n, n_head=d // 64 if d < 12288 else 96)


QV = ("q", "v")
PUBLISHED = {
    "LoRA r8 RoBERTa-base": (hf.AutoModelForSequenceClassification, roberta_base, LoRA(8, targets=QV), 294_912),
    "LoRA r32 Llama-3.2-3B": (hf.AutoModelForCausalLM, llama_3b, LoRA(32, targets=QV), 9_175_040),
    "LoRA r16 Qwen2.5-3B": (hf.AutoModelForCausalLM, qwen_3b, LoRA(16, targets=QV), 3_686_400),
    "LoRA r4 GPT-2 M": (hf.AutoModelForCausalLM, lambda: gpt2(1024, 24), LoRA(4, targets=QV), 393_216),
    "LoRA r1 GPT-3": (hf.AutoModelForCausalLM, lambda: gpt2(12288, 96), LoRA(1, targets=QV), 4_718_592),
    "PiSSA r8 RoBERTa-base": (hf.AutoModel, roberta_base, LoRA(8, targets=QV, init="pissa"), 294_912),
    "DoRA r32 Llama-3.2-3B": (hf.AutoModelForCausalLM, llama_3b, DoRA(32, targets=QV), 9_289_728),
    "AdaLoRA r12 RoBERTa-base": (hf.AutoModel, roberta_base, AdaLoRA(targets=QV), 442_656),
    "IA3 Llama-3.2-3B": (hf.AutoModelForCausalLM, llama_3b, IA3(), 286_720),
    "IA3 7 linears": (hf.AutoModelForCausalLM, llama_3b, IA3(("q", "k", "v", "o"), ("up", "down")), 630_784),
    "prefix 50 Llama-3.2-3B": (hf.AutoModelForCausalLM, llama_3b, Prefix(50), 2_867_200),
    "prefix 200 Llama-3.2-3B": (hf.AutoModelForCausalLM, llama_3b, Prefix(200), 11_468_800),
    "prompt 200 Llama-3.2-3B": (hf.AutoModelForCausalLM, llama_3b, Prompt(200), 614_400),
    "BitFit BERT-base": (hf.AutoModelForSequenceClassification, bert, BitFit(), 102_912),
    "BitFit BERT-large": (hf.AutoModelForSequenceClassification, lambda: bert(True), BitFit(), 272_384),
    "BitFit q + up BERT-base": (hf.AutoModelForSequenceClassification, bert, BitFit(("q", "up")), 46_080),
    "Houlsby 64 BERT-base": (hf.AutoModelForSequenceClassification, bert, Adapter(64), 2_379_264),
    "Houlsby 8 BERT-large": (hf.AutoModelForSequenceClassification, lambda: bert(True), Adapter(8), 835_968),
    "full BERT-base": (hf.AutoModel, bert, Full(), 109_482_240),
    "full BERT-large": (hf.AutoModel, lambda: bert(True), Full(), 335_141_888),
}


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
def test_published_counts(case):
    auto, config, method, published = case
    with torch.device("meta"):
        model = auto.from_config(config())
        found = list(method.deltas(model))
    counted = sum(p.numel() for site, d in found for p in d.trained(model.get_submodule(site.write)).values())
    assert counted == published


MISTAKES = [
    (LoRA, {"r": 2.5}, r"LoRA r must be a whole number >= 1, got 2\.5"),
    (LoRA, {"r": 0}, "got 0"),
    (LoRA, {"r": True}, "got True"),
    (LoRA, {"alpha": float("nan")}, "LoRA alpha must be a finite number > 0, got nan"),
    (LoRA, {"alpha": float("inf")}, "got inf"),
    (LoRA, {"alpha": -(10**400)}, "LoRA alpha must be a finite number > 0, got -1000"),
    (LoRA, {"alpha": -1}, "got -1"),
    (LoRA, {"alpha": 0}, "got 0"),
    (LoRA, {"alpha": "16"}, "got '16'"),
    (LoRA, {"dropout": 1.0}, r"LoRA dropout must be in 0 <= dropout < 1, got 1\.0"),
    (LoRA, {"dropout": float("nan")}, "LoRA dropout must be a finite number, got nan"),
    (LoRA, {"patterns": {"down": {"rank": 4}}}, "pattern 'down' has no field 'rank'. Did you mean 'r'.* r, alpha$"),
    (LoRA, {"patterns": {"down": {"alhpa": 4}}}, "no field 'alhpa'. Did you mean 'alpha'"),
    (LoRA, {"patterns": {"down": {"r": 1.5}}}, r"pattern 'down': r must be .* got 1\.5"),
    (LoRA, {"patterns": {"down": {"alpha": float("nan")}}}, "pattern 'down': alpha must be .* got nan"),
    (LoRA, {"patterns": {"down": 4}}, "pattern 'down' must be like .* got 4"),
    (Adapter, {"bottleneck": 0}, "Adapter bottleneck must be a whole number >= 1, got 0"),
    (Adapter, {"bottleneck": 1.5}, r"got 1\.5"),
    (Adapter, {"scale": float("inf")}, "Adapter scale must be a finite number, got inf"),
    (Prefix, {"length": 0}, "Prefix length must be .* got 0"),
    (Prefix, {"length": 2.0}, r"got 2\.0"),
    (Prompt, {"length": -3}, "Prompt length must be .* got -3"),
    (Prompt, {"init": "vocabulary"}, "Prompt init 'vocabulary': choose from vocab, uniform, text, labels"),
    (Freeze, {"last": -1}, "Freeze last must be a whole number >= 0, got -1"),
    (Freeze, {"names": ("*norm",)}, r"Freeze name '\*norm' is neither .* nor a valid regular expression \(nothing to"),
    (NewTokens, {"ids": (1.5,)}, r"NewTokens id must be .* got 1\.5"),
    (NewTokens, {"ids": (5, 6, 5)}, "NewTokens id 5 is given 2 times"),
]


@pytest.mark.parametrize(("method", "fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(method, fields, said):
    with pytest.raises(ValueError, match=said):
        method(**fields)


def test_new_tokens_must_exist():
    with pytest.raises(ValueError, match=r"must be in 0\.\.96: call add_tokens"):
        attach(tiny("llama"), NewTokens((97,)))
