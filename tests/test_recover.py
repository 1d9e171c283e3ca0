"""The recovery harness: a store that goes on where it stopped, a table from the store alone, failures called so."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import yaml

import recover_sets
import tiny_run as t
from deltatune.core.registry import METHODS, PRESETS

ROOT = Path(__file__).parents[1]
found = importlib.util.spec_from_file_location("recover", ROOT / "benchmarks" / "recover.py")
recover = importlib.util.module_from_spec(found)
sys.modules["recover"] = recover
found.loader.exec_module(recover)

TRAIN = {"steps": 20, "batch_rows": 8, "schedule": "constant", "warmup": 0}


def rows(path, count, seed):
    """The word that decides among words that do not."""
    draw, made = random.Random(seed), {}
    while len(made) < count:
        label = draw.choice(("pos", "neg"))
        word = {"pos": "great", "neg": "terrible"}[label]
        said = [draw.choice(("it", "was", "the", "film", "a", "plot")) for _ in range(4)]
        made[" ".join([*said, word])] = label
    return t.lines(path, [{"text": text, "label": label} for text, label in made.items()])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A task on a tiny BERT: heads that cannot learn, adapters that can, and adapters that cannot."""
    folder = tmp_path_factory.mktemp("recover")
    t.masked_model(folder / "model")
    for seed, (name, count) in enumerate({"train": 64, "dev": 20, "test": 60}.items()):
        rows(folder / f"{name}.jsonl", count, seed)
    task = {
        "base": str(folder / "model"),
        "rows": {"make": "given", "train": 64, "dev": 20, "test": 60},
        "objective": "classify",
        "metric": "accuracy",
        "train": TRAIN,
    }
    methods = {
        "head": {"tasks": ["tiny"], "method": "head", "lr": [1e-7], "by_task": True},
        "learns": {"tasks": ["tiny"], "method": {"full": {}}, "lr": [1e-7, 5e-3]},
        "stuck": {"tasks": ["tiny"], "method": "pfeiffer", "lr": [1e-7]},
        "missing": {"open": "no checkpoint"},
    }
    (folder / "what.yaml").write_text(yaml.safe_dump({"tasks": {"tiny": task}, "methods": methods}))
    return folder


def call(place, *more, store="store.jsonl"):
    recover.main(["--data", str(place), "--what", str(place / "what.yaml"), "--store", str(place / store), *more])


