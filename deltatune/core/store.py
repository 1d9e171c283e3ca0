"""Save and load adapters: a peft-format folder where peft has the method, a manifest always; strict on every tensor."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..methods._rows import Rows
from . import peft_format, peft_lora
from .attach import activate, attach, attached, detach, each, focus, fold, known
from .delta import overwritten
from .fingerprint import fingerprint, rescaled, scales
from .manifest import AGAIN, CONFIG, FORMAT, MANIFEST, OWN, adapter_in, is_model, read_object
from .peft_format import TENSORS, strict
from .quant import scheme, steady
from .registry import build, spec, whole
from .state import STATE, State
from .vocabulary import WORDS, grow, teach, unseeded, vocabulary, words

OURS = (MANIFEST, OWN, TENSORS, CONFIG)
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave where somebody looked
SHAPE = {"methods": list, "base": dict, "tensors": dict, "file": str, "sha256": str}
SHAPE |= {"base.fingerprint": str, "base.class": str}


def state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """canonical key -> tensor of everything adapter `name` trained; what save writes."""
    known(model, name)
    return {
        f"{delta.site.key}.{key}": tensor
        for layer, delta in each(model, name)
        for key, tensor in delta.stored(layer).items()
    }


def load_state(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into adapter `name`. ValueError when one is missing, unexpected or of another shape."""
    strict(state(model, name), tensors)
    for layer, delta in each(model, name):
        delta.put(layer, own(delta, tensors))


