"""The one registered attention function: learned prefixes before the keys, packed sequences kept apart."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .delta import SLOT, Refusal
from .places import first
from .site import added, input_layer, layers, name_of, pairs, towers, trunk

IMPLEMENTATION = "deltatune"  # the name it is registered under in transformers
CROSS = frozenset(("EncDecAttention", "encoder_attn", "crossattention", "cross_attn"))
ATTENDS = frozenset(("full_attention", "sliding_attention", "attention"))  # layers that keep packed rows apart
REPLACEABLE = (None, "eager", "sdpa", IMPLEMENTATION)


@dataclass(frozen=True)
class Mask:
    """What the queries of one call may see: `see` (True or 0 = visible; None = everything `causal` allows)."""

    see: Tensor | None  # [batch or 1, heads or 1, queries, keys], bool or additive
    causal: bool
    made: dict[Any, Mask] = field(default_factory=dict, compare=False, repr=False)  # what `shared` has made of it

    def shared(self, p: int, query: Tensor, keys: int) -> Mask:
        """`grown` for all rows, made once for all layers: additive as sdpa's kernels read it, so that they need not
        each make and keep one."""
        how = (p, query.dtype, query.device)
        if how not in self.made:
            found = self.grown(p, None, query, keys)
            if found.see is not None and found.see.dtype == torch.bool:
                see = query.new_zeros(()).expand(found.see.shape).masked_fill(~found.see, float("-inf"))
                found = Mask(see, found.causal)
            self.made[how] = found
        return self.made[how]

    def grown(self, p: int, visible: Tensor | None, query: Tensor, keys: int) -> Mask:
        """The mask with p positions in front of `keys` others, seen by all queries of the rows `visible` [batch, p]."""
        see = self.see
        if see is None:
            if visible is None and not self.causal:
                return self
            # Upper-left alignment: transformers leaves the mask out only when query i is at position i, which
            # includes a prefill into a longer static cache.
            see = torch.ones(query.shape[2], keys, dtype=torch.bool, device=query.device)
            see = (see.tril() if self.causal else see)[None, None]
        front = see.new_ones(()) if see.dtype == torch.bool else see.new_zeros(())
        front = front.expand(*see.shape[:-1], p)
        if visible is not None:
            rows = visible[:, None, None, :]
            hidden = False if see.dtype == torch.bool else torch.finfo(see.dtype).min
            front, see = torch.where(rows, front, hidden), see.expand(len(visible), -1, -1, -1)
        return Mask(torch.cat([front, see], dim=-1), causal=False)


@dataclass(frozen=True)
class Group:
    """Packed sequences of one length, computed as one batch. `mask.see` [sequences, 1, length, length] or None."""

    order: tuple[int, ...]  # which sequences of the pack
    starts: tuple[int, ...]  # their first token
    length: int
    mask: Mask


@dataclass(frozen=True)
class Packed:
    """The attention mask of a packed batch: model code passes it on unread, and checkpointing captures it."""

    lens: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """(length, how many) of neighbours of one length: they are a batch as they lie."""
        return [(n, len(list(same))) for n, same in groupby(self.lens)]


# ---- masks: made once per forward pass --------------------------------------------------------------


@dataclass
class _Pack:
    lens: tuple[int, ...]
    read: bool = False


Seen = dict[nn.Module, tuple[Tensor, Tensor]]
_PACK: ContextVar[_Pack | None] = ContextVar("deltatune_pack", default=None)
_SEEN: ContextVar[Seen | None] = ContextVar("deltatune_seen", default=None)


@contextmanager
def packed(lens: Sequence[int]) -> Iterator[None]:
    """Run forward passes on input_ids [1, sum(lens)] as `len(lens)` sequences that do not see each other.

    The model must run our attention (`use_attention`) and get `position_ids` that restart (`positions`), and no
    attention_mask (or one of ones). Backward may run outside. Raises RuntimeError if no forward pass inside read the
    lengths, which would mean that the sequences saw each other.
    """
    if not lens or min(lens) < 1:
        raise ValueError(f"packed() needs the length of every sequence, each at least 1; got {tuple(lens)}")
    pack = _Pack(tuple(int(n) for n in lens))
    token = _PACK.set(pack)
    try:
        yield
    finally:
        _PACK.reset(token)
    if not pack.read:
        raise RuntimeError(
            f"no model read the lengths of packed({list(pack.lens)}), so its sequences saw each other: "
            "call use_attention(model) first, and pass no 4-D attention_mask"
        )


def packed_lens() -> tuple[int, ...] | None:
    """The lengths of the sequences of the forward pass that runs now, where it is packed."""
    pack = _PACK.get()
    return None if pack is None else pack.lens


def make_mask(*, batch_size: int, q_length: int, kv_length: int, **how: Any) -> Tensor | Packed | None:
    """transformers' own sdpa mask; inside `packed(lens)` one mask per sequence, from the same mask function."""
    pack = _PACK.get()
    if pack is None:
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **how)
    _check_pack(pack, (batch_size, q_length, kv_length), how)
    pack.read, how = True, how | {"attention_mask": None}  # all ones, where there is one
    starts = tuple(accumulate(pack.lens, initial=0))
    order = {n: tuple(i for i, m in enumerate(pack.lens) if m == n) for n in dict.fromkeys(pack.lens)}
    return Packed(pack.lens, tuple(_group(n, o, tuple(starts[i] for i in o), how) for n, o in order.items()))


