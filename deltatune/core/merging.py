"""Merge: an adapter's change written into the weights of a plain model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attach import activate, attached, detach, known
from .delta import Delta, Dense, Refusal, overrides
from .inplace import InPlace
from .quant import dense, opened, part, write
from .site import twins
from .slot import deltas, slots


def merge(model: nn.Module, name: str = "default", inplace: bool = False, base: nn.Module | None = None) -> nn.Module:
    """A plain model that behaves like base + adapter `name`; a copy by default. Refusal if a delta has no weights.

    Over a 4-bit base the changed weights are rounded to 4 bits again (`core.cost.cost` says what that does). `base`:
    the same model in full precision, a copy of which takes the adapter in its place; ValueError when it is another one.
    """
    known(model, name)
    for delta in deltas(model, name):
        refuse_merge(model, delta)
    if base is not None:
        from .onto import moved

        return merge(moved(model, name, base), name, inplace=True)
    target = model if inplace else copy.deepcopy(model)
    activate(target, name)
    with torch.no_grad():
        values = merged_values(target, name)
        known(target).grown = None  # the merged model keeps the tokens that were added
        for other in attached(target):
            detach(target, other)
        for (path, key), tensor in values.items():
            target.get_submodule(path).get_parameter(key).data.copy_(tensor)
    return target


def refuse_merge(model: nn.Module, delta: Delta) -> None:
    """Refuse before anything is copied."""
    if delta.inplace:
        return
    layer: Any = model.get_submodule(delta.site.write)
    if not overrides(delta, "merged"):
        delta.merged(Dense(torch.empty(0)))  # the default: says why
    owners = twins(model, layer.weight)
    if len(owners) > 1 and not delta.tied:
        raise Refusal(
            "merging would change a weight that another layer shares.",
            found=" = ".join(owners),
            instead="untie the weights first (config.tie_word_embeddings = False and a copy), or keep it attached",
        )


def merged_values(target: nn.Module, name: str) -> dict[tuple[str, str], Tensor]:
    """(layer, parameter) -> whole tensors, as the layers of `target` store them. Overwrites the layers on the way."""
    return {place: tensor.clone() for place, tensor in write_merged(target, name).items()}


def write_merged(target: nn.Module, *names: str) -> dict[tuple[str, str], Tensor]:
    """Overwrite the layers with what `names`, one after the other, make of them, in place, so that each delta builds on
    the one before; (layer, parameter) -> the layer's own tensor."""
    touched: dict[tuple[str, str], Tensor] = {}
    for path, slot in slots(target).items():
        layer = target.get_submodule(path)
        keys: set[str] = set()
        # W (l x) + B A (l x): what changes the input comes last, as it also feeds what was added beside W
        found = sorted((d for name in names for d in slot.of(name)), key=lambda d: overrides(d, "before"))
        with opened(layer):
            base = kept(dense(layer)) if sum(not d.inplace for d in found) > 1 else None
            for delta in found:
                keys.update(delta.names if isinstance(delta, InPlace) else merge_one(layer, delta, base))
        touched |= {(path, key): layer.get_parameter(key).detach() for key in keys}
    return touched


def kept(whole: Dense) -> Dense:
    """A copy that stays when the layer is overwritten."""
    return Dense(whole.weight.clone(), None if whole.bias is None else whole.bias.clone())


def merge_one(layer: nn.Module, delta: Delta, base: Dense | None) -> list[str]:
    columns = delta.site.columns
    merged = delta.merged(replace(dense(layer, columns), base=base and part(base, columns)))
    for key, tensor in merged.items():
        write(layer, key, tensor, delta.site.columns)
    return list(merged)
