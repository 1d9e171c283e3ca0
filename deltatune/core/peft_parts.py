"""What every peft type has in common: names of files and keys, the layers of an adapter, and how peft matches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .delta import SLOT, Delta
from .site import layers, put
from .slot import Slot, slots

PREFIX = "base_model.model."
TENSORS = "adapter_model.safetensors"

Parts = dict[str, list[Delta]]  # layer name -> its deltas


def body(model: nn.Module, name: str) -> Parts:
    """layer -> deltas of adapter `name`, task heads left out."""
    found = {path: held(slot, name) for path, slot in slots(model).items()}
    return {path: ds for path, ds in found.items() if ds}


def held(slot: Slot, name: str) -> list[Delta]:
    return [d for d in slot.of(name) if not d.inplace]


def at(model: nn.Module, name: str, path: str) -> list[Delta]:
    """Those of one layer: `body` walks the whole model."""
    slot = model.get_submodule(path).get_submodule(SLOT)
    assert isinstance(slot, Slot)
    return held(slot, name)


def all_of(model: nn.Module, name: str, kind: type) -> list[Any]:
    return [d for ds in body(model, name).values() for d in ds if isinstance(d, kind)]


def widened(delta: Delta, part: Tensor, d_out: int) -> Tensor:
    """A fused projection's part [d, ...] as rows of the whole projection [d_out, ...], zero elsewhere."""
    if delta.site.columns is None:
        return part
    return put(part.new_zeros(d_out, *part.shape[1:]), delta.site.columns, part, 0)


def most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def short_names(model: nn.Module, paths: list[str]) -> list[str]:
    """['q_proj', ...] where such endings mean exactly `paths` (what serving engines expect), else the whole names."""
    ends = sorted({p.rsplit(".", 1)[-1] for p in paths})
    covered = {
        n for n, m in layers(model) if n.rsplit(".", 1)[-1] in ends and isinstance(getattr(m, "weight", None), Tensor)
    }
    return ends if covered == set(paths) else sorted(paths)
