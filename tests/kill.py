"""A run in a process of its own, killed on purpose: `python kill.py FOLDER [time:SECONDS | call:K | signal:N@STEP]`.

time: SIGKILL after so many seconds of training; call: SIGKILL at the K-th call that makes a checkpoint durable;
signal: send itself SIGINT or SIGTERM (twice, if N has a second number) at a step. No fault: it trains to its end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from deltatune.train import checkpoint
from toys import Journalist, loop

STEPS, EVERY = 120, 5


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(k: int) -> None:
    """SIGKILL instead of call number `k` (from 1) of what a save does to the disk."""
    left = [k]

    def wrap(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                die()
            return real(*args, **kwargs)

        return call

    os.fsync, os.rename = wrap(os.fsync), wrap(os.rename)
    checkpoint.save_file = wrap(checkpoint.save_file)
    checkpoint._write = wrap(checkpoint._write)


class Slow(Journalist):
    """Stretches the run, so that a random moment falls anywhere in it."""

    def on_start(self, record: Any) -> None:
        kind, _, value = (sys.argv[2] if len(sys.argv) > 2 else "none:").partition(":")
        if kind == "time":
            timer = threading.Timer(float(value), die)
            timer.daemon = True
            timer.start()
        elif kind == "call":
            die_at_call(int(value))
        elif kind == "signal":
            numbers, _, step = value.partition("@")
            self.at[int(step)] = lambda: [os.kill(os.getpid(), int(n)) for n in numbers.split("+")]

    def on_step(self, record: Any) -> None:
        time.sleep(0.004)
        super().on_step(record)


def main() -> int:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    run = loop(Path(sys.argv[1]), steps=STEPS, save_every=EVERY, schedule="cosine", warmup=5, neftune=2.0)
    run.observers = [Slow()]
    outcome = run.run()
    return 128 + outcome.signal if outcome.signal else 0


if __name__ == "__main__":
    sys.exit(main())
