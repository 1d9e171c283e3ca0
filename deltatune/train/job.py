"""Job: a configuration made concrete: model with adapter, rows as tokens, and the order they are trained in."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import Config, recipes
from ..core.attach import activate, attach, attached, each, known, packing, running, trainable
from ..core.attention import unpackable
from ..core.delta import SLOT, Given, to_train
from ..core.recompute import recomputing
from ..core.registry import bound
from ..core.site import fresh, head_modules
from ..core.sparse import unthinned
from ..core.store import add_tokens
from ..data.batch import Batch, Batching, pack, pad, plan, side_by_side
from ..data.encode import Encoded, Encoding, encoder
from ..data.example import Example
from ..data.media import Reader, parted, reader
from ..data.mix import Mixture
from ..data.problems import BadRow, Problems
from ..data.sources import task_of
from ..evaluate.asking import prompted
from ..evaluate.incontext import Prompt
from ..evaluate.score import measurable
from ..methods import build as build_methods
from ..methods.freeze import Full, Head
from ..methods.tokens import NewTokens
from ..objectives import build as build_objective
from ..objectives.common import kind_of
from ..zoo import dtype as best_dtype
from . import memory, passes, recompute, worth
from .lengths import fitting, longest, unread
from .opening import DTYPES, open_model, tokenizer_of
from .opening import dtype as asked_dtype
from .prompts import check_prompts, with_tasks
from .rounding import check
from .sampler import Sampler
from .sets import SAMPLE, intake, read, read_sets, streamed, tasks
from .streaming import Flow, Source
from .supported import check_supported

if TYPE_CHECKING:
    from .known import Known

ADAPTER = "default"
HEARS = ("classify", "sft")  # the objectives that take rows of pictures and sounds
SELDOM = r"(pooler|head|classifier|score|embed|wte|wpe|rows)"  # keys without a gradient in many a batch


@dataclass
class Job:
    """Everything a run needs, prepared; nothing trained yet."""

    config: Config
    model: Any  # a transformers model
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
    pass_tokens: int | None = None  # tokens computed at once; None: a micro-batch whole
    recompute: int = 0  # how many blocks (`units`) gradient checkpointing runs again
    sizes: list[int] = field(default_factory=list)  # rows of each training set, where they are mixed
    fresh: bool = True  # the adapter was attached for this run, untrained
    kept: dict[tuple[int, Encoding], tuple[Example, list[Encoded]]] = field(default_factory=dict)  # of `measured`
    known: Known | None = None  # what the frozen blocks make of the rows
    processor: Any = None  # of pictures or sounds; None: the one that lies beside the model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def media(self) -> Reader | None:
        """What reads the rows' pictures or sounds; None for a model of text."""
        return reader(self.model.config, self.processor)

    @property
    def pad_id(self) -> int:
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(i) for i in ids if i is not None), 0)

    @cached_property
    def packs(self) -> bool:
        """Whether the rows of a batch are laid end to end: by default wherever objective and family allow it."""
        wanted = self.config.data.packing
        if wanted == "off" or (wanted == "auto" and not self.objective.packs):
            return False
        why = unpackable(self.model) if self.objective.packs else "its rows have a target each, or a mask"
        if wanted == "on" and why:
            where = f"{self.objective.name} on {type(self.model).__name__}"
            raise ValueError(f"data.packing: on does not work for {where} ({why}); leave it auto")
        return not why

    @cached_property
    def reads(self) -> memory.Passes:
        """How the model reads a row."""
        return memory.Passes.of(self)

    def batching(self) -> Batching:
        t, packs = self.config.train, self.packs
        return Batching(t.batch_tokens, t.batch_rows, packing=packs, group=not packs)

    def sampler(self) -> Sampler | Flow:
        if self.config.data.streaming:
            refs, t = streamed(self.config.data.train), self.config.train
            return Flow(Source(refs, self.encode, intake(self.config), t.seed), self.batching(), t.accumulate)
        lengths = [self.prompts * row.length for row in self.rows]
        batching, seed = self.batching(), self.config.train.seed
        if self.config.data.mix:
            order = Mixture(tuple(self.sizes), self.config.data.mix.temperature, seed)
            return Sampler(lambda epoch: order.plan(lengths, batching, epoch), self.config.train.accumulate)
        return Sampler(lambda epoch: plan(lengths, batching, seed, epoch), self.config.train.accumulate)

    def batch(self, rows: Sequence[Encoded], packs: bool | None = None) -> Batch:
        """Rows as tensors on the model's device."""
        packs = self.batching().packing if packs is None else packs
        if self.prompts > 1:
            rows = side_by_side(rows, self.encoding.prompt_sets, self.prompts)
        batch = pack(rows) if packs else pad(rows, self.pad_id)
        return replace(batch, prompts=self.prompts, combine=self.encoding.combine).to(self.device, self.model.dtype)

    @property
    def prompts(self) -> int:
        """How many prompts read every row, side by side in one batch."""
        return self.encoding.several

    def batches(self, sampler: Sampler | Flow) -> Callable[[int], list[Batch]]:
        """step -> its micro-batches as tensors."""
        if isinstance(sampler, Flow):
            return lambda step: [self.batch(rows) for group in sampler(step) for rows in self.apart(group, group)]
        return lambda step: [
            self.grouped(numbers)
            for group in sampler(step)
            for numbers in self.apart(group, [self.rows[i] for i in group])
        ]

    def apart(self, group: Sequence[Any], rows: Sequence[Encoded]) -> list[list[Any]]:
        """A micro-batch, given as its rows or their numbers, as its passes."""
        return [[group[i] for i in part] for part in passes.parts(self, rows)]

    def grouped(self, group: Sequence[int]) -> Batch:
        """The training rows of these numbers, with what is known of them."""
        batch = self.batch([self.rows[i] for i in group])
        return self.known.of(group, batch) if self.known else batch

    def steps(self, sampler: Sampler | Flow) -> int:
        """Optimizer steps of the whole run; part of an epoch counts in proportion."""
        t = self.config.train
        if t.steps is not None:
            return t.steps
        assert isinstance(sampler, Sampler), "check_supported demands train.steps of a stream"
        whole, part = divmod(t.epochs or 1.0, 1.0)
        done = sampler.steps(int(whole))
        return done + (math.ceil(part * (sampler.steps(int(whole) + 1) - done)) if part else 0)

    def encode(self, examples: Sequence[Example], encoding: Encoding | None = None) -> list[Encoded]:
        """Every row of `examples`; ValueError that lists every row that cannot be used."""
        return [row for rows in self.encoded(examples, encoding or self.encoding) for row in rows]

    def encoded(self, examples: Sequence[Example], encoding: Encoding) -> list[list[Encoded]]:
        """As `encode`, the rows of each example apart."""
        problems, found = Problems(), []
        for example in examples:
            problems.accept()
            try:
                self.suits(example)
                how = encoding.of(example.task, example.where)
                found.append(self.objective.encode(example, self.tokenizer, how))
            except BadRow as fault:
                problems.retract(fault)
        problems.refuse()
        return found

    def measured(self, examples: Sequence[Example], encoding: Encoding | None = None) -> list[list[Encoded]]:
        """As `encoded`, kept: the same rows are measured before training, within and after."""
        how = encoding or self.encoding
        new = [e for e in examples if (id(e), how) not in self.kept]
        # with the example itself, whose id would otherwise be another's once it is gone
        self.kept |= {(id(e), how): (e, rows) for e, rows in zip(new, self.encoded(new, how), strict=True)}
        return [self.kept[id(e), how][1] for e in examples]

    def suits(self, example: Example) -> None:
        """BadRow for a row that the objective, or the model under it, cannot take."""
        if example.media is not None and self.objective.name not in HEARS:
            reason = f"{self.objective.name} asks with words, the row holds an {example.media.kind}"
            fix = f"Choose one of the objectives {', '.join(HEARS)}"
            raise BadRow("wrong_input", example.where, example.media.kind, reason, fix)
        self.ends(example)

    def ends(self, example: Example) -> None:
        """An encoder-decoder classifies at the end-of-sequence token: BadRow for a text that holds one of its own."""
        end, reads = self.tokenizer.eos_token, self.objective.task_head and kind_of(self.model) == "seq2seq"
        if reads and end and any(end in text for text in (example.text, example.text_pair) if text):
            reason = f"the text holds {end!r}, where the model reads the class"
            raise BadRow("control_token", example.where, "text", reason, "Remove it, or write it differently")

    def trainable(self) -> dict[str, nn.Parameter]:
        return trainable(self.model, self.adapter)

    def to_train(self) -> int:
        """How many numbers train, where rows have still to say which, too."""
        return to_train(list(each(self.model, self.adapter)))

    def conditional(self) -> list[str]:
        """Keys that may see no gradient for a while: tuned in place, embeddings of words that do not occur, gates."""
        names = {m.method_name for m in known(self.model, self.adapter).methods[self.adapter]}
        own = [f"^{re.escape(key)}$" for key, delta, _ in self.each() if delta.conditional]
        return own + ([SELDOM] if names & {"full", "freeze", "head", "tokens"} else [])

    def each(self) -> Iterator[tuple[str, Any, str]]:
        """(canonical key, its delta, the delta's own name for it) of every trained parameter."""
        for layer, delta in each(self.model, self.adapter):
            for name in delta.trained(layer):
                yield f"{delta.site.key}.{name}", delta, name

    def ratios(self) -> tuple[tuple[str, float], ...]:
        """The learning rates that methods ask for, as multiples of the run's (LoRA+, diff pruning)."""
        return tuple(
            (f"^{re.escape(key)}$", delta.rates[unthinned(name)])
            for key, delta, name in self.each()
            if unthinned(name) in delta.rates
        )

    def given(self) -> Given:
        """The loss of one micro-batch after another, in training order, for methods that must see rows first."""
        sampler = self.sampler()

        def losses() -> Iterator[Tensor]:
            batches = replace(self, pass_tokens=None).batches(sampler)
            for step in range(self.steps(sampler)):
                for batch in batches(step):
                    if batch.targets:
                        yield self.objective.loss(self.model, batch)[0] / batch.targets

        def by_row() -> Iterator[Tensor]:
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.config.train.seed))
            for i in order.tolist():
                if (batch := self.batch([self.rows[i]], packs=False)).targets:
                    yield self.objective.loss(self.model, batch)[0] / batch.targets

        return Given(losses, self.config.train.seed, by_row)

    def idle(self, key: str) -> bool:
        """Whether `key` may rightly end the run as it began."""
        return any(re.search(pattern, key) for pattern in self.conditional())

    def sample(self) -> list[Example]:
        """What before and after are measured on: the evaluation rows, else a fixed piece of the training rows."""
        return self.eval or self.train[:: max(1, math.ceil(len(self.train) / SAMPLE))]


