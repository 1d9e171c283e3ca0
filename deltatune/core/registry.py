"""The methods there are: each registers itself, the docs, the CLI's index and the conformance suite read this table."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

from .. import blocks
from ..aliases import meant
from ..marks import ConfigError, Problem, read_file
from .delta import Refusal, named, overwritten, to_train
from .site import block_of

KINDS = ("linear", "rescale", "adapter", "attention", "embedding", "selective")
EVERY = (0.0, math.inf)  # learning rates


@dataclass(frozen=True)
class Entry:
    """One method: its class, its paper's arXiv id, what it changes, and what it can do."""

    name: str
    cls: type
    paper: str
    kind: str
    mergeable: bool
    peft: str | None  # the peft type its saved form follows, None where peft lacks it
    lr: float  # a learning rate to start from
    identity: bool  # the adapted model equals the base before training
    source: str  # where the default settings come from: "r: paper, table 9; lr: swept: docs/evidence/methods.md"
    tiny: Mapping[str, Mapping[str, Any]]  # forms that tiny models can carry, by name ("": the method's own): for tests
    lr_range: tuple[float, float] = EVERY  # lowest and highest learning rate that works; outside it: a warning
    recipe: str = ""  # the preset that trains as the paper does
    virtual: bool = False  # its `length` virtual tokens stand in the text: a template's <soft> slots


def read_preset(file: Path) -> dict[str, Any]:
    """One preset; ConfigError with file and line for a key that presets do not have."""
    preset, lines = read_file(file)
    said = "unknown; a preset has " + ", ".join(PARTS)
    problems = [Problem((k,), f"{said}.{nearest(k, PARTS)}", lines[k,]) for k in preset if k not in PARTS]
    if problems or not preset.get("method"):
        raise ConfigError(problems or [Problem(("method",), "must be given", str(file))])
    return preset


HOME = Path(__file__).parents[1]
# method: what it stands for; model, objective, train: settings of a run that names it; lr_range: as in Entry; swept:
# the learning rate that the store of benchmarks/recover.py chose, from which a run of it starts
PARTS = ("note", "paper", "lr_range", "swept", "method", "model", "objective", "train")
METHODS: dict[str, Entry] = {}
DEFAULTS: dict[str, dict[str, Any]] = read_file(HOME / "methods" / "defaults.yaml")[0]


def method(name: str, *, paper: str, kind: str, **facts: Any) -> Callable[[type], type]:
    """Register a frozen dataclass as a method: @method("ia3", paper="2205.05638", kind="rescale", peft="IA3", ...)."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} of method {name!r}: choose from {', '.join(KINDS)}")
    known: dict[str, Any] = {
        "mergeable": False,
        "peft": None,
        "lr": 1e-3,
        "identity": True,
        "source": "",
        "tiny": {"": {}},
        **DEFAULTS.get(name, {}),
    }

    def register(cls: type) -> type:
        low, high = {**known, **facts}.get("lr_range", EVERY)
        entry = Entry(name, cls, paper, kind, **{**known, **facts, "lr_range": (float(low), float(high))})
        METHODS[name] = entry
        checked(cls).method_name = name  # type: ignore[attr-defined]
        if inner_fields(cls) and not hasattr(cls, "bind"):
            cls.bind = bind_inner  # type: ignore[attr-defined]
        blocks.REGISTERED[name] = functools.cache(lambda: describe(entry))
        return cls

    return register


def inner_fields(cls: type) -> set[str]:
    """The fields of a method that hold other methods."""
    return {f.name for f in dataclasses.fields(cls) if f.metadata.get("methods")}


def bind_inner(self: Any, tokenizer: Any) -> Any:
    """The `bind` of methods that hold others: what is inside, with its words as token ids."""
    found = {key: tuple(bound(m, tokenizer) for m in getattr(self, key)) for key in inner_fields(type(self))}
    return dataclasses.replace(self, **found)


def bound(method: Any, tokenizer: Any) -> Any:
    """A method with its words as token ids, where it has words."""
    return method.bind(tokenizer) if hasattr(method, "bind") else method


def nearest(word: str, choices: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


PRESETS: dict[str, dict[str, Any]] = {f.stem: read_preset(f) for f in sorted((HOME / "presets").glob("*.yaml"))}


def whole(what: str, value: Any, least: int = 1) -> None:
    """ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{what} must be a whole number >= {least}, got {value!r}")


def finite(what: str, value: Any, above: float = -math.inf) -> None:
    """ValueError unless `value` is a finite number greater than `above`."""
    number: Any = value  # compared as it is: a huge int has no float
    if isinstance(value, bool) or not isinstance(value, Real) or not above < number < math.inf:
        bound = f" > {above:g}" if above > -math.inf else ""
        raise ValueError(f"{what} must be a finite number{bound}, got {value!r}")


class Unlisted(ValueError):
    """A value that is none of the `choices` there are."""

    def __init__(self, message: str, value: Any, choices: Sequence[str]):
        super().__init__(message)
        self.value, self.choices = value, tuple(choices)


