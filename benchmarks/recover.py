"""Recovery: does each method, tuned within a small budget, beat the best untuned prompt (or the head alone)?

    python benchmarks/recover.py --data DIR [--only METHOD ...] [--hours H]
    python benchmarks/recover.py --table [--write docs/evidence/methods.md]
    python benchmarks/recover.py --defaults

DIR: the sets of docs/evidence/data.md. recover.yaml says what is run. The learning rate is chosen on the dev split:
every rate is run with one seed, the best so far with two more, until the best of all means is one of three seeds. Its
runs are compared on test rows, which no choice ever saw. Every finished run is two lines (dev, test) of
docs/evidence/runs/recover.jsonl and is not run again; the table needs nothing but that file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import deltatune
from deltatune.config import Config, resolve
from deltatune.core.registry import METHODS, PRESETS, default_lr
from deltatune.evaluate.generate import measuring
from deltatune.evaluate.incontext import Prompt, Search, best_untuned
from deltatune.evaluate.intervals import Interval, mean_difference
from deltatune.evaluate.metrics import find
from deltatune.evaluate.score import answered, predict, score
from deltatune.train.job import prepare
from deltatune.train.run import Clock, execute
from deltatune.train.sets import read
from recover_sets import Row, Table, splits

HERE = Path(__file__).resolve().parent
STORE = HERE.parent / "docs" / "evidence" / "runs" / "recover.jsonl"
SEEDS = (0, 1, 2)
SECONDS = 90  # of training: the budget of a run, beside recover_sets.ROWS
SPLITS = {"sweep": "dev", "test": "test"}  # the phase of a line, and the rows it was measured on
HELD_OUT = 64  # training rows on which the best untuned prompt is chosen


# ---- runs ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """One run: `phase` sweep (measured on dev), test, or base (the untuned model on test)."""

    phase: str
    method: str
    task: str
    lr: float
    seed: int


class Store:
    """Finished runs as JSON lines: of a cell the last line counts, if it was made by today's recipe in `table`."""

    def __init__(self, path: Path, table: Table) -> None:
        self.path, self.table = path, table
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # what a killed process left of a line is no run
        lines = [json.loads(line) for line in whole.splitlines()]
        self.lines: dict[Cell, Row] = {Cell(**line["cell"]): line for line in lines}
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def get(self, cell: Cell) -> Row | None:
        line = self.lines.get(cell)
        return line if line and line["recipe"] == recipe(self.table, cell) else None

    def add(self, cell: Cell, found: Row) -> None:
        """Append one line and see it to the disk."""
        line = {"cell": asdict(cell), **found, "recipe": recipe(self.table, cell), "version": deltatune.__version__}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[cell] = line


def recipe(table: Table, cell: Cell) -> str:
    """The digest of everything in the table that a cell's outcome depends on."""
    task = task_of(table, cell)
    prompts = task.pop("prompts", None)
    method = table["methods"].get(cell.method, {}).get("method")
    method = PRESETS[method]["method"] if isinstance(method, str) and method in PRESETS else method
    what = [task, prompts] if cell.phase == "base" else [task, method]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def task_of(table: Table, cell: Cell) -> Table:
    """A cell's task, with what its method has of its own: `train`, an `objective`, and a `template` for its virtual
    tokens."""
    task, entry = dict(table["tasks"].get(cell.task, {})), table["methods"].get(cell.method, {})
    task |= {key: entry[key] for key in ("objective",) if key in entry}
    if "train" in entry:
        task["train"] = {**task["train"], **entry["train"]}
    if "template" in entry:
        ((name, options),) = task["objective"].items()
        task["objective"] = {name: {**options, "template": entry["template"]}}
    return task


def settings(task: Table, method: Any, cell: Cell, folder: Path) -> Config:
    """One run as the tree that its YAML file holds. Of a preset, its method and base: the training is the task's."""
    preset = PRESETS.get(method, {}) if isinstance(method, str) else {}
    tree = {
        "model": {"name": task["base"], **preset.get("model", {})},
        "method": preset.get("method", method),
        "objective": task["objective"],
        "data": {"train": str(folder / "train.jsonl")},
        "train": {**task["train"], "lr": cell.lr, "seed": cell.seed, "precision": "fp32"},
        "eval": {"retention": False, **task.get("eval", {})},
    }
    return resolve(Config(**tree)).config


