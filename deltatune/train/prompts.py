"""What a run knows of its soft prompts: their virtual ids, and whether template, method and objective agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.attach import known
from ..core.store import prompt_sets
from ..prompting.template import Template

if TYPE_CHECKING:
    from .job import Job


def prompted(model: nn.Module, name: str) -> dict[str, Any]:
    """What an Encoding says of adapter `name`'s soft prompts; "" has none."""
    sets = prompt_sets(model, name) if name else ()
    combine = [m.combine for m in known(model, name).methods[name] if hasattr(m, "combine")] if name else []
    return {"prompt_ids": sets[0], "prompt_sets": sets, "combine": combine[0]} if sets else {}


def check_prompts(job: Job) -> None:
    """ValueError where template and method disagree on the virtual tokens, or answers cannot be averaged."""
    template, have = getattr(job.objective, "template", None), len(job.encoding.prompt_ids)
    if template:
        placed = any(m.method_name == "ptuning" for m in known(job.model, job.adapter).methods[job.adapter])
        Template(template, gap=job.objective.name != "sft").demand(have, placed)
    if len(job.encoding.prompt_sets) > 1 and job.encoding.combine == "average" and job.objective.name == "sft":
        raise ValueError("combine: average needs scores of classes, and sft generates text: choose combine: vote")
