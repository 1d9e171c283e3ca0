"""Bottleneck adapters: h + s W2 act(W1 h), after a layer (arXiv:1902.00751) or beside it (arXiv:2110.04366)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.delta import Delta
from ..core.registry import finite, method, whole
from ..core.site import Site, find, spans, widths

ENDS = {"attention": ("q", "o"), "ffn": ("up", "down")}
FORMS = ("sequential", "parallel")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}


@method(
    "adapter",
    paper="1902.00751",
    kind="adapter",
    lr=1e-3,
    tiny={"": {"bottleneck": 4}, "parallel": {"bottleneck": 4, "form": "parallel", "scale": 4.0}},
)
@dataclass(frozen=True)
class Adapter:
    """Two small layers with a non-linearity after (sequential) or beside (parallel) attention and feed-forward.

    Parameters: 2 d m + m + d per adapter. W2 starts at zero, so that the model starts as it was.
    """

    bottleneck: int = 64
    where: tuple[str, ...] = ("attention", "ffn")
    form: str = "sequential"
    act: str = "gelu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        whole("Adapter bottleneck", self.bottleneck)
        finite("Adapter scale", self.scale)
        for value, choices, what in ((self.form, FORMS, "form"), (self.act, ACTS, "act")):
            if value not in choices:
                raise ValueError(f"Adapter {what} {value!r}: choose from {', '.join(choices)}")
        for place in self.where:
            if place not in ENDS:
                raise ValueError(f"Adapter where {place!r}: choose from {', '.join(ENDS)}")

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        for place in self.where:
            read, write = ENDS[place]
            for site in spans(model, read, write) if self.form == "parallel" else find(model, write):
                d_in = widths(model.get_submodule(site.read))[0]
                d_out = widths(model.get_submodule(site.write))[1]
                yield site, Bottleneck(d_in if site.is_span else d_out, d_out, self)


class Bottleneck(Delta):
    """Reads the span's input where there is one, its own layer's output otherwise."""

    def __init__(self, d_in: int, d_out: int, settings: Adapter):
        super().__init__()
        self.down, self.up = nn.Linear(d_in, settings.bottleneck), nn.Linear(settings.bottleneck, d_out)
        self.act, self.scale = ACTS[settings.act], settings.scale
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = (x if self.site.is_span else y).to(self.down.weight.dtype)
        return y + (self.scale * self.up(self.act(self.down(h)))).to(y.dtype)
