"""Metrics against scikit-learn, scipy, sacrebleu, rouge-score and tables worked out by hand."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from sacrebleu.metrics import BLEU, CHRF

from deltatune.evaluate.metrics import METRICS, fields, find, for_task, nll, normalise, perplexity

# metric, predictions, references, value
TABLE = [
    ("accuracy", ["a", "b", "b", "a"], ["a", "b", "a", "a"], 0.75),
    ("accuracy", [1, 0], [1, 1], 0.5),
    ("macro_f1", ["a", "b", "b", "a"], ["a", "b", "a", "a"], (4 / 5 + 2 / 3) / 2),
    # a prediction outside the classes costs its own row's class (F1 of a: 2/3), it is not a third class
    ("macro_f1", ["a", "junk", "b"], ["a", "a", "b"], (2 / 3 + 1) / 2),
    ("mcc", [1, 1, 0, 0], [1, 0, 0, 0], 1 / math.sqrt(3)),
    ("mcc", [1, 1, 1, 1], [1, 0, 0, 0], 0.0),
    ("label_f1", [{"x", "y"}, {"z"}], [{"x"}, {"z", "w"}], 2 * 2 / 6),
    ("label_f1", ["red", ("red", "blue")], ["red", "blue"], 4 / 5),
    ("label_exact", [("x", "y"), ("z",)], [("y", "x"), ("w",)], 0.5),
    ("mse", [1.0, 3.0], [2.0, 1.0], 2.5),
    ("nll", [2.0, 4.0], [1, 3], 1.5),
    ("perplexity", [2.0, 4.0], [1, 3], math.exp(1.5)),
    ("exact_match", [" yes\n", "Yes"], ["yes", "yes"], 0.5),
    ("exact_match", ["no"], [["yes", "no"]], 1.0),
    ("exact_match_normalised", ["The  Cat!", "dog"], ["a cat", "cat"], 0.5),
    # LCS of "the cat sat" and "the cat sat down" is 3: P 1, R 3/4
    ("rouge_l", ["the cat sat"], ["the cat sat down"], 6 / 7),
    ("rouge_l", ["the cat"], [["dog", "the cat"]], 1.0),
    ("rouge_l", ["кот сидел"], ["кот лежал"], 0.5),
    ("json_valid", ['{"a": 1}', "Sure: {}", "[1]", '{"a": NaN}'], ["{}"] * 4, 0.5),
    ("json_schema", ['{"a": 2}', '{"a": "2"}', '{"b": 1}', '{"a": 2, "b": 1}'], ['{"a": 1}'] * 4, 0.25),
    ("json_exact", ['{"b": 2, "a": 1.0}', '{"a": true, "b": 2}'], ['{"a": 1, "b": 2}'] * 2, 0.5),
    # 2 of 2 right; 1 of 2 right; not JSON: 3 right, 4 said, 6 true
    ("json_f1", ['{"a": 1, "b": 2}', '{"a": 1, "b": 3}', "no"], ['{"a": 1, "b": 2}'] * 3, 2 * 3 / 10),
    ("json:a", ['{"a": "x", "b": 0}', '{"a": "y"}', '{"b": 1}', "x"], ['{"a": "x"}'] * 4, 0.25),
]


@pytest.mark.parametrize(("name", "said", "true", "value"), TABLE)
def test_table(name: str, said: list, true: list, value: float) -> None:
    assert find(name).compute(said, true) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_label_metrics_equal_scikit_learn(classes: int, seed: int) -> None:
    said, true = np.random.default_rng(seed).integers(0, classes, (2, 60))
    assert METRICS["accuracy"].compute(said, true) == pytest.approx(sklearn.metrics.accuracy_score(true, said))
    assert METRICS["macro_f1"].compute(said, true) == pytest.approx(
        sklearn.metrics.f1_score(true, said, labels=np.unique(true), average="macro", zero_division=0)
    )
    assert METRICS["mcc"].compute(said, true) == pytest.approx(sklearn.metrics.matthews_corrcoef(true, said))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_correlations_equal_scipy(seed: int, shift: float) -> None:
    x, y = np.random.default_rng(seed).integers(0, 6, (2, 40)).astype(float)  # many ties
    assert METRICS["pearson"].compute(x + shift, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-9)
    assert METRICS["spearman"].compute(x + shift, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)


def test_correlation_of_a_constant_is_undefined() -> None:
    assert math.isnan(METRICS["pearson"].compute([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


@pytest.mark.parametrize(("name", "library"), [("bleu", BLEU), ("chrf", CHRF)])
def test_sums_of_statistics_equal_sacrebleu(name: str, library: type) -> None:
    said = ["the cat sat on the mat", "there is a dog in the house today", "hello world and all"]
    true = ["the cat is on the mat", "a dog is in the house today", "hello world and everyone"]
    other = ["a cat sat on the mat", "there is a dog here", "goodbye"]
    single = library().corpus_score(said, [true]).score
    assert find(name).compute(said, true) == pytest.approx(single)
    assert single > 10
    double = library().corpus_score(said, [true, other]).score
    assert find(name).compute(said, list(zip(true, other, strict=True))) == pytest.approx(double)
    assert double > single


def test_rouge_words_equal_the_library_on_ascii() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    said, true = "It's 3.5 o'clock, e-mail_me NOW", "it s 3 5 o clock: mail me"
    plain = RougeScorer(["rougeL"]).score(true, said)["rougeL"].fmeasure
    assert find("rouge_l").compute([said], [true]) == pytest.approx(plain)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_refuses_misaligned_and_empty_input(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 2 predictions for 1 references"):
        METRICS[name].compute(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no rows to score"):
        METRICS[name].compute([], [])


def test_per_row_exists_where_a_row_has_a_number() -> None:
    assert find("accuracy").per_row(["a", "b"], ["a", "a"]) == [1.0, 0.0]
    assert find("perplexity").per_row([2.0, 4.0], [1, 2]) == pytest.approx([math.exp(2), math.exp(2)])
    assert find("bleu").per_row(["a"], ["a"]) is None


def test_sums_to_likelihood() -> None:
    assert nll(6.0, 4) == 1.5
    assert perplexity(6.0, 4) == pytest.approx(math.exp(1.5))
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="0 supervised tokens"):
        nll(0.0, 0)


def test_normalise_and_fields() -> None:
    assert normalise("The quick, a  brown FOX.") == "quick brown fox"
    assert fields({"a": [1, {"b": None}], "c": {}}) == {
        "/a/0": ("number", 1),
        "/a/1/b": ("null", None),
        "/c": ("dict", None),
    }


# what is refused -> what the message says
REFUSED = [
    (lambda: find("acuracy"), "did you mean 'accuracy'"),
    (lambda: find("json:"), "unknown metric 'json:'"),
    (lambda: find("exact_match").compute(["x"], [[]]), "non-empty list of strings"),
    (lambda: find("json_exact").compute(["{}"], ["prose"]), "the reference is not JSON: 'prose'"),
    (lambda: find("json:b").compute(["{}"], ['{"a": 1}']), "no field 'b'"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_refusals(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_a_missing_library_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltatune.evaluate import metrics

    metrics._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="pip install rouge-score"):
        find("rouge_l").compute(["a"], ["a"])


def row(label=None, completion=None, turns=()):
    return SimpleNamespace(label=label, completion=completion, turns=turns)


CHOICES = [
    ("classify", [row(label="a"), row(label="b")], ("accuracy", "macro_f1", "mcc")),
    ("classify", [row(label=i) for i in range(3)], ("accuracy", "macro_f1")),
    ("classify", [row(label=0.5)], ("pearson", "spearman", "mse")),
    ("classify", [row(label=("a", "b"))], ("label_f1", "label_exact")),
    (SimpleNamespace(name="classify", kind="regression"), [row(label=3)], ("pearson", "spearman", "mse")),
    (SimpleNamespace(name="classify", kind="multi"), [row(label="a")], ("label_f1", "label_exact")),
    (SimpleNamespace(name="sft"), [row(completion="yes", label=1)], ("exact_match", "exact_match_normalised", "chrf")),
    ("sft", [row(completion='{"a": 1}')], ("json_exact", "json_schema", "json_valid", "json_f1")),
    ("sft", [row(completion="yes", label="yes")], ("exact_match", "exact_match_normalised", "chrf")),
    ("sft", [row(turns=(SimpleNamespace(role="assistant", content="a long answer of many words"),))], None),
    ("sft", [row()], ("perplexity",)),
]


@pytest.mark.parametrize(("objective", "examples", "names"), CHOICES)
def test_metrics_for_a_task(objective, examples: list, names: tuple | None) -> None:
    chosen = for_task(objective, examples)
    assert chosen == (names or ("rouge_l", "chrf", "bleu"))
    assert all(find(name) for name in chosen)


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no examples"):
        for_task("sft", [])
