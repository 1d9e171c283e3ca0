"""What a run knows of its soft prompts: their tasks, and whether template, method and objective agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.attach import known
from ..prompting.template import Template

if TYPE_CHECKING:
    from .job import Job


def with_tasks(methods: Sequence[Any], names: tuple[str, ...], notes: list[str]) -> tuple[Any, ...]:
    """The methods, where the training sets are named: soft prompts that leave their tasks open get one for each."""
    found = []
    for method in methods:
        if names and getattr(method, "tasks", None) == ():
            method = replace(method, tasks=names)
            notes.append(f"{method.method_name}: vectors of its own for each task ({', '.join(names)})")
        found.append(method)
    return tuple(found)


def check_prompts(job: Job) -> None:
    """ValueError where template and method disagree on the virtual tokens."""
    template, have = getattr(job.objective, "template", None), len(job.encoding.prompt_ids)
    if template:
        placed = any(m.method_name == "ptuning" for m in known(job.model, job.adapter).methods[job.adapter])
        Template(template, gap=job.objective.name != "sft").demand(have, placed)
