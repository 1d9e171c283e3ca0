"""The commands in a row, on a tiny model: train, resume, list, check, measure, generate, chat, merge."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltatune.cli import main
from deltatune.commands.adapted import measured, question
from deltatune.commands.train import gigabytes, millions
from deltatune.data.example import Example, Turn
from models import enliven, tiny
from tiny_tokenizers import CHATML, byte_level

TRAIN = ["--set", "train.steps=3", "--set", "train.batch_tokens=64", "--set", "train.max_length=48"]
TRAIN += ["--set", "eval.retention=false", "--set", "eval.max_new_tokens=4", "--set", "log.every=1"]


def call(*words, stdin: str = "", code: int = 0):
    """The result of a command line, which must end with `code`."""
    found = CliRunner().invoke(main, [str(word) for word in words], input=stdin)
    assert found.exit_code == code, found.output
    return found


def answer(*words) -> dict:
    return json.loads(call(*words, "--json").stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, rows, and a finished run."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = byte_level(CHATML)
    model = tiny("llama", max_position_embeddings=512)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    enliven(model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"say {n}", "completion": f"{n}{n}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--eval", folder / "rows.jsonl"]
    done = call("train", *words, "--method", "{lora: {r: 2}}", "--out", folder / "run", *TRAIN)
    assert "chosen: lr" in done.stderr
    assert "step 3/3" in done.stderr
    return folder


def test_a_run_is_listed_whole_and_finished(made):
    (record,) = answer("runs", made)
    assert (record["name"], record["method"], record["status"]) == ("run", "lora", "done")
    assert answer("doctor", made / "run")["ok"]
    again = call("resume", made / "run", "--json")
    assert json.loads(again.stdout)["status"] == "done"
    assert "is finished; there is nothing left to train" in again.stderr


def test_a_run_is_repeated_from_its_folder(made, tmp_path):
    summary = answer("train", made / "run" / "config.yaml", "--out", tmp_path / "again")
    assert summary["status"] == "done"
    first = json.loads((made / "run" / "eval.json").read_text())
    assert summary["after"] == first["after"]
    call("train", made / "run" / "config.yaml", "--out", tmp_path / "again", code=2)  # never written over


def test_a_dry_run_says_what_would_run_and_writes_nothing(made, tmp_path):
    said = answer("train", made / "run" / "config.yaml", "--out", tmp_path / "none", "--dry-run")
    assert said["plan"]["steps"] == 3
    assert said["config"]["train"]["batch_tokens"] == 64
    text = " ".join(call("train", made / "run" / "config.yaml", "--dry-run").stdout.split())
    for part in (r"rows: 8, [\d,]+ tokens, [\d,]+ of them learned; 3 steps", r"trained: [\d,]+ parameters, in \w+",
                 r"memory: 0\.\d\d GiB predicted \(weights 0\.\d\d GiB, .*\), [\d.]+ GiB free"):  # fmt: skip
        assert re.search(part, text), part
    assert "{" not in text.partition("rows: ")[2]
    assert not (tmp_path / "none").exists()
    both = ["--set", f"output.dir={tmp_path / 'there'}", "--out", tmp_path / "none", "--dry-run"]
    told = " ".join(call("train", made / "run" / "config.yaml", *both).stderr.split())
    assert f"output.dir {tmp_path / 'there'} is not used" in told
    assert "is not used" not in call("train", made / "run" / "config.yaml", *both[2:]).stderr


def test_costs_are_spelled_for_people():
    assert [millions(n) for n in (612, 99_999, 1_234_567)] == ["612", "99,999", "1.23 M"]
    assert gigabytes(3 * 2**29) == "1.50 GiB"


def test_measurements_are_lines_with_their_intervals():
    result = {"rows": 4, "loss": 0.5, "accuracy": 0.75, "intervals": {"accuracy": [0.5, 1.0]},
              "tasks": {"sst": {"rows": 2, "accuracy": 1.0}}}  # fmt: skip
    assert list(measured(result)) == [
        "rows: 4",
        "loss: 0.5000",
        "accuracy: 0.7500 (95 % interval 0.5000 to 1.0000)",
        "tasks sst rows: 2",
        "tasks sst accuracy: 1.0000",
    ]


def test_runs_are_called_what_their_user_called_them(made, tmp_path):
    for folder, head in (("a", "presets: [houlsby]\n"), ("b", ""), ("c", "presets: [houlsby]\n")):
        (tmp_path / folder).mkdir()
        also = "- lora: {r: 2}\n" if folder == "c" else ""
        text = f"model: m\n{head}method:\n- adapter: {{bottleneck: 4}}\n{also}data: d\n"
        (tmp_path / folder / "config.yaml").write_text(text)
    found = {r["name"]: r["method"] for r in answer("runs", tmp_path)}
    assert found == {"a": "houlsby", "b": "adapter", "c": "houlsby+lora"}


def test_a_model_is_measured_with_and_without_its_adapter(made):
    data = made / "rows.jsonl"
    base = answer("eval", "--model", made / "model", "--data", data, "--set", "eval.max_new_tokens=4")
    tuned = answer("eval", "--adapter", made / "run", "--data", data, "--set", "eval.max_new_tokens=4")
    first = json.loads((made / "run" / "eval.json").read_text())
    assert base["loss"] == pytest.approx(first["before"]["loss"], rel=1e-5)
    assert tuned["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)


def test_prompts_and_rows_are_answered(made):
    words = ["--adapter", made / "run", "--max-new-tokens", "4"]
    one = answer("generate", *words, "--prompt", "say 1")
    assert len(one["answers"]) == 1
    rows = answer("generate", *words, "--data", made / "rows.jsonl")
    assert [row["where"].rpartition(":")[2] for row in rows["answers"]] == list("12345678")
    assert [row["prompt"] for row in rows["answers"]] == [f"say {n}" for n in range(8)]
    assert (one["answers"][0]["prompt"], one["answers"][0]["where"]) == ("say 1", None)
    assert "\x1b" not in call("generate", *words, "--prompt", "say 1").stdout


def test_the_question_of_a_row_is_its_text():
    turns = (Turn("system", "be kind"), Turn("user", "hi"), Turn("assistant", "hello"))
    assert question(Example("f:1", turns=turns)) == "system: be kind\n\nuser: hi"
    assert question(Example("f:1", turns=turns[1:])) == "hi"
    assert question(Example("f:1", prompt="a", completion="b")) == "a"
    assert question(Example("f:1", text="plain")) == "plain"


def test_a_piped_conversation_compares_base_and_adapter(made):
    lines = "/help\nhello\n/compare\n/adapter off\n/tokens\n/quit\nnever\n"
    shown = call("chat", "--adapter", made / "run", "--max-new-tokens", "4", stdin=lines).stdout
    assert "base" in shown
    assert "adapter off" in shown
    assert "tokens/s" in shown
    assert "never" not in shown
    call("chat", "--model", made / "model", stdin="/adapter on\n")  # ends with its input


def test_a_merged_folder_is_an_ordinary_model(made, tmp_path):
    out = tmp_path / "merged"
    done = call("merge", made / "run", "--out", out, "--json")
    assert json.loads(done.stdout) == {"merged": str(out), "adapter": str(made / "run")}
    assert "it/s" not in done.stderr
    data = made / "rows.jsonl"
    merged = answer("eval", "--model", out, "--data", data, "--set", "eval.max_new_tokens=4")
    tuned = answer("eval", "--adapter", made / "run", "--data", data, "--set", "eval.max_new_tokens=4")
    assert merged["loss"] == pytest.approx(tuned["loss"], rel=1e-4)
    assert "not empty" in call("merge", made / "run", "--out", out, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_restart_forgets_the_checkpoints(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (run / "eval.json").unlink()
    (manifest,) = list(run.glob("checkpoints/ckpt-*/manifest.json"))
    manifest.write_text("{}")
    assert "none is valid" in call("resume", run, code=2).stderr
    assert json.loads(call("resume", run, "--restart", "--json").stdout)["status"] == "done"


def test_data_is_checked_before_a_run_finds_out(made, tmp_path):
    good = answer("data", "check", made / "rows.jsonl", "--model", made / "model")
    assert good["ok"]
    assert good["tokens"]["rows"] == 8
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    bad = call("data", "check", tmp_path / "bad.jsonl", "--json", code=2)
    assert json.loads(bad.stdout)["ok"] is False


# ---- adapters as changes of weights ----------------------------------------------------------------------------------
def loss(made: Path, *where) -> float:
    return answer("eval", *where, "--data", made / "rows.jsonl", "--set", "eval.max_new_tokens=4")["loss"]


@pytest.fixture(scope="module")
def other(made) -> Path:
    """A second adapter of the same base, by another method."""
    words = ["--model", made / "model", "--data", made / "rows.jsonl", "--eval", made / "rows.jsonl"]
    call("train", *words, "--method", "ia3", "--out", made / "ia3", "--set", "train.lr=0.1", *TRAIN)
    return made / "ia3"


def test_several_adapters_are_merged_by_weight(made, other, tmp_path):
    both = answer("merge", made / "run", "--with", f"{other}:0.5", "--out", tmp_path / "both")
    assert both["weights"] == {str(made / "run"): 1.0, str(other): 0.5}
    assert both["exact"] is True
    merged = loss(made, "--model", tmp_path / "both")
    assert merged != pytest.approx(loss(made, "--adapter", made / "run"), rel=1e-5)
    gone = ["merge", made / "run", "--with", f"{made / 'run'}:-1", "--with", f"{made / 'run'}", "--out"]
    answer(*gone, tmp_path / "one")  # a - a + a
    assert loss(made, "--model", tmp_path / "one") == pytest.approx(loss(made, "--adapter", made / "run"), rel=1e-4)
    cut = answer("merge", made / "run", "--with", other, "--how", "ties", "--rank", "2", "--adapter-only",
                 "--out", tmp_path / "cut")  # fmt: skip
    assert 0 < cut["error"] < 1
    assert set(cut["ranks"].values()) == {2}
    assert loss(made, "--adapter", tmp_path / "cut", "--model", made / "model") > 0
    wrong = call("merge", made / "run", "--with", other, "--how", "tyes", "--out", tmp_path / "no", code=2)
    assert "Did you mean 'ties'" in wrong.stderr
    assert not (tmp_path / "no").exists()
    assert "no such adapter folder" in call("merge", made / "run", "--with", "none:1", "--out", tmp_path / "no",
                                            code=2).stderr  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "RUN", "--density", "0.3"], "--density is for --how ties, dare, dare_ties: linear has no use"),
        (["merge", "RUN", "--how", "ties", "--seed", "4"], "--seed is for --how dare, dare_ties: ties has no use"),
        (["merge", "RUN", "--how", "svd"], "--how svd needs --rank N"),
        (["merge", "RUN", "--weight", "nan"], "run must be a finite number, got nan"),
        (["merge", "RUN", "--rank", "99"], "rank 99 is above every layer's: the largest of the 14 changed layers has"),
        (["merge", "RUN", "--base", "x", "--adapter-only"], "--adapter-only writes no model: leave out --base"),
        (["merge", "RUN", "--base", "EMPTY", "--how", "tyes"], "Did you mean 'ties'"),
        (["merge", "RUN", "--model", "EMPTY"], "has no tokenizer that can be read"),
        (["export", "RUN", "--lora", "--max-kl", "nan"], "--max-kl is a number of nats, 0 or more, got nan"),
        (["export", "RUN", "--lora", "--rank", "1", "--energy", "0.5"], "--rank and --energy both say how much"),
        (["extract", "--model", "x", "--tuned", "y", "--rank", "1", "--energy", "1"], "--rank and --energy both say"),
    ],
    ids=str,
)
def test_an_option_that_would_do_nothing_is_an_error(made, tmp_path, words, message):
    (tmp_path / "EMPTY").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(made / "model" / file, tmp_path / "EMPTY")
    places = {"RUN": made / "run", "EMPTY": tmp_path / "EMPTY"}
    told = call(*[places.get(word, word) for word in words], "--out", tmp_path / "out", code=2).stderr
    assert message in " ".join(told.split())
    assert not (tmp_path / "out").exists()


def test_what_a_merge_costs_is_measured_where_it_is_asked_for(made, tmp_path):
    told = answer("merge", made / "run", "--out", tmp_path / "a", "--data", made / "rows.jsonl")
    assert 0 <= told["cost"]["kl"] < 1e-6
    told = answer("merge", made / "run", "--how", "dare", "--seed", "1", "--out", tmp_path / "b")
    assert (told["exact"], told["seed"]) == (False, 1)


def test_an_adapter_is_exported_as_a_lora_with_its_kl(made, other, tmp_path):
    assert "--lora" in call("export", other, "--out", tmp_path / "a", code=2).stderr
    assert "full rank" in call("export", other, "--lora", "--out", tmp_path / "a", code=2).stderr
    whole = answer("export", other, "--lora", "--energy", "1.0", "--out", tmp_path / "whole")
    assert whole["kl"] < 1e-8
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    tuned = loss(made, "--adapter", other)
    assert loss(made, "--adapter", tmp_path / "whole", "--model", made / "model") == pytest.approx(tuned, rel=1e-4)
    words = ["export", other, "--lora", "--rank", "1", "--data", made / "rows.jsonl"]
    cut = call(*words, "--max-kl", "1e-9", "--out", tmp_path / "cut", "--json", code=3)
    assert json.loads(cut.stdout)["kl"] > 1e-9
    assert "KL(adapter || LoRA)" in call(*words, "--out", tmp_path / "again").stdout


def test_a_lora_is_extracted_from_a_tuned_model(made, tmp_path):
    call("merge", made / "run", "--out", tmp_path / "tuned")
    words = ["extract", "--model", made / "model", "--tuned", tmp_path / "tuned"]
    assert "--rank" in call(*words, "--out", tmp_path / "a", code=2).stderr
    found = answer(*words, "--rank", "2", "--out", tmp_path / "found")
    assert found["error"] < 1e-3
    assert found["left"] == {}
    wanted = loss(made, "--adapter", made / "run")
    assert loss(made, "--adapter", tmp_path / "found", "--model", made / "model") == pytest.approx(wanted, rel=1e-4)
    text = call(*words, "--rank", "1", "--target", "attention", "--out", tmp_path / "less").stdout
    assert "remaining error" in text
    assert "not in the LoRA: model.layers.0.mlp" in text