def _group(length: int, order: tuple[int, ...], starts: tuple[int, ...], how: Mapping[str, Any]) -> Group:
    """Offsets into transformers' own mask functions, so that windows keep whatever convention the model has."""
    size = {"batch_size": 1, "q_length": length, "kv_length": length}
    sees = [sdpa_mask(**size, **{**how, "q_offset": start, "kv_offset": start}) for start in starts]
    if sees[0] is None:
        return Group(order, starts, length, Mask(None, causal=bool(how.get("allow_is_causal_skip", True))))
    see = torch.cat(sees)
    # Positions that restart make transformers write the mask out. A plain triangle runs faster as `causal`; it is
    # recognised by value because the mask function is a closure that may carry more than packing.
    if torch.equal(see, torch.ones_like(see).tril()):
        return Group(order, starts, length, Mask(None, causal=True))
    return Group(order, starts, length, Mask(see, causal=False))


def _check_pack(pack: _Pack, shape: tuple[int, int, int], how: Mapping[str, Any]) -> None:
    rows, queries, keys = shape
    config: Any = how.get("config")
    if getattr(config, "is_encoder_decoder", False):
        raise Refusal(
            "An encoder-decoder has two lengths per example, and its position biases do not restart.",
            found=type(config).__name__,
            instead="padded batches for this model (no packed())",
        )
    if getattr(config, "attention_chunk_size", None):
        raise Refusal(
            "Chunked attention counts its chunks from the start of the row, not of the sequence.",
            found=f"{type(config).__name__} with attention_chunk_size {config.attention_chunk_size}",
            instead="padded batches for this model (no packed())",
        )
    if keys != queries:
        raise Refusal(
            "A packed batch cannot continue a key-value cache: the cache does not know where sequences end.",
            found=f"{queries} new tokens and {keys} keys",
            instead="one row per sequence, padded on the left, for generation",
        )
    if rows != 1 or queries != sum(pack.lens):
        raise ValueError(
            f"packed({list(pack.lens)}) is for input_ids [1, {sum(pack.lens)}], but the model got [{rows}, {queries}]"
        )
    mask = how.get("attention_mask")  # BioGPT makes one itself where none is given, of ones
    if mask is not None and not (mask.ndim == 2 and bool(mask.all())):
        raise ValueError("a packed batch has no padding: leave attention_mask out, packed(lens) says what sees what")


