"""Task-relevant weights of the base (Sung et al. 2021, arXiv:2111.09839): W + D, D chosen by top-k sum_i g_i^2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta, Dense, Given, blank
from ..core.quant import dense
from ..core.registry import choice, finite, method, whole
from ..core.site import Site, linear_at
from ..core.sparse import gradients, keep, mean_gradient, thin

BY = ("fisher", "grad", "magnitude")


@method(
    "select",
    paper="2111.09839",
    kind="selective",
    mergeable=True,
    tiny={"": {"density": 0.1, "by": "magnitude", "targets": ("q", "down")}},
)
@dataclass(frozen=True)
class Select:
    """The `density` share of the base's weights that matters most to the task trains; which ones is fixed by then.

    `by`: fisher (the sum of squared gradients of `rows` training rows, each alone), grad (|mean gradient x weight|),
    magnitude (|weight|, which needs no rows). Chosen over all `targets` together. By name: Freeze(names=...).
    """

    density: float = 0.005
    by: str = "fisher"
    targets: tuple[str, ...] = ("all",)
    rows: int = 128

    def __post_init__(self) -> None:
        finite("Select density", self.density, above=0)
        if self.density > 1:
            raise ValueError(f"Select density is the share that trains, 0 < density <= 1, got {self.density!r}")
        choice("Select by", self.by, BY)
        whole("Select rows", self.rows)

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        weights = {site: base_weight(model, site) for site in linear_at(model, self.targets, "Select")}
        found = {site: Change(w, self.density) for site, w in weights.items()}
        if self.by == "magnitude" and not blank():
            self.choose(list(found.values()), [w.abs() for w in weights.values()])
        yield from found.items()

    def prepare(self, model: nn.Module, deltas: Sequence[Delta], given: Given) -> None:
        params = [delta.get_parameter("weight") for delta in deltas]
        losses = (given.by_row or given.losses)()
        if self.by == "grad":
            bases = [base_weight(model, delta.site) for delta in deltas]
            scores = [(g * w).abs() for g, w in zip(mean_gradient(losses, self.rows, params), bases, strict=True)]
        else:
            scores = [torch.zeros_like(p) for p in params]
            for found in gradients(losses, self.rows, params):
                for score, g in zip(scores, found, strict=True):
                    score += g.square()
        self.choose(deltas, scores)

    def choose(self, deltas: Sequence[Delta], scores: Sequence[Tensor]) -> None:
        for delta, index in zip(deltas, keep(scores, self.density, f"Select by {self.by}"), strict=True):
            thin(delta, "weight", index)
            delta.ready = True


def base_weight(model: nn.Module, site: Site) -> Tensor:
    return dense(model.get_submodule(site.write), site.columns).weight.detach()


class Change(Delta):
    """D [d_out, d_in], zero at the start. Beside the layer, so that only what was chosen has optimizer state."""

    ready = False

    def __init__(self, weight: Tensor, density: float):
        super().__init__()
        self.keeps = {"weight": density}
        self.weight = nn.Parameter(torch.zeros_like(weight, dtype=torch.get_default_dtype()))

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.weight.to(x.dtype))

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"weight": dense.weight + self.weight.to(dense.weight.dtype)}