def compact(metric: str, predictions: Sequence[Any], references: Sequence[Any]) -> Row:
    """Each row's part of the score: one bit (as hexadecimal digits), or counts (numerator, denominator)."""
    table = find(metric).table(predictions, references)
    pairs = np.stack([2 * table[:, 0], table[:, 1:].sum(1)], 1) if table.shape[1] == 3 else table
    value = float(pairs[:, 0].sum() / pairs[:, 1].sum())
    if (pairs[:, 1] == 1).all():
        bits = "".join(str(int(n)) for n in pairs[:, 0])
        return {"value": value, "bits": f"{int(bits, 2):x}", "count": len(bits)}
    return {"value": value, "pairs": " ".join(f"{int(a)}/{int(b)}" for a, b in pairs)}


def expanded(line: Row) -> np.ndarray:
    """[rows, 2]: each row's (numerator, denominator) of the score."""
    if "bits" in line:
        bits = f"{int(line['bits'], 16):b}".zfill(line["count"])
        return np.array([(int(bit), 1) for bit in bits], dtype=np.float64)
    return np.array([[int(n) for n in pair.split("/")] for pair in line["pairs"].split()], dtype=np.float64)


class Busy:
    """Seconds of processor time that training takes: with one thread, its time on a machine that does nothing else."""

    seconds = 0.0

    def on_start(self, record: Any) -> None:
        self.seconds = -time.process_time()

    def on_step(self, record: Any) -> None: ...

    def on_eval(self, record: Any) -> None: ...

    def on_end(self, record: Any) -> None:
        self.seconds += time.process_time()


def trained(task: Table, method: Any, cell: Cell, folder: Path) -> Iterator[tuple[str, Row]]:
    """Train once, then measure split by split: each phase with the line that is kept of it."""
    busy = Busy()
    job, clock = prepare(settings(task, method, cell, folder)), Clock([busy])
    with tempfile.TemporaryDirectory() as out:
        done = execute(job, Path(out) / "run", clock)
    if done.status == "interrupted":
        raise KeyboardInterrupt
    facts = {
        "status": done.status,
        "steps": done.summary["steps"],
        "parameters": done.summary["trainable_parameters"],
        "train_s": round(clock.seconds["train"], 1),
        "train_cpu_s": round(busy.seconds, 1),
        **({"said": said} if (said := done.summary.get("methods")) else {}),  # drift, routing, ...
    }
    for phase, split in SPLITS.items():
        yield phase, {**measured(task["metric"], job, folder / f"{split}.jsonl"), **facts}


def measured(metric: str, job: Any, file: Path) -> Row:
    """The tuned model's score on one split."""
    rows, wanted = answered(job, read([str(file)], job.config, []))
    with measuring(job.model):
        return compact(metric, predict(job, rows)[0], wanted)


def untuned(task: Table, cell: Cell, folder: Path) -> Row:
    """The base at its best: its best prompt, chosen on training rows; as it is, or else the commonest answer."""
    job = prepare(settings(task, "lora" if speaks(task) else "head", cell, folder))
    rows = read([str(folder / "test.jsonl")], job.config, [])
    if "untuned" in task:
        with deltatune.disabled(job.model):
            scored = score(job, rows, (task["metric"],))
        return {**compact(task["metric"], scored.predictions, scored.references), "prompt": task["untuned"]}
    if "prompts" not in task:
        wanted = [job.objective.reference(e) for e in rows]
        return {**compact(task["metric"], commonest(job, wanted), wanted), "prompt": "the commonest class"}
    prompts = [
        Prompt(**{k: tuple(v) if isinstance(v, list) else spaced(k, v) for k, v in p.items()}) for p in task["prompts"]
    ]
    with deltatune.disabled(job.model):
        search = Search(task["metric"], held_out=HELD_OUT)
        found = best_untuned(job.model, job.tokenizer, job.train, rows, prompts, search)
    kept = compact(task["metric"], found["predictions"], found["references"])
    return {**kept, "prompt": found["prompt"], "held_out": found["held_out"], "skipped": found["skipped"]}


