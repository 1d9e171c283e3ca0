"""Classify against numbers computed by hand: which token is read, the three losses, names in and out."""

import pytest
import torch
from torch.nn import functional as F

import tiny_tokenizers as tt
from deltatune import Classify
from deltatune.core.delta import Refusal
from deltatune.data.batch import pad
from deltatune.data.encode import Encoded, Encoding
from deltatune.data.example import Example
from deltatune.objectives import build, record
from models import tiny


def batch(targets):
    """Three rows of unlike lengths whose own text holds the padding id."""
    ids = ((5, 6, 0, 7), (8, 0), (9, 10, 11, 12, 13))
    return pad([Encoded(i, None, y) for i, y in zip(ids, targets, strict=True)], 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox"])
def test_a_decoder_is_read_at_its_last_real_token(family):
    model, rows = tiny(family, "classify"), batch((0, 1, 2))
    found = Classify("single", ("a", "b", "c")).logits(model, rows)
    for i, length in enumerate((4, 2, 5)):
        alone = model.base_model(rows.inputs["input_ids"][i : i + 1, :length])[0][0, -1]
        assert torch.allclose(found[i], model.score(alone), atol=1e-5)


LOSSES = [
    ("single", ("a", "b", "c"), (2, 0, 1), lambda z, y: F.cross_entropy(z, y, reduction="sum")),
    ("multi", ("a", "b", "c"), ((1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
     lambda z, y: -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).sum() / 3),
    ("regression", (), (0.5, -1.0, 2.0), lambda z, y: ((z[:, 0] - y) ** 2).sum()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "labels", "targets", "oracle"), LOSSES)
def test_losses(kind, labels, targets, oracle):
    model, rows = tiny("bert", "classify", num_labels=max(len(labels), 1)), batch(targets)
    with torch.no_grad():
        found = Classify(kind, labels).loss(model, rows)[0]
        wanted = oracle(model(**rows.inputs).logits, torch.tensor(targets))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert len(Classify(kind, labels).parts(model, rows)) == 3


def example(label, where="f:1"):
    return Example(where, text="a b", label=label)


FITS = [
    (["x", "y"], "single", ("x", "y")),
    ([2, 10, 1], "single", ("1", "2", "10")),
    ([("x",), ("x", "y")], "multi", ("x", "y")),
    ([0.5, 1.5], "regression", ()),
]


@pytest.mark.parametrize(("labels", "kind", "names"), FITS)
def test_kind_and_names_come_from_the_rows(labels, kind, names):
    goal = Classify().fit([example(label) for label in labels])
    assert (goal.kind, goal.labels) == (kind, names)
    assert build(record(goal)) == goal


def test_one_label_of_several_is_a_list_of_one():
    goal = Classify("multi").fit([example("x"), example(("x", "y"))])
    assert goal.encode(example("x"), tt.bert_like("a b"), Encoding())[0].target == (1.0, 0.0)
    assert goal.reference(example("y")) == ("y",)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"f:2: \[missing_field\] label: it is what the objective learns"):
        Classify().fit([example("x"), example(None, "f:2")])
    with pytest.raises(ValueError, match=r"f:2: a list of labels|f:2: the row has a list of labels"):
        Classify("single").fit([example("x"), example(("x", "y"), "f:2")])
    with pytest.raises(ValueError, match="two classes or more"):
        Classify().fit([example("x")])
    with pytest.raises(ValueError, match="choose from auto"):
        Classify("singel")
    with pytest.raises(ValueError, match="head has 3 outputs, the rows need 2"):
        Classify("single", ("x", "y")).check(tiny("bert", "classify"))
    with pytest.raises(Refusal, match="task head"):
        Classify("single", ("x", "y")).check(tiny("llama"))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_soft_prompt_is_the_encoders_alone(family):
    """An encoder-decoder that classifies feeds its input to the decoder too, which has no virtual rows."""
    from conformance import stir
    from deltatune import Prompt, attach, virtual_ids

    model = tiny(family, "classify")
    eos = model.config.eos_token_id
    plain = Encoded((5, 6, 7, eos), None, target=1)
    before = Classify(labels=("a", "b", "c")).logits(model, pad([plain], 0))
    stock = model(input_ids=torch.tensor([[5, 6, 7, eos]])).logits
    assert torch.equal(before, stock)
    attach(model, Prompt(length=3))
    stir(model, "default", 0)
    steered = Encoded((*virtual_ids(model), 5, 6, 7, eos), None, target=1)
    after = Classify(labels=("a", "b", "c")).logits(model, pad([steered], 0))
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
