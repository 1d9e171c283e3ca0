"""Put deltas into a model, switch them, take them out: attach, detach, activate, disabled, rows, fold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import attention
from .delta import SLOT, Delta, Given, Refusal, inmost, named
from .fingerprint import fingerprint
from .inplace import InPlace, InPlaceBias, refuse_rows
from .places import tabled
from .quant import steady
from .site import UNCALLED, Site, common, mixers, parts, stem
from .slot import Slot, Tap, deltas, slots
from .state import STATE, State

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Method(Protocol):
    """A frozen dataclass whose fields are the paper's hyper-parameters.

    Three more, where a method needs them: `bind(tokenizer)` -> the method with its words as token ids;
    `prepare(model, deltas, given)` for what must see training rows before step 1; `report(model, deltas)` -> numbers
    for the run's report, {name: number or a mapping of these}; `sequences` are those of the rows that were measured.
    """

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]: ...


# ---- attach and detach -----------------------------------------------------------------------------------------------
def attach(model: nn.Module, method: Method | Sequence[Method], name: str = "default") -> nn.Module:
    """Freeze `model`, add the deltas of `method` (or of a list of methods) as `name`, make them active and trainable.

    New values are drawn from torch's global generator: call torch.manual_seed first to get the same ones again.
    Raises ValueError for a bad or taken name or a target that matches nothing, Refusal where the method cannot work.
    """
    methods = tuple(method) if isinstance(method, tuple | list) else (method,)
    check_new(model, name, methods)
    state = begin(model)
    before, focused = state.token(), state.focus
    try:
        apply(model, (), None)  # methods that read weights must see the base
        found = once(model, [pair for m in methods for pair in named(m, model)])
        if not found:
            raise ValueError(f"{methods} adapts no layer of {type(model).__name__}")
        state.methods[name] = methods
        place(model, name, found)
        state.shifts[name] = shift_of(found)
        activate(model, name)
        focus(model, name)
    except BaseException:
        take_out(model, name)
        apply(model, *before)
        focus(model, focused)
        end_if_empty(model)
        raise
    return model


def prepare(model: nn.Module, name: str, given: Given) -> None:
    """Let the methods of adapter `name` look at training rows, where they ask for it and have not done so yet."""
    waiting: dict[int, list[Delta]] = {}
    for _, outer in each(model, name):
        if not (delta := inmost(outer)).ready:
            waiting.setdefault(id(delta.method), []).append(delta)
    for found in waiting.values():
        found[0].method.prepare(model, found, given)
    focus(model, name)


def once(model: nn.Module, found: list[tuple[Site, Delta]]) -> list[tuple[Site, Delta]]:
    """A union trains a parameter in place once, whoever of its methods asks for it (norms that are in the head too)."""
    seen: set[int] = set()
    kept = []
    for site, delta in found:
        if isinstance(delta, InPlace):
            layer = model.get_submodule(site.write)
            delta.keep(tuple(n for n in delta.names if id(layer.get_parameter(n)) not in seen))
            seen |= {id(layer.get_parameter(n)) for n in delta.names}
            if not delta.names:
                continue
        kept.append((site, delta))
    return kept


def shift_of(found: list[tuple[Site, Delta]]) -> int:
    """How far real tokens move back: the most that the deltas of any one layer ask for together."""
    by: dict[str, int] = {}
    for site, delta in found:
        by[site.write] = by.get(site.write, 0) + delta.shift()
    return max(by.values())


def check_new(model: nn.Module, name: str, methods: tuple[Any, ...]) -> None:
    refuse_fused(getattr(model, STATE, None))
    if not NAME.fullmatch(name):
        raise ValueError(f"adapter name {name!r}: use 1 to 64 letters, digits, '_' or '-'")
    if hasattr(Slot(), name):
        raise ValueError(f"adapter name {name!r} is a word that PyTorch modules keep for themselves: choose another")
    if name in attached(model):
        raise ValueError(f"an adapter {name!r} is attached already: detach it first, or choose another name")
    for m in methods:
        if isinstance(m, str | dict):
            raise ValueError(
                f"{m!r} is not a method yet: deltatune.methods.build({m!r}) makes what a configuration calls so (a "
                "method, a preset, {name: fields}), and attach takes that"
            )
        if isinstance(m, type) or not hasattr(m, "deltas"):
            raise ValueError(f"{m!r} is not a method: give LoRA(...), Prefix(...), ... or a list of them")
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "the model is sharded already: attach adapters before fully_shard, or ranks would train different ones"
        )


def begin(model: nn.Module) -> State:
    """The model's state, made on the first attach: originals noted, the trunk's hooks in."""
    state = getattr(model, STATE, None)
    if state is None:
        steady(model)
        vocab = getattr(model, "deltatune_vocab", None)
        state = State(fingerprint(model, vocab), {n: p.requires_grad for n, p in model.named_parameters()}, vocab)
        setattr(model, STATE, state)
        inner, state.room, state.mixers = stem(model), tabled(model), mixers(model)
        state.handles = [
            inner.register_forward_pre_hook(state.shift, with_kwargs=True),
            inner.register_forward_hook(state.watch),
        ]
    return state


def end_if_empty(model: nn.Module) -> None:
    """With nothing attached and nothing packed, the model is again as it was before the first attach."""
    state: State = getattr(model, STATE)
    if state.methods:
        return
    if state.grown:  # only now: other adapters may have been loaded onto the grown vocabulary
        state.grown.restore(model)
        state.grown = None
    grads = dict(model.named_parameters())
    for key, required in state.grads.items():
        if key in grads:
            grads[key].requires_grad_(required)
    if state.packing:
        return
    for handle in state.handles:
        handle.remove()
    state.call_layers()
    delattr(model, STATE)


def place(model: nn.Module, name: str, found: list[tuple[Site, Delta]]) -> None:
    """Put each delta into its layer's slot, under a key of its own."""
    taken: dict[str, int] = {}
    for site, delta in found:
        taken[site.key] = taken.get(site.key, 0) + 1
        if taken[site.key] > 1:  # a union may change one layer twice
            site = Site(site.read, site.write, site.columns, f"{site.label}#{taken[site.key]}")
        layer = model.get_submodule(site.write)
        delta.site = site
        delta.placed(layer)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        slot = slot_of(layer)
        slot.add(layer, name, delta.to(device) if device.type != "meta" else delta)
        slot.train(layer.training)  # a model in eval mode must not get an adapter that drops out
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
    """Take adapter `name` out. The last one out restores keys, values, requires_grad, attention and hook counts,
    and the vocabulary that `load` grew (tokens that the user added stay)."""
    state = known(model, name)
    activate(model, *(n for n in state.active if n != name))
    take_out(model, name)
    if state.focus == name:
        focus(model, None)
    end_if_empty(model)
    return model