def speaks(task: Table) -> bool:
    """Whether the untuned base answers by itself; else the best head is what a method is compared with."""
    return "prompts" in task or "untuned" in task


def spaced(key: str, value: Any) -> Any:
    """Label words with the space before them that plain prompts need."""
    return {name: f" {word}" for name, word in value.items()} if key == "labels" else value


def commonest(job: Any, wanted: Sequence[Any]) -> list[Any]:
    """What says nothing of a row: its commonest class; for words, all outside."""
    if job.objective.name == "tag":
        return [tuple("O" for _ in tags) for tags in wanted]
    most = Counter(job.objective.reference(e) for e in job.train).most_common(1)[0][0]
    return [most for _ in wanted]


# ---- what is to do ---------------------------------------------------------------------------------------------------
def entries(store: Store) -> dict[str, Any]:
    """Methods that can be run."""
    return {name: entry for name, entry in store.table["methods"].items() if "open" not in entry}


def together(store: Store, name: str, task: str) -> list[str]:
    """The tasks that share one learning rate with `task`."""
    entry = store.table["methods"][name]
    return [task] if entry.get("by_task") else entry["tasks"]


def seen(store: Store, name: str, tasks: Sequence[str], lr: float) -> list[float]:
    """The dev scores of one rate, a mean over the tasks for each seed that is done on all of them, in order."""
    by_seed = ([store.get(Cell("sweep", name, task, lr, seed)) for task in tasks] for seed in SEEDS)
    return [sum(line["value"] for line in found if line) / len(found) for found in takewhile(all, by_seed)]


def leader(store: Store, name: str, task: str) -> tuple[float, int] | None:
    """The rate with the best mean dev score so far, and how many seeds it has; None: some rate has no run yet."""
    scores = standing(store, name, task)
    if not all(scores.values()):
        return None
    best = foremost(store, scores, together(store, name, task))
    return best, len(scores[best])


def beaten(store: Store, cell: Cell) -> bool:
    """Whether another rate has the better mean dev score by now."""
    scores = {lr: found for lr, found in standing(store, cell.method, cell.task).items() if found}
    return cell.lr in scores and foremost(store, scores, together(store, cell.method, cell.task)) != cell.lr


def standing(store: Store, name: str, task: str) -> dict[float, list[float]]:
    """Each rate's dev scores so far, of one seed after the other."""
    tasks = together(store, name, task)
    return {lr: seen(store, name, tasks, lr) for lr in store.table["methods"][name]["lr"]}


def foremost(store: Store, scores: dict[float, list[float]], tasks: Sequence[str]) -> float:
    """The rate with the best mean, the highest or, for errors, the lowest."""
    sign = 1 if all(find(store.table["tasks"][t]["metric"]).higher_is_better for t in tasks) else -1
    return max(scores, key=lambda lr: sign * sum(scores[lr]) / len(scores[lr]))


def best_lr(store: Store, name: str, task: str) -> float | None:
    """The rate whose mean over all seeds is above every other rate's; None: that is not known yet."""
    found = leader(store, name, task)
    return found[0] if found and found[1] == len(SEEDS) else None


def wanted(store: Store, name: str) -> Iterator[Cell]:
    """The cells of a method in order: what is asked next depends on what the store holds by then."""
    entry = store.table["methods"][name]
    for task in entry["tasks"]:
        yield from (Cell("sweep", name, task, lr, SEEDS[0]) for lr in entry["lr"])
    for task in entry["tasks"]:
        led = None
        while (now := leader(store, name, task)) and now != led:
            yield from (Cell("sweep", name, t, now[0], seed) for seed in SEEDS for t in together(store, name, task))
            led = now
    for task in entry["tasks"]:
        if name == "head" or speaks(store.table["tasks"][task]):
            yield Cell("base", "", task, 1.0, 0)
        lr = best_lr(store, name, task)
        assert lr is not None, "the sweep comes first"
        yield from (Cell("test", name, task, lr, seed) for seed in SEEDS)