def choice(what: str, value: Any, choices: Iterable[str]) -> None:
    """Unlisted unless `value` is one of `choices`, with the nearest."""
    choices = list(choices)
    if value not in choices:
        said = f"{what} {value!r}: choose from {', '.join(choices)}.{nearest(str(value), choices)}"
        raise Unlisted(said, value, choices)


def flag(what: str, value: Any) -> None:
    """ValueError unless `value` is true or false: a word such as 'no' would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, got {value!r}")


def build(spec: Any) -> tuple[Any, ...]:
    """'lora', {'lora': {'r': 8}}, a preset's name, or a list of these -> method objects.

    Raises ValueError naming the unknown method or field, its nearest name and the choices.
    """
    if isinstance(spec, list | tuple):
        return tuple(m for part in spec for m in build(part))
    if isinstance(spec, str):
        if spec in PRESETS:
            return build(PRESETS[spec]["method"])
        spec = {spec: {}}
    if not isinstance(spec, dict):
        return (spec,)
    return tuple(build_one(name, fields or {}) for name, fields in spec.items())


def refuse_unknown(what: str, given: Iterable[str], have: Sequence[str]) -> None:
    """ValueError for a field that `what` does not have, with the one that is meant."""
    for key in given:
        if key not in have:
            like = f" Did you mean {own!r}?" if (own := meant(key, have)) else nearest(key, have)
            raise ValueError(f"{what} has no field {key!r}.{like} Its fields: {', '.join(have)}")


def checked(cls: type) -> type:
    """The class, whose keywords are checked: Python alone would not name the nearest."""
    made, have = cls.__init__, [f.name for f in dataclasses.fields(cls)]  # type: ignore[misc]

    @functools.wraps(made)
    def init(self: Any, *args: Any, **given: Any) -> None:
        refuse_unknown(cls.__name__, given, have)
        made(self, *args, **given)

    cls.__init__ = init  # type: ignore[misc]
    return cls


def build_one(name: str, fields: dict[str, Any]) -> Any:
    if name in PRESETS and name not in METHODS:
        raise ValueError(f"{name!r} is a preset, which takes no fields: write its name, or {PRESETS[name]['method']}")
    if name not in METHODS:
        choices = [*METHODS, *PRESETS]
        raise ValueError(
            f"unknown method {name!r}.{nearest(name, choices)} `deltatune methods` lists all {len(choices)}; one of "
            "your own is known once the file that registers it (@method) is imported"
        )
    cls = METHODS[name].cls
    have = [f.name for f in dataclasses.fields(cls)]
    refuse_unknown(f"method {name!r}", fields, have)
    inner = inner_fields(cls)
    return cls(**{k: build(v) if k in inner else tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def spec(methods: Sequence[Any]) -> list[dict[str, dict[str, Any]]]:
    """Method objects -> the plain form that is saved and that `build` reads back. ValueError for one without a name."""
    if strange := next((type(m).__name__ for m in methods if not hasattr(m, "method_name")), None):
        raise ValueError(
            f"{strange} has no name to be saved under: decorate the class with deltatune.core.registry's "
            f'@method("{strange.lower()}", paper=..., kind=...)'
        )
    return [{m.method_name: {f.name: plain(getattr(m, f.name)) for f in dataclasses.fields(m)}} for m in methods]


def plain(value: Any) -> Any:
    if hasattr(value, "method_name"):
        return spec([value])[0]
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def identity(method: Any) -> bool:
    """Whether the model with this method, in this form, equals the base before training."""
    return bool(getattr(method, "identity", METHODS[method.method_name].identity))


def lr_range(name: str) -> tuple[float, float]:
    """Lowest and highest learning rate that works for a method or preset: its own, else what suits every part."""
    if name in METHODS:
        return METHODS[name].lr_range
    preset = PRESETS.get(name, {"lr_range": EVERY})
    if "lr_range" in preset:
        return (float(preset["lr_range"][0]), float(preset["lr_range"][1]))
    ranges = [METHODS[part.method_name].lr_range for part in build(name)]
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def default_lr(name: str) -> float:
    """The learning rate that a run starts from: a preset's own, or swept, else the least of its methods'."""
    if name in METHODS:
        return METHODS[name].lr
    own = PRESETS[name].get("train", {}).get("lr") or PRESETS[name].get("swept")
    return float(own or min(METHODS[part.method_name].lr for part in build(name)))


def sane_lr(name: str, lr: float) -> str | None:
    """A warning when `lr` lies outside what works for a method or preset (any case; unknown ones: None)."""
    name = name.lower()
    low, high = lr_range(name)
    if low <= lr <= high:
        return None
    effect = "it will hardly move" if lr < low else "it is likely to diverge"
    good = f"{name} is trained with {low:g} to {high:g}; {default_lr(name):g} is a good start."
    return f"lr={lr:g} with {name}: {effect}. {good}"


def rated(presets: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Whose ranges a run's learning rate is held against: the presets that have one of their own, else the methods."""
    own = [name for name in presets if "lr_range" in PRESETS.get(name, {})]
    covered = {part.method_name for name in own for part in build(name)}
    return [*own, *(name for name in methods if name not in covered)]


