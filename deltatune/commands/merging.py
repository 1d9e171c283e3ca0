"""`deltatune merge`, `export`, `extract`: adapters as changes of weights: added up, cut to a LoRA, found again."""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.commands.adapted import Model, folder_of, located, opened, prompts_of, question, told
from deltatune.commands.ahead import is_weights
from deltatune.commands.methods import Json
from deltatune.commands.shell import UNVERIFIED, emit, machine, main, note, screen
from deltatune.config import READ
from deltatune.core.manifest import write_record
from deltatune.terminal import plain

Run = Annotated[Path, typer.Argument(metavar="DIR", help="An adapter folder or a run folder.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="The rank to cut to; left out: nothing is cut.")]
Energy = Annotated[
    float | None, typer.Option("--energy", help="Instead of --rank: the share of the change's squared norm to keep.")
]
HOWS = "linear, cat, svd, ties, dare or dare_ties"


def check_new(out: Path) -> None:
    """ValueError unless `out` is free and can be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new folder")
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{out} cannot be written: {place} is no folder that this user may write to")


def weighted(text: str) -> tuple[Path, float]:
    """'runs/b:0.5' -> (runs/b, 0.5); without a number the weight is 1."""
    folder, _, weight = text.rpartition(":")
    try:
        return (Path(folder), float(weight)) if folder else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def used(how: str, rank: int | None, density: float | None, seed: int | None) -> dict[str, Any]:
    """The options of `combine`, checked before any model is opened; ValueError for one that `how` has no use for."""
    from deltatune.core.combine import Combination

    if how == "svd" and rank is None:
        raise ValueError("--how svd needs --rank N, the rank to cut to; --how cat keeps everything")
    options: dict[str, Any] = {"how": how, "r": rank, "density": density, "seed": seed}
    options = {key: value for key, value in options.items() if value is not None or key == "r"}
    Combination(**options)
    for key, users in (("density", ("ties", "dare", "dare_ties")), ("seed", ("dare", "dare_ties"))):
        if key in options and how not in users:
            raise ValueError(f"--{key} is for --how {', '.join(users)}: {how} has no use for it")
    return options


def check_weights(weights: Sequence[tuple[Path, float]]) -> None:
    """ValueError for a number that is none, or a folder that is not there."""
    for folder, weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {folder} must be a finite number, got {weight}")
        is_weights(folder_of(folder), "merged")


def tell(facts: dict[str, Any], lines: Sequence[str]) -> None:
    """One JSON document, or lines for people."""
    if machine():
        emit(facts)
        return
    for line in lines:
        screen().print(plain(line), markup=False, soft_wrap=True)


def facts_of(fit: Any) -> dict[str, Any]:
    """A Fit as JSON."""
    return {"error": fit.error, "ranks": dict(fit.ranks), "errors": dict(fit.errors), "left": dict(fit.left)}


def lines_of(fit: Any) -> list[str]:
    """A Fit for people: ranks, what is lost over all and where most, what was left out."""
    ranks = sorted(set(fit.ranks.values()))
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    found = [f"{span} in {len(fit.ranks)} layers"] if ranks else []
    found.append(f"remaining error {fit.error:.2e} of the change (Frobenius)")
    worst = max(fit.errors, key=lambda key: fit.errors[key], default=None)
    if worst is not None and fit.errors[worst]:
        found.append(f"largest in {worst}: {fit.errors[worst]:.2e}")
    return found + [f"not in the LoRA: {key} (norm of its change {size:.2e})" for key, size in fit.left.items()]


def write_model(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """An ordinary model folder, with what the adapter's run recorded: whole when it is there, as it is written beside
    its place and renamed."""
    from deltatune.objectives.common import quiet

    part = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex}")
    try:
        with quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        write_record(part, record)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def combined(loaded: Any, others: Sequence[tuple[Path, float]], weight: float, options: dict[str, Any]) -> Any:
    """Attach the other adapters, and all together as "combined"."""
    from deltatune.core.combine import combine
    from deltatune.core.store import load

    weights = {"default": weight}
    for number, (folder, own) in enumerate(others, 2):
        _, place = located(None, folder)
        weights[load(loaded, place or folder, f"number{number}")] = own
    return combine(loaded, weights, "combined", **options)


@main.command()
def merge(
    adapter: Run,
    out: Annotated[Path, typer.Option("--out", help="A new folder for the result.")],
    with_: Annotated[
        list[str] | None, typer.Option("--with", metavar="DIR[:WEIGHT]", help="Another adapter; may be repeated.")
    ] = None,
    weight: Annotated[float, typer.Option(help="The first adapter's weight; a negative one takes it away.")] = 1.0,
    how: Annotated[str, typer.Option(help=f"How several become one: {HOWS}.")] = "linear",
    rank: Rank = None,
    density: Annotated[float | None, typer.Option(help="The share of values that ties and dare keep [0.5].")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of what dare drops [0].")] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Write an adapter, not a model.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Merge onto this model: a 4-bit base's full-precision original.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to measure the merge's cost on; 4-bit bases: general text by default.")
    ] = None,
    model: Model = None,
    json_: Json = False,
) -> None:
    """Write the base with one adapter or several merged in, as an ordinary model folder."""
    check_new(out)
    others = [weighted(text) for text in with_ or ()]
    check_weights([(adapter, weight), *others])
    if adapter_only and (base or data):
        raise ValueError(f"--adapter-only writes no model: leave out --{'base' if base else 'data'}, or write a model")
    record = told("merge", model, adapter)
    asked = prompts_of(data, record) if data else None
    options = used(how, rank, density, seed)
    loaded, tokenizer, opening = opened(model, adapter)
    from deltatune.core.attach import activate, attached, known
    from deltatune.core.cost import cost
    from deltatune.core.store import save
    from deltatune.train.use import cost_text, merged

    text = cost_text(loaded, tokenizer, asked)
    (name,) = attached(loaded)
    facts: dict[str, Any] = {"merged": str(out), "adapter": str(adapter)}
    lines: list[str] = []
    if others or weight != 1.0 or adapter_only or how != "linear" or rank is not None:
        fit = combined(loaded, others, weight, options)
        name, exact = "combined", rank is None and how in ("linear", "cat")
        weights = {str(adapter): weight, **{str(folder): own for folder, own in others}}
        facts |= {"weights": weights, **options, "exact": exact, **facts_of(fit)}
        lines = lines_of(fit) if rank is not None else ["exact: nothing was cut"] if exact else []
    kept = known(loaded).records.get(name, {})
    if adapter_only:
        save(loaded, name, out, base=located(model, adapter)[0])
    else:
        whole = merged(loaded, opening, base, name)
        if text is not None:
            activate(loaded, name)
            paid = cost(loaded, whole, text)
            facts, lines = facts | {"cost": asdict(paid)}, [*lines, f"what merging cost: {paid}"]
        write_model(whole, tokenizer, out, kept)
    tell(facts, [*lines, f"{'adapter' if adapter_only else 'merged model'} in {out}"])
    uncarried(record, kept)


def uncarried(record: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """A note of what a new folder does not say of its run, and how to say it when it is used."""
    if "objective" not in kept:
        why = "the runs learned unlike things" if "objective" in record else "no run recorded it"
        note(f"what was learned is not kept ({why}): eval and predict need --objective, and --set data.columns")
    elif lost := sorted(key for key in READ if key in record and key not in kept):
        note(f"the runs differ in {' and '.join(lost)}: eval and predict need --set data.{lost[0]}")


def probes(model: Any, tokenizer: Any, examples: Sequence[Any] | None) -> list[dict[str, Any]]:
    """What the KL is measured on: the questions of the rows, or 4 rows of 64 random tokens."""
    import torch

    from deltatune.core.vocabulary import vocabulary

    device = next(model.parameters()).device
    if examples is None:
        size = vocabulary(model)
        if not size:
            raise ValueError(f"{type(model).__name__} reads no tokens, so there is nothing to measure the KL on")
        ids = torch.randint(0, size, (4, 64), generator=torch.Generator().manual_seed(0))
        found = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    else:
        texts = [question(example) for example in examples[:64]]
        found = [dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=512)) for text in texts]
    if model.config.is_encoder_decoder:
        found = [{**row, "decoder_input_ids": row["input_ids"]} for row in found]
    return [{key: value.to(device) for key, value in row.items()} for row in found]


@main.command()
def export(
    adapter: Run,
    out: Annotated[Path, typer.Option("--out", help="A new folder for the exported adapter.")],
    lora: Annotated[bool, typer.Option("--lora", help="As a peft LoRA folder: what LoRA-only servers read.")] = False,
    rank: Rank = None,
    energy: Energy = None,
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what a LoRA cannot hold (biases, norms).")] = False,
    data: Annotated[str | None, typer.Option(help="Rows for the KL; left out: random tokens.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Exit code 3 when the KL is above this.")] = None,
    model: Model = None,
    json_: Json = False,
) -> None:
    """Write any adapter that is a change of weights as a LoRA, and say what that costs."""
    if not lora:
        raise ValueError("say what to export to: --lora is the form there is")
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise ValueError(f"--max-kl is a number of nats, 0 or more, got {max_kl}")
    check_new(out)
    is_weights(folder_of(adapter), "exported as a LoRA")
    record = told("export", model, adapter)
    asked = prompts_of(data, record) if data else None
    check_kept(rank, energy)
    loaded, tokenizer, _ = opened(model, adapter)
    from deltatune.core.attach import known
    from deltatune.core.convert import kl, to_lora
    from deltatune.core.store import save

    fit = to_lora(loaded, "default", "exported", r=rank, energy=energy, drop=drop)
    drift = kl(loaded, "default", "exported", probes(loaded, tokenizer, asked))
    save(loaded, "exported", out, base=located(model, adapter)[0])
    measured = data or "random tokens"
    facts = {"exported": str(out), "adapter": str(adapter), "kl": drift, "kl_on": measured, **facts_of(fit)}
    head = ["the task head goes along whole"] if len(known(loaded).methods["exported"]) > 1 else []
    cost = f"KL(adapter || LoRA) {drift:.2e} nats a token on {measured}"
    tell(facts, [*lines_of(fit), *head, cost, f"LoRA in {out}"])
    uncarried(record, known(loaded).records.get("exported", {}))
    if max_kl is not None and drift > max_kl:
        raise typer.Exit(UNVERIFIED)


def check_kept(rank: int | None, energy: float | None) -> None:
    """ValueError, before any model is opened, for no rank or no share."""
    from deltatune.core.change import check_size

    if rank is not None and energy is not None:
        raise ValueError("--rank and --energy both say how much to keep: give one")
    check_size(rank, energy)


def weights_of(ref: str) -> Any:
    """A model in float32, which holds half precision exactly: the difference of two must not be rounded."""
    import torch

    from deltatune.objectives.common import language_class, load
    from deltatune.train.opening import model_config
    from deltatune.zoo import model_path

    path = model_path(ref)
    config = model_config(path)
    return load(language_class(config), path, config, dtype=torch.float32)


@main.command()
def extract(
    model: Annotated[str, typer.Option("--model", help="The base model.")],
    tuned: Annotated[str, typer.Option("--tuned", help="The same model after full tuning.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the adapter.")],
    rank: Rank = None,
    energy: Energy = None,
    target: Annotated[list[str] | None, typer.Option(help="A role, name or regex; may be repeated.")] = None,
    json_: Json = False,
) -> None:
    """Find the LoRA nearest to what full tuning did, and list what it cannot hold."""
    check_new(out)
    if rank is None and energy is None:
        raise ValueError("say how much to keep: --rank N or --energy 0.99")
    check_kept(rank, energy)
    base, other = weights_of(model), weights_of(tuned)
    from deltatune.core.convert import extract as found
    from deltatune.core.store import save

    fit = found(base, other, rank, tuple(target or ("all",)), energy=energy)
    save(base, "extracted", out, base=model)
    tell({"extracted": str(out), **facts_of(fit)}, [*lines_of(fit), f"LoRA in {out}"])
