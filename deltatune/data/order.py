"""Which rows go together, and in which order: a pure function of (seed, epoch, lengths), the same in every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OPEN_BINS = 64  # first fit looks at the newest bins only: linear time
SORT_WINDOW = 50  # batches sorted by length together, so that a padded epoch stays well shuffled


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
    """A private stream of random numbers for integers: the same in every process, apart from the global RNG."""
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
    batches = together(_grouped(order, lengths, batching) if batching.group else order, lengths, batching)
    return [batches[i] for i in draw.permutation(len(batches))] if batching.group else batches


def together(order: Sequence[int], lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    """Row numbers in `order`, as many together as fit; a row longer than a batch may be is alone."""
    if batching.tokens is not None and batching.packing:
        return _first_fit(order, lengths, batching.tokens)
    return _in_order(order, lengths, batching)


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
