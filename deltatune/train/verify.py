"""A run is verified, or it says why not: every check a small named function that returns what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attach import activate, attached, detach, disabled, each, known, restored
from ..core.delta import SLOT, Refusal, inmost
from ..core.merging import merge
from ..core.quant import scheme, size
from ..core.registry import identity
from ..core.site import block_linears, head_modules
from ..core.slot import slots
from ..core.store import canonical, load, prompt_sets, read_manifest, read_tensors, state
from ..data.batch import Batch
from ..data.check import Sample, pieces
from ..data.encode import IGNORE, Encoded
from ..data.show import safe
from ..evaluate.generate import end_of_turn, measuring
from ..methods.budget import Budget
from ..methods.triplets import Triplets
from ..objectives.common import decoder_inputs, run
from .guard import VerificationError, few
from .job import Job, unsaved
from .memory import free


@dataclass(frozen=True)
class Check:
    """One thing that was verified. ok None: it could not be checked, or (`warns`) a warning; `detail` says why."""

    name: str
    ok: bool | None
    detail: str
    warns: bool = False

    def __str__(self) -> str:
        return f"{'warning: ' * self.warns}{self.name}: {self.detail}"


def head_kept(job: Job) -> Check:
    """The task head that is measured is the one that a later load finds: saved with the adapter, or the base's own."""
    if job.fresh or unsaved(job.model, job.objective, job.adapter) is not None:  # of a folder, a fixed seed draws it
        return Check("task head", True, "saved with the adapter, or the base's own")
    said = (
        f"the adapter does not save it ({', '.join(head_modules(job.model))}), and the model does not say where it is"
    )
    return Check("task head", None, f"{said} from: keep it yourself, or attach(model, [..., Head()])", warns=True)


def not_worse(found: Mapping[str, Any]) -> Check:
    """Of eval.json's numbers: a warning where the metric surely fell, or did not rise while the loss did."""
    metric, (was, now) = found["metric"], (found[side].get("loss") for side in ("before", "after"))
    change = [x if found["higher_is_better"] else -x for x in found["gain"].get(metric, ()) if x is not None]
    lost = was is not None and now is not None and not now <= was
    if max(change, default=0.0) < 0 or (lost and (not change or change[0] <= 0)):
        before, after = found["before"], found["after"]
        sides = ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in dict.fromkeys((metric, "loss")))
        return Check("better than before", None, f"{sides}: do not use it as it is", warns=True)
    return Check("better than before", True, "no worse on the rows that were measured")


def demand(checks: Sequence[Check]) -> None:
    """VerificationError that names every failed check."""
    failed = [f"{c.name}: {c.detail}" for c in checks if c.ok is False]
    if failed:
        raise VerificationError("the run is not verified: " + "; ".join(failed))


# ---- before step 1 ---------------------------------------------------------------------------------------------------
def labels_audited(job: Job) -> Check:
    """Every row learns something, and every learned turn or completion ends with a token that stops generation.

    A row that max_length cut on the right has lost its end with the rest: such rows are counted, not refused.
    """
    rows = [row for row in job.rows if row.labels is not None]
    if not rows:
        return Check("labels", True, f"{len(job.rows)} labelled rows")
    empty = [row.where for row in rows if not row.targets]
    if empty:
        return Check("labels", False, f"{len(empty)} rows have every label masked: {few(empty)}")
    answers = {e.where: e for e in job.train if e.turns or e.completion is not None}
    turn = end_of_turn(job.tokenizer)
    unstopped, cut = list[str](), 0
    for row in rows:
        if row.where in answers:
            ends = (turn if answers[row.where].turns and not row.decoder else set()) or {job.tokenizer.eos_token_id}
            spans = [span for span in learned(row) if not ends & set(span[1])]
            lost = [end for end, _ in spans if not (end == len(row.ids) == job.encoding.max_length)]
            # without an end-of-turn token in the template, eos ends the last turn alone
            lost = lost if turn else [end for end in lost if end == len(row.labels or ())]
            cut += len(spans) > 0 and not lost
            unstopped += [row.where] if lost else []
    if unstopped:
        why = f"{len(unstopped)} rows have a learned turn without its end-of-turn token, and never learn to stop"
        return Check("labels", False, f"{why}: {few(unstopped)}")
    tokens, total = sum(row.targets for row in rows), sum(len(row.ids or row.labels or ()) for row in rows)
    note = f"; {cut} rows lost their end to max_length {job.encoding.max_length}" if cut else ""
    return Check("labels", True, f"{tokens} of {total} tokens are learned{note}")


