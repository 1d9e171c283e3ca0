"""deltatune: fine-tune language models by small changes to a frozen base, under one mechanism.

Names are loaded on first use, so `import deltatune` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "deltatune.core.attach": ("attach", "detach", "activate", "disabled", "rows", "merge"),
    "deltatune.core.store": ("save", "load"),
    "deltatune.methods": ("LoRA", "IA3", "Adapter", "Prefix", "Prompt", "BitFit", "Freeze", "Full", "NewTokens"),
    "deltatune.objectives": ("SFT", "Classify", "Cloze"),
    "deltatune.train": ("train",),  # the package of that name is callable: name and room are one object
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    module = import_module(home)
    return module if home == f"deltatune.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
