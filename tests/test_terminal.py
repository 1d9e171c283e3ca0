"""Text from models and data cannot steer a terminal."""

import pytest

from deltatune.terminal import plain

CASES = [
    ("a\tb\n", "a\tb\n"),
    ("\x1b[2J", "␛[2J"),
    ("\x1b]8;;http://x\x1b\\", "␛]8;;http://x␛\\"),
    ("\x9b31m", "\ufffd31m"),
    ("safe\roverwritten", "safe␍overwritten"),
    ("\x07\x08\x7f", "␇␈␡"),
    ("a\u202eb\u2066c\u200f", "a\ufffdb\ufffdc\ufffd"),
    ("\ud800", "\ufffd"),
    ("äöü 漢字 🙂 [red]", "äöü 漢字 🙂 [red]"),
]


@pytest.mark.parametrize(("text", "shown"), CASES)
def test_steering_becomes_visible(text, shown):
    assert plain(text) == shown
    assert plain(text).encode()
