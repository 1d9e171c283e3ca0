"""A first estimate of a run's peak memory, to warn before step 1 (it warns, it does not refuse)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..core.delta import SLOT
from ..data.media import reads
from ..machine import free_memory

if TYPE_CHECKING:
    from .job import Job

ACTIVATIONS = (
    34  # bytes per token, layer and hidden unit of a block without recomputation (Korthikanti 2022, eq. 2), at bf16
)
RECOMPUTED = 2  # with gradient checkpointing only the blocks' inputs stay


def estimate(job: Job) -> dict[str, int]:
    """Predicted bytes by part, and their sum `total`."""
    whole, t = job.model.config, job.config.train
    config = getattr(whole, "vision_config", whole) if reads(whole) == "image" else whole
    base = sum(p.numel() * p.element_size() for n, p in job.model.named_parameters() if SLOT not in n)
    trainable, tuned = job.trainable(), job.to_train()
    unchosen = sum(p.numel() for p in trainable.values()) - tuned
    masters = sum(p.numel() * 4 for p in trainable.values() if p.dtype != torch.float32)
    longest = max((row.length for row in job.rows), default=1)
    tokens = t.batch_tokens or longest * (t.batch_rows or 1)
    depth = int(config.num_hidden_layers) * (2 if config.is_encoder_decoder else 1)
    hidden = int(config.hidden_size)
    wide = 2 if next(job.model.parameters()).dtype == torch.float32 else 1
    per_layer = RECOMPUTED if job.recompute else ACTIVATIONS
    supervised = sum(r.targets for r in job.rows) / max(sum(r.length for r in job.rows), 1)
    parts = {
        "weights": base,
        "gradients": tuned * 4,
        "optimizer": tuned * 8 + masters,
        "activations": tokens * hidden * depth * per_layer * wide,
        # logits in fp32, their gradient, and the softmax in between
        "logits": int(tokens * supervised) * int(config.vocab_size) * 12 if job.objective.name == "sft" else 0,
    }
    if unchosen:  # before step 1: a value, its gradient and its score, of what will not be kept
        parts["choosing"] = unchosen * 12
    return {**parts, "total": sum(parts.values())}


def free() -> int:
    """Bytes that can still be had on the device the run uses."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return free_memory()


def warning(predicted: Mapping[str, int]) -> str | None:
    """What to say when the estimate does not fit; None when it does."""
    total, available = predicted["total"], free()
    if total <= available:
        return None
    most = max((k for k in predicted if k != "total"), key=lambda k: predicted[k])
    return (
        f"predicted peak memory {total / 2**30:.1f} GiB (mostly {most}), free {available / 2**30:.1f} GiB: "
        "lower train.batch_tokens (or batch_rows), or set train.checkpoint_gradients: on"
    )
