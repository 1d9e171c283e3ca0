"""Guards: each is shown the fault it exists for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltatune.train import guard
from deltatune.train.guard import GuardStop, Interrupted, VerificationError, Watch
from deltatune.train.optim import Optim, Optimizer
from toys import NextToken, Toy, loop, rows, toy, trained

NAN, INF = float("nan"), float("inf")
FAULTS = [
    # losses, gradients a and b, what is said
    ([1.0, 2.0], [0.1, 0.2], None),
    ([1.0, NAN], [0.1, 0.2], "the loss of micro-batch 1 is nan"),
    ([INF, 2.0], [0.1, 0.2], "the loss of micro-batch 0 is inf"),
    ([1.0, 2.0], [0.1, NAN], "1 of 2 gradients are not finite: b"),
    ([1.0, NAN], [-INF, NAN], "the loss of micro-batch 1 is nan; 2 of 2 gradients are not finite: a, b"),
    ([1.0, 2.0], [3e38, 3e38], "the gradient norm is inf"),
]


@pytest.mark.parametrize(("losses", "grads", "fault"), FAULTS)
def test_finite(losses: list[float], grads: list[float], fault: str | None) -> None:
    named = {key: torch.tensor([g]) for key, g in zip("ab", grads, strict=True)}
    norm = torch.cat(list(named.values())).norm()
    found = guard.finite([torch.tensor(x) for x in losses], norm, named, ["a.jsonl:3"])
    assert found == (fault and f"{fault} (rows a.jsonl:3)")


def froze(model: Toy) -> None:
    model.low.lora_A.requires_grad_(False)


def replaced(model: Toy) -> None:
    model.low.lora_A = nn.Parameter(model.low.lora_A.detach().clone())


def forgot(model: Toy) -> None:
    model.head.weight.requires_grad_(True)


def untouched(model: Toy) -> None:
    pass


COVERS: list[tuple[Callable[[Toy], None], str | None]] = [
    (untouched, None),
    (froze, r"1 frozen \(requires_grad is off\): low.lora_A"),
    (replaced, r"1 not part of the model \(optimizer built before attach\?\): low.lora_A"),
    (forgot, r"1 require gradients but nobody trains them \(attached twice\?\): model.head.weight"),
]


@pytest.mark.parametrize(("fault", "message"), COVERS)
def test_what_trains_is_what_was_declared(fault: Callable[[Toy], None], message: str | None) -> None:
    model = toy()
    run = loop(model=model, steps=1)
    fault(model)
    if message is None:
        run.run()
    else:
        with pytest.raises(VerificationError, match=message):
            run.run()


def test_the_optimizer_has_exactly_the_trainable_set() -> None:
    model = toy()
    ours = trained(model)
    fewer = {key: p for key, p in ours.items() if key != "bias"}
    with pytest.raises(VerificationError, match="1 not in the optimizer: bias"):
        guard.covers(model, ours, Optimizer(fewer, Optim()).model)
    with pytest.raises(VerificationError, match="1 in the optimizer but not trainable: bias"):
        guard.covers(model, fewer, Optimizer(ours, Optim()).model)
    with pytest.raises(VerificationError, match="nothing to train"):
        guard.covers(model, {}, {})


def test_a_frozen_tensor_with_a_gradient_is_caught() -> None:
    model = toy()
    run = loop(model=model)

    def thaw(step: int) -> list[object]:
        if step == 2:
            model.head.bias.requires_grad_(True)
        return [rows([1, 2])]

    run.batches = thaw
    with pytest.raises(VerificationError, match=r"1 frozen tensors received a gradient: model\.head\.bias"):
        run.run()


class Reentrant(Toy):
    """Reentrant checkpointing over ids: nothing that enters the block requires gradients, so nothing in it gets any."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        block = checkpoint(lambda y: self.drop(self.body(y) + self.low(y)), x, use_reentrant=True)
        return self.head(torch.tanh(block + self.bias))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_caught() -> None:
    with pytest.raises(VerificationError, match=r"2 trainable tensors never had a gradient: low.lora_A, low.lora_B"):
        loop(model=Reentrant(), steps=30).run()
    only = Reentrant()
    only.bias.requires_grad_(False)
    with pytest.raises(VerificationError, match="the loss does not depend on any trainable tensor"):
        loop(model=only, steps=1).run()


class Dead(Toy):
    """The adapter's output is multiplied by zero: gradients come, and are all zero."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.head(torch.tanh(self.body(x) + 0.0 * self.low(x) + self.bias))


def test_an_adapter_without_influence_is_caught_at_step_20() -> None:
    run = loop(model=Dead(), steps=30)
    with pytest.raises(VerificationError, match=r"2 trainable tensors had only zero gradients in 20 steps: low.lora_A"):
        run.run()
    assert run.progress.step == 19
    assert loop(model=Dead(), steps=30, conditional=["lora_"]).run().status == "done"


def test_lora_a_may_be_zero_at_first() -> None:
    watch = Watch(["lora_A", "lora_B"])
    for step in range(20):
        watch.see(step, {"lora_A": torch.full((2,), float(step == 7)), "lora_B": torch.ones(2)})
    assert watch.state() == {"never": [], "zero": []}


def test_the_watch_goes_on_after_a_resume() -> None:
    first = Watch(["a", "b", "c"])
    first.see(0, {"a": torch.ones(1), "b": torch.zeros(1)})
    again = Watch(["a", "b", "c"])
    again.load(first.state())
    assert again.state() == {"never": ["c"], "zero": ["b", "c"]}
    with pytest.raises(VerificationError, match="1 trainable tensors never had a gradient: c"):
        again.see(19, {"a": torch.ones(1), "b": torch.ones(1)})


def test_the_watch_is_over_even_if_its_last_step_was_skipped() -> None:
    with pytest.raises(VerificationError, match="only zero gradients"):
        Watch(["a"]).see(23, {"a": torch.zeros(1)})


def test_frozen_deltas_of_another_run_are_not_called() -> None:
    model = toy()
    assert guard.active(model, trained(model), 3) == [model.low]
    assert model.low.planned == 3
    assert guard.active(model, {"bias": model.bias}, 3) == []


def test_exit_codes() -> None:
    assert (GuardStop.exit_code, VerificationError.exit_code) == (4, 3)
    assert issubclass(GuardStop, ValueError)
    assert issubclass(VerificationError, ValueError)


def test_the_first_signal_asks_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with guard.signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted), stop.aborting():
            raise AssertionError("a request from before ends the evaluation before it starts")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_interrupt_is_not_swallowed_by_except_exception() -> None:
    assert not issubclass(Interrupted, Exception)


def test_the_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\nfrom deltatune.train import guard\n"
        "with guard.signals():\n    os.kill(os.getpid(), signal.SIGINT)\n    print('asked', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (130, "asked\n")


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def inside() -> None:
        with guard.signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_objective_of_the_toys_is_a_sum() -> None:
    model = toy(dropout=0.0)
    one, two = rows([3]), rows([4])
    total = NextToken().loss(model, one)[0] + NextToken().loss(model, two)[0]
    assert torch.allclose(total, NextToken().loss(model, rows([3, 4]))[0])
