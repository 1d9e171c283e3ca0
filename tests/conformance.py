"""What every method must do on every family: one function per promise, run on each cell of method x family."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from counts import COUNTS, count, stored
from deltatune.core import peft_format
from deltatune.core.attach import activate, attach, detach, disabled, packing, parameters, rows, trainable
from deltatune.core.attention import packed, positions
from deltatune.core.delta import SLOT, Refusal
from deltatune.core.merging import merge
from deltatune.core.registry import fits, identity
from deltatune.core.slot import deltas
from deltatune.core.store import load, save, state, virtual_ids
from deltatune.methods import METHODS, build
from models import ALL, FAMILIES, inputs, tiny
from refusals import NEVER_PEFT, NO_PEFT_FORM, REFUSED, ROWLESS, UNMERGEABLE

UNIONS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "mam": [{"prefix": {"length": 3}}, {"adapter": {"bottleneck": 4, "form": "parallel", "where": ["ffn"]}}],
    "lora+ia3": [{"lora": {"r": 2, "targets": ["v", "down"]}}, {"ia3": {}}],
    "prefix+head": [{"prefix": {"length": 3}}, {"head": {}}],
    "lora+head": [{"lora": {"r": 2, "targets": ["q", "v"]}}, {"head": {}}],
}


def variants() -> dict[str, list[dict[str, dict[str, Any]]]]:
    """Every registered method in every form it names, and unions."""
    forms = {form or name: [{name: dict(fields)}] for name, m in METHODS.items() for form, fields in m.tiny.items()}
    return {**forms, **UNIONS}


# A new method needs no line here: what it trains, saves, merges and writes for peft must be what its registration says.
# Of the methods that counts.py knows, that and what the two lists (counts.py, refusals.py) say of them.
VARIANTS = variants()
CLASSIFIERS = ("head", "lora+head", "prefix+head")  # variants that need a task head
OTHER_LENGTH = {"prefix": 2, "mam": 2}  # the second adapter of a mixed batch has a shorter prefix
IDS = (5, 7)  # trained by "tokens", so every batch must hold them

EXACT = 0.0
# fp32 logits of size ~5 after two layers: another order of summation moves them by a few ulp (5e-7 each)
SUMS = 2e-5
# relative: an encoder's gradient is a sum over decoder blocks, and recomputation adds them in another order
REORDERED = 5e-6
DRAWS = 8  # of gates and policies: what none of them reaches is not trained
REMADE = 1e-6  # one GEMM of the same numbers in another shape


@dataclass(frozen=True)
class Cell:
    """One method on one family."""

    variant: str
    family: str

    @property
    def task(self) -> str:
        return "classify" if self.variant in CLASSIFIERS else "lm"

    @property
    def parts(self) -> list[dict[str, dict[str, Any]]]:
        return VARIANTS[self.variant]

    @property
    def original(self) -> Any:
        """The family's tiny model itself: look, do not touch."""
        return original(self.family, self.task)

    @property
    def base(self) -> Any:
        """A fresh copy of the family's tiny model."""
        return copy.deepcopy(original(self.family, self.task))

    @property
    def entries(self) -> list[Any]:
        return [METHODS[name] for part in VARIANTS[self.variant] for name in part]

    @property
    def listed(self) -> bool:
        """Whether the lists of counts and refusals know its methods."""
        return all(entry.name in COUNTS for entry in self.entries)

    def attached(self, seed: int | None = 0, name: str = "default", model: Any = None) -> Any:
        """The model with this variant attached; `seed` stirs its parameters, None leaves them as they start."""
        model = model if model is not None else self.base
        with torch.random.fork_rng():
            torch.manual_seed(seed or 0)
            attach(model, build(VARIANTS[self.variant]), name)
        if seed is not None:
            stir(model, name, seed)
        return model


@functools.cache
def original(family: str, task: str = "lm") -> Any:
    return tiny(family, task)


def cells() -> Iterator[Cell]:
    for variant in VARIANTS:
        for family in ALL:
            yield Cell(variant, family)


