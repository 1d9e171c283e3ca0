"""Places: how many positions a model has, and whether what it is called with fits into them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .site import embedding, layers

RELATIVE = ("t5", "mt5", "umt5", "longt5")  # distances count, and any may occur
TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")
TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def places(config: Any) -> int | None:
    """How many positions a model of this configuration has for the tokens of a text; None: no fixed number."""
    config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    if not isinstance(found, int) or found < 1 or config.model_type in RELATIVE:
        return None
    return found - first(config)


def first(config: Any) -> int:
    """The number of the first position: RoBERTa's kin count from after the padding id."""
    behind = "roberta" in config.model_type or config.model_type == "camembert"
    return int(config.pad_token_id or 0) + 1 if behind else 0


def tabled(model: Any) -> int | None:
    """`places`, where they are rows of a table past whose end nothing can be read; None for computed positions."""
    room = places(model.config) if hasattr(model, "config") else None
    tables = [layer for name, layer in layers(model) if TABLE.search(name) and isinstance(layer, nn.Embedding)]
    # a smaller table is of something else: the pictures' beside a text whose positions are computed
    return room if room is not None and any(layer.num_embeddings >= room for layer in tables) else None


def fits(room: int, model: Any, shift: int, called: tuple[tuple, Mapping[str, Any]]) -> None:
    """ValueError where a text that `model` (a trunk) is called with is too long behind `shift` places of prefixes."""
    args, kwargs = called
    given = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
    for name in TEXTS:
        x = given.get(name)
        if isinstance(x, Tensor) and (length := shift + reach(model, name, given)) > room:
            raise ValueError(too_long(room, model, shift + virtual(model, x), length))


def reach(model: Any, name: str, given: Mapping[str, Any]) -> int:
    """How many positions the text called `name` goes up to, those in the cache included."""
    past: Any = given.get("past_key_values")
    at = given.get("position_ids")
    if isinstance(at, Tensor) and not name.startswith("decoder"):  # packed rows begin anew in their middle
        seen = at.is_cpu or not torch.is_grad_enabled()  # a GPU that trains would wait for the answer
        return int(at.max()) + 1 - first(model.config) if seen else 0
    decodes = name.startswith("decoder") or not getattr(model.config, "is_encoder_decoder", False)
    cached = int(past.get_seq_length()) if decodes and hasattr(past, "get_seq_length") else 0
    return cached + int(given[name].shape[1])


def virtual(model: Any, ids: Tensor) -> int:
    """The most virtual token ids that a row of `ids` holds."""
    size = getattr(model.get_submodule(embedding(model)), "num_embeddings", None)
    return int((ids >= size).sum(1).max()) if ids.ndim == 2 and size else 0


def too_long(room: int, model: Any, front: int, length: int) -> str:
    """What to say of `length` positions, of which `front` are virtual tokens, where there is only `room`."""
    left = f", and at most {room - front} with these virtual tokens" if 0 < front < room else ""
    fewer = f"use fewer virtual tokens (there are {front}), or " if front else ""
    return (
        f"{front} virtual tokens and a text of {length - front} tokens take {length} positions, and "
        f"{model.config.model_type} has {room}: {fewer}shorten the text (max_length, in training {room}{left})"
    )
