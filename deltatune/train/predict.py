"""Predict: what a trained classifier, tagger, cloze, choice or question answering model says of new rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..blocks import over
from ..config import READ
from ..core import registry
from ..core.attach import attached
from ..data.example import Example
from ..data.formats import converted
from ..data.problems import BadRow, Problems, nearest
from ..data.readers import Row
from ..data.sources import renamed
from ..data.wanted import AS_IT_COMES, Intake
from ..evaluate.asking import alone, combining, recorded
from ..evaluate.generate import measuring
from ..evaluate.score import parts
from ..objectives import build, record
from .job import told
from .opening import tokenizer_of
from .sets import intake, read
from .use import configured, decided, job_of


@dataclass(frozen=True)
class Asked:
    """How rows are asked.

    batch: rows of a batch; None: as many as fit 4096 tokens. prompt, task, combine: one of several soft prompts by
    number, those of a task by its name, and how several answer together ("average", "vote"); None: as the adapter says.
    format, columns: how rows are read; None: as the adapter's run read them.
    """

    batch: int | None = None
    prompt: int | None = None
    task: str | None = None
    combine: str | None = None
    format: str | None = None
    columns: Mapping[str, str] | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt", 0)):
            if getattr(self, name) is not None:
                registry.whole(f"predict {name}", getattr(self, name), least)
        if self.combine is not None:
            registry.choice("predict combine", self.combine, ("average", "vote"))


def predict(
    model: nn.Module, objective: Any, rows: Any, *, tokenizer: Any = None, **given: Any
) -> list[dict[str, Any]]:
    """What `model`, with the adapters that are active, says of `rows`: a plain dictionary each, in their order.

    objective: as in `train`; None is the one that the adapter's run recorded, which also says what a block does not
    name and, in an objective, the class names where they are left open. rows: a file or another reference, or a list of
    rows (`{column: value}`) and texts; they need no answers, and what they say of them is not read. given: the fields
    of `Asked`.

    Every dictionary has "index" (from 0), "id" where the row has one, and: classify {"label", "scores": {class:
    probability}}, of several labels {"labels", "scores"}, of a score {"score"}; cloze {"label", "words", "scores"};
    choice {"label", "answer", "scores"}; tag {"words", "tags", "entities", "scores"}; qa {"answer", "start", "end",
    "score"}. ValueError for sft, which answers by generation; for rows that cannot be used, with every line.
    """
    names = [field.name for field in fields(Asked)]
    if unknown := next((key for key in given if key not in names), None):
        raise ValueError(
            f"predict() has no keyword {unknown!r}.{nearest(unknown, names)} There are: tokenizer, {', '.join(names)}"
        )
    return answered(model, tokenizer or tokenizer_of(model), remembered(model, objective), rows, Asked(**given))[0]


def remembered(model: nn.Module, objective: Any) -> dict[str, Any]:
    """What the run of the active adapter recorded, with the fields that `objective` sets in place of its own.

    ValueError where neither says what is asked."""
    found = dict(next(filter(None, recorded(model)), {}))
    if objective is None and not found:
        raise ValueError(f"no run of an active adapter says what is asked ({attached(model)}): give the objective")
    if objective is not None:
        found["objective"] = over(given_fields(objective), found.get("objective") or {})
    return found


def given_fields(objective: Any) -> dict[str, dict[str, Any]]:
    """An objective's block, without what it leaves open: fields that a block does not name, and in an objective the
    classes (and the like) that `fit` would read off training rows."""
    goal = build(objective)
    ((name, own),) = record(goal).items()
    if isinstance(objective, str | Mapping):
        said = {} if isinstance(objective, str) else objective[name] or {}
        return {name: {key: value for key, value in said.items() if value is not None}}
    fitted = {f.name for f in fields(goal) if f.metadata.get("fitted") and getattr(goal, f.name) == f.default}
    return {name: {key: value for key, value in own.items() if key not in fitted}}


def answered(
    model: nn.Module, tokenizer: Any, found: Mapping[str, Any], rows: Any, how: Asked
) -> tuple[list[dict[str, Any]], list[str]]:
    """(`predict`'s dictionaries, notes on how the rows were read). found: what the adapter's run recorded."""
    said = {key: value for key in READ if (value := getattr(how, key)) is not None}
    config = configured({**found, **said} if "objective" in found else {"objective": found, **said})
    goal = knowing(build(config.objective), model)
    notes: list[str] = []
    reads = intake(config, True, found.get("read", ()))
    if isinstance(rows, str | Path):
        examples = read([str(rows)], config, notes, True, reads.run)
    else:
        examples = held(rows, goal, reads, notes)
    asked = questions([example.in_task(how.task) for example in examples], goal, reads)
    if not asked:
        return [], notes
    job = job_of(model, tokenizer, goal, config, asked)
    job.encoding = combining(job.encoding, how)
    if how.prompt is not None:
        job.encoding = alone(job.encoding, how.prompt)
    told(job, "data", asked)
    with measuring(model):
        each = parts(job, asked, how.batch)
    shown = [job.objective.shown(own, example) for own, example in zip(each, asked, strict=True)]
    return [{**place(i, e), **one} for i, (e, one) in enumerate(zip(asked, shown, strict=True))], [*notes, *job.notes]


def knowing(goal: Any, model: Any) -> Any:
    """An objective that can be asked; ValueError for one that generates, or whose classes no one has said."""
    if goal.name == "sft":
        raise ValueError(
            "sft answers in words of its own: deltatune generate --adapter RUN --data FILE "
            "(in Python deltatune.evaluate.generate.generate)"
        )
    if not decided(goal) and goal.name != "choice":
        raise ValueError(
            f"{goal.name} does not know which classes there are: give the adapter of its run, "
            f"or name them (objective: {{{goal.name}: {{labels: ...}}}})"
        )
    if getattr(goal, "kind", "") == "auto":
        several = getattr(model.config, "problem_type", None) == "multi_label_classification"
        return replace(goal, kind="multi" if several else "single")
    return goal


def held(rows: Iterable[Any], goal: Any, how: Any, notes: list[str]) -> list[Example]:
    """Rows in memory as examples; 'row:3' is the third. ValueError with every row that cannot be used."""
    problems = Problems()
    given = (Row(row_of(said, goal), f"row:{i}") for i, said in enumerate(rows, 1))
    found = list(converted((renamed(row, how.names) for row in given), problems, how))
    problems.refuse()
    notes += map(str, problems.warnings)
    return found


def row_of(said: Any, goal: Any) -> dict[str, Any]:
    """A row as it is; a text as the one column that the objective reads."""
    if isinstance(said, Mapping):
        return dict(said)
    if not isinstance(said, str):
        raise ValueError(f"rows are texts or {{column: value}}, not {type(said).__name__}: {said!r:.60}")
    if goal.name == "tag":
        return {"tokens": said.split()}
    columns = ("question", "context") if goal.name == "qa" else goal.wants.columns or ("text",)
    if len(columns) > 1:
        row = ", ".join(f'"{name}": "..."' for name in columns)
        raise ValueError(f"{goal.name} reads several columns, a text alone does not say which: give {{{row}}}")
    return {columns[0]: said}


def questions(examples: Sequence[Example], goal: Any, how: Intake = AS_IT_COMES) -> list[Example]:
    """The rows as they can be asked; ValueError with every one that lacks what the objective reads."""
    problems, found = Problems(), []
    for example in examples:
        problems.accept()
        try:
            found.append(goal.asked(example))
        except BadRow as fault:
            problems.retract(how.strange(Row(dict(example.row), example.where)) or fault)
    problems.refuse()
    return found


def place(index: int, example: Example) -> dict[str, Any]:
    """Which row it is: its number from 0, and its own id where it has one."""
    own = next((example.extra[key] for key in ("id", "idx") if example.extra.get(key) is not None), None)
    return {"index": index} | ({} if own is None else {"id": own})
