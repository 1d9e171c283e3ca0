"""Asking: how a question reaches the active adapters, in the template and with the soft prompts of their training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..core.attach import known, running
from ..core.manifest import record_in
from ..core.state import STATE, State
from ..core.store import prompt_sets, prompt_tasks
from ..data.batch import side_by_side
from ..data.encode import Encoded, Encoding
from ..data.example import Example
from ..prompting.template import Filler, Template


@dataclass(frozen=True)
class Asking:
    """encoding: prompts and tasks, as in training; template: what a question is put into; chosen: one prompt."""

    encoding: Encoding
    template: Template | None = None
    chosen: int | None = None
    task: str | None = None

    @property
    def count(self) -> int:
        """How many rows one question becomes."""
        return self.encoding.several if self.chosen is None else 1

    @property
    def together(self) -> bool:
        """Whether the rows of a question choose each token together."""
        return self.count > 1 and self.encoding.combine == "average"

    def rows(
        self, tokenizer: Any, prompt: Any, ids_of: Callable[[Any], list[int]], seq2seq: bool = False
    ) -> list[list[int]]:
        """Token ids of one question, once for every prompt. `ids_of` reads what no template asks for."""
        template = self.template
        example = None if template is None else example_of(prompt)
        ids = [] if example is not None else ids_of(prompt)
        virtual = {i for own in self.encoding.prompt_sets for i in own}
        if not virtual.intersection(ids):  # an encoded row has them already, wherever its template put them
            named = getattr(prompt, "task", None) or self.task
            front = self.encoding.of(named, getattr(prompt, "where", "") or "prompt").prompt_ids
            filler = Filler(tokenizer, False, None, front, closed=seq2seq)
            ids = [*front, *ids] if example is None or template is None else list(filler(template, example).ids)
        found = side_by_side([Encoded(tuple(ids), None)], self.encoding.prompt_sets, self.encoding.several)
        return [list(row.ids) for row in (found if self.chosen is None else [found[self.chosen]])]


def example_of(prompt: Any) -> Example | None:
    """What a template is filled with: a text, a row (its columns too), or a chat's last question. None: token ids."""
    if isinstance(prompt, str):
        return Example("prompt", prompt=prompt, text=prompt)
    if isinstance(prompt, Mapping) and "input_ids" not in prompt:  # a row of columns
        return Example("prompt", row=prompt)
    turns = getattr(prompt, "turns", None)
    if turns is not None and not turns:
        return prompt
    turns = list(prompt) if turns is None and not hasattr(prompt, "ids") else list(turns or ())
    if not turns or isinstance(turns[0], int):
        return None
    said = [t if isinstance(t, Mapping) else t.message() for t in turns]
    asked = next((t["content"] for t in reversed(said) if t["role"] == "user"), None)
    if asked is None:
        raise ValueError("a chat without a user's turn cannot be answered")
    where, row = getattr(prompt, "where", "prompt"), getattr(prompt, "row", {})
    return replace(example_of(asked), where=where, row=row)  # type: ignore[type-var]


def prompted(model: nn.Module, *names: str) -> dict[str, Any]:
    """What an Encoding says of the soft prompts of the adapters `names`, together; {} without any.

    ValueError where they cannot be asked together: unlike numbers of prompts, or unlike tasks.
    """
    names = tuple(filter(None, names))
    sets = [own for name in names if (own := prompt_sets(model, name))]
    tasks = {named for name in names if (named := prompt_tasks(model, name))}
    if len(tasks) > 1 or len({len(s) for s in sets} - {1}) > 1:
        raise ValueError(
            f"{', '.join(names)} have prompts of unlike numbers or tasks, which cannot answer together: activate one"
        )
    if not sets:
        return {}
    several = tuple(tuple(i for s in sets for i in s[k % len(s)]) for k in range(max(map(len, sets))))
    combine = [m.combine for name in names for m in known(model, name).methods[name] if hasattr(m, "combine")]
    return {
        "prompt_ids": several[0], "prompt_sets": several, "combine": combine[0], "tasks": next(iter(tasks), ()),
    }  # fmt: skip


def recorded(model: nn.Module) -> list[Mapping[str, Any]]:
    """What the runs of the active adapters recorded: the objective, and whether prompts were plain. Of a model that
    never had one: what lies beside it in the folder it is from, where an adapter was merged into it."""
    if getattr(model, STATE, None) is not None:
        return [known(model).records.get(name, {}) for name in running(model)]
    config: Any = getattr(model, "config", None)
    home = Path(str(getattr(config, "_name_or_path", "") or "/none"))
    return [found] if (found := record_in(home)) else []


def plain(model: nn.Module) -> bool:
    """Whether an active adapter was trained on prompts without a chat template."""
    return any(record.get("plain") for record in recorded(model))


def combining(encoding: Encoding, settings: Any) -> Encoding:
    """`encoding` with its prompts combined as `settings` asks (`combine`). ValueError for a `prompt` or a `task` that
    there is none of."""
    if settings.combine is not None:
        encoding = replace(encoding, combine=settings.combine)
    if settings.task is not None and settings.task not in encoding.tasks:
        raise ValueError(f"no task {settings.task!r}: the active prompts are for {', '.join(encoding.tasks) or 'any'}")
    if settings.prompt is not None and settings.prompt >= encoding.several:
        raise ValueError(
            f"prompt {settings.prompt}: there are {encoding.several}, counted from 0"
            + (f"; left out, they answer together ({encoding.combine})" if encoding.several > 1 else "")
        )
    return encoding


def alone(encoding: Encoding, number: int) -> Encoding:
    """`encoding` with one of several prompts, of every task."""
    sets = encoding.prompt_sets[number :: encoding.several]
    return replace(encoding, prompt_sets=sets, prompt_ids=sets[0]) if sets else encoding


def asking(model: nn.Module, settings: Any) -> Asking:
    """How the active adapters are asked. `settings`: a Decoding, which may choose a prompt, a task, how to combine.

    ValueError for a prompt or a task that there is none of, and for adapters with unlike templates.
    """
    state: State | None = getattr(model, STATE, None)
    if settings.prompt_ids is not None or (state is not None and state.rows is not None):
        ids = tuple(settings.prompt_ids or ())
        return Asking(Encoding(prompt_ids=ids, prompt_sets=(ids,) if ids else ()))
    encoding = combining(Encoding(**prompted(model, *(state.active if state else ()))), settings)
    blocks = [dict(record.get("objective") or {}).get("sft") or {} for record in recorded(model)]
    texts = {block["template"] for block in blocks if block.get("template")}
    if len(texts) > 1 and not settings.raw:
        raise ValueError(f"the active adapters were trained with unlike templates {sorted(texts)}: activate one")
    template = Template(next(iter(texts)), gap=False) if texts and not settings.raw else None
    return Asking(encoding, template, settings.prompt, settings.task)
