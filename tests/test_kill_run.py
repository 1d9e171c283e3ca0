"""A real job killed in the middle of training goes on to the very same adapter, and is never listed as done before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import tiny_run as t
from deltatune.commands.runs import describe
from deltatune.config import dump, resolve
from deltatune.train.run import resume, run

STEPS = 60


def saved_step(folder: Path) -> int:
    """The newest whole checkpoint's step; 0 where there is none."""
    return max((int(p.parent.name[5:]) for p in folder.glob("checkpoints/ckpt-????????/manifest.json")), default=0)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "deltatune.cli", *map(str, words)]


def test_a_killed_job_resumes_bitwise_and_is_unfinished_until_then(tmp_path):
    t.chat_model(tmp_path / "model")
    rows, held = t.chat_rows(tmp_path / "rows.jsonl"), t.chat_rows(tmp_path / "held.jsonl", 4, 1)
    config = t.config(tmp_path / "model", rows, held, train={"steps": STEPS, "save_every": 5})
    (tmp_path / "job.yaml").write_text(dump(resolve(config).config))
    cut, environment = tmp_path / "cut", {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command("train", tmp_path / "job.yaml", "--out", cut), env=environment, stderr=subprocess.DEVNULL
    )
    seen, until = set(), time.monotonic() + 60
    while saved_step(cut) < 10 and child.poll() is None and time.monotonic() < until:
        if (cut / "config.yaml").exists():
            seen.add(describe(cut)["status"])
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 0 < saved_step(cut) < STEPS
    assert seen <= {"empty", "unfinished"}
    assert describe(cut)["status"] == "unfinished"
    listed = subprocess.run(command("runs", tmp_path, "--json"), env=environment, capture_output=True, check=True)
    assert [record["status"] for record in json.loads(listed.stdout)] == ["unfinished"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert resume(cut).status == describe(cut)["status"] == "done"
        run(resolve(config).config, out=tmp_path / "straight")
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (load_file(next((tmp_path / n / "adapter").glob("*.safetensors"))) for n in ("straight", "cut"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
