"""Attaching, switching, detaching: names, states, two adapters, spans, checkpointing, in-place weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conformance import batch, close, hooks, logits, snapshot, stir, values
from deltatune import IA3, Adapter, BitFit, Freeze, Full, LoRA, Prefix, Prompt, attach, detach
from deltatune.core.attach import activate, attached, disabled, packing, parameters, restored, rows, trainable
from deltatune.core.delta import SLOT, Delta, Refusal
from deltatune.core.merging import merge
from deltatune.core.site import Site
from deltatune.core.slot import deltas, slots
from deltatune.core.store import virtual_ids
from models import FAMILIES, inputs, tiny

SPAN = Adapter(4, form="parallel", where=("ffn",))


def stirred(model, method, name="default", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attach(model, method, name)
    stir(model, name, seed)
    return model


# ---- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.b", "use 1 to 64 letters"),
        ("", "use 1 to 64 letters"),
        ("x" * 65, "use 1 to 64 letters"),
        ("train", "choose another"),
        ("pre", "choose another"),
        ("rows", "choose another"),
        ("taken", "attached already"),
    ],
)
def test_names(name, said):
    model = attach(tiny("llama"), LoRA(targets=("q",)), "taken")
    with pytest.raises(ValueError, match=said):
        attach(model, LoRA(targets=("q",)), name)
    assert attached(model) == ("taken",)


def test_unknown_names_give_the_nearest():
    model = attach(tiny("llama"), LoRA(targets=("q",)), "maths")
    with pytest.raises(ValueError, match="Did you mean 'maths'"):
        activate(model, "math")
    with pytest.raises(ValueError, match="no adapter is attached"):
        activate(tiny("llama"))
    with pytest.raises(ValueError, match="is not a method"):
        attach(model, "lora", "b")


# ---- failing leaves nothing behind -----------------------------------------------------------------------------------
class Breaks:
    """Yields one good delta, and then something that fails: while choosing, or only while it is placed."""

    def __init__(self, late: bool):
        self.late = late

    def deltas(self, model):
        yield from LoRA(targets=("q",)).deltas(model)
        if not self.late:
            raise RuntimeError("no")
        yield Site("model.nowhere", "model.nowhere"), Delta()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_failing_attach_leaves_the_model_as_it_was(late, first):
    model = tiny("llama")
    if not first:
        stirred(model, [LoRA(targets=("v",)), SPAN], "a")
        before = logits(model, batch(model, None))
    found, kept = snapshot(model), values(model)
    with pytest.raises((RuntimeError, AttributeError)):
        attach(model, Breaks(late), "b")
    assert snapshot(model) == found
    assert all(torch.equal(t, values(model)[k]) for k, t in kept.items())
    if not first:
        assert attached(model) == ("a",)
        close(logits(model, batch(model, None)), before, 0)
        assert set(trainable(model, "a")) == set(parameters(model, "a"))


def test_a_union_trains_what_two_of_its_methods_ask_for_once():
    model = tiny("bert")
    found, kept = snapshot(model), values(model)
    attach(model, [BitFit(), Freeze(last=1)])
    names = {f"{s.site.key}.{n}" for s in deltas(model) for n in s.names}
    wanted = {id(p) for n, p in model.named_parameters() if n.endswith("bias") or ".layer.1." in n}
    chosen = list(trainable(model).values())
    inner = {id(p) for p in model.bert.parameters()}
    assert {id(p) for p in chosen} == wanted & inner
    assert len(chosen) == len({id(p) for p in chosen}) == len(names)
    detach(model, "default")
    assert snapshot(model) == found
    assert all(torch.equal(t, kept[k]) for k, t in values(model).items())


@pytest.mark.parametrize("method", [Prompt(2), Prefix(2), Adapter(2)], ids=str)
def test_a_merge_is_refused_in_the_names_that_users_know(method):
    with pytest.raises(
        Refusal, match=f"^{type(method).__name__} has no equivalent weight.* Found: {type(method).__name__}"
    ):
        merge(attach(tiny("llama"), method))


def test_attention_that_takes_no_prefix_is_refused_and_trained_values_go_back():
    model = tiny("bert")
    model.config._attn_implementation_internal = "flex_attention"
    kept, found = values(model), snapshot(model)
    with pytest.raises(Refusal, match="attention that this function can stand in for"):
        attach(model, [Changed(), Prefix(2)])
    assert snapshot(model) == found
    assert all(torch.equal(t, values(model)[k]) for k, t in kept.items())


class Changed(BitFit):
    """BitFit that starts away from the base, so that a value left behind would show."""

    def deltas(self, model):
        for site, delta in super().deltas(model):
            delta.other = {k: t + 1 for k, t in delta.other.items()}
            yield site, delta


def test_attach_after_sharding_is_refused():
    model = tiny("llama")
    model.lm_head.weight.device_mesh = object()  # what a DTensor parameter carries
    with pytest.raises(ValueError, match="before fully_shard"):
        attach(model, LoRA())


# ---- which adapter trains, which one runs ----------------------------------------------------------------------------
def test_activating_one_adapter_does_not_change_which_one_trains():
    model = attach(tiny("llama"), LoRA(targets=("q",)), "a")
    attach(model, IA3(), "b")
    chosen = trainable(model, "a")
    activate(model, "b")
    activate(model, "a", "b")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in chosen.values()}
    assert {id(p) for p in parameters(model, "b").values()} == {
        id(p) for p in trainable(model, "b").values() if p.requires_grad
    }
    assert not any(p.requires_grad for p in parameters(model, "a").values())


def test_two_adapters_add_up_and_leave_in_any_order():
    model = stirred(stirred(tiny("llama"), LoRA(targets=("q",)), "a"), SPAN, "b", seed=1)
    given, alone = batch(model, None), {}
    for name in "ab":
        activate(model, name)
        alone[name] = logits(model, given)
    activate(model, "a", "b")
    both = logits(model, given)
    assert not any(torch.allclose(both, alone[n], atol=1e-3) for n in "ab")
    detach(model, "a")
    close(logits(model, given), alone["b"], 0)
    base = logits(tiny("llama"), given)
    detach(model, "b")
    close(logits(model, given), base, 0)


def test_restored_puts_back_what_ran():
    model = stirred(attach(tiny("llama"), LoRA(), "a"), IA3(), "b")
    with restored(model):
        activate(model, "a", "b")
        with disabled(model):
            assert model.deltatune_state.active == ()
        assert model.deltatune_state.active == ("a", "b")
    assert model.deltatune_state.active == ("b",)
    with pytest.raises(KeyError), rows(model, ["a", None]):
        raise KeyError
    assert model.deltatune_state.rows is None


# ---- in place --------------------------------------------------------------------------------------------------------
def test_originals_are_never_trainable():
    """While an in-place adapter is off the layer holds the base's own values: no gradient may reach them."""
    model = attach(tiny("bert"), BitFit(), "bias")
    attach(model, LoRA(targets=("q",)), "lora")
    trainable(model, "bias")
    assert not any(p.requires_grad for p in model.parameters())
    activate(model, "lora")
    assert not any(p.requires_grad for p in model.parameters())
    activate(model, "bias")
    assert all(p.requires_grad for p in parameters(model, "bias").values())
    with disabled(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in parameters(model, "bias").values())


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_tied_weights_stay_tied_in_place(family):
    model = tiny(family)
    given, base = batch(model, None), logits(model, batch(model, None))
    stirred(model, Full())
    live = logits(model, given)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for _ in range(3):
        with disabled(model):
            close(logits(model, given), base, 0)
        close(logits(model, given), live, 0)
    assert len(parameters(model, "default")) == len(list(tiny(family).parameters()))


