"""Task vectors (Ilharco et al. 2022, arXiv:2212.04089): tau = theta_tuned - theta_base, layer by layer, in float64."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..methods.freeze import Freeze, Head
from ..methods.lora import LoRA, LowRank
from ..methods.triplets import Triplets
from .attach import activate, attach, check_new, each, known, restored
from .delta import Delta, Dense, Refusal, overrides
from .inplace import InPlace
from .merging import refuse_merge
from .quant import dense, is_quantised, part, write
from .registry import finite, whole
from .site import head_modules, is_conv1d, is_linear, put, widths
from .slot import slots
from .vocabulary import unseeded

EPS = torch.finfo(torch.float32).eps  # deltas compute what they merge to in float32


@dataclass(frozen=True)
class Low:
    """A change of rank r: scale * b [d_out, r] a [r, d_in]."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def full(self) -> Tensor:
        return self.scale * (self.b @ self.a)


Change = Low | Tensor
Changes = dict[tuple[str, str], Change]  # (layer, parameter) -> its change, in nn.Linear's orientation


@dataclass(frozen=True)
class Fit:
    """What low-rank factors hold of a change: layer -> rank, layer -> |rest| / |change| (Frobenius), the same over all
    layers together, and the parameters that a low-rank update cannot hold with the size of their change."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    left: Mapping[str, float] = field(default_factory=dict)


# ---- reading ---------------------------------------------------------------------------------------------------------
def changes(model: nn.Module, name: str) -> Changes:
    """The change of weights that adapter `name` is. Refusal where one of its deltas is none, or changes a tied weight.

    Low-rank ones stay factors; everything else is whole tensors: as much memory as the layers it touches, in float64.
    """
    known(model, name)
    for delta in (d for _, d in each(model, name)):
        if not delta.inplace and not overrides(delta, "merged"):
            delta.merged(Dense(torch.empty(0)))  # the default: says why
    found: Changes = {}
    with restored(model), torch.no_grad():
        activate(model)  # the base's own weights in every layer
        for path, slot in slots(model).items():
            here = changed_at(model, path, slot.of(name))
            found |= {(path, key): change for key, change in here.items()}
    return found


def changed_at(model: nn.Module, path: str, deltas: Sequence[Delta]) -> dict[str, Change]:
    """parameter -> its change by all `deltas` of one layer, one after the other."""
    deltas = [d for d in deltas if not isinstance(d, Triplets) or d.rank]
    if not deltas:
        return {}
    layer = model.get_submodule(path)
    low = [factors(layer, delta) for delta in deltas]
    if all(low):
        return {"weight": stacked([(1.0, part) for part in low if part])}
    base: dict[str, Tensor] = {}
    now: dict[str, Tensor] = {}
    ran: dict[str, Tensor] = {}  # what the layer itself holds while the adapter runs
    # as merge does: what was trained in place is what the others build on; what changes the input comes last
    for delta in sorted(deltas, key=lambda d: (not d.inplace, overrides(d, "before"))):
        refuse_merge(model, delta)
        for key, tensor in values(layer, delta, now, ran).items():
            base.setdefault(key, original(layer, key))
            now[key] = tensor
            if delta.inplace:
                ran[key] = tensor
    return {key: tensor - base[key] for key, tensor in now.items()}


def original(layer: nn.Module, key: str) -> Tensor:
    return (dense(layer).weight if key == "weight" else layer.get_parameter(key)).detach().double()


def values(layer: nn.Module, delta: Delta, now: Mapping[str, Tensor], ran: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole parameters after `delta`, float64, built on `now` where an earlier delta changed them; `ran`: those
    that were trained in place."""
    if isinstance(delta, InPlace):
        kept = delta.stored(layer)
        return {k: (t.T if k == "weight" and is_conv1d(layer) else t).double() for k, t in kept.items()}
    columns = delta.site.columns
    own = {key: original(layer, key) for key in ("weight", "bias") if getattr(layer, key, None) is not None}
    own |= {key: ran[key] for key in own if key in ran}
    whole_ones = own | {key: now[key] for key in own if key in now}
    base, before = (Dense(t["weight"], t.get("bias")) for t in (own, whole_ones))
    seen = replace(part(before, columns), base=part(base, columns))
    return {k: put(whole_ones[k], columns, t.double(), 0) for k, t in delta.merged(seen).items()}


def factors(layer: nn.Module, delta: Delta) -> Low | None:
    """LoRA's and AdaLoRA's own factors, where B A is the change that `merged` makes; None otherwise."""
    if (found := delta.low_rank()) is None:
        return None
    base, scale = dense(layer, delta.site.columns), found[2]
    a, b = (factor.double() for factor in found[:2])  # of a start of PiSSA: of rank 2r, from the base
    weight = base.weight.double()
    told = delta.merged(Dense(weight, base.bias))
    rest = told.pop("weight").double() - weight - scale * (b @ a)
    terms = scale * (b.abs() @ a.abs())  # what float32 adds up
    if told or rest.abs().max() > 4 * EPS * (weight.abs() + terms).max():
        return None
    if delta.site.columns:  # a fused projection's part, as rows of the whole
        b = put(b.new_zeros(widths(layer)[1], b.shape[1]), delta.site.columns, b, 0)
    return Low(a, b, scale)


