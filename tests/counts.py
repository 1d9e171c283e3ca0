"""How many parameters each variant must have on each tiny model, by the papers' formulas and the models' shapes alone.

A cell has `parts` (its methods and their fields), `family` and `original` (the model).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from models import ALL, BEYOND_TEXT

GATED = ("llama", "qwen", "mistral", "gemma")


def count(cell: Any) -> int:
    """Parameters of a variant by the papers' formulas: d = 32, f = 48, 2 blocks (2 + 2 in encoder-decoders)."""
    return sum(COUNTS[name](cell, fields) for part in cell.parts for name, fields in part.items())


def shape(cell: Any) -> tuple[int, int, int, dict[str, tuple[tuple[int, int], ...]]]:
    """(attention layers, feed-forward layers, key-value width, role -> (d_in, d_out) of its layers)."""
    family = ALL[cell.family]
    attention, ffn = (6, 4) if two_stacks(cell) else (4, 4) if two_towers(cell) else (2, 2)
    kv = 16 if family.gqa else 32
    up = ((32, 48), (32, 48)) if cell.family in GATED else ((32, 96 if cell.family in ("phi3", "modernbert") else 48),)
    shapes = {"q": ((32, 32),), "k": ((32, kv),), "v": ((32, kv),), "o": ((32, 32),), "up": up, "down": ((48, 32),)}
    return attention, ffn, kv, shapes


def two_stacks(cell: Any) -> bool:
    """Encoder and decoder: Whisper's classifier is its encoder alone."""
    return ALL[cell.family].kind == "seq2seq" or (cell.family == "whisper" and cell.task == "lm")


def two_towers(cell: Any) -> bool:
    """Text and vision: CLIP's classifier is its vision tower alone."""
    return cell.family == "clip" and cell.task == "lm"


def linears(cell: Any, fields: dict[str, Any]) -> list[tuple[int, int]]:
    """(d_in, d_out) of every target layer."""
    attention, ffn, _, shapes = shape(cell)
    if ALL[cell.family].fused and "targets" not in fields:  # "all" takes a fused projection as one layer
        shapes = {"o": shapes["o"], "up": shapes["up"], "down": shapes["down"]}
        shapes["qkv"] = ((32, 32 + 2 * shape(cell)[2]),)
    roles = fields.get("targets", shapes)
    layers = {role: ffn if role in ("up", "down") else attention for role in shapes}
    return [pair for role in roles for pair in shapes[role] for _ in range(layers[role])]


def count_lora(cell: Any, fields: dict[str, Any], dense: bool = False) -> int:
    return sum(i * o if dense else fields["r"] * (i + o) for i, o in linears(cell, fields))


def count_rows(cell: Any) -> int:
    return sum(d_out for _, d_out in linears(cell, {}))


def count_layers(cell: Any) -> int:
    return len(linears(cell, {}))


def stored(cell: Any) -> int:
    """Values in a saved adapter: what is trained, and the frozen start of a PiSSA or an OLoRA."""
    starts = [f for part in cell.parts for f in part.values() if f.get("init") in ("pissa", "olora")]
    return count(cell) + sum(count_lora(cell, f) for f in starts)


def count_diffprune(cell: Any, fields: dict[str, Any]) -> int:
    """A value and a gate for every entry of weight and bias, and one more gate for each of the two."""
    biased = ALL[cell.family].biased
    bare = shape(cell)[0] * (2 * 32 + 1) if cell.family == "whisper" else 0  # its keys have no bias
    return sum(2 * (i * o + biased * o) + 1 + biased for i, o in linears(cell, fields)) - bare


def count_adapter(cell: Any, fields: dict[str, Any]) -> int:
    attention, ffn, _, _ = shape(cell)
    stacks = 2 if two_stacks(cell) or two_towers(cell) else 1
    crossed = two_stacks(cell)
    places = {"attention": attention, "ffn": ffn, "block": ffn}
    n = fields.get("skip", 0)  # a decoder's block attends twice
    skipped = {"attention": (stacks + crossed) * n, "ffn": stacks * n, "block": stacks * n}
    m = fields["bottleneck"] if "bottleneck" in fields else 32 // fields["reduction"]
    each = 2 * 32 * m + m + 32 + (fields.get("scale") == "learned")
    chosen = fields.get("where", ("attention", "ffn"))
    norms = sum(p.numel() for n, p in cell.original.named_parameters() if is_norm(n, cell))
    return sum((places[w] - skipped[w]) * each for w in chosen) + norms * fields.get("norms", False)


def count_sparse(cell: Any, fields: dict[str, Any]) -> int:
    """The share that is kept of the inner method's matrices, and its vectors whole."""
    ((name, inner),) = fields["of"][0].items()
    attention, ffn, _, _ = shape(cell)
    vectors = (attention + ffn) * (inner["bottleneck"] + 32) if name == "adapter" else 0
    return math.ceil(fields["density"] * (COUNTS[name](cell, inner) - vectors)) + vectors


