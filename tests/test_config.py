"""The configuration tree: three spellings, familiar names, every problem with its line, a round trip."""

from pathlib import Path

import pytest

from deltatune import blocks
from deltatune.config import Config, ConfigError, Override, dump, load, resolve, schema
from deltatune.marks import read_text, read_value, to_yaml

INDEX = {
    "methods": {
        "lora": {
            "kind": "linear",
            "lr": 2e-4,
            "fields": {
                "r": {"type": "int", "default": 8},
                "alpha": {"type": "float", "default": 16.0},
                "dropout": {"type": "float", "default": 0.0},
                "targets": {"type": "tuple[str, ...]", "default": ["all"]},
            },
        },
        "bitfit": {"kind": "selective", "lr": 1e-3, "fields": {}},
        "adapter": {
            "kind": "adapter",
            "lr": 5e-4,
            "fields": {
                "bottleneck": {"type": "int"},
                "form": {"type": "Literal['sequential', 'parallel']", "default": "sequential"},
                "scale": {"type": "float | None", "default": None},
            },
        },
    },
    "presets": {"pair": {"kind": "preset", "method": [{"lora": {"r": 4}}, "bitfit"]}},
}
SMALL = {"model": "m", "data": "t.jsonl"}


@pytest.fixture(autouse=True)
def _index():
    with blocks.using(INDEX):
        yield


def fails(source, *sets) -> list[str]:
    """The lines of the error that a source raises."""
    with pytest.raises(ConfigError) as caught:
        load(source, [Override.parse(text) for text in sets])
    return [str(problem) for problem in caught.value.problems]


# ---- values ----------------------------------------------------------------------------------------------------------
VALUES = [
    ("3e-4", 3e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("010", 10), ("0x1F", 31), ("1_000", "1_000"),
    ("true", True), ("false", False), ("on", "on"), ("off", "off"), ("no", "no"), ("yes", "yes"), ("null", None),
    ("~", None), ("", None), ("2024-01-01", "2024-01-01"), ("12:30:45", "12:30:45"), ("[q, v]", ["q", "v"]),
    ("{a: 1e-3}", {"a": 1e-3}),
       ("1e-3x", "1e-3x"), ("e5", "e5"), ("'3e-4'", "3e-4"), ("a: b: c", "a: b: c"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_value_is_what_people_mean(text, value):
    found = read_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "word", ["3e-4", "on", "no", "true", "null", "~", "12:30:45", "2024-01-01", "010", "<<", "1_0"]
)
def test_a_word_is_written_so_that_it_stays_a_word(word):
    text = to_yaml({"a": word})
    assert read_text(text, "f")[0] == {"a": word}


def test_a_mapping_remembers_its_lines_and_merges_anchors():
    data, lines = read_text("a: &x {b: 1}\n\nc:\n  <<: *x\n  d: [1, 2]\n", "f.yaml")
    assert data == {"a": {"b": 1}, "c": {"b": 1, "d": [1, 2]}}
    assert lines["c", "d", 1] == "f.yaml:5"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)
)
BROKEN = [
    ("a: [1\nb: 2\n", "f:2: not YAML"),
    ("a: 1\nb: 2\na: 3\n", "f:3: a: given twice; keep one"),
    ("- 1\n", "f:1: a mapping of sections is wanted, not list"),
    ("? [a]\n: 1\n", "f:1: not YAML"),
    ("a: !!python/object/apply:os.system [ls]\n", "f:1: not YAML"),
    ("a: &a [*a]\n", "f:1: not YAML"),
    (BOMB, "nested too deeply or repeats itself"),
    ("a: 1\n---\nb: 2\n", "f:2: not YAML"),
    ("x" * 1_000_001, "at most 1000000"),
]


