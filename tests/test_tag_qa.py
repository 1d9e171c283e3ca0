"""Tagging and question answering: rows as tokens, predictions as tags and texts, their metrics, and malformed rows."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers as hf

import tiny_run as t
import tiny_tokenizers as tt
from deltatune import QA, Tag
from deltatune.config import Eval
from deltatune.data.batch import pad
from deltatune.data.encode import Encoding, Reading
from deltatune.data.example import Example
from deltatune.data.formats import load
from deltatune.data.places import answered, tagged
from deltatune.data.problems import BadRow
from deltatune.evaluate.metrics import find
from deltatune.evaluate.spans import spans
from deltatune.objectives import build, record
from deltatune.train.run import evaluate_file, open_adapted, run
from models import tiny

XQUAD = Path(os.environ.get("DELTATUNE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "xquad"
WORDS = tt.bert_like("was it good very film ann lee in the who")
LETTERS = tt.byte_level()
NOBODY = Example("f:1")  # whose row it is says nothing of a span


def row(words: str, tags: str) -> Example:
    words, tags = tuple(words.split()), tuple(tags.split())
    return Example("f:1", text=" ".join(words), extra={"tokens": words, "tags": tags})


def question(context: str, *answers: tuple[str, int], asked: str = "who was") -> Example:
    return Example("f:1", text=asked, text_pair=context, extra={"answers": answers})


# ---- tags ------------------------------------------------------------------------------------------------------------
TAGGED = [  # tokenizer, words, encoding, labels (names: O, B-PER, I-PER)
    (WORDS, "ann was good", Encoding(), (-100, 1, 0, 0, -100)),
    (WORDS, "ann was good", Encoding(prompt_ids=(90, 91)), (-100, -100, -100, 1, 0, 0, -100)),
    (WORDS, "ann was good", Encoding(max_length=4), (-100, 1, 0, -100)),
    (LETTERS, "ann is x", Encoding(), (1, -100, -100, -100, 0, -100, -100, 0)),  # a letter a token, a space too
    (LETTERS, "ann is x", Encoding(prompt_ids=(300,)), (-100, 1, -100, -100, -100, 0, -100, -100, 0)),
]


@pytest.mark.parametrize(("tokenizer", "words", "encoding", "labels"), TAGGED)
def test_a_label_stands_at_each_words_first_token(tokenizer, words, encoding, labels):
    found = tagged(row(words, "B-PER O O"), tokenizer, ("O", "B-PER", "I-PER"), encoding)
    assert found.labels == labels or tokenizer is LETTERS
    starts = [i for i, label in enumerate(found.labels) if label != -100]
    assert starts == [i for i in found.reading.words if i >= 0]
    assert len(found.reading.words) == 3
    if tokenizer is LETTERS:  # the space belongs to the word after it: its token may be the word's first
        assert [found.labels[i] for i in starts] == [1, 0, 0]
        decoded = [tokenizer.decode([found.ids[i]]).strip() for i in starts]
        assert decoded == ["a", "i", "x"]


def test_a_word_that_was_cut_off_is_predicted_outside():
    found = tagged(row("ann was good", "B-PER O O"), WORDS, ("O", "B-PER"), Encoding(max_length=4))
    assert found.reading.words == (1, 2, -1)
    objective = Tag(("O", "B-PER"))

    class Always(torch.nn.Module):
        def forward(self, input_ids, **_):
            out = torch.zeros(*input_ids.shape, 2)
            out[..., 1] = 1
            return type("Out", (), {"logits": out})

    said = objective.parts(Always(), pad([found], 0))
    assert objective.joined(said, row("ann was good", "B-PER O O")) == ("B-PER", "B-PER", "O")


def test_tag_names_come_from_the_rows_or_count_into_labels():
    assert Tag().fit([row("a b", "I-PER O"), row("a", "B-PER")]).labels == ("O", "B-PER", "I-PER")
    numbered = Example("f:1", text="a b", extra={"tokens": ("a", "b"), "tags": (10, 2)})
    assert Tag().fit([numbered]).labels == ("2", "10")
    named = Tag(("O", "B-PER", "I-PER"))
    assert named.reference(Example("f:1", extra={"tokens": ("a",), "tags": (1,)})) == ("B-PER",)
    assert build(record(named)) == named
    with pytest.raises(BadRow, match="unknown label 'B-LOC'"):
        named.encode(row("a", "B-LOC"), WORDS, Encoding())
    with pytest.raises(ValueError, match=r"f:3: \[missing_field\] tags: it is what the objective learns"):
        Tag().fit([Example("f:3", text="a", label="b")])


# ---- answers ---------------------------------------------------------------------------------------------------------
ANSWERS = [  # context, answer, encoding, (first, last) token behind [CLS] who was [SEP]
    ("it was ann lee", ("ann lee", 7), Encoding(), (6, 7)),
    ("it was ann lee", ("lee", 11), Encoding(), (7, 7)),
    ("it was ann lee", ("ann lee", 7), Encoding(prompt_ids=(90, 91)), (8, 9)),
    ("it was ann lee", None, Encoding(), (0, 0)),
    ("ann was it good very good film", ("ann", 0), Encoding(max_length=7), (4, 4)),
]


@pytest.mark.parametrize(("context", "answer", "encoding", "place"), ANSWERS)
def test_an_answer_is_a_pair_of_token_positions(context, answer, encoding, place):
    example = question(context, *([answer] if answer else []))
    found, *_ = answered(example, WORDS, encoding)
    assert found.target == place
    if answer:
        first, last = (found.reading.spans[int(i)] for i in found.target)
        assert context[first[0] : last[1]] == answer[0]


def test_an_answer_longer_than_any_window_is_an_error_with_its_line():
    with pytest.raises(BadRow, match=r"f:1.*'very very good' is longer than a window.*Raise max_length"):
        answered(question("it was very very good ann lee", ("very very good", 7)), WORDS, Encoding(max_length=7))
    with pytest.raises(BadRow, match=r"f:1: question: it leaves no room of 5 tokens"):
        answered(question("it was ann", ("ann", 7)), WORDS, Encoding(max_length=5))


CONTEXT = "it was very very good ann lee the film"
WINDOWS = [  # max_length, stride, answer -> (words, place of the answer) of each window behind [CLS] who was [SEP]
    (9, 2, ("ann lee", 22), [("it was very very", (0, 0)), ("very very good ann", (0, 0)), ("good ann lee the", (5, 6)),
                             ("lee the film", (0, 0))]),
    (9, 128, ("ann", 22), [("it was very very", (0, 0)), ("good ann lee the", (5, 5)), ("film", (0, 0))]),
    (9, 2, None, [("it was very very", (0, 0)), ("very very good ann", (0, 0)), ("good ann lee the", (0, 0)),
                  ("lee the film", (0, 0))]),
    (14, 2, ("film", 34), [(CONTEXT, (12, 12))]),
]  # fmt: skip


@pytest.mark.parametrize(("most", "stride", "answer", "windows"), WINDOWS)
def test_a_long_context_is_read_in_windows(most, stride, answer, windows):
    example = question(CONTEXT, *([answer] if answer else []))
    found = answered(example, WORDS, Encoding(max_length=most), stride)
    said = [" ".join(CONTEXT[a:b] for a, b in filter(None, w.reading.spans)) for w in found]
    assert [(text, w.target) for text, w in zip(said, found, strict=True)] == windows
    assert all(len(w.ids) <= most and w.where == "f:1" for w in found)
    front = answered(example, WORDS, Encoding(max_length=most + 2, prompt_ids=(90, 91)), stride)
    assert [w.ids[3:] for w in front] == [w.ids[1:] for w in found]
    assert [w.target for w in front] == [tuple(p + 2 if any(t) else 0 for p in t) for t in (w.target for w in found)]


def test_each_token_belongs_to_the_window_that_sees_most_around_it():
    """BERT's run_squad: the shorter side's tokens + 0.01 x the window's; each token in exactly one window."""
    found = answered(question(CONTEXT), WORDS, Encoding(max_length=9), 2)
    kept = [[CONTEXT[slice(*s)] for s, f in zip(w.reading.spans, w.reading.fullest, strict=True) if f] for w in found]
    assert kept == [["it", "was", "very"], ["very", "good"], ["ann", "lee"], ["the", "film"]]


