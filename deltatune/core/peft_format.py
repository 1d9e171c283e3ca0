"""peft's folder format for the methods peft has: our tensors under its names, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..methods._decomposed import Decomposed
from ..methods._keys_values import KeysValues
from ..methods._rows import Rows
from ..methods.adalora import AdaLoRA
from ..methods.freeze import Head
from ..methods.ia3 import IA3, ScaleInput, ScaleOutput
from ..methods.lora import LoRA
from ..methods.low_rank import LowRank
from ..methods.prefix import Prefix
from ..methods.prompt import Prompt
from ..methods.ptuning import PTuning
from ..methods.triplets import Triplets
from . import peft_lora
from .attach import known
from .delta import Delta
from .manifest import CONFIG
from .peft_parts import PREFIX, TENSORS, Parts, all_of, body, short_names
from .registry import METHODS, whole
from .site import head_modules, is_conv1d, put, take, widths
from .slot import slots

__all__ = ["CONFIG", "TENSORS", "methods", "read", "resize", "strict", "writable", "write"]

TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# peft refuses these of state-space models, whose fused kernel reads their weights while it trains
UNTOLD = re.compile(r"(^|\.)(mixer|mamba)\.(out_proj|conv1d)$")


def writable(model: nn.Module, name: str) -> str | None:
    """The peft type adapter `name` can be saved as, or None: peft lacks the method, the union, or this form of it."""
    methods = [m for m in known(model, name).methods[name] if not isinstance(m, Head)]
    if len(methods) != 1:
        return None
    (only,) = methods
    if METHODS[only.method_name].peft is None:  # whatever it is derived from
        return None
    if isinstance(only, LoRA | AdaLoRA) and any(UNTOLD.search(layer) for layer in body(model, name)):
        return None
    if isinstance(only, LoRA):
        return "LORA"
    if isinstance(only, AdaLoRA) and peft_lora.separable(body(model, name)):
        return "ADALORA"
    if isinstance(only, IA3) and not any(len({type(d) for d in p}) > 1 for p in body(model, name).values()):
        return "IA3"
    alone = len(known(model, name).methods[name]) == 1
    if isinstance(only, Prefix) and alone and task(model) == "CAUSAL_LM" and as_peft(model, name, only):
        return "PREFIX_TUNING"
    headed = hasattr(model.config, "num_attention_heads")  # peft wants to know it of every soft prompt
    if not isinstance(only, Prompt | PTuning) or not alone or not headed or task(model) not in GENERATES:
        return None
    return "PROMPT_TUNING" if all(d.count == 1 and not d.encoded for d in all_of(model, name, Rows)) else None


def as_peft(model: nn.Module, name: str, method: Prefix) -> bool:
    """peft keeps one [length, layers, 2, heads, dim] tensor, derives dim from the width of the model, and holds its
    prefix in the cache, where a sliding window loses sight of it: ours stays visible."""
    if not method.offset_positions or windowed(model):
        return False
    if any(d.source for d in all_of(model, name, KeysValues)):  # peft's prefix_projection drops the MLP only at load
        return False
    shapes = {d.shape for d in all_of(model, name, KeysValues)}
    config: Any = model.config
    dim = config.hidden_size // config.num_attention_heads
    return len(shapes) == 1 and next(iter(shapes))[2] == dim and all(d.shift() for d in all_of(model, name, KeysValues))


def windowed(model: Any) -> bool:
    kinds = getattr(model.config, "layer_types", None) or ()
    if kinds:
        return any("full" not in kind for kind in kinds)
    return getattr(model.config, "sliding_window", None) is not None


def task(model: nn.Module) -> str | None:
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None  # peft's task classes pass token ids
    return next(
        (t for ending, t in TASKS.items() if type(model).__name__.endswith(ending)),
        "SEQ_CLS" if head_modules(model) else None,
    )


# ---- writing ---------------------------------------------------------------------------------------------------------
def write(model: nn.Module, name: str, kind: str, base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, tensors) of adapter `name` as peft type `kind`."""
    parts = body(model, name)
    extra, tensors = WRITERS[kind](model, name, parts)
    heads = [(path, d) for path, slot in slots(model).items() for d in slot.of(name) if d.inplace]
    if heads:
        extra["modules_to_save"] = head_modules(model)
    for path, delta in heads:
        tensors |= {f"{PREFIX}{path}.{key}": t for key, t in delta.stored(model.get_submodule(path)).items()}
    common = {"peft_type": kind, "task_type": task(model), "base_model_name_or_path": base, "inference_mode": True}
    return {**common, "revision": None, **extra}, {k: t.detach().contiguous() for k, t in tensors.items()}


