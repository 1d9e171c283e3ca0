"""Read every public data set in a folder with the data room, and say what was understood: a table for the evidence.

python benchmarks/read_sets.py --data DIR     (docs/evidence/data.md names the sets, their sources and digests)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deltatune.data.formats import examples
from deltatune.data.problems import Problems
from deltatune.data.wanted import Intake

KNOWN = {  # files whose columns have no header, or names of their own
    "banking77/train.csv": {"category": "label"},
    "banking77/test.csv": {"category": "label"},
    "sst2/train.tsv": ("text", "label"),
    "sst2/dev.tsv": ("text", "label"),
    "sst2/test.tsv": ("text", "label"),
}
ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    root: Path = parser.parse_args().data
    print("| file | rows | usable | read as | first problem |\n|---|---|---|---|---|")
    for path in sorted(p for p in root.rglob("*") if p.suffix in ENDINGS and not p.name.startswith(".")):
        name = path.relative_to(root).as_posix()
        problems = Problems()
        kinds: dict[str, int] = {}
        for example in examples(path, problems, Intake(columns=KNOWN.get(name, ()))):
            kinds[example.kind] = kinds.get(example.kind, 0) + 1
        first = str(problems.errors[0]).replace(str(root), "").lstrip("/")[:110] if problems.errors else ""
        print(f"| {name} | {problems.seen} | {problems.good} | {', '.join(kinds)} | {first.replace('|', '/')} |")


if __name__ == "__main__":
    main()