# ---- preparing -------------------------------------------------------------------------------------------------------
def methods(config: Config, objective: Any, added: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """The configured methods; a task head and the rows of `added` tokens are always trained beside them."""
    found = build_methods([dict(block) for block in config.method])
    if added and not any(isinstance(m, NewTokens | Full) for m in found):
        found = (*found, NewTokens(added))
    found = tuple(with_rows(m, added) if isinstance(m, NewTokens) and added else m for m in found)
    if objective.task_head and not any(isinstance(m, Head) or m.method_name == "full" for m in found):
        found = (*found, Head())
    return found


def with_rows(tokens: NewTokens, added: tuple[int, ...]) -> NewTokens:
    """The rows of `added` too; where no ids were given, theirs alone."""
    return replace(tokens, ids=added if tokens == NewTokens() else tuple(dict.fromkeys((*tokens.ids, *added))))


def prepare(config: Config) -> Job:
    """Read the data, open the model, attach the method, encode the rows. ValueError or Refusal where it cannot work."""
    check_supported(config)
    check(config.train.rounding, [asked_dtype(config)])
    notes = recipes(config)
    train, held, ood = read_sets(config, notes)
    objective = build_objective(config.objective).fit(train)
    model, tokenizer = open_model(config, objective)
    words = list(config.model.add_tokens)
    added = add_tokens(model, tokenizer, words) if words else ()
    if added:
        notes.append(f"{len(added)} tokens are added; before training, each is the mean of all the others")
    job = Job(config, model, tokenizer, objective, ADAPTER, Encoding(), train, held, ood, notes=notes)
    found = with_tasks(methods(config, objective, added), tasks(config), notes)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.train.seed)
        attach(model, [bound(m, tokenizer) for m in found], ADAPTER)
    return settle(job)


