"""DoRA (Liu et al. 2024, arXiv:2402.09353): y = m V x / ||V|| + b, V = W + s B A, norms over each row of V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.quant import dense
from ..core.registry import method
from ..core.site import Site
from ._decomposed import Decomposed
from .lora import LoRA
from .low_rank import LowRank

FORMS: dict[str, dict[str, Any]] = {"": {"r": 4}, "dora-pissa": {"r": 4, "init": "pissa", "scaling": "rslora"}}


@method("dora", paper="2402.09353", kind="linear", peft="LORA", mergeable=True, tiny=FORMS)
@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the direction of each weight row, and a learned magnitude. Parameters: r (d_in + d_out) + d_out a layer.

    The norm of the direction gets no gradient (section 4.3 of the paper). Every option of LoRA holds here.
    """

    def delta(self, model: nn.Module, site: Site, settings: tuple[int, float, float], size: tuple[int, int]) -> LowRank:
        made = Decomposed(*size, settings, self.scaling)
        weight = dense(model.get_submodule(site.write), site.columns).weight
        made.rates = {"lora_B": self.lr_ratio} if self.lr_ratio != 1 else {}
        made.start(self.init, weight if self.read(model, site) is not None else None)
        if not weight.is_meta:
            made.lora_magnitude_vector.data.copy_(made.norm(weight))
        return made
