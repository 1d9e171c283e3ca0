"""Routing: decide once per sequence, then let each sequence of a batch through changed or frozen blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from .attention import CROSS, packed_lens
from .delta import SLOT, Delta, Refusal, Wrapped, overrides
from .site import (
    Site,
    block_of,
    blocks,
    layers,
    name_of,
    pairs,
    parts,
    plays,
    read_first,
    reads_width,
    sequence,
    stem,
    towers,
    widths,
)

Call = tuple[tuple, Mapping[str, Any]]


class Now:
    """What holds during one forward pass, or one generation. A deep copy of a model starts without it."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None  # [rows, seq], True for real tokens; None: all are
        self.past = 0  # cached positions before this call
        self.rows = 1  # of the batch, for layers that see tokens without their rows
        self.lens: tuple[int, ...] | None = None  # of the sequences, where they are packed into one row
        self.hard: Tensor | None = None  # [rows or tokens, blocks]: True runs the changed block
        self.soft: Tensor | None = None  # the same as probabilities, with their graph
        self.chosen: Tensor | None = None  # `hard` by sequence [sequences, blocks]
        self.flipped: int | None = None  # the block whose decision is turned round, for the policy's gradient

    def __deepcopy__(self, memo: dict) -> Now:
        return Now()


class Watch(Delta):
    """Sits where a stack of blocks is called, and notes what is padding, packed and cached.

    Noted here and not in the blocks: checkpointing runs those again in the backward pass, after `packed` has ended.
    """

    def __init__(self, now: Now):
        super().__init__()
        self.now = now

    def look(self, layer: nn.Module, given: Call, pick: Callable[[Tensor], Tensor]) -> None:
        args, kwargs = given
        self.now.rows, self.now.lens = len(pick(read_first(args, kwargs))), packed_lens()
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self.now.past = int(past.get_seq_length()) if isinstance(past, Cache) else 0
        self.now.mask = pick(mask).bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


class Replay(Watch):
    """Sits at a block: where checkpointing runs it again in the backward pass, what held at its first run holds again.

    A loss may be of several forward passes (a chosen and a rejected answer), of which the last is what holds then.
    """

    def __init__(self, nows: tuple[Now, ...]):
        super().__init__(nows[0])
        self.nows = nows

    def look(self, layer: Any, given: Call, pick: Callable[[Tensor], Tensor]) -> None:
        if not (layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled()):
            return
        found, held = layer._gradient_checkpointing_func, [dict(vars(now)) for now in self.nows]
        checkpoint = getattr(found, "own", found)  # ours is there still where a forward pass failed before its block

        def kept(run: Callable[..., Any], *args: Any) -> Any:
            """In place of the block's own `checkpoint`, this once."""
            layer._gradient_checkpointing_func = checkpoint

            def again(*given: Any) -> Any:
                for now, was in zip(self.nows, held, strict=True):
                    vars(now).update(was)
                return run(*given)

            return checkpoint(again, *args)

        kept.own = checkpoint  # type: ignore[attr-defined]
        layer._gradient_checkpointing_func = kept


def replayed(model: nn.Module, *nows: Now) -> Iterator[tuple[Site, Delta]]:
    """What to put in so that `nows` are right in blocks that run again."""
    for name in blocks(model):
        yield Site(name, name), Replay(nows)


def watches(model: Any, now: Now) -> Iterator[tuple[Site, Delta]]:
    """What one policy or gate over the whole model needs to have put in."""
    yield watched(model, now)
    yield from replayed(model, now)


def watched(model: Any, now: Now, decoder: bool = False) -> tuple[Site, Delta]:
    """The watch at the stack that reads the input: the trunk, or the encoder of an encoder-decoder (or its decoder)."""
    source = stem(model)
    if pairs(model):
        source = model.get_decoder() if decoder else model.get_encoder()
    return watch(model, source, now)


