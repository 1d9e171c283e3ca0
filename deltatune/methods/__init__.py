"""One technique, one file. Importing this package fills the registry with every file of this folder."""

from __future__ import annotations

import importlib
import pkgutil

from ..core.registry import METHODS, PRESETS, build, spec

for found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if not found.startswith("_"):
        importlib.import_module(f"{__name__}.{found}")

__all__ = ["METHODS", "PRESETS", "build", "spec"]
