"""What makes P-tuning's vectors (arXiv:2103.10385): a BiLSTM with an MLP, or an MLP; and fitting it to given ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._rows import Rows

ALIKE = 1e-2  # the smallest singular value by the largest, below which rows depend on each other
SMALLEST = 1e-6  # deviation of a unit over the rows that is divided by


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


@torch.no_grad()
def fit(rows: Rows, wanted: Tensor) -> None:
    """Change the encoder's last layer by as little as makes `rows` the vectors `wanted` [n, d], or brings them nearest.

    Where what that layer reads is alike for many rows (small outputs of an LSTM leave a ReLU open or shut for all of
    them), weights in the hundreds would fit them badly: the layer before is first scaled to mean 0 and deviation 1 a
    unit over the rows.
    """
    before, last = [m for m in rows.encode.modules() if isinstance(m, nn.Linear)][-2:]
    seen = reads(rows, last)
    sizes = torch.linalg.svdvals(seen.double())
    if sizes[-1] < ALIKE * sizes[0]:
        y = before(reads(rows, before))
        deviation = y.std(0).clamp(min=SMALLEST)
        before.bias.copy_((before.bias - y.mean(0)) / deviation)
        before.weight /= deviation[:, None]
        seen = reads(rows, last)
    last.bias.copy_(wanted.mean(0) - (seen @ last.weight.T).mean(0))
    missing = wanted - seen @ last.weight.T - last.bias
    last.weight += (torch.linalg.pinv(seen.double(), rtol=ALIKE / 10) @ missing.double()).T.float()


def reads(rows: Rows, layer: nn.Module) -> Tensor:
    """What a layer of the encoder reads for each of `rows`, [n, d]."""
    seen = list[Tensor]()
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    rows.vectors()
    handle.remove()
    return seen[0]
