"""Job: a configuration made concrete: model with adapter, rows as tokens, and the order they are trained in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..core.attach import attach, attached, packing, trainable
from ..core.delta import Refusal
from ..core.store import virtual_ids
from ..data import formats
from ..data.batch import Batch, Batching, pack, pad, plan
from ..data.encode import Encoded, Encoding
from ..data.example import Example
from ..data.problems import BadRow, Problems
from ..evaluate.incontext import Prompt
from ..methods import build as build_methods
from ..methods.freeze import Head
from ..objectives import build as build_objective
from ..objectives.common import kind_of
from ..zoo import model_path
from .sampler import Sampler

ADAPTER = "default"


@dataclass
class Job:
    """Everything a run needs, prepared; nothing trained yet."""

    config: Config
    model: nn.Module
    tokenizer: Any
    objective: Any
    adapter: str
    encoding: Encoding
    train: list[Example]
    eval: list[Example]
    ood: dict[str, list[Example]]
    rows: list[Encoded] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baselines: Sequence[Prompt] = ()  # ways to ask the untuned model; () tries the row as it is

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(i) for i in ids if i is not None), 0)

    @property
    def packs(self) -> bool:
        """Whether rows are laid end to end: by default wherever objective and family allow it."""
        wanted = self.config.data.packing
        legal = self.objective.packs and kind_of(self.model) != "seq2seq"
        if wanted == "on" and not legal:
            where = f"{self.objective.name} on {type(self.model).__name__}"
            raise ValueError(f"data.packing: on does not work for {where}; leave it auto")
        return legal and wanted != "off"

    def batching(self) -> Batching:
        t, packs = self.config.train, self.packs and self.config.train.batch_tokens is not None
        return Batching(t.batch_tokens, t.batch_rows, packing=packs, group=not packs)

    def sampler(self) -> Sampler:
        lengths = [max(len(r.ids), len(r.labels or ())) for r in self.rows]
        batching, seed = self.batching(), self.config.train.seed
        return Sampler(lambda epoch: plan(lengths, batching, seed, epoch), self.config.train.accumulate)

    def batch(self, rows: Sequence[Encoded], packs: bool | None = None) -> Batch:
        """Rows as tensors on the model's device."""
        packs = self.batching().packing if packs is None else packs
        return (pack(rows) if packs else pad(rows, self.pad_id)).to(self.device)

    def steps(self, sampler: Sampler) -> int:
        """Optimizer steps of the whole run; part of an epoch counts in proportion."""
        t = self.config.train
        if t.steps is not None:
            return t.steps
        whole, part = divmod(t.epochs or 1.0, 1.0)
        done = sampler.steps(int(whole))
        return done + (math.ceil(part * (sampler.steps(int(whole) + 1) - done)) if part else 0)

    def encode(self, examples: Sequence[Example], encoding: Encoding | None = None) -> list[Encoded]:
        """Every row of `examples`; ValueError that lists every row that cannot be used."""
        problems, found = Problems(), []
        for example in examples:
            problems.accept()
            try:
                found += self.objective.encode(example, self.tokenizer, encoding or self.encoding)
            except BadRow as fault:
                problems.retract(fault)
        problems.refuse()
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        return trainable(self.model, self.adapter)


# ---- preparing -------------------------------------------------------------------------------------------------------
def read_sets(config: Config, notes: list[str]) -> tuple[list[Example], list[Example], dict[str, list[Example]]]:
    """(train, eval, ood) rows; one ValueError with every row that cannot be used."""
    train = read(config.data.train, config.data.format, notes)
    if not train:
        raise ValueError(f"{', '.join(config.data.train)}: no rows to train on")
    held = read(config.data.eval, config.data.format, notes)
    return train, held, {name: read(refs, config.data.format, notes) for name, refs in config.data.ood.items()}


