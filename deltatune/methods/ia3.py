"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): l_k * (W_k x), l_v * (W_v x), W_down (l_ff * x)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.delta import Delta, Dense, Refusal
from ..core.registry import method
from ..core.site import Site, linear_at, widths


@method("ia3", paper="2205.05638", kind="rescale", peft="IA3", mergeable=True)
@dataclass(frozen=True)
class IA3:
    """Learned rescaling of keys, values and feed-forward activations, all ones at the start."""

    outputs: tuple[str, ...] = ("k", "v")
    inputs: tuple[str, ...] = ("down",)

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        for site in linear_at(model, self.outputs, "(IA)^3") if self.outputs else ():
            d = sum(b - a for a, b in site.columns) if site.columns else widths(model.get_submodule(site.write))[1]
            yield site, ScaleOutput(d)
        for site in linear_at(model, self.inputs, "(IA)^3") if self.inputs else ():
            if site.columns:
                raise Refusal(
                    "(IA)^3 cannot rescale the input of one part of a fused projection: its parts share that input.",
                    found=f"{site.write} as {site.label!r}",
                    instead=f"outputs=({site.label!r},), or the whole layer by its name",
                )
            yield site, ScaleInput(widths(model.get_submodule(site.write))[0])


class ScaleOutput(Delta):
    """y [*, d_out] -> l * y."""

    def __init__(self, d: int):
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(d))

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y * self.ia3_l.to(y.dtype)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        scaled = {"weight": dense.weight * self.ia3_l[:, None]}
        return scaled if dense.bias is None else {**scaled, "bias": dense.bias * self.ia3_l}


class ScaleInput(Delta):
    """x [*, d_in] -> l * x."""

    def __init__(self, d: int):
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(d))

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x * self.ia3_l.to(x.dtype)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"weight": dense.weight * self.ia3_l}
