"""tools/budget.py: a tree inside the budgets passes, and each budget catches its own breach."""

from pathlib import Path

import budget
import pytest


def function(lines: int, name: str = "f", arguments: str = "") -> str:
    """Source of a function of exactly `lines` lines, no two alike."""
    body = "".join(f"    {name}_{i} = {i}\n" for i in range(lines - 1))
    return f"def {name}({arguments}):\n{body}"


SMALL = "".join(function(4, f"small{i}") for i in range(40))
FILLER = "".join(f"value_{i} = {i}\n" for i in range(501))
COMMAND = "@app.command()\n" + function(3, "train", "a, b, c, d, e, f, g, h")

FINE = [
    ("small functions", "core/a.py", SMALL),
    (
        "a docstring is not length",
        "core/a.py",
        'def f():\n    """' + "".join(f"word {i}\n" for i in range(90)) + '"""\n',
    ),
    ("self is not an argument", "core/a.py", function(3, arguments="self, a, b, c, d, e, f")),
    ("a command's options are not arguments", "cli.py", COMMAND),
    ("repeated imports", "core/a.py", "from x import y\n" * 12),
    ("a long comment", "methods/a.py", "# words\n" * 90),
]

BREACHES = [
    ("81 lines", "core/a.py", SMALL + function(81), "has 81 lines, at most 80"),
    ("median 11", "core/a.py", function(11), "median function length 11"),
    ("p95 41", "core/a.py", "".join(function(4, f"s{i}") for i in range(8)) + function(41), "95th percentile"),
    ("7 arguments", "core/a.py", function(3, arguments="a, b, c, d, e, f, *, g"), "takes 7 arguments"),
    ("a method's 7 arguments", "core/a.py", function(3, arguments="self, a, b, c, d, e, f, g"), "takes 7 arguments"),
    ("file of 501 lines", "core/a.py", FILLER, "501 lines, at most 500"),
    ("method file of 101 lines", "methods/a.py", "# words\n" * 101, "101 lines, at most 100"),
    ("six lines twice", "core/a.py", function(6) + "\n" + function(6), "six equal lines"),
]


def tree(folder: Path, file: str, text: str) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


@pytest.mark.parametrize(("file", "text"), [row[1:] for row in FINE], ids=[row[0] for row in FINE])
def test_inside_the_budgets(tmp_path: Path, file: str, text: str) -> None:
    assert budget.check(tree(tmp_path, file, text))[1] == []
    assert budget.main(str(tmp_path)) == 0


@pytest.mark.parametrize(("file", "text", "says"), [row[1:] for row in BREACHES], ids=[row[0] for row in BREACHES])
def test_each_breach_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, says: str
) -> None:
    assert budget.main(str(tree(tmp_path, file, text))) == 1
    assert says in capsys.readouterr().out


def test_duplicate_across_files_names_both(tmp_path: Path) -> None:
    tree(tmp_path, "core/a.py", function(6))
    tree(tmp_path, "core/b.py", "first = 1\n" + function(6))
    _, breaches = budget.check(tmp_path)
    assert breaches[-1] == f"six equal lines: {tmp_path}/core/a.py:1 = {tmp_path}/core/b.py:2"


def test_the_package_keeps_its_budgets() -> None:
    assert budget.check(Path(__file__).parents[1] / "deltatune")[1] == []
