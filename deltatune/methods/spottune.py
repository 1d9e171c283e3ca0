"""SpotTune (Guo et al. 2018, arXiv:1811.08737): x_l = I F_hat(x) + (1 - I) F(x), a policy chooses I per example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.delta import Delta, Refusal, named, overrides
from ..core.inplace import InPlace
from ..core.registry import choice, finite, flag, identity, method, whole
from ..core.routing import Beside, Block, Now, Policy, Routed, Watch, copies_of_blocks, reads_ahead, watches
from ..core.site import Site, block_of, blocks, embedding, is_norm, towers
from .freeze import Full
from .lora import LoRA

LEVELS = ("block", "delta")
SMALL: dict[str, Any] = {"of": [{"lora": {"r": 2}}], "pool": 3, "hidden": 4}
TINY = {
    "": SMALL,
    "spottune-full": SMALL | {"of": []},
    "spottune-prefix": SMALL | {"of": [{"prefix": {"length": 2}}]},
}


@method("spottune", paper="1811.08737", kind="adapter", tiny=TINY)
@dataclass(frozen=True)
class SpotTune:
    """A policy network decides, for each sequence and block, whether the block runs frozen or changed by `of`.

    of: methods inside the blocks (their norms and biases outside them, all sequences get); [] or full: a trainable copy
    of every block, the paper's form. level "block" is the
    paper's policy gradient <dL/dx_l, F'(x) - F(x)>; "delta" gates each delta separately: the same forward pass, one run
    of the block, but ANOTHER policy gradient. pool: the first n tokens decide; left out, all of an encoder's and the
    first 16 of a causal model's. sample: draw decisions in evaluation too, as the paper's code does; else argmax.
    Parameters: those of `of`, and d hidden + hidden + 2 blocks (hidden + 1). policy_ratio: their learning rate.
    """

    of: tuple[Any, ...] = field(default=(LoRA(),), metadata={"methods": True})
    level: str = "block"
    temperature: float = 5.0
    hidden: int = 64
    pool: int | None = None
    sample: bool = False
    policy_ratio: float = 0.1

    def __post_init__(self) -> None:
        choice("SpotTune level", self.level, LEVELS)
        flag("SpotTune sample", self.sample)
        finite("SpotTune temperature", self.temperature, above=0)
        finite("SpotTune policy_ratio", self.policy_ratio, above=0)
        whole("SpotTune hidden", self.hidden)
        whole("SpotTune pool", 1 if self.pool is None else self.pool)

    def deltas(self, model: Any) -> Iterator[tuple[Site, Delta]]:
        if towers(model):
            raise Refusal(
                "SpotTune's one policy reads one sequence, and this model reads two that need not belong together.",
                found=f"{type(model).__name__} with a text and a vision tower",
                instead="one tower alone (CLIPForImageClassification, CLIPTextModel), or Gate, which reads each",
            )
        now, first = Now(), self.pool if self.pool or reads_ahead(model) else 16
        name, inside = embedding(model), blocks(model)
        yield from watches(model, now)
        yield Site(name, name), Policy(model.get_submodule(name), inside, now, first, self)
        full = not self.of or any(isinstance(m, Full) for m in self.of)
        for site, delta in copies_of_blocks(model) if full else (p for m in self.of for p in named(m, model)):
            if isinstance(delta, Watch):  # a gate's, which notes and changes nothing
                yield site, delta
                continue
            layer, block = model.get_submodule(site.write), block_of(f"{site.write}.")
            self.check(site, delta, layer)
            delta = Beside(layer, delta.names) if isinstance(delta, InPlace) else delta
            yield site, Routed(delta, now, inside.index(block), self.level == "delta") if block else delta
        for index, block in enumerate(inside if self.level == "block" else ()):
            yield Site(block, block), Block(now, index)

    def check(self, site: Site, delta: Delta, layer: nn.Module) -> None:
        """Refusal for a delta that sequences cannot hear or not hear one by one."""
        found = f"{type(delta).__name__} at {site.write}"
        shared = isinstance(delta, InPlace) and (is_norm(layer) or delta.names == ("bias",))
        if delta.alone or not (shared or block_of(f"{site.write}.")):
            why = "SpotTune lets single sequences through a changed block: outside, only norms and biases may change."
            instead = f"[spottune, {type(delta.method).method_name}] in a list, where all sequences get it"
            raise Refusal(why, found=found, instead=instead)
        if overrides(delta, "attend") and self.level == "delta":
            why = "a prefix changes no single activation that the policy's gradient could be taken at."
            raise Refusal(why, found=found, instead='level "block"')

    @property
    def identity(self) -> bool:
        """Whether the model starts as the base: its methods do."""
        return all(identity(m) for m in self.of)

    def report(self, model: nn.Module, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The share of the sequences last measured that ran each block changed."""
        return next(d.shares() for d in deltas if isinstance(d, Policy))
