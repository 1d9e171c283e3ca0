"""peft's LORA (with use_rslora, use_dora) and ADALORA: our factors under its names, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..methods._decomposed import Decomposed
from ..methods.adalora import AdaLoRA
from ..methods.budget import in_steps
from ..methods.dora import DoRA
from ..methods.lora import LoRA
from ..methods.low_rank import LowRank
from ..methods.triplets import Triplets
from .change import Low, fitting
from .manifest import CONFIG
from .peft_parts import PREFIX, TENSORS, Parts, at, most, short_names, widened
from .quant import dense
from .registry import finite, whole
from .site import is_conv1d, put, take, widths

MOST_RANK, MOST_ALPHA = 512, 100_000  # a file of strangers: beyond these it is a mistake or an attack
MOST_PATTERN, MOST_REPEATS = 200, 3  # what a regex of a file may have, so that matching it takes no time
MAGNITUDE = "lora_magnitude_vector"
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits after which peft's base is another


# ---- writing ---------------------------------------------------------------------------------------------------------
def write_lora(model: nn.Module, name: str, parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, ranks, alphas = {}, {}, {}
    first = next(d for ds in parts.values() for d in ds if isinstance(d, LowRank))
    rooted = first.method.scaling == "rslora"
    for path, ds in parts.items():
        low = [d for d in ds if isinstance(d, LowRank)]
        d_out = widths(model.get_submodule(path))[1]
        pairs = [d.stacked() for d in low]
        ranks[path] = sum(len(a) for a, _ in pairs)
        alphas[path] = low[0].scale * (ranks[path] ** 0.5 if rooted else ranks[path])
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat(
            [widened(d, b * (d.scale / low[0].scale), d_out) for d, (_, b) in zip(low, pairs, strict=True)], 1
        )
        if isinstance(low[0], Decomposed):
            tensors[f"{PREFIX}{path}.{MAGNITUDE}"] = magnitudes(model.get_submodule(path), low)
    r, alpha = most(ranks.values()), most(alphas.values())
    config = common(model, parts) | {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {p: v for p, v in ranks.items() if v != r},
        "alpha_pattern": {p: v for p, v in alphas.items() if v != alpha},
        "use_rslora": rooted,
        "use_dora": isinstance(first, Decomposed),
    }
    return config, tensors


def common(model: nn.Module, parts: Parts) -> dict[str, Any]:
    conv = any(is_conv1d(model.get_submodule(p)) for p in parts)
    return {"target_modules": short_names(model, list(parts)), "bias": "none", "fan_in_fan_out": conv}


def magnitudes(layer: nn.Module, parts: list[Any]) -> Tensor:
    """m [d_out] of the whole layer: rows that no part changes keep the norm they have."""
    if parts[0].site.columns is None:
        return torch.as_tensor(parts[0].lora_magnitude_vector)
    whole = torch.linalg.vector_norm(dense(layer).weight, dim=1, dtype=torch.float32)
    for delta in parts:
        whole = put(whole, delta.site.columns, delta.lora_magnitude_vector.detach().to(whole), 0)
    return whole


def separable(parts: Parts) -> bool:
    """Whether each layer has one delta, or parts of a fused projection that share no output."""
    return all(len(ds) == 1 or all(d.site.columns for d in ds) for ds in parts.values())


def write_adalora(model: nn.Module, name: str, parts: Parts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of every layer the triplets that are left; `rank_pattern` says how many of init_r those are."""
    tensors, ranks = {}, {}
    (method,) = {d.method for ds in parts.values() for d in ds}
    init_r = max(len(ds) for ds in parts.values()) * method.init_r
    budget = next(d.budget for ds in parts.values() for d in ds if isinstance(d, Triplets))
    for path, ds in parts.items():
        here = [d for d in ds if isinstance(d, Triplets)]
        d_out, where = widths(model.get_submodule(path))[1], f"{PREFIX}{path}."
        ranks[path] = sum(d.rank for d in here)
        tensors[where + "lora_A"] = torch.cat([d.lora_A for d in here])
        tensors[where + "lora_B"] = torch.cat([widened(d, d.lora_B, d_out) for d in here], 1)
        tensors[where + "lora_E"] = torch.cat([d.lora_E for d in here])
    kept = {f"{p}.lora_E": [i < rank for i in range(init_r)] for p, rank in ranks.items()}
    config = common(model, parts) | {
        "init_r": init_r,
        "target_r": method.r,
        "lora_alpha": method.alpha / method.init_r * init_r,
        "lora_dropout": method.dropout,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.gamma,
        "total_step": budget.steps or 1,
        "tinit": budget.tinit if budget.steps else 0,
        "tfinal": budget.steps - budget.end,
        "deltaT": max(1, in_steps(budget.shares[2], budget.steps)),
        "rank_pattern": kept if any(rank < init_r for rank in ranks.values()) else None,
    }
    return config, tensors


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoRA | AdaLoRA:
    """LoRA, DoRA or AdaLoRA, as the configuration says."""
    adaptive = config["peft_type"] == "ADALORA"
    refuse_rewritten(config)
    ends = ".lora_A" if adaptive else ".lora_A.weight"
    factors = {k[len(PREFIX) :].removesuffix(ends): t for k, t in tensors.items() if k.endswith(ends)}
    if not factors:
        raise ValueError(f"{TENSORS} holds no '*{ends}' tensor: it is not a LoRA adapter")
    ranks = {p: t.shape[0] if t.ndim == 2 else 0 for p, t in factors.items()}
    if adaptive:
        return read_adalora(config, ranks)
    check_ranks(config, ranks)
    alphas = read_alphas(config, ranks)
    for path, most_there in limits(factors, tensors).items():
        if ranks[path] > most_there:  # `fitted` makes the tensors of that rank
            share = most_there / ranks[path]
            alphas[path] *= share**0.5 if config.get("use_rslora") else share
            ranks[path] = most_there
    r, alpha = most(ranks.values()), most(alphas.values())
    own = {p: {"r": ranks[p], "alpha": alphas[p]} for p in ranks if (ranks[p], alphas[p]) != (r, alpha)}
    scaling = "rslora" if config.get("use_rslora") else "standard"
    cls = DoRA if config.get("use_dora") else LoRA
    return cls(r, alpha, config.get("lora_dropout") or 0.0, tuple(ranks), own, scaling)


