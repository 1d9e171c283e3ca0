"""A streamed set: every row once an epoch, the same batches after a resume, bad rows told with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltatune.data.batch import Batching
from deltatune.data.encode import Encoded
from deltatune.train.streaming import Flow, Source

ROWS = 23


def encode(examples):
    return [Encoded((0,) * (1 + int(e.completion)), None, int(e.prompt), where=e.where) for e in examples]


def flow(path: Path, batching: Batching, accumulate: int = 2) -> Flow:
    return Flow(Source((str(path),), encode), batching, accumulate)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(i), "completion": str(i % 5)}) + "\n" for i in range(ROWS)))
    return file


BATCHINGS = [Batching(rows=3), Batching(tokens=9), Batching(tokens=9, packing=True)]


@pytest.mark.parametrize("batching", BATCHINGS, ids=["rows", "tokens", "packed"])
def test_every_row_once_an_epoch(path: Path, batching: Batching) -> None:
    found, steps = flow(path, batching), 0
    seen: list[int] = []
    while len(seen) < ROWS:
        group = found(steps)
        assert len(group) <= 2
        seen += [int(row.target or 0) for batch in group for row in batch]
        steps += 1
    assert sorted(seen) == list(range(ROWS))
    assert seen != sorted(seen)  # shuffled
    again = [int(row.target or 0) for batch in found(steps) for row in batch]
    assert again != seen[: len(again)]  # another order in the next epoch


@pytest.mark.parametrize("batching", BATCHINGS, ids=["rows", "tokens", "packed"])
def test_resume_at_every_step(path: Path, batching: Batching) -> None:
    whole = flow(path, batching)
    steps = [[[row.target for row in batch] for batch in whole(n)] for n in range(12)]
    for at in range(12):
        first = flow(path, batching)
        for n in range(at):
            first(n)
        second = flow(path, batching)
        second.load(json.loads(json.dumps(first.state(at))))
        rest = [[[row.target for row in batch] for batch in second(n)] for n in range(at, 12)]
        assert rest == steps[at:]


def test_asked_twice_and_out_of_order(path: Path) -> None:
    found = flow(path, BATCHINGS[0])
    assert found(0) is found(0)
    with pytest.raises(ValueError, match="step 5 was asked for, 1 comes next"):
        found(5)


def test_a_bad_row_is_told(path: Path) -> None:
    path.write_text(path.read_text() + '{"prompt": "1", "completion": null}\n')
    found = flow(path, BATCHINGS[0])
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        list(map(found, range(20)))


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the file is empty"):
        flow(tmp_path / "empty.jsonl", BATCHINGS[0])(0)


def test_a_streamed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Interrupted at step 3 and resumed, a run over a stream ends as the uninterrupted one."""
    import torch
    from safetensors.torch import load_file

    import tiny_run
    from deltatune.train.run import resume, run

    model, rows = tiny_run.chat_model(tmp_path / "model"), tiny_run.chat_rows(tmp_path / "rows.jsonl", 30)
    config = tiny_run.config(model, rows, data={"train": rows, "streaming": True})
    whole = run(config, out=tmp_path / "whole")

    class Halt:
        def on_start(self, record): ...
        def on_eval(self, record): ...
        def on_end(self, record): ...
        def on_step(self, record):
            if record["step"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut", observers=[Halt()])
    again = resume(tmp_path / "cut")
    assert (whole.status, again.status) == ("done", "done")
    first, second = (load_file(r.dir / "adapter" / "adapter_model.safetensors") for r in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"train": {"steps": None, "epochs": 1}}, "train.steps"),
        ({"objective": "classify"}, "for sft"),
    ],
)
def test_what_a_stream_cannot_do(tmp_path: Path, over: dict, says: str) -> None:
    import tiny_run
    from deltatune.train.job import prepare

    rows = tiny_run.chat_rows(tmp_path / "rows.jsonl", 4)
    with pytest.raises(ValueError, match=says):
        prepare(tiny_run.config(tmp_path, rows, data={"train": rows, "streaming": True}, **over))
