"""Our adapters against what `adapters_make.py` wrote: equal logits and equal losses over 20 steps, from its weights.

python tests/oracles/adapters_compare.py FOLDER prints the table of docs/evidence/methods.md; 1 if any differs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file

from deltatune import Adapter, Gate, LoRA, Prefix, attach
from deltatune.core.delta import Delta
from deltatune.core.site import Site
from deltatune.core.slot import deltas
from deltatune.methods._bottleneck import Bottleneck, Shape
from deltatune.methods._keys_values import KeysValues
from deltatune.methods.low_rank import LowRank

TOLERANCE = 2e-5  # fp32 logits of size 5, another version of transformers: another order of summation
RATE = 1e-2
PARALLEL = Adapter(reduction=4, where=("ffn",), form="parallel", act="relu", scale=4.0)
FLAT = Prefix(4, offset_positions=False)  # the library leaves the real tokens where they are
MLP = Prefix(4, offset_positions=False, reparam="mlp", hidden=6)
LOW = LoRA(3, 3.0, targets=("q", "v"))  # the library's gate takes the place of alpha / r
METHODS: dict[str, tuple[Any, ...]] = {
    "houlsby": (Adapter(reduction=4),),
    "pfeiffer": (Adapter(reduction=4, where=("block",), act="relu"),),
    "parallel": (PARALLEL,),
    "learned": (Adapter(reduction=4, where=("ffn",), form="parallel", act="relu", scale="learned"),),
    "prefix": (FLAT,),
    "prefix_mlp": (MLP,),
    "mam": (MLP, PARALLEL),
    "unipelt": (Gate((LOW, MLP, Adapter(reduction=4, where=("ffn",), act="relu"))),),
    "unipelt_block": (Gate((LOW, MLP, Adapter(reduction=4, where=("block",), act="relu"))),),
}


class Residual:
    """What the library takes for the parallel form of a pre-norm block: it reads the residual sum before the norm,
    where ours reads what the sub-layer reads."""

    def __init__(self, scale: float | None):
        self.shape = Shape(32, 32, 8, "relu", scale, None)

    def deltas(self, model: hf.PreTrainedModel) -> Iterator[tuple[Site, Bottleneck]]:
        for i in range(2):
            block = f"transformer.h.{i}"
            yield Site(f"{block}.ln_2", f"{block}.mlp.c_proj", label="span"), Bottleneck(self.shape)


READS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("gpt2", "parallel"): (Residual(4.0),),
    ("gpt2", "learned"): (Residual(None),),
    ("gpt2", "mam"): (MLP, Residual(4.0)),
}
ENDINGS = {
    "adapter_down.0.weight": "down.weight", "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight", "adapter_up.bias": "up.bias", "scaling": "scale",
}  # fmt: skip
BART = {
    "vocab_size": 97, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def base(family: str, tensors: dict[str, torch.Tensor]) -> hf.PreTrainedModel:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    if family == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=48, **quiet))
    elif family == "bart":
        model = hf.BartForConditionalGeneration(hf.BartConfig(**BART))
    else:
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_inner=48, n_positions=64, **quiet))
    given = {k.removeprefix("base|"): t for k, t in tensors.items() if k.startswith("base|")}
    own = dict(model.named_parameters())
    assert set(own) == set(given), set(own) ^ set(given)
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(given[key])
    return model


class Theirs:
    """Their tensors, by what one of our deltas calls them."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        given = sorted(k for k in tensors if k.startswith("own|"))
        self.left = {k.split("|")[2]: tensors[k] for k in given}
        self.places = list(dict.fromkeys(k.partition(".adapters.x.")[0] for k in self.left if ".adapters.x." in k))
        pools = (k.partition("_prefix.")[0] for k in self.left if ".prefix_tunings.x." in k)
        self.pools = {pool.rpartition(".")[2]: f"{pool}_prefix." for pool in pools}  # encoder, self, cross
        self.taken: dict[str, dict[str, torch.Tensor]] = {}
        self.layers: Counter[str] = Counter()  # of each pool, how many were asked for

    def take(self, start: str) -> dict[str, torch.Tensor]:
        """{rest of the key: tensor} of what starts so."""
        if start not in self.taken:
            self.taken[start] = {
                k.removeprefix(start): self.left.pop(k) for k in list(self.left) if k.startswith(start)
            }
        return self.taken[start]

    def of(self, delta: Delta) -> dict[str, torch.Tensor]:
        inner = getattr(delta, "inner", delta)
        make = {LowRank: self.low_rank, KeysValues: self.keys_values}.get(type(inner), self.bottleneck)
        found = make(inner)
        if inner is delta:
            return found
        return {k if k.startswith("gate.") else f"inner.{k}": t for k, t in found.items()}

    def bottleneck(self, delta: Delta) -> dict[str, torch.Tensor]:
        """Both libraries go through the model in its order."""
        return {ENDINGS.get(k, k): t for k, t in self.take(f"{self.places.pop(0)}.adapters.x.").items()}

    def low_rank(self, delta: LowRank) -> dict[str, torch.Tensor]:
        """Of a fused layer they stack the parts of query and value: A, B and gate."""
        found = self.take(f"{delta.site.write}.loras.x.")
        parts = len(found["gate.bias"])
        at = 0 if parts == 1 or delta.site.label == "q" else 1
        return {k: t.chunk(parts)[at] for k, t in found.items()}

    def keys_values(self, delta: KeysValues) -> dict[str, torch.Tensor]:
        """They keep [length, layers, k and v, heads, dim] of each kind of attention, or what an MLP makes of that."""
        name = delta.site.write
        kind = "cross" if "encoder_attn" in name else "encoder" if name.startswith("model.encoder") else "self"
        at, (heads, length, dim) = self.layers[kind], delta.shape
        self.layers[kind] += 1
        found = self.take(self.pools[kind])
        gate = {f"gate.{k}": t for k, t in self.take(f"{name}.prefix_tuning.prefix_gates.x.").items()}
        if "control_trans" in found:
            k, v = found["control_trans"].view(length, -1, 2, heads, dim)[:, at].permute(1, 2, 0, 3)
            return gate | {"k": k, "v": v}
        out = {f"out.{end}": found[f"control_trans.2.{end}"].chunk(2)[at] for end in ("weight", "bias")}
        root = {f"root.up.{end}": found[f"control_trans.0.{end}"] for end in ("weight", "bias")}
        return gate | out | ({} if at else {"root.p": found["wte.weight"], **root})


