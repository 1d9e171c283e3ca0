"""Optimizers: the update equations in NumPy, schedules as literal tables, state that survives the disk exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltatune.core.attach import attach, trainable
from deltatune.methods import build
from deltatune.train.optim import Optim, Optimizer, factor
from models import tiny

SCHEDULES = [
    # settings, the factor at steps 0..7 of 8
    ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
    ({"schedule": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ({"schedule": "linear"}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ({"schedule": "linear", "warmup": 0.5}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
    ({"schedule": "linear", "warmup": 4, "floor": 0.2}, [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4]),
    ({"schedule": "cosine"}, [1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]),
    ({"schedule": "polynomial", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 0.5625, 0.25, 0.0625]),
    ({"schedule": "inverse_sqrt", "warmup": 2}, [0.5, 1, 0.816497, 0.707107, 0.632456, 0.57735, 0.534522, 0.5]),
]


@pytest.mark.parametrize(("settings", "factors"), SCHEDULES)
def test_schedules(settings: dict[str, Any], factors: list[float]) -> None:
    optim = Optim(**settings)
    assert [factor(optim, step, 8) for step in range(8)] == pytest.approx(factors, abs=1e-6)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"layer.lora_A": (2, 6), "layer.lora_B": (6, 2), "layer.bias": (6,), "norm.weight": (6,)}
    return {key: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for key, shape in shapes.items()}


def pull(optimizer: Optimizer, steps: range, rate: float = 1.0) -> None:
    """Gradients that are a function of the step alone."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in optimizer.model.values():
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        optimizer.gather()
        optimizer.step(rate)
        optimizer.zero()


def test_adamw_is_the_papers_equation() -> None:
    params = parameters(torch.float64)
    w = params["layer.lora_A"].detach().numpy().copy()
    optimizer = Optimizer(params, Optim(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6))
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        g = torch.randn((2, 6), generator=draw).to(torch.float64).numpy()
        pull(optimizer, range(step, step + 1), rate=0.5)
        lr = 0.1 * 0.5
        w *= 1 - lr * 0.5
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w -= lr * (m / (1 - 0.8 ** (step + 1))) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-6)
    assert np.abs(params["layer.lora_A"].detach().numpy() - w).max() < 1e-12


def test_adafactor_steps_by_the_given_rate() -> None:
    # scale_parameter off, relative_step off: the first update of a vector is g / |g| (its own second moment), times lr
    p = nn.Parameter(torch.zeros(4))
    optimizer = Optimizer({"prompt": p}, Optim(optimizer="adafactor", lr=0.3))
    p.grad = torch.tensor([0.5, -2.0, 1e-3, 4.0])
    optimizer.step(1.0)
    assert p.tolist() == pytest.approx([-0.3, 0.3, -0.3, -0.3], abs=1e-5)


def test_relative_adafactor_finds_its_own_step() -> None:
    # Shazeer & Stern 2018: alpha = max(1e-3, RMS(w)) * min(1e-2, 1 / sqrt(t))
    p = nn.Parameter(torch.full((4,), 2.0))
    optimizer = Optimizer({"w": p}, Optim(optimizer="adafactor-relative", lr=123.0))
    p.grad = torch.tensor([0.5, -2.0, 1e-3, 4.0])
    optimizer.step(1.0)
    assert p.tolist() == pytest.approx([2 - 0.02, 2 + 0.02, 2 - 0.02, 2 - 0.02], abs=1e-5)


DECAYED = [  # model, method, {key's own ending: whether its matrices are decayed}
    ("bert", [{"adapter": {"reduction": 4, "where": ["block"]}}], {"down.weight": True, "up.weight": True}),
    ("llama", "lora", {"lora_A": True, "lora_B": True}),
    ("llama", [{"gate": {"of": [{"lora": {"r": 2}}]}}], {"gate.weight": True, "lora_A": True, "lora_B": True}),
    ("llama", [{"sparse": {"of": [{"lora": {"r": 4}}], "by": "random"}}], {"original": True}),
    ("bert", "diffprune", {"weight.w": True, "weight.gate": False}),
    ("bert", "full", {"dense.weight": True, "word_embeddings.weight": True}),
]


@pytest.mark.parametrize(("family", "method", "expected"), DECAYED, ids=[str(m) for _, m, _ in DECAYED])
def test_a_matrix_is_decayed_by_its_own_name_whatever_its_layer_is_called(family: str, method: Any, expected) -> None:
    tuned = trainable(attach(tiny(family), build(method)))
    optimizer = Optimizer(tuned, Optim(weight_decay=0.5))
    decayed = {id(p) for group in optimizer.inner.param_groups if group["weight_decay"] for p in group["params"]}
    assert not any(id(p) in decayed for p in tuned.values() if p.ndim < 2)
    for ending, wanted in expected.items():
        found = {key: id(p) in decayed for key, p in tuned.items() if p.ndim > 1 and key.endswith(ending)}
        assert set(found.values()) == {wanted}, found


