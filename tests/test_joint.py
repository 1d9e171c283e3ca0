"""Adapters of a batch's rows as one product: what each does alone, and how many products that takes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune import AdaLoRA, Adapter, BitFit, DoRA, LoRA, activate, attach, rows
from deltatune.core import slot
from deltatune.core.joint import Added, Onto
from deltatune.core.slot import slots
from models import inputs, tiny
from test_combine import shaken

FORMS = {
    "two ranks": (LoRA(r=2), LoRA(r=5, alpha=3.0, scaling="rslora")),
    "other layers": (LoRA(r=2, targets=("q",)), LoRA(r=2, targets=("q", "v"))),
    "adalora": (AdaLoRA(r=2), LoRA(r=2)),
    "pissa": (LoRA(r=2, init="pissa"), LoRA(r=2)),
    "behind an adapter": ((LoRA(r=2), Adapter(4)), (Adapter(4), LoRA(r=2))),
    "dora is no product": (DoRA(r=2), LoRA(r=2)),
}


class Products(TorchDispatchMode):
    """Counts matrix products and their multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.cost = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.removesuffix("_") in ("mm", "addmm", "bmm", "baddbmm"):
            self.count += 1
            self.cost += made.numel() * args[-1].shape[-2]
        return made


def logits(model, batch, names):
    with rows(model, names), torch.no_grad():
        return model(**batch).logits


def asked(model, rows=4, seq=7):
    return {k: v for k, v in inputs(model, rows=rows, seq=seq).items() if k != "labels"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])  # phi3: a layer's columns
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("seq", [1, 7])  # fewer tokens than ranks, and more
def test_each_row_is_what_it_is_alone(family, form, seq):
    model = tiny(family)
    for seed, (name, method) in enumerate(zip("ab", form, strict=True), 1):
        shaken(model, method, name, seed)
    batch = asked(model, seq=seq)
    together = logits(model, batch, ["b", "a", None, "b"])
    for row, name in enumerate(("b", "a", None, "b")):
        activate(model, *([name] if name else []))
        with torch.no_grad():
            assert torch.allclose(together[row], model(**batch).logits[row], atol=2e-5), name


def crowd(method=LoRA, count=8, **fields):
    model = tiny("llama")
    for i in range(count):
        shaken(model, method(r=2, **fields), f"n{i}", i + 1)
    return model


def products(model, names, seq=7):
    """How many products a pass over 8 rows is, and how many multiplications; names: of the rows, or None (as it is)."""
    with rows(model, names) if names else nullcontext(), torch.no_grad(), Products() as seen:
        model(**asked(model, rows=8, seq=seq))
    return seen.count, seen.cost


@pytest.mark.parametrize("seq", [1, 2, 7])
def test_eight_adapters_take_the_products_of_one(seq):
    model, names = crowd(), [f"n{i}" for i in range(8)]
    activate(model, "n0")
    (count, cost), (one, least) = products(model, names, seq), products(model, None, seq)
    activate(model)
    bare = products(model, None, seq)[1]
    assert count == one
    assert cost - bare == (least - bare) * (8 if seq < 2 else 1)  # every row's ranks, or its own


def kept_first(seq):
    """(what a hook in front of ours has kept of a layer's output, as it is after rows() ran, as it was)."""
    model, seen, names = crowd(), [], [f"n{i}" for i in range(8)]
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(8, seq, 32)
    layer.register_forward_hook(lambda _, args, y: seen.append(y), prepend=True)
    with rows(model, names), torch.no_grad():
        layer(x)
        return seen[0], F.linear(x, layer.weight)


@pytest.mark.parametrize("seq", [1, 7])
def test_only_an_output_that_nobody_else_has_seen_is_written_over(seq, monkeypatch):
    assert torch.equal(*kept_first(seq))
    monkeypatch.setattr(slot, "plain", lambda layer, hook: True)
    assert not torch.equal(*kept_first(seq))


