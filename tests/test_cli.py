"""The command line's contract: exit codes, one JSON document, did-you-mean, no torch before it is needed."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from deltatune.cli import main
from deltatune.commands.adapted import located
from deltatune.commands.shell import ENVIRONMENT, Shell, emit, quiet_stdout, strict, verdict
from deltatune.commands.train import batch_line, chosen, finish, given
from deltatune.config import Config, ConfigError


def call(*words: str, stdin: str = ""):
    """The result of a command line, in this process."""
    return CliRunner().invoke(main, list(words), input=stdin)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, without the variables under test."""
    env = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT} | environment
    here = str(Path(__file__).parents[1])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=here, check=False)


# ---- no torch, no side effects on import -----------------------------------------------------------------------------
LIGHT = """
import contextlib, io, os, sys
before = dict(os.environ)
from deltatune.cli import main
import deltatune, deltatune.config
assert dict(os.environ) == before, "importing changed the environment"
names = "methods schema runs train resume eval predict generate merge export extract chat doctor data".split()
names += ["data check"]
lines = [[*name.split(), "--help"] for name in names]
lines += [["--help"], [], ["methods", "--json"], ["schema", "--json"], ["runs"], ["train", "none.yaml"]]
lines += [["train", "--model", "x"], ["methods", "lora"]]
for words in lines:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(words)
        except SystemExit as end:
            assert end.code in (0, 2), (words, end.code)
    heavy = {"torch", "transformers", "numpy", "datasets"} & set(sys.modules)
    assert not heavy, (words, heavy)
print(os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"], os.environ["TOKENIZERS_PARALLELISM"])
"""


def test_help_and_everything_cheap_load_no_torch():
    done = python(LIGHT, GOMP_SPINCOUNT="7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PASSIVE", "7", "false"]  # the user's own value stays


