"""A first estimate of a run's peak memory, to warn before step 1 (it warns, it does not refuse)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..core.delta import SLOT
from ..core.recompute import held as blocks_held
from ..core.recompute import units
from ..core.site import blocks, output_layer
from ..data.media import reads
from ..machine import free_memory, mapped_files
from ..objectives.branches import branches
from ..objectives.common import kind_of
from ..objectives.projection import CHUNK, in_pieces

if TYPE_CHECKING:
    from ..data.encode import Encoded
    from .job import Job

ACTIVATIONS = (
    34  # bytes per token, layer and hidden unit of a block without recomputation (Korthikanti 2022, eq. 2), at bf16
)
# bytes of both moments for each number that trains; Adafactor has a row and a column of them for a matrix
MOMENTS = {"adamw-bf16": 4, "adamw-8bit": 2, "adafactor": 0, "adafactor-relative": 0}
RECOMPUTED = 2  # of a recomputed block only its input stays


def estimate(job: Job) -> dict[str, int]:
    """Predicted bytes by part, and their sum `total`."""
    whole = job.model.config
    config = getattr(whole, "vision_config", whole) if reads(whole) == "image" else whole
    base = sum(p.numel() * p.element_size() for n, p in job.model.named_parameters() if SLOT not in n)
    trainable, tuned = job.trainable(), job.to_train()
    unchosen = sum(p.numel() for p in trainable.values()) - tuned
    tokens = at_once(job)
    depth = int(config.num_hidden_layers) * (2 if config.is_encoder_decoder else 1)
    hidden = int(config.hidden_size)
    wide = 2 if next(job.model.parameters()).dtype == torch.float32 else 1
    supervised = sum(map(learned, job.rows)) / max(sum(map(Passes.of(job).tokens, job.rows)), 1)
    # logits in fp32, their gradient, and the softmax in between
    logits = 0 if job.objective.task_head else held(job, int(tokens * supervised)) * 12
    parts = {
        "weights": base,
        **stepping(job, tuned, sum(p.numel() for p in trainable.values() if p.dtype != torch.float32)),
        "activations": activations(job, depth, (tokens * hidden * wide, logits)),
        "logits": logits,
    }
    if unchosen:  # before step 1: a value, its gradient and its score, of what will not be kept
        parts["choosing"] = unchosen * 12
    return {**parts, "total": sum(parts.values())}


def activations(job: Job, depth: int, sizes: tuple[int, int]) -> int:
    """Bytes that `depth` layers hold for the backward pass, with as many recomputed as the job says.

    sizes: tokens times hidden units at bf16, in bytes / 2; the logits, which are gone when the first of the recomputed
    layers holds all it needs once more.
    """
    unit, logits = sizes
    names, there = blocks(job.model), units(job.model)
    layers = depth * len(blocks_held(job.model)) / len(names) if names else depth
    each = layers / max(len(there), 1)
    rest = max((layers - job.recompute * each) * ACTIVATIONS * unit, ACTIVATIONS * unit - logits)
    return int(job.recompute * each * RECOMPUTED * unit + rest)


def stepping(job: Job, tuned: int, half: int) -> dict[str, int]:
    """Bytes of gradients and optimizer where `tuned` numbers train, `half` of them in half precision."""
    t = job.config.train
    moments = tuned * MOMENTS.get(t.optimizer, 8)
    if t.rounding == "masters":  # a newest gradient in half precision lies beside the sum
        several = t.accumulate > 1 or job.pass_tokens is not None
        return {"gradients": tuned * 4 + half * 2 * several, "optimizer": moments + half * 4}
    # without masters a gradient stays in bf16; a sum over micro-batches lies beside the newest one
    saved = min(half, tuned) * 2 if t.accumulate == 1 and job.pass_tokens is None else 0
    return {"gradients": tuned * 4 - saved, "optimizer": moments}


def batch_tokens(job: Job) -> int:
    """Tokens of the largest micro-batch: every row with each of its answers, once for each prompt side by side."""
    t, most, passes = job.config.train, len(job.rows), Passes.of(job)

    def batch(row: Encoded) -> float:
        """Tokens of a batch of rows like this one."""
        planned = job.prompts * max(row.length, 1)  # what the order of rows goes by
        rows = min(t.batch_rows, most) if t.batch_rows else max(1.0, (t.batch_tokens or 0) / planned)
        return rows * job.prompts * passes.tokens(row)

    return int(max(map(batch, job.rows), default=t.batch_tokens or 1))  # a stream's rows are not known


def at_once(job: Job) -> int:
    """Tokens of the largest pass: a whole micro-batch, or what is left of it under `pass_tokens`; a row is in one."""
    whole, passes = batch_tokens(job), Passes.of(job)
    if job.pass_tokens is None:
        return whole
    longest = job.prompts * max(map(passes.tokens, job.rows), default=0)
    return min(whole, max(job.pass_tokens, longest))


@dataclass(frozen=True)
class Passes:
    """How a model reads a row under one prompt. together: the answers to one text side by side behind it, in one
    sequence; apart: each answer in a sequence of its own, behind the text that all share (an encoder's is read once).
    """

    together: bool
    encoded: bool

    @classmethod
    def of(cls, job: Job) -> Passes:
        shortest = min((len(row.ids) for row in job.rows if row.choices), default=None)
        encoded = kind_of(job.model) == "seq2seq"
        asks = shortest is not None and not encoded
        return cls(asks and branches(job.model, torch.tensor([shortest])), encoded)

    def tokens(self, row: Encoded) -> int:
        count, longest = len(row.choices), max(map(len, row.choices), default=0)
        if self.encoded or not count:
            return max(row.length, count * longest)
        return row.length + count * (longest - 1) if self.together else count * (row.length + longest)

    def sequences(self, row: Encoded) -> int:
        return 1 if self.together else max(1, len(row.choices))


def learned(row: Encoded) -> int:
    """Tokens of a row that the loss asks the vocabulary for; a class, span or score is none."""
    return sum(map(len, row.choices)) or row.targets or int(row.mask_at is not None)


def held(job: Job, tokens: int) -> int:
    """Logits that exist at once where `tokens` are asked for: all, or a piece of them at a time."""
    logits = tokens * int(job.model.config.get_text_config().vocab_size)
    return min(logits, CHUNK) if job.objective.name != "cloze" and in_pieces(output_layer(job.model)) else logits


def free() -> int:
    """Bytes that can still be had on the device the run uses."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return free_memory()


def there(model: nn.Module) -> int:
    """Bytes of the base's weights that are no longer free, as the model is loaded: what an estimate has beyond them is
    still to come. Those that lie in pages of a mapped file count as free memory for as long as they are not changed."""
    on_gpu, files = torch.cuda.is_available(), [] if torch.cuda.is_available() else mapped_files()
    found = (p for n, p in model.named_parameters() if SLOT not in n and p.is_cuda == on_gpu and not p.is_meta)
    return sum(p.nbytes for p in found if not any(a <= p.data_ptr() < b for a, b in files))


def room(job: Job) -> int:
    """Bytes that a run's peak may have: those that are free, and those that its weights have taken already."""
    return free() + there(job.model)


def warning(predicted: Mapping[str, int], loaded: int = 0, more: bool = True) -> str | None:
    """What to say when the estimate does not fit; None when it does. loaded: bytes of it that are `there` already;
    more: whether more could be recomputed."""
    total, available = predicted["total"], free()
    if total - loaded <= available:
        return None
    most = max((k for k in predicted if k != "total"), key=lambda k: predicted[k])
    already = f"; weights of {loaded / 2**30:.1f} GiB are loaded already" * bool(loaded)
    return (
        f"predicted peak memory {total / 2**30:.1f} GiB (mostly {most}{already}), free {available / 2**30:.1f} GiB: "
        f"lower train.batch_tokens (or batch_rows){', or set train.checkpoint_gradients: on' * more}"
    )
