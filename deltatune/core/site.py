"""Site: which layer is read and which is written, and the roles layers play. The one file that knows foreign models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .delta import SLOT, Refusal

Range = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """Read at the input of `read`, write at the output of `write` (full module names).

    `columns` restricts a fused projection to ranges of its output features; `label` names that part in stored keys.
    """

    read: str
    write: str
    columns: tuple[Range, ...] | None = None
    label: str = ""

    @property
    def is_span(self) -> bool:
        return self.read != self.write

    @property
    def key(self) -> str:
        """The stable name under which this site's tensors are stored."""
        return f"{self.write}[{self.label}]" if self.label else self.write


# ---- roles -------------------------------------------------------------------------------------------------------
# A layer's role is told from its name: every supported family uses one of these spellings.
ROLES = {
    "q": r"(q_proj|query|q|q_lin|q_attn)",
    "k": r"(k_proj|key|k|k_lin)",
    "v": r"(v_proj|value|v|v_lin)",
    "o": r"((self_attn|encoder_attn|attn|attention|SelfAttention|EncDecAttention)"
    r"\.(o_proj|out_proj|c_proj|o|out_lin|dense|Wo)|attention\.output\.dense)",
    "up": r"(gate_proj|up_proj|gate_up_proj|fc1|mlp\.c_fc|wi|wi_0|wi_1|lin1|dense_h_to_4h|intermediate\.dense|mlp\.Wi"
    r"|(mixer|mamba)\.in_proj)",  # a state-space block is a gated feed-forward layer around its recurrence
    "down": r"(down_proj|fc2|mlp\.c_proj|wo|lin2|dense_4h_to_h|(?<!attention\.)output\.dense|mlp\.Wo"
    r"|(mixer|mamba)\.out_proj)",
}
# layers whose weights their model reads without calling them, so that no hook of theirs ever runs
UNCALLED = re.compile(r"(^|\.)(mixer|mamba)\.(conv1d|dt_proj)$")
FUSED = re.compile(r"(^|\.)(c_attn|qkv_proj|query_key_value|Wqkv)$")
ATTENTION, FFN = ("q", "k", "v", "o"), ("up", "down")
GROUPS = {"attention": ATTENTION, "ffn": FFN, "all": ATTENTION + FFN}
CHOICES = (*ROLES, "norm", *GROUPS)
# T5 nests 'layer.N' inside 'block.M': the block is the outermost numbered container
BLOCK = re.compile(r"^((?:.*?\.)?(?:layers|layer|h|block)\.\d+)\.")


def block_of(name: str) -> str | None:
    """The transformer block a module lives in ('model.layers.3'), or None outside the blocks."""
    found = BLOCK.match(name)
    return found.group(1) if found else None


def is_linear(layer: nn.Module) -> bool:
    """nn.Linear, its quantised kin, or GPT-2's Conv1D."""
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, Tensor)
        and not isinstance(layer, nn.Embedding)
        and (weight.ndim == 2 or hasattr(weight, "quant_state"))
    )


