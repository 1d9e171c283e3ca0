"""New tokens from YAML to use: the adapter keeps their words, and whoever opens it reads text as the run did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tiny_run as tr
from deltatune.cli import main
from deltatune.config import Eval
from deltatune.core.attach import attach
from deltatune.core.store import add_tokens, load, save
from deltatune.methods.tokens import NewTokens
from deltatune.train.run import evaluate_file, open_adapted, resume, run, train
from models import tiny

WORDS = ["<go>", "<stop>"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    model = tr.chat_model(folder / "model")
    rows = [{"prompt": f"<go> {n}", "completion": f"{n}<stop>"} for n in range(8)]
    data = tr.lines(folder / "rows.jsonl", rows)
    run(growing(tr.config(model, data, data, method={"lora": {"r": 2}})), out=folder / "run")
    return folder


def growing(config):
    return config.model_copy(update={"model": config.model.model_copy(update={"add_tokens": tuple(WORDS)})})


def base_size(made: Path) -> int:
    return len(AutoTokenizer.from_pretrained(made / "model"))


def test_the_rows_of_added_tokens_are_trained_beside_the_method(made):
    manifest = json.loads((made / "run" / "adapter" / "deltatune.json").read_text())
    size = base_size(made)
    assert manifest["base"]["tokens"] == {"<go>": size, "<stop>": size + 1}
    assert [*manifest["methods"][0], *manifest["methods"][1]] == ["lora", "tokens"]
    assert manifest["methods"][1]["tokens"]["ids"] == [size, size + 1]
    assert "add_tokens" in (made / "run" / "config.yaml").read_text()


def test_an_adapter_is_measured_with_its_own_words(made):
    model, tokenizer, record = open_adapted(str(made / "model"), made / "run" / "adapter")
    assert len(tokenizer) == base_size(made) + 2
    found = evaluate_file(model, tokenizer, record, str(made / "rows.jsonl"), Eval(max_new_tokens=8))
    said = json.loads((made / "run" / "eval.json").read_text())
    assert found["loss"] == pytest.approx(said["after"]["loss"], rel=1e-6)


def test_a_merged_folder_has_the_words_of_its_rows(made, tmp_path):
    done = CliRunner().invoke(main, ["merge", str(made / "run"), "--out", str(tmp_path / "m")])
    assert done.exit_code == 0, done.output
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / "m"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
    )
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == base_size(made) + 2
    assert tokenizer.convert_tokens_to_ids(WORDS) == [base_size(made), base_size(made) + 1]


def test_a_run_in_python_writes_its_words_down(made, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    attach(model, NewTokens(add_tokens(model, tokenizer, WORDS)))
    given = {"steps": 2, "batch_tokens": 160, "lr": 1e-3, "retention": False, "max_new_tokens": 4}
    first = train(model, "sft", data=str(made / "rows.jsonl"), tokenizer=tokenizer, out=tmp_path / "r", **given)
    (tmp_path / "r" / "eval.json").unlink()
    again = resume(tmp_path / "r")  # from its folder alone
    assert again.summary["after"]["loss"] == pytest.approx(first.summary["after"]["loss"], rel=1e-6)


def test_tokens_without_ids_are_the_added_ones(made, tmp_path):
    config = tr.config(made / "model", str(made / "rows.jsonl"), method="tokens", train={"steps": 1})
    run(growing(config), out=tmp_path / "r")
    (method,) = json.loads((tmp_path / "r" / "adapter" / "deltatune.json").read_text())["methods"]
    assert method == {"tokens": {"ids": [base_size(made), base_size(made) + 1]}}


def test_a_tokenizer_with_other_ids_is_refused_and_a_missing_one_named(made, tmp_path, capsys):
    folder, size = made / "run" / "adapter", base_size(made)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(made / "model"),
        AutoTokenizer.from_pretrained(made / "model"),
    )
    tokenizer.add_tokens(["<other>"])
    with pytest.raises(ValueError, match=rf"token '<go>' with id {size}, this tokenizer has {size + 1} for it"):
        load(model, folder, tokenizer=tokenizer)
    assert model.get_input_embeddings().num_embeddings == size
    load(model, folder)
    assert "adds the tokens <go>, <stop>: give load(..., tokenizer=tokenizer)" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["", " ", 3])
def test_a_token_is_a_text(made, word):
    with pytest.raises(ValueError, match="must be a text that shows"):
        add_tokens(tiny("llama"), AutoTokenizer.from_pretrained(made / "model"), [word])


def test_a_damaged_list_of_words_is_named(made, tmp_path):
    model = tiny("llama")
    folder = save(attach(model, NewTokens((1,))), "default", tmp_path / "a")
    facts = json.loads((folder / "deltatune.json").read_text())
    facts["base"]["tokens"] = {"<a>": "97"}
    (folder / "deltatune.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"'base\.tokens' is no"):
        load(tiny("llama"), folder)