def work(store: Store, data: Path, only: Sequence[str], hours: float) -> None:
    """Every run that is not in the store, until the time is up."""
    ends = time.monotonic() + 3600 * hours
    with tempfile.TemporaryDirectory() as place:
        digests = {}
        for name in only or entries(store):
            for cell in wanted(store, name):
                task, folder = based(task_of(store.table, cell), data), Path(place) / cell.task
                if cell.task not in digests:
                    folder.mkdir()
                    digests[cell.task] = splits(task, data, folder)
                if (store.get(cell) or {}).get("rows") == digests[cell.task]:
                    continue
                if time.monotonic() > ends:
                    return
                method = store.table["methods"][name]["method"]
                began = time.monotonic()
                base = cell.phase == "base"
                made = [("base", untuned(task, cell, folder))] if base else trained(task, method, cell, folder)
                for phase, found in made:
                    own = replace(cell, phase=phase)
                    facts = {"wall_s": round(time.monotonic() - began, 1), "rows": digests[cell.task]}
                    if (store.get(own) or {}).get("rows") != digests[cell.task]:
                        store.add(own, {**found, **facts})
                        print(f"{own} {found['value']:.4f}", flush=True)
                    if cell.phase == "sweep" and beaten(store, cell):
                        break  # its test rows are measured if it is asked for again


def based(task: Table, data: Path) -> Table:
    """The task with its base's folder, where that lies beside the sets ('data:NAME')."""
    kind, _, name = task["base"].partition(":")
    return {**task, "base": str(data / name)} if kind == "data" else task


# ---- the table -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recovery:
    """A method on a task: its three runs, what they are compared with, and the paired difference."""

    runs: list[Row]
    base: list[Row]
    gain: Interval

    @property
    def holds(self) -> bool:
        return self.gain.low > 0


def recovery(store: Store, name: str, task: str) -> Recovery | None:
    """None where runs are missing. Rows are resampled, each with its three seeds, so that no row counts as three."""
    lr = best_lr(store, name, task)
    if lr is None:
        return None
    runs = [store.get(Cell("test", name, task, lr, seed)) for seed in SEEDS]
    prompts = name == "head" or speaks(store.table["tasks"][task])
    base_lr = None if prompts else best_lr(store, "head", task)
    first = Cell("base", "", task, 1.0, 0)
    cells = [first] * len(SEEDS) if prompts else [Cell("test", "head", task, base_lr or 0.0, seed) for seed in SEEDS]
    base = [store.get(cell) for cell in cells]
    if any(line is None for line in (*runs, *base)) or len({line["rows"] for line in (*runs, *base) if line}) > 1:
        return None
    after, before = (sum(expanded(line) for line in lines if line) for lines in (runs, base))
    sides = np.asarray(before), np.asarray(after)
    better = find(store.table["tasks"][task]["metric"]).higher_is_better
    gain = mean_difference(*(sides if better else sides[::-1]))  # of errors: how many fewer
    return Recovery([r for r in runs if r], [b for b in base if b], gain)


def swept(store: Store, name: str, task: str) -> str:
    """Each learning rate's dev score, a mean where more seeds than one were run."""
    found = {lr: seen(store, name, [task], lr) for lr in store.table["methods"][name]["lr"]}
    means = {lr: (sum(scores) / len(scores), len(scores)) for lr, scores in found.items() if scores}
    return ", ".join(f"{lr:g}: {mean:.3f}" + f" (of {n})" * (n > 1) for lr, (mean, n) in means.items())


def default_of(store: Store, name: str) -> str:
    """The method (or preset) whose default learning rate a sweep is about; "" where it is none."""
    entry = store.table["methods"][name]
    named = (entry.get("default_of"), name, entry.get("method"))
    return next((n for n in named if isinstance(n, str) and (n in METHODS or n in PRESETS)), "")


def defaults(store: Store) -> str:
    """Of each finished sweep, task by task: its winner beside what stands in the registry."""
    lines = []
    for name, entry in entries(store).items():
        chosen, whose = {task: best_lr(store, name, task) for task in entry["tasks"]}, default_of(store, name)
        if None not in chosen.values() and whose:
            said = "the same" if set(chosen.values()) == {default_lr(whose)} else "DIFFERS"
            published = whose in PRESETS and "lr" in PRESETS[whose].get("train", {})
            said = "a preset, which stays as it was published" if published else said
            won = ", ".join(f"{task} {best:g}" for task, best in chosen.items())
            lines.append(f"{name}: swept {won}; default of {whose} {default_lr(whose):g}: {said}")
    return "\n".join(lines) or "no sweep is finished"


