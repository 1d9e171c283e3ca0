"""Methods inside methods: gates, policies and pruning around deltas with state, with rows to see, in packed batches."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_run as t
import tiny_tokenizers as tt
from conformance import logits
from deltatune import IA3, Adapter, LoRA, Prefix, Prompt, attach, load, save
from deltatune.core.attach import packing, parameters, prepare, trainable
from deltatune.core.attention import packed, positions
from deltatune.core.delta import Delta, Given, Refusal, inmost
from deltatune.core.routing import Policy
from deltatune.core.slot import deltas
from deltatune.core.store import read_tensors
from deltatune.methods import METHODS, build
from deltatune.train.run import resume, run
from models import inputs, tiny

AdaLoRA, DiffPrune, Gate, PTuning, Select, Sparse, SpotTune = (
    METHODS[n].cls for n in ("adalora", "diffprune", "gate", "ptuning", "select", "sparse", "spottune")
)
ADAPTER = {"adapter": {"bottleneck": 8, "init": "normal", "init_std": 0.1}}
SMALL = Adapter(8, init="normal", init_std=0.2)
SNIP = {"sparse": {"of": [ADAPTER], "batches": 2}}
RUNS = {
    "gate of adalora": {"gate": {"of": [{"adalora": {"init_r": 4, "r": 2, "delta_t": 1}}]}},
    "gate of snip": {"gate": {"of": [SNIP]}},
    "spottune of diffprune": {"spottune": {"of": [{"diffprune": {"density": 0.05}}]}},
    "spottune of pissa": {"spottune": {"of": ["pissa"]}},
    "spottune of select": {"spottune": {"of": [{"select": {"density": 0.05, "rows": 4}}]}},
    "spottune of a gate": {"spottune": {"of": [{"gate": {"of": [{"lora": {"r": 2}}]}}]}},
    "spottune of an adapter": {"spottune": {"of": [ADAPTER]}},
    "sparse pissa": {"sparse": {"of": ["pissa"], "by": "magnitude", "density": 0.5}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    t.chat_model(folder / "model")
    t.chat_rows(folder / "rows.jsonl")
    return folder


def tensors(folder):
    return read_tensors(folder / "adapter", json.loads((folder / "adapter" / "deltatune.json").read_text()))


@pytest.mark.parametrize("method", RUNS.values(), ids=RUNS)
def test_a_nested_run_is_verified_and_resumes_to_the_last_bit(made, method, tmp_path):
    def job():
        return t.config(made / "model", str(made / "rows.jsonl"), method=method, train={"weight_decay": 0.1})

    whole = run(job(), out=tmp_path / "whole")
    assert whole.status == "done", whole.summary["failed"]
    assert run(job(), out=tmp_path / "cut", observers=[t.Stop()]).status == "interrupted"
    assert resume(tmp_path / "cut").status == "done"
    ours, theirs = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("of", [AdaLoRA(4, 2), build("pissa")[0], DiffPrune(), SMALL], ids=lambda m: m.method_name)
def test_a_wrapper_leaves_the_buffers_to_what_it_wraps(of):
    for delta in (d for d in deltas(attach(tiny("bert"), Gate(of=(of,)))) if hasattr(d, "inner")):
        assert delta.state_extra() == {}
        delta.load_extra({})
        assert delta.inner.state_extra().keys() == inmost(delta).buffered().keys() | delta.inner.state_extra().keys()


# ---- rows that a nested method must see ------------------------------------------------------------------------------
@pytest.mark.parametrize("outer", [Gate, SpotTune])
@pytest.mark.parametrize("of", [Sparse((SMALL,), 0.25), Select(0.05)], ids=["snip", "fisher"])
def test_rows_reach_a_nested_method(outer, of, tmp_path):
    model = attach(tiny("llama"), outer(of=(of,)))
    waiting = [inmost(d) for d in deltas(model) if not inmost(d).ready]
    assert waiting
    before = sum(p.numel() for p in trainable(model).values())
    prepare(model, "default", Given(lambda: (model(**inputs(model, seed=s)).loss for s in range(3))))
    assert all(d.ready for d in waiting)
    assert sum(p.numel() for p in trainable(model).values()) < 0.7 * before
    other = tiny("llama")
    load(other, save(model, "default", tmp_path / "saved"), "default")
    assert torch.equal(logits(other, inputs(other)), logits(model, inputs(model)))


# ---- packed and checkpointed -----------------------------------------------------------------------------------------
READ_PACKING = {
    "gate": Gate(of=(LoRA(2), SMALL)),
    "gate by token": Gate(of=(LoRA(2), Prefix(2)), per="token"),
    "gated prefix": Gate(of=(Prefix(3),)),
    "unipelt": build("unipelt")[0],
    "spottune": SpotTune(of=(LoRA(2),), hidden=4),
    "spottune by delta": SpotTune(of=(LoRA(2),), hidden=4, level="delta"),
    "spottune of prefix": SpotTune(of=(Prefix(3),), hidden=4),
    "spottune of gate": SpotTune(of=(Gate(of=(LoRA(2),)),), hidden=4),
}


def stirred(method):
    torch.manual_seed(0)
    model = attach(tiny("llama"), method)
    g = torch.Generator().manual_seed(1)
    for p in parameters(model, "default").values():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    for policy in (d for d in deltas(model) if isinstance(d, Policy)):  # a decision for each of the sequences
        policy.up.bias.data = torch.tensor([0.0, 0.1]).repeat(2)
    return model


def gradients(model, packs: bool) -> dict[str, torch.Tensor]:
    """Of the sum of every sequence's cross-entropy, packed into one row or one by one."""
    chosen, ids = trainable(model), inputs(model, rows=2)["input_ids"]
    sequences = [ids[0], ids[1, :5]]
    loss_of = torch.nn.functional.cross_entropy
    if packs:
        packing(model)
        lens = tuple(map(len, sequences))
        with packed(lens):
            row = {"input_ids": torch.cat(sequences)[None], "position_ids": positions(model, lens)}
            parts = model(**row, use_cache=False).logits[0].split(lens)
        loss = sum(loss_of(p[:-1], s[1:], reduction="sum") for p, s in zip(parts, sequences, strict=True))
        loss.backward()
    else:
        for s in sequences:
            loss_of(model(input_ids=s[None], use_cache=False).logits[0, :-1], s[1:], reduction="sum").backward()
    return {k: p.grad for k, p in chosen.items() if p.grad is not None}


