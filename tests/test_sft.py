"""SFT: what it refuses, and what it compares a generated answer with. Its loss is in test_invariance."""

import pytest

from deltatune import SFT
from deltatune.core.delta import Refusal
from deltatune.data.example import Example, Turn
from deltatune.objectives import build
from models import tiny

REFERENCES = [
    (Example("f:1", prompt="a", completion="b"), "b"),
    (Example("f:1", turns=(Turn("user", "a"), Turn("assistant", "b"))), "b"),
    (Example("f:1", turns=(Turn("assistant", "b"), Turn("user", "a"))), None),
    (Example("f:1", text="a"), None),
    (Example("f:1", turns=(Turn("user", "a"), Turn("assistant", "b", learn=False))), None),
]


@pytest.mark.parametrize(("example", "wanted"), REFERENCES)
def test_the_reference_is_the_last_answer(example, wanted):
    assert SFT().reference(example) == wanted


@pytest.mark.parametrize(("family", "task"), [("bert", "lm"), ("llama", "classify"), ("llama", "trunk")])
def test_a_model_that_predicts_no_next_token_is_refused(family, task):
    with pytest.raises(Refusal):
        SFT().check(tiny(family, task))
    SFT().check(tiny("llama"))
    SFT().check(tiny("t5"))


def test_names_and_fields_that_do_not_exist_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'sft'"):
        build("sfd")
    with pytest.raises(ValueError, match="no field 'train_onn'.*'train_on'"):  # noqa: RUF043
        build({"sft": {"train_onn": "all"}})