def table(place, capsys, store="store.jsonl"):
    capsys.readouterr()
    recover.main(["--table", "--what", str(place / "what.yaml"), "--store", str(place / store)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def ran(place):
    call(place)
    return place


def test_a_method_that_learns_recovers_and_one_that_does_not_is_told(ran, capsys):
    told = table(ran, capsys)
    assert told["learns"]["lr"] == "0.005"  # the dev split chose it
    assert told["learns"]["recovered"] == "yes"
    assert told["stuck"]["recovered"] == "NO"
    assert told["head"]["untuned"].endswith("(the commonest class)")
    assert told["missing"]["recovered"] == "open: no checkpoint"


def test_a_finished_run_is_not_run_again(ran, monkeypatch):
    monkeypatch.setattr(recover, "trained", lambda *_: pytest.fail("a run of the store was run again"))
    monkeypatch.setattr(recover, "untuned", lambda *_: pytest.fail("a run of the store was run again"))
    call(ran)


def copied(ran, name, text):
    (ran / name).write_text(text)
    return name


def test_what_a_killed_process_left_is_run_again_and_comes_out_alike(ran):
    lines = (ran / "store.jsonl").read_text().splitlines(keepends=True)
    name = copied(ran, "cut.jsonl", "".join(lines[:-1]) + lines[-1][:40])
    call(ran, store=name)
    again = [json.loads(line) for line in (ran / name).read_text().splitlines()]
    before = [json.loads(line) for line in lines]
    timed = ("train_s", "train_cpu_s", "wall_s")
    assert [{k: v for k, v in line.items() if k not in timed} for line in again] == [
        {k: v for k, v in line.items() if k not in timed} for line in before
    ]


def test_no_run_begins_when_the_time_is_up(ran, monkeypatch, capsys):
    lines = (ran / "store.jsonl").read_text().splitlines(keepends=True)
    name = copied(ran, "short.jsonl", "".join(line for line in lines if '"stuck"' not in line))
    monkeypatch.setattr(recover, "trained", lambda *_: pytest.fail("the time was up"))
    call(ran, "--hours", "0", store=name)
    assert table(ran, capsys, name)["stuck"]["recovered"] == "open"


def test_another_recipe_is_another_run(ran):
    what = yaml.safe_load((ran / "what.yaml").read_text())
    cell = recover.Cell("sweep", "learns", "tiny", 5e-3, 0)
    assert recover.Store(ran / "store.jsonl", what).get(cell)
    what["tasks"]["tiny"]["train"] = {**TRAIN, "steps": 21}
    assert recover.Store(ran / "store.jsonl", what).get(cell) is None


def line(store, cell, bits):
    store.add(
        cell, {"value": bits.count("1") / len(bits), "bits": f"{int(bits, 2):x}", "count": len(bits), "rows": "r"}
    )


def test_a_rate_that_comes_apart_on_another_seed_is_given_up(tmp_path):
    """0.1 leads after one seed and falls to a mean below 0.01's one run, which then must show its own other seeds."""
    what = {
        "tasks": {"a": {"metric": "accuracy"}},
        "methods": {"m": {"tasks": ["a"], "method": "lora", "lr": [0.01, 0.1]}},
    }
    store, asked = recover.Store(tmp_path / "s.jsonl", what), []
    scores = {(0.01, 0): "1110", (0.1, 0): "1111", (0.1, 1): "1111", (0.1, 2): "0000", (0.01, 1): "1110"}
    for cell in recover.wanted(store, "m"):
        asked.append((cell.phase, cell.lr, cell.seed))
        if cell.phase == "sweep" and store.get(cell) is None:
            line(store, cell, scores.get((cell.lr, cell.seed), "1100"))
    swept = [key[1:] for key in dict.fromkeys(asked) if key[0] == "sweep"]
    assert swept == [(0.01, 0), (0.1, 0), (0.1, 1), (0.1, 2), (0.01, 1), (0.01, 2)]
    assert asked[-3:] == [("test", 0.01, seed) for seed in recover.SEEDS]  # 0.667 over 0.667: the first of the two
    assert recover.swept(store, "m", "a") == "0.01: 0.667 (of 3), 0.1: 0.667 (of 3)"


@pytest.mark.parametrize(
    ("right", "holds"),
    [
        # untuned: 0 of 40 rows; tuned: the same k rows in every seed, which count once, not three times
        ("1" * 20 + "0" * 20, True),
        ("1" * 1 + "0" * 39, False),
        ("1" * 8 + "0" * 32, True),
    ],
)
def test_the_interval_is_over_rows_not_over_runs(place, tmp_path, right, holds):
    what = yaml.safe_load((place / "what.yaml").read_text())
    what["methods"]["learns"]["lr"] = [1.0]
    store = recover.Store(tmp_path / "s.jsonl", what)
    for seed in recover.SEEDS:
        line(store, recover.Cell("sweep", "head", "tiny", 1e-7, seed), "0")
        line(store, recover.Cell("sweep", "learns", "tiny", 1.0, seed), "1")
        line(store, recover.Cell("test", "head", "tiny", 1e-7, seed), "0" * 40)
        line(store, recover.Cell("test", "learns", "tiny", 1.0, seed), right)
    got = recover.recovery(recover.Store(tmp_path / "s.jsonl", what), "learns", "tiny")
    assert got.gain.value == right.count("1") / 40
    assert got.holds is holds
    share = got.gain.value  # three alike runs have the spread of one: binomial, n = 40
    wide = 2 * 1.96 * (share * (1 - share) / 40) ** 0.5
    assert got.gain.high - got.gain.low == pytest.approx(wide, rel=0.25)


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "pairs"),
    [
        ("accuracy", list("aabb"), list("abbb"), [[1, 1], [0, 1], [1, 1], [1, 1]]),
        ("accuracy", list("ba"), list("ab"), [[0, 1], [0, 1]]),
        ("span_f1", [("B-x", "O"), ("O", "O")], [("B-x", "O"), ("B-y", "I-y")], [[2, 2], [0, 1]]),
    ],
)
def test_rows_are_kept_compactly_and_come_back(metric, said, wanted, pairs):
    kept = recover.compact(metric, said, wanted)
    assert recover.expanded(kept).tolist() == pairs
    assert kept["value"] == pytest.approx(recover.find(metric).compute(said, wanted))


