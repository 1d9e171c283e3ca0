"""A run is verified, or it says why not: every check a small named function that returns what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attach import State, activate, attached, detach, disabled, known, merge, restored
from ..core.delta import Refusal
from ..core.fingerprint import fingerprint as of
from ..core.registry import METHODS
from ..core.site import block_linears
from ..core.slot import slots
from ..core.store import load, state, virtual_ids
from ..data.batch import Batch
from ..data.encode import Encoded
from ..evaluate.generate import end_of_turn, evaluating
from ..objectives.common import run
from .guard import VerificationError, few
from .job import Job
from .memory import free


@dataclass(frozen=True)
class Check:
    """One thing that was verified. ok None: it could not be checked, and `detail` says why."""

    name: str
    ok: bool | None
    detail: str


def demand(checks: Sequence[Check]) -> None:
    """VerificationError that names every failed check."""
    failed = [f"{c.name}: {c.detail}" for c in checks if c.ok is False]
    if failed:
        raise VerificationError("the run is not verified: " + "; ".join(failed))


# ---- before step 1 ---------------------------------------------------------------------------------------------------
def labels_audited(job: Job) -> Check:
    """Every row learns something, and every learned chat turn ends with its end-of-turn token."""
    rows = [row for row in job.rows if row.labels is not None]
    empty = [row.where for row in rows if not row.targets]
    if empty:
        return Check("labels", False, f"{len(empty)} rows have every label masked: {few(empty)}")
    ends = end_of_turn(job.tokenizer) if any(e.turns for e in job.train) else set()
    unstopped = [row.where for row in rows if ends and not stops(row, ends)]
    if unstopped:
        return Check(
            "labels", False, f"{len(unstopped)} rows never learn to stop (no end-of-turn label): {few(unstopped)}"
        )
    learned = sum(row.targets for row in rows)
    total = sum(len(row.ids) for row in rows)
    return Check(
        "labels", True, f"{learned} of {total} tokens are learned" if rows else f"{len(job.rows)} labelled rows"
    )


def stops(row: Encoded, ends: set[int]) -> bool:
    """Whether some learned token ends a turn; rows cut by max_length are told apart by the caller's counts."""
    return any(label in ends for label in row.labels or ())


def covered(job: Job) -> Check:
    """How many of the blocks' linear layers (or of all layers) the adapter changes."""
    touched = [path for path, slot in slots(job.model).items() if job.adapter in slot]
    linear = block_linears(job.model)
    share = len(set(touched) & set(linear)) / max(len(linear), 1)
    tuned = sum(p.numel() for p in job.trainable().values())
    total = sum(p.numel() for p in job.model.parameters())
    return Check(
        "coverage",
        bool(touched) and tuned > 0,
        f"{len(touched)} layers, {share:.0%} of the blocks' linear layers; "
        f"{tuned:,} of {total:,} parameters train ({tuned / total:.3%})",
    )


@torch.no_grad()
def starts_as_base(job: Job) -> Check:
    """The adapted model equals the base at the start, where the method promises it."""
    names = [m.method_name for m in known(job.model, job.adapter).methods[job.adapter]]
    if not all(METHODS[n].identity for n in names):
        return Check("identity", None, f"{' + '.join(names)} does not start as the base, by design")
    batch = probe(job)
    with evaluating(job.model):
        ours = logits(job.model, batch)
        with disabled(job.model):
            base = logits(job.model, batch)
    gap = float((ours - base).abs().max())
    return Check(
        "identity", gap <= tolerance(job.model, base), f"largest difference of a logit from the base's: {gap:.2e}"
    )


def probe(job: Job, rows: int = 2, tokens: int = 256) -> Batch:
    """A few short training rows, padded: what the checks run the model on."""
    chosen = sorted(job.rows, key=lambda r: len(r.ids))[:rows]
    return job.batch([r if len(r.ids) <= tokens else cut(r, tokens) for r in chosen], packs=False)