def put(model: hf.PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Their tensors into ours, all of them."""
    theirs = Theirs(tensors)
    with torch.no_grad():
        for delta in deltas(model):
            own = dict(delta.named_parameters())
            values = theirs.of(delta) if own else {}
            assert set(own) == set(values), set(own) ^ set(values)
            for key, p in own.items():
                p.copy_(values[key])
    assert not theirs.left, list(theirs.left)


def gaps(family: str, name: str, tensors: dict[str, torch.Tensor]) -> tuple[float, ...]:
    """(base logits, adapted logits, losses: largest differences; how far an adapter moves a logit, and the loss)."""
    model, ids = base(family, tensors).eval(), tensors["ids"]
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids).logits
    attach(model, READS.get((family, name), METHODS[name]))
    put(model, tensors)
    with torch.no_grad():
        adapted = model(input_ids=ids, labels=ids).logits
    losses, chosen = [], [p for d in deltas(model) for p in d.parameters()]
    optimizer = torch.optim.AdamW(chosen, lr=RATE, weight_decay=0.01)
    for _ in range(len(tensors["losses"])):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    pairs = ((plain, tensors["plain"]), (adapted, tensors["logits"]), (torch.stack(losses), tensors["losses"]))
    one, two, three = (float((a - b).abs().max()) for a, b in pairs)
    return one, two, three, float((adapted - plain).abs().max()), float(losses[0] - losses[-1])


def main(folder: Path) -> int:
    print(f"Written by {(folder / 'versions.txt').read_text()}; compared under transformers {hf.__version__}.\n")
    print("| model | adapter | base logits differ by | adapted logits differ by | losses of 20 steps differ by "
          "| the adapter moves a logit by | losses fall by |\n|---|---|---|---|---|---|---|")  # fmt: skip
    failed = False
    for file in sorted(folder.glob("*.safetensors")):
        family, name = file.stem.split("-")
        found = gaps(family, name, load_file(file))
        failed |= max(found[:3]) > TOLERANCE or min(found[3:]) < 0.01
        where = f"{name}, read before the norm" if (family, name) in READS else name
        print(f"| {family} | {where} | {' | '.join(f'{value:.1e}' for value in found)} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
