"""BitFit's ablation (arXiv:2106.10199, section 4): all biases, query + intermediate, and all without each of the two.

    python benchmarks/bitfit_ablation.py --data DIR --model REF --out DIR

DIR holds train.jsonl and eval.jsonl, rows {"text": ..., "label": ...} (or pairs). Finished runs are not run again.
Prints one row a setting: parameters, the metric's mean over seeds, and the drift of each kind of bias.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deltatune.config import load
from deltatune.train.run import Run, resume, run

REST = ("key", "value", "output", "attention_layernorm", "output_layernorm")
SETTINGS: dict[str, tuple[str, ...]] = {
    "all": ("all",),
    "query + intermediate": ("query", "intermediate"),
    "all but query": ("intermediate", *REST),
    "all but intermediate": ("query", *REST),
    "none (the head alone)": (),
}


def settings(given: argparse.Namespace, targets: tuple[str, ...], seed: int) -> dict[str, Any]:
    """One run as the tree that its YAML file holds."""
    return {
        "model": given.model,
        "method": {"bitfit": {"targets": list(targets)}} if targets else "head",
        "objective": "classify",
        "data": {"train": str(given.data / "train.jsonl"), "eval": str(given.data / "eval.jsonl")},
        "train": {"lr": given.lr, "epochs": given.epochs, "batch_rows": given.rows, "seed": seed},
        "eval": {"retention": False},
    }


def one(given: argparse.Namespace, name: str, seed: int) -> Run:
    """The run of one setting and seed, gone on with if it was cut short."""
    folder = given.out / f"{'-'.join(name.split()[:3]).replace('+', 'and').strip('(')}-{seed}"
    if (folder / "config.yaml").exists():
        return resume(folder)
    return run(load(settings(given, SETTINGS[name], seed)).config, out=folder)


def row(name: str, runs: list[Run]) -> str:
    first = runs[0].summary
    scores = [r.summary["after"][first["metric"]] for r in runs]
    drift = ((first.get("methods") or {}).get("bitfit") or {}).get("drift") or {}
    moved = ", ".join(f"{kind} {value:.1e}" for kind, value in drift.items())
    shown = f"{sum(scores) / len(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})"
    return f"| {name} | {first['trainable_parameters']:,} | {first['metric']} {shown} | {moved} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and eval.jsonl")
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--out", type=Path, default=Path("runs/bitfit-ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", type=int, default=8)
    given = parser.parse_args()
    print("| trained | parameters | score | drift, mean of abs(b - b0) |\n|---|---|---|---|")
    for name in SETTINGS:
        print(row(name, [one(given, name, seed) for seed in range(given.seeds)]), flush=True)


if __name__ == "__main__":
    main()
