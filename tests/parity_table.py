"""Prints the largest difference from peft per method, over every family: python tests/parity_table.py"""

from __future__ import annotations

import warnings

import torch

from conformance import VARIANTS, Cell, peft_gaps
from models import ALL
from refusals import REFUSED


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| method | families | ours loaded by peft | peft's loaded by us |\n|---|---|---|---|")
    for variant in VARIANTS:
        cells = [Cell(variant, f) for f in ALL if (variant, f) not in REFUSED]
        found = [gaps for cell in cells if (gaps := peft_gaps(cell))]
        if found:
            out, back = (max(column) for column in zip(*found, strict=True))
            print(f"| {variant} | {len(found)} | {out:.1e} | {back:.1e} |", flush=True)
        else:
            print(f"| {variant} | 0 | peft has no such form | |", flush=True)


if __name__ == "__main__":
    main()
