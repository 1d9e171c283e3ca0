"""A loss of two forward passes: recomputed blocks see what held in the pass they belong to."""

from __future__ import annotations

import copy

import pytest
import torch

from conformance import same_gradients, stir
from deltatune import Adapter, LoRA, Prefix, attach
from deltatune.core.attach import packing, trainable
from deltatune.core.attention import packed, positions
from deltatune.methods import METHODS
from models import inputs, tiny

Gate, SpotTune = METHODS["gate"].cls, METHODS["spottune"].cls
METHOD = {
    "gate": Gate(of=(LoRA(r=2), Prefix(2), Adapter(4)), pool=5),
    "spottune": SpotTune(of=(LoRA(r=2, targets=("all",)),), hidden=4),
    "spottune-delta": SpotTune(of=(LoRA(r=2),), hidden=4, level="delta"),
}


def answers(model, seed: int, cut: tuple[int, int]) -> dict:
    """Two rows, padded on the right to 9 tokens behind `cut` real ones each."""
    given = inputs(model, rows=2, seq=9, seed=seed)
    for row, real in enumerate(cut):
        given["attention_mask"][row, real:] = 0
    return given | ({} if model.config.model_type == "bert" else {"use_cache": False})


def preference(model) -> torch.Tensor:
    """As in direct preference optimisation: one loss of a pass over what was chosen and one over what was rejected."""
    said = []
    for seed, cut in ((1, (9, 3)), (2, (2, 8))):
        said.append(model(**answers(model, seed, cut)).loss)
    return -torch.nn.functional.logsigmoid(3 * (said[0] - 2 * said[1]))


def made(family: str, name: str, recompute: bool):
    torch.manual_seed(0)
    model = attach(tiny(family), METHOD[name]).train()
    stir(model, "default", 3)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def gradients(model, loss) -> dict:
    chosen = trainable(model)
    for _ in range(2):  # the second step must not see the first's passes
        model.zero_grad()
        torch.manual_seed(5)
        loss(model).backward()
    return {k: p.grad for k, p in chosen.items() if p.grad is not None}


@pytest.mark.parametrize("name", METHOD)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_both_passes_keep_what_held_in_them(family, name):
    wanted = gradients(made(family, name, False), preference)
    found = gradients(made(family, name, True), preference)
    assert any(g.abs().max() > 1e-4 for g in wanted.values())
    same_gradients(wanted, found)


@pytest.mark.parametrize("name", METHOD)
def test_packed_passes_of_other_lengths(name):
    def loss(model):
        total = 0.0
        for seed, lens in ((1, (4, 5)), (2, (7, 2)), (3, (3, 3, 3))):
            ids = inputs(model, rows=1, seq=9, seed=seed)["input_ids"]
            with packed(lens):
                out = model(input_ids=ids, labels=ids, position_ids=positions(model, lens), use_cache=False)
            total = total + seed * out.loss
        return total

    models = [made("llama", name, recompute) for recompute in (False, True)]
    for model in models:
        packing(model)
    same_gradients(*(gradients(model, loss) for model in models))


def test_each_tower_keeps_what_held_in_it():
    def loss(model):
        total = 0.0
        for seed, cut in ((1, (9, 3)), (2, (2, 8))):
            given = inputs(model, rows=2, seq=9, seed=seed)
            given["attention_mask"] = (torch.arange(9) < torch.tensor(cut)[:, None]).long()
            total = total + seed * model(**given).logits_per_image.diagonal().sum()
        return total

    same_gradients(*(gradients(made("clip", "gate", recompute), loss) for recompute in (False, True)))


def test_the_blocks_own_checkpointing_is_left_as_it_was():
    model = made("llama", "gate", True)
    before = [vars(block)["_gradient_checkpointing_func"] for block in model.model.layers]
    gradients(model, preference)
    assert [vars(block)["_gradient_checkpointing_func"] for block in model.model.layers] == before


def test_a_copy_after_a_pass_that_failed_leaves_the_original_alone():
    """What stands in for a block's checkpointing when a pass fails knows the block it was made for."""
    model, wanted = made("llama", "gate", True), gradients(made("llama", "gate", False), preference)
    block = model.model.layers[0]
    own = block._gradient_checkpointing_func
    broken = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preference(model)
    broken.remove()
    left, twin = block._gradient_checkpointing_func, copy.deepcopy(model)
    same_gradients(wanted, gradients(twin, preference))
    assert block._gradient_checkpointing_func is left
    same_gradients(wanted, gradients(model, preference))
    assert block._gradient_checkpointing_func is own