def own(delta: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One delta's tensors out of an adapter's, by its own names."""
    start = f"{delta.site.key}."
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


# ---- saving ----------------------------------------------------------------------------------------------------------
def save(
    model: nn.Module, name: str, folder: str | Path, *, base: str | None = None, record: Mapping[str, Any] | None = None
) -> Path:
    """Write adapter `name` to `folder`, whole or not at all. `base`: the reference the base was loaded from.

    Writes adapter_config.json only where peft has the method. `record` (objective, labels, template) is kept in the
    manifest; left out, it is what is known of it, from its run or from where it was loaded. ValueError when `folder`
    holds anything but an older adapter; nothing is touched then.
    """
    folder, own = Path(folder), state(model, name)
    check_place(folder)
    base, about = base or public_name(model), dict(known(model).records.get(name, {}) if record is None else record)
    kind = peft_format.writable(model, name)
    config, tensors = peft_format.write(model, name, kind, base) if kind else (None, own)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        file = temporary / (TENSORS if kind else OWN)
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, file, metadata={"format": "pt"})
        if config:
            (temporary / CONFIG).write_text(json.dumps(config, indent=2))
        facts = manifest(model, name, own, base) | {"file": file.name, "sha256": digest(file)}
        (temporary / MANIFEST).write_text(json.dumps(facts | {"record": about}, indent=2, sort_keys=True))
        replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def manifest(model: Any, name: str, own: Mapping[str, Tensor], base: str | None) -> dict[str, Any]:
    """What the adapter is, and the base it belongs to."""
    adapted: State = getattr(model, STATE)
    about: dict[str, Any] = {"fingerprint": adapted.base, "reference": base, "class": type(model).__name__}
    if packed := scheme(model):
        about |= {"quant": packed, "scales": scales(model)}
    if adapted.vocab is not None:
        about |= {"vocab": adapted.vocab, "grown_to": vocabulary(model)}
    if words(model):
        about["tokens"] = words(model)
    tensors = {k: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for k, t in own.items()}
    return {"format": FORMAT, "methods": spec(adapted.methods[name]), "base": about, "tensors": tensors}


def check_place(folder: Path) -> None:
    """Only an older adapter, with nothing beside it, or an empty folder is ever overwritten."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise ValueError(f"{folder} exists and is no plain folder: choose another place, nothing was overwritten")
    allowed = (*OURS, *LITTER)
    strangers = sorted(p.name for p in folder.iterdir() if p.name not in allowed or p.is_symlink() or not p.is_file())
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise ValueError(
            f"{folder} exists and holds what is no part of an adapter: {', '.join(strangers[:5])}{more}. "
            "Choose another place; nothing was overwritten"
        )


def public_name(model: Any) -> str | None:
    """The base's name for the manifest: a hub id is kept, of a local path only the folder's own name."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return (Path(name).name if os.path.isabs(name) or Path(name).exists() else name) or None


def replace(temporary: Path, folder: Path) -> None:
    """Put the finished folder in its place: at every moment there is a whole adapter on disk, the old or the new."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    old = folder.with_name(f"{temporary.name.removesuffix('.tmp')}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- loading ---------------------------------------------------------------------------------------------------------
def load(
    model: nn.Module, folder: str | Path, name: str | None = None, *, verify: bool = True, tokenizer: Any = None
) -> str:
    """Attach the adapter saved in `folder` (or in the run folder that holds it) and make it active; returns its name
    (default: the folder's).

    ValueError on a wrong base, a damaged file, a missing or an unexpected tensor; then the model is as it was.
    A peft folder without our manifest loads with "base not verified" printed. `verify=False` skips the base check only.
    `tokenizer`: learns the words of the tokens the adapter adds; without it, they are named on standard error.
    """
    if isinstance(model, str | Path):
        raise ValueError(f"load() puts an adapter on a model that you hold: load(model, {str(model)!r})")
    folder = Path(folder)
    name = name or "".join(c if c.isalnum() or c in "_-" else "_" for c in folder.name)[:64] or "default"
    folder = adapter_in(folder)
    found = read_manifest(folder)
    tensors = read_tensors(folder, found)
    if found is None:
        methods = foreign(model, folder, tensors)
        print(f"{folder.name}: base not verified (a peft folder without {MANIFEST})", file=sys.stderr)
    else:
        methods = build(found["methods"])
        check_base(model, found["base"], folder, verify)
        learn(model, found["base"].get("tokens") or {}, folder, tokenizer)
    wanted = (found or {}).get("base", {}).get("grown_to") or 0
    active = known(model).active if attached(model) else ()
    with (
        unseeded(model),
        overwritten(),
    ):  # what is drawn here is overwritten: a load must not move the user's random numbers
        before = grow(model, wanted) if wanted > vocabulary(model) else None
        try:
            attach(model, methods, name)
            fill(model, name, tensors, folder, active)
        except Exception:
            if before:
                before.restore(model)
            raise
    if before:
        known(model).grown = before
    known(model).records[name] = dict((found or {}).get("record") or {})
    if tokens := (found or {}).get("base", {}).get("tokens"):
        setattr(model, WORDS, words(model) | tokens)
    return name


def learn(model: nn.Module, tokens: Mapping[str, int], folder: Path, tokenizer: Any) -> None:
    """The tokenizer reads added tokens as the adapter was trained to; where none was given, the user hears of it."""
    if tokenizer is not None:
        teach(tokenizer, tokens, folder.name)
    elif new := [word for word in tokens if word not in words(model)]:
        said = f"adds the tokens {', '.join(new[:5])}: give load(..., tokenizer=tokenizer), which has to know them too"
        print(f"{folder.name} {said}", file=sys.stderr)


def fill(model: nn.Module, name: str, tensors: dict[str, Tensor], folder: Path, active: tuple[str, ...]) -> None:
    """Copy the folder's tensors into the adapter just attached, or take it out again."""
    try:
        if (folder / CONFIG).exists():
            peft_format.resize(model, name, tensors)
            if not peft_format.writable(model, name):
                fold(model, name)  # peft's form is the one after training
        found = canonical(model, name, tensors, folder)
        for _, delta in each(model, name):
            delta.take_form(own(delta, found))
        load_state(model, name, found)
        focus(model, name)
    except Exception:
        detach(model, name)
        if active:
            activate(model, *active)
        raise


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None for a foreign peft folder; ValueError when the folder is no adapter, or is damaged."""
    if not folder.is_dir():
        raise ValueError(f"no adapter folder {str(folder)!r}")
    path = folder / MANIFEST
    if is_model(folder):
        raise ValueError(f"{folder} holds a whole model, no adapter: give it as the model (--model {folder})")
    if not path.exists():
        if (folder / CONFIG).exists():
            return None
        raise ValueError(f"{folder} is no adapter folder: it has neither {MANIFEST} nor {CONFIG}")
    manifest = read_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}: update deltatune")
    check_manifest(path, manifest)
    return manifest


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Everything that loading relies on is there and of its kind; nothing outside the folder is named."""
    base = manifest.get("base")
    have = {**manifest, **{f"base.{key}": value for key, value in (base if isinstance(base, dict) else {}).items()}}
    for key, kind in SHAPE.items():
        if not isinstance(have.get(key), kind):
            raise ValueError(f"{path} is damaged: {key!r} is missing or is no {kind.__name__}. {AGAIN}")
    for key in ("base.vocab", "base.grown_to"):
        if key in have:
            whole(f"{path}: {key}", have[key])
    kept = have.get("base.scales", {})
    if not isinstance(kept, dict) or not all(isinstance(v, list) and all(map(number, v)) for v in kept.values()):
        raise ValueError(f"{path} is damaged: 'base.scales' is no {{layer: [numbers]}}. {AGAIN}")
    tokens = have.get("base.tokens", {})
    if not isinstance(tokens, dict) or any(type(i) is not int or i < 0 for i in tokens.values()):
        raise ValueError(f"{path} is damaged: 'base.tokens' is no {{word: id}}. {AGAIN}")
    for block in manifest["methods"]:
        if not isinstance(block, dict) or not all(isinstance(fields, dict) for fields in block.values()):
            raise ValueError(f"{path} is damaged: {block!r} in 'methods' is no {{name: fields}}. {AGAIN}")
    file = manifest["file"]
    if Path(file).name != file or file not in OURS:
        raise ValueError(f"{path}: file {file!r} is none that an adapter has: {OWN} or {TENSORS}")


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_tensors(folder: Path, manifest: dict[str, Any] | None) -> dict[str, Tensor]:
    file = folder / (manifest["file"] if manifest else TENSORS)
    if not file.exists():
        raise ValueError(
            f"{folder} has no {file.name}; pickled files (.bin) are never read: convert them with peft first"
        )
    if manifest and digest(file) != manifest["sha256"]:
        raise ValueError(
            f"{file} is damaged: sha256 {digest(file)[:16]}..., {MANIFEST} says {manifest['sha256'][:16]}.... {AGAIN}"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off: {error}. {AGAIN}") from None


def foreign(model: nn.Module, folder: Path, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """The methods of a peft folder without a manifest."""
    config = read_object(folder / CONFIG)
    try:
        found = peft_format.methods(config, tensors, model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    tensors |= peft_lora.fitted(tensors)
    return found


def canonical(model: nn.Module, name: str, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    return peft_format.read(model, name, tensors) if (folder / CONFIG).exists() else tensors


def check_base(model: nn.Module, base: Mapping[str, Any], folder: Path, verify: bool) -> None:
    """ValueError for another base, or where tokens would have to be added under adapters that are attached."""
    steady(model)
    existing: State | None = getattr(model, STATE, None)
    if verify and base.get("quant") != scheme(model):
        raise ValueError(other_packing(base.get("quant"), scheme(model), folder.name))
    actual = existing.base if existing else fingerprint(model, getattr(model, "deltatune_vocab", None))
    if verify and actual != base["fingerprint"]:
        raise ValueError(
            f"{folder.name} was trained on another base: {base.get('reference') or base['class']} with fingerprint "
            f"{base['fingerprint'][:16]}..., this {type(model).__name__} has {actual[:16]}.... "
            "Load that base (same revision), or pass verify=False (in Python) if you know that it is the same"
        )
    if verify and "scales" in base and (differ := rescaled(scales(model), base["scales"])):
        raise ValueError(
            f"{folder.name} was trained on another base: the 4-bit codes are the same, the scales of {len(differ)} "
            f"layers are not, such as {differ[0]}. Load that base (same revision), or pass verify=False (in Python)"
        )
    if attached(model) and base.get("grown_to", 0) > vocabulary(model):
        raise ValueError(
            f"{folder.name} adds tokens (up to {base['grown_to']}): load it before {', '.join(attached(model))}"
        )


def other_packing(theirs: str | None, ours: str | None, name: str) -> str:
    """Why an adapter does not go onto the same base in another packing, and what to do."""
    return (
        f"{name} was trained on a base {packed(theirs)}, this one is {packed(ours)}: what it learned includes the "
        f"rounding of its own base. Load the base {packed(theirs)} (model.quant: {theirs or 'left out'}; in Python "
        "core.quant.options), merge onto another one with `deltatune merge DIR --base REF`, or pass verify=False "
        "(in Python) to try it"
    )


def packed(kind: str | None) -> str:
    return f"packed as {kind}" if kind else "in plain bf16 or fp32"


# ---- tokens ----------------------------------------------------------------------------------------------------------
def add_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> tuple[int, ...]:
    """Add `tokens` to tokenizer and model (new rows: the mean of the old); returns their ids, for NewTokens(ids)."""
    if attached(model):
        raise ValueError("add tokens before attaching adapters: they belong to the base the adapters see")
    if wrong := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
        raise ValueError(f"a new token must be a text that shows, got {wrong[0]!r}")
    tokenizer.add_tokens(tokens)
    grow(model, max(len(tokenizer), vocabulary(model)))
    ids = tuple(int(i) for i in tokenizer.convert_tokens_to_ids(tokens))
    setattr(model, WORDS, words(model) | dict(zip(tokens, ids, strict=True)))
    return ids


def virtual_ids(model: nn.Module, name: str = "default", task: str | None = None) -> tuple[int, ...]:
    """The token ids that stand for adapter `name`'s soft prompt (the first of several; that of `task`, where tasks have
    their own): put them in front of, or anywhere in, the input."""
    sets, tasks = prompt_sets(model, name), prompt_tasks(model, name)
    if task is not None and task not in tasks:
        raise ValueError(f"adapter {name!r} has no prompt for the task {task!r}; tasks: {', '.join(tasks) or 'none'}")
    at = tasks.index(task) * (len(sets) // len(tasks)) if task is not None else 0
    return sets[at] if sets else ()


def prompt_tasks(model: nn.Module, name: str = "default") -> tuple[str, ...]:
    """The tasks that each have a share of adapter `name`'s prompts, in their order; () where all rows share them."""
    found = {m.tasks for m in known(model, name).methods[name] if getattr(m, "tasks", ())}
    if len(found) > 1:
        raise ValueError(f"adapter {name!r} unites prompts of unlike tasks {sorted(found)}: give them the same")
    return next(iter(found), ())


def prompt_sets(model: nn.Module, name: str = "default") -> tuple[tuple[int, ...], ...]:
    """The virtual ids of each of adapter `name`'s prompts, which are trained side by side; () without a soft prompt."""
    known(model, name)
    rows = [d for _, d in each(model, name) if isinstance(d, Rows)]
    counts = {d.count for d in rows} - {1}
    if len(counts) > 1:
        raise ValueError(f"adapter {name!r} unites prompts of unlike counts {sorted(counts)}: give them one count")
    several = max(counts, default=1) if rows else 0
    return tuple(tuple(i for d in rows for i in d.virtual_ids(k % d.count)) for k in range(several))
