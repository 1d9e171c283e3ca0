"""Guard: small named checks that stop a run before it is wasted, and the signals that stop it on request."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import Wrapped


class GuardStop(ValueError):
    """A check stopped the run; the weights are those from before the offending step."""

    exit_code = 4


class VerificationError(ValueError):
    """The run does not train what it says it trains."""

    exit_code = 3


class Interrupted(BaseException):
    """Raised inside an evaluation when a stop was asked for. Not an error, so `except Exception` lets it pass."""


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names of a long list, and how many more there are."""
    listed = sorted(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def finite(losses: Sequence[Tensor], norm: Tensor, grads: Mapping[str, Tensor], where: Sequence[str]) -> str | None:
    """What is not finite, and in which rows, before the optimizer steps; None when all is well.

    losses: one scalar per micro-batch, norm: of all gradients. Costs one synchronisation when all is finite.
    """
    if bool(torch.isfinite(torch.stack([*(x.double() for x in losses), norm.double()])).all()):
        return None
    bad = [f"the loss of micro-batch {i} is {float(x)}" for i, x in enumerate(losses) if not torch.isfinite(x)]
    if wrong := [key for key, g in grads.items() if not torch.isfinite(g).all()]:
        bad.append(f"{len(wrong)} of {len(grads)} gradients are not finite: {few(wrong)}")
    return f"{'; '.join(bad or [f'the gradient norm is {float(norm)}'])} (rows {few(where) or 'unknown'})"


def covers(module: nn.Module, trainable: Mapping[str, nn.Parameter], stepped: Mapping[str, nn.Parameter]) -> None:
    """Trained, reachable and optimised are the same set, or VerificationError says which tensors differ and how."""
    if not trainable:
        raise VerificationError("nothing to train: the adapter has no parameters, or none was attached")
    wants = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    inside = {id(p) for p in module.parameters()}
    wrong = {
        "not part of the model (optimizer built before attach?)": [
            k for k, p in trainable.items() if id(p) not in inside
        ],
        "frozen (requires_grad is off)": [k for k, p in trainable.items() if not p.requires_grad],
        "not in the optimizer": trainable.keys() - {k for k, p in trainable.items() if p is stepped.get(k)},
        "in the optimizer but not trainable": stepped.keys() - trainable.keys(),
        "require gradients but nobody trains them (attached twice?)": [
            name for ident, name in wants.items() if ident not in {id(p) for p in trainable.values()}
        ],
    }
    if found := [f"{len(list(names))} {why}: {few(names)}" for why, names in wrong.items() if names]:
        raise VerificationError("what trains is not what was declared. " + "; ".join(found))


def outside(module: nn.Module, trainable: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters of `module` that are not trained."""
    ours = {id(p) for p in trainable.values()}
    return {name: p for name, p in module.named_parameters() if id(p) not in ours}


def frozen(others: Mapping[str, nn.Parameter]) -> None:
    """No tensor outside the trainable set has a gradient."""
    if found := [name for name, p in others.items() if p.grad is not None]:
        raise VerificationError(f"{len(found)} frozen tensors received a gradient: {few(found)}")


def reachable(loss: Tensor) -> None:
    """The loss depends on something that trains."""
    if not loss.requires_grad:
        raise VerificationError(
            "the loss does not depend on any trainable tensor: is the adapter active, and is the forward pass run "
            "with gradients (gradient checkpointing needs use_reentrant=False)?"
        )


def active(module: nn.Module, trainable: Mapping[str, nn.Parameter], steps: int) -> list[Any]:
    """The deltas of this run of `steps` steps, told that it begins: own parameters, if any, are not all frozen."""
    ours = {id(p) for p in trainable.values()}
    deltas = [m for m in module.modules() if hasattr(m, "penalty") and hasattr(m, "after_step")]
    inside = {id(m.inner) for m in deltas if isinstance(m, Wrapped)}  # their wrapper tells them
    deltas = [m for m in deltas if id(m) not in inside]
    found: list[Any] = [m for m in deltas if not (own := {id(p) for p in m.parameters()}) or own & ours]
    if unready := [delta for delta in found if getattr(delta, "ready", True) is False]:
        raise VerificationError(
            f"{len(unready)} deltas of {unready[0].what} have not seen the training rows they choose by: "
            "call core.attach.prepare first (deltatune train does)"
        )
    for delta in found:
        delta.begin(steps)
    return found


def finite_weights(tensors: Mapping[str, Tensor]) -> None:
    """Nothing non-finite is ever written to a checkpoint."""
    if bad := [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise GuardStop(f"{len(bad)} of {len(tensors)} trained tensors are not finite, not saved: {few(bad)}")


class Watch:
    """Within the first `steps` steps every trainable tensor has had a gradient, and one that is not all zeros.

    A gradient may be zero for a while (lora_A as long as lora_B is), but not for `steps` steps. Keys that match a
    pattern of `conditional` (experts, gates, task heads) may see none.
    """

    def __init__(self, keys: Iterable[str], conditional: Sequence[str] = (), steps: int = 20):
        self.steps = steps
        self.never = {key for key in keys if not any(re.search(p, key) for p in conditional)}
        self.zero = set(self.never)

    def see(self, step: int, grads: Mapping[str, Tensor]) -> None:
        """Look at the gradients of optimizer step `step` (from 0); VerificationError once `steps` are over."""
        if not self.zero:
            return
        self.never -= grads.keys()
        self.zero -= {key for key in self.zero & grads.keys() if bool(grads[key].any())}
        if step >= self.steps - 1:
            self.check()
            if self.zero:
                raise VerificationError(
                    f"{len(self.zero)} trainable tensors had only zero gradients in {self.steps} steps: "
                    f"{few(self.zero)}. They do not influence the loss; declare them conditional if that is meant"
                )

    def check(self) -> None:
        """VerificationError if a tensor has never had a gradient; also called at the end of a short run."""
        if self.never:
            raise VerificationError(
                f"{len(self.never)} trainable tensors never had a gradient: {few(self.never)}. Usual causes: gradient "
                "checkpointing with use_reentrant=True, a layer the forward pass skips, a detached input"
            )

    def state(self) -> dict[str, list[str]]:
        """What is still to be seen, as JSON."""
        return {"never": sorted(self.never), "zero": sorted(self.zero)}

    def load(self, state: Mapping[str, Sequence[str]]) -> None:
        """Go on from `state`."""
        self.never, self.zero = set(state["never"]), set(state["zero"])


class Stop:
    """The first SIGINT or SIGTERM asks the run to stop after its step; the second ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.abort = False  # inside an evaluation: stop there and then, it changes nothing

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signal is not None:
            os._exit(128 + number)  # no clean-up: a checkpoint being written is complete or absent anyway
        self.signal = number
        if self.abort:
            raise Interrupted
        os.write(2, b"\nstopping after this step, and saving; once more to stop at once\n")

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """Inside, a stop request raises Interrupted immediately."""
        if self.signal is not None:
            raise Interrupted
        self.abort = True
        try:
            yield
        finally:
            self.abort = False


@contextmanager
def signals() -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM for the time of the context (in the main thread; elsewhere they cannot be caught)."""
    stop, old = Stop(), dict[int, Any]()
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
