"""Prompts for untuned models: what is rendered, what a label scores, and that evaluation rows choose nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deltatune.data.example import Example, Turn
from deltatune.evaluate.generate import Decoding, generate
from deltatune.evaluate.incontext import (
    Prompt,
    Search,
    best_untuned,
    calibrated,
    candidates,
    demonstrations,
    label_scores,
    predict,
    question,
    reference,
    render,
)
from letters import letters
from models import FAMILIES, tiny

TOK, PLAIN = letters(), letters(chat=False)
WORDS = {"pos": " good", "neg": " bad", "mid": " so so"}
LABEL = Prompt("p", "{text} is", WORDS)


def labelled(n: int, names: tuple[str, ...] = ("pos", "neg")) -> list[Example]:
    return [Example(f"f:{i}", text=f"row {i}", label=names[i % len(names)]) for i in range(n)]


ROW = Example("f:9", text="it", text_pair="that", label="pos")
OPEN = Example(
    "f:1",
    turns=(
        Turn("system", "be kind"),
        Turn("user", "hi"),
        Turn("assistant", "yo"),
        Turn("user", "2+2"),
        Turn("assistant", "4"),
    ),
)
PAIR = Example("f:2", prompt="ask", completion="tell")
SHOWN = [Example("f:3", text="one", label="neg"), Example("f:4", text="two", label="pos")]
HAND = ({"role": "system", "content": "S"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"})

# prompt, tokenizer, row, demonstrations -> text
RENDERED = [
    (LABEL, PLAIN, ROW, [], "it is"),
    (LABEL, PLAIN, ROW, SHOWN, "one is bad\n\ntwo is good\n\nit is"),
    (replace(LABEL, instruction="Judge."), PLAIN, ROW, SHOWN[:1], "Judge.\n\none is bad\n\nit is"),
    (replace(LABEL, template="{text}|{text_pair}", separator=";"), PLAIN, ROW, [], "it|that"),
    (LABEL, TOK, ROW, SHOWN[:1], "<user>one is</s><assistant>bad</s><user>it is</s><assistant>"),
    (replace(LABEL, chat=False), TOK, ROW, [], "it is"),
    (replace(LABEL, instruction="Judge."), TOK, ROW, [], "<user>Judge.\n\nit is</s><assistant>"),
    (Prompt("q"), TOK, PAIR, [PAIR], "<user>ask</s><assistant>tell</s><user>ask</s><assistant>"),
    (Prompt("q"), TOK, OPEN, [], "<user>be kind</s><user>hi</s><assistant>yo</s><user>2+2</s><assistant>"),
    (Prompt("q", turns=HAND), TOK, OPEN, [],
     "<user>S</s><user>u</s><assistant>a</s><user>hi</s><assistant>yo</s><user>2+2</s><assistant>"),
    (Prompt("q", "Q: {question} A:"), PLAIN, OPEN, [], "Q: 2+2 A:"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "tokenizer", "row", "shown", "text"), RENDERED)
def test_rendering(prompt: Prompt, tokenizer: Any, row: Example, shown: list, text: str) -> None:
    assert render(prompt, tokenizer, row, shown) == text


def test_braces_in_a_row_are_text() -> None:
    assert question(LABEL, Example("f:1", text="{label} {0}")) == "{label} {0} is"


def test_demonstrations_are_seeded_and_spread_over_labels() -> None:
    train = labelled(40, ("pos", "neg", "neg", "neg"))
    prompt = replace(LABEL, shots=6)
    state = random.getstate(), torch.get_rng_state().tolist()
    first = demonstrations(train, prompt)
    assert (random.getstate(), torch.get_rng_state().tolist()) == state
    assert sorted(e.label for e in first) == ["neg"] * 3 + ["pos"] * 3
    assert demonstrations(train, prompt) == first
    assert demonstrations(train, replace(prompt, seed=1)) != first
    assert len({e.where for e in first}) == 6
    assert demonstrations(train, replace(prompt, shots=0)) == []
    few = demonstrations(labelled(8, ("pos", "pos", "pos", "neg")), prompt)
    assert [e.label for e in few].count("neg") == 2


def by_hand(model: Any, before: list[int], after: list[int]) -> float:
    """log p(after | before) from one unbatched forward pass."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            fed = [model.config.decoder_start_token_id, *after[:-1]]
            logits = model(input_ids=torch.tensor([before]), decoder_input_ids=torch.tensor([fed])).logits[0]
        else:
            logits = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(after)), after].sum())


