"""LoRA out of a fully tuned model, out of any linear method, and into a folder that peft reads."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
import transformers as hf

from deltatune import IA3, Adapter, BitFit, Full, Head, LoRA, Prefix, activate, attach, load, merge
from deltatune.core.attach import attached, each, known, parameters, trainable
from deltatune.core.change import Low, changes
from deltatune.core.convert import export_lora, extract, kl, to_lora
from deltatune.core.cost import cost
from deltatune.core.delta import Refusal
from deltatune.core.peft_format import writable
from deltatune.core.store import state
from models import inputs, tiny
from test_combine import change, shaken

Q = "model.layers.0.self_attn.q_proj"


def ids(model, seed: int = 0) -> dict[str, torch.Tensor]:
    return {k: v for k, v in inputs(model, seed=seed).items() if k != "labels"}


def gap_of(tuned, base) -> torch.Tensor:
    return (tuned.get_submodule(Q).weight.double() - base.get_submodule(Q).weight.double()).detach()


def tuned_by(method, family: str = "llama"):
    """A plain model that was tuned by `method` and merged."""
    return merge(shaken(tiny(family), method, "x", 3), "x")


# ---- extraction ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_low_rank_difference_comes_back_whole(family):
    tuned, base = tuned_by(LoRA(r=3, targets=("all",)), family), tiny(family)
    fit = extract(base, tuned, r=3)
    assert fit.error < 1e-5
    assert fit.left == {}
    assert torch.allclose(base(**ids(base)).logits, tuned(**ids(tuned)).logits, atol=3e-5)
    assert attached(base) == ("extracted",)
    assert known(base).active == ("extracted",)


def test_the_remaining_error_is_the_tail_of_the_singular_values():
    tuned, base = tuned_by(Full()), tiny("llama")
    gap = gap_of(tuned, base)
    s = torch.linalg.svdvals(gap)
    fit = extract(base, tuned, r=5)
    assert fit.errors[Q] == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-6)
    assert float((change(base, "extracted", Q) - gap).norm() / gap.norm()) == pytest.approx(fit.errors[Q], rel=1e-4)
    assert set(fit.ranks.values()) == {5}
    assert min(fit.errors.values()) < fit.error < max(fit.errors.values())


def test_what_is_no_matrix_is_listed_with_its_size():
    tuned, base = tuned_by(Full(), "gpt2"), tiny("gpt2")
    fit = extract(base, tuned, r=4, targets=("attention",))
    named = dict(base.named_parameters())
    others = {k for k in named if "delta_slot" not in k and not ("attn.c" in k and k.endswith("weight"))}
    assert set(fit.left) == others  # norms, biases, embeddings, and the layers outside `targets`
    gap = (dict(tuned.named_parameters())["transformer.ln_f.bias"] - named["transformer.ln_f.bias"]).detach()
    assert fit.left["transformer.ln_f.bias"] == pytest.approx(float(gap.norm()), rel=1e-6)


def test_energy_takes_the_least_rank_that_keeps_it():
    tuned, base = tuned_by(Full()), tiny("llama")
    gap = gap_of(tuned, base)
    share = torch.linalg.svdvals(gap).square().cumsum(0) / gap.square().sum()
    fit = extract(base, tuned, energy=0.8)
    assert share[fit.ranks[Q] - 1] >= 0.8 > share[fit.ranks[Q] - 2]
    assert all(error**2 <= 0.2 + 1e-9 for error in fit.errors.values())


@pytest.mark.parametrize(
    ("tuned", "options", "message"),
    [
        (lambda: tiny("llama"), {"r": 2}, "do not differ in any of the 14 target layers; they are equal"),
        (lambda: tuned_by(BitFit(), "opt"), {"r": 2}, "not the same model"),
        (lambda: tiny("llama", vocab_size=99), {"r": 2}, "is .97, 32. in the base and .99, 32. in the tuned"),
        (lambda: tuned_by(Full()), {}, "needs r=... .* or energy="),
        (lambda: tuned_by(Full()), {"r": 0}, "r must be a whole number >= 1"),
        (lambda: tuned_by(Full()), {"energy": 1.5}, "0 < energy <= 1"),
        (lambda: tuned_by(Full()), {"r": 2, "targets": ("qq",)}, "'qq' matches no layer"),
        (lambda: attach(tiny("llama"), LoRA()), {"r": 2}, "two plain models"),
    ],
)
def test_extraction_refuses_what_it_cannot_do(tuned, options, message):
    base = tiny("llama")
    with pytest.raises(ValueError, match=message):
        extract(base, tuned(), **options)
    assert attached(base) == ()


# ---- any linear method as a LoRA -------------------------------------------------------------------------------------
def test_a_loras_own_factors_are_kept_to_the_bit():
    model = shaken(tiny("llama"), LoRA(r=4, alpha=6, patterns={"down": {"r": 2, "alpha": 3}}), "a", 1)
    assert to_lora(model, "a").error == 0
    ours, theirs = parameters(model, "a"), parameters(model, "a_lora")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [d.scale for _, d in each(model, "a")] == [d.scale for _, d in each(model, "a_lora")]


@pytest.mark.parametrize(("init", "r", "rank"), [("pissa", 4, 8), ("olora", 4, 8), ("pissa", 12, 16)])
def test_a_start_out_of_the_base_is_factors_of_twice_the_rank(init, r, rank):
    """B A - B0 A0, exactly; where 2 r is above the layer's own rank (v: 32 -> 16), that of the whole change."""
    model = shaken(tiny("llama"), LoRA(r=r, init=init, targets=("v",)), "a", 1)
    path = "model.layers.0.self_attn.v_proj"
    layer = model.get_submodule(path)
    (delta,) = layer.delta_slot.of("a")
    change = changes(model, "a")[path, "weight"]
    assert isinstance(change, Low)
    fit = to_lora(model, "a")
    assert fit.ranks[path] == rank
    a, b, start = delta.lora_A.double(), delta.lora_B.double(), delta.start_B.double() @ delta.start_A.double()
    wanted = delta.scale * (b @ a - start)
    whole = changes(model, "a_lora")[path, "weight"].full()
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-6)
    assert wanted.norm() > 0.1