def test_sentences_end_at_blank_lines_with_a_tab_in_them_too():
    text = "We\tO\nin\tO\nBern\tB-location\n\t\nHi\tO\r\n\r\nAcme\tB-group,B-product\n"
    assert list(recover_sets.sentences(text)) == [
        {"tokens": ["We", "in", "Bern"], "tags": ["O", "O", "B-location"]},
        {"tokens": ["Hi"], "tags": ["O"]},
        {"tokens": ["Acme"], "tags": ["B-group"]},
    ]


def test_no_test_row_is_a_training_or_dev_row(tmp_path):
    for name in ("train", "dev"):
        t.lines(tmp_path / f"{name}.jsonl", [{"text": name, "label": "a"}])
    t.lines(tmp_path / "test.jsonl", [{"text": text, "label": "a"} for text in ("train", "dev", "new")])
    (tmp_path / "made").mkdir()
    recover_sets.splits({"rows": {"make": "given", "train": 9, "dev": 9, "test": 9}}, tmp_path, tmp_path / "made")
    assert [json.loads(x)["text"] for x in (tmp_path / "made" / "test.jsonl").read_text().splitlines()] == ["new"]


def test_more_rows_than_the_budget_are_refused(tmp_path):
    for name, count in (("train", 513), ("dev", 1), ("test", 1)):
        t.lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": "a"} for i in range(count)])
    with pytest.raises(ValueError, match="513 training rows; the budget is 512"):
        recover_sets.splits({"rows": {"make": "given", "train": 999, "dev": 1, "test": 1}}, tmp_path, tmp_path)


def test_the_untuned_model_has_the_best_of_its_prompts(tmp_path):
    """A causal base; words scored where they come, in plain text and in chat, and one prompt that cannot be asked."""
    t.chat_model(tmp_path / "model")
    for seed, name in enumerate(("train", "dev", "test")):
        rows(tmp_path / f"{name}.jsonl", 12, seed)
    words = {"pos": "a", "neg": "b"}
    task = {
        "base": str(tmp_path / "model"),
        "objective": {"cloze": {"template": "{text} <mask>", "labels": words}},
        "metric": "accuracy",
        "train": {"steps": 1, "batch_rows": 4},
        "prompts": [
            {"name": "plain", "template": "{text}", "labels": words, "chat": False},
            {"name": "chat, 2 shots", "template": "{text}", "labels": words, "shots": 2},
            {"name": "too much", "template": "{text}", "labels": words, "shots": 99},
        ],
    }
    told = recover.untuned(task, recover.Cell("base", "", "x", 1.0, 0), tmp_path)
    assert told["prompt"] in ("plain", "chat, 2 shots")
    assert set(told["skipped"]) == {"too much"}
    assert recover.expanded(told).shape == (12, 2)
    assert told["value"] == recover.expanded(told)[:, 0].mean()


# ---- what the repository holds ---------------------------------------------------------------------------------------
OURS = yaml.safe_load((ROOT / "benchmarks" / "recover.yaml").read_text(encoding="utf-8"))


def test_every_method_and_preset_is_in_the_table():
    blocks = [yaml.safe_dump(entry.get("method", "")) for entry in OURS["methods"].values()]
    named = " ".join(blocks).replace(":", " ").split()
    recipes = {name for name in PRESETS if name.endswith("-paper")}
    untold = {"tokens", "full", "gate", "adapter", "sparse", "lora-qv", "visual_prompt"}  # pictures: digits.py
    assert {*METHODS, *PRESETS} - {*named} <= untold | recipes


