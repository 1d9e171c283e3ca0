"""Adapters on merged weights: the base comes back to the last bit, and nothing else works meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch

from deltatune import (
    IA3,
    Adapter,
    BitFit,
    Full,
    LoRA,
    NewTokens,
    Prefix,
    activate,
    attach,
    detach,
    disabled,
    load,
    merge,
    rows,
    save,
    trainable,
)
from deltatune.core.attach import attached, each, known
from deltatune.core.delta import Refusal
from deltatune.core.fuse import fuse, fused, fused_names, unfuse
from deltatune.core.slot import slots
from models import inputs, tiny
from test_combine import shaken

HALF = [torch.bfloat16, torch.float16]
METHODS = {
    "lora": LoRA(r=4),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "full": Full(),
    "lora+ia3": (LoRA(r=2), IA3()),
    "lora+bitfit": (LoRA(r=2), BitFit()),
    "tokens": NewTokens((7, 9)),
}


def bits(model) -> dict[str, torch.Tensor]:
    """Every base tensor's bits."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    found = {k: t.detach() for k, t in model.named_parameters() if "delta_slot" not in k}
    return {k: t.view(whole[t.dtype]).clone() for k, t in found.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ids(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in inputs(model).items() if k != "labels"}


# ---- deviation 13 ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", METHODS)
def test_the_base_is_restored_bit_for_bit(name, dtype):
    model = shaken(tiny("opt", dtype=dtype), METHODS[name], "one", 1)
    activate(model)
    before, base = bits(model), model(**ids(model)).logits
    activate(model, "one")
    for _ in range(3):
        fuse(model, "one")
        assert not same(bits(model), before)
        unfuse(model)
        activate(model)
        assert same(bits(model), before)
        assert torch.equal(model(**ids(model)).logits, base)
        activate(model, "one")


@pytest.mark.parametrize("dtype", HALF)
def test_subtracting_again_is_not_exact_which_is_why_we_never_do(dtype):
    """What others do: weight += delta, weight -= delta; (IA)^3: weight * l / (l + 1e-8)."""
    model = shaken(tiny("llama", dtype=dtype), LoRA(r=4), "one", 1)
    delta = next(d for _, d in each(model, "one"))
    weight = model.get_submodule(delta.site.write).weight.detach()
    change = (delta.scale * delta.lora_B @ delta.lora_A).to(dtype)
    assert float(((weight + change) - change != weight).double().mean()) > 0.001
    ell = (1 + 0.2 * torch.randn(weight.shape[0], 1)).to(dtype)
    assert float((weight * ell / (ell + 1e-8) != weight).double().mean()) > 0.001


def test_switching_always_starts_from_the_originals():
    model = tiny("llama", dtype=torch.bfloat16)
    before = bits(model)
    for i, name in enumerate("abc"):
        shaken(model, LoRA(r=4, targets=(("q", "v"), ("k", "down"), ("all",))[i]), name, i)
    wanted = {name: bits(merge(model, name)) for name in "abc"}
    for name in "abcabccba":
        fuse(model, name)
        assert same(bits(model), wanted[name])
        assert fused_names(model) == (name,)
    unfuse(model)
    assert same(bits(model), before)
    assert fused_names(model) == ()


# ---- the function ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi3", "bert", "t5"])
@pytest.mark.parametrize("name", ["lora", "ia3", "lora+ia3"])
def test_fused_is_merged_and_runs_no_hook(family, name):
    model = shaken(tiny(family), METHODS[name], "one", 1)
    attached_ones = model(**ids(model)).logits
    merged = merge(model, "one")
    plain = merged(**ids(model)).logits
    with fused(model, "one"):
        assert same(bits(model), bits(merged))
        assert torch.allclose(model(**ids(model)).logits, plain, atol=3e-5)
        assert all(not (s.befores or s.afters) for s in slots(model).values())
    assert torch.allclose(attached_ones, plain, atol=3e-5)
    assert torch.equal(model(**ids(model)).logits, attached_ones)  # what ran before runs again


def test_several_are_fused_one_after_the_other():
    model = shaken(shaken(tiny("llama"), LoRA(r=2), "a", 1), LoRA(r=3, targets=("q",)), "b", 2)
    activate(model, "a", "b")
    wanted = model(**ids(model)).logits
    with fused(model, "a", "b"):
        assert torch.allclose(model(**ids(model)).logits, wanted, atol=3e-5)


def test_originals_are_the_touched_weights_and_nothing_else():
    model = shaken(tiny("llama"), LoRA(r=2, targets=("q",)), "a", 1)
    assert fuse(model, "a").bytes == 2 * 32 * 32 * 4
    unfuse(model)
    assert known(model).fused is None


# ---- the base's own files --------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_originals_can_be_read_from_the_bases_files(folder):
    model = tiny("llama", dtype=torch.bfloat16)
    before = bits(model)
    shaken(model, LoRA(r=4), "a", 1)
    shaken(model, IA3(), "b", 2)
    for name in "abab":
        assert fuse(model, name, base=folder).bytes == 0
        assert not same(bits(model), before)
    unfuse(model)
    assert same(bits(model), before)


def test_files_that_are_not_the_base_are_refused_before_anything_changes(folder, tmp_path):
    model = shaken(tiny("llama", seed=1, dtype=torch.bfloat16), LoRA(r=4), "a", 1)
    before = bits(model)
    with pytest.raises(ValueError, match=r"is not what the model holds.*leave base= out"):
        fuse(model, "a", base=folder)
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        fuse(model, "a", base=tmp_path)
    with pytest.raises(ValueError, match=r"not what the model holds .torch.bfloat16 against torch.float32"):
        fuse(shaken(tiny("llama"), LoRA(r=4), "a", 1), "a", base=folder)
    assert same(bits(model), before)
    assert fused_names(model) == ()
    assert known(model).active == ("a",)


# ---- while fused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "call",
    [
        lambda m, _: activate(m, "a"),
        lambda m, _: activate(m),
        lambda m, _: attach(m, LoRA(), "new"),
        lambda m, _: detach(m, "a"),
        lambda m, _: trainable(m, "a"),
        lambda m, _: merge(m, "a"),
        lambda m, p: save(m, "a", p / "out"),
        lambda m, p: load(m, p / "saved", "again"),
        lambda m, _: rows(m, ["a", None]).__enter__(),
        lambda m, _: disabled(m).__enter__(),
    ],
    ids=["activate", "base", "attach", "detach", "train", "merge", "save", "load", "rows", "disabled"],
)
def test_all_else_is_refused_and_changes_nothing(call, tmp_path):
    model = shaken(tiny("llama"), LoRA(r=4), "a", 1)
    save(model, "a", tmp_path / "saved")
    fuse(model, "a")
    before, wanted = bits(model), model(**ids(model)).logits
    with pytest.raises(ValueError, match=r"'a' is fused into the weights.*unfuse"):
        call(model, tmp_path)
    assert same(bits(model), before)
    assert torch.equal(model(**ids(model)).logits, wanted)
    assert attached(model) == ("a",)
    assert not (tmp_path / "out").exists()