EARLY = """
import contextlib, io, pathlib, sys, tempfile
from deltatune.cli import main
here = pathlib.Path(tempfile.mkdtemp())
(here / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
(here / "model").mkdir()
rows, model = str(here / "rows.jsonl"), str(here / "model")
lines = {
    "bottleneck: 0: a whole number >= 1": ["--model", "o/m", "--data", rows, "--method", "{adapter: {bottleneck: 0}}"],
    "lora.alpha: -1: a number above 0": ["--model", "o/m", "--data", rows, "--method", "{lora: {alpha: -1}}"],
    "needs exactly one <mask>": ["--model", "o/m", "--data", rows, "--objective", "{cloze: {template: no}}"],
    "there is no such file or folder": ["--model", "o/m", "--data", str(here / "row.jsonl")],
    "Did you mean": ["--model", "o/m", "--data", "sst=" + rows, "--eval", str(here / "row.jsonl")],
    "no config.json": ["--model", model, "--data", rows],
    "was not found": ["--model", str(here / "models"), "--data", rows],
    "'houlsby'?); `deltatune methods` lists the": ["--model", "o/m", "--data", rows, "--method", "houlsbi"],
}
for said, words in lines.items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(["train", *words])
        except SystemExit as end:
            assert end.code == 2, (words, end.code)
    text = " ".join(out.getvalue().split())
    assert said in text, (said, text)
    assert len(text) < 700, text
    heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def test_what_can_be_known_at_once_is_said_before_torch_is_loaded_or_anything_fetched():
    done = python(EARLY)
    assert done.returncode == 0, done.stderr


def test_every_command_is_there():
    text = call("--help").output
    named = "methods data train resume eval predict generate chat merge export extract runs doctor schema"
    for name in named.split():
        assert f" {name} " in text
    assert "OMP_WAIT_POLICY=PASSIVE" in text


# ---- errors and exit codes -------------------------------------------------------------------------------------------
class Refusal(ValueError):
    pass


class Verified(ValueError):
    exit_code = 3


class Guarded(ValueError):
    exit_code = 4


ERRORS = [
    (ValueError("bad value"), 2),
    (ConfigError([]), 2),
    (FileNotFoundError(2, "No such file", "x"), 2),
    (Refusal("no"), 2),
    (Verified("differs"), 3),
    (Guarded("nan"), 4),
    (KeyboardInterrupt(), 130),
    (RuntimeError("odd"), 1),
    (TypeError("odd"), 1),
    (KeyError("odd"), 1),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[type(e).__name__ for e, _ in ERRORS])
def test_every_error_has_its_exit_code_and_one_message(error, code, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    app = typer.Typer(cls=Shell)

    @app.command()
    def raises(json_: bool = typer.Option(False, "--json")) -> None:
        print("noise")
        raise error

    @app.command()
    def other() -> None: ...

    assert verdict(error) == code
    plain = CliRunner().invoke(app, ["raises"])
    assert plain.exit_code == code
    assert "Traceback" not in plain.output
    assert plain.stderr.startswith("error: ")
    machine = CliRunner().invoke(app, ["raises", "--json"])
    assert machine.exit_code == code
    said = json.loads(machine.stdout)["error"]
    assert (said["exit_code"], said["kind"]) == (code, type(error).__name__)
    assert machine.stderr == "noise\n"
    if code == 1:
        kept = Path(said["traceback"])
        assert "Traceback" in kept.read_text()
        assert kept.stat().st_mode & 0o077 == 0
        assert str(kept) in said["message"]


def test_verification_and_guard_errors_carry_the_codes_of_the_contract():
    from deltatune.train.guard import GuardStop, VerificationError

    assert (verdict(VerificationError("x")), verdict(GuardStop("x"))) == (3, 4)


WRONG = [
    (["traim"], "Did you mean 'train'"),
    (["train", "--modle", "x"], "--model"),
    (["train", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    (["train", "--dry-run", "--data", "d"], "model: must be given (--model REF)"),
    (["train", "--model", "m", "--data", "d", "--method", "lroa"], "--method: method.lroa: unknown"),
    (["train", "--model", "m", "--data", "d", "--set", "train.lr=x"], "--set train.lr: train.lr: 'x'"),
    (["train", "--model", "m", "--data", "d", "--set", "lr"], "is not a.b=value"),
    (["train", "--nproc", "2"], "2 processes are not in this version"),
    (["resume", "nowhere"], "nowhere: there is no such run folder"),
    (["eval", "--data", "d"], "--model REF or --adapter DIR must be given"),
    (
        ["eval", "--data", "d", "--model", "m", "--set", "train.lr=1"],
        "only eval, data.format, data.columns can",
    ),
    (["eval", "--data", "d", "--model", "m", "--objective", "sff"], "did you mean 'sft'"),
    (["eval", "--data", "d", "--adapter", "nowhere"], "there is no such adapter folder"),
    (["generate", "--model", "m"], "give --prompt TEXT or --data FILE"),
    (["doctor", "nowhere"], "there is no such run folder"),
    (["runs", "nowhere"], "there is no such folder"),
]


@pytest.mark.parametrize(("words", "text"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_bad_input_is_exit_2_with_the_way_out(words, text):
    shown = call(*words)
    assert shown.exit_code == 2
    assert text in " ".join(shown.stderr.replace("│", " ").split())
    assert shown.stdout == ""
    as_json = call(*words, "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["error"]["exit_code"] == 2


def test_a_configuration_error_lists_its_problems_for_machines(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d\ntrain:\n  lrr: 1\n")
    (problem,) = json.loads(call("train", str(path), "--json").stdout)["error"]["problems"]
    assert problem["where"] == f"{path}:4"
    assert problem["key"] == ["train", "lrr"]


# ---- one document on standard output ---------------------------------------------------------------------------------
NOISY = """
import os, subprocess, sys, typer
from deltatune.commands.shell import Shell, emit
app = typer.Typer(cls=Shell)
@app.command()
def noisy(json_: bool = typer.Option(False, "--json")):
    print("from python")
    os.system("echo from a process")
    os.write(1, b"from C\\n")
    emit({"a": float("nan"), "b": [float("inf"), 1], "c": "\\x1b\\ud800"})