def reading(text: str, words: str, at: int = 0) -> Reading:
    """A window of `words`, which `text` has from character `at` on, behind [CLS]."""
    spans: list = [None]
    for word in words.split():
        at = text.index(word, at)
        spans.append((at, at + len(word)))
        at += len(word)
    return Reading(text, tuple(spans))


JOINED = [  # (start, end) logits of two windows, unanswerable -> answer; windows "it was" and "ann lee"
    (((0, 1, 0), (0, 0, 1)), ((0, 3, 0), (0, 0, 3)), False, "ann lee"),
    (((0, 9, 0), (0, 0, 9)), ((0, 3, 0), (0, 0, 3)), False, "it was"),
    (((8, 1, 0), (8, 0, 1)), ((8, 3, 0), (8, 0, 3)), True, ""),  # both windows say: nothing here
    (((8, 1, 0), (8, 0, 1)), ((0, 3, 0), (0, 0, 3)), True, "ann lee"),  # one does not: the least null score counts
]


@pytest.mark.parametrize(("first", "second", "unanswerable", "answer"), JOINED)
def test_the_best_span_over_all_windows_answers(first, second, unanswerable, answer):
    text = "it was ann lee"
    parts = [(torch.tensor([own], dtype=torch.float32), reading(text, words))
             for own, words in ((first, "it was"), (second, "ann lee"))]  # fmt: skip
    assert QA(unanswerable=unanswerable).joined(parts, NOBODY) == answer


