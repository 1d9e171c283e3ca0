"""The end screen of a run and its report.md: before -> after, what was forgotten, what it cost, what to type next."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..config import Config, dump


def screen(run: Any) -> Any:
    """One screen for the terminal."""
    if run.status == "interrupted":
        return Text(f"interrupted at step {run.summary.get('step')}: deltatune resume {run.dir}")
    s = run.summary
    table = Table(show_header=True, box=None, pad_edge=False)
    for column in ("", "before", "after", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    for line in scores(s):
        table.add_row(*line)
    lines = [Text(line) for line in facts(s)]
    warnings = [Text(f"! {w}", style="bold red") for w in s["failed"]] + [
        Text(f"- {w}", style="dim") for w in s["unchecked"]
    ]
    title = f"{'verified' if run.status == 'done' else run.status}: {run.dir}"  # a narrow screen cuts the end
    box = Panel(Group(table, Text(), *lines, *warnings), title=title, expand=False)
    # print with crop=False: a command is one line, however long, so that it can be copied
    return Group(box, *(Text(line, no_wrap=True, overflow="ignore") for line in commands(run.dir, s)))


def scores(s: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(name, before with interval, after, interval) of every number measured."""
    was_in, now_in = s.get("intervals_before") or {}, s.get("intervals") or {}
    for name in dict.fromkeys([s["metric"], *s["after"]]):
        if name in s["after"]:
            was = number(s["before"].get(name)) + bounds(was_in.get(name))
            yield name, was, number(s["after"][name]), bounds(now_in.get(name)).strip()


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def bounds(pair: Sequence[float | None] | None) -> str:
    return f" [{number(pair[0])}, {number(pair[1])}]" if pair and None not in pair else ""


def facts(s: Mapping[str, Any]) -> Iterator[str]:
    """The lines under the table."""
    tried = s.get("untuned_prompts") or {}
    if tried.get("prompt"):
        each = ", ".join(
            f"{name} {tally(tried, name)}" for name, value in tried["held_out"].items() if value is not None
        )
        yield f"before: the untuned model with its best prompt, {tried['prompt']!r} (on training rows: {each})"
    elif s.get("generates"):
        why = tried.get("without_shots")
        more = f"without eval.shots: {why}" if why else "no examples; eval.shots=4 asks with examples too"
        yield f"before: the untuned model asked with the row as it is ({more})"
    if s.get("measured_on") == "train":
        yield "before and after: the loss on training rows, as there are no evaluation rows (--eval FILE)"
    change = (s.get("gain") or {}).get(s["metric"])
    if change:
        yield f"gain: {s['metric']} {number(change[0])}{bounds(change[1:])}, over the same rows"
    for task, sides in (s.get("tasks") or {}).items():
        was, now = sides["before"].get(s["metric"]), sides["after"].get(s["metric"])
        yield f"task {task}: {s['metric']} {number(was)} -> {number(now)} ({sides['after']['rows']} rows)"
    for name, numbers in (s.get("ood") or {}).items():
        shown = ", ".join(f"{k} {number(v)}" for k, v in numbers.items() if k != "gap")
        yield f"out of domain: {name}: {shown}"
    yield from forgotten(s.get("retention") or {})
    for name, said in (s.get("methods") or {}).items():
        over = "evaluation" if s.get("measured_on") == "eval" else "training"
        yield f"{name}: {', '.join(flat(said))}" + f" (of the {over} rows)" * ("sequences" in said)
    share = s["trainable_parameters"] / s["parameters"]
    tuned = f"{s['trainable_parameters']:,} of {s['parameters']:,} parameters ({share:.2%})"
    kept = s.get("stored_parameters", s["trainable_parameters"])  # pruned, folded, or with a frozen start
    tuned += "" if kept == s["trainable_parameters"] else f", {kept:,} stored"
    yield f"trained: {tuned}, {s['steps']} steps over {read(s)}"
    seconds = s["seconds"]
    phases = ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items())
    yield f"time: {sum(seconds.values()):.0f} s ({phases}); training {pace(s)}{bound(s.get('work') or {})}"
    highest = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in s["memory"].items())
    yield f"peak memory: {s['peak_memory_bytes'] / 2**30:.2f} GiB (up to the end of {highest})"
    yield f"adapter: {s['adapter']}"


def read(s: Mapping[str, Any]) -> str:
    """What the steps saw of the training rows."""
    seen, rows, epochs = s.get("rows_seen"), s["train_rows"], s.get("epochs")
    if epochs is None:
        return f"{seen or rows} streamed rows"
    if epochs < 1:
        return f"{round(epochs * rows)} of {rows} rows"
    return f"{rows} rows" + f", {epochs:.3g} times" * (epochs > 1)


