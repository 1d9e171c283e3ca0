"""Optim: AdamW (arXiv:1711.05101), Adafactor (arXiv:1804.04235), schedules, fp32 masters, state without pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..core.quant import library
from ..core.sparse import unthinned
from .rounding import ROUNDINGS, Chance, RoundedAdamW, check, pieces
from .supported import SERVED

# a parameter's own name, not its layer's: an adapter at LayerNorm and a LoRA of gate_proj are decayed
NO_DECAY = re.compile(r"\w*bias|ia3_\w+|scale|gate|group|lora_magnitude_vector")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How parameters move.

    `warmup`: steps when >= 1, a share of all steps below that. `floor`: the schedule's end, as a share of `lr`.
    `ratios`: (regex searched in the parameter's key, multiple of `lr`), first match wins; LoRA+ (arXiv:2402.12354) is
    `(("lora_B", 16.0),)`. `adafactor` steps by the given lr (prompt tuning's constant 0.3); `adafactor-relative` is the
    paper's own form, which finds its step size itself and takes neither lr nor schedule. `adamw-bf16` stores both
    moments in bf16. `rounding`: half-precision parameters are stepped through fp32 masters, or, bf16 alone and with
    AdamW, "stochastic"-ally themselves; `seed`: of what is left to chance there.
    """

    optimizer: str = "adamw"
    lr: float = 3e-4
    schedule: str = "linear"
    warmup: float = 0.0
    floor: float = 0.0
    power: float = 2.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    ratios: tuple[tuple[str, float], ...] = ()
    rounding: str = "masters"
    seed: int = 0

    def __post_init__(self) -> None:
        among("schedule", self.schedule, SCHEDULES)
        among("optimizer", self.optimizer, OPTIMIZERS)
        among("rounding", self.rounding, ROUNDINGS)
        if self.rounding == "stochastic" and self.optimizer not in SERVED:
            raise ValueError(
                f"rounding='stochastic' is for {' and '.join(SERVED)}, not {self.optimizer}, which rounds by itself: "
                "choose one of them, or leave rounding at 'masters'"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr}: give a finite number above 0, for instance 3e-4")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: give steps (>= 1) or a share of all steps (0 to 1)")
        if self.ratios and self.optimizer == "adafactor-relative":
            raise ValueError(
                "ratios: adafactor-relative finds its own step sizes; use optimizer='adafactor' with an lr"
            )


def among(name: str, value: str, choices: Iterable[str]) -> None:
    """ValueError unless `value` is one of `choices`, with the nearest."""
    choices = list(choices)
    if value not in choices:
        near = get_close_matches(value, choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}{hint}")


SCHEDULES = {
    # progress u in [0, 1) over the steps after warm-up, w warm-up steps, s the step -> share of the way from floor to 1
    "constant": lambda u, w, s, power: 1.0,
    "linear": lambda u, w, s, power: 1.0 - u,
    "cosine": lambda u, w, s, power: 0.5 * (1.0 + math.cos(math.pi * u)),
    "polynomial": lambda u, w, s, power: (1.0 - u) ** power,
    "inverse_sqrt": lambda u, w, s, power: math.sqrt(max(w, 1) / max(s + 1, w, 1)),
}


def factor(optim: Optim, step: int, steps: int) -> float:
    """The multiple of `lr` at step `step` (from 0) of `steps`: a pure function, so there is no state to lose.

    Warm-up rises as (step + 1) / warmup: no step is spent at a learning rate of 0.
    """
    warmup = math.ceil(optim.warmup * steps) if optim.warmup < 1 else int(optim.warmup)
    if step < warmup:
        return (step + 1) / warmup
    u = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return optim.floor + (1.0 - optim.floor) * SCHEDULES[optim.schedule](u, warmup, step, optim.power)


def _adamw(groups: list[dict[str, Any]], optim: Optim, chance: Chance) -> torch.optim.Optimizer:
    if optim.rounding == "stochastic":
        return _rounded(groups, optim, chance)
    params = [p for group in groups for p in group["params"]]
    # The fused kernel wants one kind of device for all; elsewhere torch chooses (foreach or a plain loop).
    fused = len({p.device for p in params}) == 1 and params[0].device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def _rounded(groups: list[dict[str, Any]], optim: Optim, chance: Chance) -> torch.optim.Optimizer:
    """AdamW with whatever lies in bf16 rounded by chance: the moments by its name, the parameters without masters."""
    moments = torch.bfloat16 if optim.optimizer == "adamw-bf16" else torch.float32
    return RoundedAdamW(groups, {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}, moments, chance)