def learned(row: Encoded) -> list[tuple[int, tuple[int, ...]]]:
    """(end, labels) of every run of learned tokens."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for wanted, run_ in groupby(enumerate(row.labels or ()), lambda pair: pair[1] != IGNORE):
        places = list(run_)
        if wanted:
            found.append((places[-1][0] + 1, tuple(label for _, label in places)))
    return found


def sample(job: Job, most: int = 1500) -> str | None:
    """One row as the model sees it, what is learned between >> and <<; None where rows have no token labels."""
    row = sample_row(job)
    if row is None:
        return None
    text = "".join(f">>{safe(part)}<<" if wanted else safe(part) for part, wanted in row.pieces)
    return text if len(text) <= most else f"{text[:most]} ..."


def sample_row(job: Job) -> Sample | None:
    """The first row that learns something, in pieces; None where rows have no token labels."""
    row = next((row for row in job.rows if row.labels is not None and row.targets), None)
    return None if row is None else Sample(row.where, pieces(row, job.tokenizer))


def covered(job: Job) -> Check:
    """How many of the blocks' linear layers (or of all layers) the adapter changes."""
    touched = [path for path, slot in slots(job.model).items() if job.adapter in slot]
    linear = block_linears(job.model)
    share = len(set(touched) & set(linear)) / max(len(linear), 1)
    tuned = sum(p.numel() for p in job.trainable().values())
    total = sum(size(p) for p in job.model.parameters())
    return Check(
        "coverage",
        bool(touched) and tuned > 0,
        f"{len(touched)} layers, {share:.0%} of the blocks' linear layers; "
        f"{tuned:,} of {total:,} parameters train ({tuned / total:.3%})",
    )


@torch.no_grad()
def starts_as_base(job: Job) -> Check:
    """The adapted model equals the base at the start, where the method promises it."""
    methods = known(job.model, job.adapter).methods[job.adapter]
    if not all(map(identity, methods)):
        names = [m.method_name for m in methods]
        return Check("identity", None, f"{' + '.join(names)} does not start as the base, by design")
    batch = probe(job)
    with measuring(job.model):
        ours = logits(job.model, batch)
        with disabled(job.model):
            base = logits(job.model, batch)
    gap = float((ours - base).abs().max())
    seen = f"largest difference of a logit from the base's: {gap:.2e}"
    if gap > 0 and not job.fresh:
        return Check("identity", None, f"{seen}; the adapter given was trained before")
    return Check("identity", gap <= tolerance(job.model, base), seen)


def probe(job: Job, rows: int = 2, tokens: int = 256) -> Batch:
    """A few short training rows, padded: what the checks run the model on."""
    chosen = sorted(job.rows, key=lambda r: r.length)[:rows]
    return job.batch([r if len(r.ids) <= tokens else cut(r, tokens) for r in chosen], packs=False)


def cut(row: Encoded, tokens: int) -> Encoded:
    labels = None if row.labels is None else row.labels[:tokens]
    return replace(row, ids=row.ids[:tokens], labels=labels, type_ids=row.type_ids and row.type_ids[:tokens], mask_at=0)


def logits(model: Any, batch: Batch) -> Tensor:
    """[rows, seq, vocab] or [rows, classes], of real tokens only."""
    extra = {}
    if model.config.is_encoder_decoder and batch.labels.dim() == 2 and not batch.labels.is_floating_point():
        extra["decoder_input_ids"] = decoder_inputs(model, batch.labels)
    if model.config.is_encoder_decoder and batch.choices is not None:
        extra["decoder_input_ids"] = decoder_inputs(model, batch.choices[:, 0])
    found = run(model, batch, **extra)
    out = (found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], -1)).float()
    mask = batch.inputs.get("attention_mask")
    return out * mask[..., None] if mask is not None and out.dim() == 3 and out.shape[:2] == mask.shape else out


def tolerance(model: nn.Module, base: Tensor) -> float:
    """Two ways to compute one thing differ by rounding: of fp32, or of bf16 where the weights are bf16."""
    share = 2e-2 if next(model.parameters()).dtype == torch.bfloat16 else 1e-4
    return share * max(1.0, float(base.abs().max()))


# ---- after training --------------------------------------------------------------------------------------------------
def saved_whole(job: Job, folder: Path, start: Mapping[str, Tensor]) -> Check:
    """What lies on disk is what was trained, to the last bit: nothing empty, non-finite, lost or never moved."""
    now = state(job.model, job.adapter)
    try:
        disk = canonical(job.model, job.adapter, read_tensors(folder, read_manifest(folder)), folder)
    except (ValueError, OSError, KeyError) as error:
        return Check("saved", False, f"the saved adapter cannot be read: {error}")
    still = [k for k, t in now.items() if k in start and torch.equal(t.cpu(), start[k])]
    faults = {
        "are empty": [k for k, t in now.items() if not t.numel()],
        "are not finite": [k for k, t in now.items() if t.is_floating_point() and not torch.isfinite(t).all()],
        "are missing on disk": now.keys() - disk.keys(),
        "differ on disk": [k for k in now.keys() & disk.keys() if not torch.equal(now[k].cpu(), disk[k].cpu())],
        "never moved": still if len(still) == len(now) else [],
        "were zero at the start and still are": [
            k for k in still if now[k].is_floating_point() and not now[k].any() and not job.idle(k)
        ],
    }
    found = [f"{len(keys)} of {len(now)} tensors {what}: {few(keys)}" for what, keys in faults.items() if keys]
    if found:
        return Check("saved", False, "; ".join(found))
    size = sum(f.stat().st_size for f in folder.iterdir())
    return Check("saved", True, f"{len(now)} tensors, {size / 2**20:.1f} MiB, {len(still)} of them never moved")


