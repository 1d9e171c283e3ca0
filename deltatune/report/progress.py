"""Progress of a run for people: a bar on a terminal, plain lines elsewhere. Nothing here touches the run."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from deltatune.data.check import Sample
from deltatune.data.show import sample as show_sample
from deltatune.machine import memory
from deltatune.terminal import plain

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK = 16  # losses in the sparkline
LINE_SECONDS, QUIET_SECONDS = 10.0, 60.0  # between plain lines
HORIZON = 20  # steps that the speed is averaged over

Record = Mapping[str, Any]


def size(count: float) -> str:
    """Bytes as people read them: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 2h07m."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def sparkline(values: list[float]) -> str:
    """The values as a row of blocks from their least to their largest; what is not finite is a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


@dataclass
class Meter:
    """What the records say so far. `save_every` in steps, 0 is never; `clock` in seconds."""

    save_every: int = 0
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    steps: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPARK))
    times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=HORIZON + 1))
    tokens: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=HORIZON))  # (tokens, seconds)
    unit: str = "tok/s"

    def start(self, record: Record) -> None:
        """A run begins, or goes on, at `step` of `steps`."""
        self.step, self.steps = int(record.get("step", 0)), int(record.get("steps", 0))
        self.save_every = int(record.get("save_every") or self.save_every)
        self.times.append((self.step, self.clock()))

    def add(self, record: Record) -> None:
        """One optimizer step."""
        self.last = dict(record)
        self.step = int(record["step"])
        self.losses.append(float(record["loss"]))
        self.times.append((self.step, self.clock()))
        self.unit = "tok/s" if record.get("tokens_per_s") else "rows/s"  # pictures and sounds are no tokens
        rate = record.get("tokens_per_s") or record.get("rows_per_s")
        if rate:
            seconds = float(record.get("seconds") or 1.0)
            self.tokens.append((float(rate) * seconds, seconds))

    @property
    def pace(self) -> float:
        """Seconds a step, evaluations and saves included; nan before two marks are there."""
        (first, began), (last, now) = (self.times[0], self.times[-1]) if self.times else ((0, 0.0), (0, 0.0))
        return (now - began) / (last - first) if last > first else math.nan

    @property
    def speed(self) -> float:
        """Tokens (rows, where there are none) a second over the last steps."""
        seconds = sum(spent for _, spent in self.tokens)
        return sum(count for count, _ in self.tokens) / seconds if seconds else 0.0

    def parts(self, spark: bool) -> list[str]:
        """The pieces of a status line."""
        grad, used = self.last.get("grad_norm"), memory()
        shown = [f"loss {self.losses[-1]:.4f}" + (f" {sparkline(list(self.losses))}" if spark else "")]
        if grad is not None:
            shown.append(f"grad {float(grad):.3g}")
        if self.last.get("lr") is not None:
            shown.append(f"lr {float(self.last['lr']):.2e}")
        if self.speed:
            shown.append(f"{self.speed:,.0f} {self.unit}")
        shown.append(f"mem {size(used['rss'])}" + (f" gpu {size(used['cuda'])}" if "cuda" in used else ""))
        if math.isfinite(self.pace):
            shown.append(f"eta {duration((self.steps - self.step) * self.pace)}")
            if self.save_every and (left := self.save_every - self.step % self.save_every) + self.step < self.steps:
                shown.append(f"save in {duration(left * self.pace)}")
        return shown


def measured(record: Record) -> str:
    """An evaluation on one line."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
    values = "  ".join(f"{plain(str(key))} {value:.4f}" for key, value in numbers.items())
    return f"step {record.get('step', '?')}  eval  {values}"


PHASES = {
    "prepare": "reading the data and the model",
    "before": "measuring the untuned model",
    "train": "training",
    "save": "saving the adapter and checking it",
    "after": "measuring the tuned model",
    "floor": "timing what the steps computed",
}


def phase(record: Record, said: Collection[str] = ()) -> list[str]:
    """A new phase in plain words, after what is to be known about it; what was `said` before is not said again."""
    name = str(record["phase"])
    return [*(str(note) for note in record.get("notes") or () if note not in said), f"{PHASES.get(name, name)} ..."]


