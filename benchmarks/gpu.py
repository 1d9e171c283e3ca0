"""The mechanism on a GPU: every method attached, trained one step, saved, reloaded and compared, in bf16 and fp32.

python benchmarks/gpu.py        prints a markdown table; exit code 1 when a cell fails. Needs CUDA, no model hub.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, LlamaConfig

from deltatune.core.attach import attach, detach, disabled, parameters
from deltatune.core.store import load, save, virtual_ids
from deltatune.methods import METHODS

DEVICE = "cuda"
SIZES = {
    "llama": LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1000,
    ),
    "gpt2": GPT2Config(n_embd=256, n_layer=4, n_head=8, vocab_size=1000, bos_token_id=0, eos_token_id=0),
}  # fmt: skip


def cell(family: str, name: str, dtype: torch.dtype) -> str:
    """'ok' with the largest difference after a reload, or what went wrong."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SIZES[family]).to(DEVICE, dtype).eval()
    ids = torch.randint(0, 1000, (2, 16), device=DEVICE)
    base = model(input_ids=ids).logits
    attach(model, METHODS[name].cls(), "a")
    row = torch.tensor([virtual_ids(model, "a")] * 2, device=DEVICE, dtype=torch.long).view(2, -1)
    ids_in = torch.cat([row, ids], 1)
    model(input_ids=ids_in).logits.float().square().mean().backward()
    with torch.no_grad():
        for p in parameters(model, "a").values():
            p -= 0.01 * p.grad.sign()
    ours = model(input_ids=ids_in).logits
    with disabled(model):
        exact = torch.equal(model(input_ids=ids).logits, base)
    with tempfile.TemporaryDirectory() as folder:
        save(model, "a", Path(folder) / "a")
        detach(model, "a")
        load(model, Path(folder) / "a", "a")
    gap = float((model(input_ids=ids_in).logits - ours).detach().abs().max())
    return f"ok ({gap:.0e})" if exact and gap == 0.0 else f"FAILED: base exact {exact}, reload {gap:.1e}"


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    failed = 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| method | llama fp32 | llama bf16 | gpt2 fp32 | gpt2 bf16 |\n|---|---|---|---|---|")
    for name in (n for n in METHODS if n not in ("head",)):
        cells = []
        for family in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                try:
                    cells.append(cell(family, name, dtype))
                except Exception as error:  # a table of everything that goes wrong is what this is for
                    refused = type(error).__name__ == "Refusal"
                    cells.append("refused" if refused else f"FAILED: {type(error).__name__} {error}"[:120])
                failed += cells[-1].startswith("FAILED")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
