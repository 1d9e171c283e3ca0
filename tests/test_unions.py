"""Several methods in one list, or one inside another: each keeps its ids, its life and its place in a merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_run as t
from conformance import close, logits
from deltatune import DoRA, Gate, LoRA, Prompt, PTuning, SpotTune, attach, load, merge, save
from deltatune.core.attach import activate, parameters
from deltatune.core.change import changes, full
from deltatune.core.delta import inmost
from deltatune.core.fuse import fuse, unfuse
from deltatune.core.slot import deltas
from deltatune.core.store import prompt_sets
from deltatune.methods.adalora import AdaLoRA
from deltatune.methods.diffprune import DiffPrune
from deltatune.methods.ia3 import IA3
from deltatune.methods.low_rank import LowRank
from deltatune.train import guard
from deltatune.train.job import prepare as prepare_job
from deltatune.train.run import run
from deltatune.train.verify import budget_moved, merges
from models import inputs, tiny


def shaken(model: nn.Module, method, name: str = "default", seed: int = 1) -> nn.Module:
    """`method` attached, its values moved by a draw."""
    attach(model, method, name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters(model, name).values():
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p))
    return model


def given(model: nn.Module) -> dict:
    return {k: v for k, v in inputs(model).items() if k != "labels"}


# ---- soft prompts of one list ----------------------------------------------------------------------------------------
LISTS = [
    ([Prompt(2), Prompt(3)], ((97, 98, 99, 100, 101),)),
    ([PTuning(2, encoder="mlp"), Prompt(1), PTuning(2)], ((97, 98, 99, 100, 101),)),
    ([Prompt(2, count=2), PTuning(1, encoder="mlp")], ((97, 98, 101), (99, 100, 101))),
]


@pytest.mark.parametrize(("methods", "ids"), LISTS)
def test_each_soft_prompt_of_a_list_has_ids_of_its_own(tmp_path, methods, ids):
    model = attach(tiny("llama"), methods)
    assert prompt_sets(model) == ids
    attach(model, Prompt(2), "next")
    assert prompt_sets(model, "next")[0][0] == 1 + max(i for own in ids for i in own)
    activate(model, "default")
    said = model.get_input_embeddings()(torch.tensor(ids[0]))
    own = torch.cat([d.vectors()[: d.length] for d in deltas(model, "default")])
    close(said, own, 0.0)
    other = tiny("llama")
    load(other, save(model, "default", tmp_path / "a"), "default")
    assert prompt_sets(other) == ids
    close(other.get_input_embeddings()(torch.tensor(ids[0])), said, 0.0)


# ---- DoRA among others -----------------------------------------------------------------------------------------------
OTHERS = {
    "lora": LoRA(4), "pissa": LoRA(4, init="pissa"), "adalora": AdaLoRA(4, 2), "ia3": IA3(), "dora": DoRA(2),
    "diffprune": DiffPrune(alpha=0.5),
}  # fmt: skip


PLACES = [("llama", other) for other in OTHERS] + [("gpt2", "lora"), ("gpt2", "ia3"), ("bert", "diffprune")]


@pytest.mark.parametrize("first", [False, True], ids=["dora last", "dora first"])
@pytest.mark.parametrize(("family", "other"), PLACES)
def test_dora_in_any_company_merges_fuses_and_changes_as_it_runs(other, family, first):
    """||V|| is the base's whatever runs before; the reviewer's LoRA + DoRA was off by 1.87 logits."""
    order = [DoRA(4), OTHERS[other]] if first else [OTHERS[other], DoRA(4)]
    model = shaken(tiny(family), order)
    live = logits(model, given(model))
    close(logits(merge(model), given(model)), live, 2e-5)
    found = changes(model, "default")
    merged = merge(model)
    for (path, key), change in found.items():
        base, now = (m.get_submodule(path).get_parameter(key).double() for m in (model, merged))
        told = full(change).T if family == "gpt2" and key == "weight" else full(change)
        assert (now - base - told).abs().max() < 2e-6
    apart = shaken(shaken(tiny(family), order[0], "a", 1), order[1], "b", 2)
    activate(apart, "a", "b")
    live = logits(apart, given(apart))
    fuse(apart, "a", "b")
    close(logits(apart, given(apart)), live, 2e-5)
    unfuse(apart)
    close(logits(apart, given(apart)), live, 0.0)


def test_a_dora_over_a_lora_drops_only_what_the_base_and_itself_read():
    """In training with dropout too, what LoRA added is scaled with the direction."""
    model = shaken(tiny("llama"), [LoRA(4, targets=("q",)), DoRA(4, dropout=0.5, targets=("q",))]).train()
    path = "model.layers.0.self_attn.q_proj"
    layer, (lora, dora) = model.get_submodule(path), deltas(model)[:2]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(4)
    said = layer(x)
    torch.manual_seed(4)
    heard = torch.nn.functional.dropout(x, 0.5)
    gain = dora.lora_magnitude_vector / dora.norm(layer.weight)
    low = dora.scale * heard @ dora.lora_A.T @ dora.lora_B.T
    added = lora.scale * x @ lora.lora_A.T @ lora.lora_B.T
    # y + (g - 1) (W x' + LoRA) + g s B A x': W x itself stays whole once, as in the paper's program
    by_hand = x @ layer.weight.T + added + (gain - 1) * (heard @ layer.weight.T + added) + gain * low
    close(said, by_hand, 2e-5)


# ---- a method inside another -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("outer", [Gate, SpotTune])
def test_the_life_of_an_inner_delta_goes_on_inside(outer):
    """begin, penalty and after_step reach it once: a budget that is told twice would allocate twice."""
    torch.manual_seed(0)
    model = attach(tiny("llama"), outer(of=(AdaLoRA(4, 2, targets=("q", "v"), tinit=1, tfinal=1, delta_t=1),)))
    told = guard.active(model, parameters(model, "default"), 6)
    inner = [inmost(d) for d in deltas(model) if inmost(d) is not d]
    assert len(inner) == 4
    budget = inner[0].budget
    assert (budget.steps, budget.first) == (6, 16)
    charged = [p.item() for d in told if (p := d.penalty()) is not None]
    assert sorted(charged) == sorted(d.penalty().item() for d in inner)
    for step in range(1, 7):
        model(**inputs(model, seed=step)).loss.backward()
        for delta in told:
            delta.after_step(step)
    assert budget.allocations == 4  # steps 2, 3, 4 and 5
    assert sum(int(d.kept.sum()) for d in inner) == 8


def test_a_delta_alone_knows_the_inner_ones_penalty():
    """What the loop asks of a wrapper is the inner delta's: DiffPrune's L0 is not lost in a gate."""
    model = attach(tiny("llama"), Gate(of=(DiffPrune(alpha=0.5, l0=1.0, targets=("q",)),)))
    wrapped = [d for d in deltas(model) if inmost(d) is not d]
    assert all(d.penalty().item() == d.inner.penalty().item() > 0 for d in wrapped)
    wrapped[0].begin(10)
    assert wrapped[0].inner.at == 6


# ---- what a run checks -----------------------------------------------------------------------------------------------
made = t.made
config = t.run_of


def test_every_budget_has_to_move(made):
    """Two AdaLoRAs in a list have two budgets: the second one standing still is seen, wrapped or not."""
    ada = {"init_r": 4, "r": 2, "tinit": 1, "tfinal": 1, "delta_t": 1}
    lists = [{"adalora": {**ada, "targets": ["q"]}}, {"gate": {"of": [{"adalora": {**ada, "targets": ["v"]}}]}}]
    job = prepare_job(config(made, lists))
    inner = [inmost(d) for d in deltas(job.model) if hasattr(inmost(d), "budget")]
    budgets = list(dict.fromkeys(d.budget for d in inner))
    assert len(budgets) == 2
    for budget in budgets:
        budget.steps, budget.first, budget.allocations = 6, 8, 1
    for delta in inner:
        delta.cut(torch.tensor([True, True, False, False]))
    (check,) = budget_moved(job)
    assert check.ok
    assert check.detail.count("1 allocations, from 8 to 4 triplets (4 planned) in 2 layers") == 2
    budgets[1].allocations = 0
    (check,) = budget_moved(job)
    assert check.ok is False


def test_two_soft_prompts_train_in_one_run(made, tmp_path):
    """The LSTM's recurrent weights got no gradient where both prompts meant the same ids."""
    both = [{"prompt": {"length": 2}}, {"ptuning": {"length": 3}}]
    outcome = run(config(made, both, steps=22), out=tmp_path / "run")
    assert outcome.status == "done"


def test_a_merge_that_is_a_little_wrong_is_seen(made, monkeypatch):
    """KL alone passes a few hundredths of a logit: the gap is measured against the logits' size."""
    job = prepare_job(config(made, {"lora": {"r": 4}}))
    with torch.no_grad():
        for p in job.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert merges(job).ok
    right = LowRank.merged

    def wrong(self, dense):
        return {"weight": dense.weight + 1.02 * (right(self, dense)["weight"] - dense.weight)}

    monkeypatch.setattr(LowRank, "merged", wrong)
    check = merges(job)
    assert float(check.detail.split()[1]) < 1e-3  # nats
    assert check.ok is False