def is_norm(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower() and isinstance(getattr(layer, "weight", None), Tensor)


def is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight as [d_in, d_out]."""
    return type(layer).__name__ == "Conv1D"


def widths(layer: Any) -> tuple[int, int]:
    """(d_in, d_out) of nn.Linear, its quantised kin, Conv1D or an embedding (vocab, d)."""
    if hasattr(layer, "in_features"):
        return int(layer.in_features), int(layer.out_features)
    shape = tuple(layer.weight.shape)
    if len(shape) == 1:
        return shape[0], shape[0]
    return shape[0], shape[1]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base model, slots left out."""
    for name, module in model.named_modules():
        if SLOT not in name.split("."):
            yield name, module


def block_linears(model: nn.Module) -> list[str]:
    """The linear layers inside the transformer blocks: what 'all' may choose from."""
    return [name for name, layer in layers(model) if block_of(name) and is_linear(layer)]


# ---- fused projections ---------------------------------------------------------------------------------------------
def fused_columns(model: nn.Module, name: str, role: str) -> tuple[Range, ...]:
    """The output ranges of a fused q/k/v projection that hold `role`."""
    config: Any = model.config
    width = widths(model.get_submodule(name))[1]
    heads = config.num_attention_heads
    third = "qkv".index(role)
    if name.endswith("query_key_value"):  # GPT-NeoX: [heads, (q, k, v), head_dim]
        dim = width // (3 * heads)
        return tuple((h * 3 * dim + third * dim, h * 3 * dim + (third + 1) * dim) for h in range(heads))
    if name.endswith("qkv_proj"):  # Phi-3: q, then the narrower k and v
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = width // (heads + 2 * kv_heads)
        ends = [0, heads * dim, (heads + kv_heads) * dim, width]
    else:  # GPT-2 c_attn, ModernBERT Wqkv: three equal parts
        ends = [0, width // 3, 2 * width // 3, width]
    return ((ends[third], ends[third + 1]),)


def take(y: Tensor, columns: tuple[Range, ...] | None, dim: int = -1) -> Tensor:
    """The chosen output features of y [*, d_out]."""
    if columns is None:
        return y
    return torch.cat([y.narrow(dim, a, b - a) for a, b in columns], dim)


def put(y: Tensor, columns: tuple[Range, ...] | None, part: Tensor, dim: int = -1) -> Tensor:
    """y with the chosen output features replaced by `part`."""
    if columns is None:
        return part
    pieces, at, used = [], 0, 0
    for a, b in columns:
        pieces += [y.narrow(dim, at, a - at), part.narrow(dim, used, b - a)]
        at, used = b, used + b - a
    pieces.append(y.narrow(dim, at, y.shape[dim] - at))
    return torch.cat(pieces, dim)


# ---- finding -------------------------------------------------------------------------------------------------------
def find(model: nn.Module, target: str) -> list[Site]:
    """The sites that a role, a group of roles, an exact name (or its ending), or a regex over whole names means.

    Raises ValueError with the nearest names when nothing matches.
    """
    if target == "norm":
        found = [Site(name, name) for name, layer in layers(model) if is_norm(layer) and block_of(name)]
    elif target in GROUPS:
        found = [Site(name, name) for name in of_group(model, target)]
    elif target in ROLES:
        found = list(role_sites(model, target))
    else:
        found = [Site(name, name) for name in named(model, target)]
    if not found and target in CHOICES:
        raise unplayed(model, target)
    if not found:
        raise ValueError(no_match(model, target))
    return found


def of_group(model: nn.Module, group: str) -> list[str]:
    """The layers that play a role of `group`; of a model whose names tell no role at all, 'all' is every linear one."""
    linears = block_linears(model)
    known = [name for name in linears if any(plays(name, role) for role in GROUPS[group])]
    return known or [name for name in linears if group == "all" and not UNCALLED.search(name)]


def plays(name: str, role: str) -> bool:
    """Whether a layer's name plays a role; a fused projection plays q, k and v at once."""
    if FUSED.search(name):
        return role in "qkv" and len(role) == 1
    return re.search(r"(^|\.)" + ROLES[role] + "$", name) is not None


def role_sites(model: nn.Module, role: str) -> Iterator[Site]:
    for name in block_linears(model):
        if not plays(name, role):
            continue
        if FUSED.search(name):
            yield Site(name, name, fused_columns(model, name, role), role)
        else:
            yield Site(name, name)


def named(model: nn.Module, target: str) -> list[str]:
    """Layers called `target`, ending in '.target', or matching it as a regex over the whole name."""
    candidates = [name for name, layer in layers(model) if name and isinstance(getattr(layer, "weight", None), Tensor)]
    if target in candidates:
        return [target]
    ending = [name for name in candidates if name.endswith("." + target)]
    if ending:
        return ending
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ValueError(
            f"target {target!r} is neither a layer name nor a valid regular expression ({error})"
        ) from None
    return [name for name in candidates if pattern.fullmatch(name)]


def no_match(model: nn.Module, target: str) -> str:
    """The error for a target that matches nothing: what there is, the nearest names, the way out."""
    leaves = leaves_of(model)
    near = [n for n in difflib.get_close_matches(target, [*CHOICES, *leaves], n=3, cutoff=0.5) if n != target]
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    return (
        f"target {target!r} matches no layer of {type(model).__name__}{experts(model)}.{hint} "
        f"Roles: {', '.join(CHOICES)}. Layer names in its blocks: {', '.join(leaves)}. A regex must match a whole name."
    )


def unplayed(model: nn.Module, role: str) -> Refusal:
    """For a known role (or group of them) that no layer of the model plays: those that its layers do play."""
    have = [r for r in ROLES if any(plays(name, r) for name in block_linears(model))]
    groups = [g for g, inside in GROUPS.items() if set(inside) & set(have)]
    said = f"the roles that its layers play ({', '.join((*have, *groups))}), such as " if have else ""
    return Refusal(
        f"target {role!r} matches no layer of {type(model).__name__}{experts(model)}: none plays that role.",
        found=f"linear layers in its blocks called {', '.join(leaves_of(model)) or 'nothing: there are none'}",
        instead=said + added(model),
    )


def added(model: nn.Module) -> str:
    """Changes of single layers that this model takes whether or not it has attention."""
    have = {r for r in FFN if any(plays(name, r) for name in block_linears(model))}
    if have != set(FFN):
        return "LoRA over layers by name, or by a regex over whole names"
    return 'LoRA(targets=("all",)), Adapter(where=("ffn",)), IA3(outputs=("down",))'


def experts(model: nn.Module) -> str:
    """What an error adds where a model has experts that no method reaches."""
    stacked = [name for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    return f" (its experts are 3-D parameters such as {stacked[0]!r}, which no method adapts yet)" if stacked else ""


def leaves_of(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in block_linears(model)})


def linear_at(model: nn.Module, targets: Iterable[str], who: str) -> list[Site]:
    """`at`, for methods that change a linear map: a Refusal when a target is a norm or an embedding."""
    found = at(model, targets)
    for site in found:
        layer = model.get_submodule(site.write)
        if not is_linear(layer):
            raise Refusal(
                f"{who} changes linear layers, and a target is none.",
                found=f"{site.write}: {type(layer).__name__}",
                instead="linear targets (a role such as 'q' or 'all'); NewTokens for embeddings, Freeze for norms",
            )
        if UNCALLED.search(site.write):
            raise Refusal(
                f"{who} changes what a layer puts out, and this one is never called: the model reads its weight.",
                found=site.write,
                instead="targets 'all', or 'in_proj', 'x_proj', 'out_proj'; Full, Freeze or BitFit train it in place",
            )
    return found


def at(model: nn.Module, targets: Iterable[str]) -> list[Site]:
    """The sites of every target, each once, in the model's order. Every target must match something."""
    if isinstance(targets, str):
        targets = (targets,)
    seen: dict[Site, None] = {}
    for target in targets:
        seen.update(dict.fromkeys(find(model, target)))
    order = {name: i for i, (name, _) in enumerate(layers(model))}
    return sorted(seen, key=lambda site: order[site.write])


def spans(model: nn.Module, read: str, write: str) -> list[Site]:
    """Pair each `write` layer with the `read` layer in its nearest common parent (self- against cross-attention)."""
    readers = list({site.write: None for site in find(model, read)})
    found = []
    for site in find(model, write):
        best = max(readers, key=lambda name: common(name, site.write))  # max keeps the first of equals
        if common(best, site.write) < len(parts(block_of(site.write) or site.write)):
            raise ValueError(f"{site.write} has no {read!r} layer in its block to read from")
        found.append(Site(best, site.write, label="span"))
    return found


def blocks(model: nn.Module) -> list[str]:
    """The transformer blocks, in the model's order; those of an encoder before those of its decoder."""
    return list(dict.fromkeys(b for name, _ in layers(model) if (b := block_of(name + "."))))


def lowest(model: nn.Module, count: int) -> set[str]:
    """The first `count` blocks of each stack. ValueError when a stack has no more than that."""
    stacks: dict[str, list[str]] = {}
    for block in blocks(model):
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    for stack, found in stacks.items():
        if count >= len(found):
            raise ValueError(
                f"{count} blocks left out, {stack} of {type(model).__name__} has {len(found)}: none is left"
            )
    return {block for found in stacks.values() for block in found[:count]}


# norms of what a stack reads: before its first block, wherever they stand among the modules
FIRST_NORM = re.compile(r"(.*\.)?(\w*embed\w*(\..*)?|pre_\w+)")


def norms_above(model: nn.Module, left_out: set[str]) -> set[int]:
    """The identities of the trunk's norms, without those of the blocks `left_out` and of what leads to them."""
    inner = trunk(model)
    start = name_of(model, inner)
    named = [(f"{start}.{name}".strip("."), m) for name, m in inner.named_modules() if is_norm(m)]
    return {
        id(m)
        for name, m in named
        if block_of(name) not in left_out and not (left_out and block_of(name) is None and FIRST_NORM.fullmatch(name))
    }


# the norm that a block of a post-norm family ends with; `final_layer_norm` is a pre-norm in the others
LAST_NORM = re.compile(r"output\.LayerNorm|output_layer_norm")
POST_NORM = ("bart", "marian", "plbart", "blenderbot-small")


def block_ends(model: nn.Module) -> list[Site]:
    """Per block, what computes its output: the final norm (post-norm families), else the module that ends with the
    residual sum (the block itself; T5's block returns a tuple, so there its last sub-layer)."""
    config: Any = model.config
    after = config.model_type in POST_NORM or getattr(config, "do_layer_norm_before", True) is False
    found = []
    for block in blocks(model):
        inside = [name.removeprefix(f"{block}.") for name, _ in layers(model) if name.startswith(f"{block}.")]
        norms = [n for n in inside if LAST_NORM.fullmatch(n) or (after and n == "final_layer_norm")]
        nested = [n for n in inside if re.fullmatch(r"layer\.\d+", n)]
        found.append(".".join((block, *(norms or nested)[-1:])))
    return [Site(name, name) for name in found]


def parts(name: str) -> list[str]:
    return name.split(".")


def common(a: str, b: str) -> int:
    """How many leading parts two module names share."""
    shared = 0
    for x, y in zip(parts(a), parts(b), strict=False):
        if x != y:
            break
        shared += 1
    return shared


def matches(site: Site, pattern: str) -> bool:
    """Whether a per-target pattern (a role, a group, a name or its ending, a regex) covers `site`."""
    name = site.write
    if pattern in GROUPS or pattern in ROLES:
        wanted = GROUPS.get(pattern, (pattern,))
        if site.columns:  # one part of a fused projection
            return site.label in wanted
        return any(plays(name, role) for role in wanted)
    return name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name) is not None


# ---- embeddings and heads --------------------------------------------------------------------------------------------
def trunk(model: nn.Module) -> Any:
    """The model without its head; the model itself where there is none."""
    inner = getattr(model, "base_model", model)
    if inner is model and hasattr(model, "classifier"):  # classifiers that hold one tower of CLIP or of Whisper
        return getattr(model, "vision_model", getattr(model, "encoder", model))
    return inner


def pairs(model: Any) -> bool:
    """Whether the model is an encoder with a decoder: Whisper's audio classifier is not, whatever its config says."""
    said = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return said and any(name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules())


def towers(model: Any) -> list[Any]:
    """CLIP's two encoders, which share nothing; [] for models with one trunk."""
    found = [getattr(model, name, None) for name in ("text_model", "vision_model")]
    return found if all(isinstance(m, nn.Module) for m in found) else []


INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features")


def read_first(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a stack of blocks is called with: ids, embeddings, pixels or audio features, [rows, ...]."""
    return next(x for x in (*args[:1], *map(kwargs.get, INPUTS)) if x is not None)  # args[0]: None beside inputs_embeds


def stem(model: nn.Module) -> Any:
    """The module that every forward pass calls: the trunk, but OPT's heads call the decoder inside it."""
    inner = trunk(model)
    return inner.decoder if getattr(getattr(model, "config", None), "model_type", "") == "opt" else inner


def mixers(model: nn.Module) -> list[Any]:
    """State-space layers. In training, a kernel that is installed reads the weights of all inside but `in_proj`."""
    return [m for _, m in layers(model) if isinstance(getattr(m, "conv1d", None), nn.Conv1d) and hasattr(m, "in_proj")]


def name_of(model: nn.Module, module: nn.Module) -> str:
    for name, other in model.named_modules(remove_duplicate=False):
        if other is module:
            return name
    raise ValueError(f"{type(module).__name__} is not a part of {type(model).__name__}")


def embedding(model: Any) -> str:
    """The name of the layer that reads the (encoder's) input: a token embedding, or what cuts an image or a sound into
    tokens. Of a model with two towers, the text's."""
    return name_of(model, input_layer(model))


def input_layer(model: Any) -> Any:
    """The layer that `embedding` names. None where a model does not say."""
    return model.get_encoder().get_input_embeddings() if pairs(model) else reader(model)


def texts(model: Any) -> Any:
    """The part that knows about words, whose vocabulary can be resized: of a model with two towers, the text's."""
    return next(iter(towers(model)), model)


def reader(model: Any) -> Any:
    """The layer that reads the input of a model's trunk; of an encoder-decoder, what its library says; None unknown."""
    inner = trunk(texts(model))
    return inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None


def embeddings(model: Any) -> list[str]:
    """The token embeddings: the encoder's and, where it is another module, the decoder's. [] for images."""
    names = [embedding(model)]
    if pairs(model):
        names.append(name_of(model, model.get_decoder().get_input_embeddings()))
    return [n for n in dict.fromkeys(names) if isinstance(model.get_submodule(n), nn.Embedding)]


def sequence(layer: nn.Module, y: Tensor) -> Tensor:
    """What an input layer returns as [..., seq, d]: convolutions put d first."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return y.flatten(2).transpose(1, 2)
    return y


def reads_width(layer: Any) -> int:
    """The d of what an input layer (`embedding`) returns."""
    if isinstance(layer, nn.Embedding):
        return int(layer.embedding_dim)
    inner = next(m for m in layer.modules() if isinstance(m, nn.Conv1d | nn.Conv2d))
    return int(inner.out_channels)


def scaled(layer: Any, rows: Tensor) -> Tensor:
    """Embedding rows as the layer returns them: Gemma's and BART's embeddings multiply theirs."""
    scale = getattr(layer, "embed_scale", 1.0)
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def twins(model: nn.Module, parameter: Tensor) -> list[str]:
    """The modules that hold this very parameter: more than one when weights are tied."""
    return [name for name, m in layers(model) if any(p is parameter for p in m._parameters.values())]


def head_modules(model: nn.Module) -> list[str]:
    """Task heads: top-level modules with parameters, outside the trunk, that are not the vocabulary projection."""
    inner, output = trunk(model), output_layer(model)
    if inner is model or output is not None:  # a language model's head is part of what was pre-trained
        return []
    return [
        name for name, child in model.named_children() if child is not inner and any(True for _ in child.parameters())
    ]


def fresh(model: nn.Module) -> list[str] | None:
    """The base's parameters that no checkpoint brought; None where nobody can know (a model made in memory)."""
    own = {n: p for n, p in model.named_parameters() if SLOT not in n.split(".")}
    read = {n for n, p in own.items() if getattr(p, "_is_hf_initialized", False)}  # transformers' mark
    return [n for n in own if n not in read] if read else None


def output_layer(model: Any) -> Any:
    """The vocabulary projection, where there is one."""
    return getattr(model, "get_output_embeddings", lambda: None)()