def ending(record: Record) -> str:
    """The end of a run on one line."""
    error = f": {plain(str(record['error']))}" if record.get("error") else ""
    return f"{record.get('status', 'done')} at step {record.get('step', '?')}{error}"


class Lines:
    """Plain lines: one every `seconds` (or every `steps`), every evaluation, every remark and the end."""

    def __init__(self, console: Console, meter: Meter, seconds: float = LINE_SECONDS, steps: int = 0):
        self.console, self.meter, self.seconds, self.steps = console, meter, seconds, steps
        self.shown, self.said = -math.inf, frozenset[str]()

    def due(self, now: float) -> bool:
        """Whether this step deserves a line."""
        if self.steps:
            return self.meter.step % self.steps == 0
        return now - self.shown >= self.seconds

    def line(self, text: str) -> None:
        """Write one line, as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_phase(self, record: Record) -> None:
        """The run comes to another phase."""
        if record.get("sample"):
            show_sample(Sample(**record["sample"]), self.console)
        for text in phase(record, self.said):
            self.line(plain(text))

    def on_start(self, record: Record) -> None:
        """The run begins."""
        self.meter.start(record)
        for note in record.get("notes") or ():
            self.line(plain(str(note)))
        if self.meter.step and not record.get("notes"):
            self.line(f"going on at step {self.meter.step} of {self.meter.steps}")

    def on_step(self, record: Record) -> None:
        """A step is done."""
        self.meter.add(record)
        if record.get("skipped"):
            self.line(f"step {self.meter.step} skipped: {plain(str(record['skipped']))}")
        now = self.meter.clock()
        if self.due(now) or self.meter.step >= self.meter.steps:
            self.shown = now
            self.line(f"step {self.meter.step}/{self.meter.steps}  " + "  ".join(self.meter.parts(spark=False)))

    def on_eval(self, record: Record) -> None:
        """An evaluation is done."""
        self.line(measured(record))

    def on_end(self, record: Record) -> None:
        """The run is over."""
        self.line(ending(record))


class Bar:
    """A live bar with loss, gradient norm, speed, memory and the time to the end and to the next save."""

    def __init__(self, console: Console, meter: Meter):
        self.console, self.meter, self.said = console, meter, frozenset[str]()
        self.spark = "utf" in console.encoding.lower()
        columns = (
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(20),
            TextColumn("{task.fields[text]}"),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task("", total=1, text="", start=True)

    def say(self, text: str) -> None:
        """A line that stays above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)

    def on_phase(self, record: Record) -> None:
        """The run comes to another phase."""
        if record.get("sample"):
            show_sample(Sample(**record["sample"]), self.console)
        for text in phase(record, self.said):
            self.say(plain(text))

    def on_start(self, record: Record) -> None:
        """The run begins."""
        self.meter.start(record)
        for note in record.get("notes") or ():
            self.say(plain(str(note)))
        self.bar.update(self.task, total=self.meter.steps, completed=self.meter.step)
        self.bar.start()

    def on_step(self, record: Record) -> None:
        """A step is done."""
        self.meter.add(record)
        # rich reads square brackets in this field as markup; a number has none
        self.bar.update(self.task, completed=self.meter.step, text="  ".join(self.meter.parts(self.spark)))
        if record.get("skipped"):
            self.say(f"step {self.meter.step} skipped: {plain(str(record['skipped']))}")

    def on_eval(self, record: Record) -> None:
        """An evaluation is done."""
        self.say(measured(record))

    def on_end(self, record: Record) -> None:
        """The run is over."""
        self.bar.stop()
        self.say(ending(record))


def show(run: Any) -> None:
    """A run's end screen on standard error."""
    Console(stderr=True, highlight=False, emoji=False).print(run.screen(), crop=False)


def progress(quiet: bool = False, save_every: int = 0, every: int = 0, console: Console | None = None) -> Bar | Lines:
    """The observer that fits standard error: a bar on a terminal, lines elsewhere, few lines when `quiet`.

    `save_every` and `every` (between plain lines) are in steps; 0 is never, and by time.
    """
    console = console or Console(stderr=True, highlight=False, emoji=False)
    meter = Meter(save_every)
    if console.is_terminal and not quiet:
        return Bar(console, meter)
    return Lines(console, meter, QUIET_SECONDS if quiet else LINE_SECONDS, every)