def test_a_span_begins_where_its_window_sees_most():
    own = reading("it was ann", "it was ann")
    scores = torch.tensor([[[0, 5, 0, 1], [0, 0, 0, 5]]], dtype=torch.float32)
    assert QA().joined([(scores, own)], NOBODY) == "it was ann"
    blind = Reading(own.text, own.spans, fullest=(False, False, False, True))
    assert QA().joined([(scores, blind)], NOBODY) == "ann"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_squads_own_document_is_read_and_every_answer_lies_in_a_window(language):
    """XQuAD as published: 48 articles, 240 paragraphs, 1190 questions, each with the line that it stands on."""
    path = next((p for p in (XQUAD / f"xquad.{language}.json",) if p.exists()), None)
    if path is None:
        pytest.skip("XQuAD is not here")
    rows, _ = load(path)
    assert (len(rows), len({r.where for r in rows}), len({r.text_pair for r in rows})) == (1190, 1190, 240)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(json.dumps(r.text)[1:-1] in lines[int(r.where.rpartition(":")[2]) - 1] for r in rows[:50])
    several = 0
    for row in rows[:120]:
        found = answered(row, LETTERS, Encoding(max_length=512), 128)
        several += len(found) > 1
        held = [w for w in found if w.target != (0.0, 0.0)]
        assert held
        for w in held:
            (a, _), (_, b) = (w.reading.spans[int(i)] for i in w.target)
            assert row.text_pair[a:b].strip() == row.extra["answers"][0][0].strip()
    assert several > 60


