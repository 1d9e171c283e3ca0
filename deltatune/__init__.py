"""deltatune: fine-tune language models by small changes to a frozen base, under one mechanism.

Names are loaded on first use, so `import deltatune` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "deltatune.core.attach": ("attach", "detach", "activate", "disabled", "rows", "trainable"),
    "deltatune.core.merging": ("merge",),
    "deltatune.core.fuse": ("fuse", "unfuse", "fused"),
    "deltatune.core.combine": ("combine",),
    "deltatune.core.convert": ("extract", "to_lora", "export_lora"),
    "deltatune.core.store": ("save", "load", "virtual_ids", "add_tokens"),
    "deltatune.data.media": ("keep_rows",),
    "deltatune.train.predict": ("predict",),
    "deltatune.objectives": ("SFT", "Choice", "Classify", "Cloze", "Tag", "QA"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
_METHODS = (
    "LoRA",
    "DoRA",
    "AdaLoRA",
    "IA3",
    "Adapter",
    "Prefix",
    "Prompt",
    "PTuning",
    "BitFit",
    "Freeze",
    "Full",
    "Head",
    "NewTokens",
)

__all__ = [*_HOME, *_METHODS, "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("deltatune.train")  # the package is callable: room and function are one object
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    found = _method(name) if name[:1].isupper() else None
    if found is None:
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    return found


def _method(name: str) -> type | None:
    """The registered method whose class has that name: a new method needs no line here."""
    table = import_module("deltatune.methods").METHODS
    return next((entry.cls for entry in table.values() if entry.cls.__name__ == name), None)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
