"""Method and objective blocks against their index: names, fields, types (no torch: the index is a JSON file)."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from deltatune.marks import ConfigError, Problem, Spot, nearest

PATH = Path(__file__).parent / "methods" / "index.json"

# What an objective accepts; the same form as a method's entry in the index, which wins when it has "objectives".
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {
        "fields": {
            "train_on": {"type": 'Literal["assistant", "last", "all"]', "default": "assistant"},
            "template": {"type": "str | None", "default": None},
        }
    },
    "classify": {
        "fields": {
            "kind": {"type": 'Literal["auto", "single", "multi", "regression"]', "default": "auto"},
            "labels": {"type": "list | None", "default": None},
        }
    },
    "cloze": {
        "fields": {
            "template": {"type": "str", "default": "{text} It was <mask>."},
            "labels": {"type": "dict | list", "default": []},
        }
    },
    "tag": {"fields": {"labels": {"type": "list | None", "default": None}}},
    "qa": {
        "fields": {
            "longest": {"type": "int", "default": 30},
            "doc_stride": {"type": "int", "default": 128},
            "unanswerable": {"type": "bool", "default": False},
        }
    },
}
LATER = ("dpo", "kto", "orpo", "ipo", "simpo", "ppo", "grpo", "rloo", "reward", "embed", "distil")

REGISTERED: dict[str, Callable[[], dict[str, Any]]] = {}  # methods as the index has them, where they are imported
INDEX: ContextVar[Mapping[str, Any] | None] = ContextVar("index", default=None)
PYTHON = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list, tuple),
    "tuple": (list, tuple),
    "Sequence": (list, tuple),
    "dict": (dict,),
    "Mapping": (dict,),
    "None": (type(None),),
}
JSON_TYPES = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "Sequence": "array",
    "dict": "object",
    "Mapping": "object",
    "None": "null",
}


@cache
def packaged() -> Mapping[str, Any]:
    """The index generated from the registry."""
    if not PATH.is_file():
        raise ConfigError([Problem((), "the index of methods is missing from this installation", PATH.name)])
    return json.loads(PATH.read_text(encoding="utf-8"))


def index() -> Mapping[str, Any]:
    """The index in use: the packaged one, or the one given to `using`."""
    return INDEX.get() or packaged()


@contextmanager
def using(entries: Mapping[str, Any] | None) -> Iterator[None]:
    """Another index inside the block (tests, plugins); None keeps the packaged one."""
    token = INDEX.set(entries or INDEX.get())
    try:
        yield
    finally:
        INDEX.reset(token)


def methods() -> dict[str, dict[str, Any]]:
    """Every method of the index, and of a user's own files, by name; presets left out."""
    entries = index().get("methods", index())
    found = {k: v for k, v in entries.items() if k not in ("presets", "objectives") and v.get("kind") != "preset"}
    own = {name: entry() for name, entry in REGISTERED.items() if name not in packaged()["methods"]}
    return {**own, **found}


def presets() -> dict[str, dict[str, Any]]:
    """Every named preset; its `method` is the list of blocks it stands for."""
    entries = index().get("methods", index())
    return {**{k: v for k, v in entries.items() if v.get("kind") == "preset"}, **index().get("presets", {})}


def objectives() -> dict[str, dict[str, Any]]:
    """Every objective by name."""
    return {**OBJECTIVES, **index().get("objectives", {})}


def plain(value: Any) -> Any:
    """Tuples to lists, paths to words: what YAML gives back, so that a dump loads equal."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def as_list(value: Any) -> Any:
    """The spellings of `method` as a list of one-key mappings: 'lora', {lora: {r: 4}}, [lora, {prefix: {...}}]."""
    items = value if isinstance(value, (list, tuple)) else [value]
    out: list[Any] = []
    for item in items:
        if isinstance(item, str):
            out += preset(item)
        elif isinstance(item, Mapping) and all(isinstance(v, (Mapping, type(None))) for v in item.values()):
            out += [{str(name): wrapped(str(name), plain(fields) or {})} for name, fields in item.items()]
        else:
            out.append(item)
    return out


def wrapped(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with one word given for a list as a list of one: `targets: q` means [q]."""
    about = methods().get(name, {}).get("fields", {})
    only_lists = {key for key, entry in about.items() if not fits("", entry.get("type", "Any"))}
    lists = {key for key in only_lists if fits([], about[key].get("type", "Any"))}
    return {key: [value] if isinstance(value, str) and key in lists else value for key, value in fields.items()}


def preset(name: str) -> list[Any]:
    """The blocks behind a bare name: the preset's, or the method with its defaults."""
    found = presets().get(name)
    blocks = found and (found.get("method") or found.get("blocks"))
    return as_list(blocks) if blocks else [{name: {}}]