def test_two_in_place_adapters_switch_but_do_not_run_together():
    model = stirred(stirred(tiny("bert"), BitFit(), "a"), Full(), "b", seed=1)
    given = batch(model, None)
    b = logits(model, given)
    activate(model, "a")
    a = logits(model, given)
    with pytest.raises(ValueError, match=r"in place twice, by 'a' and by 'b'"):
        activate(model, "a", "b")
    close(logits(model, given), a, 0)
    activate(model, "b")
    close(logits(model, given), b, 0)
    base = logits(tiny("bert"), given)
    detach(model, "b")
    with disabled(model):
        close(logits(model, given), base, 0)


def test_in_place_methods_leave_other_adapters_alone():
    """Full and BitFit choose base parameters only, not those of slots that are there already."""
    model = attach(tiny("bert"), Adapter(4), "a")
    attach(model, Full(), "full")
    attach(model, BitFit(), "bias")
    for name in ("full", "bias"):
        assert not [key for key in parameters(model, name) if SLOT in key]


def test_rows_of_in_place_weights_are_refused():
    model = attach(tiny("llama"), Full(), "a")
    with pytest.raises(Refusal, match="its own weights") as refusal, rows(model, ["a", None]):
        pass
    assert "model.embed_tokens (weight)" in refusal.value.found
    assert model.deltatune_state.active == ("a",)


# ---- spans and exceptions --------------------------------------------------------------------------------------------
def taps(model):
    return [d.tap for d in deltas(model) if d.tap]