# ---- attention --------------------------------------------------------------------------------------


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Packed | None, **how: Any
) -> tuple[Tensor, None]:
    """query [batch, heads, queries, d], key and value [batch, kv_heads, keys, d] -> [batch, queries, heads, d], None.

    The module's slot may put learned positions in front: added after the cache on every call, so they are never in it.
    """
    if how.get("s_aux") is not None:
        raise Refusal(
            "Attention sinks are not implemented.", found=type(module).__name__, instead="a model without sinks"
        )
    if isinstance(attention_mask, Packed):
        return _attend_packed(module, (query, key, value), attention_mask, how), None
    if (seen := _SEEN.get()) is not None:
        seen[module] = (key, value)
    slot: Any = module._modules.get(SLOT)
    if slot is not None and slot.attends:
        keys = key.shape[2]
        key, value, visible = slot.attend(key, value)
        p = key.shape[2] - keys
        mask = Mask(attention_mask, _causal(module, query, how)).grown(p, visible, query, keys)
        if (bias := how.get("position_bias")) is not None:
            how = how | {"position_bias": F.pad(bias, (p, 0))}
        attention_mask, how = mask.see, how | {"is_causal": mask.causal}
    return _softmax(module, (query, key, value), attention_mask, how), None


def _causal(module: nn.Module, query: Tensor, how: Mapping[str, Any]) -> bool:
    """transformers' convention: without a mask the module says, and a single query sees every key."""
    said = how.get("is_causal")
    return bool(query.shape[2] > 1 and (getattr(module, "is_causal", True) if said is None else said))


def _attend_packed(
    module: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], packed: Packed, how: Mapping[str, Any]
) -> Tensor:
    if how.get("position_bias") is not None:
        raise Refusal(
            "Position biases are computed for the whole row and do not restart with each sequence.",
            found=type(module).__name__,
            instead="padded batches for this model (no packed())",
        )
    if any(len(x) != 1 for x in tensors):
        raise ValueError(
            f"a packed batch is one row, but queries, keys and values have {[len(x) for x in tensors]}: "
            "something in front of attention (position_ids?) has one row per sequence"
        )
    front, stretches = _front(module, tensors[1], len(packed.lens)), packed.stretches
    parts, out = [_apart(x, stretches) for x in tensors], [tensors[0]] * len(stretches)
    for group in packed.groups:
        own = [i for i, (length, _) in enumerate(stretches) if length == group.length]
        query, key, value = (part[own[0]] if len(own) == 1 else torch.cat([part[i] for i in own]) for part in parts)
        mask = group.mask
        if front is not None:
            order = slice(None) if len(packed.groups) == 1 else list(group.order)
            k, v, visible = front
            if visible is None:
                mask = mask.shared(k.shape[2], query, group.length)
            else:
                mask = mask.grown(k.shape[2], visible[order], query, group.length)
            key, value = torch.cat([k[order], key], dim=2), torch.cat([v[order], value], dim=2)
        done = _softmax(module, (query, key, value), mask.see, {**how, "is_causal": mask.causal})
        for i, rows in zip(own, done.split([stretches[i][1] for i in own]) if len(own) > 1 else [done], strict=True):
            out[i] = rows.flatten(0, 1)
    return (out[0] if len(out) == 1 else torch.cat(out))[None]


def _apart(x: Tensor, stretches: list[tuple[int, int]]) -> list[Tensor]:
    """x [1, heads, tokens, d] -> [how many, heads, length, d] of each stretch.

    Taken apart at once, tokens first, as projections leave them: the gradients are then put together at once, as they
    lie. A slice of each would fill a gradient of the whole pack with zeros.
    """
    rows = x.transpose(1, 2)[0]
    parts = rows.split([n * count for n, count in stretches]) if len(stretches) > 1 else [rows]
    return [p.unflatten(0, (count, n)).transpose(1, 2) for p, (n, count) in zip(parts, stretches, strict=True)]


