"""From hidden states to the loss of every token, without ever holding the logits of a whole batch.

A language model's last step is by far its widest: n tokens make n x vocabulary logits, a log-softmax and a gradient of
the same size. Here the states in front of the vocabulary projection are taken out of the model, those that predict a
supervised token are kept, and the projection runs on a piece of them at a time, the gradient of the states made in the
same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import SLOT
from ..core.site import output_layer
from ..core.vocabulary import unseeded
from ..evaluate.generate import evaluating

CHUNK = 1 << 24  # logits held at a time: 64 MiB in fp32; fewer multiply slower, more fall out of the caches
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-5}  # relative; the logits of half precision differ by its rounding
COARSE = 2e-2
SHOWN, ENLARGED = 4, 50.0  # states that show how logits are finished
CAPS = ("final_logit_softcapping", "logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


# ---- what a family does to its logits --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Finish:
    """logits -> cap * tanh((scale * logits + bias) / cap), in fp32; the defaults change nothing."""

    scale: float = 1.0
    cap: float | None = None
    bias: Tensor | None = None  # [vocabulary], never trained

    def __call__(self, logits: Tensor) -> Tensor:
        logits = exact(logits)
        logits = logits if self.scale == 1.0 else logits * self.scale
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def back(self, grad: Tensor, finished: Tensor) -> Tensor:
        """The gradient of what came in, from that of what went out. Both [n, vocabulary]; `grad` is overwritten."""
        if self.cap is not None:
            grad.mul_(1 - (finished / self.cap).square())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def exact(logits: Tensor) -> Tensor:
    """Half-precision logits in fp32; others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def told(model: Any) -> Finish:
    """What the model's configuration says of its logits: Gemma's cap, Granite's and Cohere's scales, BART's bias."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    bias = getattr(model, "final_logits_bias", None)
    return Finish(
        float(scale or 1.0) / float(divisor or 1.0),
        next((cap for name in CAPS if (cap := getattr(config, name, None))), None),
        None if bias is None or not bool(bias.any()) else bias.detach().float().view(-1),
    )


SETTLED: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def settled(model: Any, call: Callable[[], Any]) -> bool:
    """Whether `told` is all that the model does to its logits, asked of the model itself: in evaluation mode and beside
    every random number, so that it is the same whenever it is asked. Kept until the configuration or the head changes.

    A cap leaves small logits almost as they are: the head is shown its first states enlarged too.
    """
    head, finish = output_layer(model), told(model)
    facts = (finish.scale, finish.cap, finish.bias is None, id(head), next(head.parameters()).dtype)
    if model not in SETTLED or SETTLED[model][0] != facts:
        with evaluating(model), unseeded(model), torch.no_grad(), taken(head, enlarged) as found:
            theirs = call().logits
            shown = enlarged(found[0])
            ours = finish(head(shown))
        near = CLOSE.get(theirs.dtype, COARSE) * exact(theirs).abs().amax().clamp(min=1e-6)
        same = ours.shape == theirs.shape and bool((ours - exact(theirs)).abs().amax() <= near)
        SETTLED[model] = (facts, same)
    return SETTLED[model][1]


def enlarged(states: Tensor) -> Tensor:
    """[rows, up to 2 SHOWN, d]: the first states as they are, and so large that a cap would show."""
    first = states[:, :SHOWN]
    return torch.cat([first, ENLARGED * first], 1)


# ---- the states ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Projection:
    """What turns states [n, d] into logits [n, vocabulary]; `head` None: the states are the logits already."""

    head: Any
    finish: Finish

    def logits(self, states: Tensor) -> Tensor:
        """[n, vocabulary], at least in fp32."""
        return self.finish(states if self.head is None else self.head(states))

    def losses(self, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy [n] of the tokens `wanted` [n], at least in fp32; whether each was the likeliest [n])."""
        head = self.head
        if not len(wanted) or not in_pieces(head):
            logits = self.logits(states)
            return F.cross_entropy(logits, wanted, reduction="none"), logits.detach().argmax(-1) == wanted
        return Chunked.apply(entered(head, states), head.weight, head.bias, wanted, self.finish)


def in_pieces(head: Any) -> bool:
    """Whether the projection runs on a piece of the tokens at a time: it is a plain layer, and nobody changes it."""
    plain = type(head) is nn.Linear and SLOT not in head._modules
    return plain and not head._forward_hooks and not head._forward_pre_hooks_with_kwargs


def entered(head: nn.Module, states: Tensor) -> Tensor:
    """`states` past the hooks in front of `head`: in pieces it is not called, and they see all of it at once."""
    for hook in head._forward_pre_hooks.values():
        if (found := hook(head, (states,))) is not None:
            states = found[0] if isinstance(found, tuple) else found
    return states


