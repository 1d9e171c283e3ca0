"""A configuration before it is checked: familiar names of other trainers, short spellings, command-line overrides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltatune import blocks
from deltatune.marks import Problem, Spot, dotted, nearest

# Names people bring from transformers, trl, LLaMA-Factory and axolotl.
FAMILIAR: dict[str, str] = {
    **dict.fromkeys(("model_name_or_path", "base_model", "model_name"), "model.name"),
    "torch_dtype": "model.dtype",
    **dict.fromkeys(("r", "lora_r", "rank", "lora_rank"), "method.lora.r"),
    **dict.fromkeys(("alpha", "lora_alpha"), "method.lora.alpha"),
    "lora_dropout": "method.lora.dropout",
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), "method.lora.targets"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "batch_size"), "train.batch_rows"),
    "gradient_accumulation_steps": "train.accumulate",
    **dict.fromkeys(("cutoff_len", "sequence_len", "max_seq_length", "max_length", "max_seq_len"), "train.max_length"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs"), "train.epochs"),
    **dict.fromkeys(("max_steps", "steps"), "train.steps"),
    **dict.fromkeys(("learning_rate", "lr"), "train.lr"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), "train.warmup"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "train.schedule"),
    "weight_decay": "train.weight_decay",
    **dict.fromkeys(("max_grad_norm", "gradient_clip_norm"), "train.clip"),
    "seed": "train.seed",
    "bf16": "train.precision",
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "train.checkpoint_gradients"),
    "torch_compile": "train.compile",
    **dict.fromkeys(("optim", "optimizer"), "train.optimizer"),
    **dict.fromkeys(("bf16_stochastic_round", "pure_bf16"), "train.rounding"),
    "neftune_noise_alpha": "train.neftune",
    "early_stopping_patience": "train.patience",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "logging_steps": "log.every",
    **dict.fromkeys(("train_file", "dataset", "datasets"), "data.train"),
    **dict.fromkeys(("validation_file", "eval_file", "eval_dataset", "test_datasets"), "data.eval"),
    **dict.fromkeys(("sample_packing", "packing"), "data.packing"),
    "output_dir": "output.dir",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), "model.quant"),
}

# The same for single fields of methods, beside those above.
FIELDS = {
    **dict.fromkeys(("num_virtual_tokens", "prefix_length", "prompt_length"), "length"),
    "init_lora_weights": "init",
    "reduction_factor": "reduction",
    "use_rslora": "scaling",
}


def meant(key: str, names: Sequence[str]) -> str | None:
    """The one of `names` that a familiar name of another library stands for: rank -> r."""
    own = FIELDS.get(key, FAMILIAR.get(key, "").rpartition(".")[2])
    return own if own in names else None


# Two ways to say one thing: the tree holds one of each pair.
RIVALS: dict[Spot, tuple[Spot, str]] = {
    ("train", "steps"): (("train", "epochs"), "steps counts optimizer steps, epochs counts passes over the data"),
    ("train", "batch_tokens"): (("train", "batch_rows"), "batch_tokens counts tokens, batch_rows counts rows"),
}
RIVAL = {**{spot: other for spot, (other, _) in RIVALS.items()}, **{other: spot for spot, (other, _) in RIVALS.items()}}
# A section given as one plain value means this key of it.
SHORT = {"model": "name", "data": "train", "output": "dir", "log": "every"}


def word_list(value: Any) -> Any:
    """`q_proj,v_proj` as a list; `all` and `all-linear` stay one word: every linear layer."""
    if isinstance(value, str) and value in ("all", "all-linear"):
        return "all"
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value


def switch(value: Any) -> Any:
    """A boolean as on / off."""
    return ("off", "on")[value] if isinstance(value, bool) else value


def recomputed(value: Any) -> Any:
    """How much is recomputed: a switch, a number of blocks, or below 1 a share of them."""
    value = switch(value)
    if isinstance(value, (int, float)) and value >= 0 and (value < 1 or value % 1 == 0):
        return int(value) if value >= 1 else value or "off"
    if value not in ("auto", "on", "off"):
        near = nearest(value, ("auto", "on", "off")) if isinstance(value, str) else ""
        raise ValueError(f"choose auto, on, off, a number of blocks, or a share of them below 1{near}")
    return value


def at_once(value: Any) -> Any:
    """A number of tokens, auto or off."""
    value = switch(value)
    if value not in ("auto", "off") and (isinstance(value, str) or not isinstance(value, int) or value < 1):
        near = nearest(value, ("auto", "off")) if isinstance(value, str) else ""
        raise ValueError(f"choose auto, off, or a number of tokens{near}")
    return value


# AdamW variants of other programs: transformers' names, and SimpleTuner's adamw_bf16, which has bf16 moments too.
OPTIMIZERS = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw-8bit"),
    **dict.fromkeys(("adamw_anyprecision", "adamw_bf16"), "adamw-bf16"),
    "paged_adamw_32bit": "paged-adamw",
}


def optimizer(value: Any) -> Any:
    """The names that other programs have for AdamW variants as ours; every further `adamw_...` is AdamW."""
    if not isinstance(value, str):
        return value
    return OPTIMIZERS.get(value, "adamw" if value.startswith("adamw_") else value)


TRANSLATED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), word_list),
    "load_in_4bit": lambda value: "nf4" if value is True else value or None,
    "load_in_8bit": lambda value: "int8" if value is True else value or None,
    "quantization_bit": lambda value: "nf4" if value == 4 else value,
    "bf16": lambda value: {True: "bf16", False: "fp32"}.get(value, value),
    **dict.fromkeys(("optim", "optimizer"), optimizer),
    # LLaMA-Factory's pure_bf16 has no masters either, but rounds to the nearest, which loses small steps.
    **dict.fromkeys(("bf16_stochastic_round", "pure_bf16"), lambda v: {True: "stochastic", False: "masters"}.get(v, v)),
    "lr_scheduler_type": lambda value: "cosine" if value == "cosine_with_min_lr" else value,
    # transformers writes "no limit" as -1 or 0 here; an unset key says the same.
    "max_steps": lambda value: None if value in (-1, 0) else value,
}


@dataclass
class Draft:
    """A tree being read: where every value came from, what was translated, what is wrong."""

    data: dict[Any, Any]
    lines: dict[Spot, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)  # section -> its keys
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    named: list[tuple[str, str]] = field(default_factory=list)  # presets that `method` names, and where

    def where(self, spot: Spot) -> str:
        """`file:line` or the flag of a place, or of the nearest place above it."""
        while spot and spot not in self.lines:
            spot = spot[:-1]
        return self.lines.get(spot, "")

    def wrong(self, spot: Spot, text: str, where: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(spot, text, where or self.where(spot)))


def shape(draft: Draft) -> None:
    """Bring every spelling to the one tree, in place: aliases, bare names, short sections."""
    data = draft.data
    if "adapter" in data:
        take(draft, ("adapter",), ("method",), "adapter")
    for section, key in SHORT.items():
        if section in data and data[section] is not None and not isinstance(data[section], Mapping):
            data[section] = {key: data[section]}
            draft.lines[section, key] = draft.where((section,))
    if data.get("method") is not None:
        draft.named = draft.named or named(data["method"], draft.where(("method",)))
        data["method"] = blocks.as_list(data["method"])
    if isinstance(data.get("objective"), str):
        data["objective"] = {data["objective"]: {}}
    if isinstance(data.get("objective"), Mapping):
        data["objective"] = {name: blocks.plain(fields) or {} for name, fields in data["objective"].items()}
    translate(draft)


def named(method: Any, where: str) -> list[tuple[str, str]]:
    """The presets among the bare names of `method`."""
    words = method if isinstance(method, list | tuple) else [method]
    return [(word, where) for word in words if isinstance(word, str) and word in blocks.presets()]


def settle(draft: Draft) -> None:
    """What the named presets say of a run (QLoRA: model.quant; the papers' train), where nothing else is said: last, so
    that file, flags and familiar names go first. Of several presets, the first that says a thing has its way."""
    taken: dict[Spot, str] = {}
    for name, where in draft.named:
        front = f"{where}: " if where else ""
        said: list[str] = []
        for spot, value in blocks.settings(name):
            if spot in taken and lookup(draft, spot) != value:
                draft.notes.append(
                    f"{front}{name} also means {dotted(spot)}: {value}, but {taken[spot]} is named first"
                )
            if any(present(draft, place) for place in (spot, *([RIVAL[spot]] if spot in RIVAL else []))):
                continue
            put(draft, spot, value, where)
            taken[spot] = name
            said.append(f"{dotted(spot)}: {shown(value)}")
        if said:
            draft.notes.append(f"{front}{name} means {', '.join(said)}")
    if draft.named:
        draft.data["presets"] = [name for name, _ in draft.named]


def shown(value: Any) -> str:
    """`{choice: {}}` as its name, everything else as it is."""
    return next(iter(value)) if isinstance(value, Mapping) and len(value) == 1 else str(value)


def present(draft: Draft, spot: Spot) -> bool:
    """Whether a place is given; null is given too: it leaves the value to the method."""
    here = lookup(draft, spot[:-1]) if spot[1:] else draft.data
    return isinstance(here, Mapping) and spot[-1] in here


def translate(draft: Draft) -> None:
    """Move every familiar name to its place."""
    for name in [key for key in draft.data if key not in draft.fields and key in FAMILIAR]:
        take(draft, (name,), spot_of(FAMILIAR[name]), name)
    for section, known in draft.fields.items():
        inside = draft.data.get(section)
        if isinstance(inside, Mapping) and section != "objective":
            draft.data[section] = inside = dict(inside)
            for name in [key for key in inside if key not in known and at_home(str(key), section)]:
                take(draft, (section, name), spot_of(FAMILIAR[name]), name)
    for i, block in enumerate(draft.data.get("method") or []):
        if isinstance(block, Mapping) and isinstance(block.get("lora"), Mapping):
            known = blocks.methods().get("lora", {}).get("fields", {})
            for name in [key for key in block["lora"] if key not in known]:
                if FAMILIAR.get(name, "").startswith("method.lora."):
                    take(draft, ("method", i, "lora", name), spot_of(FAMILIAR[name]), name)


def at_home(name: str, section: str) -> bool:
    """Whether a familiar name may stand in this section: only in its own, but data has a length in many programs."""
    target = FAMILIAR.get(name, "")
    return target.startswith(f"{section}.") or (section, target) == ("data", "train.max_length")


def spot_of(name: str) -> Spot:
    """`train.lr` as a place."""
    return tuple(name.split("."))


def take(draft: Draft, old: Spot, new: Spot, name: str) -> None:
    """Move a value from a familiar name to its own; both given is a problem."""
    holder: Any = draft.data
    for part in old[:-1]:
        holder = holder[part]
    value = holder.pop(old[-1])
    where = draft.where(old)
    value = TRANSLATED.get(name, lambda same: same)(value)
    if value is None:
        return
    there = lookup(draft, new)
    if there is not None:
        draft.wrong(
            old, f"given twice: {dotted(new)} is already {there!r} at {draft.where(new) or 'the top'}; drop one"
        )
        return
    put(draft, new, value, where)
    draft.notes.append(f"{where + ': ' if where else ''}{name} is read as {dotted(new)}")


def lookup(draft: Draft, spot: Spot) -> Any:
    """The value at a place, or None; `method.lora.r` finds the block by its name."""
    here: Any = draft.data
    for part in spot:
        if isinstance(here, list):
            here = next((block for block in here if isinstance(block, Mapping) and part in block), None)
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def put(draft: Draft, spot: Spot, value: Any, where: str) -> None:
    """Set one place of the tree; sections and the method's block appear as needed, None removes the key."""
    if spot[0] == "method":
        put_method(draft, spot, value, where)
        return
    here = draft.data
    for part in spot[:-1]:
        if here.get(part) is None:
            here[part] = {}
        here[part] = dict(here[part]) if isinstance(here[part], Mapping) else here[part]
        here = here[part]
        if not isinstance(here, dict):
            draft.wrong(spot, f"{part} is {here!r}, which has no keys", where)
            return
    here[spot[-1]] = value
    if value is None:
        del here[spot[-1]]
    draft.lines[spot] = where


def put_method(draft: Draft, spot: Spot, value: Any, where: str) -> None:
    """`method`, `method.lora` or `method.lora.r`, whatever spelling the file has."""
    if len(spot) == 1:
        draft.named = named(value, where)
        draft.data["method"] = blocks.as_list(value)
        forget(draft, spot)
        draft.lines[spot] = where
        return
    found = draft.data.get("method") or [{spot[1]: {}}]
    draft.data["method"] = found = [dict(b) if isinstance(b, Mapping) else b for b in found]
    at = next((i for i, block in enumerate(found) if isinstance(block, dict) and spot[1] in block), None)
    if at is None:
        names = ", ".join(str(next(iter(b), b)) if isinstance(b, dict) else str(b) for b in found)
        draft.wrong(spot, f"the method is {names}; name it too (--method {spot[1]})", where)
    elif len(spot) == 2:
        found[at] = blocks.as_list({spot[1]: value})[0]
    else:
        fields = found[at][spot[1]] = dict(found[at][spot[1]] or {})
        fields[".".join(map(str, spot[2:]))] = blocks.plain(value)
        found[at] = blocks.as_list({spot[1]: fields})[0]
    draft.lines["method", at or 0, *spot[1:]] = draft.lines[spot] = where


def forget(draft: Draft, spot: Spot) -> None:
    """Drop the lines below a place whose value was replaced."""
    for old in [known for known in draft.lines if known[: len(spot)] == spot]:
        del draft.lines[old]


def override(draft: Draft, name: str, value: Any, where: str) -> None:
    """One command-line value over the tree (`train.lr=3e-4`, `lora_r=8`, `method=bitfit`)."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    if not parts or not all(parts):
        draft.wrong((), f"{name!r} is not a dotted name such as train.lr", where)
        return
    parts[0] = "method" if parts[0] == "adapter" else parts[0]
    known = draft.fields.get(parts[0], ())
    alias = parts[-1] if (len(parts) == 1 and parts[0] not in draft.fields) or parts[-1] not in known else ""
    if alias in FAMILIAR and (len(parts) == 1 or (len(parts) == 2 and at_home(alias, parts[0]))):
        draft.notes.append(f"{where}: {alias} is read as {FAMILIAR[alias]}")
        value, parts = TRANSLATED.get(alias, lambda same: same)(value), FAMILIAR[alias].split(".")
    if len(parts) == 1 and parts[0] in SHORT and not isinstance(value, Mapping):
        parts.append(SHORT[parts[0]])
    replace_rival(draft, tuple(parts), value, where)
    if parts == ["objective"]:
        value = {value: {}} if isinstance(value, str) else value
        forget(draft, ("objective",))
    put(draft, tuple(parts), value, where)


def replace_rival(draft: Draft, spot: Spot, value: Any, where: str) -> None:
    """A flag for one of two rival keys takes the file's other one away, and says so."""
    rival = RIVAL.get(spot)
    # Two flags that contradict each other are the user's mistake, not a file to override.
    if rival and value is not None and lookup(draft, rival) is not None and not draft.where(rival).startswith("--"):
        draft.notes.append(f"{where}: {dotted(spot)} replaces {dotted(rival)} ({draft.where(rival) or 'given'})")
        put(draft, rival, None, where)


def rivals(draft: Draft) -> None:
    """Both of a rival pair given: say which to drop."""
    for spot, (other, meaning) in RIVALS.items():
        if lookup(draft, spot) is not None and lookup(draft, other) is not None:
            draft.wrong(spot, f"given with {dotted(other)} ({draft.where(other) or 'same call'}); drop one: {meaning}")
