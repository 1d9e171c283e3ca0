"""Visual prompts (Jia et al. 2022, arXiv:2203.12119): [x_i, Z_i, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import SLOT, Delta, Refusal
from ..core.registry import flag, method, whole
from ..core.site import Site, blocks, widths

# families whose blocks see a plain sequence: no windows, no position bias that counts on the number of patches
SEES = ("vit", "deit", "dinov2", "clip", "clip_vision_model")


@method(
    "visual_prompt",
    paper="2203.12119",
    kind="embedding",
    identity=False,
    tiny={"": {"length": 3}, "visual-deep": {"length": 2, "deep": True}},
)
@dataclass(frozen=True)
class VisualPrompt:
    """`length` learned tokens among an image's patches. Parameters: length d; deep: blocks length d.

    They follow the patches: attention has no order of its own, so it is the paper's function, and heads that read
    token 0 (DeiT's also 1) find it. They leave with the last block: pooling sees the image alone.
    deep: every block's own tokens replace those of the block before.
    """

    length: int = 10
    deep: bool = False

    def __post_init__(self) -> None:
        whole("VisualPrompt length", self.length)
        flag("VisualPrompt deep", self.deep)

    def deltas(self, model: Any) -> Iterator[tuple[Site, Delta]]:
        found, start = seeing(model), bound(model)
        for index, block in enumerate(found):
            tokens = self.drawn(model, block, start) if self.deep or index == 0 else None
            yield Site(block, block), Tokens(tokens, self.length, (index == 0, index == len(found) - 1))

    def drawn(self, model: nn.Module, block: str, most: float) -> Tensor:
        """[length, d], uniform in (-most, most)."""
        d = next(widths(m)[0] for m in model.get_submodule(block).modules() if isinstance(m, nn.Linear))
        return (2 * torch.rand(self.length, d) - 1) * most


class Tokens(Delta):
    """At one block: put the tokens in (the first), change them (deep), take them out (the last)."""

    alone = "visual prompts add tokens, and the rows of one batch have equally many"

    def __init__(self, tokens: Tensor | None, length: int, ends: tuple[bool, bool]):
        super().__init__()
        self.length, (self.first, self.last) = length, ends
        if tokens is not None:
            self.tokens = nn.Parameter(tokens)  # [length, d]

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        if "tokens" not in self._parameters:
            return x
        own = self.tokens.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x, own], 1) if self.first else self.cut(layer, x, own)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.cut(layer, y, y[:, :0]) if self.last else y

    def cut(self, layer: Any, x: Tensor, own: Tensor) -> Tensor:
        """x with `own` in the place of this adapter's tokens; those of later adapters stand behind them."""
        later = [d for _, d in getattr(layer, SLOT).befores if isinstance(d, Tokens)]
        end = x.shape[1] - sum(d.length for d in later[later.index(self) + 1 :])
        return torch.cat([x[:, : end - self.length], own, x[:, end:]], 1)


def seeing(model: Any) -> list[str]:
    """The blocks of the vision tower."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    found = [b for b in blocks(model) if kind != "clip" or "vision_model" in b.split(".")]
    if kind in SEES and found:
        return found
    raise Refusal(
        "visual prompts stand among the patches of an image.",
        found=f"{type(model).__name__} ({kind})",
        instead=f"models of the kinds {', '.join(SEES)}; Prompt for text, Prefix for any attention",
    )


def bound(model: Any) -> float:
    """The paper's start: uniform within sqrt(6 / (channels patch^2 + d)), as Xavier's for the patch embedding."""
    patch = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return math.sqrt(6 / (patch.in_channels * math.prod(patch.kernel_size) + patch.out_channels))
