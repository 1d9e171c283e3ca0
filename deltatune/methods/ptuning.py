"""P-tuning (Liu et al. 2021, arXiv:2103.10385): P = MLP(BiLSTM(e)), at any place of a template, folded for use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..core.delta import Delta, blank
from ..core.registry import choice, method
from ..core.site import Site
from ._encoders import Recurrent, feedforward, fit
from ._place import place
from ._rows import Rows
from .prompt import Prompt

ENCODERS = ("lstm", "mlp")


@method(
    "ptuning",
    paper="2103.10385",
    kind="embedding",
    peft="PROMPT_TUNING",
    virtual=True,
    identity=False,
    tiny={"": {"length": 3}, "ptuning-mlp": {"length": 2, "encoder": "mlp", "count": 2, "tasks": ("a", "b")}},
)
@dataclass(frozen=True)
class PTuning(Prompt):
    """`length` virtual tokens whose vectors an encoder makes from learned inputs; a template's <soft> places them.

    encoder "lstm" (the paper's): two bidirectional layers of d / 2 units a direction, then d -> d, ReLU, d -> d;
    "mlp": three layers of d. init "random": what that makes of random inputs, as in the authors' program; otherwise as
    in Prompt, the encoder's last layer fitted to make those vectors: exactly up to rounding while they are no more
    than three quarters of d; of more, the nearest that moderate weights make, since the ReLU's outputs are dependent.
    count: so many prompts through one encoder, combined as those of Prompt; tasks: each has prompts of its own, made by
    the one encoder that all tasks share.
    Parameters: n = tasks count length d; while training n + 14 d^2 + 18 d (lstm) or n + 3 d^2 + 3 d (mlp).
    """

    INITS: ClassVar = ("vocab", "random", "text", "labels")

    encoder: str = "lstm"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("PTuning encoder", self.encoder, ENCODERS)
        if self.length == 1 and self.encoder == "lstm":
            raise ValueError("PTuning length 1 gives encoder 'lstm' nothing to recur over: choose 'mlp', or 2")

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        site, layer = place(model)
        d = layer.embedding_dim
        inputs = torch.randn(self.count * max(len(self.tasks), 1) * self.length, d)
        made = Rows(layer, inputs, self.length, Recurrent(d) if self.encoder == "lstm" else feedforward(d))
        if self.init != "random" and not blank() and not layer.weight.is_meta:
            fit(made, self.starts(layer).to(inputs))
        yield site, made
