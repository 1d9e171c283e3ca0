"""The identity of a base model: which architecture, and a sample of every trunk weight."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from .delta import SLOT
from .site import output_layer, trunk

SAMPLES = 64  # values read per tensor: < 2 s on 7 B parameters, and any fine-tune moves some of them
IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def fingerprint(model: Any, vocab: int | None = None) -> str:
    """sha256 over the architecture and sampled values of the trunk's weights, as bf16.

    bf16 makes one model loaded in fp32 and in bf16 agree. `vocab` caps embedding rows, for models that grew tokens.
    """
    inner = trunk(model)
    config = getattr(model, "config", None)
    facts = {k: getattr(config, k, None) for k in IDENTITY} if config is not None else {}
    if vocab is not None:
        facts["vocab_size"] = vocab
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    output = getattr(output_layer(model), "weight", None)  # T5's language model is its own trunk: leave its head out
    kept = getattr(embedding, "weight", None)
    for name, parameter in inner.named_parameters():
        if SLOT in name.split(".") or (parameter is output and parameter is not kept):
            continue
        values = parameter.detach()
        if vocab is not None and embedding is not None and parameter is embedding.weight:
            values = values[:vocab]
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(sample(values).numpy().tobytes())
    return digest.hexdigest()


def sample(values: torch.Tensor) -> torch.Tensor:
    """SAMPLES evenly spaced values as int16 (the bits of bf16), first and last among them."""
    flat = values.reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    picked = flat[index.to(flat.device)].cpu()
    if picked.is_floating_point():
        return picked.to(torch.bfloat16).view(torch.int16)
    return picked.to(torch.int16)
