"""Choice against T-Few's equations in float64, on causal and encoder-decoder models; malformed rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_run as t
import tiny_tokenizers as tt
from deltatune import Gate, LoRA, Prefix, SpotTune, attach, predict
from deltatune.core.attach import parameters
from deltatune.core.delta import Refusal
from deltatune.core.site import blocks
from deltatune.data.batch import pad
from deltatune.data.encode import Encoding
from deltatune.data.example import Example
from deltatune.data.problems import BadRow
from deltatune.evaluate.score import answered, score
from deltatune.evaluate.score import predict as measured
from deltatune.objectives import Choice, branches, build, record
from deltatune.train.job import prepare
from models import tiny

WORDS = "good fine nice bad poor sad it was the film a plot great terrible very [MASK]"
LABELS = {"pos": "very good", "neg": "bad", "mid": "it was a plot"}


def setting(family: str, **fields):
    tokenizer = tt.t5_like(WORDS) if family == "t5" else tt.byte_level(tt.CHATML)
    model = tiny(family, vocab_size=len(tokenizer), dtype=torch.float64, max_position_embeddings=256) \
        if family != "t5" else tiny("t5", vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1,
                                    dtype=torch.float64)  # fmt: skip
    goal = Choice(template="{text} : <mask>", labels=LABELS, **fields).bind(
        tokenizer, "seq2seq" if family == "t5" else "causal"
    )
    return model, tokenizer, goal


ROWS = [Example("f:1", text="the film was good", label="pos"), Example("f:2", text="sad", label="mid")]


def batch_of(goal, tokenizer, rows=ROWS):
    return pad([e for row in rows for e in goal.encode(row, tokenizer, Encoding())], 0)


def token_logp(model, family, encoded) -> list[np.ndarray]:
    """log p of each token of each choice of one row, one choice after another, nothing padded."""
    found = []
    for ids in encoded.choices:
        answer = torch.tensor([ids])
        if family == "t5":
            out = model(input_ids=torch.tensor([encoded.ids]), labels=answer).logits[0]
        else:
            whole = torch.tensor([[*encoded.ids, *ids]])
            out = model(input_ids=whole).logits[0, len(encoded.ids) - 1 : -1]
        found.append(out.log_softmax(-1).gather(1, answer[0][:, None]).squeeze(1).detach().numpy())
    return found


def t_few_by_hand(logp: list[np.ndarray], right: int) -> tuple[float, float, float]:
    lm = -logp[right].mean()
    wrong = [x for i, x in enumerate(logp) if i != right]
    ul = -sum(np.log(1 - np.exp(x)).sum() for x in wrong) / sum(len(x) for x in wrong)
    beta = np.exp([x.mean() for x in logp])
    return lm, ul, -np.log(beta[right] / beta.sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (0.0, 0.0)], ids=str)
def test_the_losses_are_t_fews(family, weights):
    model, tokenizer, goal = setting(family, unlikelihood=weights[0], length_normalised=weights[1])
    expected = 0.0
    for row in ROWS:
        (encoded,) = goal.encode(row, tokenizer, Encoding())
        lm, ul, ln = t_few_by_hand(token_logp(model, family, encoded), encoded.target)
        expected += lm + weights[0] * ul + weights[1] * ln
    loss, said = goal.loss(model, batch_of(goal, tokenizer))
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert set(said) == {"accuracy"}
    assert batch_of(goal, tokenizer).targets == 2


def test_the_gradient_reaches_every_choice():
    """d L / d logits of each choice, against the equations differentiated by torch without any padding."""
    model, tokenizer, goal = setting("opt")  # its norms stay in float64
    weight = model.model.decoder.layers[0].fc1.weight
    (ours,) = torch.autograd.grad(goal.loss(model, batch_of(goal, tokenizer))[0], weight)
    total = 0.0
    for row in ROWS:
        (e,) = goal.encode(row, tokenizer, Encoding())
        logp = []
        for ids in e.choices:
            out = model(input_ids=torch.tensor([[*e.ids, *ids]])).logits[0, len(e.ids) - 1 : -1]
            logp.append(out.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1))
        beta = torch.stack([x.mean() for x in logp])
        wrong = [x for i, x in enumerate(logp) if i != e.target]
        ul = -sum(torch.log(1 - x.exp()).sum() for x in wrong) / sum(len(x) for x in wrong)
        total = total - beta[e.target] + ul - beta.log_softmax(0)[e.target]
    (theirs,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("rank", ["mean", "sum"])
def test_the_best_choice_is_predicted(family, rank):
    model, tokenizer, goal = setting(family, rank=rank)
    names = list(LABELS)
    for row in ROWS:
        (encoded,) = goal.encode(row, tokenizer, Encoding())
        logp = token_logp(model, family, encoded)
        value = [x.mean() if rank == "mean" else x.sum() for x in logp]
        (said,) = predict(model, goal, [row.text], tokenizer=tokenizer)
        assert said["label"] == names[int(np.argmax(value))]


def own(choices, label) -> Example:
    return Example("f:7", text="the film", label=label, extra={"choices": choices})


def test_rows_bring_their_own_choices():
    model, tokenizer, _ = setting("llama")
    goal = Choice(template="{text} <mask>").fit([own(["good", "bad"], 1)]).bind(tokenizer, "causal")
    rows = [own(["good", "very bad"], 1), own(["a", "plot", "nice"], "nice")]
    batch = batch_of(goal, tokenizer, rows)
    assert batch.choices.shape[:2] == (2, 3)
    assert batch.labels.tolist() == [1, 2]
    given = [{"text": row.text, "choices": row.extra["choices"]} for row in rows]
    said = [one["label"] for one in predict(model, goal, given, tokenizer=tokenizer)]
    assert all(label in (0, 1, 2) for label in said)
    assert said[0] != 2  # the first row has two choices
    assert [goal.reference(r) for r in rows] == ["1", "2"]
    alone = sum(goal.loss(model, batch_of(goal, tokenizer, [r]))[0] for r in rows)
    torch.testing.assert_close(goal.loss(model, batch)[0], alone, rtol=1e-10, atol=0)


def test_rows_with_their_own_choices_beside_answers_of_classes(tmp_path):
    """What is predicted of a row and what is wanted of it have one form: the number of its own choice. Here every row
    has its answer right, of more choices than there are classes."""
    block = {"choice": {"template": "{text} <mask>", "labels": {"pos": "good", "neg": "bad"}}}
    rows = [{"text": f"x{i}", "choices": ["a", "b", "c", "d"], "label": "abcd"[i]} for i in range(4)]
    path = t.lines(tmp_path / "rows.jsonl", rows)
    job = prepare(t.config(t.chat_model(tmp_path / "m"), path, path, objective=block))
    examples, wanted = answered(job, job.train)
    said = measured(job, examples)[0]
    assert wanted == ["0", "1", "2", "3"]
    assert said == [str(one["label"]) for one in predict(job.model, block, rows, tokenizer=job.tokenizer)]
    assert score(job, examples).numbers["accuracy"] == sum(map(str.__eq__, said, wanted)) / 4
    goal, scores = job.objective, [torch.eye(4)[[i]] for i in range(4)]
    assert [goal.joined(list(each), row) for each, row in zip(scores, examples, strict=True)] == wanted
    shown = [goal.shown(list(each), row) for each, row in zip(scores, examples, strict=True)]
    assert [(one["label"], one["answer"], max(one["scores"], key=one["scores"].get)) for one in shown] == [
        (i, "abcd"[i], "abcd"[i]) for i in range(4)
    ]
    plain = Example("f:1", text="x", label="neg", extra={"choices": None})
    assert (goal.joined([torch.tensor([0.0, 1.0])], plain), goal.reference(plain)) == ("neg", "neg")


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_long_text_and_a_long_answer_of_two_rows_fit_side_by_side(family):
    """Each row with its own answers has 28 or 30 tokens; the longest text and the longest answer together have 50."""
    tokenizer = tt.byte_level(tt.CHATML)
    model = tiny(family, vocab_size=len(tokenizer), max_position_embeddings=30)
    attach(model, LoRA(r=2))
    goal = Choice(template="{text}<mask>").bind(tokenizer, "causal")
    rows = [
        Example("f:1", text="a" * 26, label=0, extra={"choices": ["b", "c"]}),
        Example("f:2", text="a" * 2, label=0, extra={"choices": ["b" * 24, "c"]}),
    ]
    batch = batch_of(goal, tokenizer, rows)
    assert batch.inputs["input_ids"].shape[1] + batch.choices.shape[2] > 50
    alone = sum(goal.loss(model, batch_of(goal, tokenizer, [row]))[0] for row in rows)
    torch.testing.assert_close(goal.loss(model, batch)[0], alone)


MALFORMED = [
    (["good"], 0, "no list of answers"),
    ("good", 0, "no list of answers: 'good'"),
    (["good", ""], 0, "no list of answers"),
    (["good", "good"], 0, "no list of answers"),
    (["good", 3], 0, "no list of answers"),
    (["good", "bad"], 2, "2 is none of the choices"),
    (["good", "bad"], "ugly", "'ugly' is none of the choices"),
    (["good", "bad"], 0.5, "0.5 is none of the choices"),
]


@pytest.mark.parametrize(("choices", "label", "said"), MALFORMED)
def test_a_malformed_row_is_an_error_with_its_line(choices, label, said):
    _, tokenizer, goal = setting("llama")
    with pytest.raises(BadRow, match=said) as caught:
        goal.encode(own(choices, label), tokenizer, Encoding())
    assert "f:7" in str(caught.value)


MISTAKES = [
    ({"rank": "max"}, "choice rank 'max': choose from mean, sum"),
    ({"unlikelihood": -1}, "choice unlikelihood must be a finite number >= 0, got -1"),
    ({"length_normalised": float("inf")}, "length_normalised must be .* got inf"),
    ({"template": "{text}"}, "needs exactly one <mask>"),
    ({"template": "<mask> {text}"}, "nothing may follow <mask>"),
]


@pytest.mark.parametrize(("fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error(fields, said):
    with pytest.raises(ValueError, match=said):
        Choice(**fields)


def test_rows_with_and_without_choices_do_not_mix():
    with pytest.raises(ValueError, match="f:1: the row has no choices, 1 other rows do"):
        Choice().fit([ROWS[0], own(["a", "b"], 0)])
    with pytest.raises(Refusal, match="a masked language model does not"):
        Choice().check(tiny("bert"))


def test_it_is_recorded_as_it_is_given():
    block = {"choice": {"template": "{text} <mask>", "labels": LABELS, "unlikelihood": 1.0,
                        "length_normalised": 1.0, "rank": "mean"}}  # fmt: skip
    assert record(build(block)) == block
    assert Choice().fit(ROWS).classes == ("mid", "pos")


# ---- several answers behind one text ---------------------------------------------------------------------------------
ANSWERS = [own(["a", "very good film it was", "bad film"], 1), own(["good", "it was very very good"], 0)]


def asked(model, method=None):
    """(loss, gradients, tokens that went through the model) of two rows with unlike choices."""
    tokenizer, seen = tt.byte_level(), []
    goal = Choice(template="{text} it was <mask>").fit(ANSWERS).bind(tokenizer, "causal")
    rows = [e for row in ANSWERS for e in goal.encode(row, tokenizer, Encoding())]
    block = model.get_submodule(blocks(model)[0])
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    loss = goal.loss(model, pad(rows, 0))[0]
    handle.remove()
    chosen = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, chosen, allow_unused=True), seen[-1]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen", "neox", "phi3"])
@pytest.mark.parametrize("method", [None, LoRA(r=2), Prefix(3), SpotTune((LoRA(r=2),), pool=3)])
def test_answers_side_by_side_are_read_as_alone(family, method, monkeypatch):
    model = tiny(family, vocab_size=len(tt.byte_level()), dtype=torch.float64, max_position_embeddings=256)
    if method:
        torch.manual_seed(0)
        attach(model, method)
        for p in parameters(model, "default").values():
            p.data += 0.1 * torch.randn_like(p)
    loss, grads, tokens = asked(model)
    monkeypatch.setattr(branches, "branches", lambda model, starts: False)
    wanted, theirs, all_tokens = asked(model)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert tokens < 0.75 * all_tokens


@pytest.mark.parametrize(
    ("family", "method"),
    [("mamba", None), ("mistral", None), ("llama", Gate((LoRA(r=2),))), ("llama", SpotTune((LoRA(r=2),)))],
)
def test_answers_that_would_see_each_other_are_read_apart(family, method):
    """A running state, a window, a decision by more than the text."""
    model = tiny(family)
    if method:
        attach(model, method)
    assert not branches.branches(model, torch.tensor([9, 12]))
    assert branches.branches(tiny("llama"), torch.tensor([9, 12]))
