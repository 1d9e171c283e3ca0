"""Some of the blocks are recomputed, the first ones: the same numbers, less memory, chosen once and replayed."""

from __future__ import annotations

import json
import weakref
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny_run as t
from conformance import batch, stir
from deltatune import LoRA, attach
from deltatune.core.attach import packing, trainable
from deltatune.core.attention import packed, positions
from deltatune.core.recompute import MARK, WHOLE, held, recomputing, units
from deltatune.core.site import blocks
from deltatune.methods import build
from deltatune.train import memory, recompute
from deltatune.train.job import prepare
from deltatune.train.run import plan, resume, run
from models import FAMILIES, inputs, tiny

LORA = {"lora": {"r": 2, "targets": ["all"]}}
METHODS = {
    "lora": [LORA],
    "dropout": [{"lora": {"r": 2, "targets": ["all"], "dropout": 0.3}}],  # random numbers are drawn again
    "prefix": [{"prefix": {"length": 3}}],
    "prompt": [{"prompt": {"length": 3}}],
    "parallel": [{"adapter": {"bottleneck": 4, "form": "parallel", "where": ["ffn"]}}],  # a span
    "union": [{"prefix": {"length": 3}}, LORA, {"ia3": {}}],
    "gate": [{"gate": {"of": [LORA, {"prefix": {"length": 2}}], "pool": 5}}],
    "spottune": [{"spottune": {"of": [LORA], "hidden": 4}}],
    "diffprune": [{"diffprune": {}}],
    "full": [{"full": {}}],
}
DEEP = {
    **{name: {"num_hidden_layers": 4} for name in ("llama", "neox", "opt", "bert")},
    "gemma": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_layer": 4},
    "t5": {"num_layers": 2, "num_decoder_layers": 2},
    "bart": {"encoder_layers": 2, "decoder_layers": 2},
}
CELLS = [("llama", name) for name in METHODS]
CELLS += [(family, name) for family in DEEP if family != "llama" for name in ("lora", "prefix", "spottune")]


def deep(family: str, method: str, seed: int = 0):
    torch.manual_seed(seed)
    model = attach(tiny(family, **DEEP[family]), build(METHODS[method])).train()
    stir(model, "default", 3)
    return model


