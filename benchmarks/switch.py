"""Switching adapters: attached (hooks) against fused (merged weights): time and memory, and of the way back.

python benchmarks/switch.py [--dtype bfloat16] [--shape small|smollm2]     weights are random: only shapes matter
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltatune import LoRA, activate, attach, fuse, unfuse
from deltatune.core.attach import parameters

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "vocab_size": 4096},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
}


def timed(run: Callable[[], Any], times: int = 5) -> float:
    """Median milliseconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(1000 * (time.perf_counter() - start))
    return median(found)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--dtype", default="bfloat16")
    ask.add_argument("--shape", choices=SHAPES, default="smollm2")
    given = ask.parse_args()
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3} if given.shape == "smollm2" else heads
    config = LlamaConfig(**SHAPES[given.shape], **heads, tie_word_embeddings=True)
    model: Any = LlamaForCausalLM(config).to(getattr(torch, given.dtype)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        measure(model, folder, given.dtype)


@torch.no_grad()
def measure(model: Any, folder: str, dtype: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("a", "b"):
        attach(model, LoRA(r=16), name)
        for p in parameters(model, name).values():
            p.add_(0.01 * torch.randn_like(p))
    ids = torch.randint(0, model.config.vocab_size, (1, 16))
    total = sum(p.nbytes for n, p in model.named_parameters() if "delta_slot" not in n) / 2**20
    print(f"{type(model).__name__}, {total:.0f} MiB of weights, {dtype}, LoRA r=16 on all linears, 16 tokens a forward")
    print(f"switch, attached: {timed(lambda: (activate(model, 'a'), activate(model, 'b'))) / 2:.1f} ms, 0 MiB")
    print(f"forward, attached: {timed(lambda: model(input_ids=ids), 9):.1f} ms")
    for what, base in (("originals in memory", None), ("originals from file", folder)):
        held = fuse(model, "a", base=base).bytes / 2**20
        print(
            f"switch, {what}: {timed(lambda b=base: (fuse(model, 'b', base=b), fuse(model, 'a', base=b))) / 2:.0f} ms"
        )
        print(f"  memory for the way back: {held:.0f} MiB")
        print(f"  forward, fused: {timed(lambda: model(input_ids=ids), 9):.1f} ms")
        start = time.perf_counter()
        unfuse(model)
        print(f"  back to the base: {1000 * (time.perf_counter() - start):.1f} ms")
        now = {k: v for k, v in model.state_dict().items() if k in before}
        print(f"  the base's bits: {'the same' if all(torch.equal(before[k], now[k]) for k in before) else 'CHANGED'}")
    weight, delta = subtracted(model)
    print(f"W + D - D, for comparison: {delta:.2%} of the elements of {weight} change")


def subtracted(model: Any) -> tuple[str, float]:
    """The share of a weight's elements that are not what they were after adding and subtracting a change."""
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
    low = next(d for d in layer.delta_slot.of("a"))
    change = (low.scale * low.lora_B @ low.lora_A).to(layer.weight.dtype)
    return name, float((layer.weight + change - change != layer.weight).double().mean())


if __name__ == "__main__":
    main()