def fitted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the layers whose rank is above their size (a PiSSA's, with its start): the same change at that size."""
    found: dict[str, Tensor] = {}
    for key, a in tensors.items():
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(".lora_A.weight") and b is not None and len(a) > min(a.shape[1], len(b)):
            low = fitting(Low(a.double(), b.double()))
            found |= {key: low.a.to(a), key.replace(".lora_A.", ".lora_B."): low.b.to(b)}
    return found


def limits(factors: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """layer -> the rank that its change can have: the smaller of d_in and d_out."""
    found = {p: (a, tensors.get(f"{PREFIX}{p}.lora_B.weight")) for p, a in factors.items()}
    return {p: min(a.shape[-1], len(b)) for p, (a, b) in found.items() if b is not None and a.ndim == b.ndim == 2}


def refuse_rewritten(config: Mapping[str, Any]) -> None:
    """Factors whose start peft has taken out of the base belong to a base that the folder does not hold."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(REWRITES_BASE):
        raise ValueError(
            f"{CONFIG}: init_lora_weights={init!r} belongs to a base that peft has changed: save it in peft with "
            "path_initial_model_for_weight_conversion, which makes it a LoRA of the base as it was"
        )


def read_adalora(config: Mapping[str, Any], ranks: Mapping[str, int]) -> AdaLoRA:
    most_r, target, alpha = config.get("init_r"), config.get("target_r", 8), config.get("lora_alpha")
    check_rank(most_r)
    check_rank(target)
    check_alpha(alpha)
    for path, rank in ranks.items():
        if rank > int(most_r or 0):
            raise ValueError(f"{CONFIG} says init_r={most_r}, but the tensors of {path} have rank {rank}")
    names = {"lora_dropout": "dropout", "orth_reg_weight": "gamma", "beta1": "beta1", "beta2": "beta2"}
    names |= {"tinit": "tinit", "tfinal": "tfinal", "deltaT": "delta_t"}
    fields = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    paths = {**dict.fromkeys(p.removesuffix(".lora_E") for p in pattern(config, "rank_pattern")), **ranks}
    return AdaLoRA(
        int(most_r or 0),
        min(target, int(most_r or 0)),
        alpha or 0.0,
        targets=tuple(paths),
        penalty="distances",
        **fields,
    )


def check_rank(r: Any) -> None:
    whole(f"{CONFIG}: r", r)
    if r > MOST_RANK:
        raise ValueError(f"{CONFIG}: r={r} is above {MOST_RANK}: merge the adapter with peft, load the merged model")


def check_alpha(alpha: Any) -> None:
    finite(f"{CONFIG}: lora_alpha", alpha, above=0)
    if alpha > MOST_ALPHA:
        raise ValueError(f"{CONFIG}: lora_alpha={alpha!r} is above {MOST_ALPHA}, which no training run survives")


def check_ranks(config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """The ranks that the file says are the ranks that its tensors have."""
    given = pattern(config, "rank_pattern")
    for r in (config.get("r"), *given.values()):
        check_rank(r)
    for path, rank in ranks.items():
        said = matched(given, path, config["r"])
        if rank != said:
            raise ValueError(f"{CONFIG} says r={said}, but the tensors of {path} have rank {rank}: they do not match")


def read_alphas(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """layer -> lora_alpha."""
    given = pattern(config, "alpha_pattern")
    for alpha in (config.get("lora_alpha"), *given.values()):
        check_alpha(alpha)
    return {path: float(matched(given, path, config["lora_alpha"])) for path in ranks}


def pattern(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG}: {key}={found!r} must be an object")
    return found


def matched(given: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """The value of the first key that means `path`: a regex for the whole of it, or for an ending after a dot."""
    return next((v for k, v in given.items() if means(k, path)), otherwise)


def means(key: str, path: str) -> bool:
    if path == key or path.endswith("." + key):
        return True
    if (
        len(key) > MOST_PATTERN
        or re.search(r"\)[*+?{]|\(\?|\\[1-9]", key)
        or len(re.findall(r"[*+{]", key)) > MOST_REPEATS
    ):
        raise ValueError(
            f"{CONFIG}: the pattern {key[:MOST_PATTERN]!r} could take for ever to match (repeated groups, or more than "
            f"{MOST_REPEATS} repeats): write the layers' names"
        )
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except re.error as error:
        raise ValueError(f"{CONFIG}: the pattern {key!r} is no regular expression: {error}") from None


def in_lora(model: nn.Module, name: str, path: str, delta: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    siblings = [d for d in at(model, name, path) if isinstance(d, LowRank)]
    start = sum(len(d.stacked()[0]) for d in siblings[: siblings.index(delta)])
    end = start + len(delta.stacked()[0])
    a = tensors[f"{PREFIX}{path}.lora_A.weight"][start:end]
    b = tensors[f"{PREFIX}{path}.lora_B.weight"][:, start:end]
    found = delta.unstacked(a, take(b, delta.site.columns, 0) * (siblings[0].scale / delta.scale))
    if isinstance(delta, Decomposed):
        found["lora_magnitude_vector"] = take(tensors[f"{PREFIX}{path}.{MAGNITUDE}"], delta.site.columns, 0)
    return found


def in_adalora(model: nn.Module, name: str, path: str, delta: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A fused projection's parts are told apart by the outputs that a triplet reaches."""
    where = f"{PREFIX}{path}."
    a, b, e = (tensors.get(where + key) for key in ("lora_A", "lora_B", "lora_E"))
    if a is None or b is None or e is None or not len(a):
        return {}
    b = take(b, delta.site.columns, 0)
    mine = b.any(0) if delta.site.columns else torch.ones(b.shape[1], dtype=torch.bool)
    return {"lora_A": a[mine], "lora_B": b[:, mine], "lora_E": e[mine]}