def settings_of(entry: Mapping[str, Any]) -> str:
    """What an entry sets beside a method's or a preset's name, as a configuration says it."""
    method = entry["method"]
    ((_, fields),) = [("", {})] if isinstance(method, str) else method.items()
    more = {key: entry[key] for key in ("template", "objective", "train") if key in entry}
    said = [json.dumps({key: value})[1:-1] for key, value in {**fields, **more}.items()]
    return ", ".join(said).replace('"', "").replace("|", "/") or "-"


def shown(store: Store, name: str, task: str) -> str:
    """One row of the table."""
    found, whose = recovery(store, name, task), default_of(store, name)
    default = f"{default_lr(whose):g} ({whose})" if whose else "-"
    own = settings_of(store.table["methods"][name])
    head = f"| {name} | {task} | {own} | {swept(store, name, task) or '-'} | {default} "
    if found is None:
        return f"{head}| | | | | | | open |"
    runs, gain = found.runs, found.gain
    seconds = max(line.get("train_cpu_s", line["train_s"]) for line in runs)
    over = f" (over {SECONDS})" if seconds > SECONDS else ""
    base = sum(line["value"] for line in found.base) / len(found.base)
    what = found.base[0].get("prompt") or "head"
    scores = ", ".join(f"{line['value']:.3f}" for line in runs)
    said = "yes" if found.holds else "NO"
    unit = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    lr = f"{best_lr(store, name, task):g}"
    more = f"{base:.3f} ({what}) | {scores} | {unit} | {seconds:.0f}{over} | {said} |"
    return f"{head}| {lr} | {runs[0]['parameters']:,} | {more}"


def written(store: Store) -> str:
    """The evidence table, from the store alone."""
    tasks = [
        f"- {name}: {task['base']}; {task['rows']['train']} training rows, {task['rows']['dev']} dev rows, "
        f"{task['metric']} on {task['rows']['test']} test rows"
        for name, task in store.table["tasks"].items()
    ]
    names = (
        "method", "task", "settings of its own", "sweep on dev (lr: score)", "default lr", "lr", "trained parameters",
        "untuned", "tuned, 3 seeds", "gain [95 %]", "training, s", "recovered",
    )  # fmt: skip
    top = f"| {' | '.join(names)} |"
    lines = [shown(store, name, task) for name, entry in entries(store).items() for task in entry["tasks"]]
    lines += [
        f"| {n} | - | - | - | - | | | | | | | open: {e['open']} |"
        for n, e in store.table["methods"].items()
        if "open" in e
    ]
    return "\n".join([*tasks, "", top, "|" + "---|" * len(names), *lines])


def put(text: str, into: Path) -> None:
    """Replace what stands between the marks of a page."""
    start, end = "<!-- recover -->", "<!-- /recover -->"
    page = into.read_text(encoding="utf-8")
    if start not in page or end not in page:
        raise ValueError(f"{into} has no {start} and {end}")
    head, _, rest = page.partition(start)
    into.write_text(f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the sets of docs/evidence/data.md")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD")
    parser.add_argument("--hours", type=float, default=1000.0, help="no run begins after that")
    parser.add_argument("--what", type=Path, default=HERE / "recover.yaml", help="tasks and methods")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the table from the store; runs nothing")
    parser.add_argument(
        "--defaults", action="store_true", help="print each sweep's winner beside the registry's default"
    )
    parser.add_argument("--write", type=Path, help="put the table into this page")
    args = parser.parse_args(argv)
    store = Store(args.store, yaml.safe_load(args.what.read_text(encoding="utf-8")))
    if unknown := [name for name in args.only if name not in entries(store)]:
        parser.error(f"no method {unknown[0]!r} to run; there are {', '.join(entries(store))}")
    if args.defaults:
        print(defaults(store))
        return
    if not args.table:
        if args.data is None:
            parser.error("--data DIR is needed to run (or --table)")
        try:
            work(store, args.data, args.only, args.hours)
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on after the last finished run")
    text = written(store)
    if args.write:
        put(text, args.write)
    print(text)


if __name__ == "__main__":
    main()