ARTICLE = {"title": "T", "paragraphs": [{"context": "Hi Ann", "qas": [
    {"id": "1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 3}]},
    {"id": "2", "question": 'The "question": why?', "answers": [], "is_impossible": True},
]}]}  # fmt: skip


@pytest.mark.parametrize(("indent", "lines"), [(None, [1, 2, 3, 4]), (1, [11, 22, 35, 46])])
def test_questions_stand_on_lines_of_their_own_or_are_counted(tmp_path, indent, lines):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [ARTICLE, ARTICLE]}, indent=indent))
    rows, _ = load(path)
    written = path.read_text().splitlines()
    assert [int(r.where.rpartition(":")[2]) for r in rows] == (lines if indent is None else [
        n for n, line in enumerate(written, 1) if line.lstrip().startswith('"question"')])  # fmt: skip
    assert [r.extra["answers"] for r in rows] == [(("Ann", 3),), ()] * 2
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Hi"}]}]}))
    with pytest.raises(ValueError, match=r"squad\.json:1: .*paragraphs: a paragraph has no context with its questions"):
        load(path)


SPANS = (None, (0, 2), (3, 6), (7, 10), None)
BEST = [  # start scores, end scores, settings, answer
    ((9, 0, 5, 0, 9), (9, 0, 0, 5, 9), {}, "was ann"),  # outside the context nothing is an answer
    ((0, 0, 0, 5, 0), (0, 5, 0, 4, 0), {}, "ann"),  # the end is not before the start
    ((0, 5, 0, 0, 0), (0, 0, 1, 5, 0), {"longest": 2}, "it was"),
    ((9, 0, 5, 0, 0), (9, 0, 0, 5, 0), {"unanswerable": True}, ""),
    ((4, 0, 5, 0, 0), (4, 0, 0, 5, 0), {"unanswerable": True}, "was ann"),
]


@pytest.mark.parametrize(("start", "end", "settings", "text"), BEST)
def test_the_best_span_lies_in_the_context(start, end, settings, text):
    scores = torch.tensor([start, end], dtype=torch.float32)
    assert QA(**settings).joined([(scores[None], Reading("it was ann", SPANS))], NOBODY) == text


def test_rows_without_answers_make_it_answerable_by_nothing():
    some = question("it was ann", ("ann", 7))
    assert QA().fit([some]) == QA()
    assert QA().fit([some, question("it was ann")]) == QA(unanswerable=True)
    assert QA().reference(some) == ("ann",)
    for name in ("longest", "doc_stride"):
        with pytest.raises(ValueError, match=f"qa {name} must be"):
            QA(**{name: 0})