def settle(job: Job) -> Job:
    """Bind the objective to the tokenizer, encode with the adapter's virtual ids in front, and pin what was `auto`."""
    check(job.config.train.rounding, {p.dtype for p in job.trainable().values()})
    check_prompts(settle_encoding(job))
    job.notes += unread(job)
    job.rows = told(job, "training", job.train)
    if job.config.data.mix:
        job.sizes = set_sizes(job)
    fitting(job)
    for name, rows in {"evaluation": job.eval, **job.ood}.items():
        if rows:  # a row that cannot be measured is better known now than after hours
            told(job, name, rows)
            measurable(job, rows)
    job.pass_tokens = passes.chosen(job)
    job.recompute = recompute.chosen(job)
    pinned = {
        "precision": {v: k for k, v in DTYPES.items()}.get(next(job.model.parameters()).dtype, "auto"),
        "compile": worth.pinned(job),
        "pass_tokens": job.pass_tokens or "off",
        "checkpoint_gradients": recompute.pinned(job),
    }
    job.config = job.config.model_copy(update={"train": job.config.train.model_copy(update=pinned)})
    return job


def settle_encoding(job: Job) -> Job:
    """The objective's words as ids, and how rows become tokens for this model and adapter."""
    if hasattr(job.objective, "bind"):
        job.objective = job.objective.bind(job.tokenizer, kind_of(job.model))
    job.encoding = Encoding(
        max_length=longest(job),
        train_on=getattr(job.objective, "train_on", "assistant"),
        decoder=kind_of(job.model) == "seq2seq" and not job.objective.task_head,
        **prompted(job.model, *running(job.model)),
        media=job.media,
    )
    return job


