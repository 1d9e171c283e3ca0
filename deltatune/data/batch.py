"""Rows of tokens -> tensors: padded side by side, or packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .encode import IGNORE, Encoded, Reading
from .order import Batching, generator, plan
from .problems import nearest

__all__ = ["Batch", "Batching", "filled", "generator", "pack", "pad", "plan"]


@dataclass(frozen=True)
class Batch:
    """`inputs`: model keyword arguments, input_ids [rows, seq]. `labels` [rows, seq] with -100, or targets [rows(, n)].

    Packed (`lens`): input_ids [1, sum(lens)], position_ids restart at 0 for every sequence, no attention_mask.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    lens: tuple[int, ...] | None = None
    mask_at: Tensor | None = None
    where: tuple[str, ...] = ()
    choices: Tensor | None = None  # [rows, choices, longest] with -100: answers to choose from
    reading: tuple[Reading | None, ...] = ()
    prompts: int = 1  # so many copies of each row side by side, each with a prompt of its own
    combine: str = "vote"
    known: Any = None  # a context in which the model knows what its frozen blocks make of these rows (train.known)
    front: Any = None  # what all rows begin with, where its keys and values are known (evaluate.cache.Front)

    @property
    def targets(self) -> int:
        """What a loss sum is divided by: supervised tokens, or rows where a row has one target."""
        if self.labels.dim() < 2 or self.labels.is_floating_point():
            return self.labels.shape[0]
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on another device; pictures and sounds as `dtype`, the model's own."""
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.inputs.items()
        }
        at = None if self.mask_at is None else self.mask_at.to(device)
        choices = None if self.choices is None else self.choices.to(device)
        return replace(self, inputs=inputs, labels=self.labels.to(device), mask_at=at, choices=choices)


def pad(rows: Sequence[Encoded], pad_id: int, side: str = "right") -> Batch:
    """Rows filled up to the longest. The attention mask goes by length, never by `ids == pad_id`: pad may be eos."""
    if not rows:
        raise ValueError("an empty batch: give at least one row")
    if side not in ("right", "left"):
        raise ValueError(f"side: {side!r} is neither 'right' nor 'left'.{nearest(side, ('right', 'left'))}")
    return replace(
        Batch(
            stacked(rows) or _tokens(rows, pad_id, side),
            _labels(rows, side),
            mask_at=_mask_at(rows, side),
            choices=_choices(rows),
        ),
        where=tuple(row.where for row in rows),
        reading=tuple(row.reading for row in rows),
    )


def _tokens(rows: Sequence[Encoded], pad_id: int, side: str) -> dict[str, Tensor]:
    ids = [row.ids for row in rows]
    inputs = {
        "input_ids": filled(ids, pad_id, side),
        "attention_mask": filled([(1,) * len(row) for row in ids], 0, side),
    }
    if all(row.type_ids is not None for row in rows):
        inputs["token_type_ids"] = filled([row.type_ids or () for row in rows], 0, side)
    return inputs


def stacked(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """The model's inputs of rows of pictures or sounds, which are read here; {} for rows of tokens."""
    found = [row.read() for row in rows if row.read is not None]
    assert len(found) in (0, len(rows)), "a model reads rows of one kind"
    return {name: torch.stack([one[name] for one in found]) for name in (found[0] if found else ())}


def filled(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """[rows, longest] long."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for line, row in zip(out, rows, strict=True):
        place = slice(0, len(row)) if side == "right" else slice(len(line) - len(row), None)
        line[place] = torch.tensor(row, dtype=torch.long)
    return out


def _labels(rows: Sequence[Encoded], side: str) -> Tensor:
    if all(row.labels is not None for row in rows):
        # the decoder's targets begin at its own position 0
        decoder = any(row.decoder for row in rows)
        return filled([row.labels or () for row in rows], IGNORE, "right" if decoder else side)
    targets = [row.target for row in rows]
    missing = next((row.where for row in rows if row.target is None), None)
    if missing is not None:
        raise ValueError(f"{missing}: the row has neither labels nor a target")
    scores = any(isinstance(value, float | tuple) for value in targets)
    return torch.tensor(targets, dtype=torch.float32 if scores else torch.long)


def _choices(rows: Sequence[Encoded]) -> Tensor | None:
    """Rows with fewer answers than others are filled up with answers of no tokens."""
    if not any(row.choices for row in rows):
        return None
    most = max(len(row.choices) for row in rows)
    flat = [ids for row in rows for ids in (*row.choices, *([()] * (most - len(row.choices))))]
    return filled(flat, IGNORE).view(len(rows), most, -1)


def _mask_at(rows: Sequence[Encoded], side: str) -> Tensor | None:
    if any(row.mask_at is None for row in rows):
        return None
    longest = max(len(row.ids) for row in rows)
    shift = [longest - len(row.ids) if side == "left" else 0 for row in rows]
    return torch.tensor([(row.mask_at or 0) + s for row, s in zip(rows, shift, strict=True)])


def pack(rows: Sequence[Encoded]) -> Batch:
    """Rows end to end, [1, sum of lengths]; each row's first label is -100, so that no row predicts another."""
    if not rows:
        raise ValueError("an empty batch: give at least one row")
    for row in rows:
        if row.labels is None or row.decoder:
            what = "an encoder-decoder's row" if row.decoder else "a row without token labels"
            what = "a picture or sound" if row.read is not None else what
            raise ValueError(f"{row.where}: {what} cannot be packed; pad it (packing: false)")
        assert row.labels[0] == IGNORE, row.where
    lens = tuple(len(row.ids) for row in rows)
    inputs = {
        "input_ids": torch.tensor([[i for row in rows for i in row.ids]]),
        "position_ids": torch.cat([torch.arange(length) for length in lens])[None],
    }
    labels = torch.tensor([[label for row in rows for label in row.labels or ()]])
    return Batch(inputs, labels, lens, where=tuple(row.where for row in rows))


def side_by_side(rows: Sequence[Encoded], sets: Sequence[Sequence[int]], count: int = 0) -> list[Encoded]:
    """Each row once for every prompt of its task: `count` sets each (0: all are one task's), of which a row holds the
    ids of the first."""
    count = count or len(sets)
    firsts = range(0, len(sets), max(count, 1))
    swaps = [{a: b for f in firsts for a, b in zip(sets[f], sets[f + k], strict=True)} for k in range(count)] or [{}]
    return [replace(row, ids=tuple(swap.get(i, i) for i in row.ids)) for row in rows for swap in swaps]
