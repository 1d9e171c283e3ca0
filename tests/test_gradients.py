"""Forward and gradient in float64: our layers against the papers' equations in NumPy, differentiated by differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deltatune import IA3, Adapter, Prefix, Prompt, attach
from deltatune.core.attach import parameters
from deltatune.core.slot import deltas
from deltatune.methods._bottleneck import Bottleneck
from models import tiny

Arrays = dict[str, Any]  # of the delta by its own names, of the layer after "base.", and the input "x"


def linear(a: Arrays, name: str, x: Any) -> Any:
    y = x @ a[f"{name}weight"].T
    return y + a[f"{name}bias"] if f"{name}bias" in a else y


def gelu(z: Any) -> Any:
    return z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def norm(a: Arrays, t: Any) -> Any:
    z = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-12)
    return z * a["base.weight"] + a["base.bias"]


def bottleneck(a: Arrays, h: Any) -> Any:
    """W2 gelu(W1 h + b1) + b2."""
    return linear(a, "up.", gelu(linear(a, "down.", h)))


def behind(a: Arrays) -> Any:
    """y + A(y), y = W x + b."""
    y = linear(a, "base.", a["x"])
    return y + bottleneck(a, y)


def beside(a: Arrays) -> Any:
    """W_down (silu(W_gate x) * W_up x) + 4 A(x)."""
    gate, up = (linear(a, f"base.{name}_proj.", a["x"]) for name in ("gate", "up"))
    return linear(a, "base.down_proj.", gate / (1 + np.exp(-gate)) * up) + 4 * bottleneck(a, a["x"])


def before_norm(a: Arrays) -> Any:
    """LN(t + A(LN(t)))."""
    return norm(a, a["x"] + bottleneck(a, norm(a, a["x"])))


def attention(a: Arrays) -> Any:
    """softmax(q [P_k; K]^T / sqrt d) [P_v; V]."""
    q, k, v = (linear(a, f"base.{n}.", a["x"]).reshape(2, 3, 4, 8).swapaxes(1, 2) for n in ("query", "key", "value"))
    k, v = (np.concatenate([np.stack([a[n]] * 2), own], 2) for n, own in (("k", k), ("v", v)))
    scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(8))
    return (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(2, 3, 32)


IDS = torch.tensor([[97, 5, 98], [98, 98, 7]])  # 97 and 98 are the prompt's, one of them three times


def rows(a: Arrays) -> Any:
    table = np.concatenate([a["base.weight"], a["prompt_embeddings"]])
    return table[a["x"]]


BLOCK = "bert.encoder.layer.1"
CASES: dict[str, tuple[str, Any, str, Any, Callable[[Arrays], Any]]] = {  # family, method, layer, width
    "ia3 output": ("bert", IA3(), f"{BLOCK}.attention.self.key", 32,
                   lambda a: a["ia3_l"] * linear(a, "base.", a["x"])),
    "ia3 input": ("bert", IA3(), f"{BLOCK}.output.dense", 48, lambda a: linear(a, "base.", a["ia3_l"] * a["x"])),
    "prefix": ("bert", Prefix(2), f"{BLOCK}.attention.self", 32, attention),
    "prompt": ("bert", Prompt(2), "bert.embeddings.word_embeddings", IDS, rows),
    "houlsby attention": ("bert", Adapter(3), f"{BLOCK}.attention.output.dense", 32, behind),
    "houlsby ffn": ("bert", Adapter(3), f"{BLOCK}.output.dense", 48, behind),
    "pfeiffer": ("bert", Adapter(3, where=("block",)), f"{BLOCK}.output.LayerNorm", 32, before_norm),
    "parallel": ("llama", Adapter(3, where=("ffn",), form="parallel", scale=4.0), "model.layers.1.mlp", 32, beside),
}  # fmt: skip


def check(family: str, method: Any, path: str, given: Any, equation: Callable[[Arrays], Any]) -> None:
    """Our layer's output, and the gradients of what trains and of the input, are the equation's."""
    g = torch.Generator().manual_seed(0)
    model = attach(tiny(family), method).double()
    for p in parameters(model, "default").values():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    layer = model.get_submodule(path)
    (delta,) = deltas(layer)
    x = given if isinstance(given, torch.Tensor) else torch.randn(2, 3, given, generator=g, dtype=torch.float64)
    trained = dict(delta.named_parameters()) | ({"x": x.requires_grad_()} if x.is_floating_point() else {})
    own = {f"base.{n}": p for n, p in layer.named_parameters() if "delta_slot" not in n}
    arrays = {n: t.detach().numpy().copy() for n, t in ({"x": x} | own | trained).items()}
    found = layer(x)
    found = found[0] if isinstance(found, tuple) else found
    np.testing.assert_allclose(found.detach().numpy(), equation(arrays), rtol=0, atol=1e-11)
    dy = torch.randn(found.shape, generator=g, dtype=torch.float64)
    ours = torch.autograd.grad((found * dy).sum(), list(trained.values()))
    for name, gradient in zip(trained, ours, strict=True):
        wanted = differences(lambda: float((equation(arrays) * dy.numpy()).sum()), arrays[name])
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-6, atol=1e-6, err_msg=name)
        assert np.abs(wanted).max() > 1e-3, f"{name} changes nothing"


def differences(loss: Callable[[], float], array: Any, e: float = 1e-6) -> Any:
    """d loss / d array, the array moved in place."""
    out = np.zeros_like(array)
    for at in np.ndindex(array.shape):
        was, sides = array[at], []
        for step in (e, -e):
            array[at] = was + step
            sides.append(loss())
        array[at], out[at] = was, (sides[0] - sides[1]) / (2 * e)
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradient_are_the_equations(case):
    check(*case)


CUT = {  # the same forward pass, without a part of its gradient
    "input": lambda self, h, y: whole(self, h.detach(), y),
    "weights": lambda self, h, y: whole(self, h, y).detach() + 0 * whole(self, h, y),
    "half": lambda self, h, y: 0.5 * whole(self, h, y) + 0.5 * whole(self, h, y).detach(),
}
whole = Bottleneck.change


@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
def test_a_gradient_that_is_cut_is_seen(monkeypatch, cut):
    monkeypatch.setattr(Bottleneck, "change", cut)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(*CASES["houlsby ffn"])