def bound(work: Mapping[str, Any]) -> str:
    """How near the steps came to what this machine allows."""
    return f", {work['of_floor']:.2f} of what its matrix products allow" if work.get("of_floor") else ""


def pace(s: Mapping[str, Any]) -> str:
    """Tokens a second, or rows where they hold none (pictures, sounds)."""
    if s["tokens_per_s"] or not s.get("rows_per_s"):
        return f"{s['tokens_per_s']:.0f} tokens/s"
    return f"{s['rows_per_s']:.1f} rows/s"


def flat(said: Mapping[str, Any], of: str = "") -> Iterator[str]:
    """What a method reports, {name: number or a mapping of these}, as 'name number'."""
    for key, value in said.items():
        name = f"{of}{key.replace('_', ' ')}" if not of else f"{of}{key}"
        show = f"{{:{'.0%' if 'share' in name else '.3g'}}}".format
        if not isinstance(value, Mapping):
            yield f"{name} {show(value) if isinstance(value, float) else value}"
        elif value and all("." in place and isinstance(n, int | float) for place, n in value.items()):
            yield f"{name} {spread(value, show)}"
        else:
            yield from flat(value, f"{name} ")


def spread(by: Mapping[str, float], show: Callable[[float], str]) -> str:
    """A number of each place in a model, as a range."""
    least, most = min(by, key=lambda place: by[place]), max(by, key=lambda place: by[place])
    if by[least] == by[most]:
        return f"{show(by[most])} in all {len(by)} places"
    return f"{show(by[least])} ({least}) to {show(by[most])} ({most}) over {len(by)} places"


def tally(tried: Mapping[str, Any], name: str) -> str:
    """A prompt's main metric, and the finest one where there are several: 0.00 / 0.42."""
    return " / ".join(f"{v:.2f}" for v in (tried["held_out"][name], *tried.get("ties", {}).get(name, ())[-1:]))


def forgotten(kept: Mapping[str, Any]) -> Iterator[str]:
    if "forgotten" in kept:
        sides = [
            kept[side]["perplexity"] if isinstance(kept[side], Mapping) else kept[side] for side in ("before", "after")
        ]
        if (
            kept["kind"] == "drift"
        ):  # no likelihood to compare: how far the text's representations moved from the base's
            yield f"forgotten: drift {kept['forgotten']:.3f} (1 - cosine to the base's states of general text, 0 to 2)"
            return
        yield (
            f"forgotten: {kept['forgotten']:+.3f} nats per token of general text{bounds(kept.get('interval'))} "
            f"({kept['kind']} {sides[0]:.2f} -> {sides[1]:.2f})"
        )
    elif kept.get("error"):
        yield f"forgotten: not measured ({kept['error']})"


def commands(folder: Any, s: Mapping[str, Any]) -> list[str]:
    """The next commands to type: only those that work with this adapter."""
    talk = f"  deltatune chat --adapter {folder}  # talk to it; /compare shows the base beside it"
    ask = f"  deltatune predict --adapter {folder} --data FILE  # ask it about new rows"
    answer = f"  deltatune generate --adapter {folder} --data FILE  # its answers to new rows"
    merge = f"  deltatune merge {folder} --out merged  # one plain model folder"
    first = ask if s.get("objective", "sft") != "sft" else answer if s.get("reads") else talk
    measure = f"  deltatune eval --adapter {folder} --data FILE  # measure it on your rows"
    return ["next:", first, measure, *([merge] if s.get("mergeable", True) else [])]


def markdown(config: Config, s: Mapping[str, Any], checks: Sequence[Any]) -> str:
    """report.md."""
    mark = {True: "yes", False: "NO", None: "not checked", "warns": "warning"}
    rows = "\n".join(f"| {n} | {a} | {b} | {c} |" for n, a, b, c in scores(s))
    verified = "\n".join(f"| {c.name} | {mark['warns' if c.warns else c.ok]} | {c.detail} |" for c in checks)
    notes = "\n".join(f"- {n}" for n in s["notes"]) or "- none"
    seen = s.get("sample")
    shown = f"## One row as the model sees it (learned: >> <<)\n\n{fenced(seen)}\n\n" if seen else ""
    return (
        f"# {config.model.name} with {' + '.join(name for name, _ in config.parts)}\n\n"
        f"| metric | before | after | 95 % interval |\n|---|---|---|---|\n{rows}\n\n"
        + "\n".join(f"- {line}" for line in facts(s))
        + f"\n\n## Verified\n\n| check | holds | found |\n|---|---|---|\n{verified}\n\n"
        f"## Notes on the data\n\n{notes}\n\n"
        f"{shown}"
        f"## Configuration\n\n```yaml\n{dump(config)}```\n"
    )


def fenced(text: str) -> str:
    """A block that shows `text` as it is, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