# ---- metrics ---------------------------------------------------------------------------------------------------------
TAGS = [  # tags -> spans, as conlleval and seqeval read them
    ("O O", set()),
    ("B-PER I-PER O", {("PER", 0, 2)}),
    ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
    ("I-PER I-PER", {("PER", 0, 2)}),
    ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
    ("O I-LOC", {("LOC", 1, 2)}),
    ("S-PER S-PER", {("PER", 0, 1), ("PER", 1, 2)}),
    ("B-PER I-PER E-PER I-PER", {("PER", 0, 3), ("PER", 3, 4)}),
    ("U-PER B-LOC L-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
    ("PER PER LOC", {("PER", 0, 2), ("LOC", 2, 3)}),
    ("", set()),
]


@pytest.mark.parametrize(("tags", "found"), TAGS)
def test_spans(tags, found):
    assert spans(tags.split()) == found


def test_span_f1_counts_whole_spans_over_all_rows():
    said, true = [("B-PER", "I-PER", "O"), ("B-LOC",)], [("B-PER", "O", "O"), ("B-LOC",)]
    assert find("span_f1").compute(said, true) == 0.5  # one of two predicted, one of two true
    assert find("tag_accuracy").compute(said, true) == 0.75


SQUAD = [  # prediction, accepted, exact, F1
    ("The film.", ("film", "a movie"), 1.0, 1.0),
    ("the very good film", ("good film",), 0.0, 0.8),
    ("", (), 1.0, 1.0),
    ("film", (), 0.0, 0.0),
    ("plot", ("film",), 0.0, 0.0),
]


@pytest.mark.parametrize(("said", "accepted", "exact", "f1"), SQUAD)
def test_squad_metrics(said, accepted, exact, f1):
    assert find("squad_exact").compute([said], [accepted]) == exact
    assert find("squad_f1").compute([said], [accepted]) == pytest.approx(f1)


# ---- malformed rows --------------------------------------------------------------------------------------------------
GOOD = {"text": ["Ann"], "answer_start": [3]}
MALFORMED = [
    ({"tokens": ["a", "b"], "tags": ["O"]}, r"a\.jsonl:2.*1 tags for 2 words"),
    ({"tokens": "a b", "tags": ["O", "O"]}, r"a\.jsonl:2.*tokens.*Write a list"),
    ({"tokens": [], "tags": []}, r"a\.jsonl:2.*tokens"),
    ({"tokens": ["a b"], "tags": ["O"]}, r"a\.jsonl:2.*holds a space"),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, r"a\.jsonl:2.*tokens\[1\]"),
    ({"tokens": ["a"], "tags": [None]}, r"a\.jsonl:2.*tags\[0\]"),
    ({"question": "Who?", "context": "Hi Ann", "answers": {"text": ["Ann"], "answer_start": [2]}},
     r"a\.jsonl:2.*the context has ' An' at 2, not 'Ann'"),
    ({"question": "Who?", "context": "Hi Ann", "answers": {"text": ["Ann"], "answer_start": ["3"]}}, r"a\.jsonl:2"),
    ({"question": "Who?", "context": "Hi Ann", "answers": {"text": ["Ann"], "answer_start": []}},
     r"a\.jsonl:2.*two lists of one length"),
    ({"question": "", "context": "Hi Ann", "answers": GOOD}, r"a\.jsonl:2.*question"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), MALFORMED)
def test_a_malformed_row_is_named_with_its_line(tmp_path, wrong, said):
    tags = {"tokens": ["Hi"], "tags": ["O"]}
    answers = {"question": "Who?", "context": "Hi Ann", "answers": GOOD}
    first = tags if "tokens" in wrong else answers
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(first) + "\n" + json.dumps(wrong) + "\n")
    with pytest.raises(ValueError, match=said):
        load(path)


def test_a_row_without_what_is_learned_is_named_by_eval_too(tmp_path):
    model = t.masked_model(tmp_path / "bert")
    rows = t.lines(tmp_path / "tag.jsonl", [{"tokens": ["it", "good"], "tags": ["O", "B-PER"]}] * 8)
    config = t.config(model, rows, rows, objective="tag", train={"steps": 1, "batch_rows": 4, "batch_tokens": None})
    run(config, out=tmp_path / "run")
    found = open_adapted(str(model), tmp_path / "run/adapter")
    assert {"span_f1", "tag_accuracy", "loss"} <= evaluate_file(*found, rows, config.eval).keys()
    other = t.label_rows(tmp_path / "label.jsonl", 4)
    with pytest.raises(ValueError, match=r"label\.jsonl:1: .*tags: it is what .*\(columns text, label\)"):
        evaluate_file(*found, other, config.eval)


def test_a_base_that_is_a_tagger_already_names_its_own_tags(tmp_path):
    model = hf.AutoModelForTokenClassification.from_config(tiny("bert", vocab_size=len(WORDS), num_labels=2).config)
    model.config.id2label = {0: "O", 1: "B-PER"}
    folder = t.saved(model, WORDS, tmp_path / "tagger")
    rows = t.lines(tmp_path / "tag.jsonl", [{"tokens": ["it", "good"], "tags": ["O", "O"]}])
    opened, tokenizer, found = open_adapted(str(folder), None, {"tag": {}})
    assert found["objective"]["tag"]["labels"] == ["O", "B-PER"]
    assert 0 <= evaluate_file(opened, tokenizer, found, rows, Eval())["tag_accuracy"] <= 1
