"""Metrics as sums over rows, `score(sum of stats(row))`, so that corpus metrics are resampled without rescoring."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .spans import span_counts, squad_exact, squad_f1, tag_hits

Stats = Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
Score = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Metric:
    """One number over aligned predictions and references.

    `stats(predictions, references)` gives [rows, k] and `score` turns their sum [k] into the number. A metric that is
    no function of such sums (Spearman: ranks depend on all rows) has `whole` instead and is recomputed when resampled.
    `proportion`: the number is a share of rows that are right or wrong, so exact intervals for proportions apply.
    """

    name: str
    higher_is_better: bool
    stats: Stats | None = None
    score: Score | None = None
    whole: Callable[[Sequence[Any], Sequence[Any]], float] | None = None
    proportion: bool = False
    by_row: bool = False

    def compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> float:
        """The number over all rows; ValueError on empty input or different lengths."""
        check(self.name, predictions, references)
        if self.whole is not None:
            return float(self.whole(predictions, references))
        return self.of(self.table(predictions, references).sum(axis=0))

    def table(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """The rows' statistics [rows, k] float64."""
        check(self.name, predictions, references)
        assert self.stats is not None, f"{self.name} has no statistics"
        return np.asarray(self.stats(predictions, references), dtype=np.float64)

    def of(self, sums: np.ndarray) -> float:
        """The number from summed statistics [k]."""
        assert self.score is not None
        return float(self.score(sums))

    def per_row(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float] | None:
        """Each row's own number where the metric is defined on one row, else None."""
        return [self.of(row) for row in self.table(predictions, references)] if self.by_row else None


def check(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """ValueError unless there is one prediction for each of at least one reference."""
    if len(predictions) != len(references):
        raise ValueError(f"{name}: {len(predictions)} predictions for {len(references)} references; give one for each")
    if not len(predictions):
        raise ValueError(f"{name}: no rows to score; is the evaluation set empty?")


def find(name: str) -> Metric:
    """The metric called `name`; `json:FIELD` is the share of rows whose JSON field equals the reference's."""
    if name.startswith("json:") and len(name) > len("json:"):
        return field_metric(name.removeprefix("json:"))
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown metric {name!r}{hint} Choices: {', '.join(sorted(METRICS))}, json:FIELD")
    return METRICS[name]


def _needs(module: str) -> Any:
    """An optional library, or a ValueError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ValueError(f"this metric needs {package}: pip install {package}") from error


def _mean(of: Callable[[Any, Any], float]) -> Stats:
    """Statistics (value, 1) of a metric that is a mean over rows."""

    def stats(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        return np.array([(float(of(p, r)), 1.0) for p, r in zip(predictions, references, strict=True)])

    return stats


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _right(name: str, of: Callable[[Any, Any], float]) -> Metric:
    """A metric that is the share of rows for which `of` holds."""
    return Metric(name, True, _mean(of), _ratio, proportion=True, by_row=True)


# Labels: per class (right, predicted, true); macro-F1 and MCC are functions of these sums alone.


def _one(label: Any) -> Any:
    """A hashable label; a one-element array becomes its element."""
    return label.item() if hasattr(label, "item") else label


def _per_class(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    said, true = [_one(p) for p in predictions], [_one(r) for r in references]
    index = {label: i for i, label in enumerate(dict.fromkeys([*true, *said]))}
    eye = np.eye(len(index))
    p, t = eye[[index[x] for x in said]], eye[[index[x] for x in true]]
    return np.concatenate([p * t, p, t], axis=1)


def _macro_f1(sums: np.ndarray) -> float:
    """Mean F1 over the classes that occur in the references: any other prediction is merely wrong, not a class."""
    right, said, true = sums.reshape(3, -1)
    seen = true > 0
    return float(np.mean(2 * right[seen] / (said + true)[seen]))


def _mcc(sums: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 where either side is constant."""
    right, said, true = sums.reshape(3, -1)
    n = true.sum()
    scale = (n * n - said @ said) * (n * n - true @ true)
    return float((right.sum() * n - said @ true) / math.sqrt(scale)) if scale > 0 else 0.0


def _set(labels: Any) -> set[Any]:
    """A row's labels; a single one may stand by itself."""
    return {labels} if isinstance(labels, str) or not isinstance(labels, Collection) else set(labels)


def _set_counts(predictions: Sequence[Collection[Any]], references: Sequence[Collection[Any]]) -> np.ndarray:
    pairs = [(_set(p), _set(r)) for p, r in zip(predictions, references, strict=True)]
    return np.array([(len(p & r), len(p), len(r)) for p, r in pairs], dtype=np.float64)


def _f1(sums: np.ndarray) -> float:
    right, said, true = sums
    return float(2 * right / (said + true)) if said + true else 1.0


# Numbers.


def _moments(predictions: Sequence[float], references: Sequence[float]) -> np.ndarray:
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()  # correlation ignores a shift, and the sums of squares lose no digits
    return np.stack([x, y, x * x, y * y, x * y, np.ones_like(x)], axis=1)


def _pearson(sums: np.ndarray) -> float:
    """Pearson's r; nan where either side is constant."""
    x, y, xx, yy, xy, n = sums
    scale = (xx - x * x / n) * (yy - y * y / n)
    return float((xy - x * y / n) / math.sqrt(scale)) if scale > 0 else math.nan


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    return _pearson(_moments(list(_ranks(predictions)), list(_ranks(references))).sum(axis=0))


def _squares(predictions: Sequence[float], references: Sequence[float]) -> np.ndarray:
    return _mean(lambda p, r: (float(p) - float(r)) ** 2)(predictions, references)


# Likelihood: predictions are the rows' summed negative log-likelihoods (nats), references their token counts.


def _likelihood(sums: Sequence[float], tokens: Sequence[float]) -> np.ndarray:
    return np.stack([np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)], axis=1)


