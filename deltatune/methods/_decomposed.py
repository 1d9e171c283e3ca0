"""DoRA's change to one layer (arXiv:2402.09353): y = m V x / ||V|| + b, V = W + s B A, norms over each row of V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta, Dense
from ..core.joint import added
from ..core.quant import dense
from ..core.site import take
from ._by_row import Grown, Held, Product, lengths, squares
from .low_rank import LowRank


class Decomposed(LowRank):
    """m [d_out] starts as the norm of each row of W, so that the layer starts as it was."""

    low_rank = Delta.low_rank  # its norm is no product
    held: Held | None = None

    def __init__(self, d_in: int, d_out: int, settings: tuple[int, float, float], scaling: str = "standard"):
        super().__init__(d_in, d_out, settings, scaling)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(d_out))

    @torch.no_grad()
    def norm(self, weight: Tensor, own: Tensor | None = None) -> Tensor:
        """||W + s B A|| of every row [d_out], in fp32 at least; own: ||W||^2 of them, where it is known."""
        return lengths(weight, squares(weight) if own is None else own, (*self.factors(), self.scale))

    def norm_now(self, layer: Any) -> Tensor:
        """`norm`, with ||W||^2 kept until the layer's weight is another or was written to: only of one that does not
        train. While no gradient is recorded (decoding) the norm itself is kept, until A or B change: on a CPU alone,
        elsewhere the comparison waits for the device, and costs what it saves."""
        w = layer.weight
        if w.requires_grad or w.is_inference() or torch.compiler.is_compiling():
            self.held = None
            return self.norm(dense(layer, self.site.columns).weight)
        facts = (w.data_ptr(), w._version, getattr(w, "quant_state", None))
        if self.held is None or self.held.facts != facts:
            self.held = Held(w.detach(), facts, squares(dense(layer, self.site.columns).weight), [])
        held, keeps = self.held, w.device.type == "cpu" and not torch.is_grad_enabled()
        factors = [t for t in (self.lora_A, self.lora_B, self.start_A, self.start_B) if t is not None] if keeps else []
        if held.norm is None or not keeps or not all(map(torch.equal, factors, held.factors)):
            norm = self.norm(dense(layer, self.site.columns).weight, held.own)
            held.factors, held.norm = [t.detach().clone() for t in factors], norm if keeps else None
            return norm
        return held.norm

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.held = None  # it would keep the layer's weight alive where that was before a move or a cast
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "held"}

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """u + (g - 1) (u - b) with u = y + s B A x and g = m / ||V||: the bias is no part of the direction."""
        more = self.lora_magnitude_vector / self.norm_now(layer) - 1
        whole, bias = x, getattr(layer, "bias", None)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        product: Any = Product((*self.factors(), self.scale))
        u = plain = added(product, x, y)
        if bias is not None:
            plain = plain - take(bias, self.site.columns, 0)
        if x is not whole:  # what is added sees the dropped input, the base the whole one
            plain = plain + F.linear(x - whole, dense(layer, self.site.columns).weight)
        return Grown.apply(u, None if plain is u else plain, more)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        """||V|| is the base's, as in `after`; what other deltas added before is scaled along, their bias too."""
        a, b, base = *self.factors(), dense.base or dense
        gain = self.lora_magnitude_vector / self.norm(base.weight)
        found = {"weight": (gain[:, None] * (dense.weight.float() + self.scale * (b @ a))).to(dense.weight.dtype)}
        if dense.bias is not None and base.bias is not None and not torch.equal(dense.bias, base.bias):
            found["bias"] = (base.bias + gain * (dense.bias - base.bias)).to(dense.bias.dtype)
        return found
