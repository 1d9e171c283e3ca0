"""Recipes: what a preset says of a run, who goes first, and that methods, presets and pages tell the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny_run
from deltatune import about, blocks
from deltatune.cli import main
from deltatune.config import Config, ConfigError, Override, dump, load, recipes, resolve
from deltatune.core import registry
from deltatune.core.attach import attach, parameters
from deltatune.core.registry import METHODS, PRESETS, default_lr, rated, read_preset, sane_lr
from deltatune.methods import __main__ as writer
from models import tiny

SMALL = {"model": "m", "data": "t.jsonl"}


def call(*words: str):
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(config: Config) -> dict:
    """A run's learning rate, and what else its train section differs in from a run of lora that was given nothing."""
    plain = resolve(Config(**SMALL)).config.train
    found = resolve(config).config.train
    return {k: v for k, v in found.model_dump().items() if k == "lr" or v != getattr(plain, k)}


# ---- every method has its default, range, source and recipe ----------------------------------------------------------
RECIPES = {
    "adalora": "adalora-paper", "adapter": "houlsby-paper", "bitfit": "bitfit-paper", "diffprune": "diffprune-paper",
    "dora": "dora-paper", "freeze": "freeze-paper", "full": "full-paper", "gate": "unipelt-paper", "head": "head-paper",
    "ia3": "t-few-paper", "lora": "lora-paper", "prefix": "prefix-paper", "prompt": "prompt-paper",
    "ptuning": "ptuning-paper", "select": "select-paper", "sparse": "sparse-adapter-paper", "spottune": "spottune-full",
    "tokens": "", "visual_prompt": "visual_prompt-paper",
}  # fmt: skip


def test_every_method_has_a_recipe_that_holds_it():
    assert {name: entry.recipe for name, entry in METHODS.items()} == RECIPES
    for name, recipe in RECIPES.items():
        assert not recipe or name in [part.method_name for part in registry.build(recipe)], name
    assert [name for name, entry in METHODS.items() if bool(entry.recipe) != bool(entry.paper)] == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_whose_its_defaults_are(name):
    entry = METHODS[name]
    assert re.search(r"lr: (paper|swept|ours)", entry.source), entry.source
    low, high = entry.lr_range
    assert 0 < low <= entry.lr <= high < 1
    if "lr: paper" in entry.source:
        assert entry.lr == default_lr(entry.recipe)


def test_the_table_of_defaults_and_the_methods_are_one():
    assert set(registry.DEFAULTS) == set(METHODS)
    for file in Path(registry.HOME / "methods").glob("*.py"):
        assert not re.search(r"@method\([^)]*\blr=", file.read_text()), f"{file.name} has a second default"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_a_learning_rate_or_says_that_it_has_none(name):
    left_out = re.search("part of (it|this)", PRESETS[name]["note"]) is not None
    assert ("lr" in PRESETS[name].get("train", {})) is not left_out
    assert sane_lr(name, default_lr(name)) is None


def test_houlsbys_recipe_draws_as_its_repository():
    """modeling.py of google-research/adapter-bert: a normal of 1e-3, cut at two deviations; the paper says 1e-2."""
    torch.manual_seed(0)
    drawn = {}
    for name in ("houlsby-paper", "houlsby"):
        model = attach(tiny("bert"), registry.build(name)[0])
        drawn[name] = torch.cat(
            [p.detach().flatten() for n, p in parameters(model, "default").items() if "down.w" in n]
        )
    assert float(drawn["houlsby-paper"].abs().max()) <= 2e-3
    assert float(drawn["houlsby-paper"].std()) == pytest.approx(0.88e-3, rel=0.05)  # of a normal cut there
    assert float(drawn["houlsby"].std()) == pytest.approx(0.88e-2, rel=0.05)


