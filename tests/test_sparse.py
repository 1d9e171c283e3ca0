"""Pruning at initialisation and task-relevant weights: every score against float64, the mask exact and for good."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as hf
from torch import nn

from conformance import logits
from deltatune import Adapter, Freeze, LoRA, Prefix, Select, Sparse, activate, attach, disabled, load, merge, rows, save
from deltatune.core import scores
from deltatune.core.attach import detach, parameters, prepare, trainable
from deltatune.core.delta import Delta, Given, Refusal
from deltatune.core.scores import SCORES, Seen
from deltatune.core.slot import deltas
from deltatune.core.sparse import keep, thin
from deltatune.core.store import load_state, state
from deltatune.methods import PRESETS, build
from deltatune.train.guard import VerificationError
from deltatune.train.loop import Loop, Settings, Step
from models import inputs, tiny

SMALL = Adapter(8, init="normal", init_std=0.2)
INDEX = "parametrizations.weight.0.index"


def losses_of(model, count: int = 3):
    """Losses of `count` fixed batches, as `Given` wants them."""

    def losses():
        for seed in range(count):
            yield model(**inputs(model, seed=seed)).loss

    return losses


def prepared(method, family: str = "llama", double: bool = False, count: int = 3):
    model = attach(tiny(family), method)
    model = model.double() if double else model
    prepare(model, "default", Given(losses_of(model, count)))
    return model


# ---- the scores against float64 --------------------------------------------------------------------------------------
class Net(nn.Module):
    """y = W2 tanh(W1 x), small enough for every derivative by hand."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w1 = nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.float64))
        self.w2 = nn.Parameter(torch.randn(2, 4, generator=g, dtype=torch.float64))
        self.xs = torch.randn(2, 3, generator=g, dtype=torch.float64)

    def losses(self):
        for x in self.xs:
            yield (self.w2 @ torch.tanh(self.w1 @ x)).square().sum()

    def seen(self) -> Seen:
        owner = Delta()
        return Seen([self.w1, self.w2], [owner, owner], self.losses)


def by_hand(net: Net) -> torch.Tensor:
    """The mean gradient of |W2 tanh(W1 x)|^2, flattened: 2 W2^T y (1 - h^2) x^T, and 2 y h^T."""
    w1, w2, total = net.w1.detach(), net.w2.detach(), 0
    for x in net.xs:
        h = torch.tanh(w1 @ x)
        y = w2 @ h
        g1 = torch.outer(2 * (w2.T @ y) * (1 - h * h), x)
        total = total + torch.cat([g1.flatten(), torch.outer(2 * y, h).flatten()])
    return total / len(net.xs)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_snip_is_gradient_times_weight():
    net = Net()
    expected = (by_hand(net) * flat([net.w1.detach(), net.w2.detach()])).abs()
    torch.testing.assert_close(flat(SCORES["snip"](net.seen())), expected, rtol=0, atol=1e-12)


def test_grasp_is_weight_times_hessian_times_gradient():
    net = Net()
    shapes = [net.w1.shape, net.w2.shape]

    def loss(theta):
        w1, w2 = theta[:12].view(shapes[0]), theta[12:].view(shapes[1])
        return sum((w2 @ torch.tanh(w1 @ x)).square().sum() for x in net.xs) / len(net.xs)

    theta = flat([net.w1.detach(), net.w2.detach()])
    hessian = torch.autograd.functional.hessian(loss, theta)
    kept = [net.w1.detach().clone(), net.w2.detach().clone()]
    found = flat(SCORES["grasp"](net.seen()))
    torch.testing.assert_close(found, theta * (hessian @ by_hand(net)), rtol=1e-6, atol=1e-7)
    assert torch.equal(net.w1, kept[0])
    assert torch.equal(net.w2, kept[1])


def test_synflow_sends_ones_through_absolute_weights():
    net = Net()
    a, b = net.w1.detach().abs(), net.w2.detach().abs()
    # R = sum_oji |W2|_oj |W1|_ji, so each score is the sum of the paths through that weight
    expected = [a * b.sum(0)[:, None], b * a.sum(1)[None]]
    for score, by in zip(SCORES["synflow"](net.seen()), expected, strict=True):
        torch.testing.assert_close(score, by, rtol=0, atol=1e-12)
    sums = [s.sum() for s in SCORES["synflow"](net.seen())]
    torch.testing.assert_close(*sums)  # synaptic flow is conserved from layer to layer


def test_magnitude_and_random():
    net = Net()
    assert torch.equal(SCORES["magnitude"](net.seen())[0], net.w1.detach().abs())
    torch.manual_seed(0)
    first = SCORES["random"](net.seen())
    assert not torch.equal(first[0], SCORES["random"](net.seen())[0])