def test_a_learning_rate_is_called_ours_only_where_the_store_chose_it():
    store = recover.Store(recover.STORE, OURS)
    chosen: dict[str, set] = {}
    for name, entry in recover.entries(store).items():
        chosen.setdefault(recover.default_of(store, name), set()).update(
            recover.best_lr(store, name, task) for task in entry["tasks"]
        )
    told = {name: entry.lr for name, entry in METHODS.items() if "lr: swept" in entry.source}
    told |= {name: preset["swept"] for name, preset in PRESETS.items() if "swept" in preset}
    assert {name: lr for name, lr in told.items() if lr not in chosen.get(name, ())} == {}


def test_every_entry_says_whose_default_it_sweeps():
    store = recover.Store(recover.STORE, OURS)
    whose = {name: recover.default_of(store, name) for name in recover.entries(store)}
    assert {name: whose[name] for name in ("houlsby", "p-tuning", "lora", "mam", "diff-pruning", "unipelt")} == {
        "houlsby": "adapter", "p-tuning": "ptuning", "lora": "lora", "mam": "mam", "diff-pruning": "diffprune",
        "unipelt": "gate",
    }  # fmt: skip
    assert [name for name, found in whose.items() if not found and not name.startswith("bitfit-")] == []  # an ablation
    assert {*METHODS} - {*whose.values()} == {"full", "tokens", "visual_prompt"}


def test_defaults_are_shown_beside_the_finished_sweeps(place, tmp_path, monkeypatch, capsys):
    what = {
        "tasks": {"a": {"base": "x", "metric": "accuracy"}, "b": {"base": "y", "metric": "accuracy"}},
        "methods": {
            "lora": {"tasks": ["a", "b"], "method": "lora", "lr": [1e-3, 3e-3]},
            "houlsby": {"tasks": ["a"], "method": "houlsby", "lr": [1e-3], "default_of": "adapter"},
            "mam-paper": {"tasks": ["a"], "method": "mam-paper", "lr": [1e-3]},
            "ia3": {"tasks": ["a", "b"], "method": "ia3", "lr": [3e-3]},
        },
    }
    assert recover.defaults(recover.Store(tmp_path / "s.jsonl", what)) == "no sweep is finished"
    store = recover.Store(tmp_path / "s.jsonl", what)
    for task in "ab":
        line(store, recover.Cell("sweep", "lora", task, 1e-3, 0), "0011")
    for seed in recover.SEEDS:
        for task in "ab":
            line(store, recover.Cell("sweep", "lora", task, 3e-3, seed), "0111")
        for name, lr in (("houlsby", 1e-3), ("mam-paper", 1e-3), ("ia3", 3e-3)):
            line(store, recover.Cell("sweep", name, "a", lr, seed), "1")
    monkeypatch.setattr(recover, "default_lr", {"lora": 1e-3, "adapter": 1e-3, "mam-paper": 5e-5}.__getitem__)
    (tmp_path / "what.yaml").write_text(yaml.safe_dump(what, sort_keys=False))
    capsys.readouterr()
    recover.main(["--defaults", "--what", str(tmp_path / "what.yaml"), "--store", str(tmp_path / "s.jsonl")])
    assert capsys.readouterr().out.splitlines() == [
        "lora: swept a 0.003, b 0.003; default of lora 0.001: DIFFERS",
        "houlsby: swept a 0.001; default of adapter 0.001: the same",
        "mam-paper: swept a 0.001; default of mam-paper 5e-05: a preset, which stays as it was published",
    ]


def test_a_preset_gives_a_sweep_its_method_and_base_but_not_its_training(tmp_path):
    task = {"base": "m", "objective": "sft", "train": {"steps": 3, "batch_rows": 4}}
    made = recover.settings(task, "qlora", recover.Cell("sweep", "qlora", "x", 1e-3, 0), tmp_path)
    assert (made.model.quant, made.parts[0][1]["r"]) == ("nf4", 64)
    assert (made.train.lr, made.train.batch_rows, made.train.clip, made.train.schedule) == (1e-3, 4, 1.0, "cosine")
    assert made.presets == ()


def test_the_page_shows_what_the_store_holds():
    page = (ROOT / "docs" / "evidence" / "methods.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- recover -->\n")[2].partition("\n<!-- /recover -->")[0]
    assert shown == recover.written(recover.Store(recover.STORE, OURS))
