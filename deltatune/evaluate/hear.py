"""Hear: prompts that are sounds, and what a decoder begins to write from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batch import stacked
from ..data.encode import Encoded, edges
from ..data.media import reader


def hears(prompt: Any) -> bool:
    """Whether a prompt is an encoded sound."""
    return getattr(prompt, "read", None) is not None


def heard(model: Any, prompts: Sequence[Any]) -> Sequence[Any]:
    """Examples of sounds as encoded rows, every other prompt as it is. ValueError where the model takes no such."""
    found = reader(model.config)
    sounds = [p for p in prompts if getattr(p, "media", None) is not None]
    if found is None and sounds:
        kind, where = sounds[0].media.kind, sounds[0].where
        raise ValueError(f"{where}: {type(model).__name__} reads text, the row holds an {kind}: choose another model")
    if found is not None and not all(hears(p) or getattr(p, "media", None) is not None for p in prompts):
        raise ValueError(f"{type(model).__name__} writes what it hears: give rows with a column audio, not text")
    if not sounds or found is None:
        return prompts
    return [p if hears(p) else Encoded((), None, where=p.where, **found.row(p.media, p.where)) for p in prompts]


def opening(model: Any, tokenizer: Any) -> list[int]:
    """The ids that a decoder's text begins with: its start token, and what the tokenizer puts before a text."""
    start, front = model.config.decoder_start_token_id, edges(tokenizer)[0]
    return front if front[:1] == [start] else [start, *front]


def listened(model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """One batch of sounds as `generate` takes it. Windows are of one length: nothing in them is padding."""
    inputs = {name: tensor.to(model.device, model.dtype) for name, tensor in stacked(rows).items()}
    (first,) = inputs.values()
    mask = torch.ones(len(rows), first.shape[-1], dtype=torch.long, device=model.device)
    front = torch.tensor([opening(model, tokenizer)] * len(rows), device=model.device)
    return {**inputs, "attention_mask": mask, "decoder_input_ids": front}
