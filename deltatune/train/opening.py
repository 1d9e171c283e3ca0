"""Opening: the base model and its tokenizer, as a configuration names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..core.quant import options, steady
from ..data.media import Wordless, reads
from ..zoo import dtype as best_dtype
from ..zoo import model_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_model(config: Config, objective: Any) -> tuple[nn.Module, Any]:
    """(model with the head the objective needs, tokenizer) of `model.name`, in evaluation mode."""
    tokenizer = open_tokenizer(model_path(config.model.name, config.model.revision))
    return open_weights(config, objective), tokenizer


def open_weights(config: Config, objective: Any) -> nn.Module:
    """The model alone, as `open_model` has it."""
    path = model_path(config.model.name, config.model.revision)
    device, number = "cuda" if torch.cuda.is_available() else "cpu", dtype(config)
    how = options(config.model.quant, number, device) if config.model.quant else {"dtype": number}
    model = objective.load(path, model_config(path), **how)
    return steady(model.to(device)).eval()


def open_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a folder or hub id, in whose place `Wordless` stands where a model of pictures has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if reads(model_config(path)):
            return Wordless()
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} has no tokenizer that can be read ({first}): save one beside the model") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # batches mask by length, so that a shared id hides nothing
    return tokenizer


def model_config(path: Path | str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def dtype(config: Config) -> torch.dtype:
    """What the user asked for, or bf16 where the hardware multiplies it fast."""
    asked = next((x for x in (config.model.dtype, config.train.precision) if x != "auto"), None)
    return DTYPES[asked] if asked else best_dtype()


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of the folder or hub id a model came from; ValueError where it came from nowhere."""
    name = getattr(model.config, "_name_or_path", "")
    fix = "give train(..., tokenizer=AutoTokenizer.from_pretrained(...))"
    if not name:
        raise ValueError(f"the model does not say where it came from, so its tokenizer is not known: {fix}")
    try:
        return open_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {name!r}, where the model came from: {fix}") from error