@torch.no_grad()
def stir(model: nn.Module, name: str, seed: int) -> None:
    """Move every trained value: adapters that start at zero would make most checks pass by doing nothing."""
    g = torch.Generator().manual_seed(seed + 1)
    for parameter in parameters(model, name).values():
        parameter.add_((0.1 * torch.randn(parameter.shape, generator=g)).to(parameter.dtype))


def batch(model: Any, name: str | None = "default", count: int = 2) -> dict[str, Tensor]:
    """Inputs that hold the trained token ids, with adapter `name`'s virtual ids in front."""
    given = inputs(model, rows=count)
    for key in ("input_ids", "decoder_input_ids"):
        if key in given:
            given[key][:, 0], given[key][:, 1] = IDS
    front = virtual_ids(model, name) if name else ()
    return prepended(given, torch.tensor(front).expand(count, -1)) if front else given


def prepended(given: dict[str, Tensor], front: Tensor) -> dict[str, Tensor]:
    """`given` with the ids `front` [rows, n] before each row; their labels are -100."""
    ids = given["input_ids"]
    out = {**given, "input_ids": torch.cat([front, ids], 1)}
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    if "labels" in given and given["labels"].shape == ids.shape and "decoder_input_ids" not in given:
        out["labels"] = torch.cat([torch.full_like(front, -100), given["labels"]], 1)
    return out


@torch.no_grad()
def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Without gradients: T5's position bias makes attention take another kernel where its table could be trained."""
    return answer(model(**given, **({"use_cache": False} if takes_cache(model) else {})))


def answer(out: Any) -> Tensor:
    """The logits; of CLIP, whose logits are of pairs of rows, each row's two embeddings."""
    return torch.cat([out.text_embeds, out.image_embeds], -1) if "text_embeds" in out else out.logits


def takes_cache(model: Any) -> bool:
    reads_sounds_only = type(model).__name__.endswith("AudioClassification")
    return KINDS.get(model.config.model_type) in ("causal", "seq2seq", "speech") and not reads_sounds_only


KINDS = {family.config.model_type: family.kind for family in ALL.values()}


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    most = gap(a, b)
    assert most <= tolerance, f"they differ by {most:.2e}, allowed {tolerance:.0e}"


def differ(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max().item() > 1e-4, "the adapter changes nothing, so this check could not fail"


def is_base(key: str) -> bool:
    return SLOT not in key.split(".")


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items() if is_base(k)}