def set_sizes(job: Job) -> list[int]:
    """Encoded rows of each set of `data.train`: files of one task that follow each other are one set."""
    sizes: dict[str, int] = {}
    at = 0
    for ref in job.config.data.train:
        count, name = len(read([ref], job.config, [])), task_of(ref)[0] or ref
        sizes[name] = sizes.get(name, 0) + len(job.encode(job.train[at : at + count]))
        at += count
    return list(sizes.values())


def told(job: Job, name: str, examples: Sequence[Example]) -> list[Encoded]:
    """A set's rows as tokens, with a note of what max_length cuts off them. All but training rows are kept."""
    coders = [encoder(job.tokenizer, own) for own in job.encoding.each()]
    cut, lost = sum(c.truncated for c in coders), sum(c.lost_tokens for c in coders)
    rows = job.encode(examples) if name == "training" else [row for own in job.measured(examples) for row in own]
    cut, lost = sum(c.truncated for c in coders) - cut, sum(c.lost_tokens for c in coders) - lost
    job.notes += [note for note in dict.fromkeys(n for c in coders for n in c.notes) if note not in job.notes]
    if cut:
        most = job.encoding.max_length
        job.notes.append(f"{name}: {cut} rows are cut to max_length {most}, {lost} tokens are lost")
    return rows


