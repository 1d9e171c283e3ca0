"""Reading and writing a layer's weights, whatever its class: the only place that knows layouts and packed weights.

NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): W ~ c2(c1(absmax)) * level[code], blocks of 64 4-bit codes with an
8-bit scale each, 4.127 bits a weight. Packing and kernels are bitsandbytes'; nothing here runs without a packed layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Dense, Refusal
from .registry import choice
from .site import Range, is_conv1d, put, take

SCHEMES = ("nf4",)
INSTALL = "pip install 'deltatune[quant]'"
SAMPLE = 2**16  # weights of a layer that tell whether it was packed from another
REPACKS = "support_avx512bf16_for_cpu"  # a 4-bit layer of bitsandbytes: whether its forward may re-pack the weight


# ---- one layer -------------------------------------------------------------------------------------------------------
def is_quantised(layer: Any) -> bool:
    """Whether the layer's weight is packed 4-bit codes."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def weight(layer: Any) -> Tensor:
    """The dense weight in nn.Linear's orientation [d_out, d_in]; [vocab, d] of an embedding; [d] of a norm.

    Of a 4-bit layer a new fp32 tensor, else the layer's own. Refusal for a packing that cannot be read.
    """
    if is_quantised(layer):
        return unpacked(layer)
    if hasattr(layer.weight, "quant_state") or hasattr(layer.weight, "SCB"):
        raise Refusal(
            "the weight is packed in a way that is not read here.",
            found=f"{type(layer).__name__} with {layer.weight.dtype} weights",
            instead="a base in nf4, bf16 or fp32",
        )
    return layer.weight.T if is_conv1d(layer) else layer.weight


def unpacked(layer: Any) -> Tensor:
    """fp32 [d_out, d_in] of a 4-bit layer, bitwise the same at every call."""
    refuse_repacked(layer)
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32  # not the rounding of the compute type
    return library().functional.dequantize_4bit(layer.weight.data, state)


def scales(layer: Any) -> Tensor:
    """fp32 [blocks]: what each block of a 4-bit layer's codes is multiplied by."""
    state = layer.weight.quant_state
    if not state.nested:
        return state.absmax.float()
    return library().functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def set_weight(layer: Any, value: Tensor) -> None:
    """Write a dense weight [d_out, d_in] back into the layer, in its own layout and dtype; 4-bit codes are computed
    anew with the layer's own block size and kind."""
    with torch.no_grad():
        if is_quantised(layer):
            pack(layer, value)
        else:
            layer.weight.copy_(value.T if is_conv1d(layer) else value)  # not .data: a change that autograd counts


def pack(layer: Any, value: Tensor) -> None:
    refuse_repacked(layer)
    held, old = layer.weight, layer.weight.quant_state
    codes, state = library().functional.quantize_4bit(
        value.to(held.device, torch.float32).contiguous(),
        blocksize=old.blocksize,
        compress_statistics=old.nested,
        quant_type=old.quant_type,
        quant_storage=held.dtype,
    )
    state.dtype = old.dtype
    held.data.copy_(codes.view(held.shape))
    held.quant_state = layer.quant_state = state


def dense(layer: nn.Module, columns: tuple[Range, ...] | None = None) -> Dense:
    """The layer's weight and bias, or the chosen output features of them."""
    return part(Dense(weight(layer), getattr(layer, "bias", None)), columns)


def part(whole: Dense, columns: tuple[Range, ...] | None) -> Dense:
    """The chosen output features of a layer's weight and bias."""
    return Dense(take(whole.weight, columns, 0), None if whole.bias is None else take(whole.bias, columns, 0))


def write(layer: Any, key: str, value: Tensor, columns: tuple[Range, ...] | None = None) -> None:
    """Write "weight" (dense, [d_out, d_in]) or "bias", or only the chosen output features of it, into the layer."""
    if key == "weight":
        whole = weight(layer)
        set_weight(layer, put(whole, columns, value.to(whole.dtype), 0))
    else:
        with torch.no_grad():
            parameter = layer.get_parameter(key)
            parameter.copy_(put(parameter, columns, value.to(parameter.dtype), 0))


