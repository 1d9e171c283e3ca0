"""The slot of one layer: which hooks it takes, what runs, and rows of one batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltatune.core.delta import Delta
from deltatune.core.inplace import InPlaceBias
from deltatune.core.site import Site
from deltatune.core.slot import Slot, by_row


class Add(Delta):
    """y + value, noting the shapes it saw."""

    def __init__(self, value: float):
        super().__init__()
        self.value, self.site, self.seen = value, Site("l", "l"), []

    def after(self, layer, x, y):
        self.seen.append((tuple(x.shape), tuple(y.shape)))
        return y + self.value


class Double(Delta):
    """2 x."""

    def __init__(self):
        super().__init__()
        self.site = Site("l", "l")

    def before(self, layer, x):
        return 2 * x


class Front(Delta):
    """`length` positions full of `value` in front."""

    def __init__(self, length: int, value: float):
        super().__init__()
        self.length, self.value, self.site = length, value, Site("l", "l")

    def attend(self, k, v):
        grown = [torch.cat([t.new_full((*t.shape[:2], self.length, t.shape[3]), self.value), t], 2) for t in (k, v)]
        return grown[0], grown[1]


def adapted(**deltas: Delta) -> tuple[nn.Module, Slot]:
    layer, slot = nn.Identity(), Slot()
    layer.delta_slot = slot
    for name, delta in deltas.items():
        slot.add(layer, name, delta)
    return layer, slot


def index(*owners: str | None) -> dict[str, torch.Tensor]:
    return {o: torch.tensor([i for i, other in enumerate(owners) if other == o]) for o in owners if o}


def test_only_the_hooks_that_are_needed_once_each():
    layer, slot = adapted(a=Add(1), b=Add(2))
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (0, 1)
    slot.add(layer, "a", Double())
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (1, 1)
    assert [type(d) for d in slot.of("a")] == [Add, Double]
    assert slot.of("nobody") == []


def test_what_runs_is_settled_by_switch():
    layer, slot = adapted(a=Add(1), b=Add(10), c=Double())
    x = torch.ones(2, 3)
    assert layer(x).tolist() == x.tolist()
    for names, expected in ((("a",), 2), (("a", "b"), 12), (("c", "a"), 3), (("c",), 2), ((), 1)):
        slot.switch(names, None, 0)
        assert layer(x).tolist() == (expected * x).tolist(), names
    assert not slot.attends


def test_rows_reach_only_their_own_delta():
    layer, slot = adapted(a=Add(1), b=Add(10), c=Double())
    slot.switch(("a", "b", "c"), index("b", None, "a", "c", "b"), 5)
    assert layer(torch.ones(5, 2))[:, 0].tolist() == [11, 1, 2, 2, 11]
    assert slot.of("b")[0].seen == [((2, 2), (2, 2))]


def test_rows_of_a_batch_that_a_model_flattened_or_expanded():
    layer, slot = adapted(a=Add(1), b=Add(10))
    slot.switch(("a", "b"), index("b", "a"), 2)
    y = layer(torch.ones(6, 4))  # three tokens (or beams) of each row, side by side
    assert y.shape == (6, 4)
    assert y[:, 0].tolist() == [11, 11, 11, 2, 2, 2]
    with pytest.raises(ValueError, match="2 names, but the batch has 5 rows"):
        layer(torch.ones(5, 4))
    assert by_row(torch.ones(6, 4), 2).shape == (2, 3, 4)


def test_an_adapter_without_rows_here_is_not_run():
    layer, slot = adapted(a=Add(1), b=Add(10))
    slot.switch(("a", "b"), index("a", "a") | {"b": torch.tensor([], dtype=torch.long)}, 2)
    assert layer(torch.ones(2, 1)).tolist() == [[2], [2]]
    assert slot.of("b")[0].seen == []


def test_prefixes_of_different_lengths_are_padded_and_hidden():
    _, slot = adapted(a=Front(1, 7.0), b=Front(3, 9.0))
    slot.switch(("a", "b"), index("b", None, "a"), 3)
    key = torch.ones(3, 1, 2, 1)
    k, v, visible = slot.attend(key, key)
    assert visible.tolist() == [[True] * 3, [False] * 3, [False, False, True]]
    assert k[:, 0, :, 0].tolist() == [[9, 9, 9, 1, 1], [0, 0, 0, 1, 1], [0, 0, 7, 1, 1]]
    assert torch.equal(k, v)
    slot.switch(("a",), None, 0)
    k, _, visible = slot.attend(key, key)
    assert k.shape == (3, 1, 3, 1)
    assert visible is None


def test_an_in_place_bias_acts_through_the_layer_or_by_row_never_both():
    layer = nn.Linear(2, 2)
    slot, delta = Slot(), InPlaceBias(layer, ("bias",))
    layer.delta_slot, delta.site = slot, Site("l", "l")
    slot.add(layer, "a", delta)
    base = layer.bias.detach().clone()
    delta.other["bias"] = base + 5
    x = torch.zeros(2, 2)
    delta.swap(layer, True)
    slot.switch(("a",), None, 0)
    torch.testing.assert_close(layer(x), (base + 5).expand(2, 2))
    delta.swap(layer, False)
    slot.switch(("a",), index("a", None), 2)
    torch.testing.assert_close(layer(x), torch.stack([base + 5, base]))


def test_a_deep_copy_runs_its_own_deltas():
    layer, slot = adapted(a=Add(1))
    slot.switch(("a",), None, 0)
    other = copy.deepcopy(layer)
    other.delta_slot.of("a")[0].value = 100
    assert layer(torch.zeros(1)).item() == 1
    assert other(torch.zeros(1)).item() == 100
    assert slot.of("a")[0].seen == [((1,), (1,))]
    other.delta_slot.switch((), None, 0)
    assert other(torch.zeros(1)).item() == 0
    assert layer(torch.zeros(1)).item() == 1
