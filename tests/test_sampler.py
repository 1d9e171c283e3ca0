"""The data order: every row once an epoch, the same from any cursor, and no epoch visited twice to get there."""

from __future__ import annotations

import random

import pytest

from deltatune.train.sampler import Sampler

GROUPS = [
    # micro-batches of an epoch, accumulate -> sizes of the epoch's optimizer steps
    (6, 2, [2, 2, 2]),
    (7, 2, [2, 2, 2, 1]),
    (7, 1, [1] * 7),
    (3, 8, [3]),
]


def plan(epoch: int) -> list[list[int]]:
    """Ten rows; the number of micro-batches changes with the epoch, as it does when rows are packed by length."""
    order = list(range(10))
    random.Random(epoch).shuffle(order)
    size = 2 + epoch % 2
    return [order[i : i + size] for i in range(0, 10, size)]


@pytest.mark.parametrize(("parts", "accumulate", "sizes"), GROUPS)
def test_grouping(parts: int, accumulate: int, sizes: list[int]) -> None:
    sampler = Sampler(lambda epoch: [[i] for i in range(parts)], accumulate)
    assert [len(sampler(step)) for step in range(len(sizes))] == sizes
    assert sampler.steps(3) == 3 * len(sizes)


def test_every_row_once_an_epoch_in_the_plans_order() -> None:
    sampler = Sampler(plan, accumulate=2)
    for epoch in range(5):
        steps = range(sampler.steps(epoch), sampler.steps(epoch + 1))
        assert [part for step in steps for part in sampler(step)] == plan(epoch)
        assert sorted(row for step in steps for part in sampler(step) for row in part) == list(range(10))


CURSORS = [(0, 0, 0), (2, 0, 2), (3, 1, 0), (4, 1, 1), (5, 2, 0), (8, 3, 0), (9, 3, 1), (10, 4, 0)]


@pytest.mark.parametrize(("step", "epoch", "position"), CURSORS)
def test_cursor(step: int, epoch: int, position: int) -> None:
    # epochs of 5 and 4 micro-batches in turn, in pairs: 3, 2, 3, 2, ... steps
    assert Sampler(plan, 2).state(step) == {"step": step, "epoch": epoch, "position": position}


@pytest.mark.parametrize("at", range(14))
def test_resume_from_any_step_gives_the_same_order(at: int) -> None:
    straight = Sampler(plan, 2)
    again = Sampler(plan, 2)
    again.load(straight.state(at))
    assert [again(step) for step in range(at, at + 9)] == [straight(step) for step in range(at, at + 9)]


def test_steps_may_be_asked_in_any_order() -> None:
    straight, mixed = Sampler(plan, 2), Sampler(plan, 2)
    order = [9, 0, 13, 4, 9, 2]
    assert [mixed(step) for step in order] == [straight(step) for step in order]


def test_resume_visits_no_epoch_but_its_own() -> None:
    asked: list[int] = []

    def counted(epoch: int) -> list[list[int]]:
        asked.append(epoch)
        return plan(epoch)

    sampler = Sampler(counted, 2)
    sampler.load({"step": 93, "epoch": 37, "position": 1})
    sampler(93)
    assert asked == [37]


def test_other_data_are_noticed() -> None:
    with pytest.raises(ValueError, match="stands at step 3 of epoch 0, which has 3 steps: these are not the data"):
        Sampler(plan, 2).load({"step": 3, "epoch": 0, "position": 3})


def test_impossible_samplers() -> None:
    with pytest.raises(ValueError, match="accumulate=0"):
        Sampler(plan, 0)
    with pytest.raises(ValueError, match="epoch 0 has no batches"):
        Sampler(lambda epoch: [])(0)
