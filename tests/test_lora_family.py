"""rsLoRA, LoRA+, PiSSA, OLoRA and DoRA: their equations in float64, peft as oracle, foreign folders, whole runs."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny_run as t
from conformance import batch, close, logits, stir
from deltatune import DoRA, LoRA, attach, load, merge, save
from deltatune.core import peft_lora
from deltatune.core.attach import parameters, trainable
from deltatune.core.slot import deltas
from deltatune.core.store import state
from deltatune.methods import PRESETS, build, starts
from deltatune.train.run import resume, run
from models import tiny
from test_run import Signal

Q = "model.layers.0.self_attn.q_proj"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*is set to:UserWarning")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_float64(model: nn.Module, seed: int = 3) -> nn.Module:
    """Every parameter of "default" moved by a draw."""
    model.double()
    with torch.no_grad():
        for i, p in enumerate(parameters(model, "default").values()):
            p.add_(drawn(*p.shape, seed=seed + i))
    return model


# ---- the equations, forward and gradient -----------------------------------------------------------------------------
SCALES = {"standard": 12 / 4, "rslora": 12 / math.sqrt(4)}


@pytest.mark.parametrize("init", starts.INITS)
@pytest.mark.parametrize("scaling", SCALES)
def test_y_and_its_gradients(init, scaling):
    model = attach(tiny("llama"), LoRA(4, 12, targets=(Q,), init=init, scaling=scaling))
    (delta,) = deltas(in_float64(model))
    layer, x, g = model.get_submodule(Q), drawn(2, 5, 32), drawn(2, 5, 32, seed=1)
    (layer(x) * g).sum().backward()
    a, b = (p.detach().clone().requires_grad_() for p in (delta.lora_A, delta.lora_B))
    start = 0 if delta.start_A is None else delta.start_B @ delta.start_A
    by_hand = x @ (layer.weight + SCALES[scaling] * (b @ a - start)).T
    (by_hand * g).sum().backward()
    torch.testing.assert_close(layer(x), by_hand, rtol=0, atol=1e-10)
    torch.testing.assert_close(delta.lora_A.grad, a.grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(delta.lora_B.grad, b.grad, rtol=0, atol=1e-9)
    assert layer.weight.grad is None


def test_pissa_starts_as_the_largest_singular_directions():
    model = attach(tiny("llama"), LoRA(4, 12, targets=(Q,), init="pissa"))
    (delta,), w = deltas(model), model.get_submodule(Q).weight
    u, s, v = torch.linalg.svd(w.detach().double())
    torch.testing.assert_close(3 * delta.lora_B @ delta.lora_A, (u[:, :4] * s[:4] @ v[:4]).float(), rtol=0, atol=1e-5)
    balance = [delta.lora_A.norm(dim=1), delta.lora_B.norm(dim=0)]  # S^1/2 on either side
    torch.testing.assert_close(*balance)
    assert balance[0][0] > 0.05


def test_olora_starts_as_a_qr_decomposition():
    model = attach(tiny("llama"), LoRA(32, targets=(Q,), init="olora"))
    (delta,), w = deltas(model), model.get_submodule(Q).weight
    torch.testing.assert_close(delta.lora_B.T @ delta.lora_B, torch.eye(32), rtol=0, atol=1e-5)
    assert not delta.lora_A.tril(-1).any()
    torch.testing.assert_close(delta.lora_B @ delta.lora_A, w, rtol=0, atol=1e-5)


def test_drawn_starts():
    big = {"hidden_size": 256, "num_attention_heads": 4}
    (gauss,) = deltas(attach(tiny("llama", **big), LoRA(16, targets=(Q,), init="gaussian")))
    assert abs(gauss.lora_A.std().item() * 16 - 1) < 0.05
    (rows,) = deltas(attach(tiny("llama", **big), LoRA(16, targets=(Q,), init="orthogonal")))
    torch.testing.assert_close(rows.lora_A @ rows.lora_A.T, torch.eye(16), rtol=0, atol=1e-5)
    assert not any(d.lora_B.any() for d in (gauss, rows))


def test_a_start_that_is_read_keeps_the_base_in_bf16_too():
    model = tiny("llama", dtype=torch.bfloat16)
    plain, kept = logits(model, batch(model, None)), {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, [LoRA(4, init="pissa")])
    close(logits(model, batch(model)), plain, 0.0)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.items())


def by_hand(layer, delta, x, a, b, m):
    """m V x / ||V|| + bias, the norm a constant."""
    v = layer.weight + delta.scale * b @ a
    return x @ (v * (m / v.detach().norm(dim=1))[:, None]).T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize(("family", "path"), [("llama", Q), ("bert", "bert.encoder.layer.0.output.dense")])
def test_dora_turns_rows_and_scales_them_but_not_the_bias(family, path):
    model = tiny(family)
    layer = model.get_submodule(path)
    if layer.bias is not None:
        layer.bias.data = torch.linspace(-2, 2, len(layer.bias))  # a zero bias could not tell
    (delta,) = deltas(in_float64(attach(model, DoRA(4, targets=(path,)))))
    x, g = drawn(2, 5, layer.weight.shape[1]), drawn(2, 5, 32, seed=1)
    (layer(x) * g).sum().backward()
    given = [p.detach().clone().requires_grad_() for p in (delta.lora_A, delta.lora_B, delta.lora_magnitude_vector)]
    expected = by_hand(layer, delta, x, *given)
    (expected * g).sum().backward()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-9)
    ours = (delta.lora_A, delta.lora_B, delta.lora_magnitude_vector)
    for p, q in zip(ours, given, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("share", "most"), [(0.0, 2e-6), (-0.5, 2e-6), (-0.95, 2e-4)])
def test_the_fast_norm_against_the_direct_one(dtype, share, most):
    """`share` of each row's weight is undone by B A: what is left is a difference of large numbers."""
    model = tiny("llama", dtype=dtype)
    (delta,) = deltas(attach(model, DoRA(32, 32, targets=(Q,))))
    w = model.get_submodule(Q).weight
    with torch.no_grad():
        delta.lora_A.copy_(torch.eye(32) + 0.01 * drawn(32, 32))
        delta.lora_B.copy_(share * w.float() + 0.001 * drawn(32, 32, seed=1))
    direct = (w.double() + (delta.lora_B.double() @ delta.lora_A.double())).norm(dim=1)
    found = delta.norm(w)
    assert found.dtype == torch.float32
    assert ((found.double() - direct).abs() / direct).max() < most


