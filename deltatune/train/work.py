"""Work: what a run's steps cannot do without, the base's products and its attention, and the time of these alone.

The floor of a step: y = W x of every linear layer, W^T dy where a gradient passes on, dy x^T where W is trained, the
vocabulary projection of supervised tokens only, attention of each sequence with itself (of models with one stack). No
adapter, norm, activation, padding or optimizer is in it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attention import Heads, attention_modules, heads
from ..core.delta import Refusal
from ..core.site import is_linear, layers, output_layer, widths

if TYPE_CHECKING:
    from ..data.batch import Batch
    from .step import Step

Shape = tuple[int, int]  # (inputs, outputs) of a matrix product
MOST = 2e10  # floating-point operations of a product that is timed; a larger one is timed on fewer rows
REPEATS = 3


@dataclass
class Work:
    """What `step` computes while it trains: its layers are seen in the first forward pass, its sizes in every one.

    An observer of the loop as well: the seconds to compare with are those of the steps that it saw.
    """

    step: Step
    products: Counter[Shape] = field(default_factory=Counter)  # -> rows of one forward pass over `first` units
    head: list[Shape] = field(default_factory=list)  # the products of the vocabulary projection
    attention: Counter[tuple[Heads, bool]] = field(default_factory=Counter)  # (heads, causal) -> in forward passes
    first: int = 0
    passes: int = 0
    units: int = 0  # tokens, or rows of what has none
    targets: int = 0
    lengths: list[int] = field(default_factory=list)  # of the sequences
    seconds: float = 0.0
    steps: int = 0
    x: Tensor | None = None  # an empty tensor of the layers' dtype and device

    def __post_init__(self) -> None:
        self.handles: list[Any] = []
        self.attending = dict(attending(self.step.model))
        self.step.register_forward_pre_hook(self.before)
        self.step.register_forward_hook(self.after)

    def before(self, step: nn.Module, args: tuple[Any, ...]) -> None:
        if self.passes or not step.training:
            return
        for _, layer in layers(self.step.model):
            if layer in self.attending:
                self.handles.append(layer.register_forward_hook(self.attended))
            elif is_linear(layer):  # before it runs: a vocabulary projection with a forward hook is not left out
                self.handles.append(layer.register_forward_pre_hook(self.multiplied))

    def multiplied(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        if not layer.training:
            return  # an objective asks the model how it finishes its logits, once
        (k, n), x = widths(layer), args[0]
        found = [(k, n)] + [(n, k)] * x.requires_grad + [(k, n)] * layer.weight.requires_grad
        if layer is output_layer(self.step.model):
            self.head = found
            return
        self.products.update({shape: found.count(shape) * (x.numel() // k) for shape in found})
        self.x = x.detach().new_empty(0)

    def attended(self, module: nn.Module, args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        causal = bool(getattr(module, "is_causal", True))
        self.attention[self.attending[module], causal] += module.training * (3 if y.requires_grad else 1)

    def after(self, step: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not step.training:
            return
        batch: Batch = args[0]
        while self.handles:
            self.handles.pop().remove()
        ids, lens = batch.inputs.get("input_ids"), sequences(batch)
        self.first = self.first or (len(batch.labels) if ids is None else ids.numel())
        self.passes += 1
        self.units += sum(lens) or len(batch.labels)
        self.targets += batch.targets
        self.lengths += lens

    # ---- of the loop -------------------------------------------------------------------------------------------------
    def on_start(self, record: Mapping[str, Any]) -> None: ...

    def on_step(self, record: Mapping[str, Any]) -> None:
        self.steps += 1
        self.seconds += record["seconds"]

    def on_eval(self, record: Mapping[str, Any]) -> None: ...

    def on_end(self, record: Mapping[str, Any]) -> None: ...

    # ---- what it comes to --------------------------------------------------------------------------------------------
    def all(self) -> Iterator[tuple[Shape, float]]:
        """Every product and the rows it was over."""
        for shape, rows in self.products.items():
            yield shape, rows * self.units / self.first
        for shape in self.head:
            yield shape, self.targets

    def flops(self) -> float:
        """Floating-point operations of all steps; an attention's backward pass counts twice its forward pass."""
        squares = sum(float(n) ** 2 for n in self.lengths)
        found = sum(2.0 * k * n * rows for (k, n), rows in self.all())
        return found + sum(count * asked(h, causal) * squares for (h, causal), count in self.attention.items())

    def floor(self) -> float:
        """Seconds of the same on this machine: each product alone, on as many rows as a forward pass has on average."""
        if self.x is None:
            return 0.0
        found = 0.0
        for (k, n), rows in self.all():
            m = max(1, min(round(rows / self.passes), self.units // self.passes, int(MOST / (2.0 * k * n))))
            x, w = self.x.new_ones(m, k), self.x.new_ones(n, k)
            found += rows / m * timed(partial(F.linear, x, w), self.x.device)
        squares = sum(float(n) ** 2 for n in self.lengths)
        for (h, causal), count in self.attention.items():
            length = max(1, round((squares / len(self.lengths)) ** 0.5)) if self.lengths else 0
            found += count * squares / length**2 * self.softmax(h, length, causal) if length else 0.0
        return found

    def softmax(self, h: Heads, length: int, causal: bool) -> float:
        """Seconds of one sequence's attention, forward."""
        assert self.x is not None
        q, k, v = (self.x.new_ones(1, n, length, h.dim) for n in (h.query, h.kv, h.kv))
        ask = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=h.kv != h.query)
        return timed(ask, q.device)

    def record(self) -> dict[str, Any]:
        """For a run's summary: operations, the seconds of these alone, and what share of the steps' seconds that is."""
        if not (self.steps and self.seconds):
            return {}
        alone = self.floor()
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "flops": self.flops(),
            "floor_seconds": alone,
            "of_floor": alone / self.seconds,
        }


def attending(model: nn.Module) -> Iterator[tuple[nn.Module, Heads]]:
    """The attention of models with one stack of blocks; of others none is counted."""
    try:
        yield from ((m, heads(m)) for _, m, kind in attention_modules(model) if kind == "self")
    except Refusal:
        return


def asked(h: Heads, causal: bool) -> float:
    """Operations of one forward pass, by the square of a sequence's length: two products, half of them where causal."""
    return 4.0 * h.query * h.dim * (0.5 if causal else 1.0)


def sequences(batch: Batch) -> list[int]:
    """The lengths of a batch's sequences; [] where they are not of tokens."""
    if batch.lens:
        return list(batch.lens)
    mask = batch.inputs.get("attention_mask")
    return [] if mask is None or "input_ids" not in batch.inputs else mask.sum(1).tolist()


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
