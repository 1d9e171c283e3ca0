"""Several adapters as one: task arithmetic (arXiv:2212.04089), TIES (arXiv:2306.01708), DARE (arXiv:2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attach import check_new
from .change import Change, Changes, Fit, Low, adopt, carried, changes, check_size, full, lower, stacked
from .registry import finite, nearest, whole

HOW = ("linear", "cat", "svd", "ties", "dare", "dare_ties")
ON = ("change", "factors")
ELECT = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How task vectors become one. density: the share kept by TIES (the largest of each tensor) and by DARE (drawn by
    `seed`; the rest dropped, what is kept divided by density = 1 - p). elect: TIES' sign, by sum or by count.

    on: "change" works on the change of weights, which is what the papers do; "factors" on A and B apart, which is what
    peft does (equal ranks only; it is not the sum of the changes). r: a rank for the result; None keeps it exactly.
    """

    how: str = "linear"
    r: int | None = None
    density: float = 0.5
    seed: int = 0
    on: str = "change"
    elect: str = "total"

    def __post_init__(self) -> None:
        for what, value, choices in (("how", self.how, HOW), ("on", self.on, ON), ("elect", self.elect, ELECT)):
            if value not in choices:
                near = nearest(str(value), choices)
                raise ValueError(f"{what}={value!r}.{near} Choose from {', '.join(choices)}")
        check_size(self.r, None)
        finite("density", self.density, above=0)
        if self.density > 1:
            raise ValueError(f"density is the share of values that are kept: 0 < density <= 1, got {self.density}")
        whole("seed", self.seed, least=0)
        if self.how == "svd" and self.r is None:
            raise ValueError("how='svd' needs r=..., the rank to cut to; how='cat' keeps everything")
        if self.on == "factors" and self.how in ("cat", "svd"):
            raise ValueError(f"how={self.how!r} is about the change itself: leave on='factors' out")


def combine(model: nn.Module, weights: Mapping[str, float], name: str, how: str = "linear", **options: object) -> Fit:
    """Attach sum_i weights[i] * adapter i, or another combination, as adapter `name`; active afterwards.

    weights: adapter -> its weight; negative ones take away (negation). options: the fields of `Combination`.
    The result is a LoRA where it is low-rank ("linear" and "cat" of LoRAs: exact, ranks add up; any with r=...), and
    trained-in-place tensors otherwise. Returns what was lost (nothing, unless r is given). Refusal for adapters that
    are no change of weights.
    """
    wanted = Combination(how, **options)  # type: ignore[arg-type]
    check_new(model, name, ())
    if not weights:
        raise ValueError("combine() was given no adapter: name at least one with its weight")
    for key, weight in weights.items():
        finite(f"the weight of adapter {key!r}", weight)
    each_one = {key: changes(model, key) for key in weights}
    places = list(dict.fromkeys(place for found in each_one.values() for place in found))
    result: Changes = {}
    for place in places:
        parts = [(key, float(weights[key]), found[place]) for key, found in each_one.items() if place in found]
        result[place] = together(parts, wanted, place)
    fit = Fit()
    if wanted.r is not None:
        low, fit = lower(model, result, wanted.r, None)
        result = {place: low.get(place, change) for place, change in result.items() if place in low or kept(change)}
    adopt(model, name, result)
    carried(model, list(weights), name)
    return Fit(fit.ranks, fit.errors, fit.error)  # the rest is in place: nothing was left out


def kept(change: Change) -> bool:
    """Whether there is anything to keep."""
    return isinstance(change, Tensor) and bool(change.any())


