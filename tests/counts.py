"""How many parameters each variant must have on each tiny model, by the papers' formulas and the models' shapes alone.

A cell has `parts` (its methods and their fields), `family` and `original` (the model).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models import FAMILIES

GATED = ("llama", "qwen", "mistral", "gemma")


def count(cell: Any) -> int:
    """Parameters of a variant by the papers' formulas: d = 32, f = 48, 2 blocks (2 + 2 in encoder-decoders)."""
    return sum(COUNTS[name](cell, fields) for part in cell.parts for name, fields in part.items())


def shape(cell: Any) -> tuple[int, int, int, dict[str, tuple[tuple[int, int], ...]]]:
    """(attention layers, feed-forward layers, key-value width, role -> (d_in, d_out) of its layers)."""
    family = FAMILIES[cell.family]
    attention, ffn = (6, 4) if family.kind == "seq2seq" else (2, 2)
    kv = 16 if family.gqa else 32
    up = ((32, 48), (32, 48)) if cell.family in GATED else ((32, 96 if cell.family in ("phi3", "modernbert") else 48),)
    shapes = {"q": ((32, 32),), "k": ((32, kv),), "v": ((32, kv),), "o": ((32, 32),), "up": up, "down": ((48, 32),)}
    return attention, ffn, kv, shapes


def count_lora(cell: Any, fields: dict[str, Any]) -> int:
    attention, ffn, _, shapes = shape(cell)
    if FAMILIES[cell.family].fused and "targets" not in fields:  # "all" takes a fused projection as one layer
        shapes = {"o": shapes["o"], "up": shapes["up"], "down": shapes["down"]}
        shapes["qkv"] = ((32, 32 + 2 * shape(cell)[2]),)
    roles = fields.get("targets", shapes)
    layers = {role: ffn if role in ("up", "down") else attention for role in shapes}
    return sum(layers[role] * fields["r"] * (i + o) for role in roles for i, o in shapes[role])


def count_adapter(cell: Any, fields: dict[str, Any]) -> int:
    attention, ffn, _, _ = shape(cell)
    places = {"attention": attention, "ffn": ffn}
    m = fields["bottleneck"]
    return sum(places[w] * (2 * 32 * m + m + 32) for w in fields.get("where", places))


def count_named(chosen: Callable[[str, Any], bool]) -> Callable[[Any, dict], int]:
    def total(cell: Any, fields: dict[str, Any]) -> int:
        return sum(p.numel() for n, p in cell.original.named_parameters() if chosen(n, cell))

    return total


HEADS = ("score", "classifier", "pre_classifier", "classification_head", "head", "lm_head", "cls", "decoder",
         "vocab_transform", "vocab_layer_norm", "vocab_projector", "generator_predictions",
         "generator_lm_head")  # fmt: skip


def in_head(name: str, cell: Any) -> bool:
    return name.split(".")[0] in HEADS and not (cell.family == "t5" and name.startswith("decoder"))


def in_last_block(name: str, cell: Any) -> bool:
    seq2seq = FAMILIES[cell.family].kind == "seq2seq"
    return any(f".{w}.1." in name.replace("decoder.block", "x.block") for w in ("layers", "h", "block", "layer")) and (
        not seq2seq or "decoder" in name
    ) and not (cell.family == "t5" and "block.1." not in name)  # fmt: skip


def count_prefix(cell: Any, fields: dict[str, Any]) -> int:
    attention, _, kv, _ = shape(cell)
    if fields.get("reparam") != "mlp":
        return attention * 2 * kv * fields["length"]
    h, stacks = fields["hidden"], 3 if FAMILIES[cell.family].kind == "seq2seq" else 1
    return stacks * (32 * fields["length"] + (32 + 1) * h) + attention * 2 * kv * (h + 1)


def count_ptuning(cell: Any, fields: dict[str, Any]) -> int:
    """Inputs, then 2 x 2 LSTM directions of d/2 units and two linear layers, or three linear layers."""
    linear = 32 * 32 + 32
    lstm = 4 * (4 * 16 * (32 + 16) + 2 * 4 * 16) + 2 * linear
    inputs = 32 * fields["length"] * fields.get("count", 1)
    return inputs + (3 * linear if fields.get("encoder") == "mlp" else lstm)


COUNTS: dict[str, Callable[[Any, dict], int]] = {
    "lora": count_lora,
    "ia3": lambda c, _: shape(c)[0] * 2 * shape(c)[2] + shape(c)[1] * 48,
    "adapter": count_adapter,
    "prefix": count_prefix,
    "prompt": lambda c, f: 32 * f["length"] * f.get("count", 1),
    "ptuning": count_ptuning,
    "tokens": lambda c, f: 32 * len(f["ids"]) * (1 if c.original.config.tie_word_embeddings else 2),
    "bitfit": count_named(lambda n, c: n.endswith("bias") and not in_head(n, c)),
    "freeze": count_named(in_last_block),
    "full": count_named(lambda n, c: True),
    "head": count_named(in_head),
}
