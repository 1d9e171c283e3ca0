"""A whole run on tiny models: its folder, repeated, interrupted, resumed, in memory, and every objective and method."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltatune
import tiny_run as t
from deltatune import SFT, Classify, Cloze, LoRA, attach
from deltatune.commands.runs import describe
from deltatune.config import Eval, Override, dump, load
from deltatune.core.attach import attached, known
from deltatune.core.delta import Refusal
from deltatune.data.problems import BadRow
from deltatune.report import page
from deltatune.train.checkpoint import Store
from deltatune.train.run import evaluate_file, open_adapted, plan, resume, run

FILES = [
    "adapter", "checkpoints", "config.yaml", "env.json", "eval.json", "metrics.jsonl", "report.md", "summary.json",
    "verified.json",
]  # fmt: skip
ROWS = {"batch_rows": 8, "batch_tokens": None}
CLOZE = {"cloze": {"template": "{text} it was <mask> .", "labels": {"pos": ["great"], "neg": ["terrible"]}}}
LETTERS = {"cloze": {"template": "{text} it was <mask>", "labels": {"pos": ["g"], "neg": ["b"]}}}


class Signal:
    """Sends itself SIGTERM at a step, or in a phase."""

    def __init__(self, step: int = 0, phase: str = ""):
        self.step, self.phase, self.phases, self.records = step, phase, [], []

    def on_phase(self, record):
        self.phases.append(record["phase"])
        self.records.append(record)
        if record["phase"] == self.phase:
            # a moment later, when the phase has begun
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            signal.setitimer(signal.ITIMER_REAL, 0.02)

    def on_step(self, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_start(self, record): ...
    def on_eval(self, record): ...
    def on_end(self, record): ...


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Models and rows of every kind, and one finished chat run."""
    d = tmp_path_factory.mktemp("made")
    t.chat_model(d / "chat"), t.masked_model(d / "bert"), t.seq2seq_model(d / "t5")
    t.chat_rows(d / "chat.jsonl"), t.chat_rows(d / "chat-eval.jsonl", 6, 1)
    t.label_rows(d / "label.jsonl"), t.label_rows(d / "label-eval.jsonl", 6, 1)
    pairs = [{"prompt": "the film was good", "completion": "great"}, {"prompt": "a plot", "completion": "terrible"}]
    t.lines(d / "pair.jsonl", pairs * 6), t.lines(d / "pair-eval.jsonl", pairs)
    said = [("the film was good", ["a", "b"]), ("the plot was bad", ["b"]), ("it was sad", []), ("nice", ["a"])]
    multi = [{"text": text, "labels": labels} for text, labels in said * 3]
    t.lines(d / "multi.jsonl", multi), t.lines(d / "multi-eval.jsonl", multi[:4])
    scores = [{"text": "the film was " + "good " * (i % 4), "label": i % 4 + 0.5} for i in range(12)]
    t.lines(d / "score.jsonl", scores), t.lines(d / "score-eval.jsonl", scores[:4])
    text = [{"text": f"some plain words, number {i}"} for i in range(8)]
    t.lines(d / "text.jsonl", text), t.lines(d / "text-eval.jsonl", text[:3])
    run(settings(d, "chat", "chat"), out=d / "run")
    return d


def settings(made: Path, model: str, rows: str, **over):
    return t.config(made / model, str(made / f"{rows}.jsonl"), str(made / f"{rows}-eval.jsonl"), **over)


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def weights(folder: Path) -> dict:
    return load_file(next((folder / "adapter").glob("*.safetensors")))


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ---- the folder ------------------------------------------------------------------------------------------------------
def test_the_folder_holds_exactly_its_files(made):
    assert sorted(p.name for p in (made / "run").iterdir()) == FILES
    result = read(made / "run", "eval.json")
    assert (result["metric"], result["higher_is_better"]) == ("exact_match", True)
    for side in ("before", "after"):
        assert {"loss", "exact_match"} <= result[side].keys()
        assert all(isinstance(v, float) for v in result[side].values())
    assert result["after"]["loss"] < result["before"]["loss"]
    low, high = result["intervals"]["exact_match"]
    assert 0 <= low <= high <= 1
    assert result["retention"] == {}
    checked = read(made / "run", "verified.json")
    assert checked["status"] == "done"
    names = ["labels", "coverage", "identity", "memory", "learning rate", "saved", "reload", "merge", "base"]
    names.append("better than before")
    assert [c["name"] for c in checked["checks"]] == names
    events = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    environment = read(made / "run", "env.json")
    assert environment["data"]["train"]["rows"] == 24
    assert str(Path.home()) not in json.dumps(environment)