@contextmanager
def in_training(job: Job) -> Iterator[None]:
    """The model as the run needs it (packing, recomputation, deterministic operations), and afterwards as it was."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    packs = job.batching().packing
    modes = [(module, module.training) for module in job.model.modules()]
    torch.use_deterministic_algorithms(job.config.train.deterministic)
    if packs:
        packing(job.model)
    try:
        with recomputing(job.model, job.recompute):
            yield
    finally:
        job.known = None
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if packs and job.adapter in attached(job.model):
            packing(job.model, False)
        for module, training in modes:
            module.training = training


def from_model(model: nn.Module, objective: Any, config: Config, given: Mapping[str, Any]) -> Job:
    """A job over a model that the caller holds, with the adapter `given["adapter"]` attached already.

    That adapter alone is active from here on.
    """
    check_supported(config)
    name = given["adapter"]
    if name not in attached(model):
        raise ValueError(f"adapter {name!r} is not attached: call attach(model, LoRA(...), name={name!r}) first")
    tokenizer, processor = parted(given.get("tokenizer") or tokenizer_of(model))
    asked = DTYPES.get(config.train.precision, DTYPES.get(config.model.dtype))
    have = next(model.parameters()).dtype
    if asked not in (None, have):
        raise ValueError(f"the model is in {have}, train.precision asks for {asked}: convert it with model.to({asked})")
    if asked is None and have != torch.float32 and best_dtype() == torch.float32:
        warnings.warn(
            f"the model is in {have}, which this machine multiplies many times slower than fp32: load it with "
            "dtype=zoo.dtype()",
            stacklevel=3,
        )
    notes = recipes(config)
    train, held, ood = read_sets(config, notes)
    objective = build_objective(objective).fit(train)
    objective.check(model)
    activate(model, name)
    refuse_fresh_head(model, objective, name)
    job = Job(config, model, tokenizer, objective, name, Encoding(), train, held, ood, notes=notes, fresh=False)
    return settle(replace(job, processor=processor))


def unsaved(model: nn.Module, objective: Any, name: str) -> list[str] | None:
    """What a later load would draw anew: parameters that neither the checkpoint brought nor the adapter trains, where
    there is a task head; None: nobody can tell."""
    if not objective.task_head:
        return []
    heads, lost = head_modules(model), fresh(model)
    trained = {id(p) for layer, delta in each(model, name) for p in delta.trained(layer).values()}
    if lost is not None:
        return [n for n in lost if id(model.get_parameter(n)) not in trained]
    own = [p for n, p in model.named_parameters() if n.split(".")[0] in heads and SLOT not in n]
    return [] if all(id(p) in trained for p in own) else None


def refuse_fresh_head(model: nn.Module, objective: Any, name: str) -> None:
    """ValueError for a random head (or pooler before it) that is neither trained nor saved: it would be lost."""
    lost = unsaved(model, objective, name)
    if not lost:
        return
    heads = head_modules(model)
    own = ", ".join(f"{type(m).__name__}(...)" for m in known(model, name).methods[name])
    beside = (
        f"Attach Head beside the method: detach(model, {name!r}); attach(model, [{own}, Head()], name={name!r}). Or, "
        "to keep it as it is now, "
    )
    raise ValueError(
        f"the task head is new: the checkpoint did not bring {', '.join(lost)}, and adapter {name!r} neither trains "
        f"nor saves {'it' if len(lost) == 1 else 'them'}, so that the result would be lost. "
        f"{beside if all(n.split('.')[0] in heads for n in lost) else ''}make it a part of the base: "
        f"detach(model, {name!r}); model.save_pretrained(DIR); load the model from DIR and attach again"
    )


def last_turn(encoding: Encoding) -> Encoding:
    """The encoding whose first supervised token begins the last answer: what generation is prompted with."""
    return replace(encoding, train_on="last", truncate="left")
