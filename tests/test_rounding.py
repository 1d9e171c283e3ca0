"""bf16 moments and parameters: each rounding is right in the mean, small steps are not lost, chance is (seed, step)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny_run as t
from deltatune.config import Config, ConfigError, load
from deltatune.train import memory, rounding
from deltatune.train.job import prepare
from deltatune.train.optim import Optim, Optimizer
from deltatune.train.rounding import Chance, pieces
from deltatune.train.run import run
from deltatune.train.supported import check_supported
from toys import cut_and_resumed, loop, same, toy, weights

BF16 = torch.bfloat16
ULP = 2.0**-7  # of bf16 in [1, 2)


def written(x: Tensor, seed: int = 0) -> Tensor:
    """x (fp32) in bf16, by chance."""
    into = torch.empty(x.shape, dtype=BF16)
    Chance(seed).put(x, into)
    return into


# ---- one number ------------------------------------------------------------------------------------------------------
SHARES = [0.0, 1 / 65536, 0.01, 0.25, 0.5, 0.75, 0.99]  # of the way to the next bf16


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("start", [1.0, -1.0, 2.0**-126, -(2.0**127), 2.0**-133])
def test_a_number_goes_up_as_often_as_it_is_near(start: float, share: float) -> None:
    count = 2**18
    low = torch.tensor(start).view(torch.int32)
    x, above = (low + int(share * 65536)).view(torch.float32), (low + 65536).view(torch.float32)
    found = written(x.expand(count).contiguous()).float()
    up = found == above
    assert bool((up | (found == low.view(torch.float32))).all())
    allowed = 5 * math.sqrt(max(share * (1 - share), 1 / count) / count)  # five standard deviations
    assert abs(float(up.double().mean()) - share) <= allowed


SPECIAL = [  # bits of an fp32, what bf16 holds of it (None: NaN)
    (0x7F800000, math.inf),
    (0xFF800000, -math.inf),
    (0x7FC00000, None),
    (0xFFC00000, None),
    (0x7FFFFFFF, None),  # adding to it would make -0
    (0xFFFFFFFF, None),  # and here a small number
    (0x7F800001, None),  # cutting it would make infinity
    (0x00000000, 0.0),
    (0x80000000, -0.0),
    (0x7F7F0000, float(torch.finfo(BF16).max)),
]


@pytest.mark.parametrize(("bits", "expected"), SPECIAL, ids=[f"{bits:08x}" for bits, _ in SPECIAL])
def test_what_is_not_finite_or_is_bf16_already_stays(bits: int, expected: float | None) -> None:
    x = torch.tensor(np.full(4096, bits, dtype=np.uint32).view(np.int32)).view(torch.float32)
    found = written(x).float()
    if expected is None:
        assert bool(found.isnan().all())
    else:
        assert bool((found == expected).all())
        assert bool((found.signbit() == (math.copysign(1.0, expected) < 0)).all())


def test_every_bf16_stays_as_it_is() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)
    every = every[every.isfinite()]
    assert torch.equal(written(every.float()).view(torch.int16), every.view(torch.int16))


def test_chance_is_a_function_of_seed_and_step_and_moves_no_other_generator() -> None:
    state = torch.get_rng_state()
    like = torch.empty(5, 3)
    one, two = Chance(1), Chance(1)
    first = one.bits(like)
    assert torch.equal(two.bits(like), first)
    assert not torch.equal(one.bits(like), first)  # the draws of a step differ
    one.begin(1)
    assert not torch.equal(one.bits(like), first)
    one.begin(0)
    assert torch.equal(one.bits(like), first)
    assert not torch.equal(Chance(2).bits(like), first)
    assert (first.shape, first.dtype) == (like.shape, torch.int32)
    assert torch.equal(torch.get_rng_state(), state)
    many = Chance(0).bits(torch.empty(2**20))
    assert (int(many.min()), int(many.max())) == (0, 65535)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (3, 2, 2), (0, 4)])
def test_pieces_are_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rounding.PIECE, "cpu", 4)
    x = torch.arange(math.prod(shape)).reshape(shape)
    found = pieces(x)
    assert torch.equal(torch.cat(list(found)).reshape(shape), x)
    assert all(piece.numel() <= max(4, math.prod(shape[1:])) for piece in found)


# ---- steps -----------------------------------------------------------------------------------------------------------
KINDS = {  # settings -> bytes of state for a number of a bf16 parameter, and dtype of its moments
    "moments": ({"optimizer": "adamw-bf16"}, 8, BF16),
    "parameters": ({"rounding": "stochastic"}, 8, torch.float32),
    "both": ({"optimizer": "adamw-bf16", "rounding": "stochastic"}, 4, BF16),
}


def pull(optimizer: Optimizer, grads: list[Tensor], rate: float = 1.0) -> None:
    """A step for every gradient, given to all parameters."""
    for grad in grads:
        for p in optimizer.model.values():
            p.grad = grad.to(p.dtype)
        optimizer.gather()
        optimizer.step(rate)
        optimizer.zero()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_state(kind: str) -> None:
    settings, size, dtype = KINDS[kind]
    p = nn.Parameter(torch.ones(64, 64, dtype=BF16))
    optimizer = Optimizer({"w": p}, Optim(**settings))
    pull(optimizer, [torch.ones(64, 64)])
    tensors, _ = optimizer.state()
    assert sum(t.nbytes for t in tensors.values()) == size * p.numel()
    assert {t.dtype for name, t in tensors.items() if name.startswith("exp_avg")} == {dtype}
    assert ("master|w" in tensors) == (settings.get("rounding") is None)
    if "rounding" in settings:
        assert optimizer.masters["w"].data_ptr() == p.data_ptr()


def test_the_arithmetic_is_adamws() -> None:
    """On fp32 parameters with fp32 moments nothing is rounded: the same steps as torch's."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(40, 7, generator=draw)
    grads = [torch.randn(40, 7, generator=draw) for _ in range(5)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    how: Any = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    one = rounding.RoundedAdamW([{"params": [ours], "weight_decay": 0.3}], how, torch.float32, Chance(0))
    two = torch.optim.AdamW([theirs], weight_decay=0.3, **how)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        one.step()
        two.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, start, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["parameters", "both"])