def test_what_was_auto_is_written_down(made):
    train = load(made / "run" / "config.yaml").config.train
    assert (train.precision, train.compile, train.checkpoint_gradients) == ("fp32", "off", "off")
    report = (made / "run" / "report.md").read_text()
    assert "One row as the model sees it" in report
    assert "<|im_end|><<" in report


def test_the_report_says_how_before_was_asked_and_what_was_read(made):
    report, summary = (made / "run" / "report.md").read_text(), read(made / "run", "summary.json")
    assert "before: the untuned model asked with the row as it is (no examples" in report
    events = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["rows_seen"] == sum(e["rows"] for e in events if e["event"] == "step")
    assert summary["epochs"] == summary["rows_seen"] / 24
    assert f"6 steps over {page.read(summary)}" in report


def test_examples_that_rows_without_an_answer_do_not_allow_are_said(made, tmp_path):
    rows = t.lines(tmp_path / "held.jsonl", [{"text": "abc abc"}])
    both = [rows, str(made / "chat-eval.jsonl")]
    config = settings(made, "chat", "chat", data={"eval": both}, eval={"shots": 2}, train={"steps": 1})
    done = run(config, out=tmp_path / "run")
    (said,) = [note for note in done.summary["notes"] if "eval.shots" in note]
    assert said.endswith(f"without eval.shots: 1 evaluation rows have no answer ({rows}:1)")


def test_warnings_and_a_row_are_told_before_training(made, tmp_path):
    watch, train = Signal(), {"steps": 1, "lr": 5.0}
    done = run(settings(made, "chat", "chat", method="prompt", train=train), out=tmp_path / "run", observers=[watch])
    (record,) = [r for r in watch.records if r["phase"] == "train"]
    assert [note[:23] for note in record["notes"]] == ["identity: prompt does n", "warning: learning rate:"]
    assert any(learned and "<|im_end|>" in text for text, learned in record["sample"]["pieces"])
    assert "| learning rate | warning |" in (tmp_path / "run" / "report.md").read_text()
    assert any(line.startswith("warning: learning rate") for line in done.summary["unchecked"])


def test_a_run_is_repeated_bitwise_from_its_folder(made, tmp_path):
    run(load(made / "run" / "config.yaml").config, out=tmp_path / "again")
    assert same(made / "run", tmp_path / "again")
    assert read(tmp_path / "again", "eval.json")["after"] == read(made / "run", "eval.json")["after"]
    with pytest.raises(ValueError, match="holds a run already"):
        run(load(made / "run" / "config.yaml").config, out=tmp_path / "again")


