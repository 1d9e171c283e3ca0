"""Put deltas into a model, switch them, take them out: attach, detach, activate, disabled, rows, merge, fold."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import attention
from .delta import SLOT, Delta, Refusal, overrides
from .fingerprint import fingerprint
from .inplace import InPlace, InPlaceBias, refuse_rows
from .quant import dense, write
from .site import Site, block_of, common, parts, trunk, twins
from .slot import Slot, Tap, deltas, slots

STATE = "deltatune_state"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Method(Protocol):
    """A frozen dataclass whose fields are the paper's hyper-parameters."""

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]: ...


@dataclass
class State:
    """What has been attached to a model; lives on the model, so that a deep copy takes its own along."""

    base: str
    grads: dict[str, bool]
    vocab: int | None = None  # the base's own vocabulary, when tokens were added to it
    methods: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    packing: bool = False
    attention: Any = None  # the implementation to go back to, while ours is in use
    handles: list = field(default_factory=list)

    def token(self) -> tuple:
        return self.active, self.rows

    def watch(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Trunk hook: a backward pass that recomputes must see the adapters the forward pass saw."""
        seen = self.token()
        tensor = next((t for t in tensors(output) if t.requires_grad), None)
        if tensor is not None and needs_same_state(module):
            tensor.register_hook(lambda grad: self.same(seen))

    def same(self, seen: tuple) -> None:
        if seen != self.token():
            raise RuntimeError(
                f"adapters changed between forward ({describe(seen)}) and backward ({describe(self.token())}): "
                "recomputation would give a wrong gradient. Call backward before activate(), or restore the adapters first"
            )

    def shift(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Trunk hook: real tokens stand after the active prefixes' positions."""
        by = self.offsets(module)
        if by is None:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        source = ids if ids is not None else kwargs["inputs_embeds"]
        positions = kwargs.get("position_ids")
        if positions is None:
            past = kwargs.get("past_key_values")
            start = past.get_seq_length() if past is not None else 0
            positions = torch.arange(start, start + source.shape[1], device=source.device)[None]
        return args, {**kwargs, "position_ids": positions + by.to(positions.device)}

    def offsets(self, module: nn.Module) -> Tensor | None:
        shifts = {n: v for n, v in self.notes.get("shift", {}).items() if v}
        if not any(n in shifts for n in self.active):
            return None
        if self.rows is None:
            return torch.tensor([[sum(shifts.get(n, 0) for n in self.active)]])
        return torch.tensor([[shifts.get(n or "", 0)] for n in self.rows])


def describe(token: tuple) -> str:
    return f"rows {list(token[1])}" if token[1] is not None else f"active {list(token[0])}"


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (t for t in output.values() if isinstance(t, Tensor))
    elif isinstance(output, tuple | list):
        yield from (t for t in output if isinstance(t, Tensor))


def needs_same_state(module: nn.Module) -> bool:
    """Only recomputation and in-place weights can see another state in backward than in forward."""
    checkpointing = (
        "is_activation_checkpointing"
        if hasattr(type(module), "is_activation_checkpointing")
        else "is_gradient_checkpointing"
    )
    return bool(getattr(module, checkpointing, False)) or any(d.inplace for d in deltas(module))


# ---- attach and detach -----------------------------------------------------------------------------------------------
def attach(model: nn.Module, method: Method | Sequence[Method], name: str = "default") -> nn.Module:
    """Freeze `model`, add the deltas of `method` (or of a list of methods) under `name`, make them active and trainable.

    Raises ValueError for a bad or taken name or a target that matches nothing, Refusal where the method cannot work.
    """
    methods = tuple(method) if isinstance(method, tuple | list) else (method,)
    check_new(model, name, methods)
    fresh = getattr(model, STATE, None) is None
    state = begin(model)
    try:
        activate(model)  # methods that read weights must see the base
        found = [pair for m in methods for pair in m.deltas(model)]
        if not found:
            raise ValueError(f"{methods} adapts no layer of {type(model).__name__}")
    except Exception:
        if fresh:
            end(model)
        raise
    place(model, name, found)
    state.methods[name] = methods
    state.notes.setdefault("shift", {})[name] = max(d.shift() for _, d in found)
    focus(model, name)
    activate(model, name)
    return model


def check_new(model: nn.Module, name: str, methods: tuple[Any, ...]) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"adapter name {name!r}: use 1 to 64 letters, digits, '_' or '-'")
    if name in attached(model):
        raise ValueError(f"an adapter {name!r} is attached already: detach it first, or choose another name")
    for m in methods:
        if not hasattr(m, "deltas"):
            raise ValueError(f"{m!r} is not a method: give LoRA(...), Prefix(...), ... or a list of them")
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "the model is sharded already: attach adapters before fully_shard, or ranks would train different ones"
        )