def test_the_papers_unipelt_differs_in_its_prefix_alone():
    plain, paper = (registry.build(name)[0] for name in ("unipelt", "unipelt-paper"))
    assert (paper.of[0], paper.of[2]) == (plain.of[0], plain.of[2])
    assert (paper.of[1].length, paper.of[1].reparam, paper.of[1].hidden) == (10, "mlp", 512)
    assert (plain.of[1].length, plain.of[1].reparam) == (10, "none")
    assert "unipelt-paper" in PRESETS["unipelt"]["note"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-paper") or name == "spottune-full"])
def test_a_recipe_without_a_learning_rate_says_what_became_of_the_papers(name):
    if "lr" not in PRESETS[name].get("train", {}):
        assert re.search("does not carry over|which is not here", PRESETS[name]["note"]), name


# ---- learning rates --------------------------------------------------------------------------------------------------
RATES = [
    ("lora", 1e-5, "lr=1e-05 with lora: it will hardly move. lora is trained with 0.0001 to 0.005; 0.003 is a good"),
    ("LoRA", 3e-4, None),
    ("lora", 5e-2, "diverge"),
    ("prompt", 1e-3, "hardly move"),
    ("prompt", 0.3, None),
    ("full", 1e-3, "diverge"),
    ("ia3", 3e-3, None),
    ("bitfit", 1e-5, "hardly move"),
    ("head", 0.2, None),
    ("spottune", 1e-5, "hardly move"),
    ("spottune-full", 1e-5, None),
    ("pissa", 2e-5, None),
    ("pissa", 5e-3, "with pissa: it is likely to diverge"),
    ("qlora", 2e-4, None),
    ("mam", 5e-5, None),
    ("mam-paper", 5e-5, None),
    ("unipelt", 1e-5, "hardly move"),
    ("a method nobody knows", 1e9, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lr", "warning"), RATES)
def test_learning_rate_sanity(name, lr, warning):
    said = sane_lr(name, lr)
    assert (said is None) == (warning is None)
    assert warning is None or warning in said


@pytest.mark.parametrize(
    ("presets", "methods", "held_against"),
    [
        ((), ("lora", "prefix"), ["lora", "prefix"]),
        (("houlsby",), ("adapter",), ["adapter"]),  # no range of its own
        (("pissa",), ("lora",), ["pissa"]),
        (("mam",), ("prefix", "adapter", "ia3"), ["mam", "ia3"]),
    ],
)
def test_a_preset_with_a_range_of_its_own_stands_for_its_methods(presets, methods, held_against):
    assert rated(presets, methods) == held_against


# ---- naming a preset -------------------------------------------------------------------------------------------------
BATCH = {"batch_tokens": None}
NAMED = {  # method -> (train, objective, model.quant) where the user says nothing else
    "adapter": ({"lr": 1e-3}, "sft", None),
    "lora": ({"lr": 3e-3}, "sft", None),
    "houlsby": ({"lr": 1e-3}, "sft", None),  # a form: its training is the method's default
    "houlsby-paper": (
        {"lr": 3e-4, "epochs": 5.0, "batch_rows": 32, "schedule": "linear", "warmup": 0.1, **BATCH}, "sft", None),
    "lora-paper": (
        {"lr": 5e-4, "epochs": 30.0, "batch_rows": 16, "schedule": "linear", "warmup": 0.06, "weight_decay": 0.1,
         **BATCH},
        "sft", None),
    "qlora": ({"lr": 6e-3}, "sft", "nf4"),
    "qlora-paper": ({"lr": 2e-4, "batch_rows": 16, "schedule": "constant", "clip": 0.3, **BATCH}, "sft", "nf4"),
    "t-few": ({"lr": 3e-2, "batch_rows": 16, **BATCH}, "choice", None),
    "t-few-paper": (
        {"lr": 3e-3, "steps": 1000, "epochs": None, "batch_rows": 8, "optimizer": "adafactor", "schedule": "linear",
         "warmup": 60.0, **BATCH},
        "choice", None),
    "prompt-paper": (
        {"lr": 0.3, "steps": 30000, "epochs": None, "batch_rows": 32, "optimizer": "adafactor", "schedule": "constant",
         "warmup": 0.0, "weight_decay": 1e-5, **BATCH},
        "sft", None),
    "pissa-paper": ({"lr": 2e-5, "batch_rows": 128, **BATCH}, "sft", None),
    "norm-tuning": ({"lr": 4e-3}, "sft", None),  # no training of its own: the rate that was swept
    "full-paper": (
        {"lr": 2e-5, "epochs": 3.0, "batch_rows": 32, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.01,
         **BATCH},
        "sft", None),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_naming_a_preset_is_the_papers_settings(name):
    train, goal, quant = NAMED[name]
    if name == "adapter":
        assert resolve(Config(**SMALL, method=name)).config.train.lr == METHODS["adapter"].lr == 1e-3
    for config in (Config(**SMALL, method=name), load(SMALL, [Override.parse(f"method={name}")]).config):
        assert trained(config) == train
        assert (config.goal[0], config.model.quant) == (goal, quant)
        assert config.presets == ((name,) if name in PRESETS else ())
        again = load(dump(resolve(config).config)).config
        assert again == resolve(config).config  # a run's own file gives the run


OWN = [  # what the user gives beside `method: houlsby-paper` -> what holds
    ({"train": {"lr": 1e-2}}, {"lr": 1e-2, "epochs": 5.0}),
    ({"learning_rate": 1e-2}, {"lr": 1e-2, "epochs": 5.0}),
    ({"train": {"steps": 7}}, {"steps": 7, "epochs": None}),
    ({"max_steps": 7}, {"steps": 7, "epochs": None}),
    ({"train": {"batch_tokens": 512}}, {"batch_tokens": 512, "batch_rows": None}),
    ({"train": {"schedule": "cosine", "warmup": 0}}, {"schedule": "cosine", "warmup": 0.0, "lr": 3e-4}),
    ({"train": {"lr": None}}, {"lr": 1e-3}),  # null: the method's own
]


@pytest.mark.parametrize(("own", "holds"), OWN, ids=[json.dumps(own) for own, _ in OWN])
def test_a_users_own_value_wins(own, holds):
    tree = {**SMALL, "method": "houlsby-paper", **own}
    for config in (load(tree).config, Config(**tree)):
        found = resolve(config).config.train.model_dump()
        assert {k: found[k] for k in holds} == holds


@pytest.mark.parametrize(
    ("sets", "holds"),
    [
        (["train.lr=1e-2"], {"lr": 1e-2, "epochs": 5.0}),
        (["train.steps=7"], {"steps": 7, "epochs": None}),
        (["lr=1e-2", "method=pfeiffer-paper"], {"lr": 1e-2, "epochs": 30.0, "batch_rows": None}),
        (["method=adapter"], {"lr": 1e-3, "epochs": 1.0, "schedule": "cosine"}),
        (["method.adapter.bottleneck=8"], {"lr": 3e-4, "epochs": 5.0}),
    ],
)
def test_a_flag_wins_and_another_method_takes_its_recipe_with_it(sets, holds):
    loaded = load({**SMALL, "method": "houlsby-paper"}, [Override.parse(text) for text in sets])
    found = resolve(loaded.config).config.train.model_dump()
    assert {k: found[k] for k in holds} == holds


def test_a_preset_of_the_file_leaves_nothing_behind_when_a_flag_names_another_method():
    config = load({**SMALL, "method": "qlora"}, [Override.parse("method=lora")]).config
    assert (config.model.quant, config.presets, trained(config)) == (None, (), {"lr": 3e-3})


def test_what_comes_from_a_preset_is_said():
    said = "houlsby-paper means train.lr: 0.0003, train.batch_rows: 32, train.epochs: 5, train.schedule: linear, "
    said += "train.warmup: 0.1"
    assert load({**SMALL, "method": "houlsby-paper"}).notes == (said,)
    assert load(SMALL, [Override("method", "houlsby-paper", "--method")]).notes == (f"--method: {said}",)
    text = "model: m\ndata: t\nmethod: houlsby-paper\ntrain:\n  lr: 1e-2\n"
    assert load(text).notes[0].startswith("config:3: houlsby-paper means train.batch_rows: 32, train.epochs: 5")
    assert (
        load({**SMALL, "method": "t-few-paper"})
        .notes[0]
        .startswith("t-few-paper means objective: choice, train.lr: 0.003")
    )


def test_of_two_presets_the_first_has_its_way_and_the_other_is_told():
    loaded = load({**SMALL, "method": ["pfeiffer-paper", "bitfit-paper"]})
    assert (loaded.config.train.lr, loaded.config.train.epochs, loaded.config.train.batch_rows) == (1e-4, 30.0, 8)
    assert loaded.notes == (
        "pfeiffer-paper means train.lr: 0.0001, train.epochs: 30, train.schedule: linear",
        "bitfit-paper also means train.lr: 0.001, but pfeiffer-paper is named first",
        "bitfit-paper also means train.epochs: 16, but pfeiffer-paper is named first",
        "bitfit-paper means train.batch_rows: 8, train.clip: 1.0",
    )
    assert loaded.config.presets == ("pfeiffer-paper", "bitfit-paper")


def test_a_resolved_run_says_which_values_are_the_papers():
    config = resolve(Config(**SMALL, method="houlsby-paper", train={"epochs": 1})).config
    said = "as houlsby-paper (arXiv:1902.00751): train.lr 0.0003, train.batch_rows 32, train.schedule linear, "
    said += "train.warmup 0.1"
    assert recipes(config) == [said]
    assert recipes(resolve(Config(**SMALL, method="adapter")).config) == []


def test_an_unknown_preset_of_the_record_is_an_error():
    with pytest.raises(ConfigError, match=r"presets: 'houlsbi': no preset \(did you mean 'houlsby'\?\)"):
        Config(**SMALL, presets=["houlsbi"])


def test_the_command_line_says_where_the_settings_come_from(tmp_path):
    tiny_run.chat_model(tmp_path / "model")
    tiny_run.chat_rows(tmp_path / "rows.jsonl", 8)
    words = ["train", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--dry-run"]
    done = call(*words, "--method", "houlsby-paper", "--set", "train.epochs=1")
    assert done.exit_code == 0, done.output
    assert "--method: houlsby-paper means train.lr: 0.0003, train.batch_rows: 32," in done.stderr
    assert "lr: 0.0003\n" in done.stdout
    assert "presets:\n- houlsby-paper\n" in done.stdout
    assert "chosen: lr 0.001 (the default of adapter)" in call(*words, "--method", "adapter").stderr


def test_a_run_keeps_where_its_settings_come_from(tmp_path):
    from deltatune.train.run import run

    tiny_run.chat_model(tmp_path / "model")
    tiny_run.chat_rows(tmp_path / "rows.jsonl", 8)
    files = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
    train = {"steps": 2, "batch_tokens": 160, "max_length": 128, "precision": "fp32", "lr": 2e-5}
    run(Config(**files, method="pissa-paper", train=train, eval={"retention": False}), out=tmp_path / "run")
    kept = load(tmp_path / "run" / "config.yaml").config
    assert (kept.presets, kept.train.lr, kept.train.steps) == (("pissa-paper",), 2e-5, 2)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "as pissa-paper (arXiv:2404.02948): train.lr 2e-05, train.schedule cosine, train.warmup 0.03" in report
    assert "| learning rate | ok |" in report or "hardly move" not in report  # lora's range would warn


# ---- bad presets -----------------------------------------------------------------------------------------------------
BAD = [
    ("method: [lora]\ntrain: {lrr: 1e-3}\n", "bad.yaml:2: train.lrr: unknown key", "did you mean 'lr'"),
    ("method: [lora]\ntrain:\n  lr: fast\n", "bad.yaml:3: train.lr: 'fast'", "valid number"),
    ("method: [lora]\ntrain: {schedule: cosin}\n", "bad.yaml:2: train.schedule: 'cosin'", "did you mean 'cosine'"),
    ("method: [lora]\ntrain: {steps: 3, epochs: 1}\n", "bad.yaml:2: train.steps", "drop one"),
    ("method: [lroa]\n", "bad.yaml:1: method.lroa: unknown", "did you mean 'lora'"),
    ("note: x\nmethod:\n  - lora: {alpa: 3}\n", "bad.yaml:3: method.lora.alpa", "'alpha'"),
    ("method: [lora]\nobjective: choise\n", "bad.yaml:2: objective.choise", "did you mean 'choice'"),
    ("method: [lora]\nmodel: {quant: int3}\n", "bad.yaml:2: model.quant: 'int3'", "nf4"),
    ("method: [lora]\ntrian: {lr: 1e-3}\n", "bad.yaml:2: trian: unknown; a preset has note, paper,", "'train'"),
    ("note: nothing\n", "bad.yaml: method: must be given", ""),
    ("method: [lora]\ntrain: {lr: 1e-3, lr: 1e-2}\n", "bad.yaml:2: train.lr: given twice", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "where", "nearest"), BAD, ids=[text.replace("\n", " ") for text, _, _ in BAD])
def test_a_bad_preset_is_named_with_file_line_and_nearest(tmp_path, text, where, nearest):
    (tmp_path / "bad.yaml").write_text(text)
    said = "\n".join(map(str, writer.check(tmp_path / "bad.yaml"))).replace(f"{tmp_path}/", "")
    assert where in said
    assert nearest in said


def test_a_good_preset_is_read(tmp_path):
    (tmp_path / "good.yaml").write_text("method: [lora]\ntrain: {lr: 3e-4}\n")
    assert writer.check(tmp_path / "good.yaml") == []
    assert read_preset(tmp_path / "good.yaml") == {"method": ["lora"], "train": {"lr": 3e-4}}


def test_a_preset_that_slipped_in_is_an_error_of_the_run_that_names_it():
    entries = {**blocks.packaged(), "presets": {"odd": {"kind": "preset", "method": ["lora"], "train": {"lrr": 1e-3}}}}
    with blocks.using(entries), pytest.raises(ConfigError, match=r"train.lrr: unknown key.*did you mean 'lr'"):
        load({**SMALL, "method": "odd"})


# ---- deltatune methods NAME ------------------------------------------------------------------------------------------
def test_one_method_on_one_page():
    text = " ".join(call("methods", "lora").stdout.split())
    for said in (
        "lora linear, arXiv:2106.09685", "A low-rank update beside each target layer.", "r 8 (int)",
        "targets ['all'] (tuple[str, ...])", "learning rate 0.003; a run is warned outside 0.0001 to 0.005",
        "source r: paper, table 9;", "paper's recipe lora-paper: the paper's LoRA as published for RoBERTa-base",
        '{"lora": {"alpha": 8, "init": "gaussian", "r": 8, "targets": ["q", "v"]}}',
        "settings lr 0.0005, batch_rows 16, epochs 30, schedule linear, warmup 0.06, weight_decay 0.1",
        "merges yes", "peft type LORA", "presets lora-paper, lora-plus, lora-qv, olora, pissa, pissa-paper, qlora, "
        "qlora-paper, rslora",
    ):  # fmt: skip
        assert said in text, said
    assert "parameters" not in text.replace("Parameters: r (d_in", "")


def test_one_preset_on_one_page():
    text = " ".join(call("methods", "t-few-paper").stdout.split())
    assert "t-few-paper preset, arXiv:2205.05638" in text
    assert "settings lr 0.003, batch_rows 8, optimizer adafactor, schedule linear, steps 1000, warmup 60, " in text
    assert "objective choice" in text


def test_one_method_as_json_and_on_a_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    found = json.loads(call("methods", "adapter", "--json").stdout)
    assert (found["lr"], found["lr_range"], found["recipe"]) == (1e-3, [5e-5, 1e-2], "houlsby-paper")
    assert found["paper_recipe"]["train"] == PRESETS["houlsby-paper"]["train"]
    assert "parallel-adapter" in found["presets"]
    assert "parameters" not in found
    found = json.loads(call("methods", "ia3", "--json", "--model", tmp_path).stdout)
    assert found["parameters"] == 2 * (16 + 16 + 48)
    assert "160 parameters; 2 self_attn.k_proj" in " ".join(call("methods", "ia3", "--model", tmp_path).stdout.split())
    assert "refused: BitFit" in " ".join(call("methods", "bitfit", "--model", tmp_path).stdout.split())
    mam = json.loads(call("methods", "mam-paper", "--json").stdout)
    assert (mam["lr"], mam["lr_range"], mam["source"], mam["peft"]) == (5e-5, [1e-5, 5e-3], "lr: paper", None)
    assert json.loads(call("methods", "pissa", "--json").stdout)["peft"] == "LORA"  # one method, saved as its own


@pytest.mark.parametrize(
    ("word", "near"), [("lroa", "'lora'"), ("houlsbi", "'houlsby'"), ("lora-papr", "'lora-paper'"), ("zzz", "")]
)
def test_an_unknown_name_is_answered_with_the_nearest(word, near):
    done = call("methods", word)
    assert done.exit_code == 2
    assert f"no method or preset {word!r}" in done.stderr
    assert (f"did you mean {near}" in done.stderr) == bool(near)
    assert json.loads(call("methods", word, "--json").stdout)["error"]["exit_code"] == 2


def test_the_list_has_rates_and_recipes():
    records = {record["name"]: record for record in json.loads(call("methods", "--json").stdout)}
    assert {name: records[name]["recipe"] for name in METHODS} == RECIPES
    assert [name for name, record in records.items() if not record["source"] or len(record["lr_range"]) != 2] == []


# ---- pages and index -------------------------------------------------------------------------------------------------
def test_index_and_pages_are_the_registrys(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["methods", "--check"])
    assert writer.main() == 0, capsys.readouterr().err
    for name in METHODS:
        text = (writer.PAGES / f"{name}.md").read_text()
        assert text.count(about.sourced(name)) == 1, name


def test_a_page_of_yesterday_is_stale(capsys, monkeypatch, tmp_path):
    page = tmp_path / "lora.md"
    page.write_text("# LoRA\n\n<!-- registry -->\nold\n<!-- /registry -->\n\n## Cost\n")
    monkeypatch.setattr(writer, "PAGES", tmp_path)
    monkeypatch.setattr("sys.argv", ["methods", "--check"])
    assert writer.main() == 1
    assert "lora.md is stale" in capsys.readouterr().err
    assert (
        writer.pages()[page] == f"# LoRA\n\n<!-- registry -->\n{about.sourced('lora')}\n<!-- /registry -->\n\n## Cost\n"
    )
