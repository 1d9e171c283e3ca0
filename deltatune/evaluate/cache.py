"""Key-value caches for generation: written in place, filled without padding, a beginning that rows share only once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..core.attach import rows_of, running
from ..core.slot import deltas
from ..core.state import STATE, State

SHARED = 48  # tokens: from here on a common beginning (an instruction, demonstrations) is computed once for all rows
AHEAD = 64  # positions of room behind the last token
CACHE_BYTES = 2 * 2**30  # of one batch; decoding gets faster with every row up to here
MOST_TOKENS = 24_576  # of one batch, for small models
PASS = {"cpu": 64}  # tokens that take as long as a pass over the weights does however few there are
MANY = 4096  # the same where thousands of tokens are one launch


class Roomy(DynamicLayer):
    """Keys and values [batch, heads, seq, width] in buffers with room ahead.

    transformers' own layer copies everything before a token to append it, 45 % of a batch's decoding time on CPU.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, new, width]; what is returned are views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        if not self._fits(old, key_states.shape[-2]):
            self.buffers = [_buffer(x, new, old) for x, new in ((self.keys, key_states), (self.values, value_states))]
        end = old + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """One row for `repeats` rows without a copy of it: the first `update` makes one."""
        if self.get_seq_length() and self.keys.shape[0] == 1:
            self.keys, self.values = (x.expand(repeats, -1, -1, -1) for x in (self.keys, self.values))
        else:
            super().batch_repeat_interleave(repeats)

    def place(self, part: Roomy, rows: Sequence[int], own: Sequence[int], size: tuple[int, int, int]) -> None:
        """Take over `rows` from `part`, where padding is on the right: it is on the left here, behind a common
        beginning. size: (all rows, tokens of the beginning, of all); own: tokens of each row behind the beginning."""
        count, start, end = size
        if not self.is_initialized:
            self.lazy_initialization(part.keys, part.values)
            self.buffers = [x.new_zeros(count, x.shape[1], end + AHEAD, x.shape[3]) for x in (part.keys, part.values)]
            self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        column, gap = torch.arange(end), end - start - torch.tensor(own)[:, None]
        at = torch.where(column < start, column, (column - gap).clamp(start, part.keys.shape[2] - 1)).to(
            part.keys.device
        )
        for mine, new in zip((self.keys, self.values), (part.keys, part.values), strict=True):
            mine[list(rows)] = new.gather(2, at[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))

    def _fits(self, old: int, new: int) -> bool:
        """Whether the keys are still the beginning of the buffer (no beam was reordered) and it has room."""
        if not self.buffers or self.keys.data_ptr() != self.buffers[0].data_ptr():
            return False
        return self.keys.shape[0] == self.buffers[0].shape[0] and old + new <= self.buffers[0].shape[-2]


