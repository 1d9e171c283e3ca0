"""Where a soft prompt goes in, and what it may start as."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.delta import Refusal
from ..core.site import Site, embedding, towers, trunk


def place(model: nn.Module) -> tuple[Site, nn.Embedding]:
    """The token embedding, where prompts go in."""
    name = embedding(model)
    layer = model.get_submodule(name)
    # CLIP's published configurations of 2021 and 2022
    if any(getattr(m, "eos_token_id", None) == 2 for m in (*towers(model), trunk(model))):
        raise Refusal(
            "this model pools a text at its highest token id, which a virtual id would be.",
            found=f"{type(model).__name__} with eos_token_id 2",
            instead="text_model.eos_token_id = the tokenizer's eos_token_id, which pools at the first of these",
        )
    if isinstance(layer, nn.Embedding):
        return Site(name, name), layer
    raise Refusal(
        "soft prompts stand for rows of a token embedding.",
        found=f"{name}: {type(layer).__name__}",
        instead="Prefix, which needs no embedding; for images VisualPrompt (visual_prompt)",
    )


def reads_words(model: nn.Module) -> bool:
    """Whether token ids alone are an input of `model`."""
    return isinstance(model.get_submodule(embedding(model)), nn.Embedding) and not towers(model)


def looked_up(layer: nn.Embedding, ids: Sequence[Sequence[int]]) -> Tensor:
    """[len(ids), d]: the mean of each entry's embeddings, through the layer, because some families scale them."""
    device = layer.weight.device
    return torch.stack([layer(torch.tensor(list(i), device=device)).detach().float().mean(0) for i in ids])
