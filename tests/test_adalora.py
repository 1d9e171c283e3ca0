"""AdaLoRA: equation, importance and budget against the paper by hand, peft's allocator, files that hold kept ranks."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny_run as t
from conformance import batch, close, logits, peft_logits, stir
from deltatune import AdaLoRA, attach, detach, load, merge, save
from deltatune.core.attach import fold, trainable
from deltatune.core.slot import deltas
from deltatune.core.store import state
from deltatune.methods._importance import NAMES
from deltatune.methods.budget import Budget
from deltatune.train.guard import VerificationError
from deltatune.train.run import run
from models import tiny

Q = "model.layers.0.self_attn.q_proj"
QV = [f"model.layers.{i}.self_attn.{w}_proj" for i in (0, 1) for w in ("q", "v")]
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:The following rank_pattern keys:RuntimeWarning",  # peft does not know its own keys
    "ignore:.*invalid shape:peft.utils.warning.PeftWarning",  # nor that a rank may be 0
)


class Some:
    """A member of a budget: `rank` triplets."""

    def __init__(self, rank: int):
        self.rank = rank


def test_y_is_a_scaled_product_of_three():
    model = attach(tiny("llama"), AdaLoRA(3, 2, alpha=12, targets=(Q,)))
    stir(model, "default", 0)
    model.double()
    (d,) = deltas(model)
    layer, x = model.get_submodule(Q), torch.randn(2, 5, 32, dtype=torch.float64)
    a, b, e = (getattr(d, n).detach().clone().requires_grad_() for n in ("lora_A", "lora_B", "lora_E"))
    by_hand = x @ (layer.weight + (12 / 3) * b @ torch.diag(e[:, 0]) @ a).T
    torch.testing.assert_close(layer(x), by_hand, rtol=0, atol=1e-10)
    layer(x).square().sum().backward()
    by_hand.square().sum().backward()
    for name, hand in zip(("lora_A", "lora_B", "lora_E"), (a, b, e), strict=True):
        torch.testing.assert_close(getattr(d, name).grad, hand.grad, rtol=0, atol=1e-8)


def test_dropout_falls_on_what_the_triplets_read_in_training_alone():
    model = attach(tiny("llama"), AdaLoRA(4, 2, dropout=0.5, targets=(Q,)))
    stir(model, "default", 0)
    (delta,), layer = deltas(model), model.get_submodule(Q)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    change = delta.scale * delta.lora_B @ (delta.lora_E * delta.lora_A)
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(layer(x), x @ (layer.weight + change).T, rtol=0, atol=1e-5)
    model.train()
    torch.manual_seed(3)
    said = layer(x)
    torch.manual_seed(3)
    heard = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(said, x @ layer.weight.T + heard @ change.T, rtol=0, atol=1e-5)


def test_it_starts_small_and_random_with_lambda_zero():
    (d,) = deltas(attach(tiny("llama", hidden_size=256, num_attention_heads=4), AdaLoRA(targets=(Q,))))
    assert (d.rank, d.lora_E.any().item()) == (12, False)
    for factor in (d.lora_A, d.lora_B):
        assert abs(factor.std().item() / 0.02 - 1) < 0.05


@pytest.mark.parametrize(("penalty", "power", "share"), [("squares", 2, 1), ("distances", 1, 8)])
def test_the_penalty_is_the_papers_or_the_mean_distance_of_its_program(penalty, power, share):
    """Equation 4 summed over 4 layers: gamma sum_k |P^T P - I|^2 + |Q Q^T - I|^2; value and gradient."""
    model = attach(tiny("llama"), AdaLoRA(3, 2, gamma=0.5, targets=("q", "v"), penalty=penalty))
    stir(model, "default", 0)
    model.double()
    found = [(p, m) for d in deltas(model) for p, m in ((d.lora_A, d.lora_A), (d.lora_B, d.lora_B.T))]
    gaps = [(m.detach() @ m.detach().T - torch.eye(3)) for _, m in found]
    assert len(gaps) == 8
    total = sum(d.penalty() for d in deltas(model))
    assert total.item() == pytest.approx(0.5 / share * sum(g.norm() ** power for g in gaps).item(), rel=1e-9)
    total.backward()
    for (p, m), gap in zip(found, gaps, strict=True):  # d|G|^2/dM = 4 G M
        hand = 0.5 * 4 * gap @ m.detach() / (1 if power == 2 else 16 * gap.norm())
        torch.testing.assert_close(p.grad if p is m else p.grad.T, hand, rtol=0, atol=1e-10)


def test_an_unknown_penalty_is_an_error():
    with pytest.raises(ValueError, match=r"AdaLoRA penalty 'square': choose from squares, distances.*'squares'"):
        AdaLoRA(penalty="square")


#  tinit 2 of 12 steps, tfinal 3: cubic from step 3 to 9, from 40 to 20 triplets
SCHEDULE = {1: 40, 2: 40, 3: 32, 4: 27, 5: 23, 6: 21, 7: 20, 8: 20, 9: 20, 10: 20, 12: 20}


def test_the_budget_is_cubic():
    budget = Budget(2, (2, 3, 1), [Some(4) for _ in range(10)])
    budget.begin(12)
    assert {step: budget.at(step) for step in SCHEDULE} == SCHEDULE
    shares = Budget(2, (0.1, 0.3, 0.01), [Some(4)])
    shares.begin(1000)
    assert (shares.tinit, shares.end) == (100, 700)


@pytest.mark.parametrize(("steps", "shares"), [(1, (0.0, 0.0, 1)), (10, (0.5, 0.5, 1)), (10, (4, 7, 1))])
def test_a_schedule_without_room_is_an_error(steps, shares):
    with pytest.raises(ValueError, match=f"no step to move its budget in: {steps} steps"):
        Budget(2, shares, [Some(4)]).begin(steps)


def grads(d, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for name in NAMES:
        getattr(d, name).grad = torch.randn(getattr(d, name).shape, generator=g)


def test_importance_by_hand_and_the_most_important_of_all_layers_stay():
    model = attach(tiny("llama"), AdaLoRA(4, 1, targets=("q", "v"), tinit=1, tfinal=1, delta_t=1))
    stir(model, "default", 0)
    found = deltas(model)
    seen = {(i, n): [torch.zeros(1), torch.zeros(1)] for i in range(4) for n in NAMES}
    for d in found:
        d.begin(4)
    for step in (1, 2):
        for i, d in enumerate(found):
            grads(d, 10 * step + i)
            for n in NAMES:
                p, pair = getattr(d, n), seen[i, n]
                now = (p * p.grad).abs().detach().double()
                pair[0] = 0.85 * pair[0] + 0.15 * now
                pair[1] = 0.85 * pair[1] + 0.15 * (now - pair[0]).abs()
        kept = [d.lora_E.detach().clone() for d in found]
        for d in found:
            d.after_step(step)
    scores = [
        (seen[i, "lora_E"][0] * seen[i, "lora_E"][1])[:, 0]
        + (seen[i, "lora_A"][0] * seen[i, "lora_A"][1]).mean(1)
        + (seen[i, "lora_B"][0] * seen[i, "lora_B"][1]).mean(0)
        for i in range(4)
    ]
    b = int((16 - 4) * (1 - 1 / 2) ** 3 + 4)
    assert b == 5
    least = torch.cat(scores).sort(descending=True).values[b - 1]
    for d, score, before in zip(found, scores, kept, strict=True):
        assert d.kept.tolist() == (score >= least).tolist()
        torch.testing.assert_close(d.lora_E.detach(), before * (score >= least)[:, None], rtol=0, atol=0)
    assert len({int(d.kept.sum()) for d in found}) > 1  # some layers have more than others


def test_a_pruned_triplet_may_come_back_until_the_end():
    model = attach(tiny("llama"), AdaLoRA(4, 1, targets=(Q,), tinit=0, tfinal=2, delta_t=1))
    stir(model, "default", 0)
    (d,), seen = deltas(model), []
    d.begin(8)
    for step in range(1, 9):
        grads(d, step)
        for name in NAMES:
            getattr(d, name).grad[(step % 4) if name != "lora_B" else slice(None)] *= 10.0**step
        d.after_step(step)
        seen.append(d.kept.tolist())
        with torch.no_grad():
            d.lora_E.add_(0.1)
    assert any(not a and b for before, after in itertools.pairwise(seen) for a, b in zip(before, after, strict=True))
    assert [sum(kept) for kept in seen[-3:]] == [1, 1, 1]
    assert seen[-1] == seen[-2] == seen[-3]


def test_nothing_to_prune_is_not_an_error():
    """peft's kthvalue(k=0) fails here."""
    model = attach(tiny("llama"), AdaLoRA(4, 4, targets=("q",), tinit=0, tfinal=0, delta_t=1))
    found = deltas(model)
    for d in found:
        d.begin(3)
    for step in (1, 2, 3):
        for d in found:
            grads(d, step)
            d.after_step(step)
    assert all(d.kept.all() for d in found)
    fold(model)
    assert [d.rank for d in found] == [4, 4]


