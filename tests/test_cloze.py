"""Cloze against numbers computed by hand, and the templates behind it."""

from dataclasses import replace

import pytest
import torch

import tiny_tokenizers as tt
from deltatune import Cloze, predict
from deltatune.data.batch import pad
from deltatune.data.encode import Encoding
from deltatune.data.example import Example
from deltatune.objectives import build, record
from deltatune.prompting.template import Filler, Template
from models import tiny

WORDS = "good film it was great bad terrible fine [MASK] mask"
LABELS = {"pos": ("great", "fine"), "neg": ("terrible",)}


@pytest.fixture(scope="module")
def words():
    tokenizer = tt.bert_like(WORDS)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


def row(text: str = "good film", label: str = "pos") -> Example:
    return Example("f:1", text=text, label=label)


FILLED = [  # template, text, tokens; [CLS] and [SEP] are the tokenizer's own
    ("{text} it was <mask> .", "good film", "[CLS] good film it was [MASK] [UNK] [SEP]"),
    ("<mask> it was {text}", "bad", "[CLS] [MASK] it was bad [SEP]"),
    ("{text} it was <mask>", "good [MASK]", "[CLS] good [UNK] it was [MASK] [SEP]"),  # a row's own mask moves nothing
]


@pytest.mark.parametrize(("template", "text", "tokens"), FILLED)
def test_a_masked_template_is_filled(words, template, text, tokens):
    found = Filler(words, True)(Template(template), row(text))
    said = words.convert_ids_to_tokens(list(found.ids))
    assert [w if w != "mask" else "[UNK]" for w in said] == tokens.split()
    assert said[found.mask_at] == "[MASK]"


def test_only_the_rows_own_text_is_cut_and_virtual_ids_follow_cls(words):
    found = Filler(words, True, 9, (90, 91))(Template("{text} it was <mask>"), row("good film bad fine great bad"))
    assert found.ids[:3] == (words.cls_token_id, 90, 91)
    assert len(found.ids) <= 9
    assert words.convert_ids_to_tokens(list(found.ids[-4:])) == ["it", "was", "[MASK]", "[SEP]"]
    with pytest.raises(ValueError, match="no room for the template"):
        Filler(words, True, 4)(Template("{text} it was <mask>"), row())


def test_a_causal_template_ends_before_the_gap():
    tokenizer = tt.byte_level(tt.CHATML)
    found = Filler(tokenizer, False)(Template("{text} it was <mask>."), row("ab"))
    assert tokenizer.decode(list(found.ids)) == "ab it was"
    assert found.mask_at == len(found.ids) - 1
    with pytest.raises(ValueError, match="nothing may follow"):
        Filler(tokenizer, False)(Template("<mask> was {text}"), row("ab"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{text}", "exactly one <mask>, it has 0"),
        ("<mask> <mask>", "it has 2"),
        ("{txt <mask>", "Did you mean 'text'"),
    ],
)
def test_a_template_that_cannot_work_says_why(text, said):
    with pytest.raises(ValueError, match=said):
        Template(text)


def test_a_field_the_row_lacks_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"f:1: text_pair: the template .* reads it, and this row does not"):
        Template("{text_pair} <mask>").parts(row())


def test_scores_are_mean_log_probabilities_at_the_gap(words):
    model = tiny("bert", vocab_size=len(words))
    goal = Cloze("{text} it was <mask>", LABELS).bind(words, "masked")
    examples = [row(), row("bad", "neg")]
    batch = pad([goal.encode(e, words, Encoding())[0] for e in examples], words.pad_token_id)
    with torch.no_grad():
        loss, metrics = goal.loss(model, batch)
        logits = model(**batch.inputs).logits.double()
        places = [int((ids == words.mask_token_id).nonzero()) for ids in batch.inputs["input_ids"]]
        total, right = 0.0, 0
        for i, place in enumerate(places):
            logp = logits[i, place].log_softmax(-1)
            great, fine, bad = (logp[words.convert_tokens_to_ids(w)] for w in ("great", "fine", "terrible"))
            scores = torch.stack([(great + fine) / 2, bad])
            total -= float(scores.log_softmax(-1)[i])  # row 0 is pos, row 1 is neg
            right += int(scores.argmax() == i)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["accuracy"] == right / 2
    assert predict(model, goal, [row().text], tokenizer=words)[0]["label"] in ("pos", "neg")


MISTAKES = [
    ({"pos": ["zzz"], "neg": ["bad"]}, "'zzz' is unknown to this tokenizer"),
    ({"pos": ["great film"], "neg": ["bad"]}, "'great film' is 2 tokens"),
    ({"pos": ["great"], "neg": ["great"]}, "must differ between classes"),
]


@pytest.mark.parametrize(("labels", "said"), MISTAKES)
def test_words_that_cannot_work_are_named(words, labels, said):
    with pytest.raises(ValueError, match=said):
        Cloze("{text} <mask>", labels).bind(words, "masked")


def test_classes_without_words_and_rows_without_labels_are_named():
    with pytest.raises(ValueError, match="no words for the class 'odd'"):
        Cloze("{text} <mask>", LABELS).fit([row(), row("x", "odd")])
    rows = [row(), replace(row("x", "odd"), where="a.jsonl:2"), replace(row("x", "even"), where="a.jsonl:3")]
    with pytest.raises(
        ValueError, match=r"a.jsonl:3: objective.cloze.labels .* classes 'even', 'odd'; it has .*even: "
    ):
        Cloze("{text} <mask>", LABELS).fit(rows)
    with pytest.raises(ValueError, match=r"f:1: \[missing_field\] label: it is what the objective learns"):
        Cloze().fit([Example("f:1", text="a")])
    assert Cloze("{text} <mask>").fit([row(), row("x", "neg")]).classes == ("neg", "pos")


def test_a_record_builds_the_same_objective_again():
    goal = Cloze("{text} <mask>", LABELS)
    assert build(record(goal)) == goal
    assert record(goal) == {
        "cloze": {"template": "{text} <mask>", "labels": {"pos": ["great", "fine"], "neg": ["terrible"]}}
    }