def begin(model: nn.Module) -> State:
    """The model's state, made on the first attach: originals noted, everything frozen, the trunk's hooks in."""
    state = getattr(model, STATE, None)
    if state is None:
        vocab = getattr(model, "deltatune_vocab", None)
        state = State(fingerprint(model, vocab), {n: p.requires_grad for n, p in model.named_parameters()}, vocab)
        setattr(model, STATE, state)
        inner = trunk(model)
        state.handles = [
            inner.register_forward_pre_hook(state.shift, with_kwargs=True),
            inner.register_forward_hook(state.watch),
        ]
        model.requires_grad_(False)
    return state


def end(model: nn.Module) -> None:
    """Forget everything: the model is as it was before the first attach."""
    state: State = getattr(model, STATE)
    for handle in state.handles:
        handle.remove()
    state.packing, state.active = False, ()
    sync_attention(model, state)
    delattr(model, STATE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.grads.get(name, parameter.requires_grad))


def place(model: nn.Module, name: str, found: list[tuple[Site, Delta]]) -> None:
    """Put each delta into its layer's slot, under a key of its own."""
    taken: dict[str, int] = {}
    for site, delta in found:
        taken[site.key] = taken.get(site.key, 0) + 1
        if taken[site.key] > 1:  # a union may change one layer twice
            site = Site(site.read, site.write, site.columns, f"{site.label}#{taken[site.key]}")
        layer = model.get_submodule(site.write)
        delta.site = site
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        slot = slot_of(layer)
        slot.add(layer, name, delta.to(device) if device.type != "meta" else delta)
        if site.is_span:
            span(model, slot, delta)


def slot_of(layer: nn.Module) -> Slot:
    if not hasattr(layer, SLOT):
        layer.add_module(SLOT, Slot())
    return getattr(layer, SLOT)


def span(model: nn.Module, slot: Slot, delta: Delta) -> None:
    """Record the read layer's input, and let go of it when the nearest common parent is left."""
    site, delta.tap = delta.site, Tap()
    parent = ".".join(parts(site.write)[: common(site.read, site.write)])
    delta.tap.handles = [
        model.get_submodule(site.read).register_forward_pre_hook(delta.tap.record),
        model.get_submodule(parent).register_forward_hook(delta.tap.clear, always_call=True),
    ]


def detach(model: nn.Module, name: str) -> nn.Module:
    """Take adapter `name` out. The last one out restores keys, values, requires_grad, attention and hook counts."""
    state = known(model, name)
    activate(model, *(n for n in state.active if n != name))
    for path, slot in slots(model).items():
        if name not in slot:
            continue
        for delta in slot[name]:
            for handle in getattr(delta.tap, "handles", ()):
                handle.remove()
            if delta.inplace:
                clear_grads(model.get_submodule(path), delta)
        del slot[name]
        if not len(slot):
            for handle in slot.handles:
                handle.remove()
            delattr(model.get_submodule(path), SLOT)
    del state.methods[name]
    state.notes["shift"].pop(name, None)
    if not state.methods:
        end(model)
    return model


def clear_grads(layer: nn.Module, delta: Delta) -> None:
    for parameter in delta.trained(layer).values():
        parameter.grad = None
        parameter.requires_grad_(False)