@pytest.mark.parametrize("family", [n for n, f in FAMILIES.items() if f.kind != "masked"])
@pytest.mark.parametrize("how", ["sum", "mean"])
def test_label_scores_equal_one_by_one(family: str, how: str) -> None:
    model = tiny(family)
    texts = ["it is", "a much longer text is", "b"]
    got = label_scores(model, PLAIN, replace(LABEL, score=how), texts)
    seq2seq = model.config.is_encoder_decoder
    for row, text in zip(got, texts, strict=True):
        for value, word in zip(row, WORDS.values(), strict=True):
            after = PLAIN(word.strip() if seq2seq else word)["input_ids"]
            want = by_hand(model, PLAIN(text)["input_ids"], after)
            assert value == pytest.approx(want / len(after) if how == "mean" else want, abs=2e-4)


def test_a_token_across_the_seam_is_scored_with_the_words() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["</s>", "a", "b", "c", "ab"])}
    merging = Tokenizer(models.BPE(vocab, [("a", "b")]))
    merging.decoder = decoders.Fuse()
    tok = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>")
    model = tiny("llama")
    got = label_scores(model, tok, Prompt("p", labels={0: "b", 1: "c"}), ["ca"])  # "cab" is c + ab, "cac" c + a + c
    assert got[0] == pytest.approx([by_hand(model, [3], [4]), by_hand(model, [3], [1, 3])], abs=1e-4)


