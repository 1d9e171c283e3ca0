"""Runs where the `adapters` library is installed: tiny models, its adapters, their logits and 20 steps, into a folder.

python tests/oracles/adapters_make.py FOLDER; then tests/oracles/adapters_compare.py FOLDER where deltatune is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
    "prefix": lambda: prefix(flat=True),
    "prefix_mlp": lambda: prefix(),
    "mam": lambda: adapters.MAMConfig(prefix(), adapters.ParBnConfig(reduction_factor=4, scaling=4.0)),
    "unipelt": lambda: adapters.UniPELTConfig(prefix(), behind_ffn(), adapters.LoRAConfig(r=3, alpha=6)),
    "unipelt_block": lambda: adapters.UniPELTConfig(
        prefix(), adapters.SeqBnConfig(reduction_factor=4), adapters.LoRAConfig(r=3, alpha=6)
    ),
}


def prefix(**more: Any) -> adapters.PrefixTuningConfig:
    return adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=6, **more)


def behind_ffn() -> adapters.BnConfig:
    return adapters.DoubleSeqBnConfig(mh_adapter=False, reduction_factor=4, non_linearity="relu")


# The library's sdpa path loses a prefix behind a boolean mask, and aligns a causal one without a mask wrongly.
EAGER = {"attn_implementation": "eager"}


def bert() -> hf.PreTrainedModel:
    config = hf.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **EAGER,
    )  # fmt: skip
    return hf.BertForMaskedLM(config)


def gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(
        vocab_size=97, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, **EAGER,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def bart() -> hf.PreTrainedModel:
    config = hf.BartConfig(
        vocab_size=97, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None, **EAGER,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


MODELS = {"bert": bert, "gpt2": gpt2, "bart": bart}


def drawn(parameters: list[torch.nn.Parameter]) -> None:
    """Values large enough to matter."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.2 * torch.randn(p.shape, generator=g) + (1.0 if p.shape == (1,) else 0.0))


def made(family: str, name: str) -> dict[str, torch.Tensor]:
    """base|KEY: the model; own|N|KEY: what the library adds, in its order; ids; plain, logits; losses of 20 steps."""
    torch.manual_seed(0)
    model = MODELS[family]()
    drawn(list(model.parameters()))
    tensors = {f"base|{k}": p.detach().clone() for k, p in model.named_parameters()}
    ids = torch.randint(5, 97, (4, 7), generator=torch.Generator().manual_seed(1))
    tensors |= {"ids": ids, "plain": model(input_ids=ids, labels=ids).logits.detach().clone()}
    adapters.init(model)
    model.add_adapter("x", config=CONFIGS[name]())
    model.train_adapter("x")
    own = {k: p for k, p in model.named_parameters() if f"base|{k}" not in tensors}
    drawn(list(own.values()))
    tensors |= {f"own|{i:03}|{k}": p.detach().clone() for i, (k, p) in enumerate(own.items())}
    tensors["logits"] = model(input_ids=ids, labels=ids).logits.detach().clone()
    optimizer, losses = torch.optim.AdamW(list(own.values()), lr=RATE, weight_decay=0.01), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return tensors | {"losses": torch.stack(losses)}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for family in MODELS:
        for name in CONFIGS:
            if family == "bart" and not name.startswith("prefix"):
                continue
            tensors = {k: t.contiguous() for k, t in made(family, name).items()}
            save_file(tensors, folder / f"{family}-{name}.safetensors")
    versions = {"adapters": adapters.__version__, "transformers": hf.__version__, "torch": torch.__version__}
    (folder / "versions.txt").write_text(", ".join(f"{k} {v}" for k, v in versions.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