def same_values(a: dict[str, Tensor], b: dict[str, Tensor], but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    assert list(a) == list(b)
    changed = [k for k in a if k not in but and not torch.equal(a[k], b[k])]
    assert not changed, f"base values changed: {changed[:3]}"


def train_step(model: Any, name: str = "default", lr: float = 0.1) -> None:
    """One SGD step on adapter `name`."""
    chosen = trainable(model, name)
    model(**batch(model, name)).loss.backward()
    with torch.no_grad():
        for parameter in chosen.values():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    for parameter in model.parameters():
        parameter.grad = None


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks of every kind each module has."""
    kinds = [k for k in vars(nn.Module()) if k.endswith("_hooks")]
    return {n: sum(len(getattr(m, k)) for k in kinds) for n, m in model.named_modules()}


def snapshot(model: Any) -> tuple:
    return (
        list(model.state_dict()),
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")},
        hooks(model),
        sorted(vars(model)),
    )


# ---- the promises ----------------------------------------------------------------------------------------------------
def identity_at_init(cell: Cell) -> None:
    model = cell.base
    plain = logits(model, batch(model, None))
    cell.attached(seed=None, model=model)
    if all(identity(method) for method in build(cell.parts)):
        close(logits(model, batch(model)), plain, REMADE if cell.variant == "tokens" else EXACT)
    elif not virtual_ids(model):
        differ(logits(model, batch(model)), plain)


def gradients_on_exactly_the_declared(cell: Cell) -> None:
    reference = cell.base
    reference(**batch(reference, None)).loss.backward()
    unreached = {id_of for id_of, p in reference.named_parameters(remove_duplicate=False) if p.grad is None}
    model = cell.attached()
    chosen = trainable(model)
    assert chosen
    model(**batch(model)).loss.backward()
    declared = {id(p) for p in chosen.values()}
    silent = set()
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in declared:
            assert parameter.grad is None, f"{key} is frozen and has a gradient"
            assert not parameter.requires_grad
        elif key not in unreached:  # the base's own backward does not reach BERT's pooler under a language model
            assert parameter.grad is not None, f"{key} has no gradient"
            silent |= {key} if is_slot_and_zero(key, parameter) else set()
    seldom = {k for k, p in model.named_parameters(remove_duplicate=False) if id(p) in conditional(model)}
    assert silent <= seldom, f"the gradient of {sorted(silent - seldom)[:3]} is zero"
    assert not (never := unheard(model, silent)), f"{sorted(never)[:3]} had no gradient in {DRAWS} training draws"


def conditional(model: Any) -> set[int]:
    return {id(p) for d in deltas(model) if d.conditional for p in d.parameters()}


def unheard(model: Any, silent: set[str]) -> set[str]:
    """What has a zero gradient in each of several draws, in training too: a gate may be shut now, not always."""
    parameters_of = dict(model.named_parameters(remove_duplicate=False))
    model.train()
    with torch.random.fork_rng():
        for seed in range(DRAWS) if silent else ():
            torch.manual_seed(seed)
            model.zero_grad()
            model(**batch(model)).loss.backward()
            silent = {key for key in silent if is_slot_and_zero(key, parameters_of[key])}
    return silent


def is_slot_and_zero(key: str, parameter: nn.Parameter) -> bool:
    return not is_base(key) and parameter.grad is not None and not parameter.grad.abs().max() > 0


def base_untouched(cell: Cell) -> None:
    model = cell.base
    before = values(model)
    cell.attached(seed=None, model=model)
    train_step(model)
    assert [k for k in model.state_dict() if is_base(k)] == list(before)
    declared = {
        id(p) for d in deltas(model) if d.inplace for p in d.trained(model.get_submodule(d.site.write)).values()
    }
    names = {k for k, p in model.named_parameters(remove_duplicate=False) if id(p) in declared}
    same_values(values(model), before, but=names)
    with disabled(model):
        same_values(values(model), before)


def disabled_is_the_base(cell: Cell) -> None:
    model = cell.base
    plain = logits(model, batch(model, None))
    cell.attached(model=model)
    differ_if_comparable(model, plain)
    with disabled(model):
        close(logits(model, batch(model, None)), plain, EXACT)


def differ_if_comparable(model: Any, plain: Tensor) -> None:
    changed = logits(model, batch(model))
    if changed.shape == plain.shape:
        differ(changed, plain)


def save_then_load(cell: Cell) -> None:
    model, other = cell.attached(), cell.base
    with tempfile.TemporaryDirectory() as place:
        folder = save(model, "default", Path(place) / "saved")
        assert (folder / peft_format.CONFIG).exists() == bool(peft_format.writable(model, "default"))
        load(other, folder, "default")
    ours, theirs = state(model), state(other)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    kept = sum(t.numel() for t in ours.values() if t.is_floating_point())
    assert kept == (stored(cell) if cell.listed else numbers(model)), f"{kept} numbers are saved"
    close(logits(other, batch(other)), logits(model, batch(model)), EXACT)


def detach_restores(cell: Cell) -> None:
    model = cell.base
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)  # whatever it was before must come back
    before, kept = snapshot(model), values(model)
    cell.attached(model=model)
    train_step(model)
    assert snapshot(model) != before
    detach(model, "default")
    assert snapshot(model) == before
    same_values(values(model), kept)


def merge_equals_attached(cell: Cell) -> None:
    model = cell.attached()
    with disabled(model):
        kept = values(model)
    if cell.variant in UNMERGEABLE or not (cell.listed or all(entry.mergeable for entry in cell.entries)):
        refuses(lambda: merge(model))
        return
    live = logits(model, batch(model))
    plain = merge(model)
    assert all(is_base(k) for k in plain.state_dict())
    assert type(plain) is type(model)
    close(logits(plain, batch(plain, None)), live, SUMS)
    with disabled(model):
        same_values(values(model), kept)
    close(logits(model, batch(model)), live, EXACT)


def refuses(call: Callable[[], Any]) -> None:
    try:
        call()
    except Refusal as refusal:
        if not (refusal.found and refusal.instead):
            raise AssertionError("the refusal does not say what was found and what would work") from refusal
    else:
        raise AssertionError("a listed refusal works: take it off the list")


def refused(cell: Cell, listed: bool, call: Callable[[], Any]) -> bool:
    """Whether `call` is refused: what is listed must be; what no list knows may be, if it says what would work."""
    if not listed and cell.listed:
        return False
    with contextlib.suppress(AssertionError) if not listed else contextlib.nullcontext():
        refuses(call)
        return True
    return False


def gradients(model: Any, in_one_row: bool = False) -> dict[str, Tensor]:
    chosen = trainable(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for methods that draw in training: the same draws for every model
        (packed_loss(model) if in_one_row else model(**batch(model)).loss).backward()
    return {k: p.grad for k, p in chosen.items() if p.grad is not None}


def checkpointing_changes_nothing(cell: Cell) -> None:
    packs = cell.task == "lm" and cell.family in FAMILIES and ALL[cell.family].kind != "seq2seq"
    for in_one_row in (False, True) if packs else (False,):
        plain, model = cell.attached().train(), cell.attached().train()
        for m in (plain, model) if in_one_row else ():
            packing(m)
        model.activation_checkpointing_enable({"use_reentrant": False})
        same_gradients(gradients(plain, in_one_row), gradients(model, in_one_row))


def packed_loss(model: Any) -> Tensor:
    """The loss of two sequences of unlike lengths in one row. Its backward runs where nothing is packed any more."""
    given = batch(model)
    lens = (given["input_ids"].shape[1], given["input_ids"].shape[1] - 2)
    row = {key: given[key].flatten()[None, :-2] for key in ("input_ids", "labels")}
    with packed(lens):
        return model(**row, position_ids=positions(model, lens)).loss


def same_gradients(reference: dict[str, Tensor], remade: dict[str, Tensor]) -> None:
    assert list(reference) == list(remade)
    for key, gradient in reference.items():
        close(remade[key], gradient, REORDERED * max(1.0, gradient.abs().max().item()))


def cached_generation(cell: Cell) -> None:
    if cell.task != "lm" or ALL[cell.family].kind not in ("causal", "seq2seq", "speech"):
        return
    model = cell.attached()
    given = {k: v for k, v in batch(model).items() if k in ("input_ids", "attention_mask", "input_features")}
    if "attention_mask" in given:
        given["attention_mask"][0, :2] = 0  # left padding
    settings = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    one, other = (model.generate(**given, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.scores, other.scores, strict=True):
        close(a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0), SUMS)


def deepcopy_is_independent(cell: Cell) -> None:
    model = cell.attached()
    given, live = batch(model), logits(model, batch(model))
    other = copy.deepcopy(model)
    close(logits(other, given), live, EXACT)
    train_step(other)
    differ_after(other, given, live)
    close(logits(model, given), live, EXACT)
    moved = logits(other, given)
    train_step(model, lr=0.2)
    differ_after(model, given, live)
    close(logits(other, given), moved, EXACT)
    detach(model, "default")
    close(logits(other, given), moved, EXACT)


def differ_after(model: Any, given: dict[str, Tensor], before: Tensor) -> None:
    assert not torch.equal(logits(model, given), before), "a training step changed nothing"


def rows_equal_one_by_one(cell: Cell) -> None:
    model = cell.attached(seed=1, name="a")
    second = [
        {k: {**v, "length": OTHER_LENGTH[cell.variant]} if k == "prefix" else v for k, v in part.items()}
        for part in VARIANTS[cell.variant]
    ] if cell.variant in OTHER_LENGTH else VARIANTS[cell.variant]  # fmt: skip
    attach(model, build(second), "b")
    stir(model, "b", 2)
    names = ("b", None, "a", None, "b")
    given = mixed(model, names)
    if refused(cell, cell.variant in ROWLESS, lambda: logits_by_row(model, names, given)):
        return
    together = logits_by_row(model, names, given)
    for i, name in enumerate(names):
        activate(model, *([name] if name else []))
        alone = logits(model, {k: v[i : i + 1] if v.ndim else v for k, v in given.items()})
        close(together[i : i + 1], alone, SUMS)
    for i, j in ((0, 1), (2, 3)):
        assert together.shape[0] == 5
        differ(together[i], together[j])


def mixed(model: Any, names: tuple[str | None, ...]) -> dict[str, Tensor]:
    """One batch whose rows carry the virtual ids of their own adapter."""
    found = batch(model, None).items()
    given = {k: v[:1].expand(len(names), *v.shape[1:]).clone() if v.ndim else v for k, v in found}
    own = [virtual_ids(model, name) if name else () for name in names]
    if not any(own):
        return given
    most = max(map(len, own))
    return prepended(given, torch.tensor([ids or IDS[:1] * most for ids in own]))


def logits_by_row(model: Any, names: tuple[str | None, ...], given: dict[str, Tensor]) -> Tensor:
    with rows(model, names):
        return logits(model, given)


def peft_agrees(cell: Cell) -> None:
    """ours -> peft gives equal logits; changed there, peft -> ours too. A variant peft lacks writes no peft config."""
    found = peft_gaps(cell)
    assert max(found, default=0.0) <= SUMS, f"they differ by {max(found):.2e}, allowed {SUMS:.0e}"


def peft_gaps(cell: Cell) -> tuple[float, ...]:
    """Largest difference of a logit (ours loaded by peft, peft's loaded by us); () where peft has no such form."""
    model = cell.attached()
    has = all(e.peft or e.name == "head" for e in cell.entries) and cell.variant not in ("head", *NEVER_PEFT)
    kind = peft_format.writable(model, "default")
    listed = NO_PEFT_FORM.get((cell.variant, cell.family))
    assert (kind is not None) == (has and not listed), f"writable says {kind}, the list says {listed}"
    if kind is None:
        return ()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own advice about tied layers and unknown versions
        theirs = PeftModel.from_pretrained(cell.base, str(save(model, "default", Path(place) / "ours"))).eval()
        out = gap(peft_logits(theirs, model), logits(model, batch(model)))
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                if "lora_" in key or "ia3_" in key or "prompt_encoder" in key or "modules_to_save.default" in key:
                    p += 0.1 * torch.randn(p.shape, generator=g)
        theirs.save_pretrained(str(Path(place) / "theirs"))
        other = cell.base
        with contextlib.redirect_stderr(io.StringIO()) as said:
            load(other, Path(place) / "theirs", "default")
    assert "base not verified" in said.getvalue()
    assert gap(logits(other, batch(other)), logits(model, batch(model))) > 1e-3
    return out, gap(logits(other, batch(other)), peft_logits(theirs, model))


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a - b).abs().max().item() if a.numel() else 0.0


@torch.no_grad()
def peft_logits(theirs: Any, model: Any) -> Tensor:
    """peft puts the prompt's embeddings in front by itself."""
    return answer(theirs(**{k: v for k, v in batch(model, None).items() if k != "labels"}))


def parameter_count(cell: Cell) -> None:
    """What trains, what requires a gradient and what the registry says are one number: the paper's, where listed."""
    model, said = cell.attached(), fits(cell.original, cell.parts)
    found = numbers(model)
    assert found == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert isinstance(said, dict), said
    assert said["parameters"] == found, f"the registry says {said['parameters']}, {found} train"
    assert not cell.listed or found == count(cell), f"{found} train, by the formula {count(cell)}"


def numbers(model: Any) -> int:
    return sum(p.numel() for p in trainable(model).values())


PROMISES: dict[str, Callable[[Cell], None]] = {
    check.__name__: check
    for check in (
        identity_at_init, gradients_on_exactly_the_declared, base_untouched, disabled_is_the_base, save_then_load,
        detach_restores, merge_equals_attached, checkpointing_changes_nothing, cached_generation,
        deepcopy_is_independent, rows_equal_one_by_one, parameter_count,
        peft_agrees,
    )
}  # fmt: skip


# ---- running ---------------------------------------------------------------------------------------------------------
def failures(cell: Cell) -> dict[str, str]:
    """promise -> what went wrong. A listed refusal must refuse; nothing else may."""
    try:
        if refused(cell, (cell.variant, cell.family) in REFUSED, cell.attached):
            return {}
    except AssertionError as error:
        return {"refusal": str(error)}
    found = {}
    for name, promise in PROMISES.items():
        try:
            promise(cell)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found