def test_labels_that_share_an_input_are_run_once() -> None:
    model, seen = tiny("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    label_scores(model, PLAIN, Prompt("p", labels=dict(enumerate("abcdefgh"))), ["it is", "so"])
    assert sum(seen) == 2


def test_calibration_divides_by_what_is_said_of_nothing() -> None:
    p, free = np.array([[0.6, 0.4], [0.9, 0.1]]), np.array([[0.8, 0.2], [0.6, 0.4]])
    got = calibrated(np.log(p) - 7, np.log(free) + 3)  # scores are log-probabilities up to a constant of their row
    assert np.exp(got) == pytest.approx(p / np.array([0.7, 0.3]))
    assert got.argmax(axis=1).tolist() == [1, 0]


def test_calibration_undoes_a_bias_of_the_head() -> None:
    """A model that always says one label, because of one bias, says what it would say without it."""
    model = tiny("llama")
    rows = [
        Example(f"f:{i}", text=t, label="x") for i, t in enumerate(["abc", "zzz q", "one two", "9 8 7", "-", "Hey"])
    ]
    prompt = Prompt("p", "{text}:", {"x": "g", "y": "b"})
    even = predict(model, PLAIN, replace(prompt, calibrate=True), rows)
    push = torch.zeros(97)
    push[PLAIN.convert_tokens_to_ids("b")] = 50.0
    model.lm_head.register_forward_hook(lambda layer, args, out: out + push)
    assert set(predict(model, PLAIN, prompt, rows)) == {"y"}
    again = predict(model, PLAIN, replace(prompt, calibrate=True), rows)
    assert len(set(again)) == 2
    assert sum(a == b for a, b in zip(again, even, strict=True)) >= 5  # the mean over inputs keeps a trace of the bias


def test_open_answers_are_generated_and_stop_at_the_separator() -> None:
    model = tiny("llama")
    short = Decoding(max_new_tokens=6)
    assert predict(model, TOK, Prompt("q"), [OPEN, PAIR], decoding=short) == [
        t.strip() for t in generate(model, TOK, [list(OPEN.turns), [{"role": "user", "content": "ask"}]], short)
    ]
    free = generate(model, PLAIN, ["ask"], short)[0]
    got = predict(model, PLAIN, Prompt("q", separator=free[2]), [PAIR], decoding=short)
    assert got == [free[: free.index(free[2])].strip()]


def test_the_evaluation_rows_choose_nothing() -> None:
    """On training rows the first reading of the labels is right, on evaluation rows its opposite: training decides."""
    model = tiny("llama")
    said = predict(model, PLAIN, LABEL, labelled(30))
    names = sorted(set(said))
    assert len(names) > 1
    swap = dict(zip(names, reversed(names), strict=True))
    train = [Example(f"t:{i}", text=f"row {i}", label=label) for i, label in enumerate(said)]
    rows = [replace(e, label=swap[e.label], where=f"e:{i}") for i, e in enumerate(train)]
    right = replace(LABEL, name="right", labels={n: WORDS[n] for n in names})
    wrong = replace(right, name="wrong", labels={n: WORDS[swap[n]] for n in names})
    got = best_untuned(model, PLAIN, train, rows, [wrong, right], Search("accuracy", held_out=10))
    assert got["prompt"] == "right"
    assert got["held_out"]["right"] == 1.0
    assert got["accuracy"] == 0.0
    assert (len(got["predictions"]), got["references"]) == (30, [e.label for e in rows])


def test_ties_are_decided_by_the_finer_metric() -> None:
    """A task the model cannot do at all: every prompt is right on no row, one of them is closer."""
    model, rows = tiny("llama"), [Example(f"e:{i}", text="a b", label=None, completion="zzzz") for i in range(6)]
    prompts = [Prompt("first", "{prompt}x", chat=False), Prompt("second", "{prompt}y", chat=False)]
    rows = [replace(e, prompt=f"q{i}") for i, e in enumerate(rows)]
    said = {p.name: predict(model, PLAIN, p, rows, (), Decoding(max_new_tokens=6)) for p in prompts}
    rows = [replace(e, completion=text + "#") for e, text in zip(rows, said["second"], strict=True)]
    search = Search("exact_match", ("chrf",), held_out=3, decoding=Decoding(max_new_tokens=6))
    got = best_untuned(model, PLAIN, rows, rows, prompts, search)
    assert set(got["held_out"].values()) == {0.0}
    assert got["ties"]["second"] > got["ties"]["first"]
    assert got["prompt"] == "second"
    assert best_untuned(model, PLAIN, rows, rows, prompts, replace(search, ties=()))["prompt"] == "first"


def test_demonstrations_never_include_the_rows_they_are_chosen_on() -> None:
    from deltatune.evaluate.incontext import _held_out

    train = labelled(20)
    asked, rest = _held_out(train, Search("accuracy", held_out=6))
    assert (len(asked), len(rest)) == (6, 14)
    assert {e.where for e in asked} | {e.where for e in rest} == {e.where for e in train}
    assert len(_held_out(labelled(4), Search("accuracy"))[0]) == 2


def test_a_prompt_that_does_not_fit_is_skipped_with_the_reason() -> None:
    long = replace(LABEL, name="long", instruction="x" * 200)
    got = best_untuned(tiny("llama"), PLAIN, labelled(8), labelled(4), [long, LABEL], Search("accuracy", held_out=4))
    assert got["prompt"] == "p"
    assert got["held_out"]["long"] is None
    assert "model's 128 positions" in got["skipped"]["long"]
    with pytest.raises(ValueError, match="no prompt could be measured"):
        best_untuned(tiny("llama"), PLAIN, labelled(8), labelled(4), [long], Search("accuracy"))


def test_a_lower_metric_is_better_where_it_is() -> None:
    rows = [Example(f"f:{i}", text="x", label=float(i % 2)) for i in range(8)]
    prompts = [Prompt(str(w), "{text}", {w: "a", 1.0 - w: "b"}) for w in (0.0, 1.0)]
    got = best_untuned(tiny("llama"), PLAIN, rows, rows, prompts, Search("mse"))
    assert got["held_out"][got["prompt"]] == min(got["held_out"].values())


def test_candidates_fit_the_rows() -> None:
    found = candidates(labelled(10), shots=(0, 2, 99))
    assert [p.name for p in found if p.shots == 2] == [
        "label, 2-shot",
        "label, calibrated, 2-shot",
        "text-label, 2-shot",
    ]
    assert {p.shots for p in found} == {0, 2}
    assert found[0].labels == {"neg": " neg", "pos": " pos"}
    assert all(len(predict(tiny("llama"), TOK, p, labelled(2), labelled(4))) == 2 for p in found)
    assert [p.name for p in candidates([PAIR])] == ["as asked, 0-shot", "question-answer, 0-shot"]


REFUSED = [
    (lambda: Prompt("p", shots=-1), "shots=-1"),
    (lambda: Prompt("p", calibrate=True), "needs labels"),
    (lambda: Prompt("p", labels={1: "a", 2: "a"}), "words of its own"),
    (lambda: Search("acuracy"), "did you mean 'accuracy'"),
    (lambda: Search("accuracy", held_out=0), "at least 1 row"),
    (lambda: question(LABEL, PAIR), r"f:2: prompt 'p' wants {text}; the row has prompt, question"),
    (lambda: reference(LABEL, Example("f:1", text="x", label="odd")), "label 'odd' is none of"),
    (lambda: reference(Prompt("q"), Example("f:1", text="x")), "no answer to compare with"),
    (lambda: demonstrations(labelled(2), replace(LABEL, shots=3)), "wants 3 demonstrations; there are 2"),
    (lambda: render(Prompt("q", turns=HAND), PLAIN, PAIR), "without a chat template"),
    (lambda: label_scores(tiny("bert"), PLAIN, LABEL, ["x"]), "BertForMaskedLM cannot generate"),
    (lambda: best_untuned(tiny("llama"), PLAIN, labelled(1), [], [LABEL], Search("accuracy")), "1 training rows"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_refusals(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