# ---- ranks -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "method", "said"),
    [
        ("llama", LoRA(33, targets=("q",)), f"LoRA r=33 is above the rank of {Q}, which is 32 -> 32: 32 is the most"),
        ("llama", LoRA(4, patterns={"down": {"r": 40}}), "r=40 is above .*down_proj, which is 48 -> 32: 32"),
        ("qwen", DoRA(17, targets=("k",)), "DoRA r=17 is above the rank of .*k_proj, which is 32 -> 16: 16 is"),
        ("phi3", LoRA(17, targets=("v",)), r"LoRA r=17 is above the rank of .*qkv_proj\[v\], which is 32 -> 16: 16"),
    ],
)  # fmt: skip
def test_a_rank_above_the_layers_size_is_an_error(family, method, said):
    with pytest.raises(ValueError, match=said):
        attach(tiny(family), method)
    assert not hasattr(tiny(family), "deltatune_state")


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(10_000, 20_000, bias=False)


def test_the_textbook_layer_of_200_million():
    with torch.device("meta"):
        model = One()
        for method, expected in ((LoRA(8, targets=("only",)), 240_000), (DoRA(8, targets=("only",)), 260_000)):
            assert sum(p.numel() for _, d in method.deltas(model) for p in d.parameters()) == expected


MISTAKES = [
    (LoRA, {"scaling": "rs"}, "LoRA scaling 'rs': .*choose from standard, rslora"),
    (
        LoRA,
        {"init": "pisa"},
        "LoRA init 'pisa': choose from kaiming, gaussian, orthogonal, pissa, olora. Did you mean 'pissa'",
    ),
    (DoRA, {"lr_ratio": 0}, "DoRA lr_ratio must be a finite number > 0, got 0"),
    (DoRA, {"r": 0}, "DoRA r must be a whole number >= 1, got 0"),
]