def write_ia3(model: nn.Module, name: str, parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, inputs = {}, []
    for path, ds in parts.items():
        layer = model.get_submodule(path)
        first = ds[0]
        if isinstance(first, ScaleInput):
            inputs.append(path)
            tensors[f"{PREFIX}{path}.ia3_l"] = first.ia3_l[None]
        else:
            whole = torch.ones(widths(layer)[1])
            for d in (d for d in ds if isinstance(d, ScaleOutput)):
                whole = put(whole, d.site.columns, d.ia3_l.detach().cpu().float(), 0)
            tensors[f"{PREFIX}{path}.ia3_l"] = whole[:, None]
    config = {
        "target_modules": short_names(model, list(parts)),
        "feedforward_modules": short_names(model, inputs),
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(p)) for p in parts),
    }
    return config, tensors


def write_prefix(model: nn.Module, name: str, parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    deltas = all_of(model, name, KeysValues)
    heads, length, dim = deltas[0].shape
    stacked = torch.stack([t for d in deltas for t in (d.k, d.v)])  # [2 layers, heads, length, dim]
    config = virtual(model, length, len(deltas)) | {
        "token_dim": heads * dim,
        "num_attention_heads": heads,
        "encoder_hidden_size": heads * dim,
        "prefix_projection": False,
    }
    return config, {"prompt_embeddings": stacked.permute(2, 0, 1, 3).reshape(length, -1)}


def write_prompt(model: Any, name: str, parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (rows,) = all_of(model, name, Rows)
    length, d = rows.vectors().shape
    config = virtual(model, length, model.config.num_hidden_layers) | {"token_dim": d, "prompt_tuning_init": "RANDOM"}
    return config, {"prompt_embeddings": rows.prompt_embeddings}


def virtual(model: Any, length: int, n_layers: int) -> dict[str, Any]:
    return {
        "num_virtual_tokens": length,
        "num_layers": n_layers,
        "num_attention_heads": model.config.num_attention_heads,
        "num_transformer_submodules": 1,
    }


Writer = Callable[[nn.Module, str, Parts], tuple[dict[str, Any], dict[str, Tensor]]]
WRITERS: dict[str, Writer] = {
    "LORA": peft_lora.write_lora,
    "ADALORA": peft_lora.write_adalora,
    "IA3": write_ia3,
    "PREFIX_TUNING": write_prefix,
    "PROMPT_TUNING": write_prompt,
}


# ---- reading ---------------------------------------------------------------------------------------------------------
def methods(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[Any, ...]:
    """The methods that a foreign peft folder describes. Layers come from the tensors: no regex of the file is run."""
    kind = config.get("peft_type")
    refuse_options(config)
    heads = (Head(),) if config.get("modules_to_save") else ()
    if kind in ("LORA", "ADALORA"):
        return (peft_lora.read_lora(config, tensors), *heads)
    if kind == "IA3":
        paths = {k[len(PREFIX) :].removesuffix(".ia3_l"): t for k, t in tensors.items() if k.endswith(".ia3_l")}
        inputs = tuple(p for p, t in paths.items() if t.shape[0] == 1)
        return (IA3(outputs=tuple(p for p in paths if p not in inputs), inputs=inputs), *heads)
    if kind == "PREFIX_TUNING":
        return (Prefix(length(config, tensors)),)
    if kind == "PROMPT_TUNING":
        return (Prompt(length(config, tensors)),)
    raise ValueError(f"{CONFIG}: peft_type {kind!r} is not read; choose from {', '.join(WRITERS)}")


def length(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """How many virtual tokens: what the configuration says, if the tensors say it too."""
    said, rows = config.get("num_virtual_tokens"), tensors.get("prompt_embeddings")
    whole(f"{CONFIG}: num_virtual_tokens", said)
    if rows is None or rows.ndim != 2 or len(rows) != said:
        found = "is not there" if rows is None else f"is {tuple(rows.shape)}"
        raise ValueError(f"{CONFIG} says num_virtual_tokens={said}, but prompt_embeddings in {TENSORS} {found}")
    return int(config["num_virtual_tokens"])


UNREAD = (
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "lora_bias",
    "prefix_projection",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)


def refuse_options(config: Mapping[str, Any]) -> None:
    """Options that change the function and that we do not read are errors, never ignored."""
    for key in UNREAD:
        if config.get(key):
            raise ValueError(
                f"{CONFIG}: {key}={config[key]!r} is not supported: merge the adapter with peft, load the merged model"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{CONFIG}: bias={config['bias']!r} is not supported: save the adapter with bias='none', or merge it"
        )


def resize(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give the deltas of adapter `name`, just attached, the ranks that the file's tensors have."""
    for path, ds in body(model, name).items():
        for delta in (d for d in ds if isinstance(d, Triplets)):
            delta.take_form(peft_lora.in_adalora(model, name, path, delta, tensors))


def read(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft's tensors -> ours, for an adapter that is attached; ValueError on missing, unexpected or misshapen ones."""
    kind = writable(model, name)
    if kind is None:
        raise ValueError(f"adapter {name!r} has no peft form on {type(model).__name__}")
    _, ours = write(model, name, kind, None)
    strict(ours, tensors)
    found: dict[str, Tensor] = {}
    for path, slot in slots(model).items():
        for delta in slot.of(name):
            found |= {
                f"{delta.site.key}.{k}": t
                for k, t in READERS.get(type(delta), in_head)(model, name, path, delta, tensors).items()
            }
    return found


def strict(ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Same names and shapes, or a ValueError that lists the first of each kind of difference."""
    missing, unexpected = sorted(set(ours) - set(given)), sorted(set(given) - set(ours))
    shapes = [
        f"{k} {tuple(given[k].shape)} != {tuple(ours[k].shape)}"
        for k in ours
        if k in given and given[k].shape != ours[k].shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    said = [f"{len(names)} {what}, such as {names[0]}" for what, names in problems if names]
    if said:
        raise ValueError(
            f"the adapter's tensors do not fit this model: {'; '.join(said)}. Load it on the base it was trained on"
        )


def in_ia3(model: nn.Module, name: str, path: str, delta: Delta, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"ia3_l": take(tensors[f"{PREFIX}{path}.ia3_l"].reshape(-1), delta.site.columns, 0)}


def in_prefix(
    model: nn.Module, name: str, path: str, delta: KeysValues, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    deltas = all_of(model, name, KeysValues)
    heads, length, dim = delta.shape
    whole = tensors["prompt_embeddings"].view(length, 2 * len(deltas), heads, dim).permute(1, 2, 0, 3)
    at = 2 * deltas.index(delta)
    return {"k": whole[at], "v": whole[at + 1]}


def in_prompt(model: nn.Module, name: str, path: str, delta: Delta, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"prompt_embeddings": tensors["prompt_embeddings"]}


def in_head(model: nn.Module, name: str, path: str, delta: Delta, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[f"{PREFIX}{path}.{key}"] for key in delta.trained(model.get_submodule(path))}


READERS: dict[type, Callable[..., dict[str, Tensor]]] = {
    LowRank: peft_lora.in_lora,
    Decomposed: peft_lora.in_lora,
    Triplets: peft_lora.in_adalora,
    ScaleInput: in_ia3,
    ScaleOutput: in_ia3,
    KeysValues: in_prefix,
    Rows: in_prompt,
}
