"""DoRA (Liu et al. 2024, arXiv:2402.09353): y = m V x / ||V|| + b, V = W + s B A, norms over each row of V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta, Dense
from ..core.quant import dense
from ..core.registry import method
from ..core.site import Site, take
from .lora import LoRA
from .low_rank import LowRank

FORMS: dict[str, dict[str, Any]] = {"": {"r": 4}, "dora-pissa": {"r": 4, "init": "pissa", "scaling": "rslora"}}


@method("dora", paper="2402.09353", kind="linear", peft="LORA", mergeable=True, tiny=FORMS)
@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the direction of each weight row, and a learned magnitude. Parameters: r (d_in + d_out) + d_out a layer.

    The norm of the direction gets no gradient (section 4.3 of the paper). Every option of LoRA holds here.
    """

    def delta(self, model: nn.Module, site: Site, settings: tuple[int, float, float], size: tuple[int, int]) -> LowRank:
        made = Decomposed(*size, settings, self.scaling)
        weight = dense(model.get_submodule(site.write), site.columns).weight
        made.rates = {"lora_B": self.lr_ratio} if self.lr_ratio != 1 else {}
        made.start(self.init, weight if self.read(model, site) is not None else None)
        if not weight.is_meta:
            made.lora_magnitude_vector.data.copy_(made.norm(weight))
        return made


class Decomposed(LowRank):
    """m [d_out] starts as the norm of each row of W, so that the layer starts as it was."""

    low_rank = Delta.low_rank  # its norm is no product
    held: tuple[Tensor, Any, list[Tensor], Tensor] | None = None  # what the norm was made of last, and the norm

    def __init__(self, d_in: int, d_out: int, settings: tuple[int, float, float], scaling: str = "standard"):
        super().__init__(d_in, d_out, settings, scaling)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(d_out))

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """||W + s B A|| of every row [d_out], from ||w||^2 + 2 s (w A^T) b + s^2 b^T (A A^T) b: no matrix of W's size
        is made. In fp32 at least; its relative error grows as ||W||^2 / ||V||^2 times fp32's rounding."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (t.to(weight.device, dtype) for t in self.factors())
        own = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
        cross = ((weight.to(dtype) @ a.T) * b).sum(1)
        change = ((b @ (a @ a.T)) * b).sum(1)
        # where B and W cancel, rounding may leave less than nothing
        return (own + 2 * self.scale * cross + self.scale**2 * change).clamp_min(torch.finfo(dtype).tiny).sqrt()

    def norm_now(self, layer: Any) -> Tensor:
        """`norm`, kept from one forward pass to the next (decoding) while no gradient is recorded: until A, B or the
        layer's weight changes. On a CPU alone: elsewhere the comparison waits for the device, and costs what it saves.
        """
        w = layer.weight
        if torch.is_grad_enabled() or w.device.type != "cpu" or w.is_inference() or torch.compiler.is_compiling():
            self.held = None
            return self.norm(dense(layer, self.site.columns).weight)
        facts = (w.data_ptr(), w._version, getattr(w, "quant_state", None))
        own = [t for t in (self.lora_A, self.lora_B, self.start_A, self.start_B) if t is not None]
        if self.held is None or self.held[1] != facts or not all(map(torch.equal, own, self.held[2])):
            norm = self.norm(dense(layer, self.site.columns).weight)
            # the weight's alias keeps its address from being given to another one
            self.held = (w.detach(), facts, [t.detach().clone() for t in own], norm)
        return self.held[3]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "held"}

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """y + (g - 1) (y - b) + g s B A x with g = m / ||V||: the bias is no part of the direction."""
        gain = self.lora_magnitude_vector / self.norm_now(layer)
        bias = getattr(layer, "bias", None)
        plain = y if bias is None else y - take(bias, self.site.columns, 0)
        if self.dropout and self.training:  # what is added sees the dropped input, the base the whole one
            x, whole = F.dropout(x, self.dropout), x
            plain = plain + F.linear(x - whole, dense(layer, self.site.columns).weight)
        a, b = self.factors()
        low = F.linear(F.linear(x, a.to(x.dtype)), (self.scale * gain[:, None] * b).to(x.dtype))
        return y + (gain - 1).to(y.dtype) * plain + low

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        """||V|| is the base's, as in `after`; what other deltas added before is scaled along, their bias too."""
        a, b, base = *self.factors(), dense.base or dense
        gain = self.lora_magnitude_vector / self.norm(base.weight)
        found = {"weight": (gain[:, None] * (dense.weight.float() + self.scale * (b @ a))).to(dense.weight.dtype)}
        if dense.bias is not None and base.bias is not None and not torch.equal(dense.bias, base.bias):
            found["bias"] = (base.bias + gain * (dense.bias - base.bias)).to(dense.bias.dtype)
        return found
