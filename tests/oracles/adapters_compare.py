"""Our adapters against what `adapters_make.py` wrote: equal logits and equal losses over 20 steps, from its weights.

python tests/oracles/adapters_compare.py FOLDER prints the table of docs/evidence/methods.md; 1 if any differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file

from deltatune import Adapter, attach
from deltatune.core.site import Site
from deltatune.core.slot import deltas
from deltatune.methods._bottleneck import Bottleneck, Shape

TOLERANCE = 2e-5  # fp32 logits of size 5, another version of transformers: another order of summation
RATE = 1e-2
METHODS = {
    "houlsby": Adapter(reduction=4),
    "pfeiffer": Adapter(reduction=4, where=("block",), act="relu"),
    "parallel": Adapter(reduction=4, where=("ffn",), form="parallel", act="relu", scale=4.0),
    "learned": Adapter(reduction=4, where=("ffn",), form="parallel", act="relu", scale="learned"),
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


READS = {("gpt2", "parallel"): Residual(4.0), ("gpt2", "learned"): Residual(None)}
ENDINGS = {
    "adapter_down.0.weight": "down.weight", "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight", "adapter_up.bias": "up.bias", "scaling": "scale",
}  # fmt: skip


def base(family: str, tensors: dict[str, torch.Tensor]) -> hf.PreTrainedModel:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    if family == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=48, **quiet))
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


def put(model: hf.PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Their adapters' tensors into ours, both in the model's order."""
    theirs: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(k for k in tensors if k.startswith("own|")):
        place, _, ending = key.split("|")[2].partition(".adapters.x.")
        theirs.setdefault(place, {})[ENDINGS[ending]] = tensors[key]
    ours = deltas(model)
    assert len(ours) == len(theirs), f"{len(ours)} adapters of ours, {len(theirs)} of theirs"
    with torch.no_grad():
        for delta, values in zip(ours, theirs.values(), strict=True):
            own = dict(delta.named_parameters())
            assert set(own) == set(values), set(own) ^ set(values)
            for key, p in own.items():
                p.copy_(values[key])


def gaps(family: str, name: str, tensors: dict[str, torch.Tensor]) -> tuple[float, float, float, float]:
    """(base logits, adapted logits, losses: largest differences; how much the adapter changes a logit)."""
    model, ids = base(family, tensors).eval(), tensors["ids"]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    attach(model, READS.get((family, name), METHODS[name]))
    put(model, tensors)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
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
    return one, two, three, float((adapted - plain).abs().max())


def main(folder: Path) -> int:
    print(f"Written by {(folder / 'versions.txt').read_text()}; compared under transformers {hf.__version__}.\n")
    print("| model | adapter | base logits differ by | adapted logits differ by | losses of 20 steps differ by "
          "| the adapter moves a logit by |\n|---|---|---|---|---|---|")  # fmt: skip
    failed = False
    for file in sorted(folder.glob("*.safetensors")):
        family, name = file.stem.split("-")
        found = gaps(family, name, load_file(file))
        failed |= max(found[:3]) > TOLERANCE or found[3] < 0.01
        where = f"{name}, read before the norm" if (family, name) in READS else name
        print(f"| {family} | {where} | {' | '.join(f'{value:.1e}' for value in found)} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