def _front(module: nn.Module, key: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The learned positions of each packed sequence: what the slot puts in front of no keys at all."""
    slot: Any = module._modules.get(SLOT)
    if slot is None or not slot.attends:
        return None
    none = key.new_empty(sequences, key.shape[1], 0, key.shape[3])
    return slot.attend(none, none)


def _softmax(
    module: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, how: Mapping[str, Any]
) -> Tensor:
    if how.get("softcap") is not None:
        return _softcapped(module, tensors, mask, how)
    return sdpa_attention_forward(module, *tensors, mask, **how)[0]


def _softcapped(
    module: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, how: Mapping[str, Any]
) -> Tensor:
    """Gemma 2's cap * tanh(scores / cap), which no sdpa kernel has: the scores are written out."""
    query, key, value = tensors
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scaling, cap = how.get("scaling"), how["softcap"]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = cap * torch.tanh(scores / cap)
    if mask is None and _causal(module, query, how):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    exact = torch.promote_types(scores.dtype, torch.float32)  # fp64 stays: its lowest number would be -inf in fp32
    weights = F.softmax(scores, dim=-1, dtype=exact).to(query.dtype)
    weights = F.dropout(weights, how.get("dropout", 0.0))
    return (weights @ value).transpose(1, 2).contiguous()


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, make_mask)


# ---- a model and its attention ------------------------------------------------------------------------


def use_attention(model: Any) -> dict[str, str | None]:
    """Run `model` with this attention. Returns {module name: what it ran before}, for `restore_attention`."""
    configured = _configured(model)
    previous = {name: config._attn_implementation for name, config in configured.items()}
    odd = {name: said for name, said in previous.items() if said not in REPLACEABLE}
    if odd or "" not in configured or not hasattr(model, "set_attn_implementation"):
        raise Refusal(
            "Prefixes and packing need attention that this function can stand in for.",
            found=f"{type(model).__name__} with {odd or 'no transformers configuration'}",
            instead='a transformers model loaded with attn_implementation="sdpa" or "eager"',
        )
    model.set_attn_implementation(IMPLEMENTATION)
    kept = sorted({type(c).__name__ for c in configured.values() if c._attn_implementation != IMPLEMENTATION})
    if kept:
        restore_attention(model, previous)
        raise Refusal(
            "transformers cannot switch this model's attention.",
            found=f"{type(model).__name__}: {', '.join(kept)} kept its own",
            instead="a method without a prefix, batches without packing",
        )
    return previous


def restore_attention(model: nn.Module, previous: Mapping[str, str | None]) -> None:
    """Undo `use_attention`, exactly."""
    configured = _configured(model)
    for name, said in previous.items():
        configured[name]._attn_implementation_internal = said


@torch.no_grad()
def keys_values(model: nn.Module, inputs: Mapping[str, Tensor]) -> Seen:
    """module -> the keys and values [batch, kv_heads, seq, dim] that its attention gets in one pass over `inputs`."""
    found: Seen = {}
    previous, trained = use_attention(model), [m for m in model.modules() if m.training]
    token = _SEEN.set(found)
    try:
        trunk(model.eval())(**inputs)
    finally:
        _SEEN.reset(token)
        for module in trained:  # one by one: parts of a model may be in another mode than the whole
            module.training = True
        restore_attention(model, previous)
    return found


