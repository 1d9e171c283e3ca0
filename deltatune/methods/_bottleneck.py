"""Two small layers and a non-linearity: s W2 act(W1 h + b1) + b2, added to what a layer puts out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}
INITS = ("zero", "normal")


@dataclass(frozen=True)
class Shape:
    """What one bottleneck is: widths, non-linearity, s (None: learned, from 1), and the deviation of W1 and W2, drawn
    from a truncated normal (None: W1 uniform Kaiming, W2 zero, which starts as the base)."""

    d_in: int
    d_out: int
    bottleneck: int
    act: str
    scale: float | None
    std: float | None


class Bottleneck(Delta):
    """Reads the span's input where there is one, its own layer's output otherwise."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.down, self.up = nn.Linear(shape.d_in, shape.bottleneck), nn.Linear(shape.bottleneck, shape.d_out)
        self.act, self.width = ACTS[shape.act], shape.d_in
        self.scale = nn.Parameter(torch.ones(1)) if shape.scale is None else shape.scale
        for weight in (self.down.weight, self.up.weight):
            if shape.std is not None:  # cut at two deviations, as the paper's code draws it
                nn.init.trunc_normal_(weight, std=shape.std, a=-2 * shape.std, b=2 * shape.std)
        if shape.std is None:
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        for bias in (self.down.bias, self.up.bias):
            nn.init.zeros_(bias)

    def change(self, h: Tensor, y: Tensor) -> Tensor:
        """h [*, d_in] -> what is added to y [*, d_out], in y's dtype."""
        made = self.up(self.act(self.down(h.to(self.down.weight.dtype))))
        plain = not isinstance(self.scale, Tensor) and self.scale == 1  # a product that changes no bit
        return (made if plain else self.scale * made).to(y.dtype)

    def own_input(self, x: Tensor, y: Tensor) -> Tensor:
        return x if self.site.is_span else y

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(self.own_input(x, y), y)


class BeforeNorm(Bottleneck):
    """At a norm that ends a block: reads its output, adds to its input, and lets it run again."""

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return layer.forward(x + self.change(y, x))

    def shared(self, layer: nn.Module, given: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
        x, y = given
        return layer.forward(x + g * self.change(y, x))
