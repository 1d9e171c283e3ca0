"""The package's front door: cheap to open, and every name behind it is there."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import deltatune
from deltatune import blocks
from deltatune.core.registry import METHODS
from deltatune.core.registry import method as register

HEAVY = "import sys, deltatune; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), *dir(deltatune))"


def test_import_is_cheap_and_lists_the_names() -> None:
    told = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True).stdout
    assert told.startswith("[] ")
    assert {"attach", "LoRA", "SFT", "train", "__version__"} <= set(told.split())


@pytest.mark.parametrize("name", deltatune.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(deltatune, name).__name__.rpartition(".")[2] == name


def test_a_new_method_needs_no_line_here(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Fresh:
        pass

    monkeypatch.setattr(blocks, "REGISTERED", {**blocks.REGISTERED})
    register("fresh", paper="0000.00000", kind="linear")(Fresh)
    try:
        assert deltatune.Fresh is Fresh
    finally:
        del METHODS["fresh"]
    with pytest.raises(AttributeError, match="no attribute 'Fresh'"):
        _ = deltatune.Fresh


def test_train_is_a_room_and_a_function() -> None:
    from deltatune import train
    from deltatune.train import loop

    assert callable(train)
    assert train.loop is loop


ROOMS = {"core", "methods", "train"}
FEW = {"torch", "transformers", "safetensors", "numpy", "deltatune", *sys.stdlib_module_names}


def packages(tree: ast.Module) -> set[str]:
    """What is imported when the file is: inside functions an extra may be."""
    inside = {id(x) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for x in ast.walk(f)}
    nodes = [node for node in ast.walk(tree) if id(node) not in inside]
    plain = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    named = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    return {name.partition(".")[0] for name in plain | named}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_rooms_that_train_need_few_packages(room: str) -> None:
    files = sorted((Path(deltatune.__file__).parent / room).glob("*.py"))
    assert len(files) > 10
    more = {path.name: packages(ast.parse(path.read_text(encoding="utf-8"))) - FEW for path in files}
    assert {name: found for name, found in more.items() if found} == {}
    assert packages(ast.parse("import rich.console\nfrom psutil import Process\nfrom .a import b")) - FEW