def test_inactive_spans_record_nothing_and_failed_passes_leave_nothing():
    model = stirred(stirred(tiny("llama"), SPAN, "a"), SPAN, "b")
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda *_: seen.append([t.x is not None for t in taps(model)])
    )
    logits(model, batch(model, None))
    assert seen == [[False, True, False, False]]  # block 0: a is idle, b records; block 1 has not begun

    def fail(*_):
        raise ArithmeticError("in the middle of a block")

    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        logits(model, batch(model, None))
    handle.remove()
    assert [t.x for t in taps(model)] == [None] * 4


def test_a_span_raises_when_its_read_layer_did_not_run():
    model = stirred(tiny("llama"), SPAN)
    with pytest.raises(RuntimeError, match=r"read layer model\.layers\.0\.mlp\.gate_proj did not run"):
        model.model.layers[0].mlp.down_proj(torch.zeros(1, 1, 48))


def test_a_deep_copied_span_reads_its_own_layer():
    model = stirred(tiny("llama"), SPAN)
    other = copy.deepcopy(model)
    given = batch(model, None)
    live = logits(model, given)
    detach(model, "default")  # the original's hooks are gone: a hook shared with it would fail now
    close(logits(other, given), live, 0)
    assert all(t.x is None for t in taps(other))


def test_an_interrupted_prompt_does_not_leave_ids():
    model = stirred(tiny("llama"), Prompt(2))
    (delta,) = deltas(model)
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        logits(model, batch(model))
    handle.remove()
    close(logits(model, batch(model)), logits(stirred(tiny("llama"), Prompt(2)), batch(model)), 0)
    assert delta.ids is None


# ---- backward must see what forward saw ------------------------------------------------------------------------------
def loss_of(model):
    return model(**batch(model, None)).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_activate_between_forward_and_backward_raises_under_checkpointing(family):
    model = attach(attach(tiny(family), LoRA(targets=("v",)), "a"), LoRA(targets=("v",)), "b").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model)
    activate(model, "a")
    with pytest.raises(RuntimeError, match="adapters changed between forward"):
        loss.backward()


def test_without_recomputation_switching_is_safe():
    model = stirred(attach(tiny("llama"), LoRA(targets=("v",)), "a"), LoRA(targets=("v",)), "b")
    loss_of(model).backward()
    expected = [p.grad.clone() for p in parameters(model, "b").values()]
    model.zero_grad()
    loss = loss_of(model)
    activate(model, "a")
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(parameters(model, "b").values(), expected, strict=True))


def test_an_idle_in_place_adapter_does_not_forbid_switching():
    model = attach(stirred(stirred(tiny("bert"), Full(), "full"), LoRA(), "a"), LoRA(), "b")
    loss = loss_of(model)
    activate(model, "a")
    loss.backward()


def test_in_place_weights_swapped_before_backward_raise():
    model = stirred(stirred(tiny("bert"), LoRA(), "other"), Full(), "full")
    loss = loss_of(model)
    activate(model, "other")
    with pytest.raises(RuntimeError, match="adapters changed"):
        loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [LoRA(), Full(), [Prefix(2), SPAN]], ids=["lora", "full", "mam"])
def test_the_order_of_dpo_gives_the_same_gradients(method, checkpointing):
    """policy forward, reference forward under disabled(), backward: equal to backward without the reference."""
    grads = []
    for with_reference in (False, True):
        model = stirred(tiny("gpt2"), method).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = loss_of(model)
        if with_reference:
            with torch.no_grad(), disabled(model):
                reference = loss_of(model)
            loss = loss - reference
        loss.backward()
        grads.append([p.grad.clone() for p in trainable(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- rows, prefixes, generation --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", LoRA()), ("llama", Prefix(2)), ("bert", LoRA()), ("bert", Prefix(2)), ("bert", BitFit())],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_rows_want_one_name_per_row(family, method):
    model = stirred(tiny(family), method, "a")
    with pytest.raises(ValueError, match="2 names, but the batch has 3 rows"), rows(model, ["a", None]):
        logits(model, inputs(model, rows=3))
    with pytest.raises(ValueError, match="0 names"), rows(model, []):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bart"])
def test_beams_belong_to_their_row(family):
    model = stirred(stirred(tiny(family), [Prefix(3), LoRA()], "a"), [Prefix(2), LoRA()], "b", seed=5)
    ids = inputs(model, rows=3)["input_ids"]
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    names = ("b", None, "a")
    with rows(model, names):
        together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    for i, name in enumerate(names):
        activate(model, *([name] if name else []))
        one = ids[i : i + 1]
        alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **how)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "gemma", "phi3", "gpt2", "neox", "opt"])
