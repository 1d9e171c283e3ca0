"""Diff pruning: the gates, the change and its gradient in float64, pruning, and what is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as hf

from conformance import logits
from deltatune import attach, load, merge, save
from deltatune.core.attach import fold, parameters, trainable
from deltatune.core.delta import SLOT
from deltatune.core.hardconcrete import Part, keep_largest
from deltatune.core.slot import deltas
from deltatune.core.store import state
from deltatune.methods import METHODS
from models import inputs, tiny

DiffPrune = METHODS["diffprune"].cls
LAYER = "bert.encoder.layer.0.output.dense"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one(alpha: float = 0.4, **fields):
    """(layer, delta) in float64 with drawn values and gates around `alpha`."""
    model = attach(tiny("bert"), DiffPrune(targets=(LAYER,), alpha=alpha, **fields)).double()
    (delta,) = deltas(model)
    for i, (name, p) in enumerate(delta.named_parameters()):
        p.data = drawn(*p.shape, seed=i) * (1.0 if name.endswith(".w") else 0.5) + (0 if name.endswith(".w") else alpha)
    return model, model.get_submodule(LAYER), delta


def gates(alpha, noise):
    s = sigmoid(alpha + noise)
    return np.clip(s * 3.0 - 1.5, 0, 1)


@pytest.mark.parametrize("training", [True, False], ids=["sampled", "deterministic"])
def test_the_change_is_z_times_w(training):
    _, layer, delta = one()
    delta.train(training)
    x = drawn(2, 5, 48, seed=9)
    own = {n: p.detach().numpy() for n, p in delta.named_parameters()}
    torch.manual_seed(3)
    expected = {}
    for kind in ("weight", "bias"):
        noise = []
        for gate in ("gate", "group"):
            shape = own[f"parts.{kind}.{gate}"].shape
            u = torch.rand(shape, dtype=torch.float64).numpy() if training else np.full(shape, 0.5)
            noise.append(np.log(u) - np.log(1 - u))
        z = gates(own[f"parts.{kind}.gate"], noise[0]) * gates(own[f"parts.{kind}.group"], noise[1])
        expected[kind] = z * own[f"parts.{kind}.w"]
    torch.manual_seed(3)
    weight, bias = (layer.get_parameter(n).detach().numpy() for n in ("weight", "bias"))
    y = x.numpy() @ (weight + expected["weight"]).T + bias + expected["bias"]
    np.testing.assert_allclose(layer(x).detach().numpy(), y, rtol=0, atol=1e-10)


def test_the_gradients_of_w_and_alpha():
    _, layer, delta = one(structured=False)
    x = drawn(1, 1, 48, seed=9)
    layer(x).sum().backward()
    part = delta.parts["weight"]
    alpha, w = part.gate.detach().numpy(), part.w.detach().numpy()
    s = sigmoid(alpha)
    inside = (s * 3 - 1.5 > 0) & (s * 3 - 1.5 < 1)
    dz = np.where(inside, 3 * s * (1 - s), 0)
    np.testing.assert_allclose(part.w.grad.numpy(), gates(alpha, 0) * x.numpy()[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(part.gate.grad.numpy(), w * dz * x.numpy()[0], rtol=0, atol=1e-12)
    assert inside.any()
    assert not inside.all()


def test_the_penalty_is_lambda_times_the_expected_number_of_open_gates():
    _, _, delta = one(l0=1e-3)
    expected = 0.0
    for part in delta.parts.values():  # log(-l / r) = log(1.5 / 1.5) = 0
        expected += sigmoid(part.gate.detach().numpy()).sum() * sigmoid(part.group.item())
    assert delta.penalty().item() == pytest.approx(1e-3 * expected, rel=1e-12)
    delta.penalty().backward()
    a, g = delta.parts["bias"].gate, delta.parts["bias"].group
    by_hand = 1e-3 * torch.sigmoid(a) * (1 - torch.sigmoid(a)) * torch.sigmoid(g)
    torch.testing.assert_close(a.grad, by_hand.detach(), rtol=1e-12, atol=0)
    assert one(l0=0.0)[2].penalty() is None


def test_the_expected_number_is_what_is_drawn():
    """P(z > 0) by drawing: the closed form is the hard-concrete distribution's."""
    part = Part((200_000,), 0.7, False)
    part.w.data.fill_(1.0)
    torch.manual_seed(0)
    assert (part() > 0).double().mean().item() == pytest.approx(part.expected().item() / 200_000, abs=5e-3)


def test_gates_start_open_and_changes_at_zero():
    (delta,) = deltas(attach(tiny("bert"), DiffPrune(targets=(LAYER,))))
    assert torch.equal(delta.parts["weight"].z(False), torch.ones(32, 48))
    assert not delta.parts["weight"].w.any()
    assert delta.rates == {f"parts.{k}.{g}": 1000.0 for k in ("weight", "bias") for g in ("gate", "group")}


def test_pruning_keeps_the_largest_changes_of_all_layers_together():
    parts = [Part((2, 3), 5.0, True), Part((4,), 5.0, True)]
    parts[0].w.data = torch.tensor([[0.1, -3.0, 0.2], [0.3, 0.4, 0.5]])
    parts[1].w.data = torch.tensor([2.0, 0.0, -0.6, 0.05])
    parts[1].group.data.fill_(0.0)  # closed: nothing of the second tensor is left
    keep_largest(parts, 0.3)
    assert parts[0]().tolist() == [[0, -3.0, 0], [0, pytest.approx(0.4), 0.5]]
    assert parts[1]().tolist() == [0, 0, 0, 0]
    assert [len(p.sparse()) for p in parts] == [2, 0]


