"""Reading and writing a layer's weights, whatever its class: the only place that knows layouts and packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .delta import Dense, Refusal
from .site import Range, is_conv1d, put, take


def weight(layer: Any) -> Tensor:
    """The dense weight in nn.Linear's orientation [d_out, d_in]; [vocab, d] of an embedding; [d] of a norm."""
    if hasattr(layer.weight, "quant_state"):
        raise Refusal(
            "reading a packed 4-bit weight is not supported yet.",
            found=type(layer).__name__,
            instead="load the base in bf16 or fp32",
        )
    return layer.weight.T if is_conv1d(layer) else layer.weight


def set_weight(layer: Any, value: Tensor) -> None:
    """Write a dense weight [d_out, d_in] back into the layer, in its own layout and dtype."""
    with torch.no_grad():
        layer.weight.data.copy_(value.T if is_conv1d(layer) else value)


def dense(layer: nn.Module, columns: tuple[Range, ...] | None = None) -> Dense:
    """The layer's weight and bias, or the chosen output features of them."""
    bias = getattr(layer, "bias", None)
    return Dense(take(weight(layer), columns, 0), None if bias is None else take(bias, columns, 0))


def write(layer: Any, key: str, value: Tensor, columns: tuple[Range, ...] | None = None) -> None:
    """Write "weight" (dense, [d_out, d_in]) or "bias", or only the chosen output features of it, into the layer."""
    if key == "weight":
        set_weight(layer, put(weight(layer), columns, value.to(layer.weight.dtype), 0))
    else:
        with torch.no_grad():
            parameter = layer.get_parameter(key)
            parameter.data.copy_(put(parameter, columns, value.to(parameter.dtype), 0))