def test_a_step_far_below_half_an_ulp_moves_the_mean(kind: str) -> None:
    """Constant gradients: each of 20 AdamW steps is lr. To the nearest, no number would ever leave 1."""
    lr, steps, count = ULP / 200, 20, 2**16
    p = nn.Parameter(torch.ones(count, dtype=BF16))
    settings = {"lr": lr, **KINDS[kind][0]}
    pull(Optimizer({"w": p}, Optim(**settings)), [torch.ones(count)] * steps)
    assert not bool((1 - torch.tensor(lr, dtype=BF16) != 1).any())  # what rounding to the nearest makes of it
    moved = 1 - p.detach().double()
    # below 1 the ulp is half as large; how often each went is binomial
    assert float(moved.mean()) == pytest.approx(steps * lr, rel=0.02)
    assert set(moved.unique().tolist()) <= {0.0, ULP / 2, ULP, 1.5 * ULP, 2 * ULP}


def test_a_second_moment_in_bf16_follows_the_gradients() -> None:
    """Gradients of 1 for 5 steps, then of 0.1: v falls by 0.1 % a step, below half an ulp. To the nearest it stays."""
    p = nn.Parameter(torch.zeros(2**12))
    optimizer = Optimizer({"w": p}, Optim(optimizer="adamw-bf16"))
    v, nearest = 0.0, torch.zeros((), dtype=BF16)
    for g in [1.0] * 5 + [0.1] * 300:
        pull(optimizer, [torch.full((2**12,), g)])
        v = 0.999 * v + 0.001 * g * g
        nearest = (0.999 * nearest.float() + 0.001 * g * g).to(BF16)
    found = float(optimizer.inner.state[p]["exp_avg_sq"].float().mean())
    assert found == pytest.approx(v, rel=0.01)
    assert abs(float(nearest) - v) > 0.05 * v  # the fault


