"""What a run's steps cannot do without: counted as torch counts what it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deltatune import attach
from deltatune.data.batch import Batch
from deltatune.methods.bitfit import BitFit
from deltatune.methods.freeze import Freeze, Full
from deltatune.objectives import SFT
from deltatune.train.step import Step
from deltatune.train.work import Work
from models import tiny

IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # torch's counter leaves it out
IDS = torch.arange(3, 27).view(2, 12)


def counted(model: Any, objective: Any, batch: Batch) -> tuple[Work, int]:
    """(what Work says of a step, what torch ran in it)."""
    step = Step(model, objective).train()
    step(batch)  # asks once how the model finishes its logits: no part of a step
    work, counter = Work(step), FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counter:
        step(batch)[0].backward()
    return work, counter.get_total_flops()


def rows(labels: torch.Tensor) -> Batch:
    return Batch({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, labels)


@pytest.mark.parametrize("method", [Full(), BitFit(), Freeze(last=1)])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_it_counts_what_torch_runs(family: str, method: Any) -> None:
    """Products alone: torch has no count of the CPU's fused attention, so ours is left out of it."""
    model = tiny(family)
    attach(model, method, name="a")
    labels = IDS.clone()
    labels[:, :4] = -100
    work, ran = counted(model, SFT(), rows(labels))
    work.attention.clear()
    assert work.flops() == ran


def test_padding_is_no_work() -> None:
    """Rows of 12 and 6 tokens: three quarters of the products, and of attention the squares of the lengths."""
    model = tiny("opt")
    attach(model, BitFit(), name="a")
    step = Step(model, SFT()).train()
    work = Work(step)
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    labels = torch.full_like(IDS, -100)
    labels[0, 3:5] = 7
    step(Batch({"input_ids": IDS, "attention_mask": mask}, labels))
    config = model.config
    half = 4 * config.hidden_size / 2
    first = sum(2.0 * k * n * rows for (k, n), rows in work.products.items())
    head = 2 * 2.0 * config.hidden_size * config.vocab_size * 2
    assert len(work.head) == 2
    deep = 3 * config.num_hidden_layers
    assert work.flops() == 0.75 * first + head + deep * half * (12**2 + 6**2)


def test_a_floor_is_timed_and_leaves_no_trace() -> None:
    model = tiny("llama")
    attach(model, Freeze(last=1), name="a")
    work, _ = counted(model, SFT(), rows(IDS.clone().index_fill(1, torch.tensor([0]), -100)))
    assert work.record() == {}  # no step has told its seconds
    work.on_step({"seconds": 2.0})
    before = torch.random.get_rng_state()
    found = work.record()
    assert torch.equal(before, torch.random.get_rng_state())
    assert found["of_floor"] == found["floor_seconds"] / 2.0 > 0
    assert found["flops"] == work.flops() > 0