@pytest.mark.parametrize(("method", "fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(method, fields, said):
    with pytest.raises(ValueError, match=said):
        method(**fields)


# ---- peft as oracle --------------------------------------------------------------------------------------------------
def curve(model, given, chosen, ratios=()) -> list[float]:
    """Losses of 20 AdamW steps; `ratios`: (part of a key, multiple of the rate)."""
    groups = [{"params": [p], "lr": 3e-3 * next((x for k, x in ratios if k in key), 1)} for key, p in chosen.items()]
    optimizer, losses = torch.optim.AdamW(groups, weight_decay=0.0), []
    for step in range(20):
        torch.manual_seed(step)  # dropout
        loss = model(**given).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def start_of(theirs, model) -> None:
    """peft's A, B and m into our adapter, and (PiSSA, OLoRA) what was taken out of its base as our frozen start."""
    theirs_by = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for delta in deltas(model):
            layer = theirs_by[delta.site.write]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta.lora_A.copy_(a), delta.lora_B.copy_(b)
            if delta.start_A is not None:
                delta.start_A.copy_(a), delta.start_B.copy_(b)
            if hasattr(delta, "lora_magnitude_vector"):
                delta.lora_magnitude_vector.copy_(layer.lora_magnitude_vector["default"].weight)


ORACLES = {
    "lora": ("llama", LoRA(4, 8), {}),
    "rslora": ("llama", LoRA(4, 8, scaling="rslora"), {"use_rslora": True}),
    "lora-plus": ("llama", LoRA(4, 8, lr_ratio=4.0), {}),
    "dora-plus": ("llama", DoRA(4, 8, lr_ratio=4.0), {"use_dora": True}),
    "pissa": ("llama", LoRA(4, 8, init="pissa"), {"init_lora_weights": "pissa"}),
    "olora": ("llama", LoRA(4, 8, init="olora"), {"init_lora_weights": "olora"}),
    "pissa-gpt2": ("gpt2", LoRA(4, 8, init="pissa"), {"init_lora_weights": "pissa"}),
    "dora": ("llama", DoRA(4, 8), {"use_dora": True}),
    "dora-bias": ("bert", DoRA(4, 8), {"use_dora": True}),
    "dora-fused": ("gpt2", DoRA(4, 8), {"use_dora": True}),
    "dora-dropout": ("llama", DoRA(4, 8, dropout=0.3), {"use_dora": True, "lora_dropout": 0.3}),
}


@pytest.mark.parametrize("case", ORACLES)
def test_twenty_steps_are_pefts(case):
    family, method, how = ORACLES[case]
    base = tiny(family)
    model = attach(copy.deepcopy(base), method)
    names = sorted({d.site.write for d in deltas(model)})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=family == "gpt2", **how)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    start_of(theirs, model)
    model.train(), theirs.train()
    given = batch(model, None)
    ours = curve(model, given, trainable(model), [rate for d in deltas(model) for rate in d.rates.items()])
    ratios = [("lora_B", 4.0 if case.endswith("-plus") else 1.0)]
    expected = curve(theirs, given, {n: p for n, p in theirs.named_parameters() if p.requires_grad}, ratios)
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 2e-5
    assert ours[-1] < ours[0] - 0.05
    close(logits(model.eval(), given), logits(theirs.eval(), given), 2e-5)


@pytest.mark.parametrize("how", [{"use_dora": True}, {"use_dora": True, "use_rslora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_foreign_folder_gives_pefts_logits(tmp_path, family, how, capsys):
    base, pattern = tiny(family), {r".*\.[0]\..*(down_proj|mlp\.c_proj)": 2, "o_proj": 6}
    targets = ["q_proj", "down_proj", "o_proj"] if family == "llama" else ["c_attn", "mlp.c_proj"]
    pattern = {k: v for k, v in pattern.items() if family == "llama" or "mlp" in k}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, rank_pattern=pattern,
        alpha_pattern={k: 3 * v for k, v in pattern.items()}, fan_in_fan_out=family == "gpt2", **how,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path / "theirs")
    load(base, tmp_path / "theirs")
    assert "base not verified" in capsys.readouterr().err
    given = batch(base, None)
    close(logits(base, given), logits(theirs, given), 2e-5)
    assert {d.r for d in deltas(base)} == ({2, 4, 6} if family == "llama" else {2, 4})


KEYS = [
    ("q_proj", True),
    ("self_attn.q_proj", True),
    ("_proj", False),
    (r"layers\.\d+\.self_attn\.q_proj", True),
    (r"layers\.1\..*", False),
    ("^model.*q_proj", True),
    ("k_proj|self_attn.q_proj", True),
]


@pytest.mark.parametrize(("key", "expected"), KEYS)
def test_a_patterns_key_means_what_peft_means(key, expected):
    from peft.utils.other import get_pattern_key

    assert (get_pattern_key([key], Q) == key) is expected
    assert peft_lora.means(key, Q) is expected


def test_a_read_start_is_stored_with_its_adapter_and_is_a_plain_lora_to_peft(tmp_path):
    model = attach(tiny("llama"), LoRA(4, 8, init="pissa", targets=("q", "v")))
    stir(model, "default", 0)
    folder = save(model, "default", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tuple(v.shape) for v in tensors.values()} == {(8, 32), (32, 8), (16, 8)}
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(folder)).eval()
    close(logits(theirs, batch(model, None)), logits(model, batch(model)), 2e-5)
    merged = merge(model)
    close(logits(merged, batch(model)), logits(model, batch(model)), 2e-5)


def test_loading_decomposes_nothing(tmp_path, monkeypatch):
    model = attach(tiny("llama"), LoRA(4, init="pissa"))
    folder = save(model, "default", tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("a load computed what it overwrites"))
        other = tiny("llama")
        load(other, folder, "default")
    assert all(torch.equal(v, state(other)[k]) for k, v in state(model).items())
    attach(other, LoRA(4, init="pissa"), "fresh")  # and afterwards starts are read again
    assert any(torch.equal(d.lora_A, e.lora_A) for d, e in zip(deltas(other, "fresh"), deltas(model), strict=True))


# ---- whole runs ------------------------------------------------------------------------------------------------------
made = t.made
config = t.run_of


def weights(folder: Path) -> dict:
    return load_file(next((folder / "adapter").glob("*.safetensors")))


RUNS = {
    "rslora": {"lora": {"r": 4, "scaling": "rslora"}},
    "lora-plus": {"lora": {"r": 4, "lr_ratio": 16, "init": "orthogonal"}},
    "pissa": {"lora": {"r": 4, "init": "pissa"}},
    "olora": {"lora": {"r": 4, "init": "olora", "patterns": {"down": {"r": 2}}}},
    "dora": {"dora": {"r": 4, "dropout": 0.1}},
    "adalora": {"adalora": {"init_r": 6, "r": 4}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_verified_and_resumes_to_the_bit(made, tmp_path, name):
    whole = run(config(made, RUNS[name]), out=tmp_path / "whole")
    assert whole.status == "done"
    assert run(config(made, RUNS[name]), out=tmp_path / "cut", observers=[Signal(step=3)]).status == "interrupted"
    assert resume(tmp_path / "cut").status == "done"
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_lora_plus_moves_b_faster(made, tmp_path):
    """Adam's first step is as long as the rate: B, which starts at zero, is then 16 rates from it."""
    run(config(made, RUNS["lora-plus"], steps=1, lr=1e-3, clip=0.0), out=tmp_path / "run")
    b = [v.abs().max().item() for k, v in weights(tmp_path / "run").items() if "lora_B" in k]
    assert all(abs(most - 16e-3) < 1e-4 for most in b)


@pytest.mark.parametrize(
    "name", [n for n, p in PRESETS.items() if re.search("lora|dora|pissa", n) and "qlora" not in n]
)
def test_presets_of_the_family_are_buildable(name):
    (method,) = build(name)
    big = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}
    assert deltas(attach(tiny("llama", **big), method))


def test_every_preset_is_of_its_paper():
    papers = {"rslora": "2312.03732", "lora-plus": "2402.12354", "pissa": "2404.02948", "olora": "2406.01775",
              "dora-paper": "2402.09353", "adalora-paper": "2303.10512", "lora-paper": "2106.09685"}  # fmt: skip
    assert {name: PRESETS[name]["paper"] for name in papers} == papers
