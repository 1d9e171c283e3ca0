"""QLoRA as a user runs it: a run over an NF4 base, its adapter used and merged; 8-bit and paged optimizers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import tiny_run
from deltatune import IA3, LoRA, attach, combine, detach, merge
from deltatune.cli import main
from deltatune.core import quant
from deltatune.core.attach import parameters
from deltatune.core.store import load, save
from deltatune.train.optim import Optim, Optimizer
from deltatune.train.use import merged, open_adapted
from models import tiny
from packed import SIZES, needs_packing

BASE = SIZES["llama"] | {"num_key_value_heads": 4}  # wide enough for the paper's rank of 64 in every layer


# ---- without bitsandbytes --------------------------------------------------------------------------------------------
def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for act in (
        lambda: quant.options("nf4", torch.float32, "cpu"),
        lambda: Optimizer({"p": nn.Parameter(torch.ones(2, 2))}, Optim(optimizer="adamw-8bit")),
    ):
        with pytest.raises(quant.NotInstalled, match=r"need bitsandbytes: pip install 'deltatune\[quant\]'") as caught:
            act()
        assert isinstance(caught.value, ImportError)


def test_another_kind_is_named():
    with pytest.raises(ValueError, match="quant 'nf5': choose from nf4"):
        quant.options("nf5", torch.float32, "cpu")


def test_a_plain_model_needs_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    layer = nn.Linear(3, 4)
    assert quant.scheme(quant.steady(layer)) is None
    assert quant.size(layer.weight) == 12
    with quant.opened(layer):
        quant.write(layer, "weight", torch.ones(4, 3))
    assert torch.equal(layer.weight, torch.ones(4, 3))


# ---- optimizers ------------------------------------------------------------------------------------------------------
def pull(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in optimizer.model.values():
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        optimizer.gather()
        optimizer.step(1.0)
        optimizer.zero()


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_states_survive_the_disk_exactly(dtype: torch.dtype, tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    params = {k: nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for k, s in {"a": (80, 64), "b": (6,)}.items()}
    straight = Optimizer(params, Optim(optimizer="adamw-8bit", lr=1e-2))
    pull(straight, range(4))
    tensors, numbers = straight.state()
    assert {key: t.dtype for key, t in tensors.items() if key.startswith("state1")} == {
        "state1|a": torch.uint8,
        "state1|b": torch.float32,  # small ones stay whole
    }
    save_file(tensors, tmp_path / "o.safetensors")
    copied = {key: nn.Parameter(p.detach().clone()) for key, p in params.items()}
    again = Optimizer(copied, Optim(optimizer="adamw-8bit", lr=1e-2))
    again.load_state(load_file(tmp_path / "o.safetensors"), json.loads(json.dumps(numbers)))
    pull(straight, range(4, 8))
    pull(again, range(4, 8))
    assert all(torch.equal(p, copied[key]) for key, p in params.items())
    ours, theirs = straight.state(), again.state()
    assert ours[1] == theirs[1]
    assert all(torch.equal(t, theirs[0][key]) for key, t in ours[0].items())


@needs_packing
def test_8_bit_steps_are_near_adamws():
    found = []
    for name in ("adamw", "adamw-8bit"):
        p = nn.Parameter(torch.ones(80, 64))
        pull(Optimizer({"p": p}, Optim(optimizer=name, lr=1e-2)), range(5))
        found.append(p.detach() - 1)
    assert not torch.equal(*found)
    assert (found[0] - found[1]).norm() / found[0].norm() < 0.1


@needs_packing
def test_pages_need_a_gpu():
    with pytest.raises(ValueError, match=r"paged-adamw' moves its states between GPU and.*on cpu.*'adamw'"):
        Optimizer({"p": nn.Parameter(torch.ones(2, 2))}, Optim(optimizer="paged-adamw"))


@needs_packing
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_paged_states_survive_the_disk_exactly(tmp_path: Path):
    params = {"a": nn.Parameter(torch.randn(400, 300, device="cuda"))}
    straight = Optimizer(params, Optim(optimizer="paged-adamw", lr=1e-2))
    pull_cuda(straight, range(4))
    tensors, numbers = straight.state()
    save_file({k: t.cpu() for k, t in tensors.items()}, tmp_path / "o.safetensors")
    copied = {key: nn.Parameter(p.detach().clone()) for key, p in params.items()}
    again = Optimizer(copied, Optim(optimizer="paged-adamw", lr=1e-2))
    again.load_state(load_file(tmp_path / "o.safetensors", device="cuda"), json.loads(json.dumps(numbers)))
    pull_cuda(straight, range(4, 8))
    pull_cuda(again, range(4, 8))
    assert torch.equal(params["a"], copied["a"])
    assert again.inner.state[copied["a"]]["state1"].is_paged


def pull_cuda(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for p in optimizer.model.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.step(1.0)
        optimizer.zero()


# ---- a run -----------------------------------------------------------------------------------------------------------
def call(*words: Any, code: int = 0) -> Any:
    found = CliRunner().invoke(main, [str(word) for word in words])
    assert found.exit_code == code, found.output
    return found


@pytest.fixture(scope="module", autouse=True)
def repacking() -> Iterator[None]:
    """Every run below as on a CPU with AVX-512-bf16: bitsandbytes would re-pack each weight on its first evaluation.
    (There is no kernel for that packing elsewhere: a weight that was re-packed ends the run with an error.)"""
    if not quant_is_here():
        yield
        return
    import bitsandbytes.nn.modules as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "has_avx512bf16", lambda: True)
        assert getattr(theirs.Linear4bit(64, 64), quant.REPACKS) is True
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over an NF4 base, by way of the command line."""
    if not quant_is_here():
        pytest.skip("bitsandbytes is not installed: pip install 'deltatune[quant]'")
    place = tmp_path_factory.mktemp("qlora")
    tiny_run.chat_model(place / "model", **BASE)
    tiny_run.chat_rows(place / "rows.jsonl", 12)
    settings = [
        "train.steps=3",
        "train.batch_tokens=160",
        "train.max_length=128",
        "train.precision=fp32",
        "train.lr=5e-3",
    ]
    settings += ["train.optimizer=adamw-8bit", "eval.retention=false", "eval.max_new_tokens=4"]
    sets = [word for text in settings for word in ("--set", text)]
    files = ["--model", place / "model", "--data", place / "rows.jsonl", "--out", place / "run"]
    (place / "run.json").write_text(call("train", *files, "--method", "qlora", *sets, "--json").stdout)
    return place