def together(parts: Sequence[tuple[str, float, Change]], wanted: Combination, place: tuple[str, str]) -> Change:
    """One parameter's changes as one; adapters that do not touch it add nothing."""
    low = [(weight, change) for _, weight, change in parts if isinstance(change, Low)]
    if wanted.how == "cat" and len(low) < len(parts):
        raise ValueError(
            f"how='cat' puts low-rank factors side by side, and {'.'.join(place)} has a full change: how='linear' "
            "takes both"
        )
    if wanted.on == "factors":
        return by_factors(parts, wanted, place)
    if wanted.how in ("linear", "cat", "svd"):
        if len(low) == len(parts):
            return stacked(low)
        return sum_of([full(change) for *_, change in parts], [weight for _, weight, _ in parts])
    keys = [f"{wanted.seed} {'.'.join(place)} {key}" for key, *_ in parts]
    return mixed([full(change) for *_, change in parts], [weight for _, weight, _ in parts], wanted, keys)


def by_factors(parts: Sequence[tuple[str, float, Change]], wanted: Combination, place: tuple[str, str]) -> Low:
    """peft's way: A and B mixed apart with sqrt(|w| scale), a negative sign on A's side."""
    low = [change for *_, change in parts if isinstance(change, Low)]
    if len(low) < len(parts) or len({part.rank for part in low}) > 1:
        found = ", ".join(f"{k!r} {c.rank if isinstance(c, Low) else 'full'}" for k, _, c in parts)
        raise ValueError(f"on='factors' needs equal ranks, {place[0]} has {found}: use on='change', which takes any")
    weights = [weight * part.scale for (_, weight, _), part in zip(parts, low, strict=True)]
    mixes = []
    for side, tensors in (("A", [part.a for part in low]), ("B", [part.b for part in low])):
        keys = [f"{wanted.seed} {place[0]}.{side} {key}" for key, *_ in parts]
        roots = [abs(w) ** 0.5 * (-1 if w < 0 and side == "A" else 1) for w in weights]
        mixes.append(mixed(tensors, roots, wanted, keys))
    return Low(mixes[0], mixes[1])


def mixed(tensors: Sequence[Tensor], weights: Sequence[float], wanted: Combination, keys: Sequence[str]) -> Tensor:
    """Thin out as `how` says, then sum, or average where the signs agree. keys: what each one's drop is drawn by."""
    if wanted.how == "ties":
        tensors = [trim(t, wanted.density) for t in tensors]
    elif wanted.how != "linear":
        tensors = [drop(t, wanted.density, key) for t, key in zip(tensors, keys, strict=True)]
    turned = wanted.on == "change"
    return agreed(tensors, weights, wanted.elect, turned) if "ties" in wanted.how else sum_of(tensors, weights)


def sum_of(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i tau_i"""
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(0)


def trim(tensor: Tensor, density: float) -> Tensor:
    """The largest `density` of the values, the rest 0 (TIES, step 1)."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device).index_fill(0, kept, True)
    return tensor * mask.view_as(tensor)


def drop(tensor: Tensor, density: float, key: str) -> Tensor:
    """Each value kept with probability `density` and divided by it (DARE); drawn by `key`, so that neither the order
    of the adapters nor the other layers matter."""
    return tensor * drawn(tuple(tensor.shape), density, key).to(tensor) / density


def drawn(shape: tuple[int, ...], density: float, key: str) -> Tensor:
    """A mask [shape] of ones with probability `density`, the same for the same `key` everywhere."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < density).double()


def agreed(tensors: Sequence[Tensor], weights: Sequence[float], elect: str, turned: bool = True) -> Tensor:
    """TIES, steps 2 and 3: elect each value's sign, then the mean of w_i tau_i over those that have it.

    The paper has no negative weights. `turned`: an adapter with one votes with its sign turned, because what it adds is
    what counts; else it votes as it is and is taken away afterwards, as in peft.
    """
    if turned:
        tensors = [t if w >= 0 else -t for w, t in zip(weights, tensors, strict=True)]
        weights = [abs(w) for w in weights]
    signed = torch.stack([*tensors])
    votes = signed if elect == "total" else signed.sign()
    winner = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agrees = signed.sign() == winner
    scaled = signed * torch.tensor([*weights]).to(signed).view(-1, *[1] * tensors[0].ndim)
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp_min(1)
