"""A micro-batch of many tokens is computed in several passes: the same steps, less at a time, decided once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import tiny_run as t
from deltatune.config import ConfigError
from deltatune.train import memory, passes
from deltatune.train.job import in_training, prepare
from deltatune.train.run import resume, run
from toys import Journalist

TASKS = {
    "packed": {},
    "padded": {"data": {"packing": "off"}},
    "streamed": {"data": {"streaming": True}},
    "accumulated": {"train": {"accumulate": 2}},
    "known": {"method": {"freeze": {"last": 1}}},
    "classes": {"rows": "label", "objective": "classify"},
    "choices": {"rows": "label", "objective": {"choice": {"labels": {"pos": "good", "neg": "bad"}}}},
    "prompts": {
        "rows": "label",
        "objective": {"choice": {"labels": {"pos": "good", "neg": "bad"}}},
        "method": {"prompt": {"length": 2, "count": 2}},
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    t.chat_model(folder / "model")
    t.chat_rows(folder / "chat.jsonl", 24)
    t.label_rows(folder / "label.jsonl", 24)
    return folder


def config(made, rows="chat", **over):
    train = {"batch_rows": 8, "batch_tokens": None} | over.pop("train", {})
    return t.config(made / "model", str(made / f"{rows}.jsonl"), train=train, **over)


def ran(settings, folder):
    """(losses, the tokens of each pass of each step, weights) of a run."""
    seen: list[list[int]] = []
    watch = Journalist()
    real = passes.parts

    def noted(job, rows):
        found = real(job, rows)
        cost = [job.prompts * memory.Passes.of(job).tokens(row) for row in rows]
        seen.append([sum(cost[i] for i in part) for part in found])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "parts", noted)
        done = run(settings, out=folder, observers=[watch])
    assert done.status == "done"
    losses = [record["loss"] for record in watch.steps]
    return losses, seen, load_file(next((folder / "adapter").glob("*.safetensors")))


@pytest.mark.parametrize("task", TASKS)
def test_steps_are_the_same_however_many_passes_they_take(made, tmp_path, task):
    """Guards against a pass's mean taken for the step's, a row lost or read twice, only the last pass's gradient."""
    one, two = (
        ran(config(made, **TASKS[task] | {"train": TASKS[task].get("train", {}) | {"pass_tokens": most}}), folder)
        for most, folder in (("off", tmp_path / "whole"), (70, tmp_path / "parts"))
    )
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    assert all(torch.allclose(one[2][key], two[2][key], atol=2e-5) for key in one[2])
    assert [len(step) for step in one[1]] == [1] * len(one[1])
    assert [sum(step) for step in one[1]] == [sum(step) for step in two[1]]
    assert max(len(step) for step in two[1]) > 1
    longest = {"prompts": 74}  # one row with both prompts: never parted
    assert max(max(step) for step in two[1]) <= longest.get(task, 70)


LENGTHS = {
    # lengths of a micro-batch's rows, tokens at once, packed -> the places of each pass
    ((30, 20, 10), None, True): [[0, 1, 2]],
    ((30, 20, 10), 60, True): [[0, 1, 2]],
    ((10, 30, 20), 30, True): [[1], [2, 0]],  # what fits beside a shorter row goes there
    ((10, 30, 20), 30, False): [[1], [2], [0]],  # padded, 20 and 10 take 40
    ((10, 30, 10, 10), 40, False): [[1], [0, 2, 3]],  # like lengths together
    ((90, 10, 10), 40, True): [[0], [1, 2]],  # a row is never parted
}


@pytest.mark.parametrize(("given", "wanted"), LENGTHS.items())
def test_the_rows_of_a_pass(made, given, wanted):
    lengths, most, packed = given
    job = prepare(config(made, data={"packing": "on" if packed else "off"}))
    job.pass_tokens = most
    rows = [dataclasses.replace(job.rows[0], ids=(1,) * n, labels=(2,) * n) for n in lengths]
    assert passes.parts(job, rows) == wanted


def test_auto_is_a_fixed_number_on_a_processor_and_is_replayed(made, tmp_path, monkeypatch):
    assert prepare(config(made)).config.train.pass_tokens == "off"  # 8 short rows are one pass
    with monkeypatch.context() as small:
        small.setattr(passes, "ON_CPU", 70)
        whole = run(config(made), out=tmp_path / "straight", observers=())
        cut = run(config(made), out=tmp_path / "cut", observers=[t.Stop()])
    assert (whole.status, cut.status) == ("done", "interrupted")
    assert "pass_tokens: 70\n" in (tmp_path / "cut" / "config.yaml").read_text()
    assert resume(tmp_path / "cut").status == "done"  # where auto would say something else
    one, two = (load_file(next((tmp_path / n / "adapter").glob("*.safetensors"))) for n in ("straight", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_elsewhere_auto_halves_until_it_fits(made, monkeypatch):
    """On a GPU: whole where that fits, then parts of it, and only then are blocks recomputed."""
    job = prepare(config(made))
    monkeypatch.setattr(passes, "LEAST", 16)
    most = memory.batch_tokens(job)
    needed = {n: memory.estimate(dataclasses.replace(job, pass_tokens=n))["total"] for n in (most, most // 2)}
    cases = ((needed[most], None), (needed[most // 2], most // 2), (1, most // 8))  # not below the longest row
    for free, wanted in cases:
        monkeypatch.setattr(memory, "room", lambda job, free=free: free)
        assert passes.fitting(job, most) == wanted


def test_fewer_at_once_are_foreseen_to_take_less(made):
    job = prepare(config(made))
    parts = [memory.estimate(dataclasses.replace(job, pass_tokens=n))["activations"] for n in (None, 100, 70)]
    assert parts == sorted(parts, reverse=True)
    assert parts[0] > parts[1] > parts[2]
    longest = max(row.length for row in job.rows)
    assert memory.at_once(dataclasses.replace(job, pass_tokens=1)) == longest


def test_models_without_known_blocks_and_noise_leave_compiling_alone(made, monkeypatch):
    assert prepare(config(made, train={"steps": 50})).config.train.compile == "auto"
    assert prepare(config(made, train={"steps": 50, "neftune": 5.0})).config.train.compile == "off"
    monkeypatch.setattr("deltatune.train.worth.blocks", lambda model: [])
    assert prepare(config(made, train={"steps": 50})).config.train.compile == "off"


def test_what_a_method_sees_before_step_1_is_whole_micro_batches(made):
    """Guards against a mean over passes: a mask would depend on the machine."""
    found = []
    for most in ("off", 70):
        job = prepare(config(made, train={"pass_tokens": most}))
        with in_training(job):
            found.append(next(job.given().losses()).item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_stream_is_cut_too(made):
    assert prepare(config(made, data={"streaming": True})).pass_tokens == passes.ON_CPU


def test_without_masters_a_micro_batch_is_one_pass(made, monkeypatch):
    """A sum of gradients would be rounded by chance once more with every pass."""
    monkeypatch.setattr(passes, "ON_CPU", 70)
    train = {"rounding": "stochastic", "precision": "bf16"}
    assert prepare(config(made, method="full", train=train)).pass_tokens is None
    assert prepare(config(made)).pass_tokens == 70


@pytest.mark.parametrize("wrong", [0, -3, 1.5, "on", True, "aut"])
def test_other_values_are_refused(made, wrong):
    with pytest.raises((ConfigError, ValueError), match="choose auto, off, or a number of tokens"):
        config(made, train={"pass_tokens": wrong})
