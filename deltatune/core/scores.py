"""What a weight is worth before it is trained: the scores that pruning at initialisation keeps the largest of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from .delta import Delta, Refusal
from .sparse import mean_gradient


@dataclass(frozen=True)
class Seen:
    """What a score may look at: weights [tensors], the delta each belongs to, the losses of `most` micro-batches."""

    params: Sequence[nn.Parameter]
    owners: Sequence[Delta]
    losses: Callable[[], Iterator[Tensor]]
    most: int = 8

    def gradient(self) -> list[Tensor]:
        return mean_gradient(self.losses(), self.most, self.params)


def random(seen: Seen) -> list[Tensor]:
    return [torch.rand_like(p, dtype=torch.float32) for p in seen.params]


def magnitude(seen: Seen) -> list[Tensor]:
    """|w|."""
    return [p.detach().abs() for p in seen.params]


def snip(seen: Seen) -> list[Tensor]:
    """|g w| (Lee et al. 2018, arXiv:1810.02340): the loss's change when the weight goes."""
    return [(g * p.detach()).abs() for g, p in zip(seen.gradient(), seen.params, strict=True)]


def grasp(seen: Seen) -> list[Tensor]:
    """w (H g) (Wang et al. 2020, arXiv:2002.07376, which removes the largest -w (H g)): the gradient's norm it upholds.

    H g = (g(w + e g) - g(w - e g)) / 2e, because attention's kernels have no second derivative.
    """
    start, first = [p.detach().clone() for p in seen.params], seen.gradient()
    length = torch.stack([g.double().norm() for g in first]).norm()
    size = torch.stack([p.double().norm() for p in start]).norm()
    e = float(torch.finfo(start[0].dtype).eps ** (1 / 3) * size / length) if length else 1.0
    sides = []
    for sign in (1, -1):
        put(seen.params, [w + sign * e * g for w, g in zip(start, first, strict=True)])
        sides.append(seen.gradient())
        put(seen.params, start)
    return [w * (up - down) / (2 * e) for w, up, down in zip(start, *sides, strict=True)]


@torch.no_grad()
def put(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def synflow(seen: Seen) -> list[Tensor]:
    """|w dR/dw|, R = 1^T |W_n| ... |W_1| 1 (Tanaka et al. 2020, arXiv:2006.05467), within each delta."""
    found: dict[int, Tensor] = {}
    for owner in dict.fromkeys(seen.owners):
        chain = [p for p, o in zip(seen.params, seen.owners, strict=True) if o is owner]
        if any(w.ndim != 2 for w in chain) or any(b.shape[1] != a.shape[0] for a, b in pairwise(chain)):
            raise Refusal(
                "SynFlow follows ones through a chain of matrices.",
                found=f"{type(owner).__name__} with {', '.join(str(list(w.shape)) for w in chain)}",
                instead="Adapter or LoRA; or by: random, magnitude, snip, grasp",
            )
        sizes = [w.detach().double().abs() for w in chain]
        reaching = list(accumulate(sizes, lambda v, w: w @ v, initial=sizes[0].new_ones(sizes[0].shape[1])))
        leaving = list(accumulate(reversed(sizes), lambda v, w: v @ w, initial=sizes[0].new_ones(len(sizes[-1]))))
        for p, w, into, out in zip(chain, sizes, reaching, leaving[-2::-1], strict=False):
            found[id(p)] = out[:, None] * w * into
    return [found[id(p)] for p in seen.params]


SCORES: dict[str, Callable[[Seen], list[Tensor]]] = {
    score.__name__: score for score in (random, magnitude, synflow, snip, grasp)
}
