"""The fifteen places where existing libraries leave the papers or lose work, and the tests that we pass there.

What a test elsewhere covers is named; what no other file is about is tested here.
"""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conformance import batch, close, logits, stir
from deltatune import (
    IA3,
    AdaLoRA,
    Adapter,
    BitFit,
    LoRA,
    Prefix,
    Prompt,
    PTuning,
    activate,
    attach,
    load,
    merge,
    save,
)
from deltatune.core.attach import fold, parameters, trainable
from deltatune.core.slot import deltas
from deltatune.methods import METHODS
from deltatune.methods._encoders import Recurrent
from models import inputs, tiny

HERE = Path(__file__).parent
# number -> (what must hold, the tests that would fail if it did not)
DEVIATIONS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("a reparametrised prompt resumes exactly, before and after its fold",
        ("test_soft_prompts.py::test_saved_before_or_after_the_fold_it_loads_and_trains_on_exactly",
         "test_soft_runs.py::test_a_job_cut_in_the_middle_goes_on_bitwise")),
    2: ("an encoder-decoder has three prefixes", ("test_soft_prompts.py::test_an_encoder_decoder_has_three_prefixes",)),
    3: ("a prefix trains under gradient checkpointing",
        ("test_soft_prompts.py::test_a_prefix_trains_under_gradient_checkpointing",)),
    4: ("P-tuning is an LSTM of the paper's size by default",
        ("test_soft_prompts.py::test_the_prompt_is_mlp_of_bilstm", "test_soft_prompts.py::test_published_counts",
         "test_deviations.py::test_ptuning_is_the_papers_lstm_by_default")),
    5: ("a prompt starts from words by default",
        ("test_soft_prompts.py::test_vocab_is_sampled_by_the_seed_and_is_the_default",)),
    6: ("AdaLoRA's allocator runs in the loop, and files hold the kept ranks",
        ("test_adalora.py::test_a_run_moves_the_budget_and_says_so",
         "test_adalora.py::test_a_run_whose_budget_did_not_move_is_not_verified",
         "test_adalora.py::test_the_file_holds_the_kept_ranks_and_goes_both_ways",
         "test_adalora.py::test_nothing_to_prune_is_not_an_error")),
    7: ("BitFit trains the base's own biases, all of them, from where they are",
        ("test_bitfit.py::test_the_bases_own_biases_are_trained_from_where_they_are",
         "test_bitfit.py::test_published_counts")),
    8: ("a scaled parallel adapter is scaled", ("test_adapter.py::test_deviation_8_the_scale_really_scales",)),
    9: ("Houlsby starts near the base, with two adapters a block",
        ("test_adapter.py::test_deviation_9_houlsby_starts_near_the_base_with_two_adapters_a_block",)),
    10: ("Houlsby is GELU, from a small truncated normal",
         ("test_adapter.py::test_deviation_10_houlsby_is_gelu_with_a_deviation_of_a_hundredth_cut_at_two",)),
    # its verbalizers, ProtoVerb and KPT, come with prompt learning: here is what a soft template starts from
    11: ("words sampled from the vocabulary are not its first rows",
         ("test_deviations.py::test_sampled_words_are_not_the_first_rows",)),
    # DPO itself comes with alignment: here is the reference that it takes
    12: ("the reference is the policy at step 0, not the raw base",
         ("test_deviations.py::test_the_reference_of_a_tuned_model_is_that_model",
          "test_attach.py::test_the_order_of_dpo_gives_the_same_gradients")),
    13: ("unmerging restores every bit",
         ("test_fuse.py::test_the_base_is_restored_bit_for_bit",
          "test_ia3.py::test_unmerging_is_exact_in_half_precision",
          "test_bitfit.py::test_a_merged_half_precision_bias_is_unmerged_to_the_last_bit")),
    14: ("one typo among several targets is an error",
         ("test_site.py::test_a_target_that_matches_nothing",
          "test_deviations.py::test_one_typo_among_several_targets_is_an_error")),
    15: ("files hold what was trained and no more",
         ("test_store.py::test_the_folder_holds_what_was_trained_and_no_more",
          "test_deviations.py::test_a_file_is_as_large_as_what_trained")),
}  # fmt: skip


def test_the_table_is_whole():
    assert list(DEVIATIONS) == list(range(1, 16))


@pytest.mark.parametrize("test", [t for _, tests in DEVIATIONS.values() for t in tests])
def test_each_is_covered_by_a_test_that_runs(test):
    """It exists, is not skipped or expected to fail, and is not one of the long ones."""
    file, _, name = test.partition("::")
    functions = {f.name: f for f in ast.parse((HERE / file).read_text()).body if isinstance(f, ast.FunctionDef)}
    assert name in functions, f"{file} has no {name}"
    marks = " ".join(ast.unparse(mark) for mark in functions[name].decorator_list)
    assert not any(f"mark.{word}" in marks for word in ("skip", "xfail", "long", "real")), marks
    assert "pytest.skip" not in ast.unparse(functions[name])


