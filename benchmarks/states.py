"""What moments and parameters in bf16 do to the loss curve, and what they save, in full tuning of SmolLM2-135M.

    python benchmarks/states.py --data DIR [--steps N] [--write docs/evidence/speed.md]
    python benchmarks/states.py --table [--write docs/evidence/speed.md]

DIR: the sets of docs/evidence/data.md. Each way runs in a fresh process over the same batches in the same order.
"Nearest" is the fault that stochastic rounding is there for: the same steps, each parameter put to the nearest bf16.
On a machine without bf16 products they are made as the hardware makes them: of bf16 numbers, summed in fp32, rounded.
Peak memory is then that of two steps on one short row, whose products this machine makes as best it can.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from speed import Case

HERE = Path(__file__).resolve().parent
STORE = HERE.parent / "docs" / "evidence" / "runs" / "states.jsonl"
HEADING = "## Optimizer states"
CASE = Case(source="alpaca-demo/alpaca_en_demo.json", rows=20, batch=1, lr=2e-5)
HELD = 8  # the last rows are not trained
LONGEST = 96  # tokens of a row
WAYS: dict[str, dict[str, Any]] = {
    "adamw, all in fp32": {"dtype": "float32"},  # the same weights, from bf16
    "adamw, masters": {},
    "adamw-bf16, masters": {"optimizer": "adamw-bf16"},
    "adamw, stochastic": {"rounding": "stochastic"},
    "adamw-bf16, stochastic": {"optimizer": "adamw-bf16", "rounding": "stochastic"},
    "adamw-bf16, stochastic, other seed": {"optimizer": "adamw-bf16", "rounding": "stochastic", "seed": 1},
    "adamw, nearest, no masters": {"rounding": "stochastic", "nearest": True},
}
Row = dict[str, Any]


def tuned(name: str, data: Path, steps: int, short: bool) -> Row:
    """One way, in this process: the loss at each step and on held-out rows and bytes of state, or peak memory."""
    import torch

    from deltatune import attach, trainable
    from deltatune.core.attach import packing
    from deltatune.core.quant import steady
    from deltatune.data.batch import pack
    from deltatune.data.encode import Encoded
    from deltatune.methods import build
    from deltatune.objectives import SFT
    from deltatune.train.loop import Loop, Settings, Step
    from speed_train import Noted, Peak, opened

    how = dict(WAYS[name])
    if how.pop("nearest", False):
        round_to_nearest()
    rows, peak, noted = encoded(data), Peak(), Noted()
    train, held = rows[:-HELD], pack(rows[-HELD:])
    batches = [pack(train[i : i + CASE.batch]) for i in range(0, len(train), CASE.batch)]
    if short:
        batches = [pack([Encoded(train[0].ids[:16], (-100, *train[0].ids[1:16]))])]
    model = steady(opened(CASE).to(torch.bfloat16).to(getattr(torch, how.pop("dtype", "bfloat16"))))
    attach(model, build("full"), name="a")
    packing(model)
    step = Step(model, SFT())
    settings = Settings(steps=2 if short else steps, lr=CASE.lr, schedule="constant", **how)
    loop = Loop(step, trainable(model, "a"), lambda n: [batches[n % len(batches)]], settings, observers=[noted])
    if short:
        loop.run()
        return {"peak": peak.bytes()}
    with products():
        before = held_out(step, held)
        loop.run()
        after = held_out(step, held)
    state = sum(t.nbytes for t in loop.optimizer.state()[0].values())
    size = sum(p.numel() for p in loop.trainable.values())
    return {"way": name, "losses": noted.losses, "held": [before, after], "state": state / size}


def encoded(data: Path) -> list[Any]:
    """The first rows of at most LONGEST tokens."""
    import transformers

    from deltatune import zoo
    from deltatune.data.encode import Encoded
    from speed_train import ragged

    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path(CASE.base))
    with tempfile.TemporaryDirectory() as folder:
        rows = ragged(replace(CASE, rows=400), data, Path(folder), tokenizer)
    found = [Encoded(tuple(r["ids"]), tuple(r["labels"])) for r in rows if len(r["ids"]) <= LONGEST]
    return found[: CASE.rows]


def products() -> Any:
    """A context in which products of bf16 numbers are summed in fp32, where the machine does not do it itself."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from deltatune import zoo

    aten = torch.ops.aten
    made = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    }

    def to(x: Any, old: torch.dtype, new: torch.dtype) -> Any:
        return x.to(new) if isinstance(x, torch.Tensor) and x.dtype == old else x

    class Summed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs, half = dict(kwargs or {}), torch.bfloat16
            own = func.overloadpacket in made | attention
            if not own or not any(isinstance(x, torch.Tensor) and x.dtype == half for x in args):
                return func(*args, **kwargs)
            into = kwargs.pop("out", None)
            run = func if into is None else func.overloadpacket
            out = run(*(to(x, half, torch.float32) for x in args), **kwargs)
            if into is not None:
                return into.copy_(out)
            if isinstance(out, torch.Tensor):
                return out.to(half)
            forward = func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu
            return tuple(x if forward and i else to(x, torch.float32, half) for i, x in enumerate(out))

    return nullcontext() if zoo.dtype() == torch.bfloat16 else Summed()


