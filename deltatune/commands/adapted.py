"""`deltatune eval` and `generate`: a base model with or without an adapter, put to use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from deltatune.blocks import over
from deltatune.commands.ahead import asks_well, intake, model_there, rows_there
from deltatune.commands.methods import Json
from deltatune.commands.runs import read_json, settings
from deltatune.commands.shell import emit, machine, main, note, screen
from deltatune.commands.train import Sets, chosen
from deltatune.config import READ, load
from deltatune.core.manifest import adapter_in, is_model, record_in
from deltatune.marks import read_value
from deltatune.terminal import plain

Model = Annotated[str | None, typer.Option("--model", help="Base model; left out: the one the adapter's run names.")]
SoftPrompt = Annotated[
    int | None, typer.Option("--soft-prompt", min=0, help="One of several prompts, from 0; left out: all, combined.")
]
Task = Annotated[str | None, typer.Option("--task", help="Whose prompts, where the adapter has some for each task.")]
Combine = Annotated[
    str | None, typer.Option("--combine", help="vote or average of several prompts; left out: the adapter's.")
]
Objective = Annotated[
    str | None, typer.Option("--objective", help="An objective's name, or YAML with its fields; left out: the run's.")
]
Longest = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Draws = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
READING = tuple(f"data.{key}" for key in READ)
Adapter = Annotated[Path | None, typer.Option("--adapter", help="An adapter folder, or the run folder that holds it.")]


def folder_of(adapter: Path) -> Path:
    """The adapter's own folder: of a run folder, the one inside. ValueError where there is none."""
    if not adapter.is_dir():
        raise ValueError(f"{adapter}: there is no such adapter folder")
    if is_model(adapter):
        raise ValueError(f"{adapter} holds a whole model, no adapter: --model {adapter}")
    return adapter_in(adapter)


def located(model: str | None, adapter: Path | None) -> tuple[str, Path | None]:
    """The base model's reference and the adapter's own folder, whichever way the user named them.

    Raises ValueError: no such folder, or no model to be found.
    """
    if adapter is None:
        if model is None:
            raise ValueError("--model REF or --adapter DIR must be given")
        return model, None
    folder = folder_of(adapter)
    named = [settings(run)["model"] for run in (adapter, adapter.parent) if (run / "config.yaml").is_file()]
    manifest = (read_json(folder / "deltatune.json").get("base") or {}).get("reference")
    peft = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    found = next((name for name in (model, *named, manifest, peft) if name), None)
    if found is None:
        raise ValueError(f"{adapter} does not say which model it belongs to; add --model REF")
    return str(found), folder


def opened(model: str | None, adapter: Path | None, objective: Any = None) -> tuple[Any, Any, Any]:
    """(model, tokenizer, what the adapter's run recorded); `objective`: a block that goes before the recorded one."""
    ref, folder = located(model, adapter)
    model_there(ref)
    from deltatune.train.run import open_adapted

    return open_adapted(ref, folder, objective)


def told(command: str, model: str | None, adapter: Path | None, block: Any = None) -> dict[str, Any]:
    """What the run behind an adapter, or behind a merged model, recorded, with the objective's `block` before it, read
    without torch. ValueError where the model is not there, or is not asked by `command`."""
    ref, folder = located(model, adapter)
    model_there(ref)
    record = record_in(folder or Path(ref).expanduser())
    if block:
        record["objective"] = over(block, record.get("objective") or {})
    asks_well(command, f"--adapter {adapter}" if adapter else f"--model {ref}", record)
    return record


def asked_for(objective: str | None) -> dict[str, dict[str, Any]] | None:
    """The block that `--objective` means; None where it was left out. Raises ConfigError."""
    if objective is None:
        return None
    return load({"model": "any", "data": "any", "objective": read_value(objective)}).config.objective


def reading(record: dict[str, Any], data: Any) -> dict[str, Any]:
    """How rows are read: as `--set data.format` and `data.columns` say, else as the adapter's run recorded."""
    said = {key: getattr(data, key) for key in READ if key in data.model_fields_set}
    return {key: record[key] for key in READ if key in record} | said


@main.command("eval")
def evaluate(
    data: Annotated[str, typer.Option(help="Rows to measure on.")],
    model: Model = None,
    adapter: Adapter = None,
    examples: Annotated[str | None, typer.Option(help="Rows that the examples of eval.shots are drawn from.")] = None,
    objective: Objective = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Measure a model, with or without an adapter, on a file."""
    config = chosen(set_, ("eval", *READING))
    if bool(config.eval.shots) != (examples is not None):
        raise ValueError(
            "examples in the prompt need both: --set eval.shots=N and --examples FILE, the rows they are from"
        )
    block = asked_for(objective)
    early = told("eval", model, adapter, block)
    rows_there([data, *([examples] if examples else [])], intake({**early, **reading(early, config.data)}))
    loaded, tokenizer, record = opened(model, adapter, block)
    from deltatune.train.run import evaluate_file

    record |= reading(record, config.data)
    result = evaluate_file(loaded, tokenizer, record, data, config.eval, examples)
    for text in result["notes"]:
        note(text)
    if machine():
        emit(result)
        return
    for line in measured({key: value for key, value in result.items() if key != "notes"}):
        screen().print(plain(line), markup=False)


def measured(result: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, a line for each number, its 95 % interval behind it."""
    between = result.get("intervals") or {}
    for key, value in result.items():
        if key == "intervals":
            continue
        if key in between and isinstance(value, float):
            low, high = between[key]
            yield f"{key}: {value:.4f} (95 % interval {low:.4f} to {high:.4f})"
        elif isinstance(value, Mapping):
            yield from (f"{key} {line}" for line in measured(value))
        else:
            yield f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}"