def nll(total: float, tokens: float) -> float:
    """Mean negative log-likelihood in nats per token; ValueError without tokens."""
    if tokens <= 0:
        raise ValueError(f"nll: {tokens} supervised tokens; nothing to average over")
    return total / tokens


def perplexity(total: float, tokens: float) -> float:
    """exp of the mean negative log-likelihood; inf where that overflows."""
    mean = nll(total, tokens)
    return math.exp(mean) if mean < 700 else math.inf


# Text.


def normalise(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces (the SQuAD script, Rajpurkar et al. 2016)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _any_of(reference: Any) -> list[str]:
    """The acceptable references of one row: a string or several."""
    options = [reference] if isinstance(reference, str) else list(reference)
    if not options or not all(isinstance(o, str) for o in options):
        raise ValueError(f"a text reference must be a string or a non-empty list of strings, not {reference!r}")
    return options


def _exact(prediction: str, reference: Any) -> bool:
    return prediction.strip() in {r.strip() for r in _any_of(reference)}


def _exact_normalised(prediction: str, reference: Any) -> bool:
    return normalise(prediction) in {normalise(r) for r in _any_of(reference)}


class Words:
    """rouge-score's tokenizer for every script: its own drops all but a-z and 0-9; equal to it on ASCII text."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words; each Chinese or Japanese character is a word."""
        return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.lower())