# ---- 4 ---------------------------------------------------------------------------------------------------------------
def test_ptuning_is_the_papers_lstm_by_default():
    """14 d^2 + 18 d of encoder: two layers of d / 2 units a direction, then d -> d -> d. peft: an MLP by default, and
    d units a direction in its LSTM."""
    (delta,) = deltas(attach(tiny("llama"), PTuning(3)))
    assert isinstance(delta.encode, Recurrent)
    assert (delta.encode.lstm.hidden_size, delta.encode.lstm.num_layers) == (16, 2)
    assert sum(p.numel() for p in delta.encode.parameters()) == 14 * 32**2 + 18 * 32


# ---- 11 --------------------------------------------------------------------------------------------------------------
def test_sampled_words_are_not_the_first_rows():
    """Over 20 seeds the words of a prompt of 5 are spread over the vocabulary of 97."""
    words = tiny("llama").get_input_embeddings().weight
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        (delta,) = deltas(attach(tiny("llama"), Prompt(5)))
        found = [int((words == row).all(-1).nonzero()) for row in delta.vectors()]
        assert found != list(range(5))
        seen |= set(found)
    assert max(seen) > 80
    assert len(seen) > 40


# ---- 12 --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["beside", "merged"])
def test_the_reference_of_a_tuned_model_is_that_model(how):
    """A new adapter over a tuned one (or over the merged model): KL 0 at step 0, and after training the reference is
    still the tuned model, to the last bit, and not the raw base."""
    model = attach(tiny("llama"), LoRA(r=4), "sft")
    stir(model, "sft", 0)
    given = inputs(model)
    tuned, raw = logits(model, given), logits(tiny("llama"), given)
    model, under = (model, ("sft",)) if how == "beside" else (merge(model, "sft"), ())
    attach(model, LoRA(r=4), "policy")
    activate(model, *under, "policy")
    start = logits(model, given)
    assert kl(start, logits_of_reference(model, under, given)) == 0.0
    close(start, tuned, 0.0 if how == "beside" else 2e-5)
    stir(model, "policy", 1)
    activate(model, *under, "policy")
    assert kl(logits(model, given), start) > 1e-3
    reference = logits_of_reference(model, under, given)
    assert torch.equal(reference, start)
    assert kl(reference, raw) > 1e-3
    own = {id(p) for p in parameters(model, "policy").values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own


def logits_of_reference(model: nn.Module, under: tuple[str, ...], given: dict) -> torch.Tensor:
    activate(model, *under)
    return logits(model, given)


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    """KL(a || b) of the next-token distributions, the largest over positions."""
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).abs().max().detach())


# ---- 14 --------------------------------------------------------------------------------------------------------------
def takes_targets() -> list[str]:
    return [name for name, m in METHODS.items() if {"targets", "outputs"} & set(inspect.signature(m.cls).parameters)]


@pytest.mark.parametrize("name", takes_targets())
def test_one_typo_among_several_targets_is_an_error(name):
    """Every method that takes names of layers: what matches does not hide what does not, and nothing is left behind."""
    method = METHODS[name].cls
    field = "targets" if "targets" in inspect.signature(method).parameters else "outputs"
    good, bad = ("query", "qurey") if name == "bitfit" else ("q", "q_porj")
    model = tiny("bert")
    before = {k: (t.clone(), t.requires_grad) for k, t in model.named_parameters()}
    with pytest.raises(ValueError, match=bad):
        attach(model, method(**{field: (good, bad)}))
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.equal(now[k], t) and now[k].requires_grad == on for k, (t, on) in before.items())


# ---- 15 --------------------------------------------------------------------------------------------------------------
STORED = {
    "lora": ("llama", LoRA(r=4)),
    "adalora": ("llama", AdaLoRA(4, 2)),
    "ia3": ("llama", IA3()),
    "adapter": ("llama", Adapter(4)),
    "bitfit": ("bert", BitFit()),
    "prefix": ("llama", Prefix(3)),
    "prefix-mlp": ("llama", Prefix(3, reparam="mlp", hidden=64)),
    "ptuning": ("llama", PTuning(3)),
}


@pytest.mark.parametrize("case", STORED)
def test_a_file_is_as_large_as_what_trained(tmp_path, case):
    """Numbers in the file <= numbers that trained, after the fold; the file itself has less than 8 KiB beside them."""
    family, method = STORED[case]
    model = attach(tiny(family), method)
    trained = sum(p.numel() for p in trainable(model).values())
    fold(model)
    folder = save(model, "default", tmp_path / "a")
    (file,) = folder.glob("*.safetensors")
    stored = sum(t.numel() for t in load_file(file).values())
    assert 0 < stored <= trained
    if case in ("prefix-mlp", "ptuning"):
        assert stored < trained / 2  # the encoder stays behind
    assert file.stat().st_size < 4 * stored + 8192
    other = copy.deepcopy(tiny(family))
    load(other, folder, "default")
    close(logits(other, batch(other)), logits(model, batch(model)), 0.0)
