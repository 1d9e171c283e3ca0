"""Hard-concrete gates (Louizos et al. 2018, arXiv:1712.01312), and a change of a linear layer that ends up sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, Dense

LEFT, RIGHT = -1.5, 1.5  # what the gates are stretched to; log(-LEFT / RIGHT) = 0 is left out of the equations


def hard_concrete(alpha: Tensor, sampled: bool) -> Tensor:
    """z = clamp(s (r - l) + l, 0, 1) with s = sigmoid(logit(u) + alpha), u uniform; or s = sigmoid(alpha)."""
    noise = torch.logit(torch.rand_like(alpha), eps=1e-6) if sampled else 0.0
    return (torch.sigmoid(alpha + noise) * (RIGHT - LEFT) + LEFT).clamp(0, 1)


class Part(nn.Module):
    """z * w of one tensor; a fixed mask of it once pruned; its kept values alone once folded."""

    w: nn.Parameter | None
    gate: nn.Parameter | None
    group: nn.Parameter | None
    values: nn.Parameter | None
    indices: Tensor
    keep: Tensor

    def __init__(self, shape: tuple[int, ...], alpha: float, structured: bool):
        super().__init__()
        self.shape, self.pruned = shape, False
        self.w, self.gate = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.full(shape, float(alpha)))
        self.group = nn.Parameter(torch.full((), float(alpha))) if structured else None
        self.register_parameter("values", None)
        self.register_buffer("keep", torch.ones(shape, dtype=torch.bool), persistent=False)

    def forward(self) -> Tensor | None:
        """The change, of this part's shape; None where nothing was kept."""
        if self.w is not None:
            return self.w * self.keep if self.pruned else self.w * self.z(self.training)
        if self.values is None:
            return None
        return self.values.new_zeros(self.shape).flatten().scatter(0, self.indices.long(), self.values).view(self.shape)

    def z(self, sampled: bool) -> Tensor:
        assert self.gate is not None
        z = hard_concrete(self.gate, sampled)
        return z if self.group is None else z * hard_concrete(self.group, sampled)

    def expected(self) -> Tensor:
        """The expected number of open gates, sum of sigmoid(alpha) (times the group's own)."""
        assert self.gate is not None
        open_ = torch.sigmoid(self.gate).sum()
        return open_ if self.group is None else open_ * torch.sigmoid(self.group)

    def sparse(self) -> dict[str, Tensor]:
        """What is stored of a pruned part: values [n] and where they stand, nothing for n = 0."""
        if self.w is None:
            return {} if self.values is None else {"values": self.values.detach(), "indices": self.indices}
        places = self.keep.flatten().nonzero().squeeze(-1)
        if not len(places):
            return {}
        small = self.keep.numel() < 2**31
        return {"values": self.w.detach().flatten()[places], "indices": places.int() if small else places}

    def become(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold `values` and `indices` alone, without gates."""
        device = self.keep.device
        self.pruned, self.w, self.gate, self.group = True, None, None, None
        self.keep = torch.zeros(0, dtype=torch.bool, device=device)
        self.values = nn.Parameter(tensors["values"].to(device).clone()) if tensors else None
        self.register_buffer("indices", tensors["indices"].to(device).clone() if tensors else None)


@torch.no_grad()
def keep_largest(parts: Sequence[Part], density: float) -> None:
    """Magnitude pruning: of all parts together, the `density` largest |z w| stay, as w under a fixed mask."""
    changes = [part.w * part.z(False) for part in parts if part.w is not None]
    sizes = torch.cat([change.abs().flatten() for change in changes])
    chosen = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    chosen[sizes.topk(max(1, round(density * len(sizes)))).indices] = True
    for part, change, keep in zip(parts, changes, chosen.split([c.numel() for c in changes]), strict=True):
        assert part.w is not None
        part.keep.copy_(keep.view(part.shape))
        part.w.copy_(change * part.keep)
        part.pruned = True


class Sparse(Delta):
    """A change W' of weight [d_out, d_in] and b' of bias [d_out]: y + W' x + b', sparse once pruned."""

    unpruned = "diff pruning chooses what is kept by itself"

    def __init__(self, parts: dict[str, Part]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    @property
    def own(self) -> dict[str, Part]:
        return {kind: part for kind, part in self.parts.items() if isinstance(part, Part)}

    @property
    def pruned(self) -> bool:
        return all(part.pruned for part in self.own.values())

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        change = {kind: part() for kind, part in self.own.items()}
        if (weight := change["weight"]) is not None:
            y = torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight.to(x.dtype).T).view_as(y)
        return y if (bias := change.get("bias")) is None else y + bias.to(y.dtype)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        whole = {"weight": dense.weight, "bias": dense.bias}
        found = {}
        for kind, part in self.own.items():
            old, change = whole[kind], part()
            if old is not None and change is not None:
                found[kind] = (old.to(change.dtype) + change.to(old.device)).to(old.dtype)
        return found

    def state_extra(self) -> dict[str, Any]:
        return {**super().state_extra(), "pruned": self.pruned}

    def load_extra(self, state: Mapping[str, Any]) -> None:
        super().load_extra(state)
        for part in self.own.values():
            part.pruned = bool(state["pruned"])

    def fold(self) -> None:
        """Kept values and indices alone, once pruned; gates that are still learned stay."""
        for part in self.own.values() if self.pruned else ():
            part.become(part.sparse())

    def stored(self, layer: nn.Module) -> dict[str, Tensor]:
        if not self.pruned:
            return super().stored(layer)
        return {f"parts.{kind}.{n}": t for kind, part in self.own.items() for n, t in part.sparse().items()}

    def take_form(self, tensors: Mapping[str, Tensor]) -> None:
        if any(name.endswith(".w") for name in tensors):
            return
        for kind, part in self.own.items():
            start = f"parts.{kind}."
            part.become({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
