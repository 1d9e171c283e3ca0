"""Tiny models over 4-bit bases, loaded as a run loads them; skipped, with the reason, where bitsandbytes is missing."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.core import quant
from models import tiny

HERE = importlib.util.find_spec("bitsandbytes") is not None
needs_packing = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed: pip install 'deltatune[quant]'")
# rows of 64 in blocks of 64, and outputs in multiples of 32: what bitsandbytes' re-packing asks for
WIDE = {"hidden_size": 64, "num_attention_heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    "llama": WIDE | {"intermediate_size": 128, "num_key_value_heads": 2},
    "opt": WIDE | {"ffn_dim": 128, "word_embed_proj_dim": 64},
}


@functools.cache
def plain(family: str) -> Any:
    """The full-precision model: look, do not touch."""
    return tiny(family, **SIZES[family])


@functools.cache
def _loaded(family: str) -> Any:
    from deltatune.objectives.common import load

    with tempfile.TemporaryDirectory() as place:
        plain(family).save_pretrained(Path(place))
        return load(
            "AutoModelForCausalLM", place, plain(family).config, **quant.options("nf4", torch.float32, "cpu")
        ).eval()


def nf4(family: str) -> Any:
    """A fresh copy of the same model in NF4."""
    return copy.deepcopy(_loaded(family))


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if quant.is_quantised(m)]


def weights(model: nn.Module) -> list[Tensor]:
    """Every packed weight, dequantised."""
    return [quant.weight(layer).clone() for layer in layers(model)]