# ---- what is attached ------------------------------------------------------------------------------------------------
def attached(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters on `model`."""
    state = getattr(model, STATE, None)
    return tuple(state.methods) if state else ()


def known(model: nn.Module, *names: str) -> State:
    state = getattr(model, STATE, None)
    have = attached(model)
    for name in names:
        if name not in have:
            near = difflib.get_close_matches(name, have, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no adapter {name!r} is attached.{hint} Attached: {', '.join(have) or 'none'}")
    if state is None:
        raise ValueError("no adapter is attached to this model")
    return state


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """canonical key -> parameter of one adapter, in the model's order."""
    return {
        f"{delta.site.key}.{key}": parameter
        for path, slot in slots(model).items()
        if name in slot
        for delta in slot[name]
        for key, parameter in delta.trained(model.get_submodule(path)).items()
    }


def focus(model: nn.Module, name: str | None) -> None:
    """Exactly adapter `name`'s parameters require a gradient; nothing else does. None: nothing does."""
    model.requires_grad_(False)
    if name is not None:
        for parameter in parameters(model, name).values():
            parameter.requires_grad_(True)


def trainable(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Make exactly adapter `name` trainable and return canonical key -> parameter: what an optimizer gets."""
    known(model, name)
    focus(model, name)
    return parameters(model, name)


# ---- switching -------------------------------------------------------------------------------------------------------
def activate(model: nn.Module, *names: str) -> None:
    """Run exactly these adapters, in this order; none: the base. Does not change which one is trainable."""
    apply(model, names, None)


def apply(model: nn.Module, names: tuple[str, ...], by_row: tuple[str | None, ...] | None) -> None:
    state, touched = known(model, *names), slots(model)
    check_inplace(touched, names, by_row is not None)
    index = row_index(by_row)
    for path, slot in touched.items():
        slot.active = tuple(n for n in names if n in slot)
        slot.rows, slot.row_count = index, len(by_row or ())
        layer = model.get_submodule(path)
        # first every in-place delta off, then the chosen on: two may hold the same parameter
        for on in (False, True):
            for name in slot:
                for delta in slot[name]:
                    wanted = by_row is None and name in names
                    if delta.inplace and wanted is on:
                        delta.swap(layer, on)
                    if delta.tap:
                        delta.tap.on = name in names
    state.active, state.rows = tuple(names), by_row
    sync_attention(model, state)


def row_index(by_row: tuple[str | None, ...] | None) -> dict[str, Tensor] | None:
    if by_row is None:
        return None
    return {n: torch.tensor([i for i, m in enumerate(by_row) if m == n]) for n in by_row if n is not None}


def check_inplace(touched: dict[str, Slot], names: tuple[str, ...], by_row: bool) -> None:
    """Refuse before anything moves: rows over trained weights, and two adapters that own the same parameter."""
    for path, slot in touched.items():
        owners = [(n, d) for n in names if n in slot for d in slot[n] if isinstance(d, InPlace)]
        for _, delta in owners:
            if by_row and not isinstance(delta, InPlaceBias):
                refuse_rows(delta)
        held = [key for _, d in owners for key in d.names]
        if not by_row and len(set(held)) < len(held):
            raise ValueError(
                f"adapters {', '.join(dict.fromkeys(n for n, _ in owners))} both trained {path}.{held[0]} in place: "
                "only one of them can be active at a time"
            )


def sync_attention(model: nn.Module, state: State) -> None:
    """Use our attention function exactly while a prefix is active or batches are packed; the model's own otherwise."""
    needed = state.packing or any(overrides(d, "attend") for n in state.active for d in deltas(model, n))
    if needed and state.attention is None:
        state.attention = attention.use_attention(model)
    elif not needed and state.attention is not None:
        attention.restore_attention(model, state.attention)
        state.attention = None


def packing(model: nn.Module, on: bool = True) -> None:
    """Let `model` take packed batches (core.attention.packed) from now on, or go back."""
    state = begin(model)
    state.packing = on
    sync_attention(model, state)


@contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """Whatever is switched inside is switched back on leaving."""
    state: State | None = getattr(model, STATE, None)
    before = state.token() if state else None
    try:
        yield model
    finally:
        if before is not None:
            apply(model, *before)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Exactly the base inside the block: the reference policy for DPO and PPO costs no second model."""
    with restored(model):
        if getattr(model, STATE, None) is not None:
            activate(model)
        yield model


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Row i of the batch runs adapter names[i]; None is the base. Refusal for adapters that trained weights in place."""
    with restored(model):
        apply(model, tuple(dict.fromkeys(n for n in names if n is not None)), tuple(names))
        yield model


# ---- merging ---------------------------------------------------------------------------------------------------------
def merge(model: nn.Module, name: str = "default", inplace: bool = False) -> nn.Module:
    """A plain model that behaves like base + adapter `name`; a copy by default. Refusal if a delta has no such weights."""
    known(model, name)
    for delta in deltas(model, name):
        refuse_merge(model, delta)
    target = model if inplace else copy.deepcopy(model)
    with torch.no_grad():
        values = {p: t for d in deltas(target, name) for p, t in merge_one(target, d).items()}
    for other in attached(target):
        detach(target, other)
    for (path, key), tensor in values.items():
        write(target.get_submodule(path), key, tensor)
    return target


def refuse_merge(model: nn.Module, delta: Delta) -> None:
    if not delta.inplace:
        layer = model.get_submodule(delta.site.write)
        delta.merged(dense(layer, delta.site.columns))
        owners = twins(model, layer.weight) if hasattr(layer, "weight") else []
        if len(owners) > 1 and not getattr(delta, "tied", False):
            raise Refusal(
                "merging would change a weight that another layer shares.",
                found=" = ".join(owners),
                instead="untie the weights first (config.tie_word_embeddings = False and a copy), or keep the adapter attached",
            )


def merge_one(model: nn.Module, delta: Delta) -> dict[tuple[str, str], Tensor]:
    """Writes the merged values into the copy (so that a union's next delta sees them) and returns whole tensors."""
    path = delta.site.write
    layer = model.get_submodule(path)
    if delta.inplace:
        return {(path, k): t.clone() for k, t in delta.stored(layer).items()}
    merged = delta.merged(dense(layer, delta.site.columns))
    return {(path, key): write(layer, key, t, delta.site.columns).clone() for key, t in merged.items()}


def fold(model: nn.Module, name: str = "default") -> None:
    """Drop training-time reparametrisations of adapter `name`; the function stays the same."""
    known(model, name)
    for delta in deltas(model, name):
        delta.fold()


def outermost(name: str) -> str:
    """The block a layer belongs to, or the layer itself."""
    return block_of(name) or name


Change = Callable[[nn.Module], None]