def states(model: Any, call: Callable[[], Any], at: tuple[Tensor, ...]) -> tuple[Tensor, Projection]:
    """The states [n, d] at `at` = (rows [n], positions [n]) of the forward pass `call()`, and what projects them.

    The model's own logits are left out; where we do not finish logits as the model does, they take the place of the
    states.
    """
    if not settled(model, call):
        return call().logits[at], Projection(None, Finish())
    head = output_layer(model)
    with taken(head, lambda states: states[:, :0]) as found:
        call()
    return found[0][at], Projection(head, told(model))


@contextmanager
def taken(head: nn.Module, shown: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """What `head` is called with inside, [rows, seq, d]; it multiplies what `shown` makes of it."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return (shown(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(take, prepend=True)
    try:
        yield found
    finally:
        handle.remove()


# ---- the loss --------------------------------------------------------------------------------------------------------
class Chunked(torch.autograd.Function):
    """(states [n, d], weight [v, d], bias [v] or None, wanted [n], finish) -> (losses [n], hits [n]).

    dloss/dlogits = softmax - onehot, so that the gradient of a piece's states is known as soon as its logits are. The
    weight's is a sum over tokens and is made only where it is trained: for equal weights of all tokens in the same
    pass, for others in a second one.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, finish: Finish) -> Any:
        needs = ctx.needs_input_grad
        given = zip((states, weight, bias), needs[:3], strict=True)
        grads = [torch.zeros_like(t) if t is not None and needed else None for t, needed in given]
        losses = exact(states.new_empty(len(wanted)))
        hits = torch.empty(len(wanted), dtype=torch.bool, device=states.device)
        for piece in pieces(len(wanted), len(weight)):
            losses[piece], hits[piece], p = ahead(states[piece], weight, bias, wanted[piece], finish, any(needs))
            if p is not None:
                collect(grads, piece, p, (states, weight))
        ctx.finish, ctx.wanted = finish, wanted
        trained = any(needs[1:3])
        ctx.save_for_backward(*grads, *((states, weight, bias) if trained else (None, None, None)))
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph: what was made in the forward pass is a constant here
            raise RuntimeError("losses made in pieces have no second derivative: take it of the model's own logits")
        d_states, d_weight, d_bias, states, weight, bias = ctx.saved_tensors
        out = None if d_states is None else d_states * g[:, None].to(d_states.dtype)
        if d_weight is None and d_bias is None:
            return out, None, None, None, None
        if bool((g == g[0]).all()):
            scaled = [None if t is None else t * g[0].to(t.dtype) for t in (d_weight, d_bias)]
            return out, *scaled, None, None
        grads = [None, *(None if t is None else torch.zeros_like(t) for t in (d_weight, d_bias))]
        for piece in pieces(len(g), len(weight)):
            p = ahead(states[piece], weight, bias, ctx.wanted[piece], ctx.finish, True)[2]
            assert p is not None
            collect(grads, piece, p * g[piece, None].to(p.dtype), (states, weight))
        return out, *grads[1:], None, None


def pieces(n: int, vocabulary: int) -> Iterator[slice]:
    """Slices of n tokens, equal to one, of CHUNK logits at most."""
    count = max(1, -(-n * vocabulary // CHUNK))
    size = -(-n // count)
    yield from (slice(i, min(i + size, n)) for i in range(0, n, size))


def ahead(
    states: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, finish: Finish, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(losses [n], hits [n], the gradient of the head's output [n, v] or None) of one piece."""
    finished = finish(F.linear(states, weight, bias))
    at = finished.gather(1, wanted[:, None])[:, 0]
    top, first = finished.max(1)
    p = torch.softmax(finished, -1)
    # log sum exp, from the likeliest token's share: never an underflow, and no pass more over the logits
    losses = top - p.gather(1, first[:, None])[:, 0].log() - at
    if not grad:
        return losses, first == wanted, None
    p.scatter_add_(1, wanted[:, None], p.new_full((len(wanted), 1), -1.0))
    return losses, first == wanted, finish.back(p, finished).to(states.dtype)


def collect(grads: list[Tensor | None], piece: slice, p: Tensor, given: tuple[Tensor, Tensor]) -> None:
    """Add one piece's p [n, v] to the gradients of (states, weight, bias), of those that are wanted."""
    states, weight = given
    d_states, d_weight, d_bias = grads
    if d_states is not None:
        torch.mm(p, weight, out=d_states[piece])
    if d_weight is not None:
        d_weight.addmm_(p.T, states[piece])
    if d_bias is not None:
        d_bias.add_(p.sum(0))