def held_out(step: Any, held: Any) -> float:
    """The loss on the held-out rows, without gradients."""
    import torch

    with torch.no_grad():
        return float(step.eval()(held)[0]) / held.targets


def round_to_nearest() -> None:
    """The fault: what is written to bf16 is the nearest."""
    from deltatune.train.rounding import Chance

    Chance.put = lambda self, x, into: into.copy_(x)  # type: ignore[method-assign]


def apart(name: str, data: Path, *more: str) -> Row:
    """One way in a process of its own."""
    command = [sys.executable, __file__, "--data", str(data), "--way", name, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[Row]) -> str:
    """A line for each way, and the mean distance of its losses from those in fp32, relative."""
    rows = sorted(rows, key=lambda row: list(WAYS).index(row["way"]))
    first, steps = rows[0], len(rows[0]["losses"])
    shown = [n for n in (1, 6, 12, 13, 18, 24, 36, 48) if n <= steps]
    heads = (
        "way",
        *(f"step {n}" for n in shown),
        "held out, before",
        "after",
        "mean distance",
        "state, B",
        "peak, MiB",
    )
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        gap = mean(abs(a / b - 1) for a, b in zip(row["losses"], first["losses"], strict=True))
        cells = [row["way"], *(f"{row['losses'][n - 1]:.4f}" for n in shown), *(f"{x:.4f}" for x in row["held"])]
        cells += [f"{gap:.1%}", f"{row['state']:.1f}", f"{row['peak'] / 2**20:.0f}"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def write(page: Path, text: str) -> None:
    """Put the table in the place of the one under the heading; a page or a section that is not there is made."""
    whole = page.read_text(encoding="utf-8") if page.exists() else "# Speed and memory\n"
    if HEADING not in whole:
        whole = f"{whole.rstrip()}\n\n{HEADING}\n\n| way |\n"
    front, back = whole.split(HEADING)
    back = re.sub(r"(?m)^(\|.*\n)+", lambda _: f"{text}\n", back, count=1)
    page.write_text(f"{front}{HEADING}{back}", encoding="utf-8")


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--data", type=Path)
    ask.add_argument("--steps", type=int, default=24)
    ask.add_argument("--table", action="store_true")
    ask.add_argument("--only", nargs="*", default=list(WAYS), choices=list(WAYS), help="add these to what is there")
    ask.add_argument("--write", type=Path)
    ask.add_argument("--store", type=Path, default=STORE)
    ask.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    ask.add_argument("--short", action="store_true", help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.way:
        print(json.dumps(tuned(given.way, given.data, given.steps, given.short)))
        return
    if not given.table:
        if given.data is None:
            ask.error("--data DIR is needed: the sets of docs/evidence/data.md")
        if given.only == list(WAYS):
            given.store.write_text("")
        for name in given.only:
            with given.store.open("a") as file:
                row = apart(name, given.data, "--steps", str(given.steps)) | apart(name, given.data, "--short")
                file.write(json.dumps(row) + "\n")
    text = table([json.loads(line) for line in given.store.read_text(encoding="utf-8").splitlines()])
    print(text)
    if given.write:
        write(given.write, text)


if __name__ == "__main__":
    main()