@pytest.mark.parametrize("method", [Prefix(3), Prompt(3)], ids=["prefix", "prompt"])
def test_left_padding_does_not_change_what_is_generated(family, method):
    model = stirred(tiny(family), method)
    ids = batch(model)["input_ids"][:1]
    pad = torch.cat([torch.full((1, 3), model.config.pad_token_id), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    how = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    padded = model.generate(input_ids=pad, attention_mask=mask, **how)
    assert torch.equal(padded[:, 3:], plain)


def test_two_prefixes_in_one_adapter_move_positions_by_both():
    model = attach(tiny("llama"), [Prefix(3), Prefix(4)])
    assert model.deltatune_state.shifts == {"default": 7}
    seen = []
    model.model.rotary_emb.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
    logits(model, batch(model, None))
    assert seen[0][0].tolist() == [7, 8, 9, 10, 11, 12, 13]


# ---- unions and merging ----------------------------------------------------------------------------------------------
UNIONS = {
    "two deltas on one layer": [LoRA(2, targets=("q",)), LoRA(3, targets=("q", "v"))],
    "scaled input and low rank": [IA3(inputs=("down",)), LoRA(targets=("down",))],
    "low rank and scaled input": [LoRA(targets=("down",)), IA3(inputs=("down",))],
    "scaled output under low rank": [IA3(outputs=("v",), inputs=()), LoRA(targets=("v",))],
    "trained weights under low rank": [Freeze(last=1), LoRA()],
    "low rank and trained biases": [LoRA(), BitFit()],
    "parts of a fused layer": [LoRA(targets=("q", "v")), IA3(outputs=("v", "k"), inputs=())],
}


@pytest.mark.parametrize("union", UNIONS.values(), ids=UNIONS)
@pytest.mark.parametrize("family", ["gpt2", "bert", "neox"])
@pytest.mark.parametrize("was", ["active", "inactive", "inplace"])
def test_unions_merge_in_the_order_of_the_forward_pass(family, union, was):
    model = stirred(tiny(family), union)
    given, live = batch(model, None), logits(model, batch(model, None))
    assert (live - logits(tiny(family), given)).abs().max() > 1e-2
    if was == "inactive":
        stirred(model, BitFit(), "other", seed=3)
    plain = merge(model, inplace=was == "inplace")
    assert (plain is model) is (was == "inplace")
    close(logits(plain, given), live, 2e-5)
    assert hooks(plain) == hooks(tiny(family))
    assert not attached(plain)


def test_merging_into_a_tied_head_is_refused():
    model = attach(tiny("gpt2"), LoRA(targets=("lm_head",)))
    before = snapshot(model)
    with pytest.raises(Refusal, match="shares") as refusal:
        merge(model)
    assert refusal.value.found == "transformer.wte = lm_head"
    assert snapshot(model) == before
    merge(attach(tiny("llama"), LoRA(targets=("lm_head",))))  # untied: fine


# ---- packing, precision ----------------------------------------------------------------------------------------------
def test_packing_alone_leaves_requires_grad_and_goes_away():
    model = tiny("llama")
    before = snapshot(model)
    packing(model)
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "deltatune"
    attach(model, LoRA())
    detach(model, "default")
    assert model.config._attn_implementation == "deltatune"  # still packing
    assert all(p.requires_grad for p in model.parameters())
    packing(model, False)
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma"])
@pytest.mark.parametrize("method", [LoRA(), IA3(), Adapter(4), SPAN, Prefix(2)], ids=lambda m: type(m).__name__)
def test_bf16_models_compute_in_bf16_with_fp32_adapters(family, method):
    model = tiny(family, dtype=torch.bfloat16)
    given, base = batch(model, None), logits(model, batch(model, None))
    stirred(model, method)
    assert {p.dtype for p in parameters(model, "default").values()} == {torch.float32}
    out = logits(model, given)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert not torch.equal(out, base)
    with disabled(model):
        close(logits(model, given), base, 0)
    loss_of(model).backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters(model, "default").values())


def test_slots_are_the_only_change_to_the_tree():
    model = attach(tiny("llama"), LoRA(targets=("q",)))
    assert list(slots(model)) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not virtual_ids(model)


def test_hooks_do_no_bookkeeping_on_the_hot_path(monkeypatch):
    """What runs is settled when adapters are switched: a forward pass asks no slot and no delta what it overrides."""
    from deltatune.core import slot, state

    model = stirred(stirred(tiny("llama"), [LoRA(), Prefix(2)], "a"), SPAN, "b")

    def called(*_):
        raise AssertionError("bookkeeping in a forward pass")

    for module, name in ((slot, "overrides"), (slot, "slots"), (slot, "deltas"), (state, "deltas")):
        monkeypatch.setattr(module, name, called)
    loss_of(model).backward()
