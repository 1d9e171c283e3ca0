"""A base's vocabulary grown for new tokens, deterministically, and taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .site import output_layer, reader, texts

WORDS = "deltatune_tokens"  # the attribute of the model that holds the words of its added tokens


@dataclass(frozen=True)
class Before:
    """What `grow` found: the vocabulary's size, the model's attributes, and the layers that shared its embedding."""

    size: int
    attributes: frozenset[str]
    twins: tuple[tuple[str, nn.Embedding], ...]
    words: Mapping[str, int]

    def restore(self, model: Any) -> None:
        """Take the rows out that `grow` added, and what resizing changed on the model."""
        with unseeded(model):
            texts(model).resize_token_embeddings(self.size, mean_resizing=False)
        for path, layer in self.twins:  # resizing puts one module in all their places
            layer.weight, layer.num_embeddings = reader(model).weight, self.size
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
        if WORDS in self.attributes:
            setattr(model, WORDS, self.words)
        for attribute in ("deltatune_vocab", "vocab_size", WORDS):
            if attribute in vars(model) and attribute not in self.attributes:
                delattr(model, attribute)


def found(model: Any) -> Before:
    main = reader(model)
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Embedding) and m is not main]
    twins = tuple((path, m) for path, m in layers if m.weight is getattr(main, "weight", None))
    return Before(vocabulary(model), frozenset(vars(model)), twins, words(model))


def vocabulary(model: Any) -> int:
    """How many tokens the model knows: 0 where its input is images or sounds alone."""
    return int(getattr(reader(model), "num_embeddings", 0))


def grow(model: Any, size: int) -> Before:
    """Resize the vocabulary to `size` (new rows: the mean of the old), remembering the base's own."""
    old, before = vocabulary(model), found(model)
    if size <= old:
        return before
    model.deltatune_vocab = getattr(model, "deltatune_vocab", old)
    with unseeded(model), torch.no_grad():
        texts(model).resize_token_embeddings(size, mean_resizing=False)
        for layer in (reader(model), output_layer(model)):
            if layer is not None:
                layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
    return before


def words(model: Any) -> dict[str, int]:
    """word -> id of the tokens that were added to `model`."""
    return dict(getattr(model, WORDS, {}))


def teach(tokenizer: Any, tokens: Mapping[str, int], where: str) -> None:
    """Add `tokens` to a tokenizer, at the ids they were trained with. ValueError where it has other ids for them."""
    known = sorted(tokens, key=lambda word: tokens[word])
    tokenizer.add_tokens(known)
    for word, i in zip(known, tokenizer.convert_tokens_to_ids(known), strict=True):
        if i != tokens[word]:
            raise ValueError(
                f"{where} adds the token {word!r} with id {tokens[word]}, this tokenizer has {i} for it: "
                "give the base's own tokenizer, as it was published"
            )


@contextmanager
def unseeded(model: nn.Module) -> Iterator[None]:
    """The global random number generators leave the block as they entered it."""
    with torch.random.fork_rng(sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})):
        yield