@pytest.mark.parametrize("method", READ_PACKING.values(), ids=READ_PACKING)
def test_packed_and_checkpointed_has_the_gradients_of_one_by_one(method):
    alone, model = gradients(stirred(method).double(), False), stirred(method).double()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    for policy in (d for d in deltas(model) if isinstance(d, Policy)):
        policy.eval()  # no draws
    together = gradients(model, True)
    assert list(alone) == list(together)
    for key, expected in alone.items():
        torch.testing.assert_close(together[key], expected, rtol=1e-9, atol=1e-9)


# ---- pruned and stored -----------------------------------------------------------------------------------------------
PRUNED = {
    "prefix": (Prefix(6), "random"),
    "prefix by size": (Prefix(6), "magnitude"),
    "prompt": (Prompt(6, init="uniform"), "magnitude"),
    "pissa": (build("pissa")[0], "magnitude"),
}


@pytest.mark.parametrize(("of", "by"), PRUNED.values(), ids=PRUNED)
def test_what_is_pruned_comes_back_from_its_file(of, by, tmp_path):
    model = attach(tiny("llama"), Sparse((of,), 0.5, by))
    for p in parameters(model, "default").values():
        p.data += 0.1
    other = tiny("llama")
    torch.manual_seed(99)
    load(other, save(model, "default", tmp_path / "saved"), "default")
    ours, theirs = parameters(model, "default"), parameters(other, "default")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(logits(other, inputs(other)), logits(model, inputs(model)))


def test_a_pruned_pissa_starts_as_the_base():
    model = tiny("llama")
    plain = logits(model, inputs(model))
    attach(model, Sparse(build("pissa"), 0.5, "magnitude"))
    assert torch.equal(logits(model, inputs(model)), plain)
    assert all((d.start_A == 0).any() for d in deltas(model))


