"""Doctor: findings about the machine, and every way a run folder can be damaged."""

import json
import shutil
import time

import pytest
import torch
from typer.testing import CliRunner

import models
from deltatune.cli import main
from deltatune.core.attach import attach
from deltatune.core.store import save
from deltatune.doctor import Check, arithmetic, disk, environment, python, run_folder, system, version, within
from deltatune.methods.lora import LoRA
from deltatune.train.checkpoint import Snapshot, Store


def test_the_machine_is_described():
    names = [check.name for check in (python(), *system(), *arithmetic())]
    assert names == ["python", "system", "cores", "memory", "threads", "bf16", "gpu"]


def test_versions_are_held_against_their_ranges():
    from packaging.specifiers import SpecifierSet

    assert version("pytest", {"pytest": SpecifierSet(">=1")}).ok is True
    old = version("pytest", {"pytest": SpecifierSet("<1")})
    assert old.ok is False
    assert "supported: <1; pip install 'pytest<1'" in old.note
    assert version("no-such-package-here", {}) == Check(
        "no-such-package-here", "not installed", False, "pip install 'no-such-package-here'"
    )


def test_a_slow_answer_is_not_waited_for():
    began = time.monotonic()
    assert within(0.05, lambda: time.sleep(5) or "late") == "no answer in 0.05 s"
    assert time.monotonic() - began < 2
    assert within(5, lambda: "here") == "here"
    assert within(5, lambda: str(1 / 0)) == "ZeroDivisionError: division by zero"


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path, monkeypatch):
    assert disk(tmp_path / "a" / "b", "cache").ok is not False
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write anywhere
    assert disk(tmp_path, "cache") == Check("cache", str(tmp_path), False, "cannot be written to")


def whole_run(folder):
    """A run folder with everything in it, as small as can be."""
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\ndata: d\n")
    for name in ("env", "eval", "verified", "summary"):
        (folder / f"{name}.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    store = Store(folder / "checkpoints")
    for step in (1, 2):
        store.save(Snapshot(step, {"w": torch.ones(2)}, {}, {}))
    save(attach(models.tiny("llama"), LoRA(1)), "default", folder / "adapter")
    return folder


def torn_adapter(folder):
    """An adapter of another library whose tensors are cut off."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"\x40\x00\x00")


def test_a_check_that_stumbles_is_a_finding_and_the_others_go_on(tmp_path, monkeypatch):
    folder = whole_run(tmp_path / "run")
    monkeypatch.setattr("deltatune.doctor.journal", lambda folder: [][0])
    found = {check.name: check for check in run_folder(folder)}
    assert (found["metrics.jsonl"].ok, found["metrics.jsonl"].note[:10]) == (False, "IndexError")
    assert "ckpt-00000002" in found


DAMAGE = [
    (
        "config.yaml",
        "config.yaml",
        lambda p: p.write_text("model: m\ndata: d\ntrain: {lrr: 1}\n"),
        False,
        "did you mean",
    ),
    ("eval.json", "eval.json", lambda p: p.write_text("{"), False, "Expecting"),
    ("eval.json", "eval.json", lambda p: p.write_text("[]"), False, "no JSON object"),
    ("eval.json", "eval.json", lambda p: p.unlink(), None, "written by a finished run"),
    ("summary.json", "summary.json", lambda p: p.unlink(), False, "resume writes it anew"),
    ("verified.json", "verified.json", lambda p: p.write_text('{"status": "unverified"}'), False, "see report.md"),
    ("metrics.jsonl", "metrics.jsonl", lambda p: p.write_text('{"a": 1}\n{"b"'), None, "resume mends it"),
    ("metrics.jsonl", "metrics.jsonl", lambda p: p.write_text('{"b"\n{"a": 1}\n'), False, ""),
    ("checkpoints/ckpt-00000002/state.json", "ckpt-00000002", lambda p: p.write_text("{ }"), False, "state.json"),
    ("checkpoints/ckpt-00000001/manifest.json", "ckpt-00000001", lambda p: p.unlink(), False, "manifest.json"),
    ("checkpoints/ckpt-00000003.tmp-1", "ckpt-00000003.tmp-1", lambda p: p.mkdir(), None, "next resume removes it"),
    ("adapter", "adapter", shutil.rmtree, False, "resume writes it anew"),
    ("adapter", "adapter", lambda p: [f.unlink() for f in p.iterdir()], False, "no adapter folder"),
    ("adapter", "adapter", lambda p: torn_adapter(p), False, "adapter_model.safetensors"),
]


@pytest.mark.parametrize(("file", "name", "how", "ok", "note"), DAMAGE)
def test_damage_is_found_and_nothing_else(tmp_path, file, name, how, ok, note):
    folder = whole_run(tmp_path / "run")
    before = {check.name: check for check in run_folder(folder)}
    assert {check.ok for check in before.values()} == {True}
    how(folder / file)
    after = {check.name: check for check in run_folder(folder)}
    assert after[name].ok is ok
    assert note in after[name].note
    assert {key for key in after if after[key] != before.get(key)} == {name}


def test_the_command_answers_people_and_machines(tmp_path):
    folder = whole_run(tmp_path / "run")
    good = CliRunner().invoke(main, ["doctor", str(folder), "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["ok"] is True
    (folder / "eval.json").write_text("{")
    bad = CliRunner().invoke(main, ["doctor", str(folder)])
    assert bad.exit_code == 3
    assert "damaged" in bad.stdout


def test_the_environment_shows_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:canary@127.0.0.1:9/simple")
    text = json.dumps([check.to_json() for check in environment()])
    assert "canary" not in text
    assert "index" in text
