"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): train the bias vectors b of W x + b, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.biases import TERMS, kind_of_bias, term_sites
from ..core.delta import Delta, Refusal
from ..core.inplace import InPlace, pick
from ..core.registry import flag, method
from ..core.site import Site, is_linear, is_norm, trunk, widths


@method("bitfit", paper="2106.10199", kind="selective", mergeable=True)
@dataclass(frozen=True)
class BitFit:
    """The biases of the model's body, or those that `targets` name: the paper's terms, roles, layer names or regexes.

    Terms: query, key, value, intermediate, output (of attention and feed-forward), attention_layernorm,
    output_layernorm, outside (the blocks: the embeddings' norm, a pooler), all. create: linear targets without a bias
    get one that starts at zero; left out, only what is there trains. Parameters: one per output feature.
    """

    targets: tuple[str, ...] = ()
    create: bool = False

    def __post_init__(self) -> None:
        flag("BitFit create", self.create)

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        everything = not self.targets or "all" in self.targets
        wanted = set() if everything and not self.create else term_sites(model, self.targets or ("all",))
        inner = {id(p) for p in trunk(model).parameters()}

        def chosen(name: str, layer: nn.Module) -> bool:
            owner, _, leaf = name.rpartition(".")
            return leaf == "bias" and (id(layer.get_parameter("bias")) in inner if everything else owner in wanted)

        found = list(pick(model, chosen))
        missing = [n for n in sorted(wanted) if bare(model.get_submodule(n))] if self.create else []
        if not found and not missing:
            raise self.refusal(model)
        yield from found
        for name in missing:
            yield Site(name, name), NewBias(widths(model.get_submodule(name))[1])

    def refusal(self, model: nn.Module) -> Refusal:
        kinds = sorted(
            {("norm" if is_norm(m) else type(m).__name__) for m in trunk(model).modules() if hasattr(m, "weight")}
        )
        where = f"the layers {', '.join(self.targets)} of " if self.targets else ""
        return Refusal(
            f"BitFit trains biases, and {where}{type(model).__name__} has none.",
            found=f"layers without bias: {', '.join(kinds)}",
            instead="BitFit(create=True), norm tuning (the preset 'norm-tuning'), IA3, or LoRA(r=1), all as small",
        )

    def report(self, model: nn.Module, deltas: Sequence[Delta]) -> dict[str, Any]:
        """{"drift": {kind of bias: mean |b - b_0| over its entries}}."""
        moved: dict[str, list[Tensor]] = {}
        for delta in deltas:
            now = delta.stored(model.get_submodule(delta.site.write))["bias"]
            moved.setdefault(kind_of_bias(model, delta.site.write), []).append((now - start(model, delta)).abs())
        return {
            "drift": {kind: float(torch.cat(moved[kind]).float().mean()) for kind in (*TERMS, "other") if kind in moved}
        }


def start(model: nn.Module, delta: Delta) -> Tensor:
    """A bias as the base has it; zero where the base has none."""
    if not isinstance(delta, InPlace):
        return torch.zeros(())
    return delta.other["bias"] if delta.on else model.get_submodule(delta.site.write).get_parameter("bias").data


def bare(layer: nn.Module) -> bool:
    return is_linear(layer) and getattr(layer, "bias", None) is None


class NewBias(Delta):
    """y + b where the layer has no b. It stays beside the layer: there is no parameter to merge it into."""

    def __init__(self, d: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d))

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bias.to(y.dtype)
