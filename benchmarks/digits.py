"""A small ViT, pre-trained on scikit-learn's digits 0-4 and adapted to 5-9 with few rows: methods against the head.

    python benchmarks/digits.py            # the table
    python benchmarks/digits.py --sweep    # learning rates on dev rows, which SETTINGS follows

No download, no torchvision. Prints one row a method: parameters beside the head, accuracy with Wilson's interval over
the test rows of all seeds, and the paired difference to the head alone. The seeds of the sweep and those of the table
are different ones: bases, training rows, heads and test rows of the table took no part in any choice.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers as hf
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from deltatune import Adapter, Head, LoRA, Prefix, SpotTune, VisualPrompt, attach, trainable
from deltatune.core.attach import disabled, each
from deltatune.core.attention import keys_values
from deltatune.core.slot import deltas
from deltatune.data.batch import Batch
from deltatune.evaluate.intervals import difference, wilson
from deltatune.evaluate.metrics import METRICS
from deltatune.methods._keys_values import KeysValues
from deltatune.methods.freeze import Full
from deltatune.train.loop import Loop, Settings, Step

ROWS = 32
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SWEPT, TESTED = (0, 1, 2), (3, 4, 5)  # seeds
# name -> the methods beside the head, and the rate of RATES that was best on dev rows (--sweep)
SETTINGS: dict[str, tuple[tuple[Any, ...], float]] = {
    "head": ((), 3e-2),
    "adapter": ((Adapter(bottleneck=8),), 1e-2),
    "LoRA": ((LoRA(r=4),), 3e-3),
    "visual prompts, shallow": ((VisualPrompt(10),), 1e-1),
    "visual prompts, deep": ((VisualPrompt(10, deep=True),), 1e-1),
    "prefix": ((Prefix(10),), 3e-1),
    "prefix, MLP": ((Prefix(10, reparam="mlp", hidden=64),), 1e-2),
    "prefix from real keys": ((Prefix(10),), 3e-1),
    "SpotTune (LoRA)": ((SpotTune(of=(LoRA(r=4),), hidden=16),), 1e-2),
    "full": ((Full(),), 1e-3),
}


class Images:
    """Cross-entropy of a classifier of images: what the loop wants of an objective."""

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return F.cross_entropy(model(**batch.inputs).logits, batch.labels, reduction="sum"), {}


def digits(first: int) -> tuple[Tensor, Tensor]:
    """The pictures [n, 1, 8, 8] in [-1, 1] and classes 0-4 of the five digits from `first`."""
    found = load_digits()
    here = (found.target >= first) & (found.target < first + 5)
    pixels = torch.tensor(found.images[here], dtype=torch.float32)[:, None] / 8 - 1
    return pixels, torch.tensor(found.target[here] - first)


def vit(seed: int) -> hf.ViTForImageClassification:
    """201,861 parameters: 4 blocks of width 64 over 16 patches of 2 x 2 pixels."""
    torch.manual_seed(seed)
    config = hf.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=64**-0.5,  # the stock 0.02 is for wide models: here it would leave sub-layers almost silent
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def batches(x: Tensor, y: Tensor, seed: int) -> Callable[[int], Sequence[Batch]]:
    """step -> its batch; every epoch in an order of its own."""
    each = -(-len(x) // ROWS)

    def batch(step: int) -> Sequence[Batch]:
        g = torch.Generator().manual_seed(seed * 100_003 + step // each)
        rows = torch.randperm(len(x), generator=g)[step % each * ROWS :][:ROWS]
        return [Batch({"pixel_values": x[rows]}, y[rows])]

    return batch


def train(model: Any, data: tuple[Tensor, Tensor], steps: int, lr: float, seed: int) -> None:
    settings = Settings(steps=steps, lr=lr, seed=seed, warmup=0.1)
    conditional = [f"{d.site.key}.*" for d in deltas(model, "default") if d.conditional]
    Loop(Step(model, Images()), trainable(model), batches(*data, seed), settings, conditional=conditional).run()


@torch.no_grad()
def answers(model: Any, x: Tensor) -> list[int]:
    return model.eval()(pixel_values=x).logits.argmax(-1).tolist()


def pretrained(seed: int, steps: int) -> Any:
    """The base: trained whole on the digits 0-4, by the same loop. Only its trunk is used further on."""
    model = attach(vit(seed), Full())
    train(model, digits(0), steps, 1e-3, seed)
    plain = vit(seed)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "delta_slot" not in k})
    return plain


def split(seed: int, shots: int, part: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`shots` rows of each of the digits 5-9 to train on, and rows to score: "dev" or, never touched by it, "test"."""
    x, y = digits(5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    pool, test = order[:half], order[half:]
    taken = torch.cat([pool[y[pool] == c][:shots] for c in range(5)])
    scored = test if part == "test" else pool[~torch.isin(pool, taken)]
    return (x[taken], y[taken]), (x[scored], y[scored])


@torch.no_grad()
def from_rows(model: Any, x: Tensor) -> None:
    """The prefix's start: the base's own keys and values, of another position and training row each."""
    with disabled(model):
        seen = keys_values(model, {"pixel_values": x})
    for layer, delta in each(model, "default"):
        if isinstance(delta, KeysValues):
            rows = torch.arange(delta.k.shape[1])
            for own, kept in zip((delta.k, delta.v), seen[layer], strict=True):
                own.copy_(kept[rows, :, rows].transpose(0, 1))


Result = tuple[list[int], list[int], int]


def one(base: Any, name: str, lr: float, given: argparse.Namespace, seed: int) -> Result:
    """(answers, classes, parameters beside the head) of one method from one base."""
    methods = SETTINGS[name][0]
    data, (x, y) = split(seed, given.shots, "dev" if given.sweep else "test")
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    torch.nn.init.trunc_normal_(model.classifier.weight, std=0.02)  # the new task's head begins anew
    torch.nn.init.zeros_(model.classifier.bias)
    attach(model, methods if name == "full" else [*methods, Head()])
    if "real" in name:
        from_rows(model, data[0])
    count = sum(p.numel() for p in trainable(model).values()) - sum(p.numel() for p in model.classifier.parameters())
    train(model, data, given.steps, lr, seed)
    return answers(model, x), y.tolist(), count


def shares(result: Result) -> float:
    return float((np.array(result[0]) == np.array(result[1])).mean())


def sweep(bases: dict[int, Any], given: argparse.Namespace) -> None:
    """Accuracy on dev rows, mean over the bases, by learning rate."""
    print("| trained beside the head | " + " | ".join(f"{lr:.0e}" for lr in RATES) + " |\n|---|" + "---|" * len(RATES))
    for name in SETTINGS:
        cells = [np.mean([shares(one(b, name, lr, given, seed)) for seed, b in bases.items()]) for lr in RATES]
        print(f"| {name} | " + " | ".join(f"{c:.3f}" for c in cells) + " |", flush=True)


def table(bases: dict[int, Any], given: argparse.Namespace) -> None:
    found: dict[str, Result] = {}
    print("| trained beside the head | parameters | accuracy | better than the head alone |\n|---|---|---|---|")
    for name, (_, lr) in SETTINGS.items():
        runs = [one(base, name, lr, given, seed) for seed, base in bases.items()]
        said, classes = [v for r in runs for v in r[0]], [v for r in runs for v in r[1]]
        found[name] = (said, classes, runs[0][2])
        right = wilson(int((np.array(said) == np.array(classes)).sum()), len(said))
        gain = difference(METRICS["accuracy"], found["head"][0], said, classes)
        shown = f"{right.value:.3f} ({right.low:.3f} to {right.high:.3f})"
        better = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" if name != "head" else ""
        print(f"| {name} | {runs[0][2]:,} | {shown} | {better} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shots", type=int, default=20, help="training rows of each digit")
    parser.add_argument("--pretraining", type=int, default=250, help="steps")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--sweep", action="store_true", help="accuracy on dev rows by learning rate, instead")
    given = parser.parse_args()
    bases = {seed: pretrained(seed, given.pretraining) for seed in (SWEPT if given.sweep else TESTED)}
    (sweep if given.sweep else table)(bases, given)


if __name__ == "__main__":
    main()