def cut(row: Encoded, tokens: int) -> Encoded:
    labels = None if row.labels is None else row.labels[:tokens]
    return Encoded(
        row.ids[:tokens], labels, row.target, row.type_ids and row.type_ids[:tokens], 0, row.where, row.decoder
    )


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """[rows, seq, vocab] or [rows, classes], of real tokens only."""
    extra = {}
    if model.config.is_encoder_decoder and batch.labels.dim() == 2 and not batch.labels.is_floating_point():
        extra["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
    out = run(model, batch, **extra).logits.float()
    mask = batch.inputs.get("attention_mask")
    return out * mask[..., None] if mask is not None and out.shape[:2] == mask.shape else out


def tolerance(model: nn.Module, base: Tensor) -> float:
    """Two ways to compute one thing differ by rounding: of fp32, or of bf16 where the weights are bf16."""
    share = 2e-2 if next(model.parameters()).dtype == torch.bfloat16 else 1e-4
    return share * max(1.0, float(base.abs().max()))


# ---- after training --------------------------------------------------------------------------------------------------
def saved_whole(job: Job, folder: Path, start: Mapping[str, Tensor]) -> Check:
    """What lies on disk is what was trained: no empty, non-finite or untouched tensor."""
    now = state(job.model, job.adapter)
    empty = [k for k, t in now.items() if not t.numel()]
    bad = [k for k, t in now.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    same = [k for k, t in now.items() if k in start and torch.equal(t.cpu(), start[k])]
    if empty or bad or len(same) == len(now):
        return Check(
            "saved", False, f"{len(empty)} empty, {len(bad)} non-finite, {len(same)} of {len(now)} tensors never moved"
        )
    size = sum(f.stat().st_size for f in folder.iterdir())
    return Check("saved", True, f"{len(now)} tensors, {size / 2**20:.1f} MiB, {len(same)} of them never moved")


@torch.no_grad()
def reloads(job: Job, folder: Path) -> Check:
    """The adapter, loaded from disk beside the live one, gives the same logits to the last bit."""
    batch, name = probe(job), "reloaded"
    # a second soft prompt owns other virtual ids, so the live one steps aside: its ids are read by position
    with restored(job.model), evaluating(job.model):
        live = logits(job.model, batch)
        try:
            load(job.model, folder, name)
            activate(job.model, name)
            again = logits(job.model, moved(job, batch, name))
        finally:
            if name in attached(job.model):
                activate(job.model)
                detach(job.model, name)
    job.trainable()  # loading a second adapter made that one trainable
    gap = float((live - again).abs().max())
    return Check("reload", gap == 0.0, f"largest difference of a logit after loading from disk: {gap:.2e}")


def moved(job: Job, batch: Batch, name: str) -> Batch:
    """The batch with the live adapter's virtual ids replaced by `name`'s."""
    ids = batch.inputs["input_ids"].clone()
    for old, new in zip(virtual_ids(job.model, job.adapter), virtual_ids(job.model, name), strict=True):
        ids[batch.inputs["input_ids"] == old] = new
    return Batch({**batch.inputs, "input_ids": ids}, batch.labels, batch.lens, batch.mask_at, batch.where)


@torch.no_grad()
def merges(job: Job) -> Check:
    """The merged model says what the adapted one says; KL(adapted || merged) is printed."""
    size = sum(p.numel() * p.element_size() for p in job.model.parameters())
    if size > free() // 2:
        return Check("merge", None, f"not checked: a copy of the model needs {size / 2**30:.1f} GiB")
    batch = probe(job)
    try:
        with evaluating(job.model):
            ours = logits(job.model, batch)
            plain = logits(merge(job.model, job.adapter).eval(), batch)
    except Refusal as refusal:
        return Check("merge", None, refusal.why)
    kl = float(F.kl_div(plain.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean())
    agree = float((plain.argmax(-1) == ours.argmax(-1)).float().mean())
    limit = 1e-3 if next(job.model.parameters()).dtype == torch.float32 else 5e-2
    return Check("merge", kl <= limit, f"KL {kl:.2e} nats, {agree:.1%} of the greedy tokens agree")


def base_untouched(job: Job, fingerprint: str) -> Check:
    """The frozen base is what it was before training."""
    adapted: State = known(job.model, job.adapter)
    with disabled(job.model):
        now = of(job.model, adapted.vocab)
    return Check(
        "base",
        now == fingerprint,
        "the base's sampled weights are as before" if now == fingerprint else "the base changed",
    )
