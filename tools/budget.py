"""The style budgets of the house, checked in CI: python tools/budget.py [FOLDER]."""

import ast
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEDIAN_LINES, P95_LINES, MOST_LINES = 10, 40, 80
ARGUMENTS, FILE_LINES, METHOD_FILE_LINES = 6, 500, 100
WINDOW, DUPLICATE_PERCENT = 6, 2.0

Defs = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One function: where it is, how many lines its code has and how many arguments it takes."""

    where: str
    name: str
    lines: int
    arguments: int


def code_lines(node: Defs) -> int:
    """Lines from `def` to the end, the docstring not counted: documentation is wanted, length is not."""
    whole = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is None:
        return whole
    return whole - ((first.end_lineno or first.lineno) - first.lineno + 1)


def argument_count(node: Defs) -> int:
    """Arguments without self and cls; none for a command-line command, whose arguments are its options."""
    if any(".command" in ast.unparse(decorator) for decorator in node.decorator_list):
        return 0
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, Defs):
            yield Function(f"{path}:{node.lineno}", node.name, code_lines(node), argument_count(node))


def meaningful(path: Path) -> list[tuple[int, str]]:
    """(line number, stripped text) of the lines that count for duplication: not blank, comment or import."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    stripped = ((number, text.strip()) for number, text in lines)
    return [(n, text) for n, text in stripped if text and not text.startswith(("#", "import ", "from "))]


def duplicates(files: list[Path]) -> tuple[float, list[str]]:
    """Percent of the meaningful lines that lie in a window of six found elsewhere too, and where those are."""
    seen: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    lines = {path: meaningful(path) for path in files}
    for path, rows in lines.items():
        for start in range(len(rows) - WINDOW + 1):
            seen[tuple(text for _, text in rows[start : start + WINDOW])].append((path, start))
    repeated = [places for places in seen.values() if len(places) > 1]
    covered = {(path, start + k) for places in repeated for path, start in places for k in range(WINDOW)}
    total = sum(len(rows) for rows in lines.values())
    shown = [" = ".join(f"{path}:{lines[path][start][0]}" for path, start in places) for places in repeated]
    return 100 * len(covered) / max(total, 1), [f"six equal lines: {places}" for places in shown]


def percentile(values: list[int], share: float) -> int:
    """The smallest value that `share` of the values do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def long_files(files: list[Path]) -> Iterator[str]:
    """Files over their budget."""
    for path in files:
        limit = METHOD_FILE_LINES if path.parent.name == "methods" else FILE_LINES
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > limit:
            yield f"{path}: {count} lines, at most {limit}"


def long_functions(found: list[Function]) -> Iterator[str]:
    """Functions over their budgets, alone and taken together."""
    for f in found:
        if f.lines > MOST_LINES:
            yield f"{f.where}: {f.name} has {f.lines} lines, at most {MOST_LINES}"
        if f.arguments > ARGUMENTS:
            yield f"{f.where}: {f.name} takes {f.arguments} arguments, at most {ARGUMENTS}"
    lengths = [f.lines for f in found] or [0]
    if statistics.median(lengths) > MEDIAN_LINES:
        yield f"median function length {statistics.median(lengths):g}, at most {MEDIAN_LINES}"
    if percentile(lengths, 0.95) > P95_LINES:
        longest = sorted(found, key=lambda f: -f.lines)[:5]
        names = ", ".join(f"{f.where} {f.name} ({f.lines})" for f in longest)
        yield f"95th percentile of function length {percentile(lengths, 0.95)}, at most {P95_LINES}; longest: {names}"


def check(folder: Path) -> tuple[str, list[str]]:
    """The figures in one line, and every breach of a budget."""
    files = sorted(folder.rglob("*.py"))
    found = [function for path in files for function in functions(path)]
    lengths = [f.lines for f in found] or [0]
    percent, places = duplicates(files)
    breaches = [*long_functions(found), *long_files(files)]
    if percent > DUPLICATE_PERCENT:
        breaches += [f"{percent:.1f} % duplicate lines, at most {DUPLICATE_PERCENT:g} %", *places]
    figures = (
        f"{len(files)} files, {len(found)} functions: median {statistics.median(lengths):g} lines, "
        f"p95 {percentile(lengths, 0.95)}, max {max(lengths)}; "
        f"arguments max {max((f.arguments for f in found), default=0)}; duplicate lines {percent:.1f} %"
    )
    return figures, breaches


def main(folder: str = "deltatune") -> int:
    """Print the figures and each breach; 1 when there is one."""
    figures, breaches = check(Path(folder))
    print(figures)
    for breach in breaches:
        print(f"over budget: {breach}")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
