"""What a newcomer types: an option twice, a row as a prompt, another library's word for a field, a run folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import transformers as hf
from rich.console import Console
from typer.testing import CliRunner

import tiny_run as t
from deltatune import LoRA, attach, load, rows
from deltatune.cli import main
from deltatune.commands.adapted import spelled
from deltatune.core.registry import METHODS
from deltatune.report.progress import phase
from deltatune.train.place import Run
from models import tiny
from test_page import SUMMARY


def call(*given, code: int = 0):
    found = CliRunner().invoke(main, [str(word) for word in given], env={"COLUMNS": "80"})
    assert found.exit_code == code, found.output
    return found


TWICE = [
    (["train", "--out", "a", "--out", "b"], "--out is given twice; keep one"),
    (["predict", "--adapter", "a", "--adapter=b", "x"], "--adapter is given twice"),
    (["merge", "a", "--rank", "1", "--rank", "2", "--out", "b"], "--rank is given twice"),
]


@pytest.mark.parametrize(("words", "said"), TWICE, ids=[words[0] for words, _ in TWICE])
def test_an_option_given_twice_is_an_error(words, said):
    assert said in call(*words, code=2).stderr


def test_options_that_may_be_repeated_still_may(tmp_path):
    rows_ = t.lines(tmp_path / "r.jsonl", [{"text": "a"}])
    said = call("train", "--model", "pypi:no", "--data", rows_, "--data", rows_, "--set", "train.steps=1",
                "--set", "train.lr=1", "--json", "--json", code=2)  # fmt: skip
    assert "pypi:no" in said.output


WORDS = {"rank": "r", "lora_alpha": "alpha", "target_modules": "targets", "num_virtual_tokens": "length"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_unknown_keyword_names_the_field_that_is_meant(name):
    cls = METHODS[name].cls
    with pytest.raises(ValueError, match=rf"^{cls.__name__} has no field 'zzz'\. Its fields: "):
        cls(zzz=1)
    for word, field in WORDS.items():
        if field in cls.__dataclass_fields__:
            with pytest.raises(ValueError, match=rf"{word!r}\. Did you mean {field!r}\?"):
                cls(**{word: 1})


def test_keywords_and_positions_are_taken_as_before():
    assert (LoRA(4).r, LoRA(r=4, alpha=2.0).alpha) == (4, 2.0)


@pytest.mark.parametrize("names", [[0, 1], ["a", 0], "a"])
def test_rows_says_what_it_takes(names):
    model = tiny("llama")
    attach(model, LoRA(r=2), name="a")
    said = r"takes a list of adapters' names, None for the base, got ('a'|0)\. Attached: 'a'"
    with pytest.raises(ValueError, match=said), rows(model, names):
        pass
    with rows(model, ["a", None]):
        pass


# ---- a run folder ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run that answers by a template with a column."""
    from deltatune.train.run import run

    here = tmp_path_factory.mktemp("made")
    said = t.lines(here / "said.jsonl", [{"topic": "abc", "answer": "cba"}] * 8)
    config = t.config(t.chat_model(here / "chat"), said, objective={"sft": {"template": "About {topic}:"}},
                      train={"steps": 2})  # fmt: skip
    assert run(config, out=here / "said").status == "done"
    return here


def test_a_run_folder_leads_to_its_adapter_from_python_too(made, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(made / "chat")
    assert load(model, made / "said") == "said"
    assert load(model, made / "said" / "adapter") == "adapter"
    with pytest.raises(ValueError, match=r"load\(model, 'runs/a'\)"):
        load("runs/a", "x")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="has no adapter yet: deltatune resume"):
        load(model, tmp_path)


def test_a_finished_run_says_so_before_torch_is_loaded(made):
    import subprocess
    import sys

    code = "import sys; from deltatune.cli import main\ntry:\n main(['resume', sys.argv[1]])\nexcept SystemExit as e:\n"
    code += " assert e.code in (0, None), e.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(made / "said")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is finished; there is nothing left to train" in done.stderr
    assert "deltatune generate --adapter" in done.stdout


def test_a_prompt_is_a_row_where_the_template_reads_columns(made):
    asked = call("generate", "--adapter", made / "said", "--prompt", '{"topic": "abc"}', "--prompt", "abc",
                 "--max-new-tokens", "4", "--json")  # fmt: skip
    found = json.loads(asked.stdout)["answers"]
    assert found[0]["answer"] == found[1]["answer"]  # one column: the text alone is it
    assert "Did you mean 'topik'?" in call("generate", "--adapter", made / "said", "--prompt", '{"topik": "a"}',
                                           code=2).stderr  # fmt: skip


def test_prompts_stay_texts_where_no_column_is_read():
    said = ['{"a": 1}', "hi"]
    assert spelled(said, {}) == said
    assert spelled(said, {"objective": {"sft": {"template": "{prompt} then"}}}) == said
    two = {"objective": {"sft": {"template": "{a} and {b}"}}}
    (example,) = spelled(['{"a": "x", "b": "y"}'], two)
    assert (example.column("a"), example.column("b")) == ("x", "y")
    with pytest.raises(
        ValueError, match=r"'hi' does not say which: --prompt '\{\"a\": \"\.\.\.\", \"b\": \"\.\.\.\"\}'"
    ):
        spelled(["hi"], two)


# ---- what is shown ---------------------------------------------------------------------------------------------------
def test_the_methods_fit_80_columns_and_say_where_to_start(monkeypatch):
    monkeypatch.setattr("deltatune.commands.methods.screen", lambda: Console(width=80, highlight=False))
    text = call("methods").stdout
    assert text.startswith("Start here: --method lora")
    assert max(map(len, text.splitlines())) <= 80
    assert any(line.startswith("lora ") and "2106.09685" in line and "A low-rank" in line for line in text.splitlines())


def test_the_next_commands_stand_whole_on_lines_of_their_own():
    folder = Path("runs") / ("very-long-" * 12)
    console = Console(width=80, file=io.StringIO())
    console.print(Run(folder, "done", {**SUMMARY, "mergeable": True}).screen(), crop=False)
    lines = console.file.getvalue().splitlines()
    after = lines[lines.index("next:") + 1 :]
    assert [line.split("  # ")[0] for line in after] == [
        f"  deltatune chat --adapter {folder}",
        f"  deltatune eval --adapter {folder} --data FILE",
        f"  deltatune merge {folder} --out merged",
    ]


def test_a_recipe_is_announced_once(tmp_path):
    assert phase({"phase": "prepare", "notes": ["a", "b"]}, {"a"}) == ["b", "reading the data and the model ..."]
    model = t.masked_model(tmp_path / "bert")
    words = ["train", "--model", model, "--data", t.label_rows(tmp_path / "l.jsonl"), "--objective", "classify",
             "--method", "lora-paper", "--set", "train.steps=1", "--set", "eval.retention=false"]  # fmt: skip
    said = call(*words, "--out", tmp_path / "run").stderr
    assert said.count("lora-paper") == 1
    assert "as lora-paper" not in call(*words, "--dry-run").output  # what it means was said already