def watch(model: nn.Module, stack: nn.Module, now: Now) -> tuple[Site, Delta]:
    name = name_of(model, stack)
    return Site(name, name), Watch(now)


Reading = tuple[Now, int | None]  # what a stack of blocks runs on now, and how many first tokens speak for a sequence


def readings(model: Any, pool: int | None) -> tuple[list[tuple[Site, Delta]], Callable[[Site], Reading]]:
    """The watches to put in, and the reading of each site. A decoder begins with its start token alone, so that one
    token speaks for the sequence; cross-attention's keys and values are the encoder's tokens."""
    first: Reading = (Now(), pool if pool or reads_ahead(model) else 16)
    if both := towers(model):
        own: dict[str, Reading] = {name_of(model, tower): (Now(), first[1]) for tower in both}
        found = [watch(model, model.get_submodule(name), now) for name, (now, _) in own.items()]
        found += replayed(model, *(now for now, _ in own.values()))
        return found, lambda site: own[parts(site.read)[0]]
    if not pairs(model):
        return list(watches(model, first[0])), lambda site: first
    second: Reading = (Now(), 1)
    decoder = parts(name_of(model, model.get_decoder()))

    def reading(site: Site) -> Reading:
        where = parts(site.read)
        crossed = not CROSS.isdisjoint(where) and (plays(site.read, "k") or plays(site.read, "v"))
        return second if where[: len(decoder)] == decoder and not crossed else first

    found = [watched(model, first[0]), watched(model, second[0], decoder=True)]
    return [*found, *replayed(model, first[0], second[0])], reading


def hidden_size(attention: nn.Module) -> int:
    """What an attention module reads: the input of its first projection."""
    return next(widths(m)[0] for m in attention.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2)


def width_of(delta: Delta, layer: nn.Module) -> int:
    """How wide what `delta` at `layer` makes its change from is."""
    return hidden_size(layer) if overrides(delta, "attend") else delta.width or widths(layer)[0]


def reads_ahead(model: Any) -> bool:
    """Whether a mean over all tokens is fair: in encoders. A causal model's later tokens are what it must predict."""
    return bool(pairs(model) or not any(getattr(m, "is_causal", False) for m in model.modules()))


def pooled(x: Tensor, now: Now, first: int | None) -> Tensor:
    """x [..., seq, d] -> the mean over the real tokens of each sequence (the `first` n of them), [sequences, d].

    Padding on either side does not count. A packed row holds several sequences.
    """
    lens = now.lens
    x = x.flatten(0, -3) if x.ndim > 2 else x.view(now.rows, -1, x.shape[-1])  # OPT's feed-forward sees no rows
    if lens is not None and x.shape[0] == 1:
        starts = accumulate(lens, initial=0)
        return torch.stack([x[0, a : a + min(n, first or n)].mean(0) for a, n in zip(starts, lens, strict=False)])
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if now.mask is not None and now.mask.numel() == real.numel():
        real = now.mask.reshape(real.shape).to(x.device)
    if first is not None:
        real = real & (real.cumsum(1) <= first)
    share = real.to(x.dtype)[..., None]
    return (x * share).sum(1) / share.sum(1).clamp(min=1)


def per_token(choice: Tensor, now: Now) -> Tensor:
    """A decision per sequence [sequences, n] -> per token of a packed row; as it is where rows are not packed."""
    lens = now.lens
    if lens is None or len(lens) != len(choice):
        return choice
    return choice.repeat_interleave(torch.tensor(lens, device=choice.device), 0)


