"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + (alpha / r) B A x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..core.delta import Delta, blank
from ..core.quant import dense
from ..core.registry import choice, finite, method, nearest, whole
from ..core.site import Site, linear_at, matches
from .low_rank import LowRank
from .starts import INITS, READ, SCALINGS, check_dropout, sized

FORMS: dict[str, dict[str, Any]] = {
    "": {"r": 4},
    "rslora": {"r": 4, "alpha": 8.0, "scaling": "rslora"},  # as strong as the others
    "lora-plus": {"r": 4, "lr_ratio": 16.0, "init": "orthogonal"},
    "pissa": {"r": 4, "init": "pissa"},
    "olora": {"r": 4, "init": "olora"},
}


@method("lora", paper="2106.09685", kind="linear", peft="LORA", mergeable=True, tiny=FORMS)
@dataclass(frozen=True)
class LoRA:
    """A low-rank update beside each target layer. Parameters: r (d_in + d_out) per layer.

    `patterns` gives targets their own rank and alpha: {"down": {"r": 16}}; every pattern must match a target.
    `scaling`: standard (alpha / r) or rslora (alpha / sqrt r, arXiv:2312.03732). `lr_ratio`: B's learning rate as a
    multiple of A's (LoRA+, arXiv:2402.12354: 16). `init`: kaiming, gaussian, orthogonal, pissa or olora.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    patterns: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    scaling: str = "standard"
    init: str = "kaiming"
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        who = type(self).__name__
        whole(f"{who} r", self.r)
        finite(f"{who} alpha", self.alpha, above=0)
        finite(f"{who} lr_ratio", self.lr_ratio, above=0)
        check_dropout(who, self.dropout)
        for what, value, choices in (("scaling", self.scaling, SCALINGS), ("init", self.init, INITS)):
            choice(f"{who} {what}", value, choices)
        for pattern, own in self.patterns.items():
            self.check(f"{who} pattern {pattern!r}", own)

    def check(self, what: str, own: Any) -> None:
        """ValueError unless `own` is {"r": ..., "alpha": ...}, or one of the two."""
        if not isinstance(own, Mapping):
            raise ValueError(f'{what} must be like {{"r": 16, "alpha": 32}}, got {own!r}')
        for key in own:
            if key not in ("r", "alpha"):
                near = nearest(str(key), ("r", "alpha", "rank")).replace("'rank'", "'r'")
                raise ValueError(f"{what} has no field {key!r}.{near} Its fields: r, alpha")
        whole(f"{what}: r", own.get("r", 1))
        finite(f"{what}: alpha", own.get("alpha", 1.0), above=0)

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        who = type(self).__name__
        sites = linear_at(model, self.targets, who)
        for pattern in self.patterns:
            if not any(matches(site, pattern) for site in sites):
                raise ValueError(
                    f"{who} pattern {pattern!r} matches none of the {len(sites)} targets, such as {sites[0].write!r}"
                )
        for site in sites:
            settings = self.settings(site)
            yield site, self.delta(model, site, settings, sized(model, site, settings[0], f"{who} r"))

    def delta(self, model: nn.Module, site: Site, settings: tuple[int, float, float], size: tuple[int, int]) -> LowRank:
        """The delta of one site, with its starting values."""
        made = LowRank(*size, settings, self.scaling)
        made.rates = {"lora_B": self.lr_ratio} if self.lr_ratio != 1 else {}
        made.start(self.init, self.read(model, site))
        return made

    def read(self, model: nn.Module, site: Site) -> Tensor | None:
        """The weight that the start depends on, if it does and will not be overwritten by a load."""
        wanted = self.init in READ and not blank()
        return dense(model.get_submodule(site.write), site.columns).weight if wanted else None

    def settings(self, site: Site) -> tuple[int, float, float]:
        """(r, alpha, dropout) at one site: the last matching pattern wins."""
        r, alpha = self.r, self.alpha
        for pattern, own in self.patterns.items():
            if matches(site, pattern):
                r, alpha = int(own.get("r", r)), float(own.get("alpha", alpha))
        return r, alpha, self.dropout
