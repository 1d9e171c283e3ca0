"""P-tuning (Liu et al. 2021, arXiv:2103.10385): P = MLP(BiLSTM(e)), at any place of a template, folded for use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.delta import Delta
from ..core.registry import choice, method, whole
from ..core.site import Site
from ._place import place
from ._rows import Rows, check_several

ENCODERS = ("lstm", "mlp")


@method(
    "ptuning",
    paper="2103.10385",
    kind="embedding",
    identity=False,
    tiny={"": {"length": 3}, "ptuning-mlp": {"length": 2, "encoder": "mlp", "count": 2, "tasks": ("a", "b")}},
)
@dataclass(frozen=True)
class PTuning:
    """`length` virtual tokens whose vectors an encoder makes from learned inputs; a template's <soft> places them.

    encoder "lstm" (the paper's): two bidirectional layers of d / 2 units a direction, then d -> d, ReLU, d -> d;
    "mlp": three layers of d. count: so many prompts through one encoder, combined as those of Prompt.
    tasks: each has prompts of its own, made by the one encoder that all tasks share.
    Parameters: n = tasks count length d; while training n + 14 d^2 + 18 d (lstm) or n + 3 d^2 + 3 d (mlp).
    """

    length: int = 20
    encoder: str = "lstm"
    count: int = 1
    combine: str = "vote"
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole("PTuning length", self.length)
        check_several("PTuning", self.count, self.combine, self.tasks)
        choice("PTuning encoder", self.encoder, ENCODERS)
        if self.length == 1 and self.encoder == "lstm":
            raise ValueError("PTuning length 1 gives encoder 'lstm' nothing to recur over: choose 'mlp', or 2")

    def deltas(self, model: nn.Module) -> Iterator[tuple[Site, Delta]]:
        site, layer = place(model)
        d = layer.embedding_dim
        inputs = torch.randn(self.count * max(len(self.tasks), 1) * self.length, d)
        yield site, Rows(layer, inputs, self.length, Recurrent(d) if self.encoder == "lstm" else feedforward(d))


def feedforward(d: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))


class Recurrent(nn.Module):
    """x [prompts, length, d] -> the same shape."""

    def __init__(self, d: int):
        super().__init__()
        if d % 2:
            raise ValueError(f"PTuning encoder 'lstm' halves the embedding's width, which is {d}: choose 'mlp'")
        self.lstm = nn.LSTM(d, d // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):  # its backward needs training mode, and is not deterministic
            return self.mlp(self.lstm(x)[0])