def take_out(model: nn.Module, name: str) -> None:
    """Remove what `place` put in; every in-place delta must be off."""
    state: State = getattr(model, STATE)
    for path, slot in slots(model).items():
        layer = model.get_submodule(path)
        for delta in slot.of(name):
            for handle in getattr(delta.tap, "handles", ()):
                handle.remove()
            if delta.inplace:
                delta.swap(layer, False)
                for parameter in delta.trained(layer).values():
                    parameter.grad = None
        if name in slot:
            del slot[name]
        if not len(slot):
            for handle in slot.handles:
                handle.remove()
            delattr(layer, SLOT)
    state.active = tuple(n for n in state.active if n != name)
    state.methods.pop(name, None)
    state.records.pop(name, None)
    state.shifts.pop(name, None)


# ---- what is attached ------------------------------------------------------------------------------------------------
def attached(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters on `model`."""
    state = getattr(model, STATE, None)
    return tuple(state.methods) if state else ()


def running(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that run now, in their order."""
    state: State | None = getattr(model, STATE, None)
    return state.active if state else ()


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
    refuse_fused(state)
    return state


def refuse_fused(state: State | None) -> None:
    """While adapters are in the weights, deltas are off and the layers are not the base's."""
    if state is not None and state.fused is not None:
        raise ValueError(
            f"{', '.join(map(repr, state.fused.names))} is fused into the weights, and all other adapters are off: "
            "only forward passes, fuse() and unfuse() work now. Call unfuse(model) first: it restores the base's bits"
        )


def each(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, Delta]]:
    """(layer, delta) of adapter `name`, in the model's order."""
    for path, slot in slots(model).items():
        for delta in slot.of(name):
            yield model.get_submodule(path), delta


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """canonical key -> parameter of one adapter, in the model's order."""
    return {
        f"{delta.site.key}.{key}": parameter
        for layer, delta in each(model, name)
        for key, parameter in delta.trained(layer).items()
    }