def test_a_pruned_lora_plus_keeps_its_learning_rate(made):
    from deltatune.train.job import prepare as prepared

    of = {"sparse": {"of": [{"lora": {"r": 4, "lr_ratio": 16.0}}], "by": "random", "density": 0.5}}
    ratios = prepared(t.config(made / "model", str(made / "rows.jsonl"), method=of)).ratios()
    assert {ratio for _, ratio in ratios} == {16.0}
    assert len(ratios) == len({key for key, _ in ratios}) == 14


# ---- what does not go into what --------------------------------------------------------------------------------------
REFUSED = {
    "sparse adalora": (Sparse((AdaLoRA(4, 2),), 0.5, "random"), "AdaLoRA moves its ranks as it trains"),
    "sparse diffprune": (Sparse((DiffPrune(),), 0.5, "random"), "chooses what is kept by itself"),
    "sparse ptuning": (Sparse((PTuning(3),), 0.5, "random"), "its encoder are dropped"),
    "sparse mlp prefix": (Sparse((Prefix(3, reparam="mlp", hidden=8),), 0.5, "random"), "dropped at the run's end"),
    "sparse gate": (Sparse((Gate(of=(SMALL,)),), 0.5, "magnitude"), "a gate or a policy steers it"),
    "sparse spottune": (Sparse((SpotTune(of=(SMALL,)),), 0.5, "magnitude"), "a gate or a policy steers it"),
    "sparse sparse": (Sparse((Sparse((SMALL,), 0.5, "random"),), 0.5, "random"), "pruned already is not pruned again"),
    "gate of gate": (Gate(of=(Gate(of=(IA3(),)),)), "a gate scales a change of activations.*Watch"),
    "gate of spottune": (Gate(of=(SpotTune(),)), "a gate scales a change of activations.*Watch"),
    "spottune of spottune": (SpotTune(of=(SpotTune(),)), "outside, only norms and biases may change.*Policy"),
}


@pytest.mark.parametrize(("method", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_nested_is_refused_with_the_reason(method, said):
    model = tiny("llama")
    with pytest.raises(Refusal, match=said) as refusal:
        attach(model, method)
    assert isinstance(refusal.value, ValueError)
    assert refusal.value.instead
    assert not deltas(model)


def test_a_folded_prefix_may_be_pruned_no_reason_stays_behind():
    model = attach(tiny("llama"), Prefix(3, reparam="mlp", hidden=8))
    assert all(d.unpruned for d in deltas(model))
    for delta in deltas(model):
        delta.fold()
    assert not any(d.unpruned for d in deltas(model))
    assert Delta.unpruned == ""


# ---- policies around what ends a block -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "of", [Adapter(4, where=("block",), init="normal"), Gate(of=(LoRA(2),))], ids=["block", "gate"]
)
def test_the_policys_gradient_is_the_difference_of_the_whole_blocks(of):
    """dL/dI = <dL/dx, F'(x) - F(x)>, both outputs of the last block read off at the norm behind it."""
    model = stirred(SpotTune(of=(of,), hidden=4)).double()
    policy, given, seen = next(d for d in deltas(model) if isinstance(d, Policy)), inputs(model, rows=3), []
    soft = torch.full((3, 2), 0.5, dtype=torch.float64, requires_grad=True)

    def kept(layer, args):
        if args[0].requires_grad:
            args[0].retain_grad()
        seen.append(args[0])

    model.model.norm.register_forward_pre_hook(kept)

    def loss(last: list[bool], wants: bool):
        hard = torch.tensor([[True, last[0]], [False, last[1]], [True, last[2]]])
        policy.decide = lambda x: (
            setattr(policy.now, "hard", hard),
            setattr(policy.now, "soft", soft if wants else None),
        )
        return model(**given).loss

    loss([True, False, True], True).backward()
    with torch.no_grad():
        loss([True] * 3, False)
        loss([False] * 3, False)
    expected = (seen[0].grad * (seen[1] - seen[2])).sum((1, 2))
    torch.testing.assert_close(soft.grad[:, 1], expected, rtol=0, atol=1e-10)
    assert expected.abs().min() > 1e-7


@pytest.mark.parametrize("name", ["gate", "spottune"])
def test_methods_inside_get_their_words_as_ids(name):
    outer = METHODS[name].cls(of=(LoRA(r=2), Prefix(3, init="words", words="good")))
    inside = outer.bind(tt.bert_like("good bad")).of
    assert (inside[0], len(inside[1].ids)) == (LoRA(r=2), 1)
