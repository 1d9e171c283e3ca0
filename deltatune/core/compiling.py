"""Compiled blocks (torch.compile): the parts of a block that no token leaves, for the time of a context.

A part is the largest module inside a block that computes something and holds no attention: norms, the MLP. Attention
stays as it is, for the lengths of packed sequences would make another program of every batch; so does a linear layer
that stands alone, of which nothing could be fused. What happens inside a part is traced, its layers' slots too, and as
a whole: what cannot be is an error, never a part that silently runs as it was. Hooks on the part itself and gradient
checkpointing stay outside. Evaluation, and whatever needs no gradient, runs the parts as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .delta import SLOT, Refusal
from .site import blocks, is_linear, is_norm
from .slot import Slot, slots

MOST = 64  # programs of one function, past which it is an error; torch's own limit is 8, which unlike adapters pass


def parts(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """What is compiled of the blocks of these names (of all)."""
    return [part for name in (blocks(model) if names is None else names) for part in within(model.get_submodule(name))]


def within(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module."""
    for name, child in module.named_children():
        if name == SLOT:
            continue
        listed = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if is_norm(child) or (next(child.children(), None) and not (is_linear(child) or listed or mixes(child))):
            yield child
        else:
            yield from within(child)


def mixes(module: nn.Module) -> bool:
    """Whether tokens meet in it: by attention, by a convolution, or by the running state that comes with one."""
    return any("Attention" in type(m).__name__ or isinstance(m, nn.Conv1d) for m in module.modules())


def forward(part: nn.Module, made: Callable[..., Any], own: Sequence[Slot], *args: Any, **given: Any) -> Any:
    """What stands for a part's forward pass: `made` where it trains, and every row runs the same adapters: who runs on
    which row of a batch would be in the program."""
    if part.training and torch.is_grad_enabled() and all(slot.rows is None for slot in own):
        return made(part, *args, **given)
    return type(part).forward(part, *args, **given)


def compiles(part: nn.Module) -> bool:
    """Whether a part runs compiled where it trains."""
    own = vars(part).get("forward")
    return isinstance(own, partial) and own.func is forward


def traced(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward pass of a class of parts, compiled at its first calls, one program for all lengths.

    In a code object of its own: what other runs in this process have compiled neither counts nor is used.
    """
    found: Any = kind.forward
    own = FunctionType(
        found.__code__.replace(), found.__globals__, found.__name__, found.__defaults__, found.__closure__
    )
    own.__kwdefaults__ = found.__kwdefaults__
    made: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True)
    return made


def settings() -> dict[str, Any]:
    """Of torch's tracer. An adapter changes this layer and not that one, but by default torch takes the hooks of every
    module of a class to be those of the one that was traced."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    return {limit: MOST, "skip_nnmodule_hook_guards": False}


class Compiled:
    """The `parts` of a model (of the blocks of these names). Inside `with`, which may be entered again, they run
    compiled where they train; afterwards they are as they were. Refusal where there are none.

    Nothing is compiled before a part is called. The first shapes decide how a program is cut up: who wants the same
    bits twice calls the model with the same first batch.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        self.parts, self.settings = parts(model, names), ExitStack()
        if not self.parts or any("forward" in vars(part) for part in self.parts):
            raise Refusal(
                "Only parts of a block that run their own class's forward pass can be compiled.",
                found=f"{type(model).__name__} {'with others in their place' if self.parts else 'without such parts'}",
                instead="train.compile: off",
            )
        self.functions = {kind: traced(kind) for kind in dict.fromkeys(map(type, self.parts))}

    def __enter__(self) -> None:
        self.settings.enter_context(torch._dynamo.config.patch(settings()))
        for part in self.parts:
            vars(part)["forward"] = partial(forward, part, self.functions[type(part)], tuple(slots(part).values()))

    def __exit__(self, *error: object) -> None:
        self.settings.close()
        for part in self.parts:
            vars(part).pop("forward", None)


def programs() -> int:
    """How many programs have been compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