TAKEN = [
    (lambda p: p.write_text("x"), "is a file"),
    (lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")), r"holds other files \(notes.txt\)"),
]


@pytest.mark.parametrize(("occupy", "said"), TAKEN)
def test_an_occupied_place_is_refused_before_anything_is_read(tmp_path, occupy, said):
    occupy(tmp_path / "out")
    watch = Signal()
    with pytest.raises(ValueError, match=said):
        run(t.config(tmp_path / "none", "none.jsonl"), out=tmp_path / "out", observers=[watch])
    assert watch.phases == []


def test_an_unusable_place_is_refused_and_a_failed_start_leaves_nothing(made, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written to"):
        run(settings(made, "chat", "chat"), out=tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="none"):
        run(t.config(made / "chat", str(tmp_path / "none.jsonl")), out=tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


DAMAGED = [
    ("eval.json", "{", "eval.json is damaged"),
    ("verified.json", "[]", "verified.json is damaged"),
    ("verified.json", "{}", "has the status None"),
    ("summary.json", None, "summary.json is missing"),
]


@pytest.mark.parametrize(("name", "text", "said"), DAMAGED)
def test_a_damaged_file_of_a_finished_run_is_named_with_the_way_out(made, tmp_path, name, text, said):
    folder = tmp_path / "run"
    shutil.copytree(made / "run", folder)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        resume(folder)
    assert f"delete {folder / 'eval.json'}" in str(error.value)
    (folder / "eval.json").unlink()
    assert resume(folder).status == "done"
    assert read(folder, "eval.json")["after"] == read(made / "run", "eval.json")["after"]


def test_a_padded_length_may_equal_the_number_of_classes(made, tmp_path):
    rows = t.lines(tmp_path / "three.jsonl", [{"text": x, "label": y} for x, y in ("ax", "by", "cz")])
    done = run(t.config(made / "bert", rows, objective="classify", train=ROWS), out=tmp_path / "run")
    assert done.status == "done", done.summary["failed"]


# ---- interrupted -----------------------------------------------------------------------------------------------------
def test_an_interrupted_run_resumes_bitwise(made, tmp_path):
    config = load(made / "run" / "config.yaml").config
    cut = run(config, out=tmp_path / "cut", observers=[Signal(step=3)])
    assert (cut.status, cut.summary) == ("interrupted", {"signal": signal.SIGTERM, "step": 3})
    assert not (tmp_path / "cut" / "eval.json").exists()
    assert read(tmp_path / "cut", "verified.json")["status"] == "unfinished"
    assert describe(tmp_path / "cut")["status"] == "unfinished"
    done = resume(tmp_path / "cut")
    assert (done.status, describe(tmp_path / "cut")["status"]) == ("done", "done")
    assert same(made / "run", tmp_path / "cut")
    assert read(tmp_path / "cut", "eval.json")["before"] == read(made / "run", "eval.json")["before"]


@pytest.fixture(scope="module")
def cut(made, tmp_path_factory) -> Path:
    """A run stopped after step 3."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    run(settings(made, "chat", "chat"), out=folder, observers=[Signal(step=3)])
    return folder


CHANGED = [
    ("data.train", ["chat-eval.jsonl"], "training rows was .*'rows': 24.* is now .*'rows': 6"),
    ("train.batch_tokens", 80, "batch_tokens was 160, is now 80"),
    ("train.max_length", 128, "max_length was 512, is now 128"),
    ("method", {"lora": {"r": 2}}, "method was"),
    ("method", "ia3", "method was"),
    ("train.accumulate", 2, "accumulate was 1, is now 2"),
]


@pytest.mark.parametrize(("key", "value", "said"), CHANGED)
def test_another_run_is_not_gone_on_with(made, cut, tmp_path, key, value, said):
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    was = {name: (folder / name).read_bytes() for name in ("env.json", "checkpoints/identity.json")}
    edit(folder, key, [str(made / name) for name in value] if key == "data.train" else value)
    with pytest.raises(ValueError, match=said) as error:
        resume(folder)
    assert f"deltatune resume {folder} --restart" in str(error.value)
    assert {name: (folder / name).read_bytes() for name in was} == was


def test_discarded_checkpoints_let_another_run_begin(made, cut, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    edit(folder, "data.train", [str(made / "chat-eval.jsonl")])
    Store(folder / "checkpoints").discard()
    assert resume(folder).status == "done"
    assert read(folder, "env.json")["data"]["train"]["rows"] == 6


def edit(folder: Path, key: str, value) -> None:
    """One key of config.yaml changed by hand."""
    changed = load(folder / "config.yaml", [Override(key, value, "--set")]).config
    (folder / "config.yaml").write_text(dump(changed))


def test_other_evaluation_rows_are_measured_anew_by_the_base(made, cut, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    environment, old = (folder / "env.json").read_text(), read(folder, "checkpoints/before.json")
    edit(folder, "data.eval", [str(made / "chat.jsonl")])
    done = resume(folder)
    assert done.status == "done"
    assert done.summary["before"]["loss"] != old["scored"]["loss"]
    assert len(read(folder, "checkpoints/before.json")["scored"]["references"]) == 24
    assert any("measured anew" in note for note in done.summary["notes"])
    assert (folder / "env.json").read_text() == environment
    assert same(made / "run", folder)


@pytest.mark.parametrize("phase", ["before", "save", "after"])
def test_a_signal_outside_the_loop_leaves_a_folder_to_resume(made, tmp_path, phase, monkeypatch):
    from deltatune.train import run as room

    slow = {"before": (room.evidence, "before"), "save": (room, "after_training"), "after": (room.evidence, "after")}
    owner, name = slow[phase]
    whole = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *given: list(map(whole, *zip(*[given] * 2000, strict=True)))[-1])
        cut = run(settings(made, "chat", "chat"), out=tmp_path / "cut", observers=[Signal(phase=phase)])
    assert cut.status == "interrupted"
    assert cut.summary == {"signal": signal.SIGTERM, "step": 0 if phase == "before" else 6}
    assert resume(tmp_path / "cut").status == "done"
    assert same(made / "run", tmp_path / "cut")


def test_a_finished_run_is_returned_at_once(made):
    watch = Signal()
    again = resume(made / "run", observers=[watch])
    assert (again.status, watch.phases) == ("done", [])
    assert again.summary["steps"] == 6
    assert again.screen()


def test_an_unverified_run_stays_unverified(made, tmp_path, monkeypatch):
    from deltatune.train import run as room
    from deltatune.train.verify import Check

    monkeypatch.setattr(room.verify, "merges", lambda job: Check("merge", False, "seeded"))
    assert run(settings(made, "chat", "chat"), out=tmp_path / "run").status == "unverified"
    assert resume(tmp_path / "run").status == "unverified"


# ---- what is measured ------------------------------------------------------------------------------------------------
def test_without_evaluation_rows_the_training_loss_is_measured(made, tmp_path):
    done = run(t.config(made / "chat", str(made / "chat.jsonl")), out=tmp_path / "run")
    result = read(tmp_path / "run", "eval.json")
    assert (result["metric"], result["measured_on"], result["rows"]) == ("loss", "train", 24)
    assert result["after"]["loss"] < result["before"]["loss"]
    assert any("TRAINING rows" in note for note in done.summary["notes"])
    assert done.screen()


def test_other_sets_and_a_limit_on_rows(made, tmp_path):
    config = settings(made, "chat", "chat", eval={"rows": 3})
    config = config.model_copy(update={"data": config.data.model_copy(update={"ood": {"far": config.data.train}})})
    result = run(config, out=tmp_path / "run").summary
    assert result["eval_rows"] == 3
    assert result["ood"]["far"]["loss"] > 0
    assert "gap" in result["ood"]["far"]
    assert any("3 of 24 rows" in note for note in result["notes"])


def test_it_stops_early_with_the_best_weights(made, tmp_path):
    train = {"steps": 12, "lr": 0.5, "schedule": "constant", "eval_every": 1, "patience": 2}
    done = run(settings(made, "chat", "chat", train=train), out=tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["event"] == "eval"]
    assert done.summary["steps"] < 12
    assert done.summary["after"]["loss"] == pytest.approx(min(losses), rel=1e-6)
    assert min(losses) < losses[-1]


JOBS = {
    "text": ("chat", "text", {}),
    "t5": ("t5", "pair", {}),
    "padded": ("chat", "chat", {"train": ROWS}),
    "accumulated, clipped, neftune": ("chat", "chat", {"train": {"accumulate": 2, "clip": 0.1, "neftune": 5.0}}),
    "adafactor": ("chat", "chat", {"train": {"optimizer": "adafactor-relative"}}),
    "checkpointing": ("chat", "chat", {"train": {"checkpoint_gradients": "on", "deterministic": True}}),
    "ia3": ("chat", "chat", {"method": "ia3"}),
    "adapter": ("chat", "chat", {"method": "adapter"}),
    "prefix": ("chat", "chat", {"method": "prefix"}),
    "prompt": ("chat", "chat", {"method": "prompt"}),
    "union": ("chat", "chat", {"method": [{"lora": {}}, {"prefix": {"length": 3}}]}),
    "full": ("chat", "chat", {"method": "full", "train": {"lr": 1e-4}}),
    "freeze on t5": ("t5", "pair", {"method": {"freeze": {"last": 1}}, "train": {"lr": 1e-4}}),
    "prompt on t5": ("t5", "pair", {"method": "prompt"}),
    "classify": ("bert", "label", {"objective": "classify", "train": ROWS}),
    "classify, decoder": ("chat", "label", {"objective": "classify", "train": ROWS}),
    "classify, prompt": ("bert", "label", {"objective": "classify", "method": "prompt", "train": ROWS}),
    "classify, full": ("bert", "label", {"objective": "classify", "method": "full", "train": {**ROWS, "lr": 1e-4}}),
    "multi": ("bert", "multi", {"objective": "classify", "train": ROWS}),
    "regression": ("chat", "score", {"objective": "classify", "train": ROWS}),
    "classify, bitfit": ("bert", "label", {"objective": "classify", "method": "bitfit", "train": ROWS}),
    "cloze": ("bert", "label", {"objective": CLOZE, "train": ROWS}),
    "cloze, causal": ("chat", "label", {"objective": LETTERS, "train": ROWS}),
    "cloze, prompt": ("bert", "label", {"objective": CLOZE, "method": "prompt", "train": ROWS}),
}
METRIC = {"text": "perplexity", "multi": "f1_micro", "regression": "pearson"}


@pytest.mark.parametrize("name", JOBS)
def test_every_kind_of_run_is_verified_and_opens_again(made, tmp_path, name):
    model, rows, over = JOBS[name]
    done = run(settings(made, model, rows, **over), out=tmp_path / "run")
    assert done.status == "done", done.summary["failed"]
    before, after = done.summary["before"], done.summary["after"]
    assert before.keys() == after.keys()
    assert after["loss"] != before["loss"]
    assert resume(tmp_path / "run").summary["after"] == after
    opened, tokenizer, record = open_adapted(str(made / model), tmp_path / "run" / "adapter")
    section = Eval(max_new_tokens=8)
    found = evaluate_file(opened, tokenizer, record, str(made / f"{rows}-eval.jsonl"), section)
    assert found["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert {k: found[k] for k in after if k != "loss"} == pytest.approx({k: after[k] for k in after if k != "loss"})


@pytest.mark.parametrize(("model", "rows", "objective"), [("bert", "chat", "sft"), ("t5", "label", CLOZE)])
def test_what_cannot_work_is_refused_with_what_would(made, tmp_path, model, rows, objective):
    with pytest.raises(Refusal, match="objective"):
        run(settings(made, model, rows, objective=objective), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


REFUSED = [
    ({"train": {"patience": 2}}, "give train.eval_every too"),
    ({"train": {"precision": "fp32"}, "model": {"dtype": "bf16"}}, "mixed precision is not in this version"),
    ({"data": {"eval": ()}, "train": {"eval_every": 2}}, "give data.eval"),
    ({"objective": {"classify": {}}, "eval": {"shots": 2}}, "which only sft has"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_keys_that_cannot_be_honoured_are_refused(made, tmp_path, change, said):
    config = settings(made, "chat", "chat")
    for section, keys in change.items():
        new = keys if section == "objective" else getattr(config, section).model_copy(update=keys)
        config = config.model_copy(update={section: new})
    with pytest.raises(ValueError, match=said):
        run(config, out=tmp_path / "run")


def test_a_label_that_training_lacks_is_known_before_step_1(made, tmp_path):
    held = t.lines(tmp_path / "held.jsonl", [{"text": "the film", "label": "odd"}])
    config = t.config(made / "bert", str(made / "label.jsonl"), held, objective="classify", train=ROWS)
    with pytest.raises((BadRow, ValueError), match=r"unknown label 'odd'"):
        run(config, out=tmp_path / "run")


def test_recorded_labels_are_used_not_those_of_the_file(made, tmp_path):
    run(settings(made, "bert", "label", objective="classify", train=ROWS), out=tmp_path / "run")
    one = t.lines(tmp_path / "one.jsonl", [{"text": "the film was good", "label": "pos"}] * 3)
    opened = open_adapted(str(made / "bert"), tmp_path / "run" / "adapter")
    assert opened[2]["objective"]["classify"] == {"kind": "single", "labels": ["neg", "pos"]}
    assert evaluate_file(*opened, one, Eval())["rows"] == 3
    assert evaluate_file(*opened, one, Eval(rows=2))["rows"] == 2


def test_a_plan_says_what_a_run_would_do(made):
    said = plan(settings(made, "chat", "chat", train={"steps": None, "epochs": 2.0}))
    assert said["rows"] == 24
    assert said["steps"] > 10
    assert said["predicted_memory_bytes"]["total"] > said["predicted_memory_bytes"]["weights"] > 0


# ---- a model in memory -----------------------------------------------------------------------------------------------
def held(made: Path, model: str = "chat"):
    """(model, tokenizer) as a user holds them, without a name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(made / model)
    found.config._name_or_path = ""
    return found, AutoTokenizer.from_pretrained(made / model)


SHORT = {"steps": 4, "batch_tokens": 160, "retention": False, "max_new_tokens": 4, "lr": 5e-3}


def test_an_attached_adapter_is_trained_alone(made, tmp_path):
    model, tokenizer = held(made)
    attach(model, LoRA(r=2), name="math")
    attach(model, LoRA(r=4), name="other")  # this one is active now
    other = {k: v.clone() for k, v in model.named_parameters() if ".other." in k}
    given = {"data": made / "chat.jsonl", "eval": made / "chat-eval.jsonl", "tokenizer": tokenizer}
    before = model.config._attn_implementation, model.training
    done = deltatune.train(model, SFT(), adapter="math", out=tmp_path / "run", **given, **SHORT)
    assert done.status == "done"
    assert done.summary["after"]["loss"] < done.summary["before"]["loss"]
    assert (attached(model), known(model).active) == (("math", "other"), ("math",))
    assert all(torch.equal(v, dict(model.named_parameters())[k]) for k, v in other.items())
    assert any(p.any() for k, p in model.named_parameters() if "lora_B" in k and ".math." in k)
    assert (model.config._attn_implementation, model.training) == before
    again = deltatune.train(model, SFT(), adapter="math", out=tmp_path / "more", **given, **SHORT)  # it goes on
    assert again.summary["after"]["loss"] < done.summary["after"]["loss"]
    assert any(line.startswith("identity") for line in again.summary["unchecked"])


def test_mistakes_in_a_call_are_named(made, tmp_path):
    model, tokenizer = held(made)
    attach(model, LoRA(r=2), name="math")
    data = str(made / "chat.jsonl")
    with pytest.raises(ValueError, match=r"keyword 'epoch'.*epochs"):
        deltatune.train(model, SFT(), data=data, adapter="math", epoch=1)
    with pytest.raises(ValueError, match="Did you mean 'math'"):
        deltatune.train(model, SFT(), data=data, adapter="maths")
    with pytest.raises(ValueError, match=r"tokenizer=AutoTokenizer"):
        deltatune.train(model, SFT(), data=data, adapter="math", out=tmp_path / "run")
    rows = str(made / "label.jsonl")
    with pytest.raises(Refusal, match="task head"):
        deltatune.train(model, Classify(), data=rows, adapter="math", tokenizer=tokenizer, out=tmp_path / "run")
    options = {"data": data, "adapter": "math", "tokenizer": tokenizer, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match="asks for"):
        deltatune.train(model, SFT(), precision="bf16", **options)


def test_a_method_of_ones_own_trains_and_opens_again(made, tmp_path, monkeypatch):
    """Registered by a user's file, in no index."""
    from dataclasses import dataclass

    from deltatune import blocks
    from deltatune.core import registry

    monkeypatch.setattr(blocks, "REGISTERED", {**blocks.REGISTERED})

    @registry.method("own-lora", paper="0000.00000", kind="linear", mergeable=True)
    @dataclass(frozen=True)
    class OwnLoRA(LoRA):
        """LoRA under a name of one's own."""

    try:
        model, tokenizer = held(made)
        attach(model, OwnLoRA(r=2), name="own")
        given = {"data": made / "chat.jsonl", "tokenizer": tokenizer, "adapter": "own", "retention": False}
        done = deltatune.train(model, SFT(), out=tmp_path / "run", steps=2, batch_rows=4, **given)
        assert done.status == "done", done.summary["failed"]
        assert load(tmp_path / "run" / "config.yaml").config.parts[0][0] == "own-lora"
    finally:
        del registry.METHODS["own-lora"]


def test_a_cloze_runs_in_memory(made, tmp_path):
    model, tokenizer = held(made)
    attach(model, LoRA(r=2))
    goal = Cloze("{text} it was <mask>", {"pos": ["g"], "neg": ["b"]})
    given = {"data": made / "label.jsonl", "eval": made / "label-eval.jsonl", "tokenizer": tokenizer}
    done = deltatune.train(model, goal, out=tmp_path / "run", **given, steps=2, batch_rows=8, retention=False)
    assert done.status == "done"
    assert "accuracy" in done.summary["after"]