# ---- peft's allocator over a schedule driven by hand -----------------------------------------------------------------
@pytest.mark.parametrize(("tinit", "tfinal", "every"), [(3, 5, 2), (0, 0, 1), (2, 10, 3)])
def test_twenty_steps_are_pefts_masks_and_losses(tinit, tfinal, every):
    base = tiny("llama")
    how = {"init_r": 6, "target_r": 3, "lora_alpha": 32, "tinit": tinit, "tfinal": tfinal, "deltaT": every}
    config = peft.AdaLoraConfig(total_step=20, orth_reg_weight=0.1, target_modules=QV, task_type="CAUSAL_LM", **how)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = AdaLoRA(6, 3, 32, targets=tuple(QV), tinit=tinit, tfinal=tfinal, delta_t=every, penalty="distances")
    model = attach(base, ours)  # peft's penalty is the mean of the distances, not the paper's sum of squares
    layers = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for d in deltas(model):
            for name in NAMES:
                getattr(d, name).copy_(getattr(layers[d.site.write], name)["default"])
    given = batch(model, None)
    ours, masks = adapted(model, given)
    expected, their_masks = by_peft(theirs, given)
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 2e-5
    assert masks == their_masks
    assert sum(masks[-1]) == 12
    assert ours[-1] < ours[0] - 0.05
    assert sum(len(set(m)) == 2 for m in masks) > 1
    close(logits(model.eval(), given), logits(theirs.eval(), given), 2e-5)


