"""AdaLoRA's allocator (arXiv:2303.10512, section 3): b(t) = bT + (b0 - bT) (1 - (t - ti) / (T - ti - tf))^3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ._importance import importance, observe


def in_steps(share: float, steps: int) -> int:
    """A number of steps: `share` itself from 1 on, that share of `steps` below."""
    return int(share) if share >= 1 else int(share * steps)


@dataclass(eq=False)
class Budget:
    """How many triplets the layers of one adapter keep together, and which. `shares`: tinit, tfinal and delta_t."""

    target: int  # what a layer has at the end, on average
    shares: tuple[float, float, float]
    members: list[Any] = field(default_factory=list)
    steps: int = 0
    first: int = 0  # b0
    allocations: int = 0
    arrived: int = 0

    def begin(self, steps: int) -> None:
        """A run of `steps` steps starts. ValueError where the schedule leaves no step to allocate in."""
        self.steps, self.first = steps, sum(member.rank for member in self.members)
        self.allocations = self.arrived = 0
        if steps < 2 or self.tinit >= self.end:
            raise ValueError(
                f"AdaLoRA has no step to move its budget in: {steps} steps, of which tinit takes {self.tinit} and "
                f"tfinal {steps - self.end}. Train longer, or lower tinit and tfinal"
            )

    @property
    def tinit(self) -> int:
        return in_steps(self.shares[0], self.steps)

    @property
    def end(self) -> int:
        """The step of the last allocation: T - tf."""
        return self.steps - in_steps(self.shares[1], self.steps)

    @property
    def least(self) -> int:
        return min(self.target * len(self.members), self.first)

    def at(self, step: int) -> int:
        """b(t) of step `step`, from 1."""
        if step <= self.tinit:
            return self.first
        left = max(0.0, 1 - (step - self.tinit) / (self.end - self.tinit))
        return int((self.first - self.least) * left**3 + self.least)

    def arrive(self, step: int) -> None:
        """Called by every layer that trains; the last of a step looks at all of them, and allocates."""
        self.arrived += 1
        if self.arrived < sum(member.rank > 0 for member in self.members):
            return
        self.arrived = 0
        if step < self.end and (alive := [member for member in self.members if member.rank]):
            observe(alive)
        every = max(1, in_steps(self.shares[2], self.steps))
        if step == self.end or (self.tinit < step < self.end and step % every == 0):
            self.allocate(self.at(step))
        if step > self.end:  # the pattern is final: what was pruned stays so
            for member in self.members:
                member.mask()

    @torch.no_grad()
    def allocate(self, budget: int) -> None:
        """Keep the `budget` most important triplets of all layers; of equals, the first."""
        scores = torch.cat([importance(member.seen).cpu() for member in self.members if member.rank])
        keep = torch.zeros(len(scores), dtype=torch.bool)
        keep[torch.sort(scores, descending=True, stable=True).indices[:budget]] = True
        for member, part in zip(self.members, keep.split([member.rank for member in self.members]), strict=True):
            member.kept.copy_(part)
            member.mask()
        self.allocations += 1