@pytest.mark.parametrize(("text", "said"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_named_with_its_line(text, said):
    with pytest.raises(ConfigError) as caught:
        read_text(text, "f")
    assert said in str(caught.value)


def test_files_that_cannot_be_read_say_why(tmp_path: Path):
    (tmp_path / "good.yaml").write_text("a: 1")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    assert "did you mean 'good.yaml'?" in fails(tmp_path / "god.yaml")[0]
    assert "config.yaml" in fails(tmp_path)[0]
    assert "not UTF-8 (byte 3)" in fails(tmp_path / "latin.yaml")[0]


# ---- the three spellings ---------------------------------------------------------------------------------------------
def test_yaml_flags_and_python_give_one_configuration(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "\ufeffmodel: {name: m}\nmethod: {lora: {r: 4}}\ndata: {train: [t.jsonl]}\ntrain: {lr: 3e-4, steps: 5}\n"
    )
    flags = ["model=m", "method={lora: {r: 4}}", "data=t.jsonl", "train.lr=3e-4", "train.steps=5"]
    python = Config(model="m", method={"lora": {"r": 4}}, data="t.jsonl", train={"lr": 3e-4, "steps": 5})
    assert load(path).config == python
    assert load(None, [Override.parse(flag) for flag in flags]).config == python
    assert python.parts == (("lora", {"r": 4}),)
    assert python.goal == ("sft", {})


METHODS = [
    ("lora", ({"lora": {}},)),
    ({"lora": None}, ({"lora": {}},)),
    ({"lora": {"targets": "q"}}, ({"lora": {"targets": ["q"]}},)),
    ({"lora": {"targets": ("q", "v")}}, ({"lora": {"targets": ["q", "v"]}},)),
    (["bitfit", {"lora": {"r": 2}}], ({"bitfit": {}}, {"lora": {"r": 2}})),
    ({"bitfit": {}, "lora": {}}, ({"bitfit": {}}, {"lora": {}})),
    ("pair", ({"lora": {"r": 4}}, {"bitfit": {}})),
]


@pytest.mark.parametrize(("given", "blocks_"), METHODS)
def test_every_spelling_of_a_method_is_one_list(given, blocks_):
    assert Config(**SMALL, method=given).method == blocks_
    assert Config(**SMALL, adapter=given).method == blocks_


SECTIONS = [
    ({"data": {"train": "a", "ood": "x/far.jsonl"}}, "data", "ood", {"far": ("x/far.jsonl",)}),
    ({"data": {"train": "a", "columns": {"q": "prompt"}}}, "data", "columns", {"q": "prompt"}),
    ({"train": {"compile": True}}, "train", "compile", "on"),
    ({"train": {"checkpoint_gradients": False}}, "train", "checkpoint_gradients", "off"),
    ({"train": {"precision": "bfloat16"}}, "train", "precision", "bf16"),
    ({"output": "out"}, "output", "dir", "out"),
]


@pytest.mark.parametrize(("given", "section", "key", "value"), SECTIONS)
def test_short_spellings(given, section, key, value):
    assert getattr(getattr(Config(**{**SMALL, **given}), section), key) == value


# ---- familiar names --------------------------------------------------------------------------------------------------
FAMILIAR = [
    ("model_name_or_path", "m2", ("model", "name"), "m2"),
    ("base_model", "m2", ("model", "name"), "m2"),
    ("learning_rate", 1e-3, ("train", "lr"), 1e-3),
    ("per_device_train_batch_size", 4, ("train", "batch_rows"), 4),
    ("micro_batch_size", 4, ("train", "batch_rows"), 4),
    ("batch_size", 4, ("train", "batch_rows"), 4),
    ("cutoff_len", 99, ("train", "max_length"), 99),
    ("sequence_len", 99, ("train", "max_length"), 99),
    ("max_seq_length", 99, ("train", "max_length"), 99),
    ("max_length", 99, ("train", "max_length"), 99),
    ("num_train_epochs", 2, ("train", "epochs"), 2.0),
    ("num_epochs", 2, ("train", "epochs"), 2.0),
    ("epochs", 2, ("train", "epochs"), 2.0),
    ("max_steps", 7, ("train", "steps"), 7),
    ("max_steps", -1, ("train", "steps"), None),
    ("gradient_accumulation_steps", 3, ("train", "accumulate"), 3),
    ("gradient_checkpointing", True, ("train", "checkpoint_gradients"), "on"),
    ("bf16", True, ("train", "precision"), "bf16"),
    ("optim", "adamw_torch", ("train", "optimizer"), "adamw"),
    ("optim", "paged_adamw_32bit", ("train", "optimizer"), "paged-adamw"),
    ("optim", "adamw_bnb_8bit", ("train", "optimizer"), "adamw-8bit"),
    ("optim", "adamw_anyprecision", ("train", "optimizer"), "adamw-bf16"),
    ("optimizer", "adamw_bf16", ("train", "optimizer"), "adamw-bf16"),
    ("optimizer", "adamw-bf16", ("train", "optimizer"), "adamw-bf16"),
    ("bf16_stochastic_round", True, ("train", "rounding"), "stochastic"),
    ("pure_bf16", True, ("train", "rounding"), "stochastic"),
    ("pure_bf16", False, ("train", "rounding"), "masters"),
    ("load_in_4bit", True, ("model", "quant"), "nf4"),
    ("quantization_bit", 4, ("model", "quant"), "nf4"),
    ("sample_packing", False, ("data", "packing"), "off"),
]


@pytest.mark.parametrize(("name", "value", "spot", "read"), FAMILIAR, ids=[row[0] for row in FAMILIAR])
def test_familiar_names_are_read_once_with_a_note(name, value, spot, read):
    tree = {**SMALL, name: value}
    if spot == ("model", "name"):
        del tree["model"]
    loaded = load(tree)
    assert getattr(getattr(loaded.config, spot[0]), spot[1]) == read
    assert loaded.notes == (() if read is None else (f"{name} is read as {'.'.join(spot)}",))


def test_a_preset_says_what_else_it_means():
    """QLoRA is LoRA and a 4-bit base; what the user says of the base goes first."""
    preset = {"kind": "preset", "model": {"quant": "nf4"}, "method": [{"lora": {"r": 64}}]}
    with blocks.using({**INDEX, "presets": {"qlora": preset}}):
        loaded = load({**SMALL, "method": "qlora"})
        assert loaded.config.model.quant == "nf4"
        assert loaded.config.method == ({"lora": {"r": 64}},)
        assert loaded.notes == ("qlora means model.quant: nf4",)
        assert load(SMALL, [Override.parse("method=qlora")]).config.model.quant == "nf4"
        again = load({"model": {"name": "m", "quant": "nf4"}, "data": "d", "method": ["qlora"]})
        assert (again.config.model.quant, again.notes) == ("nf4", ())
        off = load({**SMALL, "method": "qlora"}, [Override.parse("model.quant=off")])
        assert off.config.model.quant is None
        assert load({**SMALL, "method": "lora"}).config.model.quant is None
        assert load(dump(loaded.config)).config == loaded.config


LORA = [("lora_r", 4, "r", 4), ("r", 4, "r", 4), ("lora_rank", 4, "r", 4), ("lora_alpha", 2, "alpha", 2)]
LORA += [("lora_target", "all", "targets", ["all"]), ("lora_target", "q,v", "targets", ["q", "v"])]
LORA += [("target_modules", "all-linear", "targets", ["all"])]


@pytest.mark.parametrize(("name", "value", "field", "read"), LORA)
def test_familiar_lora_names(name, value, field, read):
    for tree in ({**SMALL, name: value}, {**SMALL, "method": {"lora": {name: value}}}):
        assert load(tree).config.parts[0][1][field] == read
    assert load(SMALL, [Override(name, value, f"--set {name}")]).config.parts[0][1][field] == read


def test_familiar_names_inside_a_section_and_twice():
    assert load({**SMALL, "train": {"num_train_epochs": 3}}).config.train.epochs == 3
    assert load({"model": "m", "data": {"train": "a", "max_length": 9}}).config.train.max_length == 9
    text = "model: m\ndata: a\nepochs: 3\ntrain:\n  epochs: 2\n"
    assert fails(text) == ["config:3: epochs: given twice: train.epochs is already 2 at config:5; drop one"]
    assert "the method is bitfit" in fails({**SMALL, "method": "bitfit", "lora_r": 3})[0]


# ---- problems --------------------------------------------------------------------------------------------------------
WRONG = [
    ("train: {lrr: 1}", "train.lrr: unknown key; train has lr, ", "(did you mean 'lr'?)"),
    ("methd: lora", "methd: unknown key; the top level has model, method, ", "(did you mean 'method'?)"),
    ("model: {name: m, lr: 1}", "model.lr: unknown key", "(it belongs to train.lr)"),
    ("train: {lr: fast}", "train.lr: 'fast': input should be a valid number", ""),
    ("train: {lr: .nan}", "train.lr: nan: ", "finite number"),
    ("train: {lr: 0}", "train.lr: 0: input should be greater than 0", ""),
    ("train: {seed: true}", "train.seed: True: a number is wanted", ""),
    ("train: {precision: fp61}", "train.precision: 'fp61': input should be 'auto', 'fp32' or 'bf16'", "'fp32'"),
    ("train: {schedule: cosin}", "train.schedule: 'cosin'", "(did you mean 'cosine'?)"),
    ("train: [1]", "train: [1]: ", ""),
    ("method: lroa", "method.lroa: unknown (did you mean 'lora'?); there are lora, bitfit, adapter, pair", ""),
    ("method: {pair: {r: 4}}", "method.pair: a preset, which takes no fields: write its name, or [{'lora': ", ""),
    ("method: {lora: {rr: 4}}", "method.lora.rr: unknown field; lora has r, alpha, dropout, targets", "'r'"),
    ("method: {lora: {r: 4.5}}", "method.lora.r: 4.5: int is wanted", ""),
    ("method: {lora: {r: true}}", "method.lora.r: True: int is wanted", ""),
    ("method: {adapter: {bottleneck: 4, form: up}}", "method.adapter.form: 'up': sequential | parallel is wanted", ""),
    ("method: adapter", "method.adapter: bottleneck must be given (int)", ""),
    ("method: []", "method: no method given", "lora, bitfit"),
    ("method: [3]", "method: 3: a method is a name", ""),
    ("objective: sff", "objective.sff: unknown (did you mean 'sft'?); there are sft, classify, cloze, tag, qa", ""),
    (
        "objective: {cloze: {template: nothing}}",
        "objective.cloze.template: template 'nothing' needs exactly one <m",
        "",
    ),
    ("objective: {sft: {template: '{prompt} <mask>'}}", "objective.sft.template: template", "leave <mask> out"),
    ("objective: {dpo: {beta: 1}}", "objective: 'dpo' is not in this version; there are sft, classify, cloze, tag", ""),
    ("objective: {sft: {}, cloze: {}}", "one objective", ""),
    ("objective: {classify: {kind: many}}", "objective.classify.kind: 'many': auto | single", ""),
    ("strategy: {stages: []}", "strategy: strategies are not in this version", "data.train"),
    ("model: {name: m, quant: nf5}", "model.quant: 'nf5': input should be 'nf4'", "(did you mean 'nf4'?)"),
    ("load_in_8bit: true", "model.quant: 'int8': input should be 'nf4'", ""),
    ("data: {train: a, format: alpacca}", "data.format: 'alpacca': choose auto, ", "(did you mean 'alpaca'?)"),
    ("data: {train: a, columns: 3}", "data.columns: 3: give {your column: known name}", ""),
]


@pytest.mark.parametrize(("line", "said", "way"), WRONG, ids=[row[0] for row in WRONG])
def test_a_problem_has_its_line_and_the_way_out(line, said, way):
    key = line.partition(":")[0]
    rest = "".join(f"{k}: {v}\n" for k, v in SMALL.items() if k != key)
    (problem,) = fails(f"{rest}\n{line}\n")
    assert problem.startswith(f"config:{rest.count(chr(10)) + 2}: ")
    assert said in problem
    assert way in problem


def test_every_problem_is_said_at_once():
    text = "train:\n  lrr: 1\n  steps: 3\n  epochs: 2\nmethod: lroa\nlog: {evry: 1}\n"
    found = fails(text)
    assert [problem.split(": ")[:2] for problem in found] == [
        ["config:3", "train.steps"],
        ["config:5", "method.lroa"],
        ["data.train", "must be given (--data FILE)"],
        ["model", "must be given (--model REF)"],
        ["config:2", "train.lrr"],
        ["config:6", "log.evry"],
    ]
    assert "given with train.epochs (config:4); drop one" in found[0]


def test_python_hears_the_same_problems():
    with pytest.raises(ValueError, match="did you mean 'lr'"):
        Config(**SMALL, train={"lrr": 1})
    with pytest.raises(ConfigError, match=r"drop one: batch_tokens counts tokens"):
        Config(**SMALL, train={"batch_tokens": 9, "batch_rows": 9})


# ---- overrides -------------------------------------------------------------------------------------------------------
TEXT = "model: {name: m, dtype: fp32}\ndata: a\nmethod: [bitfit, {lora: {r: 4}}]\ntrain:\n  epochs: 2\n"
OVERRIDES = [
    ("model=n", lambda c: (c.model.name, c.model.dtype), ("n", "fp32")),
    ("train.lr=3e-4", lambda c: c.train.lr, 3e-4),
    ("train.epochs=null", lambda c: c.train.epochs, None),
    ("train.steps=9", lambda c: (c.train.steps, c.train.epochs), (9, None)),
    ("method.lora.r=2", lambda c: c.parts, (("bitfit", {}), ("lora", {"r": 2}))),
    ("method.1.lora.targets=q", lambda c: c.parts[1][1], {"r": 4, "targets": ["q"]}),
    ("adapter.lora.r=2", lambda c: c.parts[1][1], {"r": 2}),
    ("lora_r=2", lambda c: c.parts[1][1], {"r": 2}),
    ("method=bitfit", lambda c: c.parts, (("bitfit", {}),)),
    ("objective.cloze.template={text} <mask>", lambda c: c.goal, ("cloze", {"template": "{text} <mask>"})),
    ("objective=classify", lambda c: c.goal, ("classify", {})),
    ("seed=5", lambda c: c.train.seed, 5),
    ("train.learning_rate=1e-2", lambda c: c.train.lr, 1e-2),
    ("data=[b, c]", lambda c: c.data.train, ("b", "c")),
    ("output=o", lambda c: c.output.dir, "o"),
]


@pytest.mark.parametrize(("text", "look", "value"), OVERRIDES, ids=[row[0] for row in OVERRIDES])
def test_flags_win_over_the_file(text, look, value):
    assert look(load(TEXT, [Override.parse(text)]).config) == value


def test_an_override_says_what_it_replaced_and_is_named_in_errors():
    assert load(TEXT, [Override.parse("train.steps=9")]).notes == (
        "--set train.steps: train.steps replaces train.epochs (config:5)",
    )
    assert fails(TEXT, "train.lr=fast")[0].startswith("--set train.lr: train.lr: 'fast'")
    assert fails(TEXT, "train.lrr=1")[0].startswith("--set train.lrr: train.lrr: unknown key")
    assert "drop one" in fails(TEXT, "train.steps=1", "train.epochs=1")[0]
    assert "name it too (--method adapter)" in fails(TEXT, "method.adapter.form=parallel")[0]
    assert "which has no keys" in fails(TEXT, "train.lr=1", "train.lr.x=1")[0]
    with pytest.raises(ConfigError, match=r"--set: 'a' is not a\.b=value"):
        Override.parse("a")


# ---- resolved, written, described ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "method": "pair",
            "objective": {"cloze": {"labels": {"no": ["bad"], 1: ["good"]}, "template": "{text}: <mask>"}},
        },
        {
            "train": {"steps": 3, "batch_rows": 2, "lr": 1e-5},
            "data": {"train": ["a", "on"], "columns": ["text", "label"]},
        },
        {"method": {"lora": {"targets": ("q", "on", "3e-4")}}, "train": {"compile": True}},
    ],
    ids=range(4),
)
def test_a_resolved_configuration_is_written_and_read_back_equal(more):
    config = resolve(Config(**{**SMALL, **more})).config
    assert load(dump(config)).config == config
    assert resolve(config).chosen == ()