def focus(model: nn.Module, name: str | None) -> None:
    """Exactly adapter `name`'s parameters require a gradient; nothing else does. None: nothing does.

    A parameter trained in place requires one only while the adapter is active: otherwise the layer holds the base's
    own values, which nothing may ever train.
    """
    state: State = getattr(model, STATE)
    state.focus = name
    model.requires_grad_(False)
    for layer, delta in each(model, name) if name is not None else ():
        for parameter in delta.trained(layer).values():
            parameter.requires_grad_(not delta.inplace or delta.on)


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
    if by_row is not None:
        check_rows(touched, names)
    else:
        check_owners(model, touched, names)
    index = row_index(by_row)
    for slot in touched.values():
        slot.switch(names, index, len(by_row or ()))
        for name in slot:
            for delta in slot.of(name):
                if delta.tap:
                    delta.tap.on = name in names
    held = [
        (name, model.get_submodule(path), delta)
        for path, slot in touched.items()
        for name in slot
        for delta in slot.of(name)
        if delta.inplace
    ]
    # first every in-place delta off, then the chosen on: two may hold the same parameter
    for on in (False, True):
        for name, layer, delta in held:
            if (by_row is None and name in names) is on:
                delta.swap(layer, on)
    for name, layer, delta in held:
        if name == state.focus:
            for parameter in delta.trained(layer).values():
                parameter.requires_grad_(delta.on)
    state.active, state.rows = names, by_row
    sync_attention(model, state)


def row_index(by_row: tuple[str | None, ...] | None) -> dict[str, Tensor] | None:
    if by_row is None:
        return None
    return {n: torch.tensor([i for i, m in enumerate(by_row) if m == n]) for n in by_row if n is not None}


def check_rows(touched: dict[str, Slot], names: tuple[str, ...]) -> None:
    """Refuse before anything moves: rows cannot each have weights of their own."""
    for slot in touched.values():
        for delta in (d for n in names for d in slot.of(n)):
            if isinstance(delta, InPlace) and not isinstance(delta, InPlaceBias):
                refuse_rows(delta)
            if delta.alone:
                raise Refusal(f"{delta.alone}.", found=delta.site.write, instead="activate() one adapter at a time")
            if isinstance(delta, InPlaceBias) and UNCALLED.search(delta.site.write):
                refuse_rows(delta)


def check_owners(model: nn.Module, touched: dict[str, Slot], names: tuple[str, ...]) -> None:
    """Refuse before anything moves: two that trained the same parameter in place cannot both be on."""
    holders: dict[int, str] = {}
    for path, slot in touched.items():
        for name in names:
            for delta in (d for d in slot.of(name) if d.inplace):
                for key, parameter in delta.trained(model.get_submodule(path)).items():
                    if id(parameter) in holders:
                        raise ValueError(
                            f"{path}.{key} is trained in place twice, by {holders[id(parameter)]!r} and by {name!r}: "
                            "only one of them can be active at a time"
                        )
                    holders[id(parameter)] = name


def sync_attention(model: nn.Module, state: State) -> None:
    """Use our attention function exactly while a prefix is active or batches are packed; the model's own otherwise."""
    needed = state.packing or any(slot.attends for slot in slots(model).values())
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
    end_if_empty(model)


def takes_packed(model: nn.Module) -> bool:
    """Whether packing is on."""
    state: State | None = getattr(model, STATE, None)
    return state is not None and state.packing


def shifted(model: nn.Module) -> int:
    """How many positions the active prefixes take before the first real token."""
    state: State | None = getattr(model, STATE, None)
    return state.moved() if state else 0


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
    """Row i of the batch runs adapter names[i]; None is the base. Refusal for adapters that trained weights in place.

    One name is for every row of a batch of any size. A batch of n len(names) rows counts as n copies of each row side
    by side, as beams are; any other number is a ValueError with both numbers.
    """
    if not names:
        raise ValueError("rows() was given 0 names: give one name per row of the batch (None: the base)")
    if odd := [name for name in names if not isinstance(name, str | None)] or [names][: isinstance(names, str)]:
        have = ", ".join(map(repr, attached(model))) or "none"
        raise ValueError(f"rows() takes a list of adapters' names, None for the base, got {odd[0]!r}. Attached: {have}")
    with restored(model):
        apply(model, tuple(dict.fromkeys(n for n in names if n is not None)), tuple(names))
        yield model


@contextmanager
def rows_of(model: nn.Module, chosen: Sequence[int], count: int) -> Iterator[nn.Module]:
    """Inside `rows`, a batch of only these of its `count` rows, in this order; elsewhere nothing changes."""
    state: State | None = getattr(model, STATE, None)
    if state is None or state.rows is None:
        yield model
        return
    if len(state.rows) not in (1, count):
        raise ValueError(
            f"rows() was given {len(state.rows)} names for {count} rows: give one name per row, or one for all of them"
        )
    with rows(model, [state.rows[i if len(state.rows) > 1 else 0] for i in chosen]):
        yield model


def fold(model: nn.Module, name: str = "default") -> None:
    """Drop training-time reparametrisations of adapter `name`; the function stays the same."""
    known(model, name)
    for delta in deltas(model, name):
        delta.fold()
