"""An adapter moved onto another copy of its base: from 4-bit weights to full precision, for merging."""

from __future__ import annotations

import copy

from torch import nn

from .attach import attach, attached, disabled, each, known
from .fingerprint import strangers
from .vocabulary import unseeded


def moved(model: nn.Module, name: str, base: nn.Module) -> nn.Module:
    """A copy of `base` with adapter `name` of `model` on it: the same model, packed otherwise or not at all."""
    if attached(base):
        raise ValueError(f"the base to merge onto has adapters attached: {', '.join(attached(base))}")
    with disabled(model):
        differ = strangers(model, base)
    if differ:
        raise ValueError(
            f"the base to merge onto is another model: {len(differ)} tensors differ, such as {differ[0]}. "
            "Give the checkpoint that the 4-bit base was made from, in the same dtype"
        )
    target = copy.deepcopy(base)
    with unseeded(target):
        attach(target, known(model).methods[name], name)
    for (layer, ours), (place, theirs) in zip(each(model, name), each(target, name), strict=True):
        tensors = ours.stored(layer)
        theirs.take_form(tensors)
        theirs.put(place, tensors)
    return target
