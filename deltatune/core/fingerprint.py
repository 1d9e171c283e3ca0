"""The identity of a base model: which architecture, and a sample of every trunk weight."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch

from .delta import SLOT
from .quant import is_quantised, packs_to, weight
from .quant import scales as scales_of
from .site import output_layer, reader, trunk

SAMPLES = 1024  # values read per tensor: a second or two on 7 B parameters
# of a packed layer's scales: one 8-bit code of a scale that falls the other way moves a mean less
PIECES, CLOSE = 8, 5e-3
# what changes from load to load, or with the task's head, and never what the trunk computes
VOLATILE = re.compile(
    r"_.*|vocab_size|dtype|torch_dtype|transformers_version|auto_map|architectures|attn_implementation|use_cache"
    r"|.*drop.*|.*_token_id|init.*|output_.*|return_dict|.*gradient_checkpointing|chunk_size_feed_forward"
    r"|num_labels|id2label|label2id|problem_type|finetuning_task|task_specific_params|classifier.*|summary_.*"
    r"|pretraining_tp|reference_compile|deterministic_flash_attn|sparse_pred.*|quantization_config"
)


def fingerprint(model: Any, vocab: int | None = None) -> str:
    """sha256 over the architecture and sampled values of the trunk's weights, as bf16.

    The architecture is the whole configuration (rope, norm eps, activation, windows, soft caps, heads, ...) without
    what changes from load to load. bf16 makes one model loaded in fp32 and in bf16 agree. The weights are a sample,
    SAMPLES per tensor: a fine-tune moves them, a change of a few chosen values elsewhere goes unseen.
    Of a packed base the codes are sampled: another base's codes are others, and so is the same base's fingerprint in
    another packing. Their scales, which a CPU and a GPU round differently, are compared within a tolerance (`scales`).
    `vocab` caps embedding rows, for models that grew tokens.
    """
    inner = trunk(model)
    config: Any = getattr(model, "config", None)
    facts = stable(config.to_dict()) if hasattr(config, "to_dict") else {}
    facts["vocab_size"] = getattr(config, "vocab_size", None) if vocab is None else vocab
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    embedding = reader(model)
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


def strangers(model: Any, base: Any) -> list[str]:
    """The trunk tensors that `model` and `base` should share and do not, deltas left out. Of a packed layer: whether
    its codes are those that the base's weight rounds to."""
    theirs = dict(trunk(base).named_parameters())
    own = {n: p.detach() for n, p in trunk(model).named_parameters() if SLOT not in n.split(".")}
    return [name for name, ours in own.items() if name not in theirs or not alike(model, base, name, ours)]


def alike(model: Any, base: Any, name: str, ours: torch.Tensor) -> bool:
    """Whether the trunk tensor `name` is the same in both."""
    place = name.rpartition(".")[0]
    layer, other = trunk(model).get_submodule(place), trunk(base).get_submodule(place)
    if is_quantised(layer) and name.endswith("weight") and not is_quantised(other):
        return packs_to(layer, weight(other).detach())
    theirs = trunk(base).get_parameter(name).detach()
    return theirs.shape == ours.shape and torch.equal(sample(ours), sample(theirs))


def scales(model: Any) -> dict[str, list[float]]:
    """packed layer -> the means of its blocks' scales over up to PIECES equal pieces, in four digits; {} unpacked."""
    found = {name: layer for name, layer in trunk(model).named_modules() if is_quantised(layer)}
    return {
        name: [float(f"{part.double().mean():.3e}") for part in scales_of(layer).tensor_split(PIECES) if len(part)]
        for name, layer in found.items()
    }


def rescaled(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> list[str]:
    """The layers whose scales differ by more than two machines' rounding does. A layer that one side lacks differs."""
    return [
        name
        for name in dict.fromkeys((*ours, *theirs))
        if len(ours.get(name, ())) != len(theirs.get(name, ()))
        or any(abs(a - b) > CLOSE * max(abs(a), abs(b)) for a, b in zip(ours[name], theirs[name], strict=True))
    ]


def stable(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without its volatile keys, at every depth. What is off or empty counts as not there, because
    that is what a newer transformers adds for options that an older one did not have."""
    kept = {str(k): stable(v) if isinstance(v, dict) else v for k, v in config.items()}
    return {k: v for k, v in kept.items() if v and not VOLATILE.fullmatch(k)}


def sample(values: torch.Tensor) -> torch.Tensor:
    """SAMPLES evenly spaced values as int16 (the bits of bf16), first and last among them."""
    flat = values.reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    picked = flat[index.to(flat.device)].cpu()
    if picked.is_floating_point():
        return picked.to(torch.bfloat16).view(torch.int16)
    return picked.to(torch.int16)