def is_norm(name: str, cell: Any) -> bool:
    """A norm's parameter outside the head, by name: ln_1, LayerNorm, q_norm, final_layer_norm, sa_layer_norm ..."""
    return re.search(r"norm[^.]*\.(weight|bias)$|\.ln_\w+\.(weight|bias)$", name, re.IGNORECASE) is not None and not (
        in_head(name, cell)
    )


def count_named(chosen: Callable[[str, Any], bool]) -> Callable[[Any, dict], int]:
    def total(cell: Any, fields: dict[str, Any]) -> int:
        return sum(p.numel() for n, p in cell.original.named_parameters() if chosen(n, cell))

    return total


HEADS = ("score", "classifier", "pre_classifier", "classification_head", "head", "lm_head", "cls", "decoder",
         "vocab_transform", "vocab_layer_norm", "vocab_projector", "generator_predictions",
         "generator_lm_head", "projector")  # fmt: skip


def in_head(name: str, cell: Any) -> bool:
    return name.split(".")[0] in HEADS and not (cell.family == "t5" and name.startswith("decoder"))


def in_last_block(name: str, cell: Any) -> bool:
    seq2seq = two_stacks(cell)
    if cell.family == "clip" and "vision_model" not in name:
        return False
    return any(f".{w}.1." in name.replace("decoder.block", "x.block") for w in ("layers", "h", "block", "layer")) and (
        not seq2seq or "decoder" in name
    ) and not (cell.family == "t5" and "block.1." not in name)  # fmt: skip


def count_spottune(cell: Any, fields: dict[str, Any]) -> int:
    """The policy's two layers, and the methods inside; [] is a copy of each block."""
    blocks, h = 2 * (1 + two_stacks(cell)), fields["hidden"]
    inner = sum(COUNTS[name](cell, own) for part in fields["of"] for name, own in part.items())
    names = cell.original.named_parameters()
    copied = sum(p.numel() for n, p in names if in_a_block(n) and "relative_attention_bias" not in n)
    return 32 * h + h + 2 * blocks * (h + 1) + (inner if fields["of"] else copied)


def count_gate(cell: Any, fields: dict[str, Any]) -> int:
    """Each method's own, and (width read) + 1 for each place: all linear layers, attention, behind "o" and "down"."""
    attention, ffn, _, _ = shape(cell)
    inner = sum(COUNTS[name](cell, own) for part in fields["of"] for name, own in part.items())
    return inner + sum(i + 1 for i, _ in linears(cell, {})) + attention * 33 + attention * 33 + ffn * 33


def beyond(cell: Any) -> bool:
    return cell.family in BEYOND_TEXT  # Whisper's embeddings are tied, CLIP has no output projection


def in_a_block(name: str) -> bool:
    return any(f".{w}.{i}." in f".{name}" for w in ("layers", "h", "block", "layer") for i in (0, 1))


def count_prefix(cell: Any, fields: dict[str, Any]) -> int:
    attention, _, kv, _ = shape(cell)
    if fields.get("reparam") != "mlp":
        return attention * 2 * kv * fields["length"]
    h, stacks = fields["hidden"], 3 if two_stacks(cell) else 1 + two_towers(cell)
    return stacks * (32 * fields["length"] + (32 + 1) * h) + attention * 2 * kv * (h + 1)


def count_ptuning(cell: Any, fields: dict[str, Any]) -> int:
    """Inputs, then 2 x 2 LSTM directions of d/2 units and two linear layers, or three linear layers."""
    linear = 32 * 32 + 32
    lstm = 4 * (4 * 16 * (32 + 16) + 2 * 4 * 16) + 2 * linear
    inputs = 32 * fields["length"] * fields.get("count", 1) * len(fields.get("tasks", "1"))
    return inputs + (3 * linear if fields.get("encoder") == "mlp" else lstm)


COUNTS: dict[str, Callable[[Any, dict], int]] = {
    "lora": count_lora,
    "dora": lambda c, f: count_lora(c, f) + count_rows(c),
    "adalora": lambda c, f: count_lora(c, {"r": f["init_r"]}) + f["init_r"] * count_layers(c),
    "ia3": lambda c, _: shape(c)[0] * 2 * shape(c)[2] + shape(c)[1] * 48,
    "adapter": count_adapter,
    "sparse": count_sparse,
    "select": lambda c, f: math.ceil(f["density"] * count_lora(c, {"targets": ("q", "down"), "r": 1}, dense=True)),
    "diffprune": count_diffprune,
    "spottune": count_spottune,
    "gate": count_gate,
    "prefix": count_prefix,
    "prompt": lambda c, f: 32 * f["length"] * f.get("count", 1) * len(f.get("tasks", "1")),
    "ptuning": count_ptuning,
    "visual_prompt": lambda c, f: 32 * f["length"] * (2 if f.get("deep") else 1),
    "tokens": lambda c, f: 32 * len(f["ids"]) * (1 if beyond(c) or c.original.config.tie_word_embeddings else 2),
    "bitfit": count_named(lambda n, c: n.endswith("bias") and not in_head(n, c)),
    "freeze": count_named(in_last_block),
    "full": count_named(lambda n, c: True),
    "head": count_named(in_head),
}