def prompts_of(ref: str, record: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """The rows of a data reference as examples; every row that cannot be used is named with its line. `record`: of the
    adapter that they are for, whose template is filled with their columns; an answer they need not have."""
    from deltatune.data.formats import load as rows_of
    from deltatune.data.sources import task_of

    (task, file), how = task_of(ref), intake(record)
    how = replace(how, wanted=replace(how.wanted, answer=()))
    return [row.in_task(task) for row in rows_of(file, how)[0]]


def row(text: str) -> Any:
    """A word of the command line as a text, or as the row that it spells as a JSON object."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def spelled(prompts: Sequence[str], record: Mapping[str, Any]) -> list[Any]:
    """Prompts of the command line; where the run's template reads columns, as the rows that they spell, a text alone as
    the one column. ValueError for a row that lacks one."""
    from deltatune.data.example import PARTS
    from deltatune.data.formats import converted
    from deltatune.data.problems import Problems
    from deltatune.data.readers import Row
    from deltatune.data.sources import renamed

    how = intake(record, asks=True)
    columns = how.wanted.columns
    if not set(columns) - set(PARTS):
        return list(prompts)
    given = [row(text) for text in prompts]
    if len(columns) > 1 and (bare := next((text for text in given if isinstance(text, str)), None)) is not None:
        shape = ", ".join(f'"{name}": "..."' for name in columns)
        raise ValueError(f"the template reads several columns, {bare!r:.60} does not say which: --prompt '{{{shape}}}'")
    problems = Problems()
    found = [Row({columns[0]: one} if isinstance(one, str) else one, f"--prompt:{i}") for i, one in enumerate(given, 1)]
    examples = list(converted((renamed(one, how.names) for one in found), problems, how))
    problems.refuse()
    return examples


def question(example: Any) -> str:
    """The text of a row that is answered: its prompt, or the turns before the last answer, one paragraph each."""
    if example.media is not None:
        return str(example.media.name)
    if not example.turns:
        return str(example.prompt if example.prompt is not None else example.text or "")
    turns = example.turns[:-1] if example.turns[-1].role == "assistant" else example.turns
    return turns[0].content if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


@main.command()
def generate(
    model: Model = None,
    adapter: Adapter = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt; a chat model gets it as it was trained, as the user's turn by default. For a template with "
            'columns a row: \'{"topic": "..."}\'.'
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows whose prompts are answered.")] = None,
    max_new_tokens: Longest = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
    seed: Draws = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without any template.")
    ] = False,
    soft_prompt: SoftPrompt = None,
    task: Task = None,
    combine: Combine = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Answer prompts."""
    if bool(prompt) == (data is not None):
        raise ValueError("give --prompt TEXT or --data FILE, one of them")
    reads = chosen(set_, READING).data
    early = told("generate", model, adapter)
    early |= reading(early, reads)
    asked = prompts_of(data, early) if data is not None else list(prompt or ()) if raw else spelled(prompt or (), early)
    loaded, tokenizer, record = opened(model, adapter)
    from deltatune.evaluate.generate import Decoding, answers

    chat = bool(getattr(tokenizer, "chat_template", None)) and not (raw or record.get("plain"))
    ready = [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in asked]
    how = Decoding(max_new_tokens, temperature, top_p, seed=seed, raw=raw)
    decoding = replace(how, prompt=soft_prompt, task=task, combine=combine)
    found = answers(loaded, tokenizer, ready, decoding)
    where = [getattr(p, "where", "") for p in asked]
    if machine():
        texts = [p if isinstance(p, str) else question(p) for p in asked]
        rows = [
            {"where": place or None, "prompt": text, "answer": answer}
            for place, text, answer in zip(where, texts, found.texts, strict=True)
        ]
        cost = {"tokens": found.tokens, "seconds": found.seconds, "cut": found.cut}
        emit({"answers": rows, **cost})
        return
    for source, place, text in zip(asked, where, found.texts, strict=True):
        if len(asked) > 1:
            screen().print(f"# {plain(place or str(source))}", markup=False, style="dim", soft_wrap=True)
        screen().print(plain(text), markup=False, soft_wrap=True)
