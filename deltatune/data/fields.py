"""Checks of single values: text, labels, messages. Each fault has OpenAI's class name where OpenAI has one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .example import Label, Turn
from .problems import BadRow, nearest, short

MAX_CHARS = 4_000_000  # about a million tokens; only plain text, which is cut into windows, may be longer
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SAID_BY = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "function_call", "developer": "developer",
}  # fmt: skip
MESSAGE_KEYS = (
    "role", "content", "name", "function_call", "tool_calls", "tool_call_id", "weight", "loss", "reasoning_content",
    "reasoning", "thinking", "refusal",
)  # fmt: skip
KEPT_KEYS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
KINDS = {dict: "an object", list: "an array", tuple: "an array", bool: "a boolean", int: "a number", float: "a number"}


def what(value: Any) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")


class Faults(list[BadRow]):
    """The faults of one row at one place; checks add to it and go on, so that a row tells all at once. `remarks`: what
    does not make it unusable."""

    def __init__(self, where: str):
        super().__init__()
        self.where = where
        self.remarks: list[BadRow] = []

    def add(self, kind: str, field: str, reason: str, fix: str) -> None:
        self.append(BadRow(kind, self.where, field, reason, fix))

    def remark(self, kind: str, field: str, reason: str, fix: str) -> None:
        self.remarks.append(BadRow(kind, self.where, field, reason, fix))


def text(value: Any, field: str, faults: Faults, empty: bool = False, limit: int = MAX_CHARS) -> str:
    """A string that can be trained on, or faults and ''."""
    if value is None:
        faults.add("null_field", field, "the value is null", "Write a text, or leave the row out")
    elif not isinstance(value, str):
        fix = "Write it as a string: json.dumps(value) for objects, str(value) for numbers"
        faults.add("data_type", field, f"the value is {what(value)}, not a string: {short(value)}", fix)
    elif not value.strip() and not empty:
        faults.add("empty_field", field, "the text is empty", "Write a text, or leave the row out")
    elif len(value) > limit:
        reason = f"the text has {len(value):,} characters, more than {limit:,}"
        faults.add("too_long", field, reason, "Split it, or train on it as plain text (which is cut into windows)")
    elif "\0" in value:
        faults.add("nul_character", field, "the text holds a NUL character", "Remove it: text.replace('\\0', '')")
    elif surrogate := _surrogate(value):
        fix = 'Write pairs or the character itself: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
        faults.add("lone_surrogate", field, f"the text holds half a character ({surrogate})", fix)
    else:
        return value
    return ""


def _surrogate(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(value[error.start]):04x}"
    return ""


def label(value: Any, faults: Faults, field: str = "label") -> Label:
    """A class name or number, a score, or several of them."""
    if value is None or (isinstance(value, str) and not value.strip()):
        faults.add("missing_label", field, "the label is empty", "Fill it in, or leave the row out")
    elif _is_nan(value):
        faults.add("nan_label", field, f"the label is not a number: {value}", "Fill it in, or leave the row out")
    elif isinstance(value, bool):
        return int(value)
    elif isinstance(value, list | tuple):
        if not value:
            return ()
        return tuple(label(item, faults, field) for item in value)
    elif isinstance(value, str):
        return text(value, field, faults).strip()
    elif isinstance(value, int | float):
        return value
    else:
        reason = f"the label is {what(value)}: {short(value)}"
        faults.add("data_type", field, reason, "Write a name, a number, or a list of them")
    return None


def _is_nan(value: Any) -> bool:
    number = value if isinstance(value, float) else 0.0
    return not math.isfinite(number) or (isinstance(value, str) and value.strip().lower() in ("nan", "+nan", "-nan"))


def messages(value: Any, field: str, faults: Faults) -> tuple[Turn, ...]:
    """OpenAI / Hugging Face messages. Source of the classes: OpenAI cookbook, chat fine-tuning data preparation."""
    items = unpacked(value)
    if value is None or items in ([], ""):
        faults.add("missing_messages_list", field, "there are no messages", 'Write [{"role": ..., "content": ...}]')
        return ()
    if not isinstance(items, list | tuple):
        reason = f"the messages are {what(items)}: {short(items)}"
        faults.add("data_type", field, reason, "Write a list of objects")
        return ()
    turns = [message(item, f"{field}[{i}]", faults) for i, item in enumerate(items)]
    return tuple(turn for turn in turns if turn)


def unpacked(value: Any) -> Any:
    """A list that a csv cell or a parquet column holds as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def message(item: Any, field: str, faults: Faults) -> Turn | None:
    if not isinstance(item, Mapping):
        fix = 'Write {"role": "user", "content": "..."}'
        faults.add("data_type", field, f"the message is {what(item)}: {short(item)}", fix)
        return None
    # columnar files give every message every key, null where it was not set
    given = {key: value for key, value in item.items() if value is not None}
    for key in given:
        if key not in MESSAGE_KEYS:
            fix = f"Keys: {', '.join(MESSAGE_KEYS)}.{nearest(key, MESSAGE_KEYS)}"
            faults.add("message_unrecognized_key", f"{field}.{key}", "the key is not known", fix)
    role = _role(given, field, faults)
    calls = tool_calls(given, field, faults)
    content = _content(given, field, faults, needed=not calls)
    extra = {key: given[key] for key in KEPT_KEYS if key in given} | ({"tool_calls": calls} if calls else {})
    return Turn(role, content, _learn(given, field, faults), extra or None)


