"""A language model of a few hundred numbers, its data and a run on them: what the tests of the loop train."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.train.checkpoint import Store
from deltatune.train.loop import Loop, Settings, Step
from deltatune.train.sampler import Sampler

VOCAB, WIDTH, ROWS = 23, 8, 24


@dataclass(frozen=True)
class Rows:
    """A batch of `tests/toys.py`: the fields of data.batch.Batch."""

    inputs: dict[str, Tensor]
    labels: Tensor
    where: tuple[str, ...] = ()
    lens: tuple[int, ...] | None = None

    @property
    def targets(self) -> int:
        return int((self.labels != -100).sum())


class Low(nn.Module):
    """y + B A x, with what a delta has beside its equation."""

    def __init__(self, d: int, r: int = 2):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, d) / d), nn.Parameter(torch.zeros(d, r))
        self.strength, self.steps, self.seen = 0.0, list[int](), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.lora_A.T @ self.lora_B.T

    def penalty(self) -> Tensor | None:
        return self.strength * self.lora_A.square().sum() if self.strength else None

    def begin(self, steps: int) -> None:
        self.planned = steps

    def after_step(self, step: int) -> None:
        self.steps.append(step)
        self.seen = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def state_extra(self) -> dict[str, Any]:
        return {"steps": len(self.steps), "last": self.lora_A.detach().sum()}

    def load_extra(self, state: dict[str, Any]) -> None:
        self.steps = list(range(1, state["steps"] + 1))
        assert torch.equal(state["last"], self.lora_A.detach().sum())


class Toy(nn.Module):
    """ids [rows, seq] -> logits [rows, seq, VOCAB]; everything but `low` and `bias` is frozen."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.embed, self.body = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.low, self.head = nn.Dropout(dropout), Low(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.requires_grad_(False)
        self.low.requires_grad_(True)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.head(torch.tanh(self.drop(self.body(x) + self.low(x) + self.bias)))


class NextToken:
    """The objective: a summed cross-entropy of labels [rows, seq] at the same positions."""

    def loss(self, model: nn.Module, batch: Rows) -> tuple[Tensor, dict[str, float]]:
        logits = model(**batch.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
        right = (logits.argmax(-1) == batch.labels).sum()
        return loss, {"accuracy": float(right) / batch.targets}


def toy(dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> Toy:
    """The same untrained model every time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Toy(dropout).to(dtype)


def rows(numbers: list[int]) -> Rows:
    """Rows `numbers` of the data, ragged: row i has 3 + i % 7 tokens, half of them supervised."""
    made = []
    for i in numbers:
        draw = random.Random(i)
        made.append([draw.randrange(VOCAB) for _ in range(3 + i % 7)])
    longest = max(map(len, made))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in made])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in made])
    chosen = (torch.arange(longest) % 2 == 0) & (real == 1)
    labels = torch.where(chosen, (ids * 3 + 1) % VOCAB, -100)
    return Rows({"input_ids": ids, "attention_mask": real}, labels, tuple(f"toy.jsonl:{i + 1}" for i in numbers))


def plan(epoch: int) -> list[list[int]]:
    """Micro-batches of 3 or 4 rows, shuffled by epoch: 7 of them."""
    order = list(range(ROWS))
    random.Random(f"plan {epoch}").shuffle(order)
    return [order[i : i + 3] for i in range(0, 18, 3)] + [order[18:]]


@dataclass
class Journalist:
    """An observer that keeps every record, and may run something at a step."""

    at: dict[int, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)

    def on_start(self, record: Any) -> None:
        self.starts.append(dict(record))

    def on_step(self, record: Any) -> None:
        self.steps.append(dict(record))
        if record["step"] in self.at:
            self.at[record["step"]]()

    def on_eval(self, record: Any) -> None:
        self.evals.append(dict(record))

    def on_end(self, record: Any) -> None:
        self.ends.append(dict(record))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loop(folder: Path | None = None, model: Toy | None = None, **options: Any) -> Loop:
    """A run over the toy data; `options` that Loop does not know are settings."""
    model = model or toy()
    sampler = options.pop("sampler", None) or Sampler(plan, accumulate=2)
    own = {k: options.pop(k) for k in ("evaluate", "observers", "conditional", "batches") if k in options}
    own.setdefault("batches", lambda step: [rows(part) for part in sampler(step)])
    settings = Settings(**{"steps": 12, "lr": 1e-2, "weight_decay": 0.01, **options})
    store = Store(folder / "checkpoints", base="toy") if folder else None
    return Loop(Step(model, NextToken()), trained(model), settings=settings, store=store, sampler=sampler, **own)


def weights(of: Loop) -> dict[str, Tensor]:
    """A copy of what the loop trains."""
    return {key: p.detach().clone() for key, p in of.trainable.items()}


def cut_and_resumed(run: Callable[..., Loop]) -> tuple[Loop, Loop]:
    """(a run from one end to the other, the same one stopped at step 3 and started again).

    run: makes and runs a loop in the folder of this name, with these options.
    """
    straight = run("a")
    run("b", observers=[Journalist(at={3: lambda: os.kill(os.getpid(), signal.SIGINT)})])
    return straight, run("b")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise equality."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
