"""Tagged spans (the semantics of conlleval, Tjong Kim Sang & Buchholz 2000) and SQuAD answers (arXiv:1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Span = tuple[str, int, int]  # type, first word, word after the last
ARTICLES = re.compile(r"\b(a|an|the)\b")
STARTS, ENDS = frozenset("BSU"), frozenset("ESL")  # of the schemes BIO, IOBES and BILOU


def spans(tags: Sequence[str]) -> set[Span]:
    """The typed spans of one row: B- opens one, so does I- after another type or after O; E- and S- close theirs."""
    found: set[Span] = set()
    kind, start, ended = "", 0, True
    for i, tag in enumerate([*tags, "O"]):
        prefix, own = parts(tag)
        opens = prefix != "O" and (ended or prefix in STARTS or own != kind)
        if not ended and (opens or prefix == "O"):
            found.add((kind, start, i))
        if opens:
            kind, start = own, i
        ended = prefix == "O" or (ended and not opens)
        if prefix in ENDS:
            found.add((kind, start, i + 1))
            ended = True
    return found


def parts(tag: str) -> tuple[str, str]:
    """'B-PER' -> ('B', 'PER'); a tag without a prefix counts as inside its own type."""
    prefix, dash, kind = tag.partition("-")
    if tag == "O":
        return "O", ""
    return (prefix, kind) if dash and prefix in "BIESLUM" and len(prefix) == 1 else ("I", tag)


def span_counts(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[rows, 3]: spans that are right in type and both ends, predicted, true."""
    pairs = [(spans(p), spans(r)) for p, r in zip(predictions, references, strict=True)]
    return np.array([(len(p & r), len(p), len(r)) for p, r in pairs], dtype=np.float64)


def tag_hits(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[rows, 2]: words tagged right, words."""
    pairs = zip(predictions, references, strict=True)
    return np.array([(sum(a == b for a, b in zip(p, r, strict=True)), len(r)) for p, r in pairs], dtype=np.float64)


def plain_words(text: str) -> list[str]:
    """Lower-case words without punctuation and English articles, as SQuAD compares them."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def squad_exact(prediction: str, reference: Any) -> bool:
    """Whether an answer equals any accepted one; a row without answers wants the empty text."""
    return plain_words(prediction) in [plain_words(r) for r in reference or ("",)]


def squad_f1(prediction: str, reference: Any) -> float:
    """The best F1 of the answer's words against any accepted one's."""
    return max(_words_f1(plain_words(prediction), plain_words(r)) for r in reference or ("",))


def _words_f1(said: list[str], true: list[str]) -> float:
    if not said or not true:
        return float(said == true)
    return 2 * sum((Counter(said) & Counter(true)).values()) / (len(said) + len(true))
