"""`python -m deltatune.methods --write|--check`: the index of methods that the command line reads without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..core.registry import form, index
from ..objectives import OBJECTIVES

PATH = Path(__file__).with_name("index.json")


def main() -> int:
    whole = {**index(), "objectives": {name: form(cls) for name, cls in OBJECTIVES.items()}}
    text = json.dumps(whole, indent=1, sort_keys=True) + "\n"
    if "--write" in sys.argv:
        PATH.write_text(text)
        return 0
    if PATH.exists() and PATH.read_text() == text:
        return 0
    print(f"{PATH.name} is stale: run `python -m deltatune.methods --write`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
