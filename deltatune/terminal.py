"""Text of models and data sets for a terminal: what could steer the terminal becomes visible instead."""

from __future__ import annotations

import re

# C0 but tab and line feed, DEL, C1 (0x9b opens an escape sequence by itself), direction overrides, lone surrogates.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(found: re.Match[str]) -> str:
    """A control character as its picture (ESC is ␛), anything else as the replacement character."""
    code = ord(found.group())
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


def plain(text: str) -> str:
    """The same text without anything a terminal would obey."""
    return STEERING.sub(shown, text)
