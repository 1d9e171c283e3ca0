"""Rows of tokens -> tensors (padded, or packed end to end), and which rows go together: a pure function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .encode import IGNORE, Encoded
from .problems import nearest

OPEN_BINS = 64  # first fit looks at the newest bins only: linear time, within 1 % of looking at all
SORT_WINDOW = 50  # batches sorted by length together, so that a padded epoch stays well shuffled


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

    @property
    def targets(self) -> int:
        """What a loss sum is divided by: supervised tokens, or rows where a row has one target."""
        if self.labels.dim() < 2 or self.labels.is_floating_point():
            return self.labels.shape[0]
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        at = None if self.mask_at is None else self.mask_at.to(device)
        return Batch(inputs, self.labels.to(device), self.lens, at, self.where)


def pad(rows: Sequence[Encoded], pad_id: int, side: str = "right") -> Batch:
    """Rows filled up to the longest. The attention mask goes by length, never by `ids == pad_id`: pad may be eos."""
    if not rows:
        raise ValueError("an empty batch: give at least one row")
    if side not in ("right", "left"):
        raise ValueError(f"side: {side!r} is neither 'right' nor 'left'.{nearest(side, ('right', 'left'))}")
    ids = [row.ids for row in rows]
    inputs = {
        "input_ids": filled(ids, pad_id, side),
        "attention_mask": filled([(1,) * len(row) for row in ids], 0, side),
    }
    if all(row.type_ids is not None for row in rows):
        inputs["token_type_ids"] = filled([row.type_ids or () for row in rows], 0, side)
    return Batch(inputs, _labels(rows, side), mask_at=_mask_at(rows, side), where=tuple(row.where for row in rows))


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


def _mask_at(rows: Sequence[Encoded], side: str) -> Tensor | None:
    if any(row.mask_at is None for row in rows):
        return None
    longest = max(len(row.ids) for row in rows)
    shift = [longest - len(row.ids) if side == "left" else 0 for row in rows]
    return torch.tensor([(row.mask_at or 0) + s for row, s in zip(rows, shift, strict=True)])


def pack(rows: Sequence[Encoded]) -> Batch:
    """Rows end to end in one sequence, [1, sum of lengths]; each row's first label is -100, so no row predicts another."""
    if not rows:
        raise ValueError("an empty batch: give at least one row")
    for row in rows:
        if row.labels is None or row.decoder:
            what = "an encoder-decoder's row" if row.decoder else "a row without token labels"
            raise ValueError(f"{row.where}: {what} cannot be packed; pad it (packing: false)")
        assert row.labels[0] == IGNORE and len(row.labels) == len(row.ids)
    lens = tuple(len(row.ids) for row in rows)
    inputs = {
        "input_ids": torch.tensor([[i for row in rows for i in row.ids]]),
        "position_ids": torch.cat([torch.arange(length) for length in lens])[None],
    }
    labels = torch.tensor([[label for row in rows for label in row.labels or ()]])
    return Batch(inputs, labels, lens, where=tuple(row.where for row in rows))


@dataclass(frozen=True)
class Batching:
    """How rows are put together: by `tokens` (padding counts, unless `packing`) or by `rows`; exactly one of them.

    group: rows of like length together (less padding).
    """

    tokens: int | None = None
    rows: int | None = None
    packing: bool = False
    group: bool = False

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.rows is None):
            raise ValueError(f"give one of batch_tokens ({self.tokens}) and batch_rows ({self.rows})")
        if (self.tokens or self.rows or 0) < 1:
            raise ValueError(f"batch_tokens and batch_rows are at least 1, not {self.tokens or self.rows}")


def generator(*key: int) -> np.random.Generator:
    """A private stream of random numbers for a key of integers: the same in every process, apart from the global RNG."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([abs(k) * 2 + (k < 0) for k in key])))


def plan(lengths: Sequence[int], batching: Batching, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Row numbers of every micro-batch of an epoch: every row exactly once, a pure function of the arguments.

    Errors: ValueError when a row alone is longer than a batch may be.
    """
    if batching.tokens is not None:
        long = [i for i, length in enumerate(lengths) if length > batching.tokens]
        if long:
            most, shown = max(lengths[i] for i in long), ", ".join(map(str, long[:5]))
            reason = (
                f"{len(long)} rows are longer than batch_tokens {batching.tokens} (rows {shown}; up to {most} tokens)"
            )
            raise ValueError(f"{reason}. Raise batch_tokens to {most}, or lower max_length to {batching.tokens}")
    draw = generator(seed, epoch)
    order = [int(i) for i in draw.permutation(len(lengths))]
    if batching.tokens is not None and batching.packing:
        return _first_fit(order, lengths, batching.tokens)
    if batching.group:
        order = _grouped(order, lengths, batching)
    batches = _in_order(order, lengths, batching)
    return [batches[i] for i in draw.permutation(len(batches))] if batching.group else batches


def _first_fit(order: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for i in order:
        first = max(len(bins) - OPEN_BINS, 0)
        k = next((k for k in range(first, len(bins)) if free[k] >= lengths[i]), len(bins))
        if k == len(bins):
            bins.append([])
            free.append(room)
        bins[k].append(i)
        free[k] -= lengths[i]
    return bins


def _grouped(order: Sequence[int], lengths: Sequence[int], batching: Batching) -> list[int]:
    mean = max(sum(lengths) // max(len(lengths), 1), 1)
    window = SORT_WINDOW * (batching.rows or max((batching.tokens or 1) // mean, 1))
    parts = (order[i : i + window] for i in range(0, len(order), window))
    return [i for part in parts for i in sorted(part, key=lambda i: lengths[i])]


def _in_order(order: Sequence[int], lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        grown = max(longest, lengths[i])
        last = batches[-1] if batches else []
        fits = len(last) < batching.rows if batching.rows else (len(last) + 1) * grown <= (batching.tokens or 0)
        if last and fits:
            last.append(i)
            longest = grown
        else:
            batches.append([i])
            longest = lengths[i]
    return batches