@app.command()
def other(): ...
app(["noisy", "--json"])
"""


def test_nothing_but_the_document_reaches_standard_output():
    done = python(NOISY)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"a": None, "b": [None, 1], "c": "\x1b\ud800"}
    assert all(text in done.stderr for text in ("from python", "from a process", "from C"))


def test_json_has_only_what_json_has():
    assert strict({1: (Path("x"), None, True), "s": {3}}) == {"1": ["x", None, True], "s": [3]}


def test_standard_output_comes_back(capfd):
    with quiet_stdout():
        print("aside")
        emit([1])
    print("after")
    out, err = capfd.readouterr()
    assert out == "[\n 1\n]\nafter\n"
    assert err == "aside\n"


def test_methods_lists_what_the_contract_names():
    records = {record["name"]: record for record in json.loads(call("methods", "--json").stdout)}
    lora = records["lora"]
    assert {"name", "paper", "kind", "mergeable", "peft", "defaults", "source"} <= set(lora)
    assert (lora["paper"], lora["mergeable"], lora["peft"], lora["defaults"]["r"]) == ("2106.09685", True, "LORA", 8)
    assert records["mam"]["kind"] == "preset"
    assert [next(iter(block)) for block in records["mam"]["method"]] == ["prefix", "adapter"]
    assert "2106.09685" in call("methods").stdout


def test_methods_says_what_a_family_refuses_and_why(tmp_path):
    from models import tiny

    tiny("t5").save_pretrained(tmp_path)
    records = json.loads(call("methods", "--json", "--model", str(tmp_path)).stdout)
    refused = {record["name"]: record["refused"] for record in records if "refused" in record}
    assert all(reason for reason in refused.values())
    assert "lora" not in refused


def test_methods_counts_sites_and_parameters_of_a_model(tmp_path):
    from models import tiny

    tiny("llama").save_pretrained(tmp_path)
    records = {r["name"]: r for r in json.loads(call("methods", "--json", "--model", str(tmp_path)).stdout)}
    assert records["ia3"]["sites"] == {"self_attn.k_proj": 2, "self_attn.v_proj": 2, "mlp.down_proj": 2}
    assert records["ia3"]["parameters"] == 2 * (16 + 16 + 48)
    assert records["lora-qv"]["parameters"] == 2 * 8 * (32 + 32 + 32 + 16)
    assert records["lora-qv"]["sites"] == {"self_attn.q_proj": 2, "self_attn.v_proj": 2}
    assert records["full"]["parameters"] == sum(p.numel() for p in tiny("llama").parameters())
    assert "has none" in records["bitfit"]["refused"]
    assert "parameters" not in records["bitfit"]
    text = call("methods", "--model", str(tmp_path)).stdout
    assert "2 self_attn.k_proj" in text
    assert "refused: BitFit" in text


def test_the_list_shows_all_that_the_registry_knows_in_a_hundred_columns(tmp_path, monkeypatch):
    from models import tiny

    monkeypatch.setattr("deltatune.commands.methods.screen", lambda: Console(width=100, highlight=False))
    tiny("llama", num_hidden_layers=9).save_pretrained(tmp_path)
    for flags, sites in (((), ""), (("--model", str(tmp_path)), "9 self_attn.v_proj")):
        lines = call("methods", *flags).stdout.splitlines()
        assert max(map(len, lines)) <= 100
        text = " ".join(" ".join(lines).split())
        assert "peft LORA; r: paper, table 9; alpha, all linear layers: ours; lr: swept)" in text
        assert sites in text
    assert "4 model.layers.5-8 (lr: swept)" in text  # AdapterDrop's, one a block


RANGES = [
    ({"h.5": 1, "h.6": 1, "h.7": 1}, {"h.5-7": 3}),
    ({"h.0": 1, "h.2": 1, "h.3": 1, "h.10": 2}, {"h.0,2-3,10": 5}),
    ({"layer.0.k": 2, "layer.1.k": 4, "layer.1.v": 4}, {"layer.0-1.k": 6, "layer.1.v": 4}),
    (
        {"mlp.fc1": 2, "mlp.fc2": 2, "q": 3},
        {"mlp.fc1": 2, "mlp.fc2": 2, "q": 3},
    ),  # a number in a word says another layer
    ({"a.0.b.0": 1, "a.0.b.1": 1}, {"a.0.b.0": 1, "a.0.b.1": 1}),
]


@pytest.mark.parametrize(("sites", "shown"), RANGES)
def test_sites_that_differ_in_a_number_are_one(sites, shown):
    from deltatune.commands.methods import ranged

    assert ranged(sites) == shown


def test_schema_is_a_document():
    assert json.loads(call("schema").stdout)["title"] == "deltatune configuration"
    assert json.loads(call("schema", "--json").stdout)["properties"]["method"]["anyOf"]


# ---- flags -----------------------------------------------------------------------------------------------------------
def test_flags_become_overrides_and_set_comes_last():
    found = given({"--model": ("model.name", "m"), "--data": ("data.train", []), "--x": ("x", None)}, ["train.lr=3e-4"])
    assert [(o.name, o.value, o.said) for o in found] == [
        ("model.name", "m", "--model"),
        ("train.lr", 3e-4, "--set train.lr"),
    ]


def test_every_malformed_set_is_named():
    with pytest.raises(ConfigError) as caught:
        given({}, ["a", "b=1", "c"])
    assert [problem.text[:3] for problem in caught.value.problems] == ["'a'", "'c'"]


BATCHES = [
    ({"batch_tokens": 2048}, "effective batch: at most 2048 tokens a step"),
    ({"batch_rows": 4, "accumulate": 8}, "effective batch: at most 32 rows a step (4 x accumulate 8)"),
]


@pytest.mark.parametrize(("train", "line"), BATCHES)
def test_the_effective_batch_is_said(train, line):
    assert batch_line(Config(model="m", data="d", train=train)) == line


def test_eval_settings_come_from_set():
    assert chosen(["eval.rows=3", "eval.metrics=accuracy"], ("eval",)).eval.rows == 3
    assert chosen(None, ("eval",)).eval.rows is None


# ---- runs and adapters -----------------------------------------------------------------------------------------------
def make_run(folder: Path, **files: object) -> Path:
    """A run folder with a configuration and the given JSON files."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {name: base-m}\nmethod: [{lora: {r: 2}}, bitfit]\ndata: d\n")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


