"""SQuAD's document (arXiv:1606.05250): articles of paragraphs of questions -> one row a question."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .problems import BadRow

ASKED = re.compile(r'(?<!\\)"question"\s*:')  # inside a text, the quotes would be escaped


def is_article(value: Any) -> bool:
    """Whether an element of a document holds paragraphs of questions."""
    return isinstance(value, Mapping) and isinstance(value.get("paragraphs"), list) and "question" not in value


def questions(
    article: Mapping[str, Any], text: str, at: tuple[str, int], before: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, the line it stands on) of each question. BadRow for an article of another shape.

    `text`: the article as written, `at` its file and line. Where it is all one line, questions are counted instead,
    after the `before` ones of other articles.
    """
    found = [row for paragraph in article["paragraphs"] for row in rows(paragraph, f"{at[0]}:{at[1]}")]
    places = [at[1] + text.count("\n", 0, key.start()) for key in ASKED.finditer(text)]
    if len(set(places)) != len(found):
        places = [before + k + 1 for k in range(len(found))]
    for row, place in zip(found, places, strict=True):
        yield row | ({"title": article["title"]} if "title" in article else {}), place


def rows(paragraph: Any, where: str) -> Iterator[dict[str, Any]]:
    """Question, context and answers of one paragraph."""
    qas = paragraph.get("qas") if isinstance(paragraph, Mapping) else None
    if not isinstance(qas, list) or not all(isinstance(one, Mapping) for one in qas) or "context" not in paragraph:
        fix = 'Write {"context": ..., "qas": [{"question": ..., "answers": [...]}]}'
        raise BadRow("data_type", where, "paragraphs", "a paragraph has no context with its questions", fix)
    for one in qas:
        kept = {key: one[key] for key in ("id", "question", "answers") if key in one}
        yield {**kept, "context": paragraph["context"]}