def adapted(model, given):
    chosen = trainable(model)
    optimizer, losses, masks = torch.optim.AdamW(chosen.values(), lr=1e-2, weight_decay=0.0), [], []
    model.train()
    found = deltas(model)
    for d in found:
        d.begin(20)
    for step in range(1, 21):
        loss = model(**given).loss + sum(d.penalty() for d in found)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        for d in found:
            d.after_step(step)
        optimizer.zero_grad()
        masks.append([bool(e) for d in sorted(found, key=lambda d: d.site.write) for e in d.lora_E])
    return losses, masks


def by_peft(theirs, given):
    chosen = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    optimizer, losses, masks = torch.optim.AdamW(chosen.values(), lr=1e-2, weight_decay=0.0), [], []
    theirs.train()
    for step in range(1, 21):
        loss = theirs(**given).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        masks.append([bool(e) for n, p in sorted(chosen.items()) if "lora_E" in n for e in p])
    return losses, masks


# ---- files -----------------------------------------------------------------------------------------------------------
def pruned(family: str, method: AdaLoRA, ranks):
    """An adapter as it is after a run: of layer i, `ranks[i % len(ranks)]` triplets are left."""
    model = attach(tiny(family), method)
    stir(model, "default", 0)
    for i, d in enumerate(deltas(model)):
        d.budget.allocations, d.budget.steps = 3, 100
        d.kept[ranks[i % len(ranks)] :] = False
        d.mask()
    return model


CASES = [
    ("llama", AdaLoRA(4, 2, targets=("q", "v", "down")), (4, 0, 1, 3)),
    ("llama", AdaLoRA(4, 2, targets=("q", "v")), (4, 4)),
    ("gpt2", AdaLoRA(4, 2, targets=("q", "v", "down")), (1, 3, 0, 2)),
    ("gpt2", AdaLoRA(4, 2), (2, 1, 0)),
    ("bert", AdaLoRA(4, 2), (0, 2)),
]


@pytest.mark.parametrize(("family", "method", "ranks"), CASES)
def test_the_file_holds_the_kept_ranks_and_goes_both_ways(tmp_path, family, method, ranks):
    model = pruned(family, method, ranks)
    live = logits(model, batch(model))
    fold(model)
    close(logits(model, batch(model)), live, 2e-6)
    close(logits(merge(model), batch(model)), live, 2e-5)
    folder = save(model, "default", tmp_path / "a")
    kept = sum(d.rank for d in deltas(model))
    assert kept == sum(ranks[i % len(ranks)] for i in range(len(deltas(model))))
    assert sum(v.shape[0] for k, v in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in k) == kept
    other = tiny(family)
    load(other, folder, "default")
    assert [d.rank for d in deltas(other)] == [d.rank for d in deltas(model)]
    assert state(model).keys() == state(other).keys()
    assert all(torch.equal(v, state(other)[k]) for k, v in state(model).items())
    close(logits(other, batch(other)), logits(model, batch(model)), 0.0)
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(folder)).eval()
    close(peft_logits(theirs, model), live, 2e-5)


