"""Step: model and objective as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from deltatune.data.batch import Batch


class Step(nn.Module):
    """Model and objective as one module, so that DDP and FSDP see the whole of what runs."""

    def __init__(self, model: nn.Module, objective: Any):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the losses over `batch.targets` targets (a scalar), and metrics (means over the targets)."""
        loss_sum, metrics = self.objective.loss(self.model, batch)
        return loss_sum, metrics
