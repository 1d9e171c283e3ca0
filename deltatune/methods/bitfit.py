"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): train the bias vectors b of W x + b, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..core.delta import Delta, Refusal
from ..core.inplace import pick
from ..core.registry import method
from ..core.site import Site, at, is_norm, trunk


@method("bitfit", paper="2106.10199", kind="selective", mergeable=True, lr=1e-3)
@dataclass(frozen=True)
class BitFit:
    """The biases of the model's body, or of the layers that `targets` name (roles, names, regexes)."""

    targets: tuple[str, ...] = ()

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        wanted = {site.write for site in at(model, self.targets)} if self.targets else None
        inner = {id(p) for p in trunk(model).parameters()}

        def chosen(name: str, layer: nn.Module) -> bool:
            owner, _, leaf = name.rpartition(".")
            here = (
                owner in wanted
                if wanted is not None
                else id(layer.get_parameter("bias")) in inner
                if leaf == "bias"
                else False
            )
            return leaf == "bias" and here

        found = list(pick(model, chosen))
        if not found:
            raise self.refusal(model)
        yield from found

    def refusal(self, model: nn.Module) -> Refusal:
        kinds = sorted(
            {("norm" if is_norm(m) else type(m).__name__) for m in trunk(model).modules() if hasattr(m, "weight")}
        )
        where = f"the layers {', '.join(self.targets)} of " if self.targets else ""
        return Refusal(
            f"BitFit trains biases, and {where}{type(model).__name__} has none.",
            found=f"layers without bias: {', '.join(kinds)}",
            instead="norm tuning (the preset 'norm-tuning'), IA3, or LoRA(r=1), which are as small",
        )