@pytest.mark.parametrize(("settings", "dtype"), [({}, torch.float32), (KINDS["both"][0], BF16)])
def test_micro_batches_add_up(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """256 and 64 times 1 are 320; bf16 cannot tell 257 from 256, and to the nearest it would stay there."""
    p = nn.Parameter(torch.zeros(2**14, dtype=BF16))
    optimizer = Optimizer({"p": p}, Optim(**settings))
    for value in [256.0] + [1.0] * 64:
        p.grad = torch.full_like(p, value)
        optimizer.gather()
    total = optimizer.grads()["p"]
    assert total.dtype == dtype
    assert p.grad is None
    assert float(total.double().mean()) == pytest.approx(320.0, rel=1e-3)


def test_the_norm_of_bf16_gradients_is_not_rounded() -> None:
    p = nn.Parameter(torch.zeros(1001, dtype=BF16))
    optimizer = Optimizer({"p": p}, Optim(rounding="stochastic"))
    p.grad = torch.ones_like(p)
    optimizer.gather()
    assert optimizer.norm().dtype == torch.float32
    assert float(optimizer.norm()) == pytest.approx(math.sqrt(1001), rel=1e-6)
    optimizer.scale(optimizer.norm(), 1.0)
    assert float(optimizer.norm()) == pytest.approx(1.0, rel=2**-8)


def test_pieces_do_not_change_what_is_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments in fp32 and a parameter in fp32 draw nothing, so that the cut is all that differs; transposed, too."""
    found = []
    for most in (2**18, 6):
        monkeypatch.setitem(rounding.PIECE, "cpu", most)
        p = nn.Parameter(torch.arange(35.0).reshape(7, 5).T)
        inner = rounding.RoundedAdamW(
            [{"params": [p], "weight_decay": 0.1}],
            {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8},
            torch.float32,
            Chance(0),
        )
        p.grad = torch.arange(35.0).reshape(5, 7) - 17
        inner.step()
        found.append(p.detach().clone())
    assert torch.equal(*found)


# ---- a run -----------------------------------------------------------------------------------------------------------
RESUMED = [(KINDS[kind][0], BF16) for kind in KINDS] + [(KINDS["moments"][0], torch.float32)]


@pytest.mark.parametrize(("settings", "dtype"), RESUMED)
def test_a_run_resumes_bitwise(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> Any:
        made = loop(tmp_path / folder, model=toy(dtype), steps=8, **{**settings, **options})
        made.run()
        return made

    straight, again = cut_and_resumed(run)
    assert same(weights(again), weights(straight))
    assert same(again.optimizer.state()[0], straight.optimizer.state()[0])
    assert again.optimizer.state()[1] == straight.optimizer.state()[1]
    assert not same(weights(run("c", seed=1)), weights(straight))


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_the_disk_exactly(kind: str, tmp_path: Path) -> None:
    optim = Optim(**KINDS[kind][0], weight_decay=0.1, lr=0.01)
    grads = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    straight = Optimizer({"w": nn.Parameter(torch.ones(3, 4, dtype=BF16))}, optim)
    pull(straight, grads[:5])
    tensors, state = straight.state()
    save_file(tensors, tmp_path / "o.safetensors")
    again = Optimizer({"w": nn.Parameter(straight.model["w"].detach().clone())}, optim)
    again.load_state(load_file(tmp_path / "o.safetensors"), json.loads(json.dumps(state)))
    for one in (straight, again):
        pull(one, grads[5:])
    assert torch.equal(straight.model["w"], again.model["w"])
    assert same(straight.state()[0], again.state()[0])


def test_a_checkpoint_of_another_rounding_is_refused() -> None:
    made = [Optimizer({"w": nn.Parameter(torch.ones(3, dtype=BF16))}, Optim(rounding=r)) for r in rounding.ROUNDINGS]
    with pytest.raises(ValueError, match="the checkpoint has rounding masters, this run has stochastic"):
        made[1].load_state(*made[0].state())


made = t.made
FORESEEN = [  # train -> bytes of gradients and of optimizer for a number of a bf16 parameter
    ({}, 4, 12),
    ({"optimizer": "adamw-8bit"}, 4, 6),
    ({"optimizer": "adafactor"}, 4, 4),
    ({"optimizer": "adamw-bf16"}, 4, 8),
    ({"rounding": "stochastic"}, 2, 8),
    ({"rounding": "stochastic", "optimizer": "adamw-bf16"}, 2, 4),
    ({"rounding": "stochastic", "optimizer": "adamw-bf16", "accumulate": 2}, 4, 4),
]


@pytest.mark.parametrize(("train", "gradients", "optimizer"), FORESEEN)
def test_memory_is_foreseen(made: Path, train: dict[str, Any], gradients: int, optimizer: int) -> None:
    job = prepare(t.run_of(made, "full", precision="bf16", **train))
    found, tuned = memory.estimate(job), job.to_train()
    assert {p.dtype for p in job.trainable().values()} == {BF16}
    assert (found["gradients"], found["optimizer"]) == (gradients * tuned, optimizer * tuned)


# ---- what is refused -------------------------------------------------------------------------------------------------
REFUSED = [
    ({"rounding": "up"}, BF16, "rounding='up': choose from masters, stochastic"),
    ({"rounding": "stochastic", "optimizer": "adafactor"}, BF16, "is for adamw and adamw-bf16, not adafactor"),
    ({"rounding": "stochastic", "optimizer": "adamw-8bit"}, BF16, "is for adamw and adamw-bf16, not adamw-8bit"),
    ({"rounding": "stochastic"}, torch.float32, "what trains here is in float32, .*leave train.rounding at masters"),
    ({"rounding": "stochastic"}, torch.float16, "what trains is in fp16: load the model in bf16"),
]


@pytest.mark.parametrize(("settings", "dtype", "message"), REFUSED)
def test_what_cannot_be_served_is_refused(settings: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizer({"w": nn.Parameter(torch.ones(2, dtype=dtype))}, Optim(**settings))


BEFORE = [  # a run's train section, and what is said before a model is opened
    ({"optimizer": "adafactor"}, "is for the optimizers adamw and adamw-bf16, not adafactor"),
    ({"precision": "fp32"}, "rounding: stochastic is for bf16, .*set train.precision: bf16"),
]


@pytest.mark.parametrize(("train", "message"), BEFORE)
def test_a_run_is_refused_before_its_model_is_opened(train: dict[str, Any], message: str) -> None:
    config = Config(model="nowhere", data="none", train={"rounding": "stochastic", **train})
    with pytest.raises(ValueError, match=message):
        check_supported(config)


def test_where_precision_is_left_to_hardware_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatune.train.opening.best_dtype", lambda: torch.float32)
    with pytest.raises(ValueError, match="what trains here is in float32"):
        prepare(Config(model="nowhere", data="none", train={"rounding": "stochastic"}))


def test_added_parameters_are_fp32_on_a_bf16_base_too(made: Path) -> None:
    with pytest.raises(ValueError, match=r"what trains here is in float32, .*full, freeze, bitfit"):
        prepare(t.run_of(made, "lora", precision="bf16", rounding="stochastic"))


def test_a_whole_run_says_what_it_was(made: Path, tmp_path: Path) -> None:
    """Parameters and moments in bf16, deterministic, through the checks of a finished run; config.yaml repeats it."""
    settings = {"rounding": "stochastic", "optimizer": "adamw-bf16", "deterministic": True, "precision": "bf16"}
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        done = run(t.run_of(made, "full", steps=4, lr=1e-3, **settings), out=folder)
        assert done.status == "done"
        found.append({path.name: path.read_bytes() for path in sorted((folder / "adapter").rglob("*.safetensors"))})
    assert found[0]
    assert found[0] == found[1]
    assert load(tmp_path / "a" / "config.yaml").config.train.rounding == "stochastic"


def test_a_misspelt_rounding_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"train.rounding: 'stochastc'.*did you mean 'stochastic'"):
        Config(model="m", data="d", train={"rounding": "stochastc"})