def learned(model, given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A batch's loss and what it does to every trained parameter."""
    chosen = trainable(model)
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {k: p.grad.clone() for k, p in chosen.items() if p.grad is not None}


def same(one, two) -> bool:
    return (
        torch.equal(one[0], two[0])
        and one[1].keys() == two[1].keys()
        and all(torch.equal(one[1][k], two[1][k]) for k in one[1])
    )


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_however_many_are_recomputed_the_numbers_are_the_same_to_the_bit(family, method):
    model = deep(family, method)
    given = batch(model) | ({"use_cache": False} if FAMILIES[family].kind == "causal" else {})
    wanted = learned(model, given)
    assert any(g.abs().max() > 0 for g in wanted[1].values())
    for count in range(5):
        with recomputing(model, count):
            assert [getattr(model.get_submodule(b), MARK) for b in blocks(model)] == [i < count for i in range(4)]
            found = learned(model, given)
        assert same(found, wanted), count


def test_packed_rows_too():
    model = deep("llama", "union")
    packing(model)
    ids = inputs(model, rows=1, seq=9)["input_ids"]
    found = []
    for count in (0, 2, 4):
        with recomputing(model, count), packed((4, 5)):
            given = {"input_ids": ids, "labels": ids, "position_ids": positions(model, (4, 5)), "use_cache": False}
            found.append(learned(model, given))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


# ---- which -----------------------------------------------------------------------------------------------------------
class Live(TorchDispatchMode):
    """The most bytes that the tensors of its operations hold at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                if storage not in self.seen:
                    self.seen[storage] = True
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, size: int) -> None:
        self.now -= size


@cache
def peak(which: tuple[int, ...]) -> int:
    """Of 8 blocks, those recomputed -> bytes of a step at its peak. The tokens outweigh weights and logits."""
    model = attach(tiny("llama", num_hidden_layers=8, vocab_size=16), LoRA(r=2)).train()
    ids = torch.zeros(1, 120, dtype=torch.long)
    with recomputing(model, 8):
        for i, layer in enumerate(model.model.layers):
            layer.gradient_checkpointing = i in which
        with Live() as live:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return live.most


def test_the_first_ones_leave_the_lowest_peak():
    """Guards the choice of blocks: of as many, the last ones hold a whole block more, spread ones no less."""
    block = (peak(()) - peak((0, 1, 2, 3))) / 4
    assert block > 0
    assert peak((4, 5, 6, 7)) - peak((0, 1, 2, 3)) > 0.5 * block
    assert peak((0, 2, 4, 6)) >= peak((0, 1, 2, 3))
    falls = [peak(tuple(range(k))) - peak(tuple(range(k + 1))) for k in range(7)]
    assert falls[1:] == [pytest.approx(falls[1], rel=0.02)] * 6  # a straight line, as the estimate has it
    assert falls[1] > falls[0] > 0.8 * falls[1]  # what the first block reads wants no gradient: it holds less


HELD = {  # what trains -> the blocks of 4 that hold something
    "all of them": (LoRA(r=2), 4),
    "the last two": ({"freeze": {"last": 2}}, 2),
    "one projection of the third": ({"lora": {"r": 2, "targets": [r".*layers\.2\..*q_proj"]}}, 2),
    "the embeddings": ({"tokens": {"ids": [5]}}, 4),
    "a prompt": ({"prompt": {"length": 2}}, 4),
    "the head": ({"freeze": {"names": ["lm_head.weight"]}}, 0),
}


@pytest.mark.parametrize(("method", "count"), HELD.values(), ids=HELD)
def test_frozen_blocks_below_hold_nothing(method, count):
    """Guards against counting blocks that save no memory: what autograd keeps says whether a block holds anything."""
    model = tiny("llama", num_hidden_layers=4, tie_word_embeddings=False)
    model = attach(model, build([method]) if isinstance(method, dict) else method).train()
    assert held(model) == list(units(model)) == [f"model.layers.{i}" for i in range(4 - count, 4)]
    given = batch(model) | {"use_cache": False}
    kept: dict[str, int] = {}
    where: list[str] = []
    for name in blocks(model):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: where.append(name))
        module.register_forward_hook(lambda *_: where.clear())
    own = {p.data_ptr() for p in model.parameters()}

    def pack(x):
        if where and x.data_ptr() not in own:
            kept[where[0]] = kept.get(where[0], 0) + 1
        return x

    with recomputing(model, 0), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**given)
    assert list(kept) == held(model)


def test_the_model_is_given_back_as_it_was():
    """Guards against marks and a hook on the embeddings that stay behind."""
    model = deep("t5", "lora")
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with recomputing(model, 2):
        assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(getattr(m, MARK, False) for m in model.modules())
    model.activation_checkpointing_enable({"use_reentrant": True})
    own = [vars(b)["_gradient_checkpointing_func"] for b in map(model.get_submodule, blocks(model))]
    with recomputing(model, 0):
        assert not any(getattr(m, MARK, False) for m in model.modules())
    assert all(getattr(m, MARK) for m in map(model.get_submodule, blocks(model)))
    assert [vars(b)["_gradient_checkpointing_func"] for b in map(model.get_submodule, blocks(model))] == own


# ---- how many --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    t.chat_model(folder / "model", num_hidden_layers=4)
    t.chat_rows(folder / "rows.jsonl", 12)
    return folder


def config(made, wanted="auto", **over):
    train = {"checkpoint_gradients": wanted} | over.pop("train", {})
    return t.config(made / "model", str(made / "rows.jsonl"), train=train, **over)


ASKED = {
    0: (0, "off"),
    1: (1, 1),
    3: (3, 3),
    4: (4, "on"),
    0.5: (2, 2),
    0.6: (3, 3),
    "on": (4, "on"),
    "off": (0, "off"),
}


@pytest.mark.parametrize(("wanted", "count"), ASKED.items())
def test_a_number_a_share_or_all(made, wanted, count):
    job = prepare(config(made, wanted))
    assert (job.recompute, job.config.train.checkpoint_gradients) == count


def test_more_than_there_are_is_refused(made):
    with pytest.raises(ValueError, match="checkpoint_gradients: 5, and 4 of the 4 blocks hold something"):
        prepare(config(made, 5))
    with pytest.raises(ValueError, match="checkpoint_gradients: 3, and 2 of the 4 blocks hold something"):
        prepare(config(made, 3, method={"freeze": {"last": 2}}))


def test_auto_takes_as_few_as_fit(made, monkeypatch):
    """What is free does not count the weights, which are loaded when it is asked for."""
    monkeypatch.setattr(memory, "mapped_files", list)
    loaded = memory.there(prepare(config(made)).model)
    assert loaded > 0
    parts = [memory.estimate(prepare(config(made, count)))["total"] - loaded for count in range(5)]
    assert parts == sorted(parts, reverse=True)
    for count, total in enumerate(parts):
        for free in (total, parts[count - 1] - 1 if count else 2 * total):
            monkeypatch.setattr(memory, "free", lambda free=free: free)
            assert prepare(config(made)).recompute == count
    monkeypatch.setattr(memory, "free", lambda: 1 - loaded)
    job = prepare(config(made))
    assert job.recompute == 4
    assert any("gradient checkpointing is on for 4 of 4 blocks: 0.0 GiB would not fit" in note for note in job.notes)
    assert "checkpoint_gradients" in str(memory.warning(memory.estimate(job), loaded))
    assert "checkpoint_gradients" not in str(memory.warning(memory.estimate(job), loaded, more=False))


def test_blocks_without_a_mark_of_their_own_are_all_or_none(made, monkeypatch):
    monkeypatch.setattr("deltatune.core.recompute.blocks", lambda model: [f"model.layers.{i}.mlp" for i in range(4)])
    job = prepare(config(made, 1))
    assert units(job.model) == WHOLE
    assert (job.recompute, recompute.count(job), job.config.train.checkpoint_gradients) == (1, 4, "on")
    assert any("recomputes all blocks or none: here all" in note for note in job.notes)
    with recomputing(job.model, 1):
        assert all(getattr(layer, MARK) for layer in job.model.model.layers)
    monkeypatch.setattr(memory, "room", lambda job: 1)
    assert prepare(config(made)).recompute == 1


def test_a_run_says_what_it_chose_and_a_resumed_one_does_the_same(made, tmp_path, monkeypatch):
    """Guards against choosing anew: between the two, all the memory there could be is free."""
    target = memory.estimate(prepare(config(made, 2)))["total"]
    run(config(made, 2), out=tmp_path / "straight", observers=())
    with monkeypatch.context() as tight:
        tight.setattr(memory, "room", lambda job: target)
        found = plan(config(made))
        assert (found["recomputed_blocks"], found["blocks"]) == (2, 4)
        cut = run(config(made), out=tmp_path / "cut", observers=[t.Stop()])
    assert cut.status == "interrupted"
    assert "checkpoint_gradients: 2\n" in (tmp_path / "cut" / "config.yaml").read_text()
    assert json.loads((tmp_path / "cut" / "env.json").read_text())["recomputed_blocks"] == 2
    seen = []
    monkeypatch.setattr("deltatune.train.job.recomputing", lambda m, n: seen.append(n) or recomputing(m, n))
    assert resume(tmp_path / "cut").status == "done"
    assert seen == [2]
    one, two = (load_file(next((tmp_path / n / "adapter").glob("*.safetensors"))) for n in ("straight", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_dry_run_shows_it(made):
    from deltatune.commands.train import foreseen

    said = "gradient checkpointing: 3 of 4 blocks run again in the backward pass"
    assert said in list(foreseen(plan(config(made, 3))))
    assert not any("checkpointing" in line for line in foreseen(plan(config(made, "off"))))
