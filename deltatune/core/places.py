"""Places: how many positions a model has, and whether what it is called with fits into them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .site import embedding, layers, read_first

RELATIVE = ("t5", "mt5", "umt5", "longt5")  # distances count, and any may occur
TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")
# families that number real tokens from behind the padding id, and whose table has a row for padding
BEHIND = re.compile(".*roberta.*|camembert|longformer|mpnet|esm|data2vec-text|xmod|ibert|lilt|luke|layoutlmv3|markuplm")
TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def places(config: Any) -> int | None:
    """How many positions a model of this configuration has for the tokens of a text; None: no fixed number."""
    config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    if not isinstance(found, int) or found < 1 or config.model_type in RELATIVE:
        return None
    return found - first(config)


def first(config: Any) -> int:
    """The number that a model of this configuration gives to the first real token of a text."""
    padding = padding_of(config)
    return 0 if padding is None else padding + 1


def padding_of(config: Any) -> int | None:
    """The token id, and the position, of padding in families that number from behind it; None in the others."""
    config = config.get_text_config()
    if not BEHIND.fullmatch(config.model_type):
        return None
    return 1 if config.model_type == "mpnet" else int(config.pad_token_id or 0)  # MPNet's is written into its code


def positions_of(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The position_ids [1 or batch, seq] that `model` (a trunk) would give these arguments by itself."""
    given = kwargs.get("position_ids")
    if given is not None:
        return given
    source = read_first(args, kwargs)
    past = kwargs.get("past_key_values")
    start, length = int(past.get_seq_length()) if past is not None else 0, source.shape[1]
    real = counted(model, source, kwargs.get("attention_mask"))
    if real is None:
        return torch.arange(start, start + length, device=source.device)[None] + first(model.config)
    before = start if real.shape[1] == length else 0  # a mask shows what is in the cache too
    return ((real.cumsum(1) + before) * real + first(model.config) - 1)[:, -length:]


def counted(model: Any, source: Tensor, mask: Tensor | None) -> Tensor | None:
    """1 for the tokens that `model` (a trunk) numbers and 0 for padding, [batch, seq or cache and seq]; None where it
    numbers columns, whatever is in them."""
    padding = padding_of(model.config)
    if padding is not None:
        return None if source.is_floating_point() else (source != padding).long()
    if mask is None or mask.ndim != 2 or model.config.model_type != "opt":
        return None
    return mask.long()


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
        if isinstance(x, Tensor) and (length := shift + reach(model, name, given, room - shift)) > room:
            raise ValueError(too_long(room, model, shift + virtual(model, x), length))


def reach(model: Any, name: str, given: Mapping[str, Any], enough: int) -> int:
    """How many positions the text called `name` goes up to, those in the cache included; padding that needs none is
    left out where the text has more than `enough` columns."""
    past: Any = given.get("past_key_values")
    at, decoder = given.get("position_ids"), name.startswith("decoder")
    if isinstance(at, Tensor) and not decoder:  # packed rows begin anew in their middle
        if not at.is_cpu and torch.is_grad_enabled():
            return 0  # a GPU that trains would wait for the answer
    else:
        decodes = decoder or not getattr(model.config, "is_encoder_decoder", False)
        cached = int(past.get_seq_length()) if decodes and hasattr(past, "get_seq_length") else 0
        length = cached + int(given[name].shape[1])
        if length <= enough or decoder or not decodes:
            return length
    return int(positions_of(model, (), given).max()) + 1 - first(model.config)


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
