"""Thinned parameters: of a tensor only chosen values exist, train and are stored; the others are exactly 0."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

INDEX = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)\.0\.index")


class Scatter(nn.Module):
    """values [1, k] -> a tensor of `shape`, zero but for the flat positions `index` [k].

    Two dimensions, because an optimizer takes what has one for a bias and does not decay it.
    """

    index: Tensor

    def __init__(self, index: Tensor, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("index", index.to(torch.int32))

    def forward(self, values: Tensor) -> Tensor:
        flat = values.new_zeros(math.prod(self.shape))
        return flat.scatter(0, self.index.long(), values[0]).view(self.shape)

    def right_inverse(self, dense: Tensor) -> Tensor:
        return dense.flatten()[self.index.long()][None]


def thin(module: Any, path: str, index: Tensor) -> None:
    """Keep only the flat positions `index` of parameter `path`; thinned before, it is chosen anew."""
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    if parametrize.is_parametrized(holder, name):
        parametrize.remove_parametrizations(holder, name, leave_parametrized=True)
    dense = getattr(holder, name)
    parametrize.register_parametrization(holder, name, Scatter(index.to(dense.device), dense.shape))
    module.unpruned = "what is pruned already is not pruned again"


def unthinned(name: str) -> str:
    """What a thinned parameter is called where it is whole."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def thin_as(module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Thin every parameter of `module` whose positions are among `tensors`. ValueError for positions it cannot have."""
    own = {unthinned(name) for name, _ in module.named_parameters()}
    for key, index in tensors.items():
        found = INDEX.fullmatch(key)
        path = ".".join(part for part in found.groups() if part) if found else ""
        if not found or path not in own:  # a whole block's delta is shown those of the layers in it too
            continue
        size = module.get_submodule(found[1] or "")
        most = getattr(size, found[2]).numel()
        steps = index.long().diff()
        if index.ndim != 1 or not len(index) or index[0] < 0 or index[-1] >= most or (steps <= 0).any():
            raise ValueError(f"{key}: positions must rise from 0 or more to less than {most}. The file is damaged")
        thin(module, path, index)
        module.ready = True


@torch.no_grad()
def only(p: Tensor, index: Tensor) -> None:
    """Set every value of `p` outside the flat positions `index` to 0."""
    p.mul_(torch.zeros_like(p).flatten().index_fill(0, index, 1.0).view_as(p))


def matrices(module: nn.Module) -> list[str]:
    """The parameters worth thinning: vectors are few, and a bias of zero has no score."""
    return [name for name, p in module.named_parameters() if p.ndim > 1]


def keep(scores: Sequence[Tensor], density: float, who: str) -> list[Tensor]:
    """The flat positions that the `density` share of highest scores takes, per tensor; at least one of each tensor,
    so that no layer falls silent. ValueError where scores cannot tell values apart, or `density` is too small."""
    sizes = [s.numel() for s in scores]
    count = math.ceil(density * sum(sizes))
    if count < len(scores):
        raise ValueError(
            f"{who} density {density!r} keeps {count} values of {len(scores)} tensors: fewer than one each"
        )
    if silent := sum(not bool(s.any()) for s in scores):
        raise ValueError(
            f"{who}: every score is 0 in {silent} of {len(scores)} tensors, so nothing can be chosen: they start at "
            "zero. Use an init that does not (Adapter: init: normal), or by: random"
        )
    flat = torch.cat([s.flatten().double() for s in scores])
    for at, s in zip(starts(sizes), scores, strict=True):
        flat[at + int(s.flatten().double().argmax())] = math.inf
    chosen = flat.topk(count).indices.sort().values
    return [chosen[(chosen >= a) & (chosen < a + n)] - a for a, n in zip(starts(sizes), sizes, strict=True)]


def starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def gradients(losses: Iterable[Tensor], most: int, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The gradient of each of the first `most` losses; zeros where a loss does not depend on a parameter."""
    for loss in islice(losses, most):
        found = torch.autograd.grad(loss, list(params), allow_unused=True)
        yield [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]


def mean_gradient(losses: Iterable[Tensor], most: int, params: Sequence[Tensor]) -> list[Tensor]:
    """The mean of the first `most` losses' gradients. ValueError without losses."""
    total, count = [torch.zeros_like(p) for p in params], 0
    for gs in gradients(losses, most, params):
        count += 1
        total = [t + g for t, g in zip(total, gs, strict=True)]
    if not count:
        raise ValueError("there are no training rows to choose by: give data, or choose without it (by: magnitude)")
    return [t / count for t in total]
