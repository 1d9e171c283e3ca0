"""The kinds of bias of a transformer: those of its blocks under the names of BitFit's paper (arXiv:2106.10199), and
those outside them, which the paper trains with all and has no name for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .delta import Refusal
from .registry import nearest
from .site import ROLES, Site, at, block_linears, block_of, is_norm, layers, plays, trunk

# "output" is both projections back into the residual stream, as in the paper's code
TERMS: dict[str, tuple[str, ...]] = {
    "query": ("q",), "key": ("k",), "value": ("v",), "intermediate": ("up",), "output": ("o", "down"),
    "attention_layernorm": (), "output_layernorm": (), "outside": (),
}  # fmt: skip
DRIFT = {"q": "query", "k": "key", "v": "value", "up": "intermediate", "o": "output", "down": "output"}


def norms(model: nn.Module) -> dict[str, str]:
    """layer -> attention_layernorm or output_layernorm: the last norm of a block belongs to the feed-forward part."""
    by_block: dict[str, list[str]] = {}
    for name, layer in layers(model):
        if is_norm(layer) and (block := block_of(name)):
            by_block.setdefault(block, []).append(name)
    ends = {names[-1] for names in by_block.values()}
    return {n: ("output" if n in ends else "attention") + "_layernorm" for names in by_block.values() for n in names}


def outside(model: nn.Module) -> set[str]:
    """The layers of the body with a bias outside its blocks: the embeddings' norm, a last norm, a pooler."""
    inner = {id(p) for p in trunk(model).parameters()}
    return {name for name, layer in layers(model) if not block_of(name) and id(layer._parameters.get("bias")) in inner}


def kind_of_bias(model: nn.Module, name: str) -> str:
    """The term for the bias of layer `name`; "other" for fused projections and what else of a block has no name."""
    if not block_of(name):
        return "outside"
    played = [DRIFT[role] for role in ROLES if plays(name, role)]
    return played[0] if len(played) == 1 else norms(model).get(name, "other")


def term_sites(model: nn.Module, targets: Sequence[str]) -> set[str]:
    """The layers that terms, roles, names or regexes mean. Refusal for one part of a fused projection's bias."""
    found: set[str] = set()
    parts: dict[str, set[str]] = {}
    for target in (targets,) if isinstance(targets, str) else targets:
        if target == "all":
            found |= set(block_linears(model))
        elif target == "outside":
            found |= outside(model)
        elif target.endswith("_layernorm") and target in TERMS:
            found |= {name for name, kind in norms(model).items() if kind == target}
        else:
            for site in meant(model, target):
                whole_or_part(site, found, parts)
    for name, labels in parts.items():
        if labels != {"q", "k", "v"}:
            raise Refusal(
                "the parts of a fused projection share one bias, which BitFit trains as a whole.",
                found=f"{name} as {', '.join(sorted(labels))}",
                instead="query, key and value together, or the layer by its name",
            )
        found.add(name)
    return found


def meant(model: nn.Module, target: str) -> list[Site]:
    try:
        return at(model, TERMS.get(target, (target,)))
    except ValueError as error:
        near = nearest(target, list(TERMS))
        raise ValueError(f"{error}{near} BitFit's own terms: {', '.join(TERMS)}, all.") from None


def whole_or_part(site: Site, found: set[str], parts: dict[str, set[str]]) -> None:
    if site.columns:
        parts.setdefault(site.write, set()).add(site.label)
    else:
        found.add(site.write)