def _role(given: Mapping, field: str, faults: Faults) -> str:
    if "role" not in given:
        faults.add("message_missing_key", f"{field}.role", "the message has no role", f"Roles: {', '.join(ROLES)}")
        return "user"
    role = given["role"]
    if role not in ROLES:
        fix = f"Roles: {', '.join(ROLES)}.{nearest(SAID_BY.get(str(role).lower(), role), ROLES)}"
        faults.add("unrecognized_role", f"{field}.role", f"unknown role {short(role)}", fix)
        return "user"
    return str(role)


def _content(given: Mapping, field: str, faults: Faults, needed: bool) -> str:
    value = given.get("content")
    if isinstance(value, list):
        value = _parts(value, f"{field}.content", faults)
    if value is None:
        if needed:
            fix = "Write the text, or leave the conversation out"
            faults.add("missing_content", f"{field}.content", "the message has no content", fix)
        return ""
    return text(value, f"{field}.content", faults, empty=not needed)


def _parts(parts: list, field: str, faults: Faults) -> str | None:
    """[{"type": "text", "text": ...}] -> the texts joined."""
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else what(part)
            reason = f"part {i} is not text ({short(kind)})"
            faults.add("data_type", field, reason, "Only text parts can be trained on: leave others out")
    return "".join(texts) if texts else None


def _learn(given: Mapping, field: str, faults: Faults) -> bool | None:
    """OpenAI's `weight` (0 or 1), ms-swift's `loss` (true or false)."""
    for key in ("weight", "loss"):
        if key in given:
            if given[key] not in (0, 1):
                reason = f"{short(given[key])} is not 0 or 1"
                faults.add("data_type", f"{field}.{key}", reason, "1 learns from the message, 0 does not")
                return None
            return bool(given[key])
    return None


def tool_calls(given: Mapping, field: str, faults: Faults) -> list[dict]:
    """OpenAI tool calls with their arguments as objects (what templates take)."""
    calls = unpacked(given.get("tool_calls"))
    if calls is None and "function_call" in given:
        calls = [{"type": "function", "function": unpacked(given["function_call"])}]
    if calls is None:
        return []
    if not isinstance(calls, list):
        faults.add("tool_calls", f"{field}.tool_calls", f"it is {what(calls)}: {short(calls)}", "Write a list of calls")
        return []
    return [call for i, item in enumerate(calls) if (call := _call(item, f"{field}.tool_calls[{i}]", faults))]


def _call(item: Any, field: str, faults: Faults) -> dict | None:
    fix = 'Write {"type": "function", "function": {"name": "...", "arguments": {...}}}'
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        faults.add("tool_calls", field, f"the call names no function: {short(item)}", fix)
        return None
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            faults.add("tool_calls", f"{field}.arguments", f"not JSON: {error}", fix)
            return None
    if not isinstance(arguments, Mapping):
        faults.add("tool_calls", f"{field}.arguments", f"they are {what(arguments)}, not an object", fix)
        return None
    named = {"name": function["name"], "arguments": dict(arguments)}
    return {"type": "function", "function": named} | ({"id": item["id"]} if item.get("id") else {})


def conversation(value: Any, field: str, faults: Faults) -> tuple[Turn, ...]:
    """ShareGPT: [{"from": "human", "value": ...}] or [{"human": ..., "assistant": ...}]."""
    items = unpacked(value)
    if not isinstance(items, list | tuple) or not items:
        reason = "there are no turns" if not items else f"it is {what(items)}: {short(items)}"
        kind = "missing_messages_list" if not items else "data_type"
        faults.add(kind, field, reason, 'Write [{"from": "human", "value": "..."}]')
        return ()
    if isinstance(items[0], Mapping) and "role" in items[0]:
        return messages(items, field, faults)
    return tuple(turn for i, item in enumerate(items) for turn in _said(item, f"{field}[{i}]", faults))


def _said(item: Any, field: str, faults: Faults) -> list[Turn]:
    if not isinstance(item, Mapping):
        fix = 'Write {"from": "human", "value": "..."}'
        faults.add("data_type", field, f"the turn is {what(item)}: {short(item)}", fix)
        return []
    if "human" in item or "user" in item:
        pair = [("user", "human" if "human" in item else "user"), ("assistant", "assistant")]
        return [Turn(role, text(item.get(key), f"{field}.{key}", faults)) for role, key in pair]
    for key in ("from", "value"):
        if item.get(key) is None:
            kind = "missing_content" if key == "value" else "message_missing_key"
            faults.add(kind, f"{field}.{key}", f"the turn has no {key!r}", 'Write {"from": "human", "value": "..."}')
            return []
    for key in item:
        if key not in ("from", "value", "weight", "loss"):
            fix = f"Keys: from, value, weight, loss.{nearest(key, ('from', 'value', 'weight', 'loss'))}"
            faults.add("message_unrecognized_key", f"{field}.{key}", "the key is not known", fix)
    return _spoken(item, field, faults)


def _spoken(item: Mapping, field: str, faults: Faults) -> list[Turn]:
    role = SAID_BY.get(str(item["from"]).lower())
    if role is None:
        names = sorted(SAID_BY)
        fix = f"Names: {', '.join(names)}.{nearest(item['from'], names)}"
        faults.add("unrecognized_role", f"{field}.from", f"unknown speaker {short(item['from'])}", fix)
        return []
    if role == "function_call":
        calls = tool_calls({"function_call": item["value"]}, field, faults)
        return [Turn("assistant", "", None, {"tool_calls": calls})] if calls else []
    return [Turn(role, text(item["value"], f"{field}.value", faults), _learn(item, field, faults))]