def test_nothing_trains_while_fused_and_everything_does_afterwards():
    model = shaken(tiny("opt"), (LoRA(r=2), BitFit()), "a", 1)
    with fused(model, "a"):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == []
        assert not model(**ids(model)).logits.requires_grad
    activate(model, "a")
    wanted = set(map(id, trainable(model, "a").values()))
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    model(**inputs(model)).loss.backward()
    assert any(p.grad is not None for p in trainable(model, "a").values())


def test_a_copy_of_a_fused_model_finds_its_own_way_back():
    model = shaken(tiny("llama", dtype=torch.bfloat16), LoRA(r=4), "a", 1)
    before = bits(model)
    fuse(model, "a")
    twin = copy.deepcopy(model)
    now = bits(model)
    unfuse(twin)
    assert same(bits(twin), before)
    assert same(bits(model), now)
    assert fused_names(model) == ("a",)


def test_an_error_inside_the_block_restores_too():
    model = shaken(tiny("llama"), LoRA(r=4), "a", 1)
    before = bits(model)
    with pytest.raises(KeyError), fused(model, "a"):
        raise KeyError
    assert same(bits(model), before)


@pytest.mark.parametrize("method", [Adapter(4), Prefix(2)])
def test_methods_without_weights_cannot_be_fused(method):
    model = shaken(tiny("llama"), method, "a", 1)
    before = bits(model)
    with pytest.raises(Refusal, match="no equivalent weight"):
        fuse(model, "a")
    assert same(bits(model), before)
    assert known(model).active == ("a",)


def test_a_tied_weight_is_refused_and_names_are_checked():
    model = shaken(tiny("llama", tie_word_embeddings=True), LoRA(r=2, targets=("lm_head",)), "a", 1)
    with pytest.raises(Refusal, match="another layer shares"):
        fuse(model, "a")
    with pytest.raises(ValueError, match="no adapter 'b'"):
        fuse(model, "b")
    with pytest.raises(ValueError, match="no adapter: name"):
        fuse(model)
    unfuse(tiny("llama"))  # nothing fused, nothing attached: nothing to do
