"""YAML with the line of every key, and the one error a configuration raises."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Spot = tuple[str | int, ...]
LARGEST = 1_000_000  # characters of a configuration file; more is a data file given by mistake
DEEPEST = 32
MOST_NODES = 20_000  # aliases (&a / *a) may repeat a node: counted after repeating, so that no file explodes


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place of the tree; `where` is `file:line` or the flag that said it."""

    spot: Spot
    text: str
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, dotted(self.spot), self.text) if part)


class ConfigError(ValueError):
    """Every problem of a configuration, not only the first."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        super().__init__(lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems:", *lines]))


class Loader(yaml.SafeLoader):
    """YAML 1.2 core values: `3e-4` is a number, `on`, `no` and `2024-01-01` are words."""


Loader.yaml_implicit_resolvers = {}


for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    starts = [*first.replace("\0", ""), *([""] if "\0" in first else [])]
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), starts)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` or a YAML 1.1 reader would not read back as the same word."""


# The resolvers of both readings decide about quotes: `3e-4` (ours) and `on` (theirs) are words only in quotes.
Dumper.yaml_implicit_resolvers = {
    key: [*yaml.SafeDumper.yaml_implicit_resolvers.get(key, []), *Loader.yaml_implicit_resolvers.get(key, [])]
    for key in {*yaml.SafeDumper.yaml_implicit_resolvers, *Loader.yaml_implicit_resolvers}
}


def construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    """Decimal or 0x; a leading zero is not octal (YAML 1.1 made 010 an 8)."""
    return int(node.value, 16 if "x" in node.value else 10)


Loader.add_constructor("tag:yaml.org,2002:int", construct_int)


def dotted(spot: Iterable[str | int]) -> str:
    """`("method", 0, "lora", "r")` as people write it: `method.lora.r`."""
    return ".".join(str(part) for part in spot if not isinstance(part, int))


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'lr'?)`, or nothing when no name is near."""
    close = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_text(text: str, name: str) -> tuple[dict[Any, Any], dict[Spot, str]]:
    """The mapping in a YAML text and `file:line` of every key.

    Raises ConfigError: not YAML, not a mapping, a key given twice, too large.
    """
    if len(text) > LARGEST:
        raise ConfigError([Problem((), f"{len(text)} characters; a configuration has at most {LARGEST}", name)])
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        walk = Walk(loader, name)
        data = {} if node is None else walk.value(node, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError([Problem((), f"not YAML: {getattr(error, 'problem', None) or error}", line)]) from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        walk.problems.append(Problem((), f"a mapping of sections is wanted, not {type(data).__name__}", f"{name}:1"))
    if walk.problems:
        raise ConfigError(walk.problems)
    return data, walk.lines


def read_file(path: Path) -> tuple[dict[Any, Any], dict[Spot, str]]:
    """`read_text` of a file (UTF-8, with or without a byte order mark)."""
    if path.is_dir():
        raise ConfigError([Problem((), f"a folder; did you mean {str(path / 'config.yaml')!r}?", str(path))])
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        raise ConfigError([Problem((), f"no such configuration file{near}", str(path))])
    try:
        return read_text(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError([Problem((), f"not UTF-8 (byte {error.start}); save it as UTF-8", str(path))]) from None


def read_value(text: str) -> Any:
    """One YAML value of the command line: `3e-4`, `true`, `[q, v]`, `{lora: {r: 4}}` or a plain word."""
    try:
        node = yaml.compose(text, Loader)
        return None if node is None else Walk(Loader(text), "").value(node, ())
    except yaml.YAMLError:
        return text


class Walk:
    """Nodes to plain values, keeping the line of every key."""

    def __init__(self, loader: Loader, name: str):
        self.loader, self.name, self.nodes = loader, name, 0
        self.lines: dict[Spot, str] = {}
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, spot: Spot) -> Any:
        """The plain value of a node; its place is noted."""
        self.nodes += 1
        if len(spot) > DEEPEST or self.nodes > MOST_NODES:
            raise yaml.MarkedYAMLError(problem="nested too deeply or repeats itself", problem_mark=node.start_mark)
        if spot:
            self.lines.setdefault(spot, self.at(node))
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq" if isinstance(node, yaml.SequenceNode) else ""
        if kind and node.tag != f"tag:yaml.org,2002:{kind}":
            raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not allowed", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, spot)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*spot, i)) for i, child in enumerate(node.value)]
        return self.loader.construct_object(node)

    def mapping(self, node: yaml.MappingNode, spot: Spot) -> dict[Any, Any]:
        """A mapping; a key given twice is a problem, because YAML would silently keep the last."""
        seen: set[Any] = {"<<"}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen - {"<<"}:
                self.problems.append(Problem((*spot, key.value), "given twice; keep one", self.at(key)))
            seen.add(getattr(key, "value", None) if isinstance(key, yaml.ScalarNode) else None)
        self.loader.flatten_mapping(node)
        out = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            word = self.loader.construct_object(key)
            self.lines[*spot, str(word)] = self.at(key)
            out[word] = self.value(child, (*spot, str(word)))
        return out

    def at(self, node: yaml.Node) -> str:
        """`file:line` of a node."""
        return f"{self.name}:{node.start_mark.line + 1}"


def to_yaml(data: Any) -> str:
    """YAML that `read_text` reads back as the same values."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