def _adafactor(groups: list[dict[str, Any]], optim: Optim, chance: Chance) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    relative = optim.optimizer == "adafactor-relative"
    lr = None if relative else optim.lr
    return Adafactor(groups, lr=lr, scale_parameter=relative, relative_step=relative, warmup_init=False)


def _bitsandbytes(groups: list[dict[str, Any]], optim: Optim, chance: Chance) -> torch.optim.Optimizer:
    """AdamW with 8-bit states (arXiv:2110.02861), or with fp32 states in pages that leave a full GPU (QLoRA)."""
    made = library().optim
    device = groups[0]["params"][0].device.type
    if optim.optimizer == "paged-adamw" and device != "cuda":
        raise ValueError(
            f"optimizer='paged-adamw' moves its states between GPU and main memory, and this run is on {device}: "
            "use optimizer='adamw'"
        )
    kind = made.AdamW8bit if optim.optimizer == "adamw-8bit" else made.PagedAdamW32bit
    return kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)


OPTIMIZERS = {
    "adamw": _adamw,
    "adamw-bf16": _rounded,
    "adamw-8bit": _bitsandbytes,
    "paged-adamw": _bitsandbytes,
    "adafactor": _adafactor,
    "adafactor-relative": _adafactor,
}
TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # what an 8-bit code stands for: the same for every parameter