def test_the_highest_scores_of_all_tensors_together_are_kept_and_one_of_each():
    found = [torch.tensor([[9.0, 8.0], [7.0, 6.0]]), torch.tensor([0.1, 0.3, 0.2])]
    assert [k.tolist() for k in keep(found, 0.5, "x")] == [[0, 1, 2], [1]]
    assert [k.tolist() for k in keep(found, 1.0, "x")] == [[0, 1, 2, 3], [0, 1, 2]]
    with pytest.raises(ValueError, match=r"x density 0\.1 keeps 1 values of 2 tensors"):
        keep(found, 0.1, "x")
    with pytest.raises(ValueError, match=r"every score is 0 in 1 of 2 tensors.*init: normal.*by: random"):
        keep([found[0], torch.zeros(3)], 0.9, "x")


# ---- the mask --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["random", "magnitude", "synflow", "snip", "grasp"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_score_prunes_to_the_density(by, rounds):
    model = prepared(Sparse((SMALL,), density=0.25, by=by, rounds=rounds))
    matrices, vectors = 4 * 2 * 32 * 8, 4 * (8 + 32)
    assert sum(p.numel() for p in trainable(model).values()) == matrices // 4 + vectors
    for delta in deltas(model):
        assert delta.ready
        for layer in (delta.down, delta.up):
            kept = getattr(layer.parametrizations.weight, "0").index.long()
            assert int((layer.weight != 0).sum()) == len(kept)
            assert layer.weight.flatten()[kept].all()


