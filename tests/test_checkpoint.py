"""Checkpoints: complete or absent, whatever dies, fills up or flips; and said aloud when an older one is taken."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from deltatune.train import checkpoint, rng
from deltatune.train.checkpoint import MANIFEST, SaveFailed, Snapshot, Store, problems
from deltatune.train.guard import GuardStop
from deltatune.train.journal import Journal
from toys import Journalist, loop, same, weights

FILES = ["extra.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]


def snapshot(step: int) -> Snapshot:
    fill = torch.full((3, 2), float(step))
    return Snapshot(
        step,
        trainable={"a.lora_A": fill, "a.lora_B": fill.T, "half": fill[0].to(torch.bfloat16), "one": torch.tensor(0.5)},
        optimizer={"exp_avg|a.lora_A": fill * 2},
        state={"progress": {"step": step}, "text": "é"},
        extra={"rng.torch": torch.get_rng_state()},
    )


def store(folder: Path, **options: Any) -> Store:
    return Store(folder / "run é" / "checkpoints", **options)


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    ours, made = store(tmp_path), snapshot(7)
    folder = ours.save(made)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    found, notes = ours.latest()
    assert notes == []
    assert found is not None
    assert (found.step, found.state) == (7, made.state)
    assert all(same(getattr(found, part), getattr(made, part)) for part in checkpoint.TENSORS)
    assert found.trainable["half"].dtype == torch.bfloat16


def test_nothing_is_pickled(tmp_path: Path) -> None:
    for path in store(tmp_path).save(snapshot(1)).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            size = int.from_bytes(path.read_bytes()[:8], "little")
            json.loads(path.read_bytes()[8 : 8 + size])


@pytest.mark.parametrize("name", FILES)
def test_every_bit_counts(name: str, tmp_path: Path) -> None:
    folder = store(tmp_path).save(snapshot(7))
    path, draw = folder / name, random.Random(name)
    whole = path.read_bytes()
    tail = range(8 * (len(whole) - 90), 8 * len(whole))  # the end of a manifest is its own digest
    bits = [*draw.choices(range(8 * len(whole)), k=300), *(tail if name == MANIFEST else ())]
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = problems(folder)
        assert len(found) == 1, bit
        assert name in found[0]
        assert "expected sha256" in found[0]
    for length in {0, 1, len(whole) - 1, *draw.choices(range(len(whole)), k=60)}:
        path.write_bytes(whole[:length])
        assert name in problems(folder)[0], length
    path.write_bytes(whole + b"\n")
    assert name in problems(folder)[0]
    path.unlink()
    assert f"{name} is missing" in problems(folder)[0]
    path.write_bytes(whole)
    assert problems(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_step_are_noticed(name: str, tmp_path: Path) -> None:
    ours = store(tmp_path)
    one, two = ours.save(snapshot(1)), ours.save(snapshot(2))
    if (one / name).read_bytes() != (two / name).read_bytes():
        shutil.copy(one / name, two / name)
        assert problems(two) != []
    os.rename(one, ours.folder / "ckpt-00000009")
    assert "holds step 1" in problems(ours.folder / "ckpt-00000009")[0]


def test_falling_back_says_so(tmp_path: Path) -> None:
    ours = store(tmp_path)
    ours.save(snapshot(5))
    (ours.save(snapshot(10)) / "state.json").write_bytes(b"{}")
    found, notes = ours.latest()
    assert found is not None
    assert found.step == 5
    assert notes[0].startswith("ckpt-00000010 is not usable: state.json: expected ")
    assert notes[1] == "falling back to ckpt-00000005: the steps after it are trained again"


def test_a_run_never_starts_over_silently(tmp_path: Path) -> None:
    ours = store(tmp_path)
    assert ours.latest() == (None, [])
    for step in (5, 10):
        (ours.save(snapshot(step)) / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"none is valid.*ckpt-00000010 .*ckpt-00000005 .*use --restart"):
        ours.latest()
    ours.discard()
    assert ours.latest() == (None, [])


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    ours = store(tmp_path)
    (ours.save(snapshot(5)) / "state.json").write_bytes(b"{}")
    assert problems(ours.save(snapshot(5))) == []
    assert [p.name for p in ours.folder.iterdir()] == ["ckpt-00000005"]


KEEPS = [
    (1, (), [50]),
    (2, (), [50, 40]),
    (2, (10, None), [50, 40, 10]),
    (3, (30,), [50, 40, 30]),
    (9, (), [50, 40, 30, 20, 10]),
]


@pytest.mark.parametrize(("keep", "protect", "left"), KEEPS)
def test_rotation(keep: int, protect: tuple[int | None, ...], left: list[int], tmp_path: Path) -> None:
    ours = store(tmp_path, keep=keep)
    for step in (10, 20, 30, 40, 50):
        ours.save(snapshot(step), protect)
    assert [p.name for p in ours.all()] == [f"ckpt-{step:08d}" for step in left]


def test_another_base_or_template_is_refused(tmp_path: Path) -> None:
    store(tmp_path, base="aa", template="t").save(snapshot(1))
    with pytest.raises(ValueError, match="made with another base: aa, this run has bb"):
        store(tmp_path, base="bb", template="t").latest()
    with pytest.raises(ValueError, match="made with another template: t, this run has none"):
        store(tmp_path, base="aa").latest()
    text = "{{ messages }} " * 20
    folder = store(tmp_path / "b", template=text).save(snapshot(1))
    assert text not in (folder / MANIFEST).read_text()
    assert store(tmp_path / "b", template=text).latest()[1] == []
    with pytest.raises(ValueError, match=r"made with another template: [0-9a-f]{64}, this run has [0-9a-f]{64}"):
        store(tmp_path / "b", template=text + "!").latest()


def test_an_unknown_schema_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 9)
    folder = store(tmp_path).save(snapshot(1))
    monkeypatch.undo()
    assert problems(folder) == ["manifest.json has schema 9, this version reads 1"]


def test_the_second_process_is_refused_and_a_dead_one_does_not_lock(tmp_path: Path) -> None:
    ours = store(tmp_path)
    with (
        ours.lock(),
        pytest.raises(ValueError, match=f"is being trained by process {os.getpid()}: wait"),
        store(tmp_path).lock(),
    ):
        pass
    assert (ours.folder / ".lock").read_text() == str(os.getpid())
    (ours.folder / "ckpt-00000001.tmp-dead").mkdir()
    with ours.lock():
        assert ours.all() == []
        assert list(ours.folder.glob("*.tmp-*")) == []


def test_generators_come_back_exactly(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        import numpy as np

        return torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand()

    draw()
    tensors, state = rng.capture()
    state = json.loads(json.dumps(state))
    first = draw()
    assert draw() != first
    rng.restore(tensors, state)
    assert draw() == first


# -- failing calls ----------------------------------------------------------------------------------------------------


class Failing:
    """Call number `k` (from 1) of open, write, fsync, rename, mkdir and save_file fails; `calls` counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int, error: Exception):
        self.k, self.error, self.calls = k, error, 0
        for name in ("open", "fsync", "rename", "mkdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(checkpoint, "save_file", self.wrap(checkpoint.save_file))
        monkeypatch.setattr("builtins.open", self.wrap(open))
        monkeypatch.setattr(checkpoint, "open", self.half, raising=False)

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return real(*args, **kwargs)

        return call

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.k:
            raise self.error

    def half(self, path: Path, mode: str = "r") -> Any:
        """A file whose write may fail after the first half of the bytes."""
        self.count()
        file = open(path, mode)  # noqa: SIM115  # closed by Half, or by the caller
        if "w" in mode:
            real = file.write

            def write(data: bytes) -> int:
                real(data[: len(data) // 2])
                self.count()
                return real(data[len(data) // 2 :])

            return Half(file, write)
        return file


class Half:
    """A file with its own write."""

    def __init__(self, file: Any, write: Callable[[bytes], int]):
        self.file, self.write = file, write

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *details: Any) -> None:
        self.file.close()


ERRORS = [
    OSError(getattr(errno, name), os.strerror(getattr(errno, name))) for name in ("ENOSPC", "EDQUOT", "EIO", "EACCES")
]


@pytest.mark.parametrize(
    "error", [*ERRORS, SafetensorError("I/O error")], ids=["ENOSPC", "EDQUOT", "EIO", "EACCES", "safetensors"]
)
def test_any_failing_call_leaves_the_previous_checkpoint(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = store(tmp_path)
    ours.save(snapshot(5))
    k = failed = 0
    while True:
        k += 1
        with monkeypatch.context() as patch:
            fault = Failing(patch, k, error)
            try:
                ours.save(snapshot(10))
            except SaveFailed:
                failed += 1
        found, notes = ours.latest()
        assert found is not None
        assert found.step in (5, 10), k
        assert notes == [], k
        assert list(ours.folder.glob("*.tmp-*")) == [], k
        if fault.calls < k:
            break  # there is no k-th call: this save succeeded
        shutil.rmtree(ours.folder / "ckpt-00000010", ignore_errors=True)
    assert found.step == 10
    assert failed == k - 1 >= 25, (failed, k)


def test_a_save_that_reads_back_wrong_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = store(tmp_path, keep=1)
    ours.save(snapshot(5))
    real = os.rename

    def flip(old: Path, new: Path) -> None:
        real(old, new)
        (new / "state.json").write_bytes(b"{}")

    monkeypatch.setattr(os, "rename", flip)
    with pytest.raises(SaveFailed, match=r"ckpt-00000010 was not saved: reading it back: state.json: expected"):
        ours.save(snapshot(10))
    assert [p.name for p in ours.all()] == ["ckpt-00000005"], "the old one stays until the new one is known to be good"


def test_an_unreadable_file_is_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store(tmp_path).save(snapshot(5))

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_digest", fail)
    assert problems(folder)[0] == "extra.safetensors cannot be read: [Errno 5] Input/output error"


class Killed(BaseException):
    """Nobody catches it, so that nothing is cleaned up."""


def test_dying_at_any_call_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = store(tmp_path, keep=1)
    ours.save(snapshot(5))
    found, k, steps = None, 0, list[int]()
    while True:
        k += 1
        with monkeypatch.context() as patch:
            fault = Failing(patch, k, Killed())
            with suppress(Killed):
                ours.save(snapshot(10))
        found, notes = ours.latest()
        assert found is not None, k
        assert notes == [], k
        steps.append(found.step)
        if fault.calls < k:
            break
        with ours.lock():
            assert list(ours.folder.glob("*.tmp-*")) == [], k
        shutil.rmtree(ours.folder / "ckpt-00000010", ignore_errors=True)
        ours.save(snapshot(5))
    assert steps == sorted(steps), "once it is there it stays there"
    assert set(steps) == {5, 10}


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    ours = store(tmp_path)
    ours.save(snapshot(5))
    big = Snapshot(10, {"w": torch.zeros(50_000)}, {}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SaveFailed, match=r"ckpt-00000010 was not saved: .*File too large"):
            ours.save(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found, notes = ours.latest()
    assert found is not None
    assert (found.step, notes) == (5, [])
    assert ours.save(big).name == "ckpt-00000010"


# -- killed runs ------------------------------------------------------------------------------------------------------

KILL = Path(__file__).with_name("kill.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KILL.parent.parent)}


def child(folder: Path, fault: str = "") -> int:
    command = [sys.executable, str(KILL), str(folder), *([fault] if fault else [])]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -9, 130, 143), done.stderr
    return done.returncode


def journal(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # only the last may be torn


def final(folder: Path) -> dict[str, Any]:
    """The end of a run: everything in its last checkpoint but where the journal stood, for lines hold times."""
    newest = Store(folder / "checkpoints").all()[0]
    state = json.loads((newest / "state.json").read_bytes())
    del state["journal"]
    tensors = {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}
    steps = [line["step"] for line in journal(folder) if line["event"] == "step"]
    return {"name": newest.name, "state": state, "steps": steps, **tensors}


def survive(faults: list[str], folder: Path) -> int:
    """Run with one fault after the other, then to the end; how many of them struck."""
    struck = last = 0
    for fault in [*faults, ""]:
        code = child(folder, fault)
        struck += code != 0
        lines = journal(folder)
        start = max(i for i, line in enumerate(lines) if line["event"] == "start")
        assert lines[start]["step"] >= last - 5, "more than one save interval was lost"
        assert not any("not usable" in note for note in lines[start]["notes"])
        last = max([0, *(line["step"] for line in lines if line["event"] == "step")])
    return struck


def check_kills(chains: list[list[str]], tmp_path: Path) -> None:
    assert child(tmp_path / "straight") == 0
    expected = final(tmp_path / "straight")
    assert expected["name"] == "ckpt-00000120"
    assert expected["steps"] == list(range(1, 121))
    for i, chain in enumerate(chains):
        struck = survive(chain, tmp_path / str(i))
        assert struck == len(chain), f"only {struck} of {chain} struck"
        assert final(tmp_path / str(i)) == expected, chain


def test_killed_runs_end_in_the_same_bits(tmp_path: Path) -> None:
    check_kills([["time:0.21", "call:9", "time:0.05", "call:18", "time:0.13", "time:0.02"]], tmp_path)


@pytest.mark.long
def test_twenty_kills_end_in_the_same_bits(tmp_path: Path) -> None:
    draw = random.Random(2)
    chains = [[f"time:{draw.uniform(0.0, 0.25):.3f}" for _ in range(5)] for _ in range(4)]
    for i, chain in enumerate([*chains, chains[0]]):
        chain[i % 5] = f"call:{draw.randrange(1, 40)}"
    check_kills(chains, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("fault", "code"), [("signal:2@7", 130), ("signal:15@7", 143), ("signal:2+2@7", 130)])
def test_stop_requests_end_with_the_documented_codes(fault: str, code: int, tmp_path: Path) -> None:
    assert child(tmp_path / "a", fault) == code
    assert child(tmp_path / "a") == 0
    assert child(tmp_path / "b") == 0
    assert final(tmp_path / "a") == final(tmp_path / "b")


def test_a_damaged_newest_checkpoint_costs_one_interval_and_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = loop(tmp_path / "a", schedule="constant")
    straight.run()
    loop(tmp_path / "b", save_every=4, steps=8, schedule="constant").run()
    (tmp_path / "b" / "checkpoints" / "ckpt-00000008" / "trainable.safetensors").write_bytes(b"")
    seen = Journalist()
    again = loop(tmp_path / "b", schedule="constant", observers=[seen])
    again.run()
    assert seen.steps[0]["step"] == 5
    assert seen.starts[0]["notes"][0].startswith("ckpt-00000008 is not usable: trainable.safetensors: expected ")
    assert seen.starts[0]["notes"][1].startswith("falling back to ckpt-00000004")
    assert caplog.text == ""  # said once, by the observer
    assert same(weights(again), weights(straight))


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_the_journal_loses_a_torn_line_and_what_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ours = Journal(path)
    for step in (1, 2):
        ours.append({"event": "step", "step": step, "loss": float("nan")})
    offset = ours.sync()
    for step in (3, 4):
        ours.append({"event": "step", "step": step})
    with open(path, "ab") as file:
        file.write(b'{"event": "st')
    again = Journal(path)
    again.rewind(2, offset)
    again.append({"event": "step", "step": 3})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] == "nan"


def test_the_journal_is_repaired_without_a_fitting_offset(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n{"step": 2}\n{"step": 3}\n{"st')
    Journal(path).rewind(2, 10_000)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    Journal(path).rewind(0, 0)
    assert path.read_bytes() == b""


def test_the_journal_drops_what_a_failed_write_left(tmp_path: Path) -> None:
    ours = Journal(tmp_path / "metrics.jsonl")
    ours.append({"step": 1})
    with open(ours.path, "ab") as file:
        file.write(b'{"step": ')  # the disk filled up in the middle of a line
    ours.append({"step": 2})
    assert ours.path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_journal_on_a_full_disk_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = Journal(tmp_path / "absent" / "metrics.jsonl")
    ours.append({"step": 1})
    ours.append({"step": 2})
    assert ours.lost == 2
    assert [record.message for record in caplog.records if "lines are being lost" in record.message] != []
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_written_ends_the_run_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loop(tmp_path, save_every=3)

    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(GuardStop, match=r"ckpt-00000006 was not saved: .*Permission denied.*last good one is step 0"):
        run.run()
    assert weights(run)
