"""One batch, every row on another method: the rows are what they are alone, in a forward pass and in generation."""

from __future__ import annotations

import itertools

import pytest
import torch

from deltatune import IA3, Adapter, BitFit, LoRA, Prefix, activate, rows
from models import inputs, tiny
from test_combine import shaken

METHODS = {
    "lora": LoRA(r=4),
    "prefix": Prefix(3),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "adapter": Adapter(4),
    "parallel": Adapter(4, form="parallel", where=("ffn",)),
    "mixed": (LoRA(r=2), Prefix(2), BitFit()),
}
NAMES = [None, *METHODS]


@pytest.fixture(scope="module")
def model():
    """OPT has biases, and takes prefixes."""
    found = tiny("opt")
    for seed, (name, method) in enumerate(METHODS.items(), 1):
        shaken(found, method, name, seed)
    return found


def alone(model, name: str | None, run):
    activate(model, *([name] if name else []))
    return run()


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations_with_replacement(NAMES, 2)])
def test_every_pair_of_methods_shares_a_batch(model, first, second):
    batch = {k: v for k, v in inputs(model).items() if k != "labels"}
    with rows(model, [first, second]):
        together = model(**batch).logits
    for row, name in enumerate((first, second)):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        wanted = alone(model, name, lambda one=one: model(**one).logits[0])
        assert torch.allclose(together[row], wanted, atol=2e-5), name
        if name:
            assert (wanted - alone(model, None, lambda one=one: model(**one).logits[0])).abs().max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_one_name_is_for_every_row(model, name):
    batch = {k: v for k, v in inputs(model, rows=3).items() if k != "labels"}
    with rows(model, [name]):
        together = model(**batch).logits
    assert torch.allclose(together, alone(model, name, lambda: model(**batch).logits), atol=2e-5)
    assert (together - alone(model, None, lambda: model(**batch).logits)).abs().amax((1, 2)).min() > 1e-3


def flattened(layer, args):
    """The layer sees tokens without their rows, as those of some models do."""
    return (args[0].flatten(0, 1), *args[1:])


@pytest.mark.parametrize("seq", [7, 8])  # 3 x 8 tokens divide by 2
def test_names_that_do_not_fit_the_batch_are_refused_with_both_numbers(seq):
    """The only layers that run an adapter cannot tell."""
    model = shaken(tiny("opt"), LoRA(r=2, targets=("fc1",)), "lora", 1)
    batch = {k: v for k, v in inputs(model, rows=3, seq=seq).items() if k != "labels"}
    handles = [block.fc1.register_forward_pre_hook(flattened, prepend=True) for block in model.model.decoder.layers]
    try:
        with rows(model, ["lora", None]), pytest.raises(ValueError, match=r"2 names.*has 3 rows.*one name for all"):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def test_gradients_reach_each_rows_own_method_only(model):
    from deltatune.core.attach import parameters

    batch = {k: v for k, v in inputs(model).items() if k != "labels"}
    for p in (p for name in METHODS for p in parameters(model, name).values()):
        p.grad = None
    slots = {name: [p for k, p in parameters(model, name).items()] for name in ("lora", "prefix")}
    for p in itertools.chain(*slots.values()):
        p.requires_grad_(True)
    with rows(model, ["lora", "prefix"]):
        model(**batch).logits[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in slots["lora"])
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in slots["prefix"])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_generation_with_all_methods_in_one_batch(model, beams, padded):
    ids = inputs(model, rows=len(NAMES), seed=3)["input_ids"]
    mask = torch.ones_like(ids)
    if padded:  # left, as generation needs it
        for row in range(0, len(NAMES), 2):
            ids[row, :2], mask[row, :2] = model.config.pad_token_id, 0
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    with rows(model, NAMES):
        together = model.generate(ids, attention_mask=mask, **how)
    for row, name in enumerate(NAMES):
        one = {"inputs": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        wanted = alone(model, name, lambda one=one: model.generate(**one, **how))
        assert together[row].tolist() == wanted[0].tolist(), name
