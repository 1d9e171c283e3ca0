"""`deltatune train` and `deltatune resume`: a configuration becomes a run folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.commands.ahead import run_there
from deltatune.commands.methods import Json
from deltatune.commands.runs import check_run, read_json
from deltatune.commands.shell import DONE, STOPPED, UNVERIFIED, emit, machine, main, note, screen
from deltatune.config import Config, ConfigError, Override, dump, load, recipes, resolve
from deltatune.marks import Problem, read_value
from deltatune.train.place import finished, place

Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="The run folder itself; left out: a new one, <time>-<method>-<model>, in output.dir (runs)."
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="a.b=value over the file, with a YAML value; repeatable.")
]


def given(flags: dict[str, Any], sets: Sequence[str] | None) -> list[Override]:
    """Flags and --set as overrides, --set last; every --set that is not a.b=value is named."""
    found = [Override(name, value, flag) for flag, (name, value) in flags.items() if value not in (None, [])]
    problems: list[Problem] = []
    for text in sets or ():
        try:
            found.append(Override.parse(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def chosen(sets: Sequence[str] | None, allowed: Sequence[str]) -> Config:
    """A configuration with `--set a.b=c` applied, for commands that take only the keys (or sections) `allowed`."""
    overrides = given({}, sets)
    for override in overrides:
        if not any(override.name == key or override.name.startswith(f"{key}.") for key in allowed):
            raise ValueError(f"--set {override.name}: only {', '.join(allowed)} can be set here")
    return load({"model": "any", "data": "any"}, overrides).config


def finish(run: Any) -> None:
    """Show a run's end screen, or its summary as JSON, and leave with its exit code."""
    if machine():
        emit({"run": str(run.dir), "status": run.status, **run.summary})
    else:
        screen().print(run.screen(), crop=False)
    if run.status == "interrupted":
        if machine():  # the screen says it to people
            note(f"interrupted; go on with: deltatune resume {run.dir}")
        raise typer.Exit(128 + int(run.summary.get("signal") or signal.SIGINT))
    code = {"stopped": STOPPED, "unverified": UNVERIFIED}.get(run.status, DONE)
    if code:
        raise typer.Exit(code)


def observers(config: Any = None, said: Sequence[str] = ()) -> list[Any]:
    """Who watches the loop: a bar on a terminal, plain lines elsewhere, both on standard error. said: notes that were
    shown already."""
    from deltatune.report.progress import progress

    if config is None:
        return [progress(quiet=machine())]
    found = progress(machine(), config.train.save_every or 0, config.log.every or 0)
    found.said = frozenset(said)
    return [found]