def test_what_is_kept_keeps_its_value_and_scores_highest():
    torch.manual_seed(3)
    whole = attach(tiny("llama"), SMALL)
    torch.manual_seed(3)
    model = attach(tiny("llama"), Sparse((SMALL,), density=0.25, by="magnitude"))
    dense = [layer.weight.detach() for d in deltas(whole) for layer in (d.down, d.up)]
    thinned = [layer.weight.detach() for d in deltas(model) for layer in (d.down, d.up)]
    least = flat(dense).abs().sort(descending=True).values[len(flat(dense)) // 4 - 1]
    for a, b in zip(dense, thinned, strict=True):
        assert torch.equal(b, torch.where(a.abs() >= least, a, 0.0))


def test_training_equals_a_dense_adapter_whose_gradients_are_masked():
    """20 steps of AdamW with weight decay, against the same adapter with its pruned values put back to 0 by hand."""
    torch.manual_seed(3)
    model = attach(tiny("llama").double(), Sparse((SMALL,), density=0.25, by="magnitude"))
    model.double()
    torch.manual_seed(3)
    other = attach(tiny("llama").double(), SMALL).double()
    masks = {}
    with torch.no_grad():
        for ours, theirs in zip(deltas(model), deltas(other), strict=True):
            for a, b in ((ours.down, theirs.down), (ours.up, theirs.up)):
                b.weight.copy_(a.weight)
                masks[b.weight] = a.weight != 0
    ours, theirs = trainable(model), trainable(other)
    one, two = (torch.optim.AdamW(list(ps.values()), lr=1e-2, weight_decay=0.1) for ps in (ours, theirs))
    for step in range(20):
        found = []
        for m, optimizer in ((model, one), (other, two)):
            optimizer.zero_grad()
            loss = m(**inputs(m, seed=step)).loss
            loss.backward()
            if m is other:
                for p, mask in masks.items():
                    p.grad *= mask
            optimizer.step()
            found.append(loss.item())
        assert found[0] == pytest.approx(found[1], abs=1e-10)
    for ours, theirs in zip(deltas(model), deltas(other), strict=True):
        torch.testing.assert_close(ours.down.weight, theirs.down.weight, rtol=0, atol=1e-10)
        assert torch.equal(ours.up.weight == 0, theirs.up.weight == 0)


@pytest.mark.parametrize(
    "method",
    [Sparse((SMALL,), 0.2, "snip"), Select(0.05), Select(0.05, "grad", ("q", "down"))],
    ids=["sparse", "fisher", "grad"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_and_loaded_to_the_last_bit_where_nothing_was_prepared(method, family, tmp_path):
    model = prepared(method, family)
    for p in parameters(model, "default").values():
        p.data += 0.1
    folder, other = save(model, "default", tmp_path / "saved"), tiny(family)
    load(other, folder, "default")
    ours, theirs = state(model), state(other)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    assert all(d.ready for d in deltas(other))
    assert torch.equal(logits(other, inputs(other)), logits(model, inputs(model)))
    load_state(other, "default", theirs)


def test_a_damaged_choice_is_refused():
    model = attach(tiny("llama"), SMALL)
    delta = deltas(model)[0]
    for wrong in ([3, 2], [0, 0], [-1, 2], [0, 256], []):
        with pytest.raises(ValueError, match="positions must rise from 0 or more to less than 256"):
            delta.take_form({f"down.{INDEX}": torch.tensor(wrong, dtype=torch.int32)})
    thin(delta, "down.weight", torch.tensor([1, 5]))
    delta.take_form({f"down.{INDEX}": torch.tensor([2, 7, 9], dtype=torch.int32)})  # chosen anew
    assert delta.down.weight.flatten().nonzero().flatten().tolist() == []  # 1 and 5 were dropped before
    assert list(delta.down.parametrizations.weight.original.shape) == [1, 3]


def test_training_without_the_rows_that_it_chooses_by_is_refused():
    for method in (Sparse((SMALL,)), Select()):
        model = attach(tiny("llama"), method)
        loop = Loop(Step(model, None), trainable(model), lambda step: [], Settings(steps=1))
        with pytest.raises(VerificationError, match="have not seen the training rows they choose by"):
            loop.run()


def test_what_starts_at_zero_cannot_be_scored():
    for by, silent in (("snip", 8), ("magnitude", 4), ("synflow", 8)):
        with pytest.raises(ValueError, match=f"every score is 0 in {silent} of 8 tensors"):
            prepared(Sparse((Adapter(8),), by=by))
    assert prepared(Sparse((LoRA(4),), by="random"))


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no training rows to choose by"):
        prepared(Sparse((SMALL,)), count=0)


@pytest.mark.parametrize("of", [(Freeze(),), (Select(),)], ids=["freeze", "select"])
def test_what_cannot_be_pruned_is_refused(of):
    with pytest.raises(Refusal, match="prunes matrices that a method adds and draws by itself"):
        attach(tiny("llama"), Sparse(of))


def test_synflow_needs_a_chain_and_the_rest_does_not():
    with pytest.raises(Refusal, match="chain of matrices"):
        attach(tiny("llama"), Sparse((Prefix(4),), by="synflow"))
    assert attach(tiny("llama"), Sparse((Prefix(4),), by="random"))


MISTAKES = [
    (Sparse, {"density": 0}, "Sparse density must be a finite number > 0, got 0"),
    (Sparse, {"density": 1.5}, r"0 < density <= 1, got 1\.5"),
    (Sparse, {"by": "snipp"}, "Sparse by 'snipp': choose from random, .*Did you mean 'snip'"),
    (Sparse, {"rounds": 0}, "Sparse rounds must be a whole number >= 1, got 0"),
    (Sparse, {"batches": 1.5}, "Sparse batches must be"),
    (Sparse, {"of": ()}, r"Sparse of \(\) prunes nothing"),
    (Select, {"density": -1}, "Select density must be a finite number > 0, got -1"),
    (Select, {"density": 2}, "0 < density <= 1, got 2"),
    (Select, {"by": "fischer"}, "Select by 'fischer': choose from fisher, grad, magnitude.*Did you mean 'fisher'"),
    (Select, {"rows": 0}, "Select rows must be"),
]


@pytest.mark.parametrize(("method", "fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(method, fields, said):
    with pytest.raises(ValueError, match=said):
        method(**fields)


# ---- selected weights of the base ------------------------------------------------------------------------------------
def dense_gradients(seeds: int):
    """name -> the gradient of each loss with respect to the base's own weight."""
    model, found = tiny("llama").double(), []
    for seed in range(seeds):
        model.zero_grad()
        model(**inputs(model, seed=seed)).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return model, found


@pytest.mark.parametrize("by", ["fisher", "grad", "magnitude"])
def test_the_chosen_weights_are_those_with_the_highest_score(by):
    model, found = dense_gradients(3)
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")]
    weights = {n: model.get_parameter(f"{n}.weight").detach() for n in names}
    score = {
        "fisher": lambda n: sum(g[f"{n}.weight"].square() for g in found),
        "grad": lambda n: (sum(g[f"{n}.weight"] for g in found) / 3 * weights[n]).abs(),
        "magnitude": lambda n: weights[n].abs(),
    }[by]
    every = flat([score(n) for n in names])
    count = math.ceil(0.05 * len(every))
    least = every.sort(descending=True).values[count - 1]
    chosen = prepared(Select(0.05, by, ("q", "down")), double=True)
    for name in names:
        (delta,) = chosen.get_submodule(name).delta_slot.of("default")
        mask = torch.zeros(delta.weight.numel(), dtype=torch.bool)
        mask[getattr(delta.parametrizations.weight, "0").index.long()] = True
        assert torch.equal(mask.view_as(delta.weight), score(name) >= least)


def test_selected_weights_train_as_if_in_place():
    """y = x (W + D)^T and D's gradient is W's at the chosen places; forward and gradient in float64."""
    model = prepared(Select(0.1, targets=("q",)), double=True)
    layer = model.model.layers[0].self_attn.q_proj
    (delta,) = layer.delta_slot.of("default")
    values, index = delta.parametrizations.weight.original, getattr(delta.parametrizations.weight, "0").index.long()
    g = torch.Generator().manual_seed(0)
    values.data = torch.randn(values.shape, generator=g, dtype=torch.float64)
    x, dy = (torch.randn(5, 32, generator=g, dtype=torch.float64) for _ in range(2))
    changed = layer.weight.detach().clone()
    changed.view(-1)[index] += values[0].detach()
    torch.testing.assert_close(layer(x), x @ changed.T, rtol=0, atol=1e-12)
    (layer(x) * dy).sum().backward()
    torch.testing.assert_close(values.grad[0], (dy.T @ x).flatten()[index], rtol=0, atol=1e-12)
    assert torch.equal(merge(model).model.layers[0].self_attn.q_proj.weight != layer.weight, changed != layer.weight)


def test_a_run_over_selected_weights_is_the_one_over_the_bases_own_entries():
    """Ten AdamW steps on D, and on W itself with all other gradients masked: the same weights, in float64. What
    differs is weight decay, which draws D to zero and so W + D to the base, not W to zero."""
    model, plain = prepared(Select(0.1, targets=("q",)), double=True), tiny("llama").double()
    path = "model.layers.0.self_attn.q_proj"
    (delta,) = model.get_submodule(path).delta_slot.of("default")
    index, weight = getattr(delta.parametrizations.weight, "0").index.long(), plain.get_submodule(path).weight
    kept = index.clone()
    mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, index, True).view_as(weight)
    plain.requires_grad_(False)
    weight.requires_grad_(True)
    ours = torch.optim.AdamW([delta.parametrizations.weight.original], lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
    for seed in range(10):
        for one, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            one(**inputs(one, seed=seed)).loss.backward()
            if one is plain:
                weight.grad.mul_(mask)
            optimizer.step()
    tuned = merge(model).get_submodule(path).weight
    assert (tuned - model.get_submodule(path).weight).abs().max() > 0.05
    torch.testing.assert_close(tuned, weight, rtol=0, atol=1e-9)
    assert torch.equal(getattr(delta.parametrizations.weight, "0").index.long(), kept)
    assert torch.equal((tuned != model.get_submodule(path).weight), mask)  # no entry left out, none beside
    stored = delta.stored(model.get_submodule(path))
    assert sum(t.numel() for t in stored.values()) == 2 * len(index)  # a value and a position each


def test_selected_beside_an_adapter_switches_merges_and_mixes():
    base = tiny("llama")
    plain, kept = logits(base, inputs(base)), copy.deepcopy(base.state_dict())
    model = attach(base, [Select(0.05, "magnitude"), Adapter(4)])
    for p in parameters(model, "default").values():
        p.data += 0.1
    live = logits(model, inputs(model))
    assert (live - plain).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(logits(model, inputs(model)), plain)
    activate(model)
    assert torch.equal(logits(model, inputs(model)), plain)
    activate(model, "default")
    with rows(model, ["default", None]):
        mixed = logits(model, inputs(model))
    torch.testing.assert_close(mixed[0], live[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(mixed[1], plain[1], rtol=0, atol=2e-5)
    detach(model, "default")
    assert all(torch.equal(t, kept[k]) for k, t in model.state_dict().items())


# ---- counts ----------------------------------------------------------------------------------------------------------
def test_large_sparse_has_the_parameters_of_the_small_dense_adapter():
    (large,) = build("large-sparse")
    assert PRESETS["large-sparse"]["method"][0]["sparse"]["density"] * large.of[0].bottleneck == 64
    with torch.device("meta"):
        model = hf.AutoModel.from_config(hf.BertConfig())
        found = [d for _, d in large.of[0].deltas(model)]
    sizes = [p.numel() for d in found for p in d.parameters() if p.ndim > 1]
    vectors = sum(p.numel() for d in found for p in d.parameters() if p.ndim == 1)
    assert math.ceil(large.density * sum(sizes)) == 24 * 2 * 768 * 64 == 2_379_264 - 24 * (64 + 768)
    assert vectors == 24 * (256 + 768)  # 0.2 % more in all: biases are not pruned


def test_scores_are_listed_once():
    assert set(SCORES) == {"random", "magnitude", "synflow", "snip", "grasp"}
    assert scores.SCORES is SCORES
