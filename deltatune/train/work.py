"""Work: what a run's steps cannot do without, the base's products and its attention, and the time of these alone.

The floor of a step: y = W x of every linear layer that ran, W^T dy where a gradient passes on, dy x^T where W is
trained, the vocabulary projection of the tokens asked for. No adapter, norm, activation or optimizer is in it, no
padding (by each pass's own share of text), nothing that is computed once more for the backward pass.

Attention is in it where every sequence is known to see all of itself and nothing else: rows of one text each, padded or
packed, of models with one stack of blocks. Left out is that of encoder-decoders and other models of several stacks, of
answers side by side behind one text (objectives.branches), of rows longer than a window, of pictures and of sounds.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attention import CROSS, Heads, attention_modules, heads
from ..core.compiling import compiles, parts
from ..core.delta import Refusal
from ..core.site import block_of, experts, is_conv1d, is_linear, layers, pairs, plays, trunk, widths
from ..data.encode import IGNORE
from .guard import Interrupted

if TYPE_CHECKING:
    from ..data.batch import Batch
    from .step import Step

Shape = tuple[int, int]  # (inputs, outputs) of a matrix product
Place = tuple[bool, bool, Shape]  # of a layer: whether it reads the decoder's tokens, whether it is in a block
MOST = 2e10  # floating-point operations of a product that is timed; a larger one is timed on fewer rows
REPEATS = 3
WAITING = 64  # passes whose masks stay on the device until they are looked at


@dataclass(frozen=True)
class Pass:
    """One forward pass, as far as it is known without waiting for the device."""

    seen: Counter[tuple[Place, int, bool, bool]]
    attended: Counter[tuple[Heads, bool]]
    shares: tuple[tuple[Tensor | int, int], tuple[Tensor | int, int]]  # of the model's texts and of a decoder's
    lengths: Tensor | Sequence[int] | None  # of its rows
    window: int | None


@dataclass
class Work:
    """What `step` computes while it trains, added up over its passes until `close` takes the hooks away. The last few
    passes wait to be added until then, or until `settle`.

    An observer of the loop as well: the seconds to compare with are those of the steps that it saw.
    """

    step: Step
    rows: dict[Shape, float] = field(default_factory=partial(defaultdict, float))  # of its products; no padding
    calls: Counter[Shape] = field(default_factory=Counter)
    attention: Counter[tuple[Heads, bool]] = field(default_factory=Counter)  # (heads, causal) -> squares of lengths
    squares: float = 0.0  # of the lengths of all sequences that attention is known of
    sequences: int = 0
    seconds: float = 0.0
    steps: int = 0
    x: Tensor | None = None  # an empty tensor of the layers' dtype and device

    def __post_init__(self) -> None:
        model: Any = self.step.model
        self.running, self.mask, self.two = False, None, pairs(model)
        self.layer: dict[Shape, Any] = {}  # one that has such a product
        self.seen: Counter[tuple[Place, int, bool, bool]] = Counter()  # numbers read, whether x and W have gradients
        self.attended: Counter[tuple[Heads, bool]] = Counter()  # of one pass: forward passes, a backward one is two
        self.waiting: list[Pass] = []
        self.handles: list[Any] = [
            self.step.register_forward_pre_hook(self.before),
            self.step.register_forward_hook(self.after),
            *(m.register_forward_pre_hook(self.reads, with_kwargs=True) for m in dict.fromkeys((model, trunk(model)))),
            *(m.register_forward_hook(partial(self.attends, h)) for m, h in attending(model)),
        ]
        places: dict[nn.Module, Place] = {}
        for name, layer in layers(model):
            # before it runs: a vocabulary projection with a forward hook is not left out. A router has a weight alone
            if is_linear(layer) and (hasattr(layer, "in_features") or is_conv1d(layer)):
                k, n = widths(layer)
                self.layer |= {(k, n): layer, (n, k): layer}
                place = (self.two and not encoded(name), block_of(name) is not None, (k, n))
                self.handles.append(layer.register_forward_pre_hook(partial(self.multiplies, place)))
                places[layer] = place
        for part in parts(model):
            inner = [(places[m], m) for m in part.modules() if m in places]
            self.handles.append(part.register_forward_hook(partial(self.whole, inner)))

    def close(self) -> None:
        self.settle()
        while self.handles:
            self.handles.pop().remove()

    # ---- of one pass -------------------------------------------------------------------------------------------------
    def before(self, step: nn.Module, args: tuple[Any, ...]) -> None:
        self.running, self.mask = step.training, None
        self.seen.clear()
        self.attended.clear()

    def reads(self, model: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        if self.running and model.training:  # an objective asks the model how it finishes its logits, in eval mode
            self.mask = given.get("attention_mask")

    def multiplies(self, place: Place, layer: Any, args: tuple[Tensor, ...]) -> None:
        if torch.compiler.is_compiling():
            return  # `whole` counts
        x = args[0]
        if self.running and layer.training and (size := x.numel()):
            self.seen[place, size, x.requires_grad, layer.weight.requires_grad] += 1
            self.x = x.detach().new_empty(0) if self.x is None else self.x

    def whole(self, inner: Sequence[tuple[Place, Any]], part: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        """A compiled part's products: those as wide as its input read it, the others what is made of it."""
        if not (self.running and part.training and compiles(part) and args and isinstance(y, Tensor)):
            return
        self.x = y.detach().new_empty(0) if self.x is None else self.x
        for place, layer in inner:
            k, x = place[2][0], args[0]
            onward = x.requires_grad if k == x.shape[-1] else y.requires_grad
            self.seen[place, y.numel() // y.shape[-1] * k, onward, layer.weight.requires_grad] += 1

    def attends(self, h: Heads, module: nn.Module, args: Any, output: Any) -> None:
        if self.running and module.training:
            y = output[0] if isinstance(output, tuple) else output
            self.attended[h, bool(getattr(module, "is_causal", True))] += 3 if y.requires_grad else 1

    def after(self, step: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self.running:
            return
        self.running = False  # what a checkpoint runs once more is not seen
        batch: Batch = args[0]
        mask = self.mask if "input_ids" in batch.inputs else None
        texts = said = share(mask)
        if self.two and not step.objective.task_head:  # under a task head a decoder reads the encoder's texts
            said = share(((batch.labels if batch.choices is None else batch.choices) != IGNORE).flatten(0, -2))
        window = getattr(step.model.config.get_text_config(), "sliding_window", None) if self.attended else None
        lengths = None if batch.lens or mask is None or mask.ndim != 2 else mask.sum(1)
        self.waiting.append(Pass(self.seen.copy(), self.attended.copy(), (texts, said), batch.lens or lengths, window))
        if len(self.waiting) >= WAITING:
            self.settle()

    def settle(self) -> None:
        """Add up the passes that wait, with one look at the device for all that their masks hold."""
        waiting, self.waiting = self.waiting, []
        each = (x for one in waiting for x in (one.shares[0][0], one.shares[1][0], one.lengths))
        asked = [x for x in each if isinstance(x, Tensor)]
        flat = torch.cat([x.reshape(-1) for x in asked]).tolist() if asked else []
        ends = accumulate(x.numel() for x in asked)
        told = iter([flat[end - x.numel() : end] for x, end in zip(asked, ends, strict=True)])
        for one in waiting:
            texts, said = ((next(told)[0] if isinstance(real, Tensor) else real, of) for real, of in one.shares)
            self.count(one, (texts, said), next(told) if isinstance(one.lengths, Tensor) else one.lengths or ())

    def count(self, one: Pass, shares: Sequence[tuple[int, int]], lengths: Sequence[int]) -> None:
        """Add up a pass whose (tokens that carry text, all of them) and lengths of rows are known."""
        texts, said = shares
        for ((decoder, inside, (k, n)), size, onward, trained), count in one.seen.items():
            real, tokens = said if decoder else texts
            rows = size / k * real / tokens if inside or size == k * tokens else size / k
            for shape in [(k, n)] + [(n, k)] * onward + [(k, n)] * trained:
                self.rows[shape] += count * rows
                self.calls[shape] += count
        if one.attended and lengths and max(lengths) <= (one.window or max(lengths)):
            squares = sum(float(n) ** 2 for n in lengths)
            self.squares, self.sequences = self.squares + squares, self.sequences + len(lengths)
            self.attention.update({key: count * squares for key, count in one.attended.items()})

    # ---- of the loop -------------------------------------------------------------------------------------------------
    def on_start(self, record: Mapping[str, Any]) -> None: ...

    def on_step(self, record: Mapping[str, Any]) -> None:
        self.steps += 1
        self.seconds += record["seconds"]

    def on_eval(self, record: Mapping[str, Any]) -> None: ...

    def on_end(self, record: Mapping[str, Any]) -> None:
        self.close()

    # ---- what it comes to --------------------------------------------------------------------------------------------
    def flops(self) -> float:
        """Floating-point operations of all steps; an attention's backward pass counts twice its forward pass."""
        self.settle()
        found = sum(2.0 * k * n * rows for (k, n), rows in self.rows.items())
        return found + sum(asked(h, causal) * squares for (h, causal), squares in self.attention.items())

    def floor(self) -> float:
        """Seconds of the same on this machine: each product alone, on as many rows as a call has on average."""
        self.settle()
        found = 0.0
        for (k, n), rows in self.rows.items():
            m = max(1, min(round(rows / self.calls[k, n]), int(MOST / (2.0 * k * n))))
            found += rows / m * self.product(k, n, m)
        length = max(1, round((self.squares / max(self.sequences, 1)) ** 0.5))
        for (h, causal), squares in self.attention.items():
            found += squares / length**2 * self.softmax(h, length, causal)
        return found

    def product(self, k: int, n: int, m: int) -> float:
        """Seconds of one product of m rows, with a layer's own weight where that is a matrix of such numbers."""
        assert self.x is not None
        w = self.layer[k, n].weight.detach()
        if w.dtype != self.x.dtype or sorted(w.shape) != sorted((k, n)):  # quantised
            w = self.x.new_ones(n, k)
        return timed(partial(F.linear, self.x.new_ones(m, k), w if w.shape == (n, k) else w.T), w.device)

    def softmax(self, h: Heads, length: int, causal: bool) -> float:
        """Seconds of one sequence's attention, forward."""
        assert self.x is not None
        q, k, v = (self.x.new_ones(1, n, length, h.dim) for n in (h.query, h.kv, h.kv))
        ask = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=h.kv != h.query)
        return timed(ask, q.device)

    def record(self) -> dict[str, Any]:
        """For a run's summary: operations, the seconds of these alone, and what share of the steps' seconds that is.

        A timing that fails, or that Ctrl-C ends, costs nobody a result: `floor` says why there is none.
        """
        if not (self.steps and self.seconds):
            return {}
        told = {"steps": self.steps, "seconds": self.seconds}
        if experts(self.step.model):
            return told | {"floor": "not counted: experts multiply by parameters that are no layers"}
        told["flops"] = self.flops()
        try:
            alone = self.floor()
        except (Exception, Interrupted) as error:
            said = str(error).partition("\n")[0]
            return told | {"floor": f"not timed: {said or type(error).__name__}"}
        return told | {"floor_seconds": alone, "of_floor": alone / self.seconds}


def attending(model: nn.Module) -> Iterator[tuple[nn.Module, Heads]]:
    """The attention of models with one stack of blocks; of others none is counted."""
    try:
        yield from ((m, heads(m)) for _, m, kind in attention_modules(model) if kind == "self")
    except Refusal:
        return


def encoded(name: str) -> bool:
    """Whether a layer of an encoder-decoder reads the encoder's tokens: its own, and what the decoder asks it for."""
    parts = name.split(".")
    return "encoder" in parts or (not CROSS.isdisjoint(parts) and any(plays(name, role) for role in ("k", "v")))


def share(mask: Tensor | None) -> tuple[Tensor | int, int]:
    """(tokens that carry text, all of them) by a mask [rows, seq], or of keys that a query sees [*, queries, keys]; the
    first stays on the device."""
    if mask is None:
        return 1, 1
    seen = mask if mask.ndim == 2 else mask.any(-2)
    return seen.count_nonzero(), seen.numel()


def asked(h: Heads, causal: bool) -> float:
    """Operations of one forward pass, by the square of a sequence's length: two products, half of them where causal."""
    return 4.0 * h.query * h.dim * (0.5 if causal else 1.0)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the median of some runs after one that warms up."""
    found = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
    return statistics.median(found[1:])
