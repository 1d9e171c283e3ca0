"""Adapters on merged weights: W + D computed once, no hook in the forward pass, and the base back to the last bit.

W + D - D is not W in floating point (bf16: 3 % of the elements change), so nothing is ever subtracted: the originals
are kept, or read again from the base's own files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .attach import activate, apply, attached, deltas, focus, known
from .delta import Refusal
from .merging import refuse_merge, write_merged
from .quant import scheme
from .slot import slots
from .state import STATE, State

Place = tuple[str, str]


@dataclass
class Fused:
    """What is in the weights now, and the way back."""

    names: tuple[str, ...]
    before: tuple[Any, ...]  # what ran before
    focus: str | None
    kept: dict[Place, Tensor] = field(default_factory=dict)  # the originals, where they are kept in memory
    files: dict[Place, Path] = field(default_factory=dict)  # where they are, where they are not kept

    @property
    def bytes(self) -> int:
        """Memory that the originals take."""
        return sum(t.nbytes for t in self.kept.values())


def fuse(model: nn.Module, *names: str, base: str | Path | None = None) -> Fused:
    """Write adapters `names` into the weights of the live model; `unfuse` restores the base bit for bit.

    Costs one more copy of every touched weight while fused (`Fused.bytes`). base: the folder that the model was loaded
    from: then nothing is kept, and `unfuse` reads the touched weights from its *.safetensors again; ValueError unless
    they are what the model holds now, to the bit. Fusing while something is fused switches, always from the originals.
    Refusal for adapters that have no weights, or would change a weight that another layer shares.
    """
    if not names:
        raise ValueError("fuse() was given no adapter: name at least one")
    unfuse(model)
    state = known(model, *names)
    if packed := scheme(model):
        raise Refusal(
            "4-bit weights are rounded anew when they are written, scales included: there is no exact way back.",
            found=f"a base packed as {packed}",
            instead="activate() the adapter, merge() into a copy, or a base in bf16 or fp32",
        )
    for delta in (d for name in names for d in deltas(model, name)):
        refuse_merge(model, delta)
    found = Fused(names, state.token(), state.focus)
    index = tensors_of(Path(base)) if base is not None else None
    activate(model, *names)  # refuses what cannot be on together; in-place tensors go in
    try:
        with torch.no_grad():
            take_originals(model, found, index)
            write_merged(model, *names)
    except BaseException:
        give_back(model, found)
        apply(model, *found.before)
        raise
    for slot in slots(model).values():
        slot.switch((), None, 0)
    focus(model, None)
    state.fused = found
    return found


def unfuse(model: nn.Module) -> None:
    """The base's own weights again, bit for bit, and the adapters that ran before `fuse`. Nothing fused: nothing."""
    state: State | None = getattr(model, STATE, None)
    if state is None or state.fused is None:
        return
    found: Fused = state.fused
    give_back(model, found)
    state.fused = None
    apply(model, *found.before)
    focus(model, found.focus)


@contextmanager
def fused(model: nn.Module, *names: str, base: str | Path | None = None) -> Iterator[nn.Module]:
    """Inside the block the adapters are in the weights; the base's bits are back on leaving."""
    fuse(model, *names, base=base)
    try:
        yield model
    finally:
        unfuse(model)


def take_originals(model: nn.Module, found: Fused, index: dict[str, Path] | None) -> None:
    """Give every touched parameter a copy to be overwritten, and keep the original, or where it can be read again."""
    seen: set[int] = set()  # a tied weight is one parameter in two layers
    for path, slot in slots(model).items():
        layer = model.get_submodule(path)
        if not any(not d.inplace for name in found.names for d in slot.of(name)):
            continue
        held = {k for name in found.names for d in slot.of(name) if d.inplace for k in d.trained(layer)}
        for key, parameter in layer.named_parameters(recurse=False):
            if key not in ("weight", "bias") or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            original = parameter.data
            # what an in-place delta put there is no part of the base's files
            if index is None or key in held:
                found.kept[path, key] = original
            else:
                found.files[path, key] = same_in_file(index, f"{path}.{key}", original)
            parameter.data = original.clone()


def give_back(model: nn.Module, found: Fused) -> None:
    """Every original where it was; moved along if the model has been moved meanwhile."""
    with torch.no_grad():
        for (path, key), original in found.kept.items():
            parameter = model.get_submodule(path).get_parameter(key)
            parameter.data = original.to(parameter.device, parameter.dtype)
        opened: dict[Path, Any] = {file: safe_open(file, "pt") for file in set(found.files.values())}
        for (path, key), file in found.files.items():
            model.get_submodule(path).get_parameter(key).data.copy_(opened[file].get_tensor(f"{path}.{key}"))
    found.kept.clear()
    found.files.clear()


def tensors_of(folder: Path) -> dict[str, Path]:
    """tensor name -> the file that holds it, for the *.safetensors of a model folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors to read the base from again: leave base= out")
    index = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            index.update(dict.fromkeys(opened.keys(), file))
    return index


def read(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def same_in_file(index: dict[str, Path], key: str, value: Tensor) -> Path:
    """The file that has `value` under `key`, bit for bit; ValueError otherwise."""
    if key not in index:
        raise ValueError(f"the base's files have no tensor {key!r}: leave base= out, then the originals stay in memory")
    stored = read(index[key], key)
    if stored.dtype != value.dtype or not torch.equal(stored, value.cpu()):
        raise ValueError(
            f"{key} in {index[key].name} is not what the model holds ({stored.dtype} against {value.dtype}, or other "
            "values): leave base= out, then the originals stay in memory"
        )
    return index[key]


def fused_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters in the weights now; none: ()."""
    state: State | None = getattr(model, STATE, None)
    return state.fused.names if state is not None and state.fused is not None and attached(model) else ()
