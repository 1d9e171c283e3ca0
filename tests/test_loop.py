"""The loop: one step is the same however it is cut, and a run is the same however it is interrupted or watched."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deltatune.train.guard import GuardStop, VerificationError
from deltatune.train.loop import Settings
from deltatune.train.neftune import noise
from toys import WIDTH, Journalist, Rows, Toy, cut_and_resumed, loop, rows, same, toy, weights

SPLITS = ([12], [6, 6], [5, 4, 3], [1] * 12, [11, 1], [2, 3, 7])
STEP_KEYS = {
    "step",
    "loss",
    "lr",
    "grad_norm",
    "targets",
    "tokens",
    "rows",
    "seconds",
    "data_s",
    "gradients_s",
    "update_s",
    "tokens_per_s",
    "rows_per_s",
    "accuracy",
}


def cut(sizes: list[int]) -> list[Rows]:
    ends = np.cumsum(sizes)
    return [rows(list(range(end - size, end))) for size, end in zip(sizes, ends.tolist(), strict=True)]


def gradients(sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, float]:
    model, seen = toy(dtype, dropout=0.0), Journalist()
    with torch.no_grad():
        model.low.lora_B.copy_(torch.linspace(-1, 1, model.low.lora_B.numel()).view_as(model.low.lora_B))
    loop(model=model, batches=lambda step: cut(sizes), steps=1, clip=0.0, observers=[seen]).run()
    return torch.cat([g.flatten() for g in model.low.seen.values()]), seen.steps[0]["loss"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_gradients_do_not_depend_on_how_a_step_is_cut(sizes: list[int], dtype: torch.dtype, tolerance: float) -> None:
    whole, loss = gradients([12], dtype)
    parts, summed = gradients(sizes, dtype)
    assert float(whole.norm()) > 0.01
    assert float((parts - whole).norm() / whole.norm()) <= tolerance
    assert summed == pytest.approx(loss, rel=tolerance)


def test_a_mean_of_means_would_be_caught() -> None:
    # The usual mistake (transformers#34191): every micro-batch weighs the same, whatever it supervises.
    whole, _ = gradients([12], torch.float64)
    parts = [gradients([n], torch.float64)[0] for n in (1, 11)]
    assert float((sum(parts) / 2 - whole).norm() / whole.norm()) > 1e-3


def test_a_step_records_its_figures() -> None:
    seen = Journalist()
    outcome = loop(observers=[seen]).run()
    assert (outcome.status, outcome.progress.step) == ("done", 12)
    assert [record["step"] for record in seen.steps] == list(range(1, 13))
    assert all(set(record) == STEP_KEYS for record in seen.steps)
    assert seen.steps[0]["tokens"] > seen.steps[0]["targets"] > 0
    parts = [seen.steps[0][f"{part}_s"] for part in ("data", "gradients", "update")]
    assert min(parts) > 0
    assert seen.steps[0]["seconds"] == pytest.approx(sum(parts))
    assert seen.ends == [{"status": "done", "step": 12, "best": None, "best_step": None}]


def test_it_learns() -> None:
    loop(steps=70, lr=0.05, observers=[seen := Journalist()]).run()
    assert seen.steps[-1]["loss"] < 0.8 * seen.steps[0]["loss"]


def test_resume_after_a_stop_request_is_bitwise(tmp_path: Path) -> None:
    straight = loop(tmp_path / "a", neftune=2.0)
    straight.run()
    stop = Journalist(at={5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    outcome = loop(tmp_path / "b", neftune=2.0, observers=[stop]).run()
    assert (outcome.status, outcome.signal, outcome.progress.step) == ("interrupted", signal.SIGTERM, 5)
    seen = Journalist()
    again = loop(tmp_path / "b", neftune=2.0, observers=[seen])
    assert again.run().status == "done"
    assert seen.starts[0]["notes"] == ["continuing after step 5"]
    assert same(weights(again), weights(straight))
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 13))


def test_a_crash_costs_one_save_interval_and_repeats_no_line(tmp_path: Path) -> None:
    def crash() -> None:
        raise RuntimeError("out of the blue")

    run = loop(tmp_path, save_every=4, observers=[seen := Journalist(at={7: crash})])
    with pytest.raises(RuntimeError, match="out of the blue"):
        run.run()
    assert seen.ends == [{"status": "failed", "step": 7, "error": "out of the blue"}]
    again, straight = loop(tmp_path, save_every=4, observers=[seen]), loop()
    seen.at = {}
    again.run()
    straight.run()
    assert seen.starts[1]["step"] == 4
    assert same(weights(again), weights(straight))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 13))


def test_a_seed_is_a_run_and_another_seed_another() -> None:
    runs = [loop(seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.run()
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


def draw(*_: Any) -> dict[str, float]:
    return {"loss": float(torch.rand(3).sum()) + random.random() + float(np.random.rand())}


def test_watching_a_run_does_not_change_it(tmp_path: Path) -> None:
    plain = loop(tmp_path / "a")
    watched = loop(
        tmp_path / "b", evaluate=draw, eval_every=2, observers=[Journalist(at=dict.fromkeys(range(13), draw))]
    )
    ends = []
    for run in (plain, watched):
        run.run()
        assert run.store is not None
        ends.append(run.store.latest()[0])
    assert same(ends[0].trainable, ends[1].trainable)
    assert same(ends[0].extra, ends[1].extra)  # every generator stands where it stood
    assert ends[0].state["rng"] == ends[1].state["rng"]


def test_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = draw()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    loop(neftune=1.0).run()
    assert draw() == before


def test_evaluation_runs_in_eval_mode_and_puts_every_flag_back() -> None:
    run = loop(eval_every=5, observers=[seen := Journalist()])
    modes: list[bool] = []

    def evaluate() -> dict[str, float]:
        modes.extend(module.training for module in run.step.modules())
        assert not torch.is_grad_enabled()
        return {"loss": 1.0, "f1": 0.5}

    run.evaluate = evaluate
    run.run()
    assert not any(modes)
    assert all(module.training for module in run.step.modules())
    assert [record["step"] for record in seen.evals] == [5, 10, 12]
    assert seen.evals[0] == {"loss": 1.0, "f1": 0.5, "step": 5, "best": 1.0, "best_step": 5}


CURVES = [
    # metric values, settings, steps run, best step
    ([3.0, 2.0, 2.5, 2.6, 1.0], {"patience": 2}, 4, 2),
    ([3.0, 2.0, 2.5, 1.9, 2.0], {"patience": 2}, 5, 4),
    ([0.1, 0.3, 0.2, 0.1, 0.9], {"patience": 2, "higher_is_better": True}, 4, 2),
    ([float("nan"), 2.0, 3.0, 4.0, 1.0], {"patience": 3}, 5, 5),
    ([3.0, 2.0, 2.5, 2.6, 2.7], {}, 5, 2),
]


@pytest.mark.parametrize(("values", "settings", "steps", "best"), CURVES)
def test_early_stopping(values: list[float], settings: dict[str, Any], steps: int, best: int) -> None:
    left = iter(values)
    run = loop(evaluate=lambda: {"loss": next(left)}, steps=5, eval_every=1, **settings)
    outcome = run.run()
    assert outcome.status == ("early" if steps < 5 else "done")
    assert (outcome.progress.step, outcome.progress.best_step) == (steps, best)


def test_keep_best_ends_with_the_best_weights(tmp_path: Path) -> None:
    left, kept = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0]), dict[str, Tensor]()
    seen = Journalist(at={2: lambda: kept.update(weights(run))})
    run = loop(
        tmp_path, evaluate=lambda: {"loss": next(left)}, steps=6, eval_every=1, save_every=1, keep_best=True,
        observers=[seen],
    )  # fmt: skip
    run.run()
    assert same(weights(run), kept)
    assert [p.name for p in run.store.all()] == ["ckpt-00000006", "ckpt-00000005", "ckpt-00000002"]


def test_a_stop_request_cuts_an_evaluation_short_and_resume_makes_up_for_it(tmp_path: Path) -> None:
    def evaluate() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the request should have ended this evaluation")

    outcome = loop(tmp_path, evaluate=evaluate, eval_every=4).run()
    assert (outcome.status, outcome.progress.step) == ("interrupted", 4)
    again = loop(tmp_path, evaluate=lambda: {"loss": 1.0}, eval_every=4, observers=[seen := Journalist()])
    again.run()
    assert [record["step"] for record in seen.evals] == [4, 8, 12]
    straight = loop()
    straight.run()
    assert same(weights(again), weights(straight))


def test_an_unknown_metric_names_the_measured_ones() -> None:
    with pytest.raises(ValueError, match="metric='f1' is not among what the evaluation measures: accuracy, loss"):
        loop(evaluate=lambda: {"loss": 1.0, "accuracy": 0.0}, eval_every=1, metric="f1").run()


def test_penalties_and_after_step() -> None:
    model = toy(dropout=0.0)
    model.low.strength = 0.5
    run = loop(model=model, steps=2, clip=0.0)
    start = model.low.lora_A.detach().clone()
    plain = toy(dropout=0.0)
    loop(model=plain, steps=1, clip=0.0).run()
    steps_seen = Journalist(at={1: lambda: firsts.update(model.low.seen)})
    firsts: dict[str, Tensor] = {}
    run.observers = [steps_seen]
    run.run()
    # lora_A's own gradient is 0 while lora_B is, so the first one is the penalty's: 2 * 0.5 * A, once per step
    assert torch.allclose(firsts["lora_A"], start, atol=1e-7)
    assert model.low.steps == [1, 2]


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_poisoned_step_leaves_the_weights_as_they_were(policy: str, tmp_path: Path) -> None:
    model, before = toy(), dict[str, Tensor]()
    run = loop(tmp_path, model=model, steps=6, nonfinite=policy)
    clean = run.batches

    def batches(step: int) -> Any:
        if step == 3:
            before.update(weights(run))
            model.head.weight.data[0, 0] = float("nan")
        elif step > 3:
            model.head.weight.data[0, 0] = 0.1
        return clean(step)

    run.batches, run.observers = batches, [seen := Journalist(at={4: lambda: at_four.update(weights(run))})]
    at_four: dict[str, Tensor] = {}
    if policy == "stop":
        with pytest.raises(GuardStop, match=r"step 4: the loss of micro-batch 0 is nan.*toy.jsonl:\d+"):
            run.run()
        assert same(weights(run), before)
        assert seen.ends[0]["status"] == "failed"
    else:
        assert run.run().status == "done"
        assert same(at_four, before)
        assert "gradients are not finite" in seen.steps[3]["skipped"]
        assert not same(weights(run), before)


def test_skipping_for_ever_is_stopped() -> None:
    model = toy()
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(GuardStop, match="step 4"):
        loop(model=model, nonfinite="skip", most_skips=3).run()


def test_a_step_without_targets_is_refused() -> None:
    masked = rows([1, 2])
    masked = Rows(masked.inputs, torch.full_like(masked.labels, -100), masked.where)
    with pytest.raises(GuardStop, match="step 1 has no supervised target"):
        loop(batches=lambda step: [masked]).run()


def test_a_micro_batch_without_targets_weighs_nothing() -> None:
    masked = Rows(rows([1]).inputs, torch.full_like(rows([1]).labels, -100))
    runs = [loop(model=toy(dropout=0.0), batches=lambda step, e=extra: [rows([2, 3]), *e]) for extra in ([], [masked])]
    for run in runs:
        run.run()
    assert same(weights(runs[0]), weights(runs[1]))


def test_a_full_disk_is_announced_and_the_second_time_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop(tmp_path, save_every=2)
    real, calls = os.rename, list[int]()

    def rename(*args: Any) -> None:
        calls.append(1)
        if len(calls) in (2, 4, 5):
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(GuardStop, match="Two saves in a row failed; the last good one is step 6"):
        run.run()
    assert sum("was not saved" in record.message for record in caplog.records) == 3
    found, _ = run.store.latest()
    assert found is not None
    assert found.step == 6
    monkeypatch.undo()
    again, straight = loop(tmp_path, save_every=2), loop()
    again.run()
    straight.run()
    assert same(weights(again), weights(straight))


def test_a_run_that_diverged_is_not_saved(tmp_path: Path) -> None:
    run = loop(
        tmp_path, steps=4, observers=[Journalist(at={3: lambda: run.trainable["model.bias"].data.fill_(torch.inf)})]
    )
    run.trainable = {f"model.{key}": p for key, p in run.trainable.items()}
    run.settings = Settings(steps=3)
    with pytest.raises(GuardStop, match=r"1 of 3 trained tensors are not finite, not saved: model\.bias"):
        run.run()
    assert run.store.all() == []


def test_short_runs_check_that_everything_was_reached() -> None:
    model = toy()
    model.spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(VerificationError, match="1 trainable tensors never had a gradient: spare"):
        loop(model=model, steps=3).run()
    loop(model=model, steps=3, conditional=["spare"]).run()


def test_neftune_noise_is_bounded_private_and_only_in_training() -> None:
    model = toy(torch.float64)
    ids = torch.zeros(1, 5, dtype=torch.long)
    clean = model.embed(ids)
    with noise(model, 3.0, seed=0) as hook:
        hook.start(7)
        state = torch.get_rng_state()
        first, second = model.embed(ids) - clean, model.embed(ids) - clean
        assert torch.equal(torch.get_rng_state(), state)
        hook.start(7)
        assert torch.equal(model.embed(ids) - clean, first)
        assert not torch.equal(first, second)
        assert float(first.detach().abs().max()) <= 3.0 / (5 * WIDTH) ** 0.5
        assert float(first.detach().abs().max()) > 0.8 * 3.0 / (5 * WIDTH) ** 0.5
        hook.lens = (1, 4)  # packed: each sequence has its own length
        packed = (model.embed(ids) - clean).detach().abs()
        assert float(packed[:, 0].max()) > 3.0 / (4 * WIDTH) ** 0.5 or float(packed[:, 0].max()) > float(
            packed[:, 1:].max()
        )
        model.eval()
        assert torch.equal(model.embed(ids), clean)
    assert not model.embed._forward_hooks
    with pytest.raises(ValueError, match="Linear has no token embedding"), noise(nn.Linear(1, 1), 1.0, 0):
        pass


def test_neftune_changes_a_run() -> None:
    runs = [loop(neftune=alpha) for alpha in (0.0, 5.0)]
    for run in runs:
        run.run()
    assert not same(weights(runs[0]), weights(runs[1]))


def test_bf16_parameters_move_by_less_than_their_own_precision() -> None:
    model = toy(torch.bfloat16, dropout=0.0)
    with torch.no_grad():
        model.bias.fill_(1.0)
    run = loop(model=model, lr=1e-4, schedule="constant", weight_decay=0.0, steps=60)
    run.run()
    moved = (run.optimizer.masters["bias"] - 1.0).abs()
    assert float(moved.detach().max()) > 1e-3  # the masters went; bf16 at 1.0 moves in steps of 4e-3 to 8e-3
    assert torch.equal(model.bias, run.optimizer.masters["bias"].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adafactor-relative"])
def test_every_optimizer_resumes_bitwise(optimizer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> Any:
        made = loop(tmp_path / folder, model=toy(dtype), optimizer=optimizer, steps=8, **options)
        made.run()
        return made

    straight, again = cut_and_resumed(run)
    assert same(weights(again), weights(straight))
    assert same(again.optimizer.state()[0], straight.optimizer.state()[0])


def test_unknown_settings_are_explained() -> None:
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        Settings(steps=1, schedule="linaer")
    with pytest.raises(ValueError, match="nonfinite='halt': choose from stop, skip"):
        Settings(steps=1, nonfinite="halt")


def test_changed_settings_are_reported_on_resume(tmp_path: Path) -> None:
    loop(tmp_path, steps=3).run()
    loop(tmp_path, steps=4, lr=5e-3, observers=[seen := Journalist()]).run()
    assert seen.starts[0]["notes"][:2] == [
        "lr was 0.01, is now 0.005: the run will differ",
        "steps was 3, is now 4: the run will differ",
    ]


def test_another_adapter_does_not_resume(tmp_path: Path) -> None:
    loop(tmp_path, steps=2).run()
    other = toy()
    other.bias = nn.Parameter(torch.zeros(1, WIDTH))
    with pytest.raises(ValueError, match=r"1 tensors differ, for instance bias: \(\(8,\), torch.float32\)"):
        loop(tmp_path, model=other, steps=2).run()


def test_toy_is_what_it_says() -> None:
    assert sorted(loop().trainable) == ["bias", "low.lora_A", "low.lora_B"]
    assert isinstance(toy(), Toy)


def test_packed_rows_are_counted_by_their_lengths() -> None:
    from deltatune.data.batch import Batch
    from deltatune.train.measure import figures

    packed = Batch({"input_ids": torch.zeros(1, 9, dtype=torch.long)}, torch.ones(1, 9), (4, 3, 2))
    plain = Batch({"pixel_values": torch.zeros(2, 3, 4, 4)}, torch.tensor([0, 1]))
    found = figures([packed, plain], [torch.tensor(1.0)], {"data": 0.5, "gradients": 1.5}, 1)
    assert (found["rows"], found["tokens"], found["rows_per_s"]) == (5, 9, 2.5)