MEASURED = {"metric": "accuracy", "before": {"loss": 2.0, "accuracy": 0.25}, "after": {"loss": 1.0, "accuracy": 0.75}}


def test_runs_are_listed_with_what_they_changed(tmp_path):
    make_run(tmp_path / "good", eval=MEASURED, verified={"status": "done"})
    make_run(tmp_path / "bare", eval=MEASURED)
    make_run(tmp_path / "begun", verified={"status": "done"})  # checked, never measured after training
    (make_run(tmp_path / "half") / "checkpoints" / "ckpt-00000003").mkdir(parents=True)
    make_run(tmp_path / "new", eval={"metric": "accuracy", "before": {"accuracy": 0.5}})
    (make_run(tmp_path / "odd") / "eval.json").write_text("{")
    (tmp_path / "odd" / "config.yaml").write_text("a: [")
    (tmp_path / "no-run").mkdir()
    records = {record["name"]: record for record in json.loads(call("runs", str(tmp_path), "--json").stdout)}
    assert {name: record["status"] for name, record in records.items()} == {
        "good": "done",
        "bare": "unverified",
        "begun": "unfinished",
        "half": "unfinished",
        "new": "empty",
        "odd": "empty",
    }
    assert records["good"]["model"] == "base-m"
    assert records["good"]["method"] == "lora+bitfit"
    assert (records["good"]["before"], records["good"]["after"]) == (0.25, 0.75)
    assert "accuracy 0.250 -> 0.750" in call("runs", str(tmp_path)).stdout


def test_a_mistyped_run_folder_is_answered_with_the_nearest(tmp_path):
    make_run(tmp_path / "first")
    assert "did you mean 'first'?" in call("resume", str(tmp_path / "frist")).stderr


def test_an_adapter_is_found_and_names_its_model(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "adapter").mkdir()
    lone = tmp_path / "lone"
    lone.mkdir()
    assert located("m", None) == ("m", None)
    assert located(None, run) == ("base-m", run / "adapter")
    assert located(None, run / "adapter") == ("base-m", run / "adapter")
    assert located("m", run) == ("m", run / "adapter")
    with pytest.raises(ValueError, match="does not say which model it belongs to; add --model REF"):
        located(None, lone)
    (lone / "adapter_config.json").write_text('{"base_model_name_or_path": "peft-m"}')
    assert located(None, lone) == ("peft-m", lone)
    (lone / "deltatune.json").write_text('{"base": {"reference": "own-m"}}')
    assert located(None, lone) == ("own-m", lone)


@dataclass
class Ended:
    """A run as `finish` sees it."""

    status: str
    summary: dict = field(default_factory=dict)
    dir: Path = Path("runs/x")

    def screen(self) -> str:
        return f"screen of {self.status}"


ENDS = [("done", {}, 0), ("early", {}, 0), ("stopped", {}, 4), ("unverified", {}, 3)]
ENDS += [("interrupted", {"signal": 2}, 130), ("interrupted", {"signal": 15}, 143), ("interrupted", {}, 130)]


@pytest.mark.parametrize(("status", "summary", "code"), ENDS)
def test_a_run_leaves_with_its_exit_code(status, summary, code, capsys):
    try:
        finish(Ended(status, summary))
        left = 0
    except typer.Exit as end:
        left = end.exit_code
    assert left == code
    said = capsys.readouterr()
    assert said.out == f"screen of {status}\n"
    assert said.err == ""
