"""Sets: the rows that a configuration names, for training, evaluation and out of domain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ..blocks import wanted
from ..config import Config
from ..data import formats
from ..data.check import remarks
from ..data.example import Example
from ..data.problems import Problems, nearest
from ..data.sources import files, task_of
from ..data.stream import Order, stream
from ..data.wanted import Intake

SAMPLE = 64  # training rows that a run without evaluation rows is measured on
PEEK = 256  # rows of a stream that the checks see


def read_sets(config: Config, notes: list[str]) -> tuple[list[Example], list[Example], dict[str, list[Example]]]:
    """(train, eval, ood) rows; one ValueError with every row that cannot be used."""
    train = peeked(config, notes) if config.data.streaming else read(config.data.train, config, notes)
    if not train:
        raise ValueError(f"{', '.join(config.data.train)}: no rows to train on")
    demand_columns(config, train)
    held = measured("eval", read(config.data.eval, config, notes), config, notes)
    if config.data.eval and not held:
        raise ValueError(f"{', '.join(config.data.eval)}: no rows to measure on")
    if not held:
        notes.append(f"no evaluation rows: before and after are the loss on at most {SAMPLE} of the TRAINING rows")
    notes += remarks(train, held, config.goal[0])
    ood = {name: read(refs, config, notes) for name, refs in config.data.ood.items()}
    return train, held, {name: measured(f"ood {name}", rows, config, notes) for name, rows in ood.items()}


def demand_columns(config: Config, train: Sequence[Example]) -> None:
    """ValueError for a column that `data.columns` renames and no training row has."""
    names = intake(config).names
    have = list(dict.fromkeys(str(name) for row in train for name in row.row)) if names else []
    for name, new in names.items():
        if name not in have:
            raise ValueError(
                f"data.columns: {{{name}: {new}}}: no training row has the column {name!r}; there are "
                f"{', '.join(have)}.{nearest(name, have)}"
            )


def peeked(config: Config, notes: list[str]) -> list[Example]:
    """The first rows of a stream: what the checks before step 1 look at."""
    problems = Problems()
    rows = stream(streamed(config.data.train), problems, Order(shuffle=False), how=intake(config))
    found = [sample.example for sample in islice(rows, PEEK)]
    problems.refuse()
    notes.append(f"training rows are streamed: the checks before step 1 saw the first {len(found)}")
    return found


def streamed(refs: Sequence[str]) -> tuple[str, ...]:
    """The local files behind the references."""
    problems = Problems()
    return tuple(str(path) for ref in refs for path in files(ref, problems))


def measured(name: str, rows: list[Example], config: Config, notes: list[str]) -> list[Example]:
    """The rows that `eval.rows` allows, evenly spaced, and a note where that leaves some out."""
    most = config.eval.rows or len(rows)
    if len(rows) <= most:
        return rows
    notes.append(f"{name}: {most} of {len(rows)} rows are measured (eval.rows)")
    return [rows[i * len(rows) // most] for i in range(most)]


def intake(config: Config, asks: bool = False, run: Sequence[str] = ()) -> Intake:
    """How a configuration's rows are read, by what its objective reads of them. asks, run: as in Intake."""
    return Intake(config.data.format, config.data.columns, wanted(config.objective), asks, tuple(run))


def read(
    refs: Sequence[str], config: Config, notes: list[str], asks: bool = False, run: Sequence[str] = ()
) -> list[Example]:
    """The rows of references; ValueError with every one that cannot be used. asks, run: as in Intake."""
    found, how = list[Example](), intake(config, asks, run)
    for task, ref in map(task_of, refs):
        rows, problems = formats.load(ref, how)
        notes += [*problems.notes, *map(str, problems.warnings)]
        found += [row.in_task(task) for row in rows]
    return found


def tasks(config: Config) -> tuple[str, ...]:
    """The names of the training sets, in their order."""
    return tuple(dict.fromkeys(task for task, _ in map(task_of, config.data.train) if task))
