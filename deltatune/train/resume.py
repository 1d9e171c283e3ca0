"""Resume: a loop's whole state as a snapshot, and a loop put back exactly where a snapshot was taken."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.train import guard, rng
from deltatune.train.checkpoint import Snapshot

if TYPE_CHECKING:
    from deltatune.data.batch import Batch
    from deltatune.train.checkpoint import Store
    from deltatune.train.loop import Loop

log = logging.getLogger("deltatune")


def snapshot(loop: Loop) -> Snapshot:
    """Everything that decides the steps to come, and the size of the journal so far."""
    assert loop.store
    moments, optimizer = loop.optimizer.state()
    generators, states = rng.capture()
    tensors, extra = _deltas(loop)
    state = {
        "settings": _settings(loop),
        "progress": dataclasses.asdict(loop.progress),
        "watch": loop.watch.state(),
        "optimizer": optimizer,
        "rng": states,
        "extra": extra,
        "cursor": loop.sampler.state(loop.progress.step) if loop.sampler else None,
        "journal": loop.store.journal.sync(),
    }
    return Snapshot(loop.progress.step, dict(loop.trainable), moments, state, {**generators, **tensors})


def save(loop: Loop) -> None:
    """Save the current step. A first failure is announced, a second one in a row stops the run."""
    p = loop.progress
    if not loop.store or (p.saved == p.step and p.step):
        return
    guard.finite_weights(loop.trainable)
    try:
        loop.store.save(snapshot(loop), protect=(p.best_step,) if loop.settings.keep_best else ())
        p.saved, p.failures = p.step, 0
    except OSError as error:
        p.failures += 1
        log.warning("%s", error)
        if p.failures == 2:
            raise guard.GuardStop(f"{error}. Two saves in a row failed; the last good one is step {p.saved}") from error


def drawn(loop: Loop) -> list[Batch]:
    """The next step's micro-batches; where its rows cannot be had, the steps so far are saved first."""
    try:
        return [batch for batch in loop.batches(loop.progress.step) if batch.targets]
    except ValueError:
        save(loop)
        raise


def periodic(loop: Loop) -> None:
    """Save if the number of steps or the time since the last save asks for it."""
    p, s = loop.progress, loop.settings
    by_time = s.save_seconds and time.monotonic() - loop.saved_at >= s.save_seconds
    if by_time or (s.save_every and p.step % s.save_every == 0):
        save(loop)
        loop.saved_at = time.monotonic()


def form(step: nn.Module, store: Store) -> None:
    """Deltas that chose by rows before the first start become what the newest valid checkpoint holds."""
    waiting = {name: m for name, m in step.named_modules() if getattr(m, "ready", True) is False}
    found = store.latest()[0] if waiting else None
    for name, delta in waiting.items() if found else ():
        delta.take_form(_own(name, found.extra))  # type: ignore[union-attr]


def _own(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The extra tensors of the delta called `name`, by its own names."""
    prefix = f"delta|{name}|"
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def restore(loop: Loop) -> list[str]:
    """Continue from the newest valid checkpoint if there is one; remarks for the user."""
    assert loop.store
    found, notes = loop.store.latest()
    if found is None:
        loop.store.journal.rewind(0, 0)
        return notes
    state = found.state
    was, now = state["settings"], _settings(loop)
    notes += [f"{k} was {was.get(k)}, is now {now[k]}: the run will differ" for k in now if was.get(k) != now[k]]
    put(loop, found.trainable)
    loop.optimizer.load_state(found.optimizer, state["optimizer"])
    rng.restore(found.extra, state["rng"])
    _put_deltas(loop, found.extra, state["extra"])
    loop.watch.load(state["watch"])
    loop.progress = dataclasses.replace(loop.progress, **state["progress"])
    loop.progress.saved, loop.progress.failures = found.step, 0
    if loop.sampler and state["cursor"]:
        loop.sampler.load(state["cursor"])
    loop.store.journal.rewind(found.step, state["journal"])
    for note in () if loop.observers else notes:  # an observer says them
        log.warning("%s", note)
    return [*notes, f"continuing after step {found.step}"]


def finish(loop: Loop, best: bool) -> None:
    """Save the run's end, and put the weights of the best evaluation in place if `best`."""
    p = loop.progress
    save(loop)
    save(loop)  # there is no later chance: a failure is tried once more
    if best and loop.store and p.best_step not in (None, p.step):
        found = loop.store.load(loop.store.folder / f"ckpt-{p.best_step:08d}")
        put(loop, found.trainable)
        _put_deltas(loop, found.extra, found.state["extra"])


@torch.no_grad()
def put(loop: Loop, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the trainable parameters. Another set, shape or dtype: ValueError."""
    ours = {key: (tuple(p.shape), p.dtype) for key, p in loop.trainable.items()}
    theirs = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    if wrong := [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]:
        key = min(wrong)
        raise ValueError(
            f"the checkpoint does not fit what is trained here: {len(wrong)} tensors differ, for instance {key}: "
            f"{theirs.get(key, 'absent')} in the checkpoint, {ours.get(key, 'absent')} here"
        )
    for key, p in loop.trainable.items():
        p.copy_(tensors[key])


def _settings(loop: Loop) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(loop.settings)))
    return settings


def _deltas(loop: Loop) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    extra: dict[str, dict[str, Any]] = {}
    for name, module in loop.step.named_modules():
        if callable(of := getattr(module, "state_extra", None)):
            values = of()
            tensors |= {f"delta|{name}|{k}": v for k, v in values.items() if isinstance(v, Tensor)}
            extra[name] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
    return tensors, extra


def _put_deltas(loop: Loop, tensors: dict[str, Tensor], extra: dict[str, dict[str, Any]]) -> None:
    for name, values in extra.items():
        loop.step.get_submodule(name).load_extra({**values, **_own(name, tensors)})  # type: ignore[operator]  # state_extra's twin