def test_what_was_left_open_is_chosen_and_said():
    resolved = resolve(Config(**SMALL, method="pair"))
    assert resolved.chosen == ("lr 0.0002 (the default of lora)", "epochs 1", "batch_tokens 2048")
    assert resolved.config.parts == (
        ("lora", {"r": 4, "alpha": 16.0, "dropout": 0.0, "targets": ["all"]}),
        ("bitfit", {}),
    )
    assert resolve(Config(**SMALL, method="bitfit", objective="classify")).chosen[::2] == (
        "lr 0.001 (the default of bitfit)",
        "batch_rows 16",
    )


def test_the_schema_knows_every_section_and_method():
    tree = schema()
    assert list(tree["properties"]) == [
        "model", "method", "presets", "objective", "data", "strategy", "train", "eval", "output", "log",
    ]  # fmt: skip
    lora = tree["properties"]["method"]["anyOf"][0]["properties"]["lora"]
    assert lora["properties"]["r"] == {"type": "integer", "default": 8}
    assert lora["additionalProperties"] is False
    assert tree["properties"]["method"]["anyOf"][3] == {"enum": ["lora", "bitfit", "adapter", "pair"]}
    assert tree["$defs"]["Train"]["properties"]["lr"]["description"].startswith("Peak learning rate")
    assert tree["$defs"]["Train"]["additionalProperties"] is False


def test_the_packaged_index_serves_its_own_defaults():
    token = blocks.INDEX.set(None)
    try:
        for name in [*blocks.methods(), *blocks.presets()]:
            config = resolve(Config(**SMALL, method=name)).config
            assert load(dump(config)).config == config
    finally:
        blocks.INDEX.reset(token)
