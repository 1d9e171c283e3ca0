"""Progress: numbers as people read them, lines at a sensible rate, a bar on a terminal, nothing that steers it."""

import io
import math

import pytest
from rich.console import Console

from deltatune.data.check import Sample
from deltatune.machine import memory, rss_bytes
from deltatune.report.progress import Bar, Lines, Meter, duration, progress, size, sparkline


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False, emoji=False)


def step(n: int, loss: float = 1.0, **more) -> dict:
    return {"step": n, "loss": loss, "grad_norm": 0.5, "lr": 1e-4, "tokens_per_s": 100.0, "seconds": 2.0, **more}


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (0.4, "0s"), (59.4, "59s"), (60, "1m00s"), (185, "3m05s"), (7620, "2h07m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (2048, "2 KiB"), (3 << 20, "3 MiB"), (3 << 29, "1.5 GiB")])
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([1.0], "▁"), ([0.0, 7.0], "▁█"), ([0.0, math.nan, 3.5, 7.0], "▁ ▅█"), ([2, 2], "▁▁")],
)
def test_sparklines(values, text):
    assert sparkline(values) == text


def test_peak_memory_has_one_unit():
    assert rss_bytes(1000, "darwin") == 1000
    assert rss_bytes(1000, "linux") == 1_024_000
    used = memory()
    # A process with Python and rich in it is between 10 MB and 100 GB: a wrong unit would be outside.
    assert 10e6 < used["peak"] < 100e9
    assert used["peak"] >= 0.9 * used["rss"]


def test_pictures_go_by_rows():
    meter = Meter()
    meter.start({"step": 0, "steps": 4})
    meter.add({"step": 1, "loss": 1.0, "tokens_per_s": 0.0, "rows_per_s": 1500.0, "seconds": 2.0})
    assert "1,500 rows/s" in meter.parts(False)
    assert not any("tok/s" in part for part in meter.parts(False))


def test_a_meter_tells_the_time_left_and_the_next_save():
    clock = Clock()
    meter = Meter(save_every=10, clock=clock)
    meter.start({"step": 4, "steps": 104})
    for n in (5, 6):
        clock.now += 2.0
        meter.add(step(n, loss=n))
    parts = meter.parts(spark=True)
    assert parts[:4] == ["loss 6.0000 ▁█", "grad 0.5", "lr 1.00e-04", "100 tok/s"]
    assert parts[5:] == ["eta 3m16s", "save in 8s"]


def test_lines_come_first_then_by_time_and_at_the_end():
    clock, screen = Clock(), console()
    lines = Lines(screen, Meter(clock=clock), seconds=10)
    lines.on_start({"step": 0, "steps": 30, "notes": ["falling back to ckpt-1"]})
    for n in range(1, 31):
        clock.now += 1.0
        lines.on_step(step(n))
    lines.on_eval({"step": 30, "loss": 0.25, "accuracy": 1.0})
    lines.on_end({"status": "done", "step": 30})
    text = screen.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in text] == [
        "falling back to ckpt-1", "step 1/30", "step 11/30", "step 21/30", "step 30/30", "step 30", "done at step 30",
    ]  # fmt: skip
    assert text[5] == "step 30  eval  loss 0.2500  accuracy 1.0000"


def test_lines_by_steps():
    screen = console()
    lines = Lines(screen, Meter(clock=Clock()), steps=4)
    lines.on_start({"step": 0, "steps": 10})
    for n in range(1, 11):
        lines.on_step(step(n))
    shown = [line.split("  ")[0] for line in screen.file.getvalue().splitlines()]
    assert shown == ["step 4/10", "step 8/10", "step 10/10"]


def test_what_goes_wrong_is_always_a_line_and_steers_nothing():
    clock, screen = Clock(), console()
    lines = Lines(screen, Meter(clock=clock), seconds=1e9)
    lines.on_start({"step": 3, "steps": 9})
    lines.on_step(step(4, skipped="nan in \x1b[31m[red]row"))
    lines.on_end({"status": "failed", "step": 4, "error": "x\x1b]0;title\x07"})
    text = screen.file.getvalue()
    assert "going on at step 3 of 9" in text
    assert "step 4 skipped: nan in ␛[31m[red]row" in text
    assert "failed at step 4: x␛]0;title␇" in text
    assert "\x1b" not in text


def test_the_bar_shows_and_leaves_lines_behind():
    screen = console(terminal=True)
    bar = progress(save_every=5, console=screen)
    assert isinstance(bar, Bar)
    bar.on_start({"step": 0, "steps": 3})
    bar.on_step(step(1))
    bar.on_eval({"step": 1, "loss": 0.5})
    bar.on_step(step(2, loss=math.nan))
    bar.on_end({"status": "done", "step": 2})
    text = screen.file.getvalue()
    assert "step 1  eval  loss 0.5000" in text
    assert "done at step 2" in text
    assert not bar.bar.live.is_started


def test_the_observer_fits_the_stream():
    assert isinstance(progress(console=console()), Lines)
    quiet = progress(quiet=True, console=console(terminal=True))
    assert isinstance(quiet, Lines)
    assert quiet.seconds == 60


def test_a_row_is_shown_with_what_is_learned_of_it():
    record = {
        "phase": "train",
        "notes": ["warning: x"],
        "sample": vars(Sample("a.jsonl:1", [("ask", False), ("[b]", True)])),
    }
    plain = console()
    progress(console=plain).on_phase(record)
    said = ["  a.jsonl:1 as the model sees it (learned: >> <<):", "ask>>[b]<<", "warning: x", "training ..."]
    assert plain.file.getvalue().splitlines() == said
    coloured = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    progress(console=coloured).on_phase(record)
    assert "\x1b[1;32m[b]" in coloured.file.getvalue()
    assert ">>" not in coloured.file.getvalue().splitlines()[1]


def test_phases_are_said_in_plain_words_after_what_is_to_be_known():
    for terminal in (False, True):
        screen = console(terminal=terminal)
        progress(console=screen).on_phase({"phase": "before", "notes": ["no evaluation rows"]})
        assert screen.file.getvalue().splitlines() == ["no evaluation rows", "measuring the untuned model ..."]
