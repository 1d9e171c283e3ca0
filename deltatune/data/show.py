"""A data report on a terminal: plain words, one sample with its loss mask in colour, foreign text made harmless."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from .check import Pairs, Report, Sample

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SAMPLE_CHARS = 2000
LABELS_SHOWN = 10


def safe(text: str) -> str:
    """Control characters (ANSI, direction overrides) as visible escapes."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def line(console: Console, text: str, style: str = "") -> None:
    # a Text object: square brackets in data are never markup
    console.print(Text(safe(text), style=style), soft_wrap=True)


def show(report: Report, console: Console) -> None:
    problems = report.problems
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.most_common()) or "none"
    line(console, f"{report.ref}: {problems.seen:,} rows, {problems.good:,} usable ({kinds}), {problems.bad:,} not")
    for note in [*problems.notes, *report.notes]:
        line(console, f"  note: {note}", "dim")
    _numbers(report, console)
    _pairs("duplicates", report.exact, console)
    _pairs("near duplicates", report.near, console)
    if report.leaked is not None:
        _pairs(
            "evaluation rows that are in the training set", report.leaked, console, none="no leakage into evaluation"
        )
    for problem in problems.warnings:
        line(console, f"  warning: {problem}", "yellow")
    for problem in report.errors:
        line(console, f"  error: {problem}", "red")
    if report.sample:
        sample(report.sample, console)


def _numbers(report: Report, console: Console) -> None:
    if report.labels:
        most = report.labels.most_common(LABELS_SHOWN)
        rest = len(report.labels) - len(most)
        line(console, "  labels: " + ", ".join(f"{n} {c:,}" for n, c in most) + (f", {rest} more" if rest else ""))
    if report.tasks:
        line(console, "  tasks: " + ", ".join(f"{name} {count:,}" for name, count in report.tasks.items()))
    tokens = report.tokens
    if tokens and tokens.rows:
        share = 100 * tokens.learned / max(tokens.total, 1)
        lengths = f"{tokens.shortest} / {tokens.median} / {tokens.p95} / {tokens.longest}"
        line(console, f"  tokens: {tokens.total:,} in {tokens.rows:,} rows; min / median / p95 / max {lengths}")
        line(
            console,
            f"  learned: {tokens.learned:,} ({share:.0f} %); cut: {tokens.truncated:,} rows, {tokens.lost:,} tokens",
        )


def _pairs(name: str, pairs: Pairs, console: Console, none: str = "") -> None:
    if pairs.count:
        shown = "; ".join(f"{later} = {earlier}" for later, earlier in pairs.first)
        line(
            console, f"  {name}: {pairs.count:,} ({shown}{'; ...' if pairs.count > len(pairs.first) else ''})", "yellow"
        )
    elif none:
        line(console, f"  {none}")


def sample(row: Sample, console: Console) -> None:
    """What is learned is green; without colours it stands between >> and <<."""
    line(console, f"  {row.where} as the model sees it (learned: {'green' if console.color_system else '>> <<'}):")
    text, left = Text(), SAMPLE_CHARS
    for piece, learned in row.pieces:
        part = safe(piece[:left])
        if learned and not console.color_system:
            part = f">>{part}<<"
        text.append(part, style="bold green" if learned else "dim")
        left -= len(piece)
        if left <= 0:
            text.append(" ...")
            break
    console.print(text, soft_wrap=True)
