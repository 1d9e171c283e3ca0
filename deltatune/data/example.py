"""The house's own form of a row: turns, a pair, a text, or a labelled text; and where in which file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .media import Media

KINDS = (
    ("chosen", "preference"), ("desirable", "unpaired"), ("completions", "stepwise"), ("tags", "tagging"),
    ("answers", "answers"),
)  # fmt: skip
Label = str | int | float | tuple | None


@dataclass(frozen=True)
class Turn:
    """One message. `learn` None: supervised when the assistant says it. `extra`: tool_calls, name, reasoning."""

    role: str
    content: str
    learn: bool | None = None
    extra: Mapping[str, Any] | None = None

    @property
    def learned(self) -> bool:
        return self.role == "assistant" if self.learn is None else self.learn

    def message(self) -> dict[str, Any]:
        """What a chat template takes."""
        return {"role": self.role, "content": self.content, **(self.extra or {})}


@dataclass(frozen=True)
class Example:
    """One row. `media`: its picture or sound.

    `extra` keeps what later objectives read: chosen, rejected, desirable, completions, id; `row` the columns as they
    came, for templates that name them.
    """

    where: str
    turns: tuple[Turn, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: Label = None
    tools: tuple | None = None
    media: Media | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def kind(self) -> str:
        """preference | unpaired | stepwise | tagging | answers | classification | chat | pair | prompt | text |

        transcription | image | audio.
        """
        for key, kind in KINDS:
            if key in self.extra:
                return kind
        if self.label is not None:
            return "classification"
        if self.media is not None:
            return self.media.kind if self.completion is None else "transcription"
        if self.turns:
            return "chat" if any(turn.role == "assistant" for turn in self.turns) else "prompt"
        if self.prompt is not None:
            return "pair" if self.completion is not None else "prompt"
        return "text"

    @property
    def task(self) -> str | None:
        """The task it belongs to, where one is named."""
        return None if self.extra.get("task") is None else str(self.extra["task"])

    @property
    def learns(self) -> bool:
        """Whether a supervised objective finds a target here."""
        return any(turn.learned for turn in self.turns) if self.turns else True


def of_task(found: Iterable[Example], task: str | None) -> Iterator[Example]:
    """The rows of a set that is named as `task` (`task=FILE`); as they are where it has no name."""
    for row in found:
        yield replace(row, extra={**row.extra, "task": task}) if task else row
