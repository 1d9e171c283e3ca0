"""Runs where the `adapters` library is installed: tiny models, its adapters, their logits and 20 steps, into a folder.

python tests/oracles/adapters_make.py FOLDER; then tests/oracles/adapters_compare.py FOLDER where deltatune is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import adapters
import torch
import transformers as hf
from safetensors.torch import save_file

STEPS, RATE = 20, 1e-2
CONFIGS = {
    "houlsby": lambda: adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    "pfeiffer": lambda: adapters.SeqBnConfig(reduction_factor=4),
    "parallel": lambda: adapters.ParBnConfig(reduction_factor=4, scaling=4.0),
    "learned": lambda: adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
}


def bert() -> hf.PreTrainedModel:
    config = hf.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForMaskedLM(config)


def gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(
        vocab_size=97, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


MODELS = {"bert": bert, "gpt2": gpt2}


def drawn(parameters: list[torch.nn.Parameter]) -> None:
    """Values large enough to matter."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.2 * torch.randn(p.shape, generator=g) + (1.0 if p.shape == (1,) else 0.0))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for family, make in MODELS.items():
        for name, config in CONFIGS.items():
            torch.manual_seed(0)
            model = make()
            drawn(list(model.parameters()))
            tensors = {f"base|{k}": p.detach().clone() for k, p in model.named_parameters()}
            g = torch.Generator().manual_seed(1)
            ids = torch.randint(5, 97, (4, 7), generator=g)
            tensors |= {"ids": ids, "plain": model(input_ids=ids).logits.detach().clone()}
            adapters.init(model)
            model.add_adapter("x", config=config())
            model.train_adapter("x")
            own = {k: p for k, p in model.named_parameters() if ".adapters.x." in k}
            drawn(list(own.values()))
            tensors |= {f"own|{i:03}|{k}": p.detach().clone() for i, (k, p) in enumerate(own.items())}
            tensors["logits"] = model(input_ids=ids).logits.detach().clone()
            optimizer, losses = torch.optim.AdamW(list(own.values()), lr=RATE, weight_decay=0.01), []
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            tensors["losses"] = torch.stack(losses)
            save_file({k: t.contiguous() for k, t in tensors.items()}, folder / f"{family}-{name}.safetensors")
    versions = {"adapters": adapters.__version__, "transformers": hf.__version__, "torch": torch.__version__}
    (folder / "versions.txt").write_text(", ".join(f"{k} {v}" for k, v in versions.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
