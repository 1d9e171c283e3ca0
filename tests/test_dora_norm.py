"""DoRA keeps its norm while decoding, and never a stale one: every way to change what it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltatune import DoRA, Full, activate, attach, disabled, fuse, load, merge, save, unfuse
from deltatune.core import quant
from deltatune.core.attach import parameters, rows
from deltatune.core.slot import deltas
from deltatune.core.store import load_state, state
from deltatune.methods._decomposed import Decomposed
from deltatune.train.optim import Optim, Optimizer
from models import inputs, tiny
from packed import HERE, needs_packing, nf4


def made(init: str = "kaiming") -> Any:
    model = tiny("llama")
    torch.manual_seed(0)
    attach(model, DoRA(4, init=init), "a")
    attach(model, DoRA(4, init=init), "b")
    draw(model, "a", 1)
    draw(model, "b", 2)
    activate(model, "a")
    return model


@torch.no_grad()
def draw(model: Any, name: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in parameters(model, name).values():
        p.add_(0.1 * torch.randn(p.shape, generator=g))


def run(model: Any, training: bool = False) -> torch.Tensor:
    with torch.set_grad_enabled(training):
        return model(**inputs(model)).logits


def fresh(model: Any, training: bool = False) -> torch.Tensor:
    """The logits with every norm computed anew."""
    for delta in deltas(model):
        if isinstance(delta, Decomposed):
            delta.held = None
    return run(model, training)


def step(model: Any) -> None:
    activate(model, "a")
    own = list(parameters(model, "a").values())
    for p in own:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=0.1)
    model(**inputs(model)).loss.backward()
    optimizer.step()


def up(model: Any) -> Any:
    return model.model.layers[0].mlp.up_proj


def replaced(model: Any) -> None:
    up(model).weight = torch.nn.Parameter(up(model).weight.detach() * 1.5)


def moved(model: Any) -> None:
    """Another tensor behind the same Parameter, where the old one may have been: what a change of dtype does."""
    for factor in (1.1, 1.5):
        up(model).weight.data = up(model).weight.data * factor


def in_place(model: Any) -> None:
    attach(model, Full(), "whole")
    draw(model, "whole", 3)
    activate(model, "a", "whole")


def loaded_whole(model: Any) -> None:
    in_place(model)
    run(model)
    load_state(model, "whole", {key: 1.2 * t for key, t in state(model, "whole").items()})


def kept_in_place(model: Any) -> None:
    """The norm is that of a weight trained in place, which no longer trains: one that does is read at every step."""
    in_place(model)
    model.requires_grad_(False)
    run(model)
    assert all(d.held for d in deltas(model, "a"))


def loaded_while_out(model: Any) -> None:
    """Where it is in again nothing has moved: its memory and its parameters are those that the norm was made of."""
    kept_in_place(model)
    activate(model, "a")
    load_state(model, "whole", {key: 1.2 * t for key, t in state(model, "whole").items()})
    activate(model, "a", "whole")
    model.requires_grad_(False)


def stepped_unseen(model: Any) -> None:
    """bitsandbytes writes to a weight's memory, which torch does not see by itself."""
    kept_in_place(model)
    activate(model, "whole")
    own = parameters(model, "whole")
    for p in own.values():
        p.requires_grad_(True)
    optimizer = Optimizer(own, Optim(optimizer="adamw-8bit", lr=0.1))
    model(**inputs(model)).loss.backward()
    optimizer.step(1.0)
    activate(model, "a", "whole")
    model.requires_grad_(False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a training step": step,
    "an adapter's values": lambda m: draw(m, "a", 5),
    "the same through .data": lambda m: [p.data.mul_(1.3) for k, p in parameters(m, "a").items() if "lora" in k],
    "a load": lambda m: load_state(m, "a", state(m, "b")),
    "a switch": lambda m: activate(m, "b"),
    "both": lambda m: activate(m, "a", "b"),
    "a base trained in place": in_place,
    "a load into the base": loaded_whole,
    "a load into the base while it is out": loaded_while_out,
    **({"a step of bitsandbytes": stepped_unseen} if HERE else {}),
    "a weight written": lambda m: quant.write(up(m), "weight", 1.5 * up(m).weight.detach()),
    "another weight": replaced,
    "another tensor in the weight": moved,
    "another dtype": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("training", [False, True], ids=["decoding", "training"])
def test_no_change_meets_a_stale_norm(what: str, init: str, training: bool):
    """Guards against a norm, or the part of it that is the frozen weight's, of what was there before."""
    model = made(init)
    before = run(model, training)
    assert torch.equal(run(model, training), before)
    assert all(d.held for d in deltas(model, "a"))  # the test would see one
    CHANGES[what](model)
    found = run(model, training)
    assert not torch.equal(found.float(), before)
    assert torch.equal(found, fresh(model, training))


def test_the_norm_is_made_once_while_decoding(monkeypatch: pytest.MonkeyPatch):
    model, calls = made(), []
    norm = Decomposed.norm
    monkeypatch.setattr(Decomposed, "norm", lambda self, *of: (calls.append(1), norm(self, *of))[1])
    ids = inputs(model)["input_ids"]
    model.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(calls) == len(deltas(model, "a"))
    parts = [d.held.own for d in deltas(model, "a")]
    with torch.inference_mode():
        model(input_ids=ids)
    assert len(calls) == len(deltas(model, "a"))
    model(input_ids=ids)  # gradients are recorded: the norm is made anew, of the weight's part that is kept
    assert len(calls) == 2 * len(deltas(model, "a"))
    assert all(d.held.own is own and d.held.norm is None for d, own in zip(deltas(model, "a"), parts, strict=True))


def test_inference_mode_keeps_nothing_that_training_cannot_use():
    model = made()
    with torch.inference_mode():
        found = model(**inputs(model)).logits
    step(model)
    assert not torch.equal(run(model), found)
    assert torch.equal(run(model), fresh(model))


def test_fusing_and_rows_and_copies_agree(tmp_path: Any):
    model = made()
    before, other = run(model), None
    with disabled(model):
        run(model)
    assert torch.equal(run(model), before)
    fuse(model, "b")
    unfuse(model)
    activate(model, "a")
    assert torch.equal(run(model), before)
    with rows(model, ["a", "b"]):
        assert torch.equal(run(model), fresh(model))
    activate(model, "a")
    other = copy.deepcopy(model)
    assert not any(d.held for d in deltas(other))  # a copy holds no second weight
    assert torch.equal(run(other), before)
    merged = merge(model, "a")
    torch.testing.assert_close(run(merged), before, rtol=1e-4, atol=1e-4)
    save(model, "a", tmp_path / "a")
    again = tiny("llama")
    load(again, tmp_path / "a", "a")
    assert torch.equal(run(again), before)


@needs_packing
def test_over_nf4_weights_are_unpacked_once(monkeypatch: pytest.MonkeyPatch):
    model = nf4("llama")
    attach(model, DoRA(4), "a")
    draw(model, "a", 1)
    before, unpacked, calls = run(model), quant.unpacked, []
    monkeypatch.setattr(quant, "unpacked", lambda layer: (calls.append(1), unpacked(layer))[1])
    assert torch.equal(run(model), before)
    assert calls == []
    quant.set_weight(up(model), 1.5 * quant.weight(up(model)))
    assert not torch.equal(run(model), before)
    assert torch.equal(run(model), fresh(model))