def quant_is_here() -> bool:
    return not needs_packing.args[0]


def test_a_run_over_nf4_is_verified(made: Path):
    manifest = json.loads((made / "run/adapter/deltatune.json").read_text())
    assert manifest["base"]["quant"] == "nf4"
    assert "quant: nf4" in (made / "run/config.yaml").read_text()
    result = json.loads((made / "run.json").read_text())
    model = tiny("llama", vocab_size=manifest_vocab(made), max_position_embeddings=512, **BASE)
    assert result["parameters"] - result["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert result["failed"] == []
    (unchecked,) = result["unchecked"]
    assert "merging into nf4 costs KL" in unchecked


def manifest_vocab(made: Path) -> int:
    return int(json.loads((made / "model/config.json").read_text())["vocab_size"])


@needs_packing
def test_a_new_task_head_stays_as_it_is(tmp_path: Path):
    """transformers leaves the last parameter's layer out by its name, which a head with a bias has not."""
    rows = tiny_run.label_rows(tmp_path / "rows.jsonl", 12)
    files = ["--model", tiny_run.masked_model(tmp_path / "m"), "--data", rows, "--out", tmp_path / "run"]
    sets = [word for text in ("model.quant=nf4", "train.steps=2", "eval.retention=false") for word in ("--set", text)]
    call("train", *files, "--objective", "classify", *sets)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("classifier.weight" in key for key in stored)


def test_the_adapter_is_used_on_its_own_packing(made: Path):
    data = ["--data", made / "rows.jsonl", "--set", "eval.max_new_tokens=4", "--json"]
    tuned = json.loads(call("eval", "--adapter", made / "run", *data).stdout)
    recorded = json.loads((made / "run/eval.json").read_text())
    assert tuned["loss"] == pytest.approx(recorded["after"]["loss"], rel=1e-3)


def test_merging_on_the_command_line(made: Path, tmp_path: Path):
    data = ["--data", made / "rows.jsonl", "--json"]
    into = json.loads(call("merge", made / "run", "--out", tmp_path / "4", *data).stdout)
    onto = json.loads(call("merge", made / "run", "--base", made / "model", "--out", tmp_path / "16", *data).stdout)
    for found in (into, onto):
        assert found["cost"]["kl"] > 0
        assert found["cost"]["merged_perplexity"] != found["cost"]["perplexity"]
    assert "quantization_config" in json.loads((tmp_path / "4/config.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "16/config.json").read_text())
    tuned, tokenizer, record = open_adapted(str(made / "model"), made / "run/adapter")
    ids = torch.tensor([tokenizer("abc def").input_ids])
    for place, base in (("4", None), ("16", str(made / "model"))):
        again, *_ = open_adapted(str(tmp_path / place), None)
        assert quant.scheme(again) == (None if base else "nf4")
        with torch.no_grad():
            assert torch.equal(
                again(input_ids=ids).logits, merged(tuned, record, base, "default")(input_ids=ids).logits
            )
    said = call("merge", made / "run", "--out", tmp_path / "again", "--data", made / "rows.jsonl")
    assert "what merging cost: KL" in said.output


@pytest.fixture(scope="module")
def others(made: Path) -> Path:
    """Two more adapters over the same 4-bit base: a LoRA and one whose change has full rank."""
    for name, method in (("lora", LoRA(r=2)), ("ia3", IA3())):
        model, *_ = open_adapted(str(made / "model"), made / "run/adapter")
        detach(model, "default")
        torch.manual_seed(1)
        attach(model, method, name)
        with torch.no_grad():
            for p in parameters(model, name).values():
                p.add_(0.1 * torch.randn_like(p))
        save(model, name, made / name, base=str(made / "model"))
    return made


def answer(*words: Any) -> Any:
    return json.loads(call(*words, "--json").stdout)


def said(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer("abc def").input_ids])).logits


def test_several_over_nf4_become_one(others: Path, tmp_path: Path):
    """Factors side by side, over the packed weights: 1 a - 0.5 b to the last digit, as an adapter and as a model."""
    words = ["merge", others / "run", "--with", f"{others / 'lora'}:-0.5"]
    told = answer(*words, "--adapter-only", "--out", tmp_path / "both")
    assert told["exact"]
    assert "cost" not in told  # nothing was rounded
    model, tokenizer, _ = open_adapted(str(others / "model"), tmp_path / "both")
    assert quant.scheme(model) == "nf4"
    apart, *_ = open_adapted(str(others / "model"), others / "run/adapter")
    load(apart, others / "lora", "b")
    combine(apart, {"default": 1.0, "b": -0.5}, "sum")
    assert torch.equal(said(model, tokenizer), said(apart, tokenizer))
    onto = answer(*words, "--base", others / "model", "--out", tmp_path / "16")
    assert onto["cost"]["kl"] > 0
    whole, *_ = open_adapted(str(tmp_path / "16"), None)
    plain_one = merge(apart, "sum", base=open_adapted(str(others / "model"), None)[0]).eval()
    torch.testing.assert_close(said(whole, tokenizer), said(plain_one, tokenizer), rtol=1e-5, atol=1e-5)
    into = answer(*words, "--out", tmp_path / "4")
    assert into["cost"]["kl"] > 0
    assert quant.scheme(open_adapted(str(tmp_path / "4"), None)[0]) == "nf4"


def test_full_changes_over_nf4_are_cut_or_refused(others: Path, tmp_path: Path):
    words = ["merge", others / "run", "--with", others / "ia3", "--out", tmp_path / "a"]
    refused = call(*words, "--adapter-only", code=2)
    assert "packed 4-bit ones cannot hold" in refused.stderr
    assert "--rank" in refused.stderr
    cut = answer(*words, "--rank", "8", "--adapter-only")
    assert set(cut["ranks"].values()) == {8}
    assert 0 < cut["error"] < 1
    assert quant.scheme(open_adapted(str(others / "model"), tmp_path / "a")[0]) == "nf4"
    one = answer("merge", others / "ia3", "--out", tmp_path / "one")  # a single one goes into the weights as it is
    assert one["cost"]["kl"] > 0


@pytest.mark.parametrize("words", [["--base", "x"], ["--data", "rows.jsonl"]])
def test_an_adapter_alone_takes_no_model(made: Path, tmp_path: Path, words: list[str]):
    told = call("merge", made / "run", "--adapter-only", *words, "--out", tmp_path / "a", code=2)
    assert f"--adapter-only writes no model: leave out {words[0]}" in told.stderr
    assert not (tmp_path / "a").exists()


def test_export_over_nf4(others: Path, tmp_path: Path):
    told = answer("export", others / "ia3", "--lora", "--rank", "64", "--out", tmp_path / "a")
    assert told["kl"] < 1e-6
    assert json.loads((tmp_path / "a/deltatune.json").read_text())["base"]["quant"] == "nf4"
