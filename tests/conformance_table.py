"""Prints the table method x family by running every promise: python tests/conformance_table.py"""

from __future__ import annotations

import sys
import warnings

import torch

from conformance import PROMISES, VARIANTS, Cell, failures
from models import ALL
from refusals import NEVER_PEFT, NO_PEFT_FORM, REFUSED, ROWLESS, UNMERGEABLE


def mark(cell: Cell, notes: dict[str, str]) -> str:
    """pass, refused with the number of its note, or the promises that failed."""
    found = failures(cell)
    if found:
        return "**FAIL** " + ", ".join(found)
    reason = REFUSED.get((cell.variant, cell.family))
    return f"refused [{number(notes, reason)}]" if reason else "pass"


def number(notes: dict[str, str], reason: str) -> str:
    return notes.setdefault(reason, str(len(notes) + 1))


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    notes: dict[str, str] = {}
    print("| method | " + " | ".join(ALL) + " |\n|" + "---|" * (len(ALL) + 1))
    failed = False
    for variant in VARIANTS:
        marks = [mark(Cell(variant, family), notes) for family in ALL]
        failed |= any("FAIL" in m for m in marks)
        print(f"| {variant} | " + " | ".join(marks) + " |", flush=True)
    print(f"\nEach pass stands for: {', '.join(name.replace('_', ' ') for name in PROMISES)}.\n")
    for reason, n in notes.items():
        print(f"[{n}] {reason}.")
    parts = (("merge() refuses", UNMERGEABLE), ("rows() refuses", ROWLESS), ("No peft form:", NEVER_PEFT))
    for what, reasons in parts:
        print(f"{what} {'; '.join(f'{variant} ({why})' for variant, why in reasons.items())}.")
    by_reason: dict[str, list[str]] = {}
    for (variant, family), why in NO_PEFT_FORM.items():
        by_reason.setdefault(f"{variant}: {why}", []).append(family)
    for why, families in by_reason.items():
        print(f"No peft form on {', '.join(families)}; {why}.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