def read(refs: Sequence[str], format: str, notes: list[str]) -> list[Example]:
    found: list[Example] = []
    for ref in refs:
        rows, problems = formats.load(ref, None if format == "auto" else format)
        notes += [*problems.notes, *map(str, problems.warnings)]
        found += rows
    return found


def open_model(config: Config, objective: Any) -> tuple[nn.Module, Any]:
    """(model with the head the objective needs, tokenizer) of `model.name`, in evaluation mode."""
    path = model_path(config.model.name, config.model.revision)
    tokenizer = open_tokenizer(path)
    model = objective.load(path, model_config(path), dtype=dtype(config))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def open_tokenizer(path: Path | str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # batches mask by length, so that a shared id hides nothing
    return tokenizer


def model_config(path: Path | str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def dtype(config: Config) -> torch.dtype:
    """What the user asked for, or bf16 where the hardware multiplies it fast."""
    asked = next((x for x in (config.model.dtype, config.train.precision) if x != "auto"), None)
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[asked or ("bf16" if has_bf16() else "fp32")]


def has_bf16() -> bool:
    """Whether this machine has bf16 matrix instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def methods(config: Config, objective: Any) -> tuple[Any, ...]:
    """The configured methods; a task head is always trained beside them."""
    found = build_methods([dict(block) for block in config.method])
    if objective.task_head and not any(isinstance(m, Head) or m.method_name == "full" for m in found):
        found = (*found, Head())
    return found


def prepare(config: Config) -> Job:
    """Read the data, open the model, attach the method, encode the rows. ValueError or Refusal where it cannot work."""
    check_supported(config)
    notes: list[str] = []
    train, held, ood = read_sets(config, notes)
    objective = build_objective(config.objective).fit(train)
    model, tokenizer = open_model(config, objective)
    job = Job(config, model, tokenizer, objective, ADAPTER, Encoding(), train, held, ood, notes=notes)
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        attach(model, methods(config, objective), ADAPTER)
    return settle(job)


def settle(job: Job) -> Job:
    """Bind the objective to the tokenizer, and encode with the adapter's virtual ids in front."""
    if hasattr(job.objective, "bind"):
        job.objective = job.objective.bind(job.tokenizer)
    job.encoding = Encoding(
        max_length=job.config.train.max_length,
        train_on=getattr(job.objective, "train_on", "assistant"),
        decoder=kind_of(job.model) == "seq2seq" and not job.objective.task_head,
        prompt_ids=virtual_ids(job.model, job.adapter),
    )
    job.rows = job.encode(job.train)
    if job.batching().packing:
        packing(job.model)
    if job.config.train.checkpoint_gradients == "on":
        job.model.gradient_checkpointing_enable({"use_reentrant": False})
    return job


def check_supported(config: Config) -> None:
    if config.train.compile == "on":
        raise ValueError("train.compile: on is not in this version; leave it auto (which runs without)")


def from_model(model: nn.Module, objective: Any, config: Config, given: Mapping[str, Any]) -> Job:
    """A job over a model that the caller holds, with the adapter `given["adapter"]` attached already."""
    check_supported(config)
    name = given["adapter"]
    if name not in attached(model):
        raise ValueError(f"adapter {name!r} is not attached: call attach(model, LoRA(...), name={name!r}) first")
    notes: list[str] = []
    train, held, ood = read_sets(config, notes)
    objective = build_objective(objective).fit(train)
    if objective.task_head and not hasattr(model, "classifier") and not hasattr(model, "score"):
        raise Refusal(
            "this objective needs a task head.",
            found=type(model).__name__,
            instead="AutoModelForSequenceClassification and attach(model, [LoRA(), Head()])",
        )
    tokenizer = given.get("tokenizer") or open_tokenizer(model.config._name_or_path)
    return settle(Job(config, model, tokenizer, objective, name, Encoding(), train, held, ood, notes=notes))


def last_turn(encoding: Encoding) -> Encoding:
    """The encoding whose first supervised token begins the last answer: what generation is prompted with."""
    return replace(encoding, train_on="last", truncate="left")