def settings(name: str) -> list[tuple[Spot, Any]]:
    """What a preset says of a run beside its method, by place: ("train", "lr") -> 3e-4, ("objective",) -> {...}."""
    found = presets().get(name, {})
    goal = found.get("objective")
    said: list[tuple[Spot, Any]] = [(("objective",), {goal: {}} if isinstance(goal, str) else goal)] if goal else []
    for section in ("model", "train"):
        said += [((section, key), value) for key, value in lr_first(found.get(section) or {})]
    return said


def lr_first(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A section's settings in the order in which people read them."""
    return sorted(fields.items(), key=lambda pair: (pair[0] != "lr", pair[0]))


def preset_problems(names: Any, spot: Spot) -> list[Problem]:
    """What is wrong with the names of presets that a configuration records."""
    there = presets()
    unknown = [name for name in names or () if name not in there]
    return [Problem(spot, f"{name!r}: no preset{nearest(str(name), there)}") for name in unknown]


def method_problems(blocks: Any, spot: Spot) -> list[Problem]:
    """What is wrong with a list of method blocks."""
    if not blocks:
        return [Problem(spot, f"no method given; {listed(methods(), tuple(presets()))}")]
    problems: list[Problem] = []
    for i, block in enumerate(blocks):
        here = (*spot, i)
        if not isinstance(block, Mapping) or len(block) != 1:
            problems.append(Problem(here, f"{block!r}: a method is a name or {{name: {{field: value}}}}"))
            continue
        problems += block_problems(block, methods(), here, tuple(presets()))
    return problems


def objective_problems(block: Any, spot: Spot) -> list[Problem]:
    """What is wrong with the objective."""
    if not isinstance(block, Mapping) or len(block) != 1:
        return [Problem(spot, f"{block!r}: one objective, as a name or {{name: {{field: value}}}}")]
    name = next(iter(block))
    if name in LATER and name not in objectives():
        return [Problem(spot, f"{name!r} is not in this version; there are {', '.join(objectives())}")]
    return block_problems(block, objectives(), spot) or template_problems(block, spot)


GAP = {"sft": False, "cloze": True, "choice": True}  # whether an objective's template has a <mask>


def template_problems(block: Mapping[str, Any], spot: Spot) -> list[Problem]:
    """What is wrong with the text of an objective's template."""
    ((name, fields),) = block.items()
    if name not in GAP or not isinstance(fields.get("template"), str):
        return []
    from deltatune.prompting.template import Template

    try:
        Template(fields["template"], gap=GAP[name])
    except ValueError as error:
        return [Problem((*spot, name, "template"), str(error))]
    return []


def soft_problems(methods_: Sequence[Any], block: Mapping[str, Any], spot: Spot) -> list[Problem]:
    """What is wrong where an objective's template and the methods disagree on the virtual tokens."""
    from deltatune.prompting.template import Template

    ((name, given),) = block.items()
    text = name in GAP and template_of(name, given)
    if not text:
        return []
    there = [name for block in methods_ for name in block]
    try:
        Template(text, gap=GAP[name]).demand(virtual(methods_), "ptuning" in there)
    except ValueError as error:
        return [Problem((*spot, name, "template"), str(error))]
    return []


def virtual(methods_: Sequence[Any]) -> int:
    """How many virtual tokens the methods put into a text, those inside others too."""
    count = 0
    for block in methods_:
        ((name, said),) = block.items()
        given = said or {}
        for field, about in methods()[name].get("fields", {}).items():
            value = given.get(field, about.get("default"))
            if about.get("methods"):
                count += virtual(as_list(value or []))
            elif field == "length" and methods()[name].get("virtual"):
                count += value
    return count


def over(asked: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """An objective's asked block with the recorded one's fields beneath it, where both are the same objective."""
    ((name, fields),) = asked.items()
    return {name: {**(found.get(name) or {}), **(fields or {})}}


def template_of(name: str, given: Mapping[str, Any] | None) -> str | None:
    """The template of an objective's block: its own, or the default."""
    return (given or {}).get("template") or objectives()[name]["fields"]["template"]["default"]


def wanted(block: Any) -> Any:
    """What an objective reads of a row (its `wants`), told without torch. block: its name, or {name: fields}."""
    from deltatune.data.wanted import COMPLETIONS, LABELS, WANTS, Wanted
    from deltatune.prompting.template import Template

    ((name, given),) = ({block: {}} if isinstance(block, str) else block).items()
    if name not in GAP:
        return WANTS[name]
    template, answer = template_of(name, given), COMPLETIONS if name == "sft" else LABELS
    return Template(template, gap=GAP[name]).wants(answer) if template else Wanted()


def block_problems(
    block: Mapping[str, Any], known: Mapping[str, Any], spot: Spot, more: tuple[str, ...] = ()
) -> list[Problem]:
    """What is wrong with `{name: {field: value}}`: an unknown name, unknown fields, wrong types."""
    ((name, given),) = block.items()
    if name in more and name not in known:
        said = f"a preset, which takes no fields: write its name, or {presets()[name]['method']}"
        return [Problem((*spot, name), said)]
    if name not in known:
        return [Problem((*spot, name), f"unknown{nearest(str(name), [*known, *more])}; {listed(known, more)}")]
    if not isinstance(given, Mapping):
        return [Problem((*spot, name), f"{given!r}: a mapping of fields is wanted")]
    from deltatune.aliases import meant

    fields = known[name].get("fields", {})
    problems = []
    for field, value in given.items():
        here = (*spot, name, str(field))
        if field not in fields:
            has = ", ".join(fields) or "none"
            like = f" (did you mean {own!r}?)" if (own := meant(str(field), list(fields))) else ""
            like = like or nearest(str(field), fields)
            problems.append(Problem(here, f"unknown field; {name} has {has}{like}"))
        elif fields[field].get("methods"):  # none where the method says what that means
            problems += method_problems(as_list(value), here) if value else []
        elif not fits(value, fields[field].get("type", "Any")):
            problems.append(Problem(here, f"{value!r}: {spoken(fields[field]['type'])} is wanted"))
        elif outside(value, fields[field]):
            problems.append(Problem(here, f"{value!r}: {bound(fields[field])} is wanted"))
        elif odd := unlisted(value, fields[field].get("choices")):
            words = fields[field]["choices"]
            problems.append(Problem(here, f"{odd!r}: choose from {', '.join(words)}{nearest(odd, words)}"))
    for field, entry in fields.items():
        if "default" not in entry and field not in given:
            problems.append(Problem((*spot, name), f"{field} must be given ({spoken(entry.get('type', 'Any'))})"))
    return problems


FEW = 12  # names that an error lists


def listed(known: Mapping[str, Any], more: tuple[str, ...] = ()) -> str:
    """The names there are, or how to see them where they are many."""
    there = [*known, *more]
    if len(there) <= FEW:
        return f"there are {', '.join(there)}"
    return f"`deltatune methods` lists the {len(there)} there are"


def unlisted(value: Any, words: Sequence[str] | None) -> str:
    """A word that is none of those an index entry allows, or nothing."""
    given = value if isinstance(value, (list, tuple)) else [value]
    return next((word for word in given if words and isinstance(word, str) and word not in words), "")


BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": (">=", operator.ge),
    "above": ("above", operator.gt),
    "most": ("<=", operator.le),
    "below": ("below", operator.lt),
}


def outside(value: Any, field: Mapping[str, Any]) -> bool:
    """Whether a number is beyond one of the bounds of an index entry."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return not all(inside(value, field[name]) for name, (_, inside) in BOUNDS.items() if name in field)


def bound(field: Mapping[str, Any]) -> str:
    number = "a whole number" if "int" in choices(field["type"]) else "a number"
    return f"{number} " + " and ".join(f"{said} {field[name]}" for name, (said, _) in BOUNDS.items() if name in field)


def called(presets_named: Sequence[str], names: Sequence[str]) -> str:
    """What a union is called by who chose it: its presets, then the methods that none of them brought."""
    own = [as_list(presets().get(preset, {}).get("method", [])) for preset in presets_named]
    brought = {name for blocks in own for block in blocks for name in block}
    return "+".join([*presets_named, *(name for name in names if name not in brought)])


def choices(annotation: str) -> list[str]:
    """The parts of a union written as Python writes it; bars inside brackets do not count."""
    return [part.strip() for part in re.split(r"\|(?![^\[]*\])", annotation)]


def literals(part: str) -> list[Any] | None:
    """The values of `Literal[...]`, or None for another type."""
    return json.loads(part[7:].replace("'", '"')) if part.startswith("Literal[") else None


def fits(value: Any, annotation: str) -> bool:
    """Whether a value has the type an index entry names; unknown type names accept anything."""
    for part in choices(annotation):
        allowed = literals(part)
        if allowed is not None:
            if value in allowed:
                return True
            continue
        kinds = PYTHON.get(part.split("[")[0])
        if kinds is None or (isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)):
            return True
    return False


def spoken(annotation: str) -> str:
    """A type as a person says it."""
    words = []
    for part in choices(annotation):
        allowed = literals(part)
        words.append(" | ".join(map(str, allowed)) if allowed is not None else part)
    return " or ".join(words)


def json_schema(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of one block `{name: {fields}}`."""
    properties = {}
    for field, about in entry.get("fields", {}).items():
        kinds = [json_kind(part, about.get("choices")) for part in choices(about.get("type", "Any"))]
        properties[field] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        if "default" in about:
            properties[field] = {**properties[field], "default": about["default"]}
    fields = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    return {"type": "object", "properties": {name: fields}, "required": [name], "additionalProperties": False}


def json_kind(part: str, words: Sequence[str] | None = None) -> dict[str, Any]:
    """JSON Schema of one part of a type, whose texts are some of `words`; {} accepts anything."""
    allowed = words if words and part == "str" else literals(part)
    if allowed is not None:
        return {"enum": list(allowed)}
    kind = JSON_TYPES.get(part.split("[")[0])
    return {"type": kind, **({"items": {"enum": list(words)}} if words else {})} if kind else {}
