"""What the frozen blocks below everything that trains make of each row: computed once, used in every epoch.

Where only the top of a model learns (a head, the last blocks), the blocks below make the same of a row every time.
Their result is computed in pieces that depend on the data alone, so that a resumed run sees the same bits; of rows
that do not fit the room, it is computed in every step as ever.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.delta import SLOT
from ..core.site import blocks, pairs, towers, trunk
from ..core.slot import Slot
from ..data.batch import Batch
from ..machine import free_disk, free_memory
from ..objectives.common import run
from .sampler import Sampler

if TYPE_CHECKING:
    from .job import Job

PIECE = 2048  # tokens computed at a time
SHARE = 4  # of the free memory at most a quarter; what does not fit goes to a file, of which the same share of the disk
DROPS = ("dropout", "attention_dropout", "dropout_prob", "activation_dropout", "drop_path", "layerdrop")
JITTERS = ("jitter_noise", "router_jitter_noise", "input_jitter_noise")  # a router of experts that draws in training


class Reached(Exception):
    """The frozen blocks are behind; their result [rows, seq, d]."""

    def __init__(self, states: Any):
        super().__init__()
        self.states = states


# ---- which blocks ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Below:
    """The lowest blocks, which make the same of a row every time; `why` there are none."""

    model: Any
    found: tuple[Any, ...] = ()
    total: int = 0
    why: str = ""
    first: Any = None  # the module that hands a row to the lowest block: what it makes is then no longer asked for

    def reached(self, batch: Batch) -> Any:
        """What they make of a batch."""
        with reaching(self.found[-1]), torch.no_grad():
            try:
                run(self.model, batch)
            except Reached as end:
                return end.states
        raise RuntimeError("the model did not run its blocks")

    @contextmanager
    def known(self, states: Any) -> Iterator[None]:
        """Inside, a forward pass takes `states` for their result."""
        ends = (self.found[-1],) if self.first is None else (self.first, self.found[-1])
        for block in self.found[:-1]:
            block.forward = passing
        for module in ends:
            module.forward = partial(given, states)
        try:
            yield
        finally:
            for module in dict.fromkeys((*ends, *self.found)):
                del module.forward


def passing(hidden_states: Any, *_: Any, **__: Any) -> Any:
    return hidden_states


def given(states: Any, *_: Any, **__: Any) -> Any:
    return states


@contextmanager
def reaching(block: nn.Module) -> Iterator[None]:
    def end(_: nn.Module, args: Any, output: Any) -> None:
        raise Reached(output)

    handle = block.register_forward_hook(end)
    try:
        yield
    finally:
        handle.remove()


def below(model: Any, sample: Batch) -> Below:
    """The frozen blocks below everything that trains, draws random numbers or has a delta. sample: a batch to try."""
    names = blocks(model)
    if pairs(model) or towers(model) or len({name.rpartition(".")[0] for name in names}) != 1:
        return Below(model, why="the model has more than one stack of blocks")
    changing = {name: what for name, module in model.named_modules() if (what := changes(module))}
    count = next((i for i, b in enumerate(names) if any(f"{n}.".startswith(f"{b}.") for n in changing)), len(names))
    if not count:
        return Below(model, total=len(names), why=next(f"{n} {w}" for n, w in changing.items() if names[0] in n))
    found = Below(model, tuple(model.get_submodule(n) for n in names[:count]), len(names))
    outside = {n: w for n, w in changing.items() if not any(f"{n}.".startswith(f"{b}.") for b in names)}
    # one that holds the blocks runs in any case, and may leave out the one that is waited for
    if (above := next((n for n in outside if not n or names[0].startswith(f"{n}.")), None)) is not None:
        return Below(model, total=len(names), why=f"{above} {outside[above]}".strip())
    called: list[str] = []
    leads = Leads()
    handles = leads.watch(model, found.found[0])
    handles += [model.get_submodule(n).register_forward_pre_hook(partial(note, called, n)) for n in outside]
    try:
        states = found.reached(sample)
    finally:
        for handle in handles:
            handle.remove()
    if called:
        return Below(model, total=len(names), why=f"{called[0]} {outside[called[0]]}")
    if not isinstance(states, Tensor):
        return Below(model, total=len(names), why="its blocks hand on more than hidden states")
    return replace(found, first=leads.found)


class Leads:
    """Which module of a trunk made exactly what its lowest block reads; None where something else did."""

    def __init__(self) -> None:
        self.found: Any = None
        self.made: list[tuple[nn.Module, Any]] = []

    def watch(self, model: Any, block: nn.Module) -> list[Any]:
        """The hooks that see it in one forward pass."""
        kept = [m for m in trunk(model).children() if not isinstance(m, nn.ModuleList)]
        return [
            *(m.register_forward_hook(lambda m, _, output: self.made.append((m, output))) for m in kept),
            block.register_forward_pre_hook(self.enters, with_kwargs=True),
        ]

    def enters(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        read = args[0] if args else kwargs.get("hidden_states")
        self.found = next((m for m, output in self.made if output is read), None)
        self.made.clear()


def note(called: list[str], name: str, *_: Any) -> None:
    called.append(name)


def changes(module: nn.Module) -> str:
    """Why what `module` itself makes of a row may change from step to step; "" where it does not."""
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        return "is trained"
    slot = module._modules.get(SLOT)
    if isinstance(slot, Slot) and any(len(slot.of(name)) for name in slot):
        return "is adapted"
    if isinstance(module, nn.Dropout) and module.p:
        return f"drops out at random ({module.p:g})"
    rates = [getattr(module, name, 0) for name in (*DROPS, *JITTERS)]
    return "drops out at random" if any(isinstance(r, float) and r > 0 for r in rates) else ""


# ---- what they made --------------------------------------------------------------------------------------------------
@dataclass
class Known:
    """Of the first rows of a training set, as many as fit, what the frozen blocks make of them."""

    below: Below
    lengths: Sequence[int]
    encode: Callable[[Sequence[int]], Batch]  # row numbers -> a batch
    rows: int  # that fit
    room: Tensor  # [their tokens, d]
    done: set[int] = field(default_factory=set)  # pieces

    def __post_init__(self) -> None:
        self.starts = [0, *accumulate(self.lengths)]
        self.pieces = cut(self.lengths[: self.rows])
        self.piece_of = {i: n for n, piece in enumerate(self.pieces) for i in piece}

    def of(self, chosen: Sequence[int], batch: Batch) -> Batch:
        """The batch of the rows `chosen`, with what is known of them."""
        if any(i >= self.rows for i in chosen):
            return batch
        for n in dict.fromkeys(self.piece_of[i] for i in chosen):
            self.compute(n)
        own = [self.room[self.starts[i] : self.starts[i] + self.lengths[i]] for i in chosen]
        states = torch.cat(own)[None] if batch.lens else nn.utils.rnn.pad_sequence(own, batch_first=True)
        return replace(batch, known=partial(self.below.known, states.to(batch.labels.device)))

    def compute(self, n: int) -> None:
        """Piece `n`, unless it is known: always the same rows in one pass, whatever the order of the steps."""
        if n in self.done:
            return
        batch = self.encode(self.pieces[n])
        states = self.below.reached(batch).detach().to(self.room.device)
        states = states[0].split(batch.lens) if batch.lens else states
        for i, own in zip(self.pieces[n], states, strict=True):
            self.room[self.starts[i] : self.starts[i] + self.lengths[i]] = own[: self.lengths[i]]
        self.done.add(n)


def cut(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers in pieces of PIECE tokens, in order."""
    found: list[list[int]] = [[]]
    held = 0
    for i, length in enumerate(lengths):
        if found[-1] and held + length > PIECE:
            found.append([])
            held = 0
        found[-1].append(i)
        held += length
    return [piece for piece in found if piece]