class Optimizer:
    """Steps exactly the given parameters; bf16 and fp16 ones through fp32 masters, so that small steps are not lost, or
    bf16 ones by stochastic rounding, so that they are not lost in the mean.

    Call `gather` after every backward, then `norm`, `scale`, `step`, `zero`.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], optim: Optim):
        check(optim.rounding, {p.dtype for p in trainable.values()})
        self.optim, self.model = optim, dict(trainable)
        self.steps, self.chance = 0, Chance(optim.seed)
        self.masters = {key: self.master(p) for key, p in self.model.items()}
        self.inner = OPTIMIZERS[optim.optimizer](self._groups(), optim, self.chance)

    def master(self, p: nn.Parameter) -> Tensor:
        """The tensor that is stepped for `p`: itself, or of a half-precision one an fp32 copy, or without masters its
        own memory under another name (whose gradient is what `gather` adds up)."""
        if p.dtype not in (torch.bfloat16, torch.float16):
            return p
        return (p.detach() if self.optim.rounding == "stochastic" else p.detach().float()).requires_grad_()

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for key, p in self.masters.items():
            ratio = next((x for pattern, x in self.optim.ratios if re.search(pattern, key)), 1.0)
            decays = p.ndim > 1 and not NO_DECAY.fullmatch(unthinned(key).rpartition(".")[2])
            decay = self.optim.weight_decay if decays else 0.0
            groups.setdefault((ratio, decay), []).append(p)
        for pattern, _ in self.optim.ratios:
            if not any(re.search(pattern, key) for key in self.masters):
                near = get_close_matches(pattern, self.masters, 3, 0.0)
                raise ValueError(f"ratios: no trainable parameter matches {pattern!r}; there are for instance {near}")
        return [{"params": ps, "ratio": ratio, "weight_decay": wd} for (ratio, wd), ps in groups.items()]

    def gather(self) -> None:
        """Move the gradients of half-precision parameters into their masters, where they add up in fp32 (without
        masters in bf16, rounded by chance)."""
        for key, p in self.model.items():
            master = self.masters[key]
            if master is p or p.grad is None:
                continue
            if master.grad is None:
                master.grad = p.grad.to(master.dtype)
            elif master.dtype == p.dtype:
                self.chance.add(master.grad, p.grad)
            else:
                master.grad.add_(p.grad)
            p.grad = None

    def grads(self) -> dict[str, Tensor]:
        """Key -> gradient, for the parameters that have one."""
        return {key: p.grad for key, p in self.masters.items() if p.grad is not None}

    def norm(self) -> Tensor:
        """The L2 norm of all gradients together (a scalar), in fp32 where they are in half precision."""
        return torch.nn.utils.get_total_norm([lengths(grad) for grad in self.grads().values()])

    def scale(self, norm: Tensor, clip: float) -> None:
        """Shorten the gradients to length `clip` when they are longer."""
        torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), clip, norm)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the parameters at `rate` times their group's learning rate."""
        if self.optim.optimizer != "adafactor-relative":
            for group in self.inner.param_groups:
                group["lr"] = self.optim.lr * group["ratio"] * rate
        self.inner.step()
        if self.optim.optimizer in ("adamw-8bit", "paged-adamw"):  # bitsandbytes writes where autograd does not see it
            torch.autograd.graph.increment_version(list(self.masters.values()))
        self.steps += 1
        for key, p in self.model.items():
            master = self.masters[key]
            if master.dtype != p.dtype:
                p.copy_(master)
            assert master.dtype != p.dtype or master.data_ptr() == p.data_ptr(), (
                f"{key} lies elsewhere than was stepped"
            )

    def zero(self) -> None:
        """Drop every gradient, and begin the draws of the next step."""
        for p in (*self.model.values(), *self.masters.values()):
            p.grad = None
        self.chance.begin(self.steps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything as tensors `<slot>|<key>` and as JSON (numbers that are not tensors)."""
        tensors = {f"master|{key}": m.detach() for key, m in self.masters.items() if m.dtype != self.model[key].dtype}
        numbers: dict[str, dict[str, Any]] = {}
        for key, p in self.masters.items():
            for slot, value in self.inner.state.get(p, {}).items():
                if slot in TABLES:
                    continue
                if isinstance(value, Tensor):
                    tensors[f"{slot}|{key}"] = value
                else:
                    numbers.setdefault(key, {})[slot] = value
        names = {"keys": sorted(self.masters), "tensors": sorted(tensors)}
        how = {"optimizer": self.optim.optimizer, "rounding": self.optim.rounding, "steps": self.steps}
        return tensors, {**how, "numbers": numbers, **names}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what `state` gave. Another optimizer or other parameters: ValueError."""
        if state["optimizer"] != self.optim.optimizer:
            raise ValueError(f"the checkpoint is of {state['optimizer']}, this run uses {self.optim.optimizer}")
        if (rounding := state.get("rounding", "masters")) != self.optim.rounding:
            raise ValueError(f"the checkpoint has rounding {rounding}, this run has {self.optim.rounding}")
        for theirs, ours in ((state["keys"], self.masters), (tensors, state["tensors"])):
            if lacking := set(ours) - set(theirs):
                raise ValueError(f"optimizer state: missing {sorted(lacking)}")
            if more := set(theirs) - set(ours):
                raise ValueError(f"optimizer state: unexpected {sorted(more)}")
        slots: dict[str, dict[str, Any]] = {key: dict(numbers) for key, numbers in state["numbers"].items()}
        for name, value in tensors.items():
            slot, key = name.split("|", 1)
            if slot == "master":
                self.masters[key].copy_(value)
            else:
                slots.setdefault(key, {})[slot] = value.clone()
        number = {id(p): i for i, p in enumerate(p for group in self.inner.param_groups for p in group["params"])}
        packed = {number[id(self.masters[key])]: values for key, values in slots.items()}
        # torch's own loader knows which slots live on the device and which do not (the step count of a fused AdamW).
        self.inner.load_state_dict({"state": packed, "param_groups": self.inner.state_dict()["param_groups"]})
        self.steps = state.get("steps", 0)
        self.chance.begin(self.steps)
        if self.optim.optimizer in ("adamw-8bit", "paged-adamw"):
            self._settle()

    def _settle(self) -> None:
        """What bitsandbytes' states have beside their values: the codes' tables, and pages for the large ones."""
        inner: Any = self.inner
        inner.fill_qmap()
        for p, state in inner.state.items():
            for slot in ("state1", "state2"):
                if inner.is_paged:
                    state[slot] = inner.get_state_buffer(p, state[slot].dtype).copy_(state[slot])
            if state["state1"].dtype == torch.uint8:
                state |= {slot: inner.name2qmap[name].to(p.device) for slot, name in TABLES.items()}


def lengths(grad: Tensor) -> Tensor:
    """A gradient, or of one in half precision the L2 norms of its pieces [pieces] in fp32: as long, but not rounded."""
    if grad.dtype not in (torch.bfloat16, torch.float16):
        return grad
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces(grad)])
