"""Prompts of unlike lengths: like ones are read together, hardly any padding is, and the answers are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltatune import IA3, Gate, LoRA, Prefix, attach, rows
from deltatune.core.attach import activate
from deltatune.evaluate import cache
from deltatune.evaluate.generate import Decoding, answers, generate
from letters import letters
from models import FAMILIES, RECURRENT, tiny
from test_combine import shaken
from test_front import Seen

TOK = letters()
SHORT = Decoding(max_new_tokens=6)
PROMPTS = [[5 + (7 * i + j) % 60 for j in range(n)] for i, n in enumerate((30, 3, 28, 4, 9, 1, 9, 2))]
CAUSAL = [name for name, family in FAMILIES.items() if family.kind == "causal"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(cache.PASS, "cpu", 3)


@pytest.mark.parametrize(
    ("lengths", "most", "groups"),
    [
        ([3, 3, 3], 1, [[0, 1, 2]]),
        ([9, 1], 2, [[0], [1]]),
        ([9, 1], 9, [[0, 1]]),  # another pass would cost as much as the padding
        ([1, 9, 8, 2, 1], 1, [[1, 2], [3, 0], [4]]),
        ([4, 9, 9, 9, 4], 3, [[1, 2, 3], [0, 4]]),
        ([9, 0, 0], 1, [[0], [1, 2]]),  # of one token each: nothing to read
        ([5], 1, [[0]]),
    ],
)
def test_like_lengths_go_together(lengths, most, groups):
    assert cache.alike(lengths, most) == groups


@pytest.mark.parametrize("family", CAUSAL)
def test_a_ragged_batch_says_what_each_prompt_says_alone(family):
    model = tiny(family)
    alone = [generate(model, TOK, [p], SHORT)[0] for p in PROMPTS]
    assert generate(model, TOK, PROMPTS, SHORT) == alone
    assert len(set(alone)) > 1


def read(model, settings=SHORT):
    """Tokens that a model reads for the first answers' tokens."""
    seen = Seen(model)
    answers(model, TOK, PROMPTS, replace(settings, max_new_tokens=1))
    seen.handle.remove()
    return seen.count


def test_hardly_any_padding_is_read():
    model = tiny("llama")
    assert read(model) == sum(len(g) * max(len(PROMPTS[i]) - 1 for i in g) for g in GROUPS) + len(PROMPTS)
    assert read(model) < 8 * 30 / 2
    assert read(tiny("mistral")) == 8 * 30  # a window would count the padding that is put in afterwards


GROUPS = cache.alike([len(p) - 1 for p in PROMPTS], 3)

SETTINGS = {
    "beams": replace(SHORT, beams=3),
    "repetition": replace(SHORT, repetition_penalty=1.7),
    "prompt ids": replace(SHORT, prompt_ids=(90, 91, 92)),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("front", [(), tuple(range(9, 69))], ids=["no front", "a front"])
def test_settings_do_what_they_do_alone(settings, front):
    model = tiny("llama")
    asked = [[*front, *p] for p in PROMPTS]
    assert generate(model, TOK, asked, settings) == [generate(model, TOK, [p], settings)[0] for p in asked]


def test_a_beginning_of_all_rows_is_read_once_and_the_rest_without_padding():
    model, front = tiny("llama"), list(range(9, 69))
    seen = Seen(model)
    generate(model, TOK, [front + p for p in PROMPTS], replace(SHORT, max_new_tokens=1))
    assert seen.count == 60 + sum(len(g) * max(len(PROMPTS[i]) - 1 for i in g) for g in GROUPS) + len(PROMPTS)


@pytest.mark.parametrize("family", RECURRENT)
def test_a_state_of_fixed_size_is_left_to_the_model(family):
    """Guards against a cache that has read nothing, and cannot be repeated."""
    model, asked = tiny(family), [[5, 6, 7], [8, 9, 10]]
    assert generate(model, TOK, asked, SHORT) == [generate(model, TOK, [p], SHORT)[0] for p in asked]


def test_keys_stay_where_they_were_put(monkeypatch):
    """Guards against a copy of the whole cache, with no room left, before the first token."""
    found, real = [], cache.prefilled
    monkeypatch.setattr("deltatune.evaluate.generate.prefilled", lambda *a: found.append(real(*a)) or found[-1])
    model, at = tiny("llama"), []
    model.register_forward_pre_hook(lambda *_: at.append(found[-1].layers[0].keys.data_ptr() if found else 0))
    generate(model, TOK, PROMPTS, replace(SHORT, max_new_tokens=3))
    assert len({place for place in at if place}) == 1


def test_beams_are_read_as_one():
    assert read(tiny("llama"), replace(SHORT, beams=3)) == read(tiny("llama")) + 2 * len(PROMPTS)


METHODS = {"lora": LoRA(r=4), "prefix": Prefix(3), "ia3": IA3(), "a gate over the first tokens": Gate((LoRA(r=4),))}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_adapter_is_heard_as_it_is_alone(method):
    model = shaken(tiny("llama"), method, "a", 1)
    alone = [generate(model, TOK, [p], SHORT)[0] for p in PROMPTS]
    assert generate(model, TOK, PROMPTS, SHORT) == alone
    activate(model)
    assert generate(model, TOK, PROMPTS, SHORT) != alone


def test_rows_keep_their_adapters_through_all_groups():
    model, names = tiny("llama"), ["a", None, "b", "a", "b", "a", "b", None]
    for seed, name in enumerate("ab", 1):
        shaken(model, LoRA(r=4), name, seed)
    alone = []
    for name, prompt in zip(names, PROMPTS, strict=True):
        activate(model, *([name] if name else []))
        alone += generate(model, TOK, [prompt], SHORT)
    with rows(model, names):
        assert generate(model, TOK, PROMPTS, SHORT) == alone
        assert read(model) < 8 * 30 / 2
    with rows(model, names[::-1]):
        assert generate(model, TOK, PROMPTS, SHORT) != alone


def test_several_prompts_side_by_side_answer_as_alone():
    from deltatune import Prompt

    model = tiny("llama")
    torch.manual_seed(0)
    attach(model, Prompt(2, count=2, init="uniform"), "a")
    for how in ("average", "vote"):
        settings = replace(SHORT, combine=how)
        together = generate(model, TOK, PROMPTS, settings)
        assert together == [generate(model, TOK, [p], settings)[0] for p in PROMPTS]
