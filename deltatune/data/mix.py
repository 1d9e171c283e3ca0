"""Several sets in one epoch: temperature mixing p_i ~ n_i^tau (mT5, Xue et al. 2021), or a share of each set (DMT)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .order import Batching, generator, plan


def shares(spec: Sequence[Any] | Mapping[str, float]) -> dict[str, float]:
    """`[general, {math: 0.0039}]` -> {"general": 1.0, "math": 0.0039}. Errors: ValueError naming the entry."""
    items = [spec] if isinstance(spec, Mapping) else spec
    found: dict[str, float] = {}
    for item in items:
        for name, share in item.items() if isinstance(item, Mapping) else [(item, 1.0)]:
            if not isinstance(name, str) or isinstance(share, bool) or not isinstance(share, int | float):
                raise ValueError(f"data: {item!r} is neither a set nor {{set: share}}")
            if name in found:
                raise ValueError(f"data: the set {name!r} is there twice; give it one share")
            if not 0 < share < math.inf:
                raise ValueError(f"data: the share of {name!r} is {share}; it must be above 0 (1 = every row once)")
            found[name] = float(share)
    return found


def tempered(sizes: Mapping[str, int], tau: float, total: int | None = None) -> dict[str, int]:
    """Rows of each set in an epoch of `total` (default: all rows), in proportion to size^tau.

    tau 1 keeps the sizes, 0 makes all sets equal. Rounded by largest remainders, so that they sum to `total`.
    """
    total = sum(sizes.values()) if total is None else total
    powers = {name: size**tau if size else 0.0 for name, size in sizes.items()}
    whole = sum(powers.values()) or 1.0
    exact = {name: total * power / whole for name, power in powers.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    rest = total - sum(counts.values())
    for name in sorted(exact, key=lambda name: (counts[name] - exact[name], name))[:rest]:
        counts[name] += 1
    return counts


def mixture(
    sizes: Mapping[str, int], counts: Mapping[str, int], seed: int = 0, epoch: int = 0
) -> list[tuple[str, int]]:
    """(set, row) in the order of an epoch: a pure function of the arguments.

    A set with more rows to give than it has repeats whole, each row as often as any other to within one. A set with
    fewer gives the next slice of one fixed shuffle, so that over epochs every row comes equally often.
    """
    picks: list[tuple[str, int]] = []
    for name, size in sizes.items():
        wanted = counts.get(name, 0)
        if wanted and not size:
            raise ValueError(f"data: the set {name!r} is empty, {wanted} rows of it are wanted")
        order = generator(seed, zlib.crc32(name.encode())).permutation(size) if size else ()
        picks += [(name, int(order[(epoch * wanted + i) % size])) for i in range(wanted)]
    return [picks[i] for i in generator(seed, epoch, -1).permutation(len(picks))]


def portions(sizes: Mapping[str, int], share: Mapping[str, float]) -> dict[str, int]:
    """Rows of each set for its share (1 = every row once), at least one. Errors: ValueError for an unknown set."""
    unknown = set(share) - set(sizes)
    if unknown:
        raise ValueError(f"data: unknown sets {sorted(unknown)}; there are {sorted(sizes)}")
    return {name: max(round(sizes[name] * part), 1) for name, part in share.items()}


@dataclass(frozen=True)
class Mixture:
    """Sets of `sizes` rows, one behind the other, mixed by temperature: an epoch has as many rows as all of them."""

    sizes: tuple[int, ...]
    tau: float
    seed: int = 0

    def rows(self, epoch: int) -> list[int]:
        """Row numbers in the order of an epoch; a row of a small set may come several times, or none of a large one."""
        sizes = {str(i): n for i, n in enumerate(self.sizes)}
        starts = list(accumulate(self.sizes, initial=0))
        return [starts[int(name)] + row for name, row in mixture(sizes, tempered(sizes, self.tau), self.seed, epoch)]

    def plan(self, lengths: Sequence[int], batching: Batching, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch, as `order.plan` makes them."""
        rows = self.rows(epoch)
        return [[rows[i] for i in group] for group in plan([lengths[r] for r in rows], batching, self.seed, epoch)]