def spread(choice: Tensor, y: Tensor) -> Tensor:
    """choice [n] for y [..., d]: [..., 1]. Beams and flattened tokens repeat each entry."""
    entries = y.shape[:-1].numel()
    if entries % len(choice):
        raise ValueError(
            f"{len(choice)} sequences were routed at their first tokens, and now {entries} tokens come: a cached "
            "sequence is continued with the batch it was begun with"
        )
    return choice.repeat_interleave(entries // len(choice)).view(*y.shape[:-1], 1)


class Policy(Delta):
    """2 logits per block from the mean embedding of a sequence; Gumbel-softmax with a straight-through gradient."""

    conditional = True  # deltas that start at zero leave nothing to choose between

    def __init__(self, layer: Any, blocks: list[str], now: Now, first: int | None, settings: Any):
        super().__init__()
        self.down = nn.Linear(reads_width(layer), settings.hidden)
        self.up = nn.Linear(settings.hidden, 2 * len(blocks))
        with torch.no_grad():  # in favour of tuning: a block that is never chosen never learns
            self.up.bias.copy_(torch.tensor([0.0, 1.0]).repeat(len(blocks)))
        self.blocks, self.now, self.first, self.settings = blocks, now, first, settings
        self.rates = {name: settings.policy_ratio for name, _ in self.named_parameters()}
        self.seen, self.tuned = 0, torch.zeros(len(blocks), dtype=torch.float64)
        self.waits = math.inf if settings.sample or first is None else first

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not self.now.past:  # a cached sequence keeps what was decided at its start
            self.decide(pooled(sequence(layer, y).to(self.down.weight.dtype), self.now, self.first))
        return y

    def decide(self, x: Tensor) -> None:
        """x [sequences, d] -> `now.hard` and `now.soft` [sequences (or tokens), blocks]."""
        logits = self.up(torch.tanh(self.down(x))).view(len(x), -1, 2)
        if self.training or self.settings.sample:
            logits = logits - torch.empty_like(logits).exponential_().log()
        soft = F.softmax(logits / self.settings.temperature, -1)[..., 1]
        hard = logits[..., 1] > logits[..., 0]
        if not self.training:
            self.seen, self.tuned = self.seen + len(x), self.tuned + hard.sum(0).double().cpu()
        self.now.chosen, self.now.hard = hard, per_token(hard, self.now)
        self.now.soft = per_token(soft, self.now) if soft.requires_grad else None

    def recount(self) -> None:
        self.seen, self.tuned = 0, torch.zeros(len(self.blocks), dtype=torch.float64)

    def shares(self) -> dict[str, Any]:
        share = (self.tuned / max(self.seen, 1)).tolist()
        return {"share_tuned": dict(zip(self.blocks, share, strict=True)), "sequences": self.seen}


class Routed(Wrapped):
    """A delta that only the sequences routed to its changed block hear. `separate`: its own policy gradient."""

    conditional = True

    def __init__(self, inner: Delta, now: Now, block: int, separate: bool):
        super().__init__(inner)
        self.now, self.block, self.separate, self.conditional = now, block, separate, True

    def open(self, choice: Tensor | None) -> Tensor:
        """[n]: the decisions of `choice` [n, blocks] on this block, turned round where that is asked for."""
        if choice is None:
            raise RuntimeError("the policy did not run before the blocks: was the embedding skipped (inputs_embeds)?")
        return choice[:, self.block] ^ (self.now.flipped == self.block)

    def attend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.attend(k, v)

    def visible(self, rows: int) -> Tensor:
        return spread(self.open(self.now.chosen), torch.empty(rows, 1))[:, 0]

    def shift(self) -> int:
        """Sequences that do not see a prefix keep their places, so all do."""
        return 0

    def heard(self, plain: Tensor, changed: Tensor) -> Tensor:
        now = self.now
        open_ = spread(self.open(now.hard), plain)
        out = torch.where(open_, changed, plain)
        if self.separate and now.soft is not None:
            soft = spread(now.soft[:, self.block], plain).to(plain.dtype)
            out = out + (soft - soft.detach()) * (changed - plain)
        return out

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.heard(x, self.inner.before(layer, x))

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.heard(y, self.inner.after(layer, x, y))


class Block(Delta):
    """x_l = I F'(x) + (1 - I) F(x) at a whole block: dL/dI = <dL/dx_l, F'(x) - F(x)>.

    The forward pass is the routed block's own. Where a gradient is wanted, the block runs once more with every
    decision turned round, without a graph and without a cache: the difference of the two is all that dL/dI needs.
    """

    def __init__(self, now: Now, block: int):
        super().__init__()
        self.now, self.block = now, block

    def wrap(self, layer: nn.Module, given: Call, output: Any) -> Any:
        now, hidden = self.now, output[0] if isinstance(output, tuple) else output
        if now.soft is None or not torch.is_grad_enabled():
            return output
        if getattr(layer, SLOT).rows is not None:
            raise Refusal(
                "a policy cannot be trained through rows(): the block would run for other adapters' rows too.",
                found=f"{self.site.write} with rows() and gradients",
                instead="activate() the adapter and train it alone, or torch.no_grad() for inference",
            )
        if now.past:
            raise Refusal(
                "a policy's gradient needs the block's second run to see what the cache held before the first.",
                found=f"{now.past} cached positions and gradients",
                instead="torch.no_grad() for generation, use_cache=False for training",
            )
        difference = (hidden.detach() - self.turned(layer, given)) * self.sign(hidden)
        soft = spread(now.soft[:, self.block], hidden).to(hidden.dtype)
        hidden = hidden + (soft - soft.detach()) * difference
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def sign(self, hidden: Tensor) -> Tensor:
        """+1 where the changed block ran, -1 where the frozen one did."""
        assert self.now.hard is not None
        return torch.where(spread(self.now.hard[:, self.block], hidden), 1.0, -1.0).to(hidden.dtype)

    @torch.no_grad()
    def turned(self, layer: Any, given: Call) -> Tensor:
        """The block's output under the opposite decisions. Its other hooks do not run again, and nothing is cached."""
        args, kwargs = ([uncached(v) for v in given[0]], {k: uncached(v) for k, v in given[1].items()})
        kwargs |= {"use_cache": False} if "use_cache" in kwargs else {}
        self.now.flipped = self.block
        devices = [args[0].device] if args and args[0].is_cuda else []
        try:
            with torch.random.fork_rng(devices=devices):
                out = layer.forward(*args, **kwargs)
                # what changes the block's output itself (an adapter at its end) is a hook too
                return getattr(layer, SLOT).post(layer, args, out[0] if isinstance(out, tuple) else out)
        finally:
            self.now.flipped = None


def uncached(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


class Copied(Delta):
    """A trainable copy of one layer, W_hat x + b_hat in place of W x + b: together, the copy of a block."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.copy = copy.deepcopy(layer).requires_grad_(True)
        self.copy._modules.pop(SLOT, None)
        for hooks in (self.copy._forward_hooks, self.copy._forward_pre_hooks):
            hooks.clear()

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.copy(x).to(y.dtype)


def copies_of_blocks(model: nn.Module) -> Iterator[tuple[Site, Delta]]:
    """A copy of every layer with parameters in the blocks. T5's shared position table stays frozen: it has no rows."""
    for name, layer in layers(model):
        own = layer._parameters
        if not block_of(name) or not any(p is not None for p in own.values()) or isinstance(layer, nn.Embedding):
            continue
        if any(True for _ in layer.children() if not isinstance(_, nn.ModuleDict)) or hasattr(
            getattr(layer, "weight", None), "quant_state"
        ):
            raise Refusal(
                "the full form of SpotTune copies each layer of a block.",
                found=f"{name}: {type(layer).__name__}, a packed layer or one with layers of its own",
                instead="SpotTune(of=(LoRA(),))",
            )
        yield Site(name, name), Copied(layer)


class Beside(Delta):
    """What an in-place method would train of a layer, kept beside it: W_hat x + b_hat with the named ones its own."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(layer.get_parameter(name).detach().clone()))

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        twin = copy.copy(layer)  # shares everything with the layer but this one table
        twin._parameters = {**layer._parameters, **self._parameters}
        return twin.forward(x).to(y.dtype)
