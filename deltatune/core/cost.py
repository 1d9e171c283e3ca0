"""What merging costs: KL(adapted || merged) of the next token, and the perplexity of the same text before and after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Cost:
    """Means over `tokens` positions, in nats; `gap` is the largest difference of a logit, `agree` how often both models
    choose the same token. Perplexities are of the text itself, None where a model does not predict the next token."""

    tokens: int
    kl: float
    gap: float
    agree: float
    perplexity: float | None = None
    merged_perplexity: float | None = None

    def __str__(self) -> str:
        said = f"KL {self.kl:.2e} nats a token, largest difference of a logit {self.gap:.2e}, {self.agree:.1%} agree"
        if self.perplexity is not None:
            said += f", perplexity {self.perplexity:.3f} -> {self.merged_perplexity:.3f}"
        return f"{said} ({self.tokens} tokens)"


@torch.no_grad()
def cost(adapted: Any, merged: Any, batches: Iterable[Mapping[str, Tensor]]) -> Cost:
    """Compare two models, both in eval mode, on the same inputs: input_ids [rows, seq], attention_mask where padded.

    ValueError without a position to compare.
    """
    found = [compare(adapted, merged, batch) for batch in batches]
    sums = torch.tensor([sums for sums, _ in found], dtype=torch.float64).reshape(-1, 6).sum(0).tolist()
    tokens, kl, agree, ahead, before, after = sums
    if not tokens:
        raise ValueError("there is no text to measure the merge on")
    both = [math.exp(lost / ahead) if ahead else None for lost in (before, after)]
    return Cost(int(tokens), kl / tokens, max(gap for _, gap in found), agree / tokens, *both)


def compare(adapted: Any, merged: Any, batch: Mapping[str, Tensor]) -> tuple[list[float], float]:
    """([tokens, sum of KL, choices that agree, predicted tokens, nll of each model], largest difference of a logit).

    In fp64: in fp32 a KL this small is nothing but rounding.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    logp, logq = (said(model, batch) for model in (adapted, merged))
    if logp.shape[:-1] != mask.shape:  # choices of a row, not one a token
        mask = mask.any(1).view(-1, *[1] * (logp.dim() - 2)).expand(logp.shape[:-1])
    gap = float((logp - logq)[mask].abs().max())
    agree = (logp.argmax(-1) == logq.argmax(-1))[mask].sum()
    logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
    kl = F.kl_div(logq[mask], logp[mask], log_target=True, reduction="sum")
    sums = [float(mask.sum()), float(kl), float(agree)]
    if logp.dim() == 2 or adapted.config.is_encoder_decoder or "ForCausalLM" not in names(adapted):
        return [*sums, 0.0, 0.0, 0.0], gap
    ahead = ids.masked_fill(~mask, -100)[:, 1:].flatten()
    lost = [float(F.nll_loss(x[:, :-1].flatten(0, 1), ahead, reduction="sum")) for x in (logp, logq)]
    return [*sums, float((ahead != -100).sum()), *lost], gap


def said(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """A model's logits in fp64: [rows, seq, vocabulary or tags], [rows, classes], or [rows, 2, seq] of spans."""
    found = model(**batch)
    return (found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], 1)).double()


def names(model: Any) -> str:
    """A model's class, with GPT-2's spelling of a causal language model as the others'."""
    return type(model).__name__.replace("LMHeadModel", "ForCausalLM")
