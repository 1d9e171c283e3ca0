"""Which characters of a rendered conversation are learned: found in the template's own output, never guessed.

Each supervised turn is [start, end): from where generation would begin (the rendered turns before it plus the
generation prompt) through its end-of-turn token. Works for any template that renders a turn's content in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from .example import Turn
from .problems import BadRow

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
MARK = "Zq7XwMarkKp9"  # letters and digits only, so that no template trims or escapes it
REASONING = ("reasoning_content", "reasoning", "thinking")
STRIPPED = "the template removes the reasoning of earlier turns; they are supervised only as samples of their own"
Span = tuple[int, int]


class Chat:
    """A tokenizer's chat template. `template`: a name of TEMPLATES, Jinja text, or None for the tokenizer's own."""

    def __init__(self, tokenizer: Any, template: str | None = None):
        self.tokenizer = tokenizer
        self.notes: dict[str, None] = {}
        # the last conversation's text and spans: an encoder asks for them several times
        self.last_text: tuple[Any, Any, str] = (None, None, "")
        self.last_spans: tuple[Any, Any, list[Span]] = (None, None, [])
        self.template = TEMPLATES.get(template, template) if template else None
        if self.template is None and not tokenizer.chat_template:
            name = "chatml" if {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_added_vocab()) else "plain"
            self.template = TEMPLATES[name]
            self.note(f"the tokenizer has no chat template; conversations are written in the {name!r} form")

    def note(self, text: str) -> None:
        self.notes[text] = None

    def render(self, turns: Sequence[Turn], tools: tuple | None = None, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the assistant would begin to write."""
        return self.tokenizer.apply_chat_template(
            [turn.message() for turn in turns],
            tools=list(tools) if tools else None,
            chat_template=self.template,
            add_generation_prompt=prompt,
            tokenize=False,
        )

    def whole(self, turns: tuple[Turn, ...], tools: tuple | None) -> str:
        """The whole conversation as text."""
        if self.last_text[0] is not turns or self.last_text[1] is not tools:
            self.last_text = turns, tools, self.render(turns, tools)
        return self.last_text[2]

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Every token that is split off whole: special tokens and added ones."""
        return tuple({*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens} - {""})

    def first_added(self, text: str) -> str:
        """The token of `added` that comes first in a text; the longest of several at one place."""
        found = [(text.find(token), -len(token), token) for token in self.added if token in text]
        return min(found)[2] if found else ""

    @cached_property
    def stop(self) -> str:
        """The end-of-turn token, as the template writes it after an assistant's turn; '' when it writes none."""
        turns = (Turn("user", "a"), Turn("assistant", MARK))
        try:
            tail = self.render(turns).rpartition(MARK)[2]
        except TemplateError:
            tail = ""
        stop = self.first_added(tail)
        if not stop:
            self.note(
                "the chat template ends an assistant's turn with no token; the last turn gets the tokenizer's eos"
            )
        return stop

    def fitted(self, turns: tuple[Turn, ...], tools: tuple | None, where: str) -> tuple[Turn, ...]:
        """The turns in a form that the template accepts: a refused system message joins the first user's."""
        try:
            self.whole(turns, tools)
        except TemplateError as error:
            if len(turns) > 1 and turns[0].role == "system" and turns[1].role == "user":
                self.note("the chat template takes no system message; it was put before the first user's text")
                joined = replace(turns[1], content=f"{turns[0].content}\n\n{turns[1].content}")
                return self.fitted((joined, *turns[2:]), tools, where)
            fix = "Change the order of the turns, or choose another template (template: chatml or plain)"
            raise BadRow("template", where, "messages", f"the chat template refuses it: {error}", fix) from None
        return turns

    def spans(self, turns: tuple[Turn, ...], tools: tuple | None, where: str) -> tuple[str, list[Span]]:
        """(the rendered text, [start, end) of every learned turn's characters, its end-of-turn token included).

        A turn whose reasoning the template removes (all but the last, in some) is left out and noted.
        Errors: BadRow when a turn cannot be found in the template's output.
        """
        whole = self.whole(turns, tools)
        if self.last_spans[0] is not turns or self.last_spans[1] is not tools:
            found = [self.span(whole, turns, k, tools, where) for k, turn in enumerate(turns) if turn.learned]
            self.last_spans = turns, tools, [span for span in found if span]
        return whole, self.last_spans[2]

    def span(self, whole: str, turns: tuple[Turn, ...], k: int, tools: tuple | None, where: str) -> Span | None:
        start = self.start(whole, turns, k, tools, where)
        content = turns[k].content.strip()
        stop_at = whole.find(self.stop, start) if self.stop else len(whole)
        at = _locate(whole, content, start, stop_at)
        if content and at >= 0 and (at <= stop_at or not self.stop):
            if not self.reasons(whole[start:at], turns[: k + 1], tools):
                return None
            return start, self._end(whole, at + len(content), turns[k + 1 :])
        # not verbatim: the template may have changed white space; anything else means that it left something out
        if self.stop and stop_at >= 0 and squeezed(content) in squeezed(whole[start:stop_at]):
            return start, stop_at + len(self.stop)
        self.note(STRIPPED)
        return None

    def reasons(self, written: str, turns: tuple[Turn, ...], tools: tuple | None) -> bool:
        """False when a turn's reasoning is missing here, although the template writes it in a last turn."""
        extra = turns[-1].extra or {}
        thought = squeezed(next((str(extra[name]) for name in REASONING if extra.get(name)), ""))
        if not thought or thought in squeezed(written):
            return True
        kept = thought in squeezed(self.render(turns, tools))
        self.note(STRIPPED if kept else "the chat template does not write the rows' reasoning; it is not learned")
        return not kept

    def _end(self, whole: str, content_end: int, later: Sequence[Turn]) -> int:
        """Behind the end-of-turn token that follows the content, unless the next turn comes first."""
        stop_at = whole.find(self.stop, content_end) if self.stop else -1
        if stop_at < 0:
            return content_end
        following = next((turn.content.strip() for turn in later if turn.content.strip()), "")
        next_at = whole.find(following, content_end) if following else -1
        if 0 <= next_at < stop_at:
            self.note("the chat template writes no end-of-turn token after some assistant turns")
            return content_end
        return stop_at + len(self.stop)

    def start(self, whole: str, turns: tuple[Turn, ...], k: int, tools: tuple | None, where: str) -> int:
        """Where turn k begins: after the prompt that generation would see, else after what precedes its content."""
        try:
            before = self.render(turns[:k], tools, prompt=True) if k else ""
        except TemplateError:
            before = ""
        if before and whole.startswith(before):
            return len(before)
        marked = (*turns[:k], replace(turns[k], content=MARK), *turns[k + 1 :])
        prefix, mark, suffix = self.render(marked, tools).partition(MARK)
        if mark and whole.startswith(prefix) and whole.endswith(suffix):
            return len(prefix)
        reason = f"turn {k} cannot be found in the chat template's output: what precedes it depends on it"
        fix = "Use a template that writes turns one after the other (template: chatml or plain)"
        raise BadRow("template", where, f"messages[{k}]", reason, fix)

    def keeps_reasoning(self, turns: tuple[Turn, ...], tools: tuple | None, where: str) -> bool:
        """Whether every learned turn is rendered whole in the full conversation."""
        return len(self.spans(turns, tools, where)[1]) == sum(turn.learned for turn in turns)


def _locate(whole: str, content: str, start: int, stop_at: int) -> int:
    """Where the content begins: its first occurrence, or a later one that ends right before the end-of-turn token."""
    first = at = whole.find(content, start)
    while content and 0 <= at < stop_at:
        if not whole[at + len(content) : stop_at].strip():
            return at
        at = whole.find(content, at + 1, stop_at)
    return first


def squeezed(text: str) -> str:
    return "".join(text.split())