def test_ia3_at_full_energy_is_itself_and_at_less_says_how_far_off():
    model = shaken(tiny("llama"), IA3(), "a", 1)
    batches = [ids(model, seed) for seed in range(2)]
    with pytest.raises(ValueError, match=r"of full rank .16.: give a rank .r=, --rank. or a share"):
        to_lora(model, "a")
    assert to_lora(model, "a", "whole", r=32).error < 1e-6
    assert kl(model, "a", "whole", batches) < 1e-9
    some = to_lora(model, "a", "some", energy=0.9)
    assert 0.1 < some.error <= math.sqrt(0.1) + 1e-9
    assert kl(model, "a", "some", batches) > 1e-4
    less = to_lora(model, "a", "less", r=2)
    assert less.error > some.error
    assert kl(model, "a", "less", batches) > kl(model, "a", "some", batches)


def test_spans_are_compared_by_their_ends():
    """Question answering has no logits: the shares of the first and of the last token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForQuestionAnswering.from_config(tiny("bert", num_labels=2).config).eval()
    for seed, name in enumerate("ab", 1):
        shaken(model, LoRA(r=2), name, seed)
    batch = {k: v for k, v in inputs(model).items() if k in ("input_ids", "attention_mask")}
    sides = []
    for name in "ab":
        activate(model, name)
        with torch.no_grad():
            found = model(**batch)
        sides.append(torch.stack([found.start_logits, found.end_logits], 1).double().log_softmax(-1))
    gap = (sides[0].exp() * (sides[0] - sides[1])).sum(-1)
    assert kl(model, "a", "b", [batch]) == pytest.approx(float(gap.mean()), rel=1e-9)
    assert cost(merge(model, "a"), merge(model, "b"), [batch]).kl == pytest.approx(float(gap.mean()), rel=1e-4)


def test_kl_is_the_definition_over_real_positions():
    model = shaken(shaken(tiny("llama"), LoRA(r=2), "a", 1), LoRA(r=2), "b", 2)
    batch = ids(model)
    batch["attention_mask"][0, 5:] = 0
    with torch.no_grad():
        activate(model, "a")
        p = model(**batch).logits.double().softmax(-1)
        activate(model, "b")
        q = model(**batch).logits.double().softmax(-1)
    each_one = (p * (p / q).log()).sum(-1)
    wanted = torch.cat([each_one[0, :5], each_one[1]]).mean()
    assert kl(model, "a", "b", [batch]) == pytest.approx(float(wanted), rel=1e-6)
    assert known(model).active == ("b",)


@pytest.mark.parametrize("method", [BitFit(), IA3(outputs=("v",), inputs=()), (LoRA(r=2), BitFit())])
def test_what_a_lora_cannot_hold_is_refused_or_reported(method):
    model = shaken(tiny("opt"), method, "a", 1)
    with pytest.raises(Refusal, match=r"linear layers' weights, and task heads.*bias.*drop=True"):
        to_lora(model, "a", r=32)
    if isinstance(method, BitFit):
        with pytest.raises(ValueError, match="changes no linear layer's weight"):
            to_lora(model, "a", r=32, drop=True)
        return
    fit = to_lora(model, "a", r=32, drop=True)
    assert fit.left
    assert all(key.endswith("bias") and size > 0 for key, size in fit.left.items())


@pytest.mark.parametrize("method", [Adapter(4), Prefix(2)])
def test_methods_without_weights_are_no_lora(method):
    with pytest.raises(Refusal, match="no equivalent weight"):
        to_lora(shaken(tiny("llama"), method, "a", 1), "a", r=4)


@pytest.mark.parametrize("method", [LoRA(r=2), Full()])
def test_a_task_head_goes_along_whole(method):
    model = shaken(tiny("bert", "classify"), (method, Head()) if isinstance(method, LoRA) else method, "a", 1)
    model.deltatune_state.records["a"] = {"objective": {"classify": {}}}
    head = {k: t.clone() for k, t in state(model, "a").items() if k.startswith("classifier")}
    fit = to_lora(model, "a", "b", r=2, drop=True)
    assert set(head) == {"classifier.weight", "classifier.bias"}
    assert not any(key.startswith("classifier") for key in (*fit.left, *fit.ranks))
    for key, tensor in head.items():
        assert torch.equal(state(model, "b")[key], tensor), key
    assert writable(model, "b") == "LORA"  # with modules_to_save
    assert model.deltatune_state.records["b"] == {"objective": {"classify": {}}}


def test_what_has_to_be_said_for_an_export_is_said_at_once():
    model = shaken(tiny("opt"), Full(), "a", 1)
    with pytest.raises(Refusal, match=r"drop=True \(--drop\) to leave and list them, and energy=0.99"):
        to_lora(model, "a")
    with pytest.raises(ValueError, match=r"its task head alone\): merge it"):
        to_lora(shaken(tiny("bert", "classify"), Head(), "a", 1), "a")


# ---- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is retiring
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LoRA(r=4, alpha=6, patterns={"down": {"r": 2}}), {}),
        (IA3(outputs=("v",), inputs=("down",)), {"r": 32, "drop": True}),
        (Full(), {"r": 32, "drop": True}),
    ],
    ids=["lora", "ia3", "full"],
)
def test_peft_loads_the_folder_with_equal_logits(family, method, options, tmp_path):
    model = shaken(tiny(family), method, "a", 1)
    to_lora(model, "a", "wanted", **options)
    wanted = model(**ids(model)).logits
    activate(model, "a")
    before = (attached(model), known(model).active, known(model).focus)
    export_lora(model, "a", tmp_path / "out", base="some/base", **options)
    assert (attached(model), known(model).active, known(model).focus) == before
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    wrapped = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "out")
    assert torch.allclose(wrapped(**ids(model)).logits, wanted, atol=3e-5)
    assert (wanted - tiny(family)(**ids(model)).logits).abs().max() > 1e-2
    again = tiny(family)
    load(again, tmp_path / "out", "a")
    assert torch.allclose(again(**ids(model)).logits, wanted, atol=1e-5)


def test_an_export_that_is_refused_leaves_nothing_behind(tmp_path):
    model = shaken(tiny("opt"), IA3(), "a", 1)
    with pytest.raises(Refusal):
        export_lora(model, "a", tmp_path / "out", r=4)
    assert attached(model) == ("a",)
    assert known(model).active == ("a",)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_still_train_are_read_without_their_graph():
    """Right after training, what is trained in place asks for gradients: that is no matter of a conversion."""
    model = shaken(tiny("bert"), Full(), "tuned", 1)
    trainable(model, "tuned")
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="of full rank"):
        to_lora(model, "tuned", drop=True)