def _configured(model: nn.Module) -> dict[str, Any]:
    """module name -> its configuration, each configuration once (sub-models often share their parent's)."""
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), (name, config))
    return dict(found.values())


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, module, kind) of every module that calls the attention function, in the model's order.

    kind: "self" in models with one stack; "encoder", "decoder" or "cross" in encoder-decoders; a tower's name in CLIP.
    """
    if isinstance(model, nn.Module) and not any(_is_attention(n, m) for n, m in model.named_modules()):
        raise Refusal(
            "this model has no attention layer, so there are no keys and values to put a prefix in front of.",
            found=f"{type(model).__name__} without a module called attention",
            instead=added(model) + ("; Prompt" if isinstance(input_layer(model), nn.Embedding) else ""),
        )
    two, both = pairs(model), [name_of(model, tower) for tower in towers(model)]

    def kind(name: str) -> str:
        return _kind(name) if two else next((t for t in both if name.startswith(f"{t}.")), "self")

    return [(n, m, kind(n)) for n, m in model.named_modules() if _is_attention(n, m)]


def _is_attention(name: str, module: nn.Module) -> bool:
    """Innermost modules called attention: wrappers such as BertAttention hold the one that attends."""
    if "Attention" not in type(module).__name__ or SLOT in name.split("."):
        return False
    inner = [type(m).__name__ for n, m in module.named_modules() if n and SLOT not in n.split(".")]
    return not any("Attention" in n for n in inner)


def _kind(name: str) -> str:
    parts = name.split(".")
    if not CROSS.isdisjoint(parts):
        return "cross"
    return "decoder" if "decoder" in parts else "encoder"


@dataclass(frozen=True)
class Heads:
    """One attention module's shapes: queries [batch, query, seq, dim], keys and values [batch, kv, seq, dim]."""

    query: int
    kv: int
    dim: int


def heads(module: nn.Module) -> Heads:
    """The heads of one of `attention_modules`. Names differ by family; the projections' sizes settle the rest."""
    names = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    dim = next((int(getattr(module, n)) for n in names if hasattr(module, n)), None)
    config: Any = getattr(module, "config", None)
    query = next(
        (getattr(module, n) for n in ("n_heads", "num_heads", "num_attention_heads") if hasattr(module, n)), None
    )
    query = query or getattr(config, "num_attention_heads", None)
    if dim is None or query is None:
        raise Refusal(
            "The number and size of the attention heads are not known.",
            found=type(module).__name__,
            instead="a method that is not a prefix",
        )
    return Heads(query, int(query) // int(getattr(module, "num_key_value_groups", 1)), dim)


def unpackable(model: Any) -> str:
    """Why packed sequences could not be kept apart in `model`; "" where they can."""
    config = getattr(model, "config", None)
    if pairs(model):
        return "an encoder-decoder has two lengths per row"
    if "position_ids" not in inspect.signature(trunk(model).forward).parameters:
        return "its positions cannot begin again"
    if getattr(config, "attention_chunk_size", None):
        return "its attention counts chunks from the start of a batch"
    if carries(model):
        return "a layer that is not attention carries what it saw from one row to the next"
    if any("sinks" in module._parameters for module in model.modules()):
        return "its attention has sinks"
    try:
        restore_attention(model, use_attention(model))
    except Refusal as refusal:
        return refusal.found
    return ""


def carries(model: Any) -> bool:
    """Whether tokens reach each other past attention, as in hybrids: by a convolution over them, or a running state."""
    said = getattr(model.config.get_text_config(), "layer_types", None) or ()
    wide = (m for _, m in layers(model) if isinstance(m, nn.Conv1d) and m.kernel_size != (1,))
    return not ATTENDS.issuperset(said) or next(wide, None) is not None


def positions(model: nn.Module, lens: Sequence[int]) -> Tensor:
    """position_ids [1, sum(lens)] that restart for each sequence, as `model` counts (RoBERTa starts at pad + 1)."""
    trunk: Any = getattr(model, "base_model", model)
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        raise Refusal(
            "Positions cannot restart inside a row, because the model takes no position_ids.",
            found=type(model).__name__,
            instead="padded batches for this model (no packed())",
        )
    start, device = first(trunk.config), next(trunk.parameters()).device
    return torch.cat([torch.arange(start, start + n, device=device) for n in lens])[None]
