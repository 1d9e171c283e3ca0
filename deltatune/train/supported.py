"""Supported: what a configuration asks for and this version, or this combination, cannot honour. Needs no torch."""

from __future__ import annotations

from ..config import Config
from ..data.sources import task_of

SERVED = ("adamw", "adamw-bf16")  # the optimizers that can step bf16 parameters without masters


def check_supported(config: Config) -> None:
    """ValueError for keys that this version, or this combination, cannot honour."""
    t, asked = config.train, {config.model.dtype, config.train.precision} - {"auto"}
    stochastic = t.rounding == "stochastic"
    faults = {
        "data.streaming needs train.steps: how long an epoch is shows only at its end": config.data.streaming
        and t.steps is None,
        "data.streaming is for sft on local files": config.data.streaming
        and (config.goal[0] != "sft" or any(r == "-" for r in config.data.train)),
        "data.mix is for several sets: give data.train a list of them": config.data.mix and len(config.data.train) < 2,
        "data.mix reads every set twice: not with data.streaming or standard input (-)": config.data.mix
        and (config.data.streaming or "-" in config.data.train),
        "data.streaming reads rows of one task: give data.train without names": config.data.streaming
        and any(task_of(ref)[0] for ref in config.data.train),
        "train.patience counts evaluations: give train.eval_every too": t.patience and not t.eval_every,
        "train.eval_every needs rows to evaluate: give data.eval": t.eval_every and not config.data.eval,
        "eval.shots puts examples into a prompt, which only sft has: leave it out": config.eval.shots
        and config.goal[0] != "sft",
        f"train.rounding: stochastic is for the optimizers {' and '.join(SERVED)}, not {t.optimizer}": stochastic
        and t.optimizer not in SERVED,
        "train.rounding: stochastic is for bf16, and fp32 parameters have neither masters nor anything to round: set "
        "train.precision: bf16, or leave train.rounding out": stochastic and "fp32" in asked,
        "model.dtype and train.precision differ: mixed precision is not in this version; give one": len(asked) > 1,
    }
    for text in (text for text, wrong in faults.items() if wrong):
        raise ValueError(text)
