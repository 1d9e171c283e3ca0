"""The floor of a training step: the base's own matrix products and its causal attention, each shape timed alone.

One adapter step over frozen weights needs of every linear layer y = W x the product itself and W^T dy (the first
block's query, key and value need no dx), of the vocabulary projection both on the supervised tokens alone, of attention
its forward and backward pass over each sequence. Nothing else of a step is in the floor.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

REPEATS = 5


def floor(case: Any, given: dict[str, Any], model: Any) -> dict[str, Any]:
    """Seconds of one pass over all batches, and the floating-point operations they stand for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = next(model.parameters()).dtype
    rows, seconds, work = given["rows"], 0.0, 0.0
    products: Counter[tuple[int, int, int]] = Counter()
    sequences: Counter[int] = Counter()
    head = model.get_output_embeddings()
    layers = Counter(
        (m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear) and m is not head
    )
    for batch in given["batches"]:
        tokens = sum(len(rows[i]["ids"]) for i in batch)
        learned = sum(label != -100 for i in batch for label in rows[i]["labels"][1:])
        for (n, k), count in layers.items():
            products[tokens, k, n] += count  # y = x W^T
            products[tokens, n, k] += count  # dx = dy W
        products[learned, head.in_features, head.out_features] += 1
        products[learned, head.out_features, head.in_features] += 1
        sequences.update(len(rows[i]["ids"]) for i in batch)
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    wide = getattr(config, "head_dim", None) or config.hidden_size // heads
    with torch.no_grad():
        for (m, k, n), count in products.items():
            seconds += count * product(m, k, n, dtype, device)
            work += count * 2.0 * m * k * n
    for length, count in sequences.items():
        each = attention((heads, groups, length, wide), dtype, device)
        seconds += count * config.num_hidden_layers * each
        work += (
            count * config.num_hidden_layers * 3.0 * 2 * heads * length * length * wide
        )  # half of 2 products, times 3
    return {"seconds": seconds, "flops": work}


def product(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    x, w = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
    return timed(lambda: F.linear(x, w), device)


def attention(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    heads, groups, length, wide = shape
    make = {"dtype": dtype, "device": device, "requires_grad": True}
    q, k, v = (torch.randn(1, h, length, wide, **make) for h in (heads, groups, groups))  # type: ignore[arg-type]
    g = torch.randn(1, heads, length, wide, dtype=dtype, device=device)

    def both() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
        torch.autograd.grad(y, (q, k, v), g)

    return timed(both, device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """The median of some runs, after one that warms up."""
    found = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])