@main.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file; RUN/config.yaml repeats a run.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: folder, hub id or pypi:PACKAGE.")] = None,
    method: Annotated[str | None, typer.Option(help="A name, or YAML such as '{lora: {r: 16}}'.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="sft, classify, cloze, choice, tag, qa, or YAML with fields.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Training rows; repeatable.")] = None,
    eval_: Annotated[list[str] | None, typer.Option("--eval", help="Held-out rows; repeatable.")] = None,
    out: Out = None,
    set_: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it would cost.")] = False,
    nproc: Annotated[int, typer.Option(help="Processes on this machine.", min=1)] = 1,
    json_: Json = False,
) -> None:
    """Train, measured before and after. Without arguments: the quickstart on real data."""
    if nproc > 1:
        raise ConfigError([Problem((), f"{nproc} processes are not in this version; leave it out", "--nproc")])
    flags = {
        "--model": ("model.name", model),
        "--method": ("method", read_value(method) if method else None),
        "--objective": ("objective", read_value(objective) if objective else None),
        "--data": ("data.train", data),
        "--eval": ("data.eval", eval_),
    }
    over = given(flags, set_)
    if config is None and not over:
        first_steps(out, dry_run)
        return
    loaded = load(config, over)
    resolved = resolve(loaded.config)
    run_there(resolved.config)
    if not dry_run:
        place(resolved.config, out)
    if out is not None and resolved.config.output.dir is not None:
        note(f"--out {out} is the run's folder: output.dir {resolved.config.output.dir} is not used")
    for line in (*loaded.notes, *(f"chosen: {choice}" for choice in resolved.chosen), batch_line(resolved.config)):
        note(line)
    if dry_run:
        foresee(resolved.config, resolved.chosen)
        return
    from deltatune.train.run import run

    finish(run(resolved.config, out=out, observers=observers(resolved.config, recipes(resolved.config))))


def batch_line(config: Config) -> str:
    """What one optimizer step sees: people compare runs by it."""
    train = config.train
    size, unit = (train.batch_tokens, "tokens") if train.batch_tokens else (train.batch_rows or 1, "rows")
    times = f" ({size} x accumulate {train.accumulate})" if train.accumulate > 1 else ""
    return f"effective batch: at most {(size or 1) * train.accumulate} {unit} a step{times}"


def first_steps(out: Path | None, dry_run: bool) -> None:
    """The quickstart, or what it would do."""
    if out is not None:
        place(Config(model="any", data="any"), out)
    from deltatune.train.run import quickstart, quickstart_config

    if dry_run:
        foresee(quickstart_config(), ())
    else:
        finish(quickstart(out, observers=observers()))


def foresee(config: Any, chosen: Sequence[str]) -> None:
    """The resolved configuration and the predicted cost; nothing is trained or written."""
    from deltatune.train.run import plan

    predicted = plan(config)
    if machine():
        emit({"config": config.model_dump(), "chosen": list(chosen), "plan": predicted})
        return
    screen().print(dump(config), markup=False, soft_wrap=True)
    for line in foreseen({**predicted, "said": recipes(config)}):
        screen().print(line, markup=False, soft_wrap=True)


def foreseen(plan: Mapping[str, Any]) -> Iterator[str]:
    """What a run would do and need, as people read it."""
    rows, run, learned = plan["rows"], plan["sequences"], plan["learned_tokens"]
    several = f" ({run:,} sequences: every answer, every prompt)" if run > rows else ""
    what = f"{learned:,} of them learned" if learned else "one target a row learned"
    yield f"rows: {rows:,}{several}, {plan['tokens']:,} tokens, {what}; {plan['steps']:,} steps"
    yield f"trained: {millions(plan['trainable_parameters'])} parameters, in {plan['dtype']}"
    need = plan["predicted_memory_bytes"]
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in need.items() if name != "total")
    loaded, free = gigabytes(plan["loaded_memory_bytes"]), gigabytes(plan["free_memory_bytes"])
    yield f"memory: {gigabytes(need['total'])} predicted ({parts}; {loaded} of it are loaded), {free} free"
    if again := plan["recomputed_blocks"]:
        yield f"gradient checkpointing: {again} of {plan['blocks']} blocks run again in the backward pass"
    yield from (f"note: {text}" for text in plan["notes"] if text not in plan.get("said", ()))


def millions(count: int) -> str:
    """1234567 -> '1.23 M'; small counts as they are."""
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


@main.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    restart: Annotated[bool, typer.Option("--restart", help="Discard the checkpoints and start over.")] = False,
    json_: Json = False,
) -> None:
    """Go on from the newest valid checkpoint to the end; a finished run says so."""
    check_run(folder)
    ended = bool(read_json(folder / "eval.json").get("after"))
    if ended:
        note(f"{folder} is finished; there is nothing left to train" + (" (--restart ignored)" if restart else ""))
    if done := finished(folder) if ended else None:
        finish(done)
        return
    if restart:
        from deltatune.train.checkpoint import Store

        store = Store(folder / "checkpoints")
        with store.lock():
            store.discard()
        (folder / "eval.json").unlink(missing_ok=True)  # damaged, or it would say that the run is finished
    from deltatune.train.run import resume as go_on

    finish(go_on(folder, observers=observers(load(folder / "config.yaml").config)))