@torch.no_grad()
def reloads(job: Job, folder: Path) -> Check:
    """The adapter, loaded from disk beside the live one, gives the same logits to the last bit."""
    batch, name = probe(job), "reloaded"
    # a second soft prompt owns other virtual ids, so the live one steps aside: its ids are read by position
    with restored(job.model):
        with measuring(job.model):  # both from the same seed: a policy may draw in evaluation too
            live = logits(job.model, batch)
        try:
            load(job.model, folder, name)
            activate(job.model, name)
            with measuring(job.model):
                again = logits(job.model, moved(job, batch, name))
        except (ValueError, OSError, KeyError) as error:
            return Check("reload", False, f"the saved adapter does not load: {error}")
        finally:
            if name in attached(job.model):
                activate(job.model)
                detach(job.model, name)
            job.trainable()  # loading a second adapter made that one trainable
    gap = float((live - again).abs().max())
    return Check("reload", gap == 0.0, f"largest difference of a logit after loading from disk: {gap:.2e}")


def moved(job: Job, batch: Batch, name: str) -> Batch:
    """The batch with the live adapter's virtual ids replaced by `name`'s."""
    if "input_ids" not in batch.inputs:
        return batch
    ids = batch.inputs["input_ids"].clone()
    for ours, theirs in zip(prompt_sets(job.model, job.adapter), prompt_sets(job.model, name), strict=True):
        for old, new in zip(ours, theirs, strict=True):
            ids[batch.inputs["input_ids"] == old] = new
    return replace(batch, inputs={**batch.inputs, "input_ids": ids})


@torch.no_grad()
def merges(job: Job) -> Check:
    """The merged model says what the adapted one says; KL(adapted || merged) is printed."""
    held = sum(p.numel() * p.element_size() for p in job.model.parameters())
    if held > free() // 2:
        return Check("merge", None, f"not checked: a copy of the model needs {held / 2**30:.1f} GiB")
    batch = probe(job)
    try:
        with measuring(job.model):
            ours = logits(job.model, batch)
            plain = logits(merge(job.model, job.adapter).eval(), batch)
    except Refusal as refusal:
        return Check("merge", None, refusal.why)
    kl = float(F.kl_div(plain.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean())
    packed = scheme(job.model)
    if packed:
        return Check("merge", None, f"merging into {packed} costs KL {kl:.2e} nats: see `deltatune merge --base`")
    gap, agree = float((plain - ours).abs().max()), float((plain.argmax(-1) == ours.argmax(-1)).float().mean())
    exact = next(job.model.parameters()).dtype != torch.bfloat16
    ok = kl <= (1e-3 if exact else 5e-2)
    size = max(1.0, float(ours.abs().max()))
    if exact or ours.dim() == 2:  # scores and single classes have no distribution of their own
        ok = ok and gap <= (1e-3 if exact else 1e-1) * size
    seen = f"KL {kl:.2e} nats, largest difference {gap:.2e} of {size:.3g}, {agree:.1%} of the choices agree"
    return Check("merge", ok, seen)


def budget_moved(job: Job) -> list[Check]:
    """AdaLoRA took ranks from some layers and left them to others; nothing to say of other methods."""
    inner = [inmost(delta) for _, delta in each(job.model, job.adapter)]
    budgets = list(dict.fromkeys(delta.budget for delta in inner if isinstance(delta, Triplets)))
    found = [spent(budget) for budget in budgets]
    return [Check("budget", all(ok for ok, _ in found), "; ".join(said for _, said in found))] if found else []


def spent(budget: Budget) -> tuple[bool, str]:
    """Whether one budget moved, and how far."""
    ranks = [member.rank for member in budget.members]
    moved = budget.allocations > 0 and sum(ranks) < budget.first
    return moved or budget.least == budget.first, (
        f"{budget.allocations} allocations, from {budget.first} to {sum(ranks)} triplets "
        f"({budget.least} planned) in {len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}"
    )


def weigh(model: nn.Module) -> dict[str, int]:
    """parameter -> the sum of its bits: any one value that changes changes it. Deltas' own parameters are left out."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = {}
    for name, p in model.named_parameters():
        if SLOT not in name.split("."):
            values = p.detach()
            found[name] = int(values.contiguous().view(bits[values.element_size()]).sum(dtype=torch.int64))
    return found


def base_weights(job: Job) -> dict[str, int]:
    """`weigh` of the frozen base, whatever is trained in place put back for the moment."""
    with disabled(job.model):
        return weigh(job.model)


def base_untouched(job: Job, before: Mapping[str, int]) -> Check:
    """Every weight of the frozen base is what it was before training."""
    now = base_weights(job)
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        return Check("base", False, f"{len(changed)} of {len(before)} base tensors changed: {few(changed)}")
    return Check("base", True, f"all {len(before)} tensors of the base are as before")
