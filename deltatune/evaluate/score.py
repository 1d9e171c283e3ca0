"""Score: loss, predictions and metrics of a model on one set of rows, and the untuned model with its best prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..core.attach import each, rows_of, takes_packed
from ..data.batch import Batching, plan
from ..data.encode import Encoded
from ..data.example import Example
from .cache import Front, front, room
from .generate import Decoding, answers, fits, measuring
from .hear import opening
from .incontext import Prompt, Search, best_untuned
from .intervals import difference, interval, plain
from .metrics import answer, find, for_task, perplexity

if TYPE_CHECKING:
    from ..train.job import Job

BATCH_TOKENS = 4096
FROM_LOSS = ("loss", "nll", "perplexity")


@dataclass(frozen=True)
class Scored:
    """One set, measured. `predictions` and `references` are empty where only the loss has a meaning."""

    loss: float
    metrics: dict[str, float]
    predictions: list[Any]
    references: list[Any]
    tokens_per_s: float = 0.0
    tasks: Sequence[str | None] = ()  # of the predictions' rows; () where no row names one

    @property
    def by_task(self) -> dict[str, dict[str, float | None]]:
        """{task: {"rows", every metric of predictions}}, rows without a task together as 'no task'; {} without any."""
        places: dict[str, list[int]] = {}
        for i, task in enumerate(self.tasks):
            places.setdefault(task or "no task", []).append(i)
        names = [name for name in self.metrics if name not in FROM_LOSS]
        return {task: {"rows": len(at)} | {n: plain(self.of(n, at)) for n in names} for task, at in places.items()}

    def of(self, name: str, at: Sequence[int]) -> float:
        """One metric over the rows `at`."""
        return find(name).compute([self.predictions[i] for i in at], [self.references[i] for i in at])

    @property
    def numbers(self) -> dict[str, float | None]:
        return {name: plain(value) for name, value in ({"loss": self.loss} | self.metrics).items()}


def score(job: Job, examples: Sequence[Example], names: Sequence[str] = (), predicts: bool = True) -> Scored:
    """Loss over every target of `examples`, and the metrics `names` (by default what suits the rows).

    Perplexity comes from the loss, everything else from predictions; `predicts=False` makes none.
    """
    with measuring(job.model):
        loss = mean_loss(job, [row for rows in job.measured(examples) for row in rows])
        names = tuple(names) or metrics_for(job, examples)
        by_loss = {"perplexity": perplexity(loss, 1)} if job.objective.name == "sft" else {}
        by_loss = by_loss if "perplexity" in names or not predicts else {}
        names = tuple(name for name in names if name not in FROM_LOSS)
        scored, references = answered(job, examples) if predicts and names else ([], [])
        if not scored:
            return Scored(loss, by_loss, [], [])
        predictions, speed = predict(job, scored)
    found = {name: find(name).compute(predictions, references) for name in names}
    return Scored(loss, found | by_loss, predictions, references, speed, tasks_of(scored))


def tasks_of(examples: Sequence[Example]) -> tuple[str | None, ...]:
    """The task of each row; () where none is named."""
    found = tuple(e.task for e in examples)
    return found if any(found) else ()


def answered(job: Job, examples: Sequence[Example]) -> tuple[list[Example], list[Any]]:
    """The rows that say what is right, and what they say."""
    found = [(e, job.objective.reference(e)) for e in examples]
    return [e for e, said in found if said is not None], [said for _, said in found if said is not None]


def measurable(job: Job, examples: Sequence[Example]) -> None:
    """ValueError, before anything is trained, for rows that could not be measured after: too long, unsuited metrics."""
    names = [n for n in metrics_for(job, examples) if n not in FROM_LOSS]
    scored, references = answered(job, examples) if names else ([], [])
    if scored and job.objective.name == "sft" and getattr(job.model, "can_generate", lambda: False)():
        for prompt in prompts_of(job, scored):
            try:
                ids = opening(job.model, job.tokenizer) if prompt.read else prompt.ids
                fits([ids], job.model, job.config.eval.max_new_tokens)
            except ValueError as error:
                raise ValueError(f"{prompt.where}: {error} (eval.max_new_tokens)") from None
    perfect = [getattr(job.objective, "perfect", lambda r: r)(r) for r in references]
    for name in names if scored else ():
        try:
            with warnings.catch_warnings(action="ignore"):
                find(name).compute(perfect, references)
        except (ValueError, TypeError) as error:
            suited = ", ".join(for_task(job.objective, scored))
            raise ValueError(f"eval.metrics: {name} cannot be measured on these rows ({error}); {suited} can") from None


def metrics_for(job: Job, examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(job.config.eval.metrics) or for_task(job.objective, examples)


@torch.no_grad()
def mean_loss(job: Job, rows: Sequence[Encoded]) -> float:
    """Mean over all targets, the same whatever the batches."""
    total, targets = 0.0, 0
    recount(job)
    for batch in batches(job, rows):
        total += float(job.objective.loss(job.model, batch)[0])
        targets += batch.targets
    return total / max(targets, 1)


def batches(job: Job, rows: Sequence[Encoded]) -> Any:
    """Batches of like length, longest rows too: packed inside a run that packs, else padded."""
    lengths = [row.length for row in rows]
    room = max(BATCH_TOKENS, max(lengths, default=1))
    packs = takes_packed(job.model)
    for group in plan(lengths, Batching(tokens=room, packing=packs, group=not packs)):
        yield job.batch([rows[i] for i in group], packs)


def predict(job: Job, examples: Sequence[Example]) -> tuple[list[Any], float]:
    """(one prediction per example in order, generated tokens per second)."""
    recount(job)
    if job.objective.name != "sft":
        return [job.objective.joined(*own) for own in zip(parts(job, examples), examples, strict=True)], 0.0
    # the rows hold their virtual ids already
    found = answers(job.model, job.tokenizer, prompts_of(job, examples), Decoding(job.config.eval.max_new_tokens))
    return [text.strip() for text in found.texts], found.tokens_per_second


def recount(job: Job) -> None:
    """A pass over rows begins: what the deltas count for the report is of these rows, each once."""
    for _, delta in each(job.model, job.adapter):
        delta.recount()


def prompts_of(job: Job, examples: Sequence[Example]) -> list[Encoded]:
    """Rows as they are trained, cut before the last answer: training and inference render alike."""
    from ..train.job import last_turn

    return [row for rows in job.measured(examples, last_turn(job.encoding)) for row in rows[-1:]]


def parts(job: Job, examples: Sequence[Example], rows_at_once: int | None = None) -> list[list[Any]]:
    """What the model says of each example, in order: of its row, or of all its windows. rows_at_once: rows of a batch;
    None: as many as BATCH_TOKENS allows."""
    own = job.measured(examples)
    rows = [row for windows in own for row in windows]
    owner = [i for i, windows in enumerate(own) for _ in windows]
    found: list[Any] = [None] * len(rows)
    begun = begins(job, rows)
    lengths = [r.length - (begun.length if begun else 0) for r in rows]
    for group in plan(lengths, sizes(job, rows, begun, rows_at_once)):
        batch = replace(job.batch([rows[i] for i in group], False), front=begun)
        with rows_of(job.model, [owner[i] for i in group], len(own)):  # longest first: no longer in their order
            each = job.objective.parts(job.model, batch)
        for i, said in zip(group, each, strict=True):
            found[i] = said
    said = iter(found)
    return [[next(said) for _ in windows] for windows in own]


def begins(job: Job, rows: Sequence[Encoded]) -> Front | None:
    """What all rows begin with, computed once, where what is asked of them stands behind it."""
    if not getattr(job.objective, "continues", False) or job.prompts > 1:
        return None
    return front(job.model, [row.ids for row in rows])


def sizes(job: Job, rows: Sequence[Encoded], begun: Front | None, rows_at_once: int | None) -> Batching:
    """How rows are put together: by BATCH_TOKENS, or `rows_at_once`; behind a front as many as its copies fit too."""
    most = max((row.length for row in rows), default=0)
    if begun is None:
        by_tokens = Batching(tokens=max(BATCH_TOKENS, most), group=True)
        return by_tokens if rows_at_once is None else Batching(rows=rows_at_once, group=True)
    copies = max(1, *(len(row.choices) for row in rows))
    longest = most + max((len(ids) for row in rows for ids in row.choices), default=0)
    fit = min(room(job.model) // longest, BATCH_TOKENS // (longest - begun.length)) // copies
    return Batching(rows=max(1, min(fit, rows_at_once or fit)), group=True)


# ---- the untuned model -----------------------------------------------------------------------------------------------
def untuned(job: Job, examples: Sequence[Example], held_out: int = 12) -> tuple[Scored, dict[str, Any]]:
    """The base with its best prompt, not its worst: its score on `examples`, and what every prompt got.

    The prompt is chosen on held-out TRAINING rows; the evaluation rows choose nothing.
    """
    prompts, names = baselines(job), metrics_for(job, examples)
    lacking = [e.where for e in examples if not answer(e)] if len(prompts) > 1 else []
    if lacking:
        why = f"{len(lacking)} evaluation rows have no answer ({lacking[0]})"
        job.notes.append(f"the untuned model is asked with the rows as they are, without eval.shots: {why}")
        return score(job, examples), {"without_shots": why}
    if len(prompts) < 2 or job.objective.name != "sft":
        return score(job, examples), {}
    own = score(job, examples, predicts=False)
    search = Search(names[0], names[1:], held_out, job.config.train.seed, Decoding(job.config.eval.max_new_tokens))
    found = best_untuned(job.model, job.tokenizer, job.train, examples, prompts, search)
    said, wanted = found.pop("predictions"), found.pop("references")
    return replace(said_as_text(own, names, said, wanted), tasks=tasks_of(examples)), found


def said_as_text(own: Scored, names: Sequence[str], said: list[Any], wanted: list[Any]) -> Scored:
    """Answers to a prompt as text against the wanted ones; loss and perplexity are the rows' `own`."""
    numbers = {name: find(name).compute(said, wanted) for name in names if name not in FROM_LOSS}
    return Scored(own.loss, numbers | own.metrics if "perplexity" in names else numbers, said, wanted)


def baselines(job: Job) -> Sequence[Prompt]:
    """The prompts to try on the untuned model: the caller's, or the row as it is, with and without demonstrations."""
    shots = (0, job.config.eval.shots) if job.config.eval.shots else (0,)
    return job.baselines or [Prompt(f"as asked, {n}-shot", shots=n) for n in shots]


# ---- intervals -------------------------------------------------------------------------------------------------------
def intervals(scored: Scored) -> dict[str, list[float | None]]:
    """95 % intervals over rows, by metric."""
    if not scored.predictions:
        return {}
    names = [name for name in scored.metrics if name not in FROM_LOSS]
    return {name: interval(find(name), scored.predictions, scored.references).bounds for name in names}


def gain(before: Scored, after: Scored) -> dict[str, list[float | None]]:
    """[difference, low, high] of every metric, rows paired."""
    if not before.predictions or len(before.predictions) != len(after.predictions):
        return {}
    found = {}
    for name in (name for name in after.metrics if name not in FROM_LOSS):
        d = difference(find(name), before.predictions, after.predictions, after.references)
        found[name] = [plain(d.value), *d.bounds]
    return found