def packs_to(layer: Any, value: Tensor) -> bool:
    """Whether a 4-bit layer was packed from the dense weight `value` [d_out, d_in], told from its first SAMPLE weights.

    One code in a hundred may differ: a value half-way between two levels falls either way on another device or dtype.
    """
    refuse_repacked(layer)
    state, held = layer.weight.quant_state, layer.weight.data
    if tuple(value.shape) != tuple(state.shape):
        return False
    count = min(value.numel(), SAMPLE)
    part = value.flatten()[: count - count % state.blocksize or None].to(held.device, torch.float32)
    how = {"blocksize": state.blocksize, "quant_type": state.quant_type}
    fresh, _ = library().functional.quantize_4bit(part, **how)
    ours = held.flatten().view(torch.uint8)[: fresh.numel()]
    found = [codes.flatten() for codes in (ours, fresh)]
    apart = [(found[0] >> shift & 15) != (found[1] >> shift & 15) for shift in (0, 4)]
    return float(torch.stack(apart).float().mean()) < 0.01


@contextmanager
def opened(layer: Any) -> Iterator[None]:
    """A 4-bit layer's weight as a dense fp32 parameter inside the block, packed once on leaving if it was changed:
    several deltas merged into one layer are rounded to 4 bits once."""
    if not is_quantised(layer):
        yield
        return
    before, held = unpacked(layer), layer.weight
    layer.weight = nn.Parameter(before.clone(), requires_grad=False)
    try:
        yield
        after = layer.weight.data
    finally:
        layer.weight = held
    if not torch.equal(before, after):
        set_weight(layer, after)


# ---- a model ---------------------------------------------------------------------------------------------------------
def scheme(model: nn.Module) -> str | None:
    """ "nf4" (or bitsandbytes' other kind, "fp4") of a model with packed weights, else None."""
    packed: Any = next((m.weight for m in model.modules() if is_quantised(m)), None)
    return None if packed is None else str(packed.quant_state.quant_type)


def size(parameter: Tensor) -> int:
    """How many weights a parameter stands for: a packed one holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def bits(layer: Any) -> float:
    """Bits per weight of a packed layer, scales and their scales included."""
    state, held = layer.weight.quant_state, layer.weight
    parts = [held, state.absmax, *((state.state2.absmax,) if state.nested else ())]
    return 8 * sum(t.numel() * t.element_size() for t in parts) / size(held)


def steady(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from re-packing 4-bit weights on a CPU with AVX-512-bf16; call before the first forward pass.

    Its first forward in eval mode there moves the codes into another order and rounds the scales to bf16, in place:
    dequantising is wrong from then on, no gradient passes, and the way back is not exact. Refusal where that happened.
    """
    for layer in model.modules():
        if is_quantised(layer):
            refuse_repacked(layer)
            setattr(layer, REPACKS, False)
    return model


def refuse_repacked(layer: Any) -> None:
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise Refusal(
            "bitsandbytes re-packed this 4-bit weight for inference on its first forward pass: it can no longer be "
            "read or trained through.",
            found=f"{type(layer).__name__} in the AVX-512 packing",
            instead="load the base again with deltatune (model.quant: nf4), or call deltatune.core.quant.steady(model) "
            "right after from_pretrained",
        )


def options(kind: str, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What from_pretrained takes to load a base packed as `kind` onto `device`, multiplying in `dtype`.

    Embeddings, norms, biases and heads stay in `dtype`. ValueError for another kind, NotInstalled without bitsandbytes.
    """
    choice("quant", kind, SCHEMES)
    library()
    from transformers import BitsAndBytesConfig

    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": packing, "dtype": dtype, "device_map": {"": str(device)}}


class NotInstalled(ImportError, ValueError):
    """A package of an extra is missing: the user can mend it."""


def library() -> Any:
    """bitsandbytes; NotInstalled, which says how to get it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotInstalled(f"4-bit weights and 8-bit optimizers need bitsandbytes: {INSTALL}") from error
    return bitsandbytes