@pytest.mark.parametrize(("count", "joined"), [(8, True), (9, False)])
def test_ranks_that_would_cost_more_than_they_save_run_one_by_one(count, joined):
    """A layer 32 wide: 64 ranks are multiplied with every row, 72 are not."""
    model = tiny("llama")
    for i in range(count):
        attach(model, LoRA(r=8, targets=("q",)), f"n{i}")
    with rows(model, [f"n{i}" for i in range(count)]):
        assert all(bool(slot.joints) is joined for slot in slots(model).values())


def test_a_change_of_an_adapter_inside_rows_is_seen():
    model, names = crowd(count=2), ["n0", "n1"]
    batch = asked(model, rows=2)
    with rows(model, names), torch.no_grad():
        before = model(**batch).logits
        for name, p in model.named_parameters():
            if "n1" in name and "lora_B" in name:
                p.mul_(2)
        after = model(**batch).logits
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_gradients_are_those_of_each_alone():
    model, batch = crowd(count=3).double(), asked(tiny("llama"), rows=3)
    names = ["n2", "n0", "n1"]
    own = {n: [p for k, p in model.named_parameters() if f".{n}." in k] for n in names}
    for p in (p for ps in own.values() for p in ps):
        p.requires_grad_(True)
    with rows(model, names):
        model(**batch).logits.square().sum().backward()
    for row, name in enumerate(names):
        activate(model, name)
        one = {k: v[row : row + 1] for k, v in batch.items()}
        wanted = torch.autograd.grad(model(**one).logits.square().sum(), own[name])
        for p, g in zip(own[name], wanted, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-9)


def test_in_training_each_draws_its_own_dropout():
    model = crowd(count=2, dropout=0.5)
    batch = asked(model, rows=2)
    with rows(model, ["n0", "n1"]), torch.no_grad():
        still = model(**batch).logits
        model.train()
        first, second = model(**batch).logits, model(**batch).logits
    assert (first - second).abs().amax((1, 2)).min() > 1e-4
    assert (first - still).abs().amax((1, 2)).min() > 1e-4


def test_an_adapter_of_fewer_bits_than_its_base_is_scaled_before_it_is_rounded():
    model = tiny("llama")
    for name, alpha in (("a", 100.0), ("b", 2.0)):
        shaken(model, LoRA(r=7, alpha=alpha), name, 1)
        for key, p in model.named_parameters():
            p.data = p.data.bfloat16() if f".{name}." in key else p.data
    batch = asked(model, rows=2)
    together = logits(model, batch, ["a", "b"])
    activate(model, "a")
    with torch.no_grad():
        torch.testing.assert_close(together[0], model(**batch).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_in_one_adapter_stays_in_its_own_rows(value):
    model, batch = crowd(count=2), asked(tiny("llama"), rows=2)
    wanted = logits(model, batch, ["n0", "n1"])
    with torch.no_grad():
        [p for k, p in model.named_parameters() if ".n1." in k and "lora_B" in k][-1][0, 0] = value
    found = logits(model, batch, ["n0", "n1"])
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert not found[1].isfinite().all()


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        model = crowd(count=2)
        batch = asked(model, rows=2)
        assert logits(model, batch, ["n0", "n1"]).isfinite().all()


# ---- one adapter: the product's own gradient ----------------------------------------------------------------------
def numbers(*shapes, grad=True):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(grad) for shape in shapes]


ONTO = {
    "any y": lambda x, y, a, b, w: Added.apply(x, y, a, b, Onto(0.7))[0],
    "its own y": lambda x, y, a, b, w: Added.apply(x, F.linear(x, w), a, b, Onto(0.7, w))[0] + y,
    "a view": lambda x, y, a, b, w: Added.apply(x, F.linear(x, w, w[:, 0]), a, b, Onto(0.7, w))[0] + y,
    "nothing of x": lambda x, y, a, b, w: Added.apply(x.detach(), F.linear(x.detach(), w), a, b, Onto(0.7, w))[0] + y,
}


@pytest.mark.parametrize("form", ONTO.values(), ids=ONTO)
def test_first_and_second_derivatives_are_differences(form):
    (w,) = numbers((4, 3), grad=False)
    given = numbers((1, 5, 3), (1, 5, 4), (2, 3), (4, 2))
    given = given if form is not ONTO["nothing of x"] else [given[0].detach(), *given[1:]]
    assert torch.autograd.gradcheck(lambda *t: form(*t, w), given)
    assert torch.autograd.gradgradcheck(lambda *t: form(*t, w), given)


