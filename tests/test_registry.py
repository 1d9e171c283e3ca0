"""The table of methods: specs build and come back, unknown names are errors with the nearest."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch

from deltatune import IA3, Adapter, LoRA, Prefix, attach, blocks
from deltatune.config import Config
from deltatune.core.registry import (
    KINDS,
    METHODS,
    PRESETS,
    Entry,
    build,
    finite,
    index,
    method,
    refused,
    spec,
    survey,
)  # fmt: skip
from models import tiny


@pytest.mark.parametrize(
    ("given", "built"),
    [
        ("lora", (LoRA(),)),
        ({"lora": {"r": 4, "targets": ["q", "v"]}}, (LoRA(4, targets=("q", "v")),)),
        ({"prefix": None}, (Prefix(),)),
        ([{"prefix": {"length": 30}}, "ia3"], (Prefix(30), IA3())),
        ("mam", (Prefix(30), Adapter(512, ("ffn",), "parallel", "relu", scale=4.0))),
        (["lora-qv", LoRA(2)], (LoRA(targets=("q", "v")), LoRA(2))),
    ],
)
def test_build(given, built):
    assert build(given) == built


def test_a_method_of_ones_own_is_known_to_configurations(monkeypatch):
    monkeypatch.setattr("deltatune.core.registry.METHODS", {**METHODS})
    monkeypatch.setattr(blocks, "REGISTERED", {**blocks.REGISTERED})
    refused = r"method\.shift: unknown"
    with pytest.raises(ValueError, match=refused):
        Config(model="m", data="d", method="shift")

    @method("shift", paper="0000.00000", kind="rescale")
    @dataclass(frozen=True)
    class Shift:
        """Adds a vector."""

        size: float = 0.5

        def __post_init__(self) -> None:
            finite("Shift size", self.size, above=0)

    assert Config(model="m", data="d", method={"shift": {"size": 2}}).parts == (("shift", {"size": 2}),)
    with pytest.raises(ValueError, match=r"method\.shift\.size: 0: a number above 0 is wanted"):
        Config(model="m", data="d", method={"shift": {"size": 0}})
    with blocks.using({"methods": {}}):
        assert list(blocks.methods()) == ["shift"]
    assert build(spec([Shift(3.0)])) == (Shift(3.0),)


@pytest.mark.parametrize("given", ["mam", {"lora": {"r": 2}}])
def test_attach_names_the_way_from_a_preset_to_methods(given):
    with pytest.raises(ValueError, match=r"is not a method yet: deltatune\.methods\.build") as said:
        attach(tiny("llama"), given)
    assert repr(given) in str(said.value)
    attach(tiny("llama"), build(given))
    with pytest.raises(ValueError, match="is not a method: give LoRA"):
        attach(tiny("llama"), LoRA)


def test_a_method_without_a_name_is_said():
    with pytest.raises(ValueError, match=r"object has no name to be saved under: decorate .*@method\(\"object\""):
        spec([object()])


@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
def test_what_is_saved_builds_the_same(name):
    built = build(name)
    saved = json.loads(json.dumps(spec(built)))
    assert build(saved) == built
    assert build(spec(build({"lora": {"patterns": {"down": {"r": 2}}}}))) == (LoRA(patterns={"down": {"r": 2}}),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lroa", r"unknown method 'lroa'\. Did you mean 'lora'\?"),
        ("mamm", r"Did you mean 'mam'"),
        (
            {"houlsby": {"bottleneck": 8}},
            r"'houlsby' is a preset, which takes no fields: write its name, or .*'adapter'",
        ),
        (
            {"lora": {"rank": 8}},
            r"method 'lora' has no field 'rank'.* Its fields: r, alpha, dropout, targets, patterns",
        ),
        ({"lora": {"target": ["q"]}}, r"Did you mean 'targets'"),
        ({"lora": {"r": 0}}, "LoRA r must be a whole number >= 1, got 0"),
        ({"adapter": {"form": "serial"}}, "choose from sequential, parallel"),
        ({"adapter": {"where": ["mlp"]}}, "choose from attention, ffn"),
        ({"prefix": {"length": 0}}, "Prefix length must be a whole number >= 1, got 0"),
        ({"prompt": {"init": "test"}}, "vocab, uniform"),
    ],
)
def test_errors(given, said):
    with pytest.raises(ValueError, match=said):
        build(given)


def test_entries_are_whole():
    for entry in METHODS.values():
        assert entry.kind in KINDS
        assert entry.lr > 0
        assert entry.cls.__dataclass_params__.frozen
        assert entry.cls.__doc__
    assert {n: e.peft for n, e in METHODS.items() if e.peft} == {
        "adalora": "ADALORA",
        "dora": "LORA",
        "ia3": "IA3",
        "lora": "LORA",
        "prefix": "PREFIX_TUNING",
        "prompt": "PROMPT_TUNING",
        "ptuning": "PROMPT_TUNING",
    }
    with pytest.raises(ValueError, match="choose from linear"):
        method("x", paper="", kind="magic")


def test_the_index_is_plain_and_names_presets():
    found = json.loads(json.dumps(index()))
    assert found["methods"]["lora"]["fields"]["r"] == {"type": "int", "default": 8, "least": 1}
    assert found["presets"]["mam"]["kind"] == "preset"
    assert set(found["methods"]) == set(METHODS)


def test_refused_says_which_methods_a_model_cannot_take():
    assert list(refused(tiny("llama"))) == ["bitfit", "head", "visual_prompt"]
    assert list(refused(tiny("bert", "classify"))) == ["visual_prompt"]
    assert list(refused(tiny("vit"))) == ["prompt", "ptuning", "tokens"]


def test_a_survey_needs_no_weights_and_says_what_the_defaults_leave_open(monkeypatch):
    class Asks:
        def deltas(self, model):
            raise ValueError("say which words")
            yield

    class Reads:
        def deltas(self, model):
            float(model.lm_head.weight.sum())
            yield

    for name, cls in (("asks", Asks), ("reads", Reads)):
        entry = Entry(name, dataclass(frozen=True)(cls), "", "linear", False, None, 1.0, True, "", {})
        monkeypatch.setitem(METHODS, name, entry)
    with torch.device("meta"):
        found = survey(type(tiny("llama"))(tiny("llama").config))
    assert found["norm-tuning"]["parameters"] == 5 * 32
    assert found["norm-tuning"]["sites"] == {"input_layernorm": 2, "post_attention_layernorm": 2, "model.norm": 1}
    assert str(found["asks"]) == "say which words"
    assert "without the weights" in str(found["reads"])


WORDS = [("spottune", "sample"), ("bitfit", "create"), ("diffprune", "structured"), ("adapter", "norms"),
         ("prefix", "offset_positions"), ("visual_prompt", "deep")]  # fmt: skip


@pytest.mark.parametrize(("name", "field"), WORDS)
def test_a_word_is_no_truth_value(name, field):
    for value in ("no", 1, None):
        with pytest.raises(ValueError, match=f"{field} must be true or false, got {value!r}"):
            build({name: {field: value}})
    assert getattr(build({name: {field: True}})[0], field) is True


def test_every_switch_of_every_method_is_in_that_table():
    found = {(n, f.name) for n, e in METHODS.items() for f in dataclasses.fields(e.cls) if f.type == "bool"}
    assert found == set(WORDS)
