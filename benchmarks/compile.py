"""What compiling the blocks brings, and what it takes: a LoRA step of SmolLM2-135M on packed batches of unlike lengths.

    python benchmarks/compile.py --data DIR [--way NAME ...]

DIR: the sets of docs/evidence/data.md. Each way runs in two fresh processes, of which the second finds what the first
has compiled on disk. In the first its steps alternate with eager ones on the same batches, after a pass that compiles;
where losses and gradients are not equal, the ratio does not count. The second gives the peak of its own passes, above
what the process held after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from speed import Case

CASE = Case(source="alpaca-demo/alpaca_en_demo.json", rows=24, batch=4, sides=("ours",))
METHOD = {"lora": {"r": 8, "alpha": 16.0, "targets": ["all"]}}
WAYS = ("eager", "norms and MLP", "whole block")
CLOSE = 1e-4  # relative, of losses and of the gradient's norm
Row = dict[str, Any]


class Whole:
    """Every block compiled as one function that our attention cuts in two: what this library does not do."""

    def __init__(self, model: Any) -> None:
        import torch

        from deltatune.core import attention, compiling
        from deltatune.core.site import blocks

        self.blocks = [model.get_submodule(name) for name in blocks(model)]
        self.made = torch.compile(type(self.blocks[0]).forward.__wrapped__, dynamic=True)
        self.put = partial(attention.ALL_ATTENTION_FUNCTIONS.register, attention.IMPLEMENTATION)
        self.attends = {True: torch.compiler.disable(attention.attend), False: attention.attend}
        torch._dynamo.config.update(compiling.settings())

    def __enter__(self) -> None:
        self.put(self.attends[True])
        for block in self.blocks:
            block.forward = partial(self.made, block)

    def __exit__(self, *error: object) -> None:
        self.put(self.attends[False])
        for block in self.blocks:
            del block.forward


def measured(way: str, data: Path, rounds: int) -> Row:
    """One way in this process: seconds of its first pass and, where `rounds`, of its steps beside eager ones."""
    import torch

    from deltatune import attach, trainable
    from deltatune.core.attach import packing
    from deltatune.core.compiling import Compiled, programs
    from deltatune.core.quant import steady
    from deltatune.data.batch import pack
    from deltatune.methods import build
    from deltatune.objectives import SFT
    from deltatune.train.step import Step
    from speed_train import Peak, encoded, opened, prepare

    with tempfile.TemporaryDirectory() as folder:
        prepare(CASE, data, Path(folder))
        given = json.loads((Path(folder) / "rows.json").read_text())
    peak, model = Peak(), steady(opened(CASE))
    torch.manual_seed(0)
    attach(model, build(METHOD), name="a")
    rows = encoded(model, given["rows"])
    packing(model)
    order = given["batches"][1::2] + given["batches"][::2]
    batches = [pack([rows[i] for i in chosen]).to(model.device) for chosen in order]
    step, parameters = Step(model, SFT()).train(), list(trainable(model, "a").values())
    compiled = {WAYS[0]: lambda _: nullcontext(), WAYS[1]: Compiled, WAYS[2]: Whole}[way](model)

    def once(i: int) -> tuple[float, float, float]:
        began = time.perf_counter()
        loss = step(batches[i % len(batches)])[0]
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in grads]).norm()
        return time.perf_counter() - began, loss.item(), norm.item()

    def one(i: int) -> tuple[float, float, float]:
        with compiled:
            return once(i)

    first, before = one(0)[0], programs()
    found = {"first": first, "second": one(1)[0], "peak": peak.bytes(), "programs": before}
    pairs = [(once(i), one(i)) for i in range(rounds)]
    found["eager_s"], found["way_s"] = [a[0] for a, _ in pairs], [b[0] for _, b in pairs]
    found["more"] = programs() - before
    found["apart"] = max((abs(b[k] / a[k] - 1) for a, b in pairs for k in (1, 2)), default=0.0)
    return found


def fresh(args: argparse.Namespace, way: str, rounds: int, store: str) -> Row:
    """`measured` in a process of its own, whose compiler keeps its results in `store`."""
    command = [sys.executable, __file__, "--data", str(args.data), "--one", way, "--rounds", str(rounds)]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": store}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(way: str, cold: Row, warm: Row) -> str:
    ratio = median(b / a for a, b in zip(cold["eager_s"], cold["way_s"], strict=True))
    counts = f"{ratio:.3f}" if cold["apart"] < CLOSE else f"not equal ({cold['apart']:.1e})"
    cells = [way, f"{median(cold['eager_s']):.2f}", f"{median(cold['way_s']):.2f}", counts]
    cells += [f"{cold['first'] - cold['second']:.0f}", f"{warm['first'] - warm['second']:.0f}", str(cold["programs"])]
    cells += [str(cold["more"]), f"{warm['peak'] / 2**20:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--way", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one, args.data, args.rounds)))
        return
    print("| way | eager, s | this, s | ratio | compiling, s | from disk, s | programs | later | peak, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for way in args.way:
        with tempfile.TemporaryDirectory() as store:
            cold, warm = (fresh(args, way, rounds, store) for rounds in (args.rounds, 0))
        print(line(way, cold, warm), flush=True)


if __name__ == "__main__":
    main()