def test_no_decay_on_vectors_biases_and_norms() -> None:
    params = parameters()
    before = {key: p.detach().clone() for key, p in params.items()}
    optimizer = Optimizer(params, Optim(lr=0.1, weight_decay=0.5))
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(1.0)
    moved = {key for key, p in params.items() if not torch.equal(p, before[key])}
    assert moved == {"layer.lora_A", "layer.lora_B"}


def test_ratios_scale_the_rate_of_what_they_match() -> None:
    params = parameters()
    before = {key: p.detach().clone() for key, p in params.items()}
    optimizer = Optimizer(params, Optim(lr=0.01, ratios=(("lora_B", 16.0), ("lora_", 2.0))))
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    moved = {key: float((before[key] - p.detach()).max()) for key, p in params.items()}
    assert moved == pytest.approx(
        {"layer.lora_A": 0.02, "layer.lora_B": 0.16, "layer.bias": 0.01, "norm.weight": 0.01}, rel=1e-4
    )
    with pytest.raises(ValueError, match=r"no trainable parameter matches 'lora_C'.*layer.lora_"):
        Optimizer(params, Optim(ratios=(("lora_C", 2.0),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "adafactor-relative"])
def test_state_survives_the_disk_exactly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    straight = Optimizer(parameters(dtype), Optim(optimizer=name, weight_decay=0.1))
    pull(straight, range(5))
    tensors, state = straight.state()
    save_file(tensors, tmp_path / "o.safetensors")
    text = json.dumps(state)
    copied = {key: nn.Parameter(p.detach().clone()) for key, p in straight.model.items()}
    again = Optimizer(copied, Optim(optimizer=name, weight_decay=0.1))
    again.load_state(load_file(tmp_path / "o.safetensors"), json.loads(text))
    pull(straight, range(5, 9))
    pull(again, range(5, 9))
    for key, p in straight.model.items():
        assert torch.equal(p, again.model[key])
    ours, theirs = straight.state(), again.state()
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert any(key.startswith("master|") for key in ours[0]) == (dtype == torch.bfloat16)


def test_loading_is_strict() -> None:
    optimizer = Optimizer(parameters(), Optim())
    pull(optimizer, range(1))
    tensors, state = optimizer.state()
    fewer = parameters()
    del fewer["layer.bias"]
    with pytest.raises(ValueError, match=r"optimizer state: unexpected \['layer.bias'\]"):
        Optimizer(fewer, Optim()).load_state(tensors, state)
    with pytest.raises(ValueError, match="the checkpoint is of adamw, this run uses adafactor"):
        Optimizer(parameters(), Optim(optimizer="adafactor")).load_state(tensors, state)
    lost = {key: t for key, t in tensors.items() if key != "exp_avg|layer.lora_A"}
    with pytest.raises(ValueError, match=r"optimizer state: missing \['exp_avg.layer.lora_A'\]"):
        Optimizer(parameters(), Optim()).load_state(lost, state)


def test_half_precision_gradients_add_up_in_fp32() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"p": p}, Optim())
    for value in [256.0] + [1.0] * 8:  # bf16 cannot tell 257 from 256
        p.grad = torch.tensor([value], dtype=torch.bfloat16)
        optimizer.gather()
    assert float(optimizer.grads()["p"]) == 264.0


def test_clipping_is_over_all_tensors_together() -> None:
    params = {key: nn.Parameter(torch.zeros(1)) for key in "ab"}
    optimizer = Optimizer(params, Optim())
    params["a"].grad, params["b"].grad = torch.tensor([3.0]), torch.tensor([4.0])
    norm = optimizer.norm()
    assert float(norm) == 5.0
    optimizer.scale(norm, 10.0)
    assert [float(p.grad) for p in params.values()] == [3.0, 4.0]
    optimizer.scale(norm, 1.0)
    assert [float(p.grad) for p in params.values()] == pytest.approx([0.6, 0.8], rel=1e-5)


BAD = [
    ({"lr": 0.0}, "lr=0.0"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"warmup": -1}, "warmup=-1"),
    ({"optimizer": "adam"}, "optimizer='adam': choose from adamw, .*did you mean 'adamw'"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"optimizer": "adafactor-relative", "ratios": (("a", 2.0),)}, "ratios: adafactor-relative"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optim(**settings)
