"""Every method on every family keeps every promise of tests/conformance.py, or is on the short list of refusals."""

from __future__ import annotations

import pytest

from conformance import CLASSIFIERS, VARIANTS, Cell, cells, failures
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
