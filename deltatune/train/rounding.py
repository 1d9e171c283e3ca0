"""Rounding: bfloat16 written by stochastic rounding (arXiv:1502.02551, 2010.06192), and AdamW that keeps its moments,
its parameters or both in it.

Half an ulp of bf16 is 0.2 to 0.4 % of a number. To the nearest, a parameter that moves by less stays where it is at
every step, and so does a second moment, which moves by 0.1 % of its distance. Rounded up or down by chance, in
proportion to the two distances, both move as they should in the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rng import mix

ROUNDINGS = ("masters", "stochastic")
PIECE = {"cpu": 2**18}  # numbers that are fp32 at once: what a core's cache holds,
LARGE = 2**24  # and elsewhere what keeps a device busy


def check(rounding: str, dtypes: Iterable[torch.dtype]) -> None:
    """ValueError where stochastic rounding would have nothing to round, or another half precision than bf16."""
    found = set(dtypes)
    if rounding == "stochastic" and torch.float16 in found:
        raise ValueError(
            "rounding='stochastic' writes bf16, and what trains is in fp16: load the model in bf16, or leave "
            "train.rounding at masters"
        )
    if rounding == "stochastic" and torch.bfloat16 not in found:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ValueError(
            f"rounding='stochastic' is for parameters in bf16, and what trains here is in {names}, which has neither "
            "masters nor anything to round. A base in bf16 (train.precision: bf16) that is tuned in place (full, "
            "freeze, bitfit) has such parameters, what is added to it is fp32: leave train.rounding at masters"
        )


def pieces(x: Tensor) -> Sequence[Tensor]:
    """Views of `x` [...] along its first dimension that are small enough to be held in fp32 beside it."""
    x = torch.atleast_1d(x)
    most = PIECE.get(x.device.type, LARGE)
    return x.split(max(1, most // max(1, x[:1].numel())))


class Chance:
    """Random bits that are a function of (seed, step) and of how many were drawn since: no global generator moves.

    `begin` puts them where optimizer step `step` starts, so the step's number is all that a checkpoint must keep.
    """

    def __init__(self, seed: int):
        self.seed, self.step = seed, 0
        self.generators: dict[torch.device, torch.Generator] = {}

    def begin(self, step: int) -> None:
        """Start the draws of `step` (from 0)."""
        self.step = step
        self.generators.clear()

    def bits(self, like: Tensor) -> Tensor:
        """Integers of 0 to 65535, int32, in the shape and on the device of `like`."""
        device, size = like.device, like.numel()
        if device not in self.generators:
            seed = mix(self.seed, self.step, "rounding", device)
            self.generators[device] = torch.Generator(device).manual_seed(seed)
        # a generator makes 64 bits in hardly more time than 16
        words = torch.empty((size + 3) // 4, dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=self.generators[device])
        return words.view(torch.int16)[:size].view(like.shape).to(torch.int32).bitwise_and_(0xFFFF)

    def put(self, x: Tensor, into: Tensor) -> None:
        """Write x [...] (fp32) into `into` [...] (bf16), up or down by chance, so that the mean is x.

        A bf16 is the upper half of an fp32: 16 random bits are added, and the lower half is cut. What bf16 can hold
        stays as it is, infinite included.
        """
        cut = self.bits(x).add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
        # The sum may turn NaN into a number. The maximum with something that is smaller than every number, but NaN for
        # NaN, turns it back (in half the time of a mask).
        into.copy_(torch.maximum(cut, torch.rsub(x.abs(), -(2.0**-120), alpha=2)))

    def add(self, total: Tensor, x: Tensor) -> None:
        """total += x, both [...] bf16: sums of many small parts do not stop growing."""
        for one, more in zip(pieces(total), pieces(x), strict=True):
            self.put(one.float().add_(more), one)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) in fp32 arithmetic, piece by piece; what lies in bf16 is written back by chance.

    moments: what both are stored in. Parameters are stepped in their own dtype.
    """

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], moments: torch.dtype, chance: Chance):
        super().__init__(groups, defaults)
        self.moments, self.chance = moments, chance

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would be a second backward
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = 0
            state |= {slot: torch.zeros_like(p, dtype=self.moments) for slot in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        rate = group["lr"] / (1 - beta1 ** state["step"])
        shorter = (1 - beta2 ** state["step"]) ** -0.5  # of the second moment's root
        parts = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
        for w, grad, m, v in zip(*map(pieces, parts), strict=True):
            work = torch.promote_types(w.dtype, torch.float32)
            g = grad.to(work)
            first = m.to(work).lerp_(g, 1 - beta1)  # the stored tensor itself where it is in `work`
            second = v.to(work).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            width = second.sqrt().mul_(shorter).add_(group["eps"])
            weight = w.to(work).mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, width, value=-rate)
            for stored, new in ((m, first), (v, second), (w, weight)):
                self._keep(stored, new)

    def _keep(self, stored: Tensor, new: Tensor) -> None:
        if stored.dtype == torch.bfloat16:
            self.chance.put(new.float(), stored)
        elif new.dtype != stored.dtype:
            stored.copy_(new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch has it, but a moment keeps the dtype it is stored in, which need not be the parameter's."""
        params = [p for group in self.param_groups for p in group["params"]]
        for number, values in state_dict["state"].items():
            p = params[number]
            self.state[p] = {k: v.to(p.device) if isinstance(v, Tensor) else v for k, v in values.items()}
