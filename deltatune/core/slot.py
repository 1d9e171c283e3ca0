"""Slot: the one child module an adapted layer gets; its two hooks run the active deltas."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .delta import SLOT, Delta, overrides
from .joint import Joint, added, plain, split
from .site import put, take

Running = tuple[str, Delta]


class Tap:
    """A span's reading end: remembers the input of one layer until the block it lives in is left."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.on = False  # only an active span records: an idle one would keep tensors alive

    def record(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.on:
            self.x = args[0]

    def clear(self, layer: nn.Module, args: object, output: object) -> None:
        """Runs when the block is left, by return or by exception."""
        self.x = None

    def read(self, site: str) -> Tensor:
        if self.x is None:
            raise RuntimeError(f"the span's read layer {site} did not run before its write layer in this forward pass")
        return self.x


class Slot(nn.ModuleDict):
    """The deltas of one layer by adapter name. Hooks are bound methods, so that a deep copy runs its own deltas."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Tensor] | None = None  # adapter name -> the batch rows it applies to
        self.row_count = 0
        self.handles: list = []
        self.hooked: set[str] = set()
        # what runs now, in order: settled by `switch`, because the hooks are on the hot path
        self.befores: list[Running] = []
        self.afters: list[Running] = []
        self.joints: list[Joint] = []
        self.direct: list[Running] = []  # the first of `afters`, where it is a product added to the layer's own
        self.attending: list[Running] = []
        self.looking: list[Running] = []
        self.wrapping: list[Running] = []

    def of(self, name: str) -> list[Delta]:
        """The deltas of adapter `name` here; none when it does not touch this layer."""
        return [d for d in self[name] if isinstance(d, Delta)] if name in self else []  # type: ignore[attr-defined]

    def add(self, layer: nn.Module, name: str, delta: Delta) -> None:
        """Put `delta` under adapter `name` (several may share it) and register the hooks it needs."""
        self[name] = nn.ModuleList([*self.of(name), delta])
        if overrides(delta, "before"):
            self.hook("pre", lambda: layer.register_forward_pre_hook(self.pre))
        if overrides(delta, "after"):
            self.hook("post", lambda: layer.register_forward_hook(self.post, prepend="wrap" in self.hooked))
        if overrides(delta, "look"):
            self.hook("look", lambda: layer.register_forward_pre_hook(self.look, with_kwargs=True))
        if overrides(delta, "wrap"):
            self.hook("wrap", lambda: layer.register_forward_hook(self.wrap, with_kwargs=True))

    def hook(self, kind: str, register: Callable[[], object]) -> None:
        if kind not in self.hooked:
            self.hooked.add(kind)
            self.handles.append(register())

    def switch(self, active: tuple[str, ...], rows: dict[str, Tensor] | None, count: int) -> None:
        """Run these adapters from now on. In-place deltas act through the weights, except per row."""
        self.rows, self.row_count = rows, count
        running = [(n, d) for n in active for d in self.of(n) if rows is not None or not d.inplace]
        self.befores = [(n, d) for n, d in running if overrides(d, "before")]
        self.joints, self.afters = split([(n, d) for n, d in running if overrides(d, "after")], rows, count)
        self.direct = [] if rows is not None else [(n, d) for n, d in self.afters[:1] if direct(d)]
        self.attending = [(n, d) for n, d in running if overrides(d, "attend")]
        self.looking = [(n, d) for n, d in running if overrides(d, "look")]
        self.wrapping = [(n, d) for n, d in running if overrides(d, "wrap")]

    @property
    def runs(self) -> bool:
        """Whether anything happens now when the layer is called."""
        return bool(self.befores or self.afters or self.looking or self.wrapping)

    @property
    def attends(self) -> bool:
        return bool(self.attending)

    def pre(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = args[0]
        for name, delta in self.befores:
            x = self.on_rows(name, x, lambda part, _, d=delta: d.before(layer, part))
        if isinstance(layer, nn.Embedding) and (x.is_cpu or not torch.is_grad_enabled()):
            self.check_ids(layer, x)  # not where a GPU trains, which would wait for the answer
        return (x, *args[1:]) if self.befores else None

    def check_ids(self, layer: nn.Embedding, ids: Tensor) -> None:
        """ValueError for ids [rows, ...] past the vocabulary that no adapter running on their row has vectors for."""
        beyond = ids >= layer.num_embeddings
        if not beyond.any():
            return
        row, first = int(beyond.reshape(len(ids), -1).any(1).nonzero()[0]), int(ids[beyond][0])
        owners = {n: [i for d in self.of(n) for i in getattr(d, "virtual_ids", tuple)()] for n in self}
        whose = next((n for n, own in owners.items() if first in own), None)
        said = f"a virtual token of adapter {whose!r}, which does not run on that row" if whose else "no token"
        raise ValueError(
            f"row {row}: token id {first} is {said} (the vocabulary has {layer.num_embeddings}): give each row the "
            "virtual_ids of its own adapter, or activate the one they belong to"
        )

    def post(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        apart: list[Running] = []
        rest = self.afters
        own = bool(self.direct or self.joints) and plain(layer, self.post)
        if self.direct and own:
            y, rest = added(self.direct[0][1], args[0], y, layer), self.afters[1:]
        for joint in self.joints:
            if (together := joint(args[0], y, by_row, own)) is None:
                apart += joint.parts
            else:
                y = together
        for name, delta in (*apart, *rest):
            source = delta.tap.read(delta.site.read) if delta.tap else args[0]
            part = take(y, delta.site.columns)
            part = self.on_rows(name, part, lambda p, s, d=delta: d.after(layer, s, p), source)
            y = put(y, delta.site.columns, part)
        return y

    def look(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, delta in self.looking:
            delta.look(layer, (args, kwargs), partial(self.picked, name))

    def wrap(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        for _, delta in self.wrapping:
            output = delta.wrap(layer, (args, kwargs), output)
        return output

    def picked(self, name: str, x: Tensor) -> Tensor:
        """The rows of x [batch, ...] that adapter `name` runs on."""
        return x if self.rows is None else by_row(x, self.row_count)[self.rows[name].to(x.device)]

    def on_rows(self, name: str, y: Tensor, change: Callable, x: Tensor | None = None) -> Tensor:
        """`change` the whole batch, or only the rows that belong to adapter `name`."""
        if self.rows is None:
            return change(y, x)
        index = self.rows[name]
        if not index.numel():
            return y
        shape, y = y.shape, by_row(y, self.row_count)
        source = y if x is None else by_row(x, self.row_count)
        index = index.to(y.device)
        changed = change(y[index], source[index]).to(y.dtype)
        return y.index_copy(0, index, changed).reshape(shape)

    def attend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """key, value [batch, kv_heads, seq, dim] -> grown at the front by p, and visible [batch, p] or None for all."""
        if self.rows is None:
            seen, before = [], key.shape[2]
            for _, delta in self.attending:
                length = key.shape[2]
                key, value = delta.attend(key, value)
                seen.append((delta.visible(key.shape[0]), key.shape[2] - length))
            return key, value, fronts(seen, key) if key.shape[2] > before else None
        return self.attend_rows(key, value)

    def attend_rows(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row sees its own adapter's positions: shorter prefixes are padded in front and hidden."""
        length, repeat = key.shape[2], copies(key.shape[0], self.row_count)
        owner = {int(i): n for n, index in (self.rows or {}).items() for i in index}
        grown = []
        for i in range(key.shape[0]):
            k, v = key[i : i + 1], value[i : i + 1]
            for name, delta in self.attending:
                if owner.get(i // repeat) == name and self.sees(delta, name, divmod(i, repeat), repeat):
                    k, v = delta.attend(k, v)
            grown.append((k, v))
        most = max(k.shape[2] for k, _ in grown)
        seen = [[j >= most - k.shape[2] for j in range(most - length)] for k, _ in grown]
        visible = torch.tensor(seen, dtype=torch.bool, device=key.device)
        front = [tuple(F.pad(t, (0, 0, most - t.shape[2], 0)) for t in pair) for pair in grown]
        return (
            torch.cat([k for k, _ in front]),
            torch.cat([v for _, v in front]),
            visible.view(key.shape[0], most - length),
        )

    def sees(self, delta: Delta, name: str, place: tuple[int, int], repeat: int) -> bool:
        """Whether the sequence at `place` (row of the batch, copy of it) sees what `delta` puts in front."""
        mine = (self.rows or {})[name].tolist()
        seen = delta.visible(len(mine) * repeat)
        return seen is None or bool(seen[mine.index(place[0]) * repeat + place[1]])


def direct(delta: Delta) -> bool:
    """Whether a delta adds a product of the layer's whole input to its whole output."""
    return delta.tap is None and delta.site.columns is None and delta.low_rank() is not None


def fronts(seen: list[tuple[Tensor | None, int]], key: Tensor) -> Tensor | None:
    """[batch, positions in front] of several deltas, of which each stands before the earlier ones; None: all seen."""
    if all(rows is None for rows, _ in seen):
        return None
    every = torch.ones(key.shape[0], dtype=torch.bool, device=key.device)
    parts = [(every if rows is None else rows.to(key.device))[:, None].expand(-1, n) for rows, n in reversed(seen)]
    return torch.cat(parts, 1)


def by_row(x: Tensor, rows: int) -> Tensor:
    """x [rows * n, ...] -> [rows, n, ...]: some models flatten tokens or expand beams into the first axis."""
    n = copies(x.shape[0], rows)
    return x if n == 1 else x.reshape(rows, n, *x.shape[1:])


def copies(size: int, rows: int) -> int:
    """How many entries of a first axis of `size` belong to each row; ValueError when it does not come out even."""
    if not rows or size % rows or not size:
        raise ValueError(
            f"rows() was given {rows} names, but the batch has {size} rows: give one name per row (None: the base), "
            "or one name for all rows"
        )
    return size // rows


def slots(model: nn.Module) -> dict[str, Slot]:
    """layer name -> its slot, for every adapted layer."""
    return {name.removesuffix(SLOT).rstrip("."): m for name, m in model.named_modules() if isinstance(m, Slot)}


def deltas(model: nn.Module, name: str | None = None) -> list[Delta]:
    """The deltas of one adapter (of all, by default), in the model's order."""
    return [d for slot in slots(model).values() for n in slot if name in (None, n) for d in slot.of(n)]