def reuse(job: Job) -> None:
    """Set `job.known` where a run reads rows more than once and frozen blocks stand below everything that trains, and
    say so in its notes. ValueError where it was asked for (`train.cache_activations: on`) and cannot be."""
    asked = job.config.train.cache_activations
    why = "off" if asked == "off" else unfit(job)
    if not why:
        job.model.train()
        found = below(job.model, job.batch(job.rows[:1]))
        why = found.why
    if why:
        if asked == "on":
            raise ValueError(f"train.cache_activations: on is not possible here ({why}); leave it auto")
        return
    lengths, width = [row.length for row in job.rows], int(job.model.config.get_text_config().hidden_size)
    rows, room = space(lengths, width, next(job.model.parameters()).dtype)
    job.known = Known(found, lengths, lambda chosen: job.batch([job.rows[i] for i in chosen]), rows, room)
    size = room.numel() * room.element_size() / 2**20
    place = "in a temporary file" if room.untyped_storage().filename else "in memory"
    of_rows = "all rows" if rows == len(lengths) else f"{rows} of {len(lengths)} rows"
    job.notes.append(
        f"{len(found.found)} of {found.total} blocks are frozen below everything that trains: what they make of "
        f"{of_rows} is computed once ({size:.0f} MiB, {place})"
    )


def unfit(job: Job) -> str:
    """Why a run has nothing to reuse, as far as its rows tell; "" where it may."""
    if job.config.data.streaming:
        return "its rows are streamed"
    sampler = job.sampler()
    if isinstance(sampler, Sampler) and job.steps(sampler) <= sampler.steps(1):
        return "it reads its rows once"
    if job.prompts > 1 or job.config.train.neftune:
        return "every row is read by several prompts" if job.prompts > 1 else "NEFTune draws noise anew"
    if why := getattr(job.objective, "rereads", ""):
        return why
    return "pictures and sounds are read anew" if any(row.read is not None for row in job.rows) else ""


def space(lengths: Sequence[int], width: int, dtype: torch.dtype) -> tuple[int, Tensor]:
    """(how many of the first rows fit, room for them): in memory, or in a file that goes with the process."""
    line = width * dtype.itemsize
    wanted = sum(lengths)
    if wanted * line <= free_memory() // SHARE:
        return len(lengths), torch.empty(wanted, width, dtype=dtype)
    most = free_disk() // SHARE // line
    rows = sum(total <= most for total in accumulate(lengths))
    tokens = sum(lengths[:rows])
    with tempfile.NamedTemporaryFile() as file:  # unlinked at once: the mapping keeps it until the process ends
        file.truncate(max(1, tokens * line))
        return rows, torch.from_file(file.name, shared=True, size=tokens * width, dtype=dtype).view(tokens, width)
