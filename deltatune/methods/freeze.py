"""Freeze tuning and full tuning: train chosen base parameters in place, theta' = theta + delta on a subset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..core.delta import Delta, Refusal
from ..core.inplace import pick
from ..core.registry import method, nearest, whole
from ..core.site import Site, block_of, head_modules, layers


@method("freeze", paper="1801.06146", kind="selective", mergeable=True, tiny={"": {"last": 1}})
@dataclass(frozen=True)
class Freeze:
    """Train the last n blocks (`last`), the first n (`first`), or the parameters `names` match; freeze the rest."""

    last: int = 0
    first: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else tuple(self.names))
        whole("Freeze last", self.last, least=0)
        whole("Freeze first", self.first, least=0)
        for pattern in self.names:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"Freeze name {pattern!r} is neither a parameter's name nor a valid regular expression ({error})"
                ) from None

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        blocks = list(dict.fromkeys(b for n, _ in layers(model) if (b := block_of(n + "."))))
        n_last = self.last if self.last or self.first or self.names else 2
        if max(n_last, self.first) > len(blocks):
            raise ValueError(
                f"Freeze asks for {max(n_last, self.first)} blocks, {type(model).__name__} has {len(blocks)}"
            )
        chosen = {*blocks[len(blocks) - n_last :], *blocks[: self.first]}
        self.check(model)
        yield from pick(model, lambda name, _: block_of(name) in chosen or self.named(name))

    def named(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.names)

    def check(self, model: nn.Module) -> None:
        have = [f"{name}.{own}" for name, layer in layers(model) for own in layer._parameters]
        for pattern in self.names:
            if not any(re.fullmatch(pattern, name) for name in have):
                near = nearest(pattern, have)
                raise ValueError(f"Freeze pattern {pattern!r} matches no whole parameter name.{near}")


@method("full", paper="1810.04805", kind="selective", mergeable=True)
@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter, in place. The baseline that every comparison includes."""

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        yield from pick(model, lambda name, layer: True)


@method("head", paper="1810.04805", kind="selective", mergeable=True)
@dataclass(frozen=True)
class Head:
    """The task head alone (linear probing), or beside another method in a list: [LoRA(), Head()]."""

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        heads = head_modules(model)
        if not heads:
            raise Refusal(
                "Head trains a task head, and this model has none.",
                found=f"{type(model).__name__} with {', '.join(name for name, _ in model.named_children())}",
                instead="the model loaded for classification (AutoModelForSequenceClassification and its kin)",
            )
        for site, delta in pick(model, lambda name, _: name.split(".")[0] in heads):
            delta.conditional = True
            yield site, delta
