"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) of some of the blocks: the first ones.

A block holds what its backward pass reads from its forward pass on; a recomputed one holds its input alone, and the
rest for the while of its own backward pass. That comes to the first blocks when those above have let go, so what is
held once more there is less than what was: k recomputed blocks of L cost k inputs and L - k whole blocks at most, at
the start of the backward pass. Were they the last k, it would be a whole block more; spread out, no less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from .site import block_of, blocks

MARK, RUN = "gradient_checkpointing", "_gradient_checkpointing_func"  # transformers: whether, and by what
WHOLE = ("",)  # all blocks as one


def held(model: Any) -> list[str]:
    """The blocks that hold something for a backward pass, first to last: from the lowest that trains, or is above."""
    names, passed = blocks(model), set()
    for name, p in model.named_parameters():  # near enough in the order in which they are used
        block = block_of(name)
        if p.requires_grad:
            return names[names.index(block) :] if block in names else [n for n in names if n not in passed]
        passed.add(block)
    return []


def units(model: Any) -> Sequence[str]:
    """What of `held` can be recomputed apart from the rest: every block, or `WHOLE` where a family's blocks have no
    mark of their own; () where nothing can be."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return ()
    names = blocks(model)
    return held(model) if names and all(hasattr(model.get_submodule(n), MARK) for n in names) else WHOLE


def marked(model: Any, unit: str) -> bool:
    """Whether a model recomputes one of its `units`."""
    return any(getattr(m, MARK, False) for m in model.get_submodule(unit).modules())


@contextmanager
def recomputing(model: Any, count: int) -> Iterator[None]:
    """Inside, training recomputes the first `count` of the model's `units` and no others; afterwards what it did."""
    there = units(model)
    before = {m: (getattr(m, MARK), vars(m).get(RUN)) for m in model.modules() if hasattr(m, MARK)}
    for name, module in model.named_modules():
        if module not in before:
            continue
        # a stack is marked where one of its blocks is; what lies within a block is recomputed with it
        outside = there == WHOLE or block_of(f"{name}.") is None
        setattr(module, MARK, count > 0 and (outside or name in there[:count]))
        # by hand: transformers' own switch makes the embeddings' output want a gradient, which this form of it does
        # not need, and blocks below everything that trains would hold and compute what nobody reads
        setattr(module, RUN, partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        for module, (mark, run) in before.items():
            setattr(module, MARK, mark)
            vars(module).pop(RUN)
            if run is not None:
                setattr(module, RUN, run)