def index() -> dict[str, Any]:
    """What `deltatune methods --json` and the CLI's help know without importing torch."""
    return {
        "methods": {name: describe(entry) for name, entry in METHODS.items()},
        "presets": {
            name: {"kind": "preset", **preset, "lr": default_lr(name), "lr_range": list(lr_range(name))}
            for name, preset in PRESETS.items()
        },
    }


def describe(entry: Entry) -> dict[str, Any]:
    facts = {k: getattr(entry, k) for k in ("paper", "kind", "mergeable", "peft", "lr", "identity", "source", "recipe")}
    facts |= {"virtual": True} if entry.virtual else {}
    return {**facts, "lr_range": list(entry.lr_range), **form(entry.cls)}


def form(cls: type) -> dict[str, Any]:
    """A configuration class as data: its first line, and every field with type and default."""
    shown = [f for f in dataclasses.fields(cls) if not f.metadata.get("internal")]
    fields = {f.name: {"type": str(f.type), "default": default_of(f)} for f in shown}
    for f in shown:
        fields[f.name] |= {"methods": True} if f.metadata.get("methods") else bounds(cls, f) | listed(cls, f)
    return {"doc": (cls.__doc__ or "").strip().splitlines()[0], "fields": fields}


def bounds(cls: type, field: dataclasses.Field) -> dict[str, int]:
    """The numbers that a class takes for a field, as it says itself: {"least": n} or {"above": 0}, and {"most": 1} or
    {"below": 1} of a share."""
    kinds = {part.strip() for part in str(field.type).split("|")}
    if not kinds & {"int", "float"}:
        return {}

    def refuses(value: float) -> bool:
        try:
            cls(**{field.name: value})
        except ValueError:
            return True
        except TypeError:  # another field must be given
            return False
        return False

    whole = "float" not in kinds
    if refuses(1 if whole else 0.5):  # it depends on other fields
        return {}
    if not whole:
        low = {"above": 0} if refuses(0.0) else {"least": 0} if refuses(-1.0) else {}
        high = {"below": 1} if refuses(1.0) else {"most": 1}
        return low | (high if low and refuses(1.5) and refuses(2.0) else {})
    return {"least": 1} if refuses(0) else {"least": 0} if refuses(-1) else {}


NO_CHOICE = "no such choice"


def listed(cls: type, field: dataclasses.Field) -> dict[str, list[str]]:
    """The words that a class takes for a field, as it says itself: {"choices": [...]}, or {}."""
    kind = str(field.type)
    if kind != "str" and not kind.startswith("tuple[str"):
        return {}
    try:
        cls(**{field.name: NO_CHOICE if kind == "str" else (NO_CHOICE,)})
    except Unlisted as error:
        return {"choices": list(error.choices)} if error.value == NO_CHOICE else {}
    except (ValueError, TypeError):  # it depends on other fields, or one must be given
        return {}
    return {}


def default_of(field: dataclasses.Field) -> Any:
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return None if made is dataclasses.MISSING else plain(made)


def refused(model: nn.Module) -> dict[str, Refusal]:
    """The methods that, with their defaults, cannot work on this model, and why."""
    found = {name: fits(model, name) for name in METHODS}
    return {name: why for name, why in found.items() if isinstance(why, Refusal)}


def survey(model: nn.Module, only: str | None = None) -> dict[str, Any]:
    """Method or preset (all, or `only` one), with its defaults -> what it is on this model ({"sites": {layer of a
    block: how many}, "parameters": numbers that train}), or the error that says why not. A model on the meta device is
    enough."""
    return {name: fits(model, name) for name in ([only] if only else [*METHODS, *PRESETS])}


def fits(model: nn.Module, spec: Any) -> dict[str, Any] | Refusal | ValueError:
    """What `build` takes (a name, say) on this model; a Refusal where the family cannot take it, a ValueError where
    defaults say too little (rows of tokens nobody named) or too much."""
    sites: dict[str, int] = {}
    try:
        with overwritten():  # no value is wanted
            pairs = [pair for part in build(spec) for pair in named(part, model)]
    except (Refusal, ValueError) as error:
        return error
    except RuntimeError as error:  # a meta tensor has no values to start from
        return ValueError(f"cannot be counted without the weights ({str(error).splitlines()[0]})")
    found = [(model.get_submodule(site.write), delta) for site, delta in pairs]
    for (site, _), (layer, delta) in zip(pairs, found, strict=True):
        if delta.trained(layer):  # else it watches
            kind = site.key.removeprefix(f"{block_of(f'{site.write}.')}.")  # the same in every block
            sites[kind] = sites.get(kind, 0) + 1
    return {"sites": sites, "parameters": to_train(found)}