def by_formula(delta, x, y, layer=None):
    a, b, scale = delta.low_rank()
    x = F.dropout(x, delta.dropout, delta.training)
    return y + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


USES = {
    "all layers": ("llama", LoRA(r=2, targets=("all",)), {}),
    "biases": ("opt", LoRA(r=2, targets=("all",)), {}),
    "trained biases": ("opt", (LoRA(r=2, targets=("all",)), BitFit()), {}),
    "two adapters of one": ("llama", (LoRA(r=2), LoRA(r=3)), {}),
    "behind it": ("llama", (LoRA(r=2, targets=("all",)), Adapter(4)), {}),
    "dropout": ("llama", LoRA(r=2, targets=("all",), dropout=0.5), {}),
    "adalora": ("llama", AdaLoRA(r=2, targets=("all",)), {}),
    "columns": ("phi3", LoRA(r=2, targets=("all",)), {}),
    "half precision": ("llama", LoRA(r=2, targets=("all",)), {"dtype": torch.bfloat16}),
    "conv1d": ("gpt2", LoRA(r=2, targets=("all",)), {}),
}


def trained(name, monkeypatch=None, checkpointing=False, exact=True):
    """Loss and gradients of all that trains, in fp64 where `exact`; with `monkeypatch` by plain operations."""
    family, method, fields = USES[name]
    model = shaken(tiny(family, **fields), method, "a", 1).train()
    model = model.double() if exact else model
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if monkeypatch:
        monkeypatch.setattr(slot, "added", by_formula)
        monkeypatch.setattr("deltatune.methods.low_rank.added", by_formula)
        monkeypatch.setattr("deltatune.methods.triplets.added", by_formula)
    torch.manual_seed(0)
    loss = model(**inputs(model)).loss
    loss.backward()
    return torch.cat(
        [loss.detach()[None].double(), *(p.grad.flatten().double() for p in model.parameters() if p.requires_grad)]
    )


@pytest.mark.parametrize("name", USES)
def test_loss_and_gradients_are_those_of_plain_operations(name, monkeypatch):
    ours, again = trained(name), trained(name)
    assert torch.equal(ours, again)
    assert torch.equal(ours, trained(name, checkpointing=True))
    plainly = trained(name, monkeypatch)
    # norms and turns are in fp32 in any case
    assert (ours - plainly).norm() <= 1e-6 * plainly.norm()


def test_in_half_precision_no_more_is_lost_than_by_plain_operations(monkeypatch):
    exact, ours = trained("half precision"), trained("half precision", exact=False)
    plainly = trained("half precision", monkeypatch, exact=False)
    assert (ours - exact).norm() <= 1.1 * (plainly - exact).norm()


def test_a_gradient_past_the_change_alone_would_be_seen(monkeypatch):
    """The fault guarded against: y taken for the layer's own where its bias trains."""
    monkeypatch.setattr(slot, "plain", lambda layer, hook: type(layer) is torch.nn.Linear)
    with pytest.raises(AttributeError):  # biases without a gradient
        test_loss_and_gradients_are_those_of_plain_operations("trained biases", monkeypatch)


def test_what_another_hook_has_seen_is_left_alone():
    """A hook in front of ours changes or keeps y: neither its gradient nor its values are ours to make."""
    model, seen = tiny("llama"), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _, args, y: seen.append(2 * y) or seen[-1])
    shaken(model, LoRA(r=2, targets=("all",)), "a", 1)
    x = torch.randn(1, 3, 32, requires_grad=True)
    y = layer(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    (delta,) = slot.deltas(layer)
    assert torch.equal(seen[0], 2 * F.linear(x, layer.weight))
    torch.testing.assert_close(
        found, torch.autograd.grad(by_formula(delta, x, 2 * F.linear(x, layer.weight)).sum(), x)[0]
    )


def test_autocast_has_its_gradients():
    model = shaken(tiny("llama"), LoRA(r=2, targets=("all",)), "a", 1).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs(model)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