def stacked(parts: Sequence[tuple[float, Low]]) -> Low:
    """sum_i w_i scale_i B_i A_i as one product: ranks add up (to the layer's own at most), nothing is lost."""
    if len(parts) == 1:
        (weight, low) = parts[0]
        return fitting(Low(low.a, low.b, weight * low.scale) if weight != 1 else low)
    return fitting(Low(torch.cat([p.a for _, p in parts]), torch.cat([w * p.scale * p.b for w, p in parts], 1)))


def fitting(low: Low) -> Low:
    """The same change; from factors of a rank above the layer's, factors of that rank: no product of more columns than
    the layer has holds anything more."""
    most = min(low.a.shape[1], low.b.shape[0])
    if low.rank <= most:
        return low
    one, change = torch.eye(most).to(low.a), low.full()
    return Low(change, one) if change.shape[0] <= change.shape[1] else Low(one, change)


def full(change: Change) -> Tensor:
    return change.full() if isinstance(change, Low) else change


# ---- low rank --------------------------------------------------------------------------------------------------------
def shape_of(change: Change) -> tuple[int, ...]:
    """[d_out, d_in] of a matrix."""
    return (change.b.shape[0], change.a.shape[1]) if isinstance(change, Low) else tuple(change.shape)


def decompose(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, k], s [k] falling, V^T [k, d_in]; of a product from two thin QRs, which is exact and cheap."""
    if isinstance(change, Low) and change.rank < min(change.a.shape[1], change.b.shape[0]):
        left, upper = torch.linalg.qr(change.scale * change.b)
        right, lower = torch.linalg.qr(change.a.T)
        u, s, vt = torch.linalg.svd(upper @ lower.T)
        return left @ u, s, vt @ right.T
    return torch.linalg.svd(full(change), full_matrices=False)


def truncated(change: Change, r: int | None, energy: float | None, noise: float = 0.0) -> tuple[Low | None, float]:
    """(the nearest change of rank r, or of the least rank that keeps `energy` of sum s^2, what remains as a norm).

    With neither: every singular value above `noise`. None: nothing is left to hold.
    """
    u, s, vt = decompose(change)
    k = min(r, len(s)) if r is not None else len(s)
    if energy is not None:
        share = s.square().cumsum(0) / s.square().sum().clamp_min(1e-300)
        k = min(k, int((share < energy).sum()) + 1)
    k = min(k, int((s > max(noise, 1e-14 * float(s[0]))).sum()))
    rest = float(s[k:].norm())
    return (Low(vt[:k] * s[:k, None].sqrt(), u[:, :k] * s[:k].sqrt()) if k else None), rest


def check_size(r: int | None, energy: float | None) -> None:
    """ValueError unless `r` is a rank and `energy` a share."""
    if r is not None:
        whole("r", r)
    if energy is not None:
        finite("energy", energy, above=0)
        if energy > 1:
            raise ValueError(f"energy is the share of the change's squared norm to keep: 0 < energy <= 1, got {energy}")


def held(model: nn.Module, found: Changes) -> tuple[Changes, dict[str, float]]:
    """(the changes that a LoRA can hold, those that it cannot: biases, norms, embeddings, with their size)."""
    fits = {place for place in found if place[1] == "weight" and is_linear(model.get_submodule(place[0]))}
    rest = {".".join(place): float(full(c).norm()) for place, c in found.items() if place not in fits}
    return {place: found[place] for place in fits}, {key: size for key, size in rest.items() if size}


def lower(model: nn.Module, found: Changes, r: int | None, energy: float | None) -> tuple[Changes, Fit]:
    """Every change of a linear layer as factors, and how well they hold it; the rest is in `Fit.left`."""
    check_size(r, energy)
    inside, left = held(model, found)
    most = max((min(shape_of(change)) for change in inside.values()), default=None)
    if r is not None and most is not None and r > most:
        raise ValueError(f"rank {r} is above every layer's: the largest of the {len(inside)} changed layers has {most}")
    low: Changes = {}
    ranks, errors = {}, {}
    rests, sizes = 0.0, 0.0
    for place in (p for p in found if p in inside):
        change = inside[place]
        part, rest = lowered(model, place, change, r, energy)
        size = float(full(change).norm())
        if part is not None:
            low[place], ranks[place[0]] = part, part.rank
        errors[place[0]] = rest / size if size else 0.0
        rests, sizes = rests + rest**2, sizes + size**2
    return low, Fit(ranks, errors, (rests / sizes) ** 0.5 if sizes else 0.0, left)


def lowered(
    model: nn.Module, place: tuple[str, str], change: Change, r: int | None, energy: float | None
) -> tuple[Low | None, float]:
    """One layer's change as factors; ValueError where it is of full rank and neither `r` nor `energy` says what to
    keep."""
    if isinstance(change, Low) and energy is None and (r is None or change.rank <= r):
        return change, 0.0
    if r is not None or energy is not None:
        return truncated(change, r, energy)
    layer = model.get_submodule(place[0])
    part, rest = truncated(change, None, None, EPS * float(original(layer, "weight").norm()))
    if part is not None and part.rank == min(full(change).shape):
        raise ValueError(
            f"the change of {place[0]} is of full rank ({part.rank}): give a rank (r=, --rank) or a share of its "
            "squared norm (energy=, --energy) such as 0.99, or merge it into the weights"
        )
    return part, rest


# ---- writing ---------------------------------------------------------------------------------------------------------
def adopt(model: nn.Module, name: str, found: Changes) -> None:
    """Attach `found` as a new adapter: LoRA for factors, trained-in-place tensors for the rest. Active and trainable,
    as after attach. Stored in float32 (LoRA) and in the layer's own dtype (in place)."""
    low = {path: change for (path, _), change in found.items() if isinstance(change, Low)}
    whole_ones = [place for place, change in found.items() if not isinstance(change, Low)]
    if not found:
        raise ValueError("there is nothing to attach: the adapters change no weight at all")
    if packed := [p for p, key in whole_ones if key == "weight" and is_quantised(model.get_submodule(p))]:
        raise Refusal(
            "the result changes whole weights, which packed 4-bit ones cannot hold.",
            found=f"{len(packed)} packed layers, such as {packed[0]}",
            instead="a rank to cut it to (r=, --rank), which makes it a LoRA",
        )
    heads = in_heads(model, whole_ones)
    rest = [place for place in whole_ones if place not in heads]
    methods = ([lora(low)] if low else []) + ([freeze(rest)] if rest else []) + ([Head()] if heads else [])
    check_new(model, name, tuple(methods))
    with unseeded(model):
        attach(model, methods, name)
    with torch.no_grad():
        for layer, delta in each(model, name):
            path = delta.site.write
            if isinstance(delta, LowRank):
                part = low[path]
                delta.put(layer, {"lora_A": part.a.float(), "lora_B": (part.b * (part.scale / delta.scale)).float()})
            else:
                for key in (key for key in delta.stored(layer) if (path, key) in found):  # a head is trained whole
                    write(layer, key, original(layer, key) + full(found[path, key]))


