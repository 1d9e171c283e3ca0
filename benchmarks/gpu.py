"""The mechanism on a GPU: every method attached, trained one step, saved, reloaded and compared, in bf16 and fp32;
over NF4 bases; prefixes under sdpa and eager attention; the paged optimizer.

python benchmarks/gpu.py        prints markdown tables; exit code 1 when a cell fails. Needs no model hub.
Without CUDA it says so, and checks on the CPU what can be checked there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from deltatune.core import quant
from deltatune.core.attach import attach, detach, disabled, parameters, prepare
from deltatune.core.delta import Given
from deltatune.core.store import load, save, virtual_ids
from deltatune.methods import METHODS, build
from deltatune.train.optim import Optim, Optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OVER_NF4 = ("lora", "dora", "ia3", "adapter", "prefix", "prompt", "bitfit")
WIDTH, DEPTH = (256, 4) if DEVICE == "cuda" else (64, 2)  # a CPU looks for errors of the code alone
SIZES = {
    "llama": LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=1000,
    ),
    "gpt2": GPT2Config(n_embd=WIDTH, n_layer=DEPTH, n_head=8, vocab_size=1000, bos_token_id=0, eos_token_id=0),
}  # fmt: skip


def made(family: str, dtype: torch.dtype, packed: bool = False, **how: Any) -> Any:
    """A random model on the device, packed to NF4 where it is asked for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SIZES[family], **how)
    if not packed:
        return model.to(DEVICE, dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, **quant.options("nf4", dtype, DEVICE))
    return quant.steady(loaded).eval()


def attached(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Attach method `name` as "a", ready to train; the ids with its virtual ones in front."""
    attach(model, METHODS[name].cls(), "a")
    row = torch.tensor([virtual_ids(model, "a")] * len(ids), device=DEVICE, dtype=torch.long).view(len(ids), -1)
    ids = torch.cat([row, ids], 1)

    def losses() -> Any:
        for _ in range(4):
            yield model(input_ids=ids).logits.float().square().mean()

    prepare(model, "a", Given(losses, 0, losses))
    return ids


def cell(family: str, name: str, dtype: torch.dtype, packed: bool = False) -> str:
    """'ok' with the largest difference after a reload, or what went wrong."""
    model = made(family, dtype, packed)
    ids = torch.randint(0, 1000, (2, 16), device=DEVICE)
    base = model(input_ids=ids).logits
    ids_in = attached(model, name, ids)
    model(input_ids=ids_in).logits.float().square().mean().backward()
    with torch.no_grad():
        for p in parameters(model, "a").values():
            if p.grad is not None:
                p -= 0.01 * p.grad.sign()
        ours = model(input_ids=ids_in).logits
        with disabled(model):
            exact = torch.equal(model(input_ids=ids).logits, base)
        with tempfile.TemporaryDirectory() as folder:
            save(model, "a", Path(folder) / "a")
            detach(model, "a")
            load(model, Path(folder) / "a", "a")
        gap = float((model(input_ids=ids_in).logits - ours).abs().max())
    return f"ok ({gap:.0e})" if exact and gap == 0.0 else f"FAILED: base exact {exact}, reload {gap:.1e}"


def prefix_under(implementation: str) -> str:
    """The prefix's logits and gradients under an attention implementation against eager, in fp32."""
    found = []
    for kind in ("eager", implementation):
        model = made("llama", torch.float32, attn_implementation=kind)
        ids = torch.arange(32, device=DEVICE).view(2, 16)
        attach(model, build({"prefix": {"length": 4}}), "a")
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad for p in parameters(model, "a").values())])
    gap = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))
    return f"ok ({gap:.0e})" if gap < 1e-4 else f"FAILED: {gap:.1e}"


def paged() -> str:
    """Paged AdamW's steps against plain AdamW's, its states in paged memory."""
    if DEVICE == "cpu":
        return "not checked: paged memory is between a GPU and the host"
    found = []
    for name in ("adamw", "paged-adamw"):
        p = nn.Parameter(torch.ones(400, 300, device=DEVICE))
        optimizer = Optimizer({"p": p}, Optim(optimizer=name, lr=1e-2))
        for step in range(5):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            optimizer.step(1.0)
            optimizer.zero()
        found.append(p.detach())
    if not optimizer.inner.state[p]["state1"].is_paged:
        return "FAILED: the states are not paged"
    gap = float((found[0] - found[1]).abs().max())
    return f"ok ({gap:.0e})" if gap < 1e-4 else f"FAILED: {gap:.1e} from AdamW"


def tried(check: Callable[..., str], *given: Any) -> str:
    try:
        return check(*given)
    except Exception as error:  # a table of everything that goes wrong is what this is for
        refused = type(error).__name__ == "Refusal"
        missing = isinstance(error, quant.NotInstalled)
        if missing:
            return f"not checked: {error}"
        return "refused" if refused else f"FAILED: {type(error).__name__} {error}"[:120].replace("\n", " ")


def table(title: str, rows: Mapping[str, list[Callable[[], str]]], columns: list[str]) -> int:
    """Print it, a row as soon as it is there; how many cells failed."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    failed = 0
    for name, checks in rows.items():
        cells = [tried(check) for check in checks]
        failed += sum(text.startswith("FAILED") for text in cells)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return failed


def main() -> int:
    if DEVICE == "cpu":
        print("no CUDA device here: everything below ran on the CPU, and says nothing about a GPU", file=sys.stderr)
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}")
    columns = [f"{family} {number}" for family in SIZES for number in DTYPES]

    def row(name: str, packed: bool) -> list[Callable[[], str]]:
        pairs = [(family, dtype) for family in SIZES for dtype in DTYPES.values()]
        return [lambda f=f, d=d: cell(f, name, d, packed) for f, d in pairs]  # type: ignore[misc]

    failed = table("method", {n: row(n, False) for n in METHODS if n not in ("head", "visual_prompt")}, columns)
    failed += table("over NF4", {name: row(name, True) for name in OVER_NF4}, columns)
    other = {"prefix, sdpa against eager": [lambda: prefix_under("sdpa")], "paged AdamW": [paged]}
    return 1 if failed + table("also", other, [DEVICE]) else 0


if __name__ == "__main__":
    sys.exit(main())
