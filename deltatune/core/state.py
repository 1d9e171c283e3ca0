"""State: what is attached to a model, what runs now, and the two hooks on its trunk that keep both honest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .delta import SLOT
from .places import fits, positions_of
from .site import INPUTS, read_first
from .slot import copies, deltas
from .vocabulary import Before

STATE = "deltatune_state"  # the attribute of the model that holds its State


@dataclass
class State:
    """What has been attached to a model; lives on the model, so that a deep copy takes its own along."""

    base: str
    grads: dict[str, bool]
    vocab: int | None = None  # the base's own vocabulary, when tokens were added to it
    methods: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)  # adapter -> what its run recorded: objective, template
    shifts: dict[str, int] = field(default_factory=dict)  # adapter -> how far it moves real tokens back
    active: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    focus: str | None = None  # the adapter that is trainable
    packing: bool = False
    attention: Any = None  # the implementation to go back to, while ours is in use
    fused: Any = None  # core.fuse.Fused, while adapters are written into the weights
    grown: Before | None = None  # the vocabulary to go back to, where loading an adapter grew it
    room: int | None = None  # rows of the model's table of positions, where it has one
    mixers: list[Any] = field(default_factory=list)  # the model's state-space layers
    handles: list = field(default_factory=list)

    def token(self) -> tuple:
        return self.active, self.rows

    def watch(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Trunk hook: a backward pass that recomputes must see the adapters the forward pass saw."""
        seen = self.token()
        tensor = next((t for t in tensors(output) if t.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(lambda grad: self.same(seen, module))

    def same(self, seen: tuple, module: nn.Module) -> None:
        if seen != self.token() and self.matters(seen, module):
            raise RuntimeError(
                f"adapters changed between forward ({describe(seen)}) and backward ({describe(self.token())}): "
                "recomputation would give a wrong gradient. Call backward before activate(), or restore the adapters"
            )

    def matters(self, seen: tuple, module: nn.Module) -> bool:
        """Only recomputation and in-place weights can see another state in backward than in forward."""
        if any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
            return True
        switched = {*seen[0], *self.active}
        return any(d.inplace for name in switched for d in deltas(module, name))

    def shift(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Trunk hook: real tokens stand after the active prefixes' positions. ValueError where rows() does not fit: its
        layers cannot tell, some see tokens without their rows."""
        if self.rows is not None:
            given = [x for x in (*args[:1], *map(kwargs.get, INPUTS)) if x is not None]
            for x in given[:1]:  # a decoder alone is given none
                copies(len(x), len(self.rows))
        self.call_layers()
        if self.room is not None:
            fits(self.room, module, self.moved(), (args, kwargs))
        if not any(self.shifts.get(n) for n in self.active):
            return None
        positions = positions_of(module, args, kwargs)
        return args, {**kwargs, "position_ids": positions + self.offsets(positions.device, batch(args, kwargs))}

    def call_layers(self) -> None:
        """Mixers call the layers that adapters change: their kernels, which read the weights instead, are for training
        alone, and a mixer's own flag says nothing else."""
        for mixer in self.mixers:
            inside = [getattr(m, SLOT, None) for name, m in mixer.named_children() if name != "in_proj"]
            mixer.training = mixer.in_proj.training and not any(slot.runs for slot in inside if slot is not None)

    def moved(self) -> int:
        """How far the active prefixes move real tokens back, where rows differ the most of them."""
        each = [self.shifts.get(n, 0) for n in self.active]
        return sum(each) if self.rows is None else max(each, default=0)

    def offsets(self, device: torch.device, rows: int) -> Tensor:
        """[1, 1], or [rows, 1] where rows differ (beams repeat each row)."""
        if self.rows is None:
            return torch.tensor([[sum(self.shifts.get(n, 0) for n in self.active)]], device=device)
        by = torch.tensor([[self.shifts.get(n or "", 0)] for n in self.rows], device=device)
        return by.repeat_interleave(copies(rows, len(self.rows)), 0)


def batch(args: tuple, kwargs: dict) -> int:
    return len(read_first(args, kwargs))


def describe(token: tuple) -> str:
    return f"rows {list(token[1])}" if token[1] is not None else f"active {list(token[0])}"


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (t for t in output.values() if isinstance(t, Tensor))
    elif isinstance(output, tuple | list):
        yield from (t for t in output if isinstance(t, Tensor))
