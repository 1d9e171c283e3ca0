"""Rows that a run cannot use: known before anything is measured, or, in a stream, with the steps so far kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_run as tr
from deltatune import doctor
from deltatune.config import Override, dump, load
from deltatune.train.run import plan, resume, run

LONG = {"prompt": "abc " * 60, "completion": "b"}
LOOP = {"steps": 12, "batch_tokens": None, "batch_rows": 30, "save_every": None}
STREAM = {"data": {"streaming": True}, "train": LOOP}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tr.chat_model(folder / "chat")
    tr.seq2seq_model(folder / "t5")
    return folder


def pairs(path: Path, count: int, changed=()) -> str:
    rows = [{"prompt": f"a{i}", "completion": f"{i}"} for i in range(count)]
    for at, row in changed:
        rows[at] = row
    return tr.lines(path, rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_no_batch_can_hold_is_known_before_anything_is_measured(made, tmp_path, streaming):
    rows = pairs(tmp_path / "rows.jsonl", 8, [(3, LONG)])
    config = tr.config(made / "chat", rows, train={"batch_tokens": 64}, data={"streaming": streaming})
    for use in (plan, lambda config: run(config, out=tmp_path / "r")):
        with pytest.raises(ValueError, match=r"1 rows are longer than train.batch_tokens 64 \(.*rows.jsonl:4; up to"):
            use(config)
    assert not (tmp_path / "r").exists()


BROKEN = [
    ({"prompt": "a"}, STREAM["train"], "mixed_schema"),
    (LONG, STREAM["train"] | {"batch_rows": None, "batch_tokens": 96, "steps": 99}, "train.batch_tokens allows 96"),
]


@pytest.mark.parametrize(("row", "loop", "said"), BROKEN, ids=["columns", "length"])
def test_a_bad_row_in_a_stream_ends_the_run_with_its_steps_kept(made, tmp_path, row, loop, said):
    rows = pairs(tmp_path / "rows.jsonl", 300, [(290, row)])
    with pytest.raises(ValueError, match="Correct it; `deltatune resume` goes on") as error:
        run(tr.config(made / "chat", rows, data=STREAM["data"], train=loop), out=tmp_path / "r")
    assert "rows.jsonl:291" in str(error.value)
    assert said in str(error.value)
    assert "1 of " not in str(error.value)
    steps = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    kept = [path.name for path in (tmp_path / "r" / "checkpoints").glob("ckpt-*")]
    assert kept == [f"ckpt-{max(r['step'] for r in steps if r['event'] == 'step'):08d}"]
    pairs(tmp_path / "rows.jsonl", 300)  # corrected
    assert resume(tmp_path / "r").status == "done"


def test_rows_far_into_a_stream_belong_to_the_run(made, tmp_path):
    rows = pairs(tmp_path / "rows.jsonl", 300)
    loop = STREAM["train"] | {"steps": 1}
    done = run(tr.config(made / "chat", rows, data=STREAM["data"], train=loop), out=tmp_path / "r")
    assert done.summary["train_rows"] == 300
    kept = json.loads((tmp_path / "r" / "env.json").read_text())["data"]["train"]
    assert kept["rows"] == 300
    (tmp_path / "r" / "eval.json").unlink()
    whole = load(tmp_path / "r" / "config.yaml").config
    pairs(tmp_path / "rows.jsonl", 300, [(280, {"prompt": "other", "completion": "row"})])
    with pytest.raises(ValueError, match="training rows was"):
        resume(tmp_path / "r")
    pairs(tmp_path / "rows.jsonl", 300)
    toggled = load(tmp_path / "r" / "config.yaml", [Override("data.streaming", False, "--set")]).config
    (tmp_path / "r" / "config.yaml").write_text(dump(toggled))
    with pytest.raises(ValueError, match="streaming was True, is now False"):
        resume(tmp_path / "r")
    (tmp_path / "r" / "config.yaml").write_text(dump(whole))
    assert resume(tmp_path / "r").status == "done"


def test_a_finished_run_without_its_adapter_is_not_whole(made, tmp_path):
    folder = tmp_path / "r"
    run(tr.config(made / "chat", pairs(tmp_path / "rows.jsonl", 8), train={"steps": 1}), out=folder)
    for path in (folder / "adapter").iterdir():
        path.unlink()
    (folder / "adapter").rmdir()
    (check,) = [check for check in doctor.run_folder(folder) if check.name == "adapter"]
    assert (check.ok, "delete eval.json" in check.note) == (False, True)
    with pytest.raises(ValueError, match=r"adapter is missing: delete .*eval.json"):
        resume(folder)
    (folder / "eval.json").unlink()
    assert resume(folder).status == "done"
    assert (folder / "adapter").is_dir()


def test_what_a_file_manager_leaves_in_an_adapter_folder_stops_no_run(made, tmp_path):
    folder = tmp_path / "r"
    run(tr.config(made / "chat", pairs(tmp_path / "rows.jsonl", 8), train={"steps": 1}), out=folder)
    for name in (".DS_Store", "Thumbs.db"):
        (folder / "adapter" / name).write_bytes(b"\0")
    (folder / "eval.json").unlink()
    assert resume(folder).status == "done"


def test_a_text_with_the_end_token_is_named_where_the_class_is_read_there(made, tmp_path):
    rows = tr.label_rows(tmp_path / "rows.jsonl", 8)
    with Path(rows).open("a") as file:
        file.write(json.dumps({"text": "the film </s> was good", "label": "pos"}) + "\n")
    train = {"batch_tokens": None, "batch_rows": 4, "steps": 1}
    with pytest.raises(ValueError, match=r"rows.jsonl:9: \[control_token\] text: the text holds '</s>'"):
        run(tr.config(made / "t5", rows, objective="classify", train=train), out=tmp_path / "r")