def _buffer(kept: Tensor, new: Tensor, old: int) -> Tensor:
    """A buffer that begins with `kept` and has room for `new` and AHEAD more, or a quarter of what it holds."""
    end = old + new.shape[-2]
    room = new.new_empty(*new.shape[:-2], end + max(AHEAD, end // 4), new.shape[-1])
    if old:
        room[..., :old, :] = kept
    return room


def room(model: Any) -> int:
    """Tokens of one batch: as many as fit CACHE_BYTES of keys and values."""
    config = model.config.get_text_config(decoder=True)
    every = getattr(config, "num_attention_heads", None)
    if every is None:  # a state of fixed size
        return MOST_TOKENS
    heads = getattr(config, "num_key_value_heads", None) or every
    width = getattr(config, "head_dim", None) or config.hidden_size // every
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return max(1, min(MOST_TOKENS, CACHE_BYTES // token))


def empty(model: Any) -> DynamicCache:
    """A decoder's cache; layers of another kind (sliding windows, recurrent states) are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass(frozen=True)
class Front:
    """What all rows begin with, computed once: `length` tokens and their keys and values."""

    length: int
    cache: DynamicCache

    def of(self, rows: int) -> DynamicCache:
        """A cache for so many rows, to go on from."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        if self.length:  # a recurrent layer that has read nothing has nothing to repeat
            cache.batch_repeat_interleave(rows)
        return cache


@torch.no_grad()
def front(model: Any, rows: Sequence[Sequence[int]]) -> Front | None:
    """The common beginning of all `rows` of a causal model, computed; None where there is none worth it."""
    if model.config.is_encoder_decoder or not continues(model):
        return None
    length = shared(model, rows)
    if not length or not all(type(layer) is Roomy for layer in empty(model).layers):
        return None
    found = _front(model, rows[0][:length])
    return found if found.cache.get_seq_length() == length else None  # a model of old may leave it empty


def _front(model: Any, tokens: Sequence[int]) -> Front:
    cache = empty(model)
    if tokens:
        _read(model, torch.tensor([tokens]), cache)
    return Front(len(tokens), cache)


def _read(model: Any, ids: Tensor, cache: DynamicCache) -> None:
    """Put the keys and values of ids [rows, tokens] into `cache`; of the logits, as few as the model lets us."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, **few)


def continues(model: Any) -> bool:
    """Whether a model goes on from a cache that it is given; a state of fixed size may have a name of its own."""
    found = getattr(model, "_supports_default_dynamic_cache", lambda: False)()
    return bool(found) and "past_key_values" in inspect.signature(model.forward).parameters


def shared(model: Any, rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, where computing them once pays and is exact; else 0.

    Padding then stands between the common beginning and each row's own part, which a sliding window would count; and
    rows on different adapters do not share a cache. Nor do rows about which something decides by more of their tokens
    than they have in common.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    state: State | None = getattr(model, STATE, None)
    if len(rows) < 2 or window is not None or (state is not None and state.rows is not None):
        return 0
    most = min(map(len, rows)) - 1  # every row keeps a token of its own to start from
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    return min(same, most) if min(same, most) >= max(SHARED, waits(model)) else 0


def waits(model: Any) -> float:
    """How many of a text's first tokens something that runs now decides by."""
    return max((delta.waits for name in running(model) for delta in deltas(model, name)), default=0)


def prefilled(model: Any, rows: Sequence[Sequence[int]], start: int) -> DynamicCache:
    """The cache that `rows`, padded on the left behind their common beginning of `start` tokens, are continued from.

    The beginning is computed once. Where lengths differ, rows of like lengths are computed together, all but their last
    tokens, so that hardly any padding is; where little would be saved, the rest of the rows is left to the caller.
    """
    begun, own = _front(model, rows[0][:start]), [len(row) - 1 - start for row in rows]
    groups = alike(own, PASS.get(model.device.type, MANY))
    cache = empty(model)
    if len(groups) < 2 or waits(model) > start or not all(type(layer) is Roomy for layer in cache.layers):
        return begun.of(len(rows))
    for group in groups:
        part, longest = begun.of(len(group)), own[group[0]]
        if longest:
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            for line, i in zip(ids, group, strict=True):  # the padding behind it is seen by nothing that is kept
                line[: own[i]] = torch.tensor(rows[i][start:-1])
            with rows_of(model, group, len(rows)):
                _read(model, ids, part)
        if (length := part.get_seq_length()) != start + longest:  # a model of old leaves it empty
            return begun.of(len(rows))
        if length:
            size = (len(rows), start, start + max(own))
            for layer, found in zip(cache.layers, part.layers, strict=True):
                layer.place(found, group, [own[i] for i in group], size)
    return cache


def alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Row numbers in groups of like lengths, longest first, each with at most `most` tokens of padding; all rows in one
    where groups, `most` for each of them, would cost no less."""
    groups: list[list[int]] = []
    waste = most
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        waste += lengths[groups[-1][0]] - lengths[i] if groups else 1
        if waste > most:
            groups.append([])
            waste = 0
        groups[-1].append(i)
    apart = sum(len(group) * lengths[group[0]] + most for group in groups)
    return groups if apart < len(lengths) * max(lengths) + most else [list(range(len(lengths)))]