@lru_cache(maxsize=1)
def _rouge() -> Any:
    return _needs("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=Words())


def _rouge_l(prediction: str, reference: Any) -> float:
    return max(_rouge().score(r, prediction)["rougeL"].fmeasure for r in _any_of(reference))


@lru_cache(maxsize=2)
def _sacre(kind: str) -> Any:
    return getattr(_needs("sacrebleu.metrics"), kind)()


def _sacre_metric(name: str, kind: str) -> Metric:
    """A sacrebleu corpus metric (0 to 100). The library keeps its per-segment statistics private; a test pins them."""

    def stats(predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
        rows = zip(predictions, references, strict=True)
        extract = _sacre(kind)._extract_corpus_statistics
        return np.array([extract([p], [[r] for r in _any_of(ref)])[0] for p, ref in rows], dtype=np.float64)

    def score(sums: np.ndarray) -> float:
        return _sacre(kind)._compute_score_from_stats([int(x) for x in sums]).score

    return Metric(name, True, stats, score)


def edits(said: Sequence[str], true: Sequence[str]) -> int:
    """Levenshtein's distance: the fewest words put in, left out or exchanged that turn one into the other."""
    row = list(range(len(true) + 1))
    for i, word in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(true, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def _word_errors(words: Callable[[str], list[str]]) -> Stats:
    """(errors, words of the reference) of each row; of several references the one with the lowest rate."""

    def stats(predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
        rows = []
        for said, options in zip(predictions, map(_any_of, references), strict=True):
            counts = [(edits(words(said), true), len(true)) for true in map(words, options)]
            rows.append(min(counts, key=lambda pair: pair[0] / max(pair[1], 1)))
        return np.array(rows, dtype=np.float64)

    return stats


def heard_words(text: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes within a word go too."""
    return "".join(c for c in text.lower() if c.isalnum() or c.isspace() or c == "-").replace("-", " ").split()


# JSON: a prediction is valid only as a whole; no digging for an object in prose.


def parse_json(text: Any) -> Any:
    """The JSON document `text` holds (a non-string is taken as parsed); ValueError if it is none (NaN is not JSON)."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse) if isinstance(text, str) else text


def _parsed(text: Any) -> tuple[bool, Any]:
    try:
        return True, parse_json(text)
    except (ValueError, RecursionError):
        return False, None


def _kind(value: Any) -> str:
    """JSON's own type name; int and float are both numbers, booleans are not."""
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else {type(None): "null"}.get(type(value), type(value).__name__)


def fields(value: Any, path: str = "") -> dict[str, tuple[str, Any]]:
    """Path -> (type, value) of every leaf; an empty list or object is a leaf."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, child in value.items() for k, v in fields(child, f"{path}/{key}").items()}
    if isinstance(value, list) and value:
        return {k: v for i, child in enumerate(value) for k, v in fields(child, f"{path}/{i}").items()}
    return {path: (_kind(value), value if isinstance(value, str | int | float | bool) else None)}


def _reference(text: Any) -> dict[str, tuple[str, Any]]:
    ok, value = _parsed(text)
    if not ok:
        raise ValueError(f"the reference is not JSON: {text!r}; use a text metric such as exact_match")
    return fields(value)


def _json_schema(prediction: Any, reference: Any) -> bool:
    ok, value = _parsed(prediction)
    want = {k: kind for k, (kind, _) in _reference(reference).items()}
    return ok and {k: kind for k, (kind, _) in fields(value).items()} == want


def _json_exact(prediction: Any, reference: Any) -> bool:
    ok, value = _parsed(prediction)
    return ok and fields(value) == _reference(reference)


def _json_counts(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        ok, value = _parsed(prediction)
        said, true = fields(value) if ok else {}, _reference(reference)
        rows.append((sum(said.get(k) == v for k, v in true.items()), len(said), len(true)))
    return np.array(rows, dtype=np.float64)


def field_metric(field: str) -> Metric:
    """Share of rows whose top-level JSON field equals the reference's, type included."""

    def same(prediction: Any, reference: Any) -> bool:
        ok, value = _parsed(prediction)
        true = parse_json(reference)
        if not isinstance(true, Mapping) or field not in true:
            raise ValueError(f"json:{field}: the reference has no field {field!r}: {reference!r}")
        return ok and isinstance(value, Mapping) and field in value and fields(value[field]) == fields(true[field])

    return _right(f"json:{field}", same)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _right("accuracy", lambda p, r: _one(p) == _one(r)),
        Metric("macro_f1", True, _per_class, _macro_f1),
        Metric("mcc", True, _per_class, _mcc),
        Metric("label_f1", True, _set_counts, _f1, by_row=True),
        _right("label_exact", lambda p, r: _set(p) == _set(r)),
        Metric("pearson", True, _moments, _pearson),
        Metric("spearman", True, whole=_spearman),
        Metric("mse", False, _squares, _ratio, by_row=True),
        Metric("nll", False, _likelihood, _ratio, by_row=True),
        Metric("perplexity", False, _likelihood, lambda s: perplexity(s[0], s[1]), by_row=True),
        _right("exact_match", _exact),
        _right("exact_match_normalised", _exact_normalised),
        Metric("wer", False, _word_errors(str.split), _ratio),
        Metric("wer_normalised", False, _word_errors(heard_words), _ratio),
        Metric("rouge_l", True, _mean(_rouge_l), _ratio, by_row=True),
        _sacre_metric("bleu", "BLEU"),
        _sacre_metric("chrf", "CHRF"),
        Metric("span_f1", True, span_counts, _f1, by_row=True),
        Metric("tag_accuracy", True, tag_hits, _ratio, by_row=True),
        _right("squad_exact", squad_exact),
        Metric("squad_f1", True, _mean(squad_f1), _ratio, by_row=True),
        _right("json_valid", lambda p, r: _parsed(p)[0]),
        _right("json_schema", _json_schema),
        _right("json_exact", _json_exact),
        Metric("json_f1", True, _json_counts, _f1, by_row=True),
    )
}


def for_task(objective: Any, examples: Sequence[Any]) -> tuple[str, ...]:
    """Sensible metrics for the data at hand, the main one first.

    `objective` is a name or an object with `name` and perhaps `kind`. Labelled rows decide by `kind` ("regression",
    "multi") or the label's type; rows with an answer by its form: JSON objects, short answers (up to five words),
    longer text. Plain text: perplexity.
    """
    if not examples:
        raise ValueError("no examples to choose metrics for; is the evaluation set empty?")
    name = objective if isinstance(objective, str) else getattr(objective, "name", "")
    if own := getattr(objective, "metrics", ()):
        return tuple(own)
    labels = [e.label for e in examples if e.label is not None]
    if labels and name != "sft":
        return _for_labels(labels, getattr(objective, "kind", "auto"))
    if name == "sft" and all(getattr(e, "media", None) is not None for e in examples):
        return ("wer", "wer_normalised", "exact_match") if any(map(answer, examples)) else ("perplexity",)
    answers = [a for a in map(answer, examples) if a]
    return _for_answers(answers) if answers else ("perplexity",)


def _for_labels(labels: Sequence[Any], kind: str) -> tuple[str, ...]:
    if kind == "regression" or (kind == "auto" and any(isinstance(label, float) for label in labels)):
        return ("pearson", "spearman", "mse")
    if kind == "multi" or any(isinstance(label, tuple | list | set | frozenset) for label in labels):
        return ("label_f1", "label_exact")
    return ("accuracy", "macro_f1", "mcc") if len(set(labels)) == 2 else ("accuracy", "macro_f1")


def _for_answers(answers: Sequence[str]) -> tuple[str, ...]:
    if all(ok and isinstance(value, dict) for ok, value in map(_parsed, answers)):
        return ("json_exact", "json_schema", "json_valid", "json_f1")
    if all(len(a.split()) <= 5 for a in answers):
        return ("exact_match", "exact_match_normalised", "chrf")
    return ("rouge_l", "chrf", "bleu")


def answer(example: Any) -> str | None:
    """The text a row wants: its completion, or its last assistant turn; None for plain text and bare questions."""
    if example.completion is not None:
        return example.completion
    said = [turn.content for turn in example.turns if turn.role == "assistant"]
    return said[-1] if said else None
