"""Every method on every family keeps every promise of tests/conformance.py, or is on the short list of refusals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import conformance
from conformance import CLASSIFIERS, VARIANTS, Cell, cells, failures, variants
from deltatune import IA3, Adapter, LoRA, blocks
from deltatune.core.delta import Delta
from deltatune.core.registry import method
from deltatune.core.site import linear_at
from deltatune.methods import METHODS
from models import ALL
from refusals import NO_PEFT_FORM, REFUSED


@pytest.mark.parametrize("cell", list(cells()), ids=lambda c: f"{c.variant}-{c.family}")
def test_cell(cell: Cell):
    assert failures(cell) == {}


def test_every_registered_method_is_in_the_table():
    assert {name for parts in VARIANTS.values() for part in parts for name in part} == set(METHODS)


def test_the_lists_name_cells_that_exist():
    for variant, family in (*REFUSED, *NO_PEFT_FORM):
        assert variant in VARIANTS
        assert family in ALL


def test_a_new_refusal_is_a_failure(monkeypatch):
    cell = Cell("bitfit", "llama")
    monkeypatch.delitem(REFUSED, ("bitfit", "llama"))
    assert "Refusal" in failures(cell)["identity_at_init"]


def test_a_listed_refusal_that_works_is_a_failure(monkeypatch):
    monkeypatch.setitem(REFUSED, ("lora", "llama"), "seeded")
    assert "take it off the list" in failures(Cell("lora", "llama"))["refusal"]


def test_classifier_variants_exist():
    assert set(CLASSIFIERS) <= set(VARIANTS)


@pytest.mark.parametrize("table", ["Conformance", "Parity with peft"])
def test_the_evidence_has_a_line_for_every_variant(table):
    page = (Path(__file__).parents[1] / "docs/evidence/foundation.md").read_text(encoding="utf-8")
    section = page.split(f"## {table}\n")[1].split("\n## ")[0]
    names = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    assert names == ["method", *VARIANTS]


# ---- a method that no list of the suite knows ------------------------------------------------------------------------
class Shift(Delta):
    """y + b."""

    def __init__(self, d: int):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(d))

    def after(self, layer, x, y):
        return y + self.b.to(y.dtype)


class Forgetful(Shift):
    def stored(self, layer):
        return {}


class Boastful(Shift):
    def __init__(self, d: int):
        super().__init__(d)
        self.keeps = {"b": 0.5}


def shifts(made):
    @dataclass(frozen=True)
    class Shifts:
        """A bias beside every query."""

        def deltas(self, model):
            yield from ((site, made(32)) for site in linear_at(model, ("q",), "Shifts"))

    return Shifts


@dataclass(frozen=True)
class Low(LoRA):
    """A LoRA by another name."""


@dataclass(frozen=True)
class Scales(IA3):
    """(IA)^3 by another name."""


@dataclass(frozen=True)
class Narrow(Adapter):
    """An adapter by another name."""

    bottleneck: int | None = 3


def newcomer(monkeypatch, cls, family: str, **facts) -> dict[str, str]:
    """What the suite finds wrong with a method registered just now."""
    for names in (METHODS, blocks.REGISTERED):
        monkeypatch.setitem(names, "newcomer", None)  # gone after the test
    method("newcomer", paper="", **{"kind": "linear", **facts})(cls)
    monkeypatch.setattr(conformance, "VARIANTS", variants())
    return failures(Cell("newcomer", family))


NEW = {
    "lora": (Low, {"mergeable": True}),
    "lora in peft's form": (Low, {"mergeable": True, "peft": "LORA"}),
    "ia3": (Scales, {"mergeable": True}),
    "adapter": (Narrow, {"kind": "adapter"}),
    "a delta of its own": (shifts(Shift), {}),
}


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize(("cls", "facts"), NEW.values(), ids=NEW)
def test_a_new_method_needs_no_line_in_the_suite(monkeypatch, cls, facts, family):
    assert newcomer(monkeypatch, cls, family, **facts) == {}


def test_a_new_method_may_refuse_a_family_if_it_says_what_would_work(monkeypatch):
    from deltatune.methods.visual import VisualPrompt

    again = dataclass(frozen=True)(type("Again", (VisualPrompt,), {"__doc__": "Tokens in images."}))
    assert newcomer(monkeypatch, again, "llama", kind="embedding") == {}


FALSE = {  # what a registration or a delta says -> the promise that it breaks
    "merges": (shifts(Shift), {"mergeable": True}, {"merge_equals_attached": "no equivalent weight"}),
    "does not merge": (Low, {}, {"merge_equals_attached": "a listed refusal works"}),
    "has a peft form": (shifts(Shift), {"peft": "LORA"}, {"peft_agrees": "writable says None"}),
    "starts elsewhere": (Low, {"mergeable": True, "identity": False}, {"identity_at_init": "changes nothing"}),
    "saves nothing": (shifts(Forgetful), {}, {"save_then_load": "0 numbers are saved"}),
    "trains half": (shifts(Boastful), {}, {"parameter_count": "the registry says 32, 64 train"}),
}


@pytest.mark.parametrize(("cls", "facts", "broken"), FALSE.values(), ids=FALSE)
def test_a_new_method_that_says_what_is_not_so_fails(monkeypatch, cls, facts, broken):
    found = newcomer(monkeypatch, cls, "llama", **facts)
    assert set(found) == set(broken)
    assert all(said in found[promise] for promise, said in broken.items())