def test_pruning_fixes_z_times_w_and_the_mask_holds_while_training_goes_on():
    part = Part((4,), 0.4, True)
    part.w.data = torch.tensor([1.0, -2.0, 0.5, 0.1])
    z = float(gates(torch.tensor(0.4).double().numpy(), 0)) ** 2  # the gate's and the group's, both half open
    assert z < 0.1
    keep_largest([part], 0.5)
    assert part.w.tolist() == pytest.approx([z, -2 * z, 0, 0])
    optimizer = torch.optim.SGD([part.w], lr=1.0, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        part().sum().backward()
        assert part.w.grad.tolist() == [1, 1, 0, 0]
        optimizer.step()
    part.w.data += 1.0  # weight decay, noise, whatever moves w: the change stays masked
    assert part()[2:].tolist() == [0, 0]
    assert part()[:2].all()


@pytest.mark.parametrize(("prune_at", "steps", "at"), [(0.5, 10, 5), (0.6, 10, 6), (0.01, 10, 1), (7, 10, 7)])
def test_the_share_of_the_run_after_which_it_prunes(prune_at, steps, at):
    (delta,) = deltas(attach(tiny("bert"), DiffPrune(targets=(LAYER,), prune_at=prune_at)))
    delta.begin(steps)
    for step in range(1, steps):
        delta.after_step(step)
        assert delta.pruned == (step >= at)


def pruned_model(family: str = "bert", density: float = 0.05):
    model = attach(tiny(family), DiffPrune(density=density, prune_at=2))
    for i, p in enumerate(parameters(model, "default").values()):
        p.data.add_(0.1 * drawn(*p.shape, seed=i).float())
    for delta in deltas(model):
        delta.begin(4)
    for delta in deltas(model):
        delta.after_step(1)
    assert not any(d.pruned for d in deltas(model))
    for delta in deltas(model):
        delta.after_step(2)
    assert all(d.pruned for d in deltas(model))
    return model


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3"])
def test_a_pruned_change_is_stored_sparse_and_merges(tmp_path, family):
    model = pruned_model(family)
    given, live = inputs(model), logits(model, inputs(model))
    fold(model)
    assert torch.equal(logits(model, given), live)
    total = sum(p.numel() for d in deltas(model) for p in map(dense_of, d.parts.values()))
    kept = {k: t for k, t in state(model).items() if k.endswith("values")}
    assert sum(t.numel() for t in kept.values()) == round(0.05 * total)
    assert {k.rpartition(".")[2] for k in state(model)} == {"values", "indices"}
    assert sum(p.numel() for p in trainable(model).values()) == round(0.05 * total)
    folder = save(model, "default", tmp_path / "saved")
    other = tiny(family)
    load(other, folder, "default")
    assert torch.equal(logits(other, given), live)
    torch.testing.assert_close(logits(merge(model), given), live, rtol=0, atol=2e-5)


def dense_of(part: Part) -> torch.Tensor:
    return torch.empty(part.shape)


def test_a_merged_weight_is_the_bases_plus_the_change():
    model = pruned_model()
    layer, plain = model.get_submodule(LAYER), merge(model).get_submodule(LAYER)
    change = {k: p().detach() for k, p in getattr(layer, SLOT).of("default")[0].parts.items()}
    for kind in ("weight", "bias"):
        assert torch.equal(plain.get_parameter(kind), layer.get_parameter(kind) + change[kind])
    touched = (plain.weight != layer.weight).double().mean()
    assert 0 < touched < 0.2


def test_an_empty_layer_is_saved_and_loaded(tmp_path):
    """With very few kept entries most tensors have none; they are left out of the file."""
    model = pruned_model(density=1e-4)
    live = logits(model, inputs(model))
    fold(model)
    assert len(state(model)) < len(deltas(model))
    other = tiny("bert")
    load(other, save(model, "default", tmp_path / "saved"), "default")
    assert torch.equal(logits(other, inputs(other)), live)


def test_two_numbers_per_entry_and_one_per_tensor():
    config = hf.BertConfig()
    with torch.device("meta"):
        model = hf.AutoModel.from_config(config)
        found = list(DiffPrune().deltas(model))
    entries = 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768)
    assert sum(p.numel() for _, d in found for p in d.parameters()) == 2 * entries + 2 * 6 * 12


MISTAKES = [
    ({"density": 0.0}, r"density must be a finite number > 0, got 0\.0"),
    ({"density": 1.5}, r"density is a share in 0 < density <= 1, got 1\.5"),
    ({"prune_at": -1}, "prune_at must be a finite number > 0, got -1"),
    ({"prune_at": 2.5}, r"prune_at is a share of the run \(< 1\) or a whole step, got 2\.5"),
    ({"l0": -1e-7}, "l0 must be >= 0, got -1e-07"),
    ({"l0": float("inf")}, "l0 must be a finite number, got inf"),
    ({"alpha_ratio": 0}, "alpha_ratio must be a finite number > 0, got 0"),
    ({"structured": "no"}, "structured must be true or false, got 'no'"),
    ({"alpha": float("nan")}, "alpha must be .* got nan"),
]


@pytest.mark.parametrize(("fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(fields, said):
    with pytest.raises(ValueError, match=f"DiffPrune {said}"):
        DiffPrune(**fields)


def test_a_run_that_ends_before_it_prunes_is_an_error():
    (delta,) = deltas(attach(tiny("bert"), DiffPrune(targets=(LAYER,), prune_at=10)))
    with pytest.raises(ValueError, match="pruning after step 10 of 8 leaves no step"):
        delta.begin(8)


def test_the_saved_manifest_names_the_method(tmp_path):
    model = pruned_model()
    fold(model)
    found = json.loads((save(model, "default", tmp_path / "s") / "deltatune.json").read_text())
    assert found["methods"][0]["diffprune"]["density"] == 0.05
