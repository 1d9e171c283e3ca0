"""Changes of weights as LoRA: from a fully tuned model, or from any method whose change is linear (Eckart-Young)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attach import activate, attached, detach, focus, known, restored
from .change import Changes, Fit, adopt, carried, changes, check_size, in_heads, lower, refuse_left
from .cost import said
from .quant import dense
from .site import linear_at, twins
from .store import save


def extract(
    base: nn.Module,
    tuned: nn.Module,
    r: int | None = None,
    targets: Sequence[str] = ("all",),
    *,
    name: str = "extracted",
    energy: float | None = None,
) -> Fit:
    """Attach to `base` the LoRA of rank `r` (or of the least rank that keeps `energy`) nearest to `tuned`.

    Per target layer the truncated SVD of W_tuned - W_base, in float64; returns the remaining error of each layer and
    over all, and in `left` every other parameter that differs (norms, biases, embeddings, layers outside `targets`)
    with the norm of its difference. ValueError where the two models are not of one shape, or do not differ.
    """
    if attached(base) or attached(tuned):
        raise ValueError("extract() compares two plain models: detach (or merge) their adapters first")
    check_size(r, energy)
    if r is None and energy is None:
        raise ValueError("extract() needs r=... (a rank) or energy=... (a share of the squared norm, such as 0.99)")
    sites = [site.write for site in linear_at(base, targets, "extract()")]
    found, left = differences(base, tuned, set(sites))
    low, fit = lower(base, found, r, energy)
    if not low:
        raise ValueError(f"the two models do not differ in any of the {len(sites)} target layers; {describe(left)}")
    adopt(base, name, low)
    return Fit(fit.ranks, fit.errors, fit.error, {**left, **fit.left})


@torch.no_grad()
def differences(base: nn.Module, tuned: nn.Module, inside: set[str]) -> tuple[Changes, dict[str, float]]:
    """(the changes of the weights of the layers `inside`, the size of every other difference by parameter name)."""
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    for key in {**ours, **theirs}:
        shapes = [tuple(side[key].shape) if key in side else "missing" for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{key} is {shapes[0]} in the base and {shapes[1]} in the tuned model: not the same model")
    found: Changes = {}
    left: dict[str, float] = {}
    for key, old in ours.items():
        path, _, own = key.rpartition(".")
        gap = theirs[key].to(old.device).double() - old.double()
        if not gap.any():
            continue
        if path in inside and own == "weight" and len(twins(base, old)) == 1:
            layers = (tuned.get_submodule(path), base.get_submodule(path))
            new, was = (dense(layer).weight.to(old.device).double() for layer in layers)
            found[path, own] = new - was
        else:
            left[key] = float(gap.norm())
    return found, left


def describe(left: Mapping[str, float]) -> str:
    """The differences outside a LoRA's reach in a line."""
    return f"they differ in {', '.join(list(left)[:3])} and the like ({len(left)})" if left else "they are equal"


def to_lora(
    model: nn.Module,
    name: str,
    into: str | None = None,
    *,
    r: int | None = None,
    energy: float | None = None,
    drop: bool = False,
) -> Fit:
    """Attach adapter `name` once more as a plain LoRA, called `into` (default: name + "_lora"); active afterwards.

    Exact where the change is low-rank: a LoRA's factors as they are, another method's at their own rank. Otherwise by
    truncated SVD to rank `r` or to a share `energy` of the squared norm: the Fit says what is lost. A task head is kept
    whole, and so is what the adapter's run recorded. Changes that neither holds (biases, norms, embeddings) are a
    Refusal, or are left out with drop=True and listed in the Fit.
    """
    found, into = changes(model, name), into or f"{name}_lora"
    heads = {place: found.pop(place) for place in in_heads(model, list(found)) if isinstance(found[place], Tensor)}
    check_size(r, energy)
    refuse_left(model, found, drop, r is not None or energy is not None)
    low, fit = lower(model, found, r, energy)
    if not low:
        rest = "its task head alone" if heads else describe(fit.left)
        raise ValueError(f"adapter {name!r} changes no linear layer's weight ({rest}): merge it, or use it as it is")
    adopt(model, into, {**low, **heads})
    carried(model, [name], into)
    return fit


def export_lora(model: nn.Module, name: str, folder: str | Path, *, base: str | None = None, **options: Any) -> Fit:
    """Write adapter `name` as a peft LoRA folder, which peft, vLLM and llama.cpp read. options: as in `to_lora`."""
    known(model, name)
    into = free(model, name)
    with restored(model):
        focused = known(model).focus
        fit = to_lora(model, name, into, **options)
        save(model, into, folder, base=base)
    detach(model, into)
    focus(model, focused)
    return fit


def free(model: nn.Module, name: str) -> str:
    """A name that no adapter has."""
    taken = attached(model)
    return next(n for i in range(len(taken) + 1) if (n := f"{name[:56]}_lora{i or ''}") not in taken)


@torch.no_grad()
def kl(model: nn.Module, name: str, other: str, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """KL(p_name || p_other) of the model's outputs, nats, the mean over all real positions of `batches`."""
    total, count = 0.0, 0
    with restored(model):
        for batch in batches:
            sides = []
            for side in (name, other):
                activate(model, side)
                sides.append(F.log_softmax(said(model, batch), -1))
            gap = F.kl_div(sides[1], sides[0], log_target=True, reduction="none").sum(-1)
            mask = batch.get("attention_mask")
            real = (
                mask.bool() if mask is not None and mask.shape == gap.shape else torch.ones_like(gap, dtype=torch.bool)
            )
            total, count = total + float(gap[real].sum()), count + int(real.sum())
    return total / max(count, 1)