def in_heads(model: nn.Module, places: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the parameters that belong to a task head."""
    heads = head_modules(model)
    return [place for place in places if place[0].split(".")[0] in heads]


def lora(low: Mapping[str, Low]) -> LoRA:
    """A LoRA of exactly these layers, each of its own rank and scale."""
    ranks = [part.rank for part in low.values()]
    r = max(set(ranks), key=ranks.count)
    scales = [part.scale for part in low.values()]
    alpha = r * max(set(scales), key=scales.count)
    if any(scale <= 0 for scale in scales):  # LoRA's alpha is above 0: the sign goes into B
        alpha = float(r)
    own = {p: {"r": t.rank, "alpha": alpha / r * t.rank} for p, t in low.items() if t.rank != r}
    return LoRA(r, alpha, targets=tuple(low), patterns=own)


def freeze(places: Sequence[tuple[str, str]]) -> Freeze:
    """Exactly these parameters, trained in place."""
    return Freeze(names=("|".join(re.escape(".".join(place)) for place in places),))


def refuse_left(model: nn.Module, found: Changes, drop: bool, sized: bool) -> None:
    """Refuse, before anything is cut, what a LoRA cannot hold, unless dropping it was asked for. sized: it was said how
    much of the rest to keep."""
    inside, left = held(model, found)
    if not left or drop:
        return
    cut = not sized and any(not isinstance(change, Low) for change in inside.values())
    more = ", and energy=0.99 (--energy 0.99) as the others are changes of full rank" if cut else ""
    raise Refusal(
        "a LoRA holds changes of linear layers' weights, and task heads beside them.",
        found=f"{len(left)} changed parameters that are neither, such as {', '.join(list(left)[:3])}",
        instead=f"`deltatune merge` (a whole model), or drop=True (--drop) to leave and list them{more}",
    )


def carried(model: nn.Module, names: Sequence[str], into: str) -> None:
    """Keep with adapter `into` what the runs of `names` recorded, as far as they agree."""
    records = [own for name in names if (own := known(model).records.get(name))]
    if records:
        first, *others = records
        same = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        known(model).records[into] = same
