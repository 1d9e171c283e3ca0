"""Several answers to one text in one forward pass: the text is computed once, each answer sees it and itself alone."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attach import deltas, running
from ..core.attention import IMPLEMENTATION, unpackable
from ..core.places import first
from ..data.batch import Batch
from .common import states_at
from .projection import Projection


def continued(model: Any, batch: Batch, real: Tensor) -> tuple[Tensor, Projection]:
    """A causal model's states [n, d] in front of each token of `batch.choices` that is `real` [rows, choices, longest],
    each choice read behind its row's text, and what projects them."""
    starts = batch.inputs["attention_mask"].sum(1)
    return states_at(model, *(branched if branches(model, starts) else apart)(model, batch, real, starts))


def branches(model: Any, starts: Tensor) -> bool:
    """Whether answers side by side behind one text are read as they are alone: attention alone connects tokens, all of
    it under our mask, and nothing decides about a row by more than its text of `starts` [rows] tokens."""
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) is not None or model.config._attn_implementation not in PLAIN:
        return False
    waits = max((delta.waits for name in running(model) for delta in deltas(model, name)), default=0)
    return (not waits or waits <= int(starts.min())) and parted(model)


PLAIN = ("sdpa", IMPLEMENTATION)
PARTED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def parted(model: nn.Module) -> bool:
    """Whether nothing but attention connects tokens: a fact of the model's code, asked once, for it walks the model."""
    if model not in PARTED:
        PARTED[model] = not unpackable(model)
    return PARTED[model]


def branched(model: Any, batch: Batch, real: Tensor, starts: Tensor) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """One sequence a row: its text, then all choices but for their last tokens, which predict nothing."""
    assert batch.choices is not None
    ids, (rows, count, longest) = batch.inputs["input_ids"], batch.choices.shape
    text, own, known = ids.shape[1], longest - 1, batch.front.length if batch.front else 0
    steps = torch.arange(max(text, own), device=ids.device)
    before = steps[:text] < starts[:, None]  # [rows, text]: a text's own tokens
    upon = before[:, None].expand(rows, text + count * own, text).clone()
    upon[:, :text] &= torch.ones_like(upon[0, :text]).tril()
    alone = torch.block_diag(*[torch.ones(own, own, device=ids.device).tril()] * count).bool()
    see = torch.cat([upon, F.pad(alone, (0, 0, text, 0)).expand(rows, -1, -1)], 2)[:, None]
    see[..., text:] &= real[..., 1:].reshape(rows, 1, 1, count * own)  # filling is seen by none
    # the filling of a short choice stays within the table of positions, too
    places = (starts[:, None] + steps[:own])[:, None] * real[..., 1:]
    position = torch.cat([steps[:text].expand(rows, -1), places.flatten(1)], 1) + first(model.config)
    whole = torch.cat([ids, batch.choices[..., :-1].clamp(min=0).flatten(1)], 1)
    inputs = {"input_ids": whole, "attention_mask": see[:, :, known:], "position_ids": position[:, known:]}
    behind = text + torch.arange(count * own, device=ids.device).view(1, count, own).expand(rows, -1, -1)
    at = torch.cat([(starts - 1)[:, None, None].expand(rows, count, 1), behind], 2)
    row = torch.arange(rows, device=ids.device)[:, None, None].expand_as(real)
    return Batch(inputs, batch.labels, front=batch.front), (row[real], at[real])


def apart(model: Any, batch: Batch, real: Tensor, starts: Tensor) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """One sequence for each choice of each row."""
    assert batch.choices is not None
    ids, answers = batch.inputs["input_ids"], batch.choices
    rows, count, longest = answers.shape
    whole = F.pad(ids, (0, longest))[:, None].repeat(1, count, 1)
    steps = torch.arange(longest, device=ids.device)
    places = (starts[:, None] + steps)[:, None].expand(rows, count, longest)
    ends = (starts[:, None] + real.sum(-1)).flatten()
    # no wider than the longest of them: a long text and another row's long answer are not one text
    whole = whole.scatter(2, places, answers.clamp(min=0)).flatten(0, 1)[:, : int(ends.max())]
    mask = (torch.arange(whole.shape[1], device=ids.device) < ends[:, None]).long()
    inputs = Batch({"input_ids": whole, "attention_mask": mask}, batch.labels, front=batch.front)
    sequence = torch.arange(rows * count, device=ids.device).view(rows, count, 1).expand_as(real)
    return inputs, (sequence[real], places[real] - 1)
