"""`python -m deltatune.methods --write|--check`: the index that the command line reads without torch, and what the
pages of docs/methods say of recipes and sources: both come from the registry."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from .. import blocks
from ..about import sourced
from ..aliases import Draft
from ..config import Config
from ..core.registry import HOME, METHODS, form, index, read_preset
from ..marks import ConfigError, Problem, Spot, read_file
from ..objectives import OBJECTIVES

PATH = Path(__file__).with_name("index.json")
PAGES = HOME.parent / "docs" / "methods"
LINE = re.compile(r"(<!-- registry -->\n).*?(\n<!-- /registry -->)", re.DOTALL)


def whole() -> dict[str, object]:
    """The index as data."""
    return {**index(), "objectives": {name: form(cls) for name, cls in OBJECTIVES.items()}}


def check(file: Path) -> list[Problem]:
    """What is wrong with a preset's file, each with its line: as a configuration of its own it must be valid."""
    lines: dict[Spot, str] = {}
    try:
        preset, lines = read_preset(file), read_file(file)[1]
        model = {"name": "any", **preset.get("model", {})}
        Config(**{k: preset[k] for k in ("method", "objective", "train") if k in preset}, model=model, data="any")
    except ConfigError as error:
        return [Problem(p.spot, p.text, p.where or Draft({}, lines).where(p.spot) or str(file)) for p in error.problems]
    return []


def pages() -> dict[Path, str]:
    """Every method's page as the registry would have it."""
    found = {}
    for path in (PAGES / f"{name}.md" for name in METHODS):
        if path.exists():
            said = sourced(path.stem).replace("\\", r"\\")
            found[path] = LINE.sub(rf"\g<1>{said}\g<2>", path.read_text(encoding="utf-8"))
    return found


def main() -> int:
    made = whole()
    with blocks.using(made):
        problems = [p for file in sorted((HOME / "presets").glob("*.yaml")) for p in check(file)]
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            return 1
        wanted = {PATH: json.dumps(made, indent=1, sort_keys=True) + "\n", **pages()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--write" in sys.argv:
        for path in stale:
            path.write_text(wanted[path], encoding="utf-8")
        return 0
    for path in stale:
        print(f"{path.name} is stale: run `python -m deltatune.methods --write`", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