@pytest.mark.parametrize(("delta_t", "steps"), [(3, 3), (0.1, 2), (0.01, 1)])
def test_the_schedule_goes_into_pefts_configuration(tmp_path, delta_t, steps):
    model = attach(tiny("llama"), AdaLoRA(4, 2, targets=("q",), tinit=2, tfinal=5, delta_t=delta_t))
    deltas(model)[0].begin(20)
    folder = save(model, "default", tmp_path / "a")
    found = json.loads((folder / "adapter_config.json").read_text())
    assert [found[k] for k in ("total_step", "tinit", "tfinal", "deltaT")] == [20, 2, 5, steps]


def test_a_foreign_pruned_folder_gives_pefts_logits(tmp_path, capsys):
    base = tiny("llama")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=12, total_step=6, target_modules=QV)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    given, optimizer = batch(base, None), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step in range(1, 7):
        theirs(**given).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    load(base, tmp_path / "theirs")
    assert "base not verified" in capsys.readouterr().err
    assert sum(d.rank for d in deltas(base)) == 8
    close(logits(base, given), logits(theirs, given), 2e-5)


def edited(folder: Path, **change) -> Path:
    (folder / "deltatune.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_r": 2}, "says init_r=2, but the tensors of .* have rank 4"),
        ({"init_r": 10**6}, "r=1000000 is above 512"),
        ({"lora_alpha": "much"}, "lora_alpha must be a finite number > 0"),
        ({"beta1": 2}, "AdaLoRA beta1 must be >= 0 and < 1, got 2"),
    ],
)
def test_a_foreign_folder_that_lies_is_refused(tmp_path, change, said):
    model = attach(tiny("llama"), AdaLoRA(4, 2, targets=("q",)))
    folder = edited(save(model, "default", tmp_path / "a"), **change)
    with pytest.raises(ValueError, match=said):
        load(tiny("llama"), folder)


# ---- whole runs ------------------------------------------------------------------------------------------------------
made = t.made


def config(made: Path, **fields):
    return t.run_of(made, {"adalora": {"init_r": 6, "r": 4, **fields}})


def checks(folder: Path) -> dict[str, dict]:
    return {c["name"]: c for c in json.loads((folder / "verified.json").read_text())["checks"]}


def test_a_run_moves_the_budget_and_says_so(made, tmp_path):
    assert run(config(made), out=tmp_path / "run").status == "done"
    said = checks(tmp_path / "run")["budget"]
    assert said["ok"]
    assert "from 84 to 56 triplets (56 planned) in 14 layers" in said["detail"]


def test_a_run_whose_budget_did_not_move_is_not_verified(made, tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "arrive", lambda self, step: None)  # nothing calls the allocator, as elsewhere
    done = run(config(made), out=tmp_path / "run")
    assert done.status == "unverified"
    said = checks(tmp_path / "run")["budget"]
    assert said["ok"] is False
    assert "0 allocations, from 84 to 84 triplets (56 planned)" in said["detail"]


def test_a_run_too_short_for_its_schedule_is_refused(made, tmp_path):
    with pytest.raises((ValueError, VerificationError), match="no step to move its budget in: 6 steps"):
        run(config(made, tinit=5, tfinal=2), out=tmp_path / "run")


def test_parameters_in_half_precision_are_refused():
    model = attach(tiny("llama"), AdaLoRA(4, 2, targets=("q",))).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"gradients in fp32, its parameters are torch\.bfloat16"):
        deltas(model)[0].begin(10)


def test_a_copy_has_a_budget_of_its_own():
    model = attach(tiny("llama"), AdaLoRA(4, 2, targets=("q",)))
    other = copy.deepcopy(model)
    budget = deltas(other)[0].budget
    assert budget is deltas(other)[1].budget is not deltas(model)[0].budget
    assert [id(m) for m in budget.members] == [id(d) for d in deltas(other)]
    detach(model, "default")


MISTAKES = [
    ({"init_r": 4, "r": 5}, "AdaLoRA r=5 is above init_r=4"),
    ({"r": 0}, "AdaLoRA r must be a whole number >= 1, got 0"),
    ({"gamma": -1}, "AdaLoRA gamma must be >= 0, got -1"),
    ({"beta2": 1.0}, r"AdaLoRA beta2 must be >= 0 and < 1, got 1\.0"),
    ({"dropout": 1}, "AdaLoRA dropout must be in"),
    ({"tinit": float("nan")}, "AdaLoRA tinit must be a finite number"),
]


@pytest.mark.parametrize(("fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(fields, said):
    with pytest.raises(ValueError, match=said):
        AdaLoRA(**fields)


def test_a_rank_above_the_layers_size_is_an_error():
    with pytest.raises(ValueError, match=r"AdaLoRA init_r=17 is above the rank of .*k_proj, which is 32 -> 16: 16 is"):
        attach(tiny("qwen"), AdaLoRA(17, 4, targets=("k",)))
