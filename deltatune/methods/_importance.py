"""AdaLoRA's importance of a triplet (arXiv:2303.10512, section 3.2): smoothed |w dL/dw| times how far that strays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAMES = ("lora_A", "lora_B", "lora_E")
Place = tuple[dict[str, Tensor], str, Tensor]  # what a layer has seen, a parameter's name, the parameter


@torch.no_grad()
def observe(members: Sequence[Any]) -> None:
    """Smooth |w dL/dw| (sensitivity) and how far it strays (uncertainty) of every value, into each layer's `seen`: one
    call for all layers, because one layer's values are too few to fill a device."""
    beta1, beta2 = members[0].settings.beta1, members[0].settings.beta2
    places = [(member.seen, name, getattr(member, name)) for member in members for name in NAMES]
    means, strays = smoothed("mean", places), smoothed("stray", places)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for *_, p in places]
    now = torch._foreach_mul([p for *_, p in places], grads)
    torch._foreach_abs_(now)
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, now, alpha=1 - beta1)
    torch._foreach_sub_(now, means)
    torch._foreach_abs_(now)
    torch._foreach_mul_(strays, beta2)
    torch._foreach_add_(strays, now, alpha=1 - beta2)


def smoothed(kind: str, places: Sequence[Place]) -> list[Tensor]:
    """The "mean" or "stray" of every parameter, from zero."""
    for seen, name, p in places:
        if f"{kind}.{name}" not in seen:
            seen[f"{kind}.{name}"] = torch.zeros_like(p)
    return [seen[f"{kind}.{name}"] for seen, name, _ in places]


def importance(seen: dict[str, Tensor]) -> Tensor:
    """S_i [r] = s(lambda_i) + the mean of s over column i of P + the mean over row i of Q, s = mean * stray."""
    q, p, e = (seen[f"mean.{name}"] * seen[f"stray.{name}"] for name in NAMES)
    return e.view(-1) + q.mean(1) + p.mean(0)
