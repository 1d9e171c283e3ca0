"""Asked as trained: several soft prompts answer as one, a run's template, prompts of each task; from Python and CLI."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny_run as t
from conformance import stir
from deltatune import SFT, Choice, LoRA, Prompt, attach, disabled, load, rows, save, train, virtual_ids
from deltatune.cli import main
from deltatune.commands.chat import Voice, speaker
from deltatune.data.example import Example
from deltatune.data.problems import BadRow
from deltatune.evaluate.generate import Decoding, answers, generate, stream
from deltatune.evaluate.score import predict as measured
from deltatune.train.job import prepare
from deltatune.train.run import open_adapted, run
from models import tiny
from test_generate import PROMPTS, TOK

SIX = Decoding(max_new_tokens=6)


def three(family: str = "llama", combine: str = "average", seed: int = 0):
    """A model with three prompts that differ much."""
    torch.manual_seed(0)
    model = attach(tiny(family), Prompt(2, count=3, combine=combine))
    stir(model, "default", seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def ids_by_hand(model, text: str, steps: int) -> list[int]:
    """Greedy decoding without a cache: each step the mean of the three prompts' probabilities, in float64."""
    first, said = virtual_ids(model), []
    asked = TOK(text)["input_ids"]
    stops = {model.config.eos_token_id, TOK.eos_token_id}
    for _ in range(steps):
        with torch.no_grad():
            each = [model(torch.tensor([[i + 2 * k for i in first] + asked + said])).logits[0, -1] for k in range(3)]
        token = int(torch.stack(each).double().softmax(-1).mean(0).argmax())
        if token in stops:
            break
        said.append(token)
    return said


# ---- several prompts -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_average_is_the_mean_of_next_token_probabilities_in_one_batch(family):
    model = three(family)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    found = answers(model, TOK, PROMPTS, SIX)
    assert max(seen) == 3 * len(PROMPTS)  # rows times prompts
    wanted = [TOK.decode(ids_by_hand(model, p, 6), skip_special_tokens=True) for p in PROMPTS]
    assert found.texts == wanted
    assert ["".join(stream(model, TOK, p, SIX)) for p in PROMPTS] == wanted
    alone = [answers(model, TOK, PROMPTS, replace(SIX, prompt=k)).texts for k in range(3)]
    assert len({*map(tuple, alone), tuple(wanted)}) > 2  # the prompts disagree, or this could not fail
    assert found.tokens <= 6 * len(PROMPTS)


def test_vote_is_the_commonest_whole_answer_and_streams_it():
    model = three(combine="vote")
    alone = [answers(model, TOK, PROMPTS, replace(SIX, prompt=k)).texts for k in range(3)]
    wanted = [Counter(x.strip() for x in said).most_common(1)[0][0] for said in zip(*alone, strict=True)]
    assert [x.strip() for x in answers(model, TOK, PROMPTS, SIX).texts] == wanted
    assert "".join(stream(model, TOK, PROMPTS[0], SIX)).strip() == wanted[0]
    averaged = answers(model, TOK, PROMPTS, replace(SIX, combine="average")).texts
    assert averaged == answers(three(), TOK, PROMPTS, SIX).texts  # asked for, against the adapter's own word


@pytest.mark.parametrize("how", [{"temperature": 1.0, "top_k": 20, "top_p": 0.9}, {"beams": 3},
                                 {"repetition_penalty": 2.0}])  # fmt: skip
def test_prompts_stay_in_step_however_the_token_is_chosen(how, monkeypatch):
    model, seen = three(), []
    real = model.generate

    def watched(**given):
        seen.append(real(**given))
        return seen[-1]

    monkeypatch.setattr(model, "generate", watched)
    first = generate(model, TOK, PROMPTS, replace(SIX, **how))
    new = torch.cat([s[:, -4:] for s in seen])
    assert all(torch.equal(new[i], new[i + 1]) for i in range(0, len(new), 3))
    assert first == generate(model, TOK, PROMPTS, replace(SIX, **how))


def test_three_equal_prompts_are_the_one():
    model = three()
    with torch.no_grad():
        rows_ = next(p for p in model.parameters() if p.requires_grad)
        rows_.copy_(rows_[:2].repeat(3, 1))
    for how in ({}, {"beams": 2}):
        one = answers(model, TOK, PROMPTS, replace(SIX, prompt=1, **how)).texts
        assert answers(model, TOK, PROMPTS, replace(SIX, **how)).texts == one
        voted = answers(model, TOK, PROMPTS, replace(SIX, combine="vote", **how)).texts
        assert [x.strip() for x in voted] == [x.strip() for x in one]


WRONG = [
    ({"prompt": 3}, "prompt 3: there are 3, counted from 0; left out, they answer together"),
    ({"prompt": -1}, "a number from 0"),
    ({"combine": "mean"}, "average, vote"),
    ({"task": "sst"}, "no task 'sst': the active prompts are for any"),
]


@pytest.mark.parametrize(("how", "said"), WRONG)
def test_a_choice_that_there_is_none_of_is_an_error(how, said):
    with pytest.raises(ValueError, match=said):
        answers(three(), TOK, PROMPTS, replace(SIX, **how))


def test_two_adapters_with_unlike_numbers_of_prompts_do_not_answer_together():
    model = three()
    attach(model, Prompt(2, count=2), "other")
    from deltatune import activate

    activate(model, "default", "other")
    with pytest.raises(ValueError, match="default, other have prompts of unlike numbers"):
        answers(model, TOK, PROMPTS, SIX)
    with rows(model, ["default"] * len(PROMPTS)), disabled(model):
        assert answers(model, TOK, PROMPTS, SIX).texts == answers(tiny("llama"), TOK, PROMPTS, SIX).texts


def test_choices_of_several_prompts_are_combined_too(tmp_path):
    """One prediction a row, by the mean of the prompts' probabilities of the choices."""
    model, data = t.chat_model(tmp_path / "m"), t.label_rows(tmp_path / "rows.jsonl", 8)
    method = {"prompt": {"length": 2, "count": 3, "combine": "average"}}
    job = prepare(t.config(model, data, method=method, objective="choice"))
    stir(job.model, "default", 0)
    batch = job.batch(job.rows[:4])
    found = measured(job, job.train[:4])[0]
    objective: Choice = job.objective
    with torch.no_grad():
        values = objective.values(*objective.scores(job.model, batch))
    best = values.view(4, 3, -1).softmax(-1).mean(1).argmax(-1)
    assert found == [objective.classes[i] for i in best]


# ---- a template ------------------------------------------------------------------------------------------------------
TEMPLATE = "<soft:2>Q: {prompt}<soft> A:"
SHORT = {"steps": 2, "batch_tokens": 400}


@pytest.fixture(scope="module")
def templated(tmp_path_factory) -> Path:
    d = tmp_path_factory.mktemp("templated")
    t.chat_model(d / "chat")
    pairs = t.lines(d / "pairs.jsonl", [{"prompt": f"ab{i}", "completion": "ba"} for i in range(8)])
    method = {"prompt": {"length": 3, "count": 2, "combine": "average"}}
    run(
        t.config(d / "chat", pairs, objective={"sft": {"template": TEMPLATE}}, method=method, train=SHORT),
        out=d / "run",
    )
    return d


def test_a_template_is_kept_with_the_adapter_and_asked_with(templated, tmp_path):
    model, tokenizer, record = open_adapted(str(templated / "chat"), templated / "run" / "adapter")
    assert record["objective"]["sft"]["template"] == TEMPLATE
    method, goal = {"prompt": {"length": 3, "count": 2}}, {"sft": {"template": TEMPLATE}}
    job = prepare(t.config(templated / "chat", str(templated / "pairs.jsonl"), objective=goal, method=method))
    asked, row = [], job.rows[0]
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: asked.append(args[0].tolist()), prepend=True)
    learned = sum(label != -100 for label in row.labels)
    text = Example("x:1", prompt="ab0", completion="ba")
    chat = [{"role": "user", "content": "ab0"}]
    for prompt in ("ab0", text, chat):
        asked.clear()
        said = generate(model, tokenizer, [prompt], Decoding(4))
        assert tuple(asked[0][0]) == row.ids[:-learned]  # what the rows were trained as, to the token
        assert len(asked[0]) == 2
        asked.clear()
        assert ["".join(stream(model, tokenizer, prompt, Decoding(4)))] == said
        assert tuple(asked[0][0]) == row.ids[:-learned]
    generate(model, tokenizer, ["ab0"], Decoding(4, raw=True))
    assert asked[-4][0][3:] == tokenizer("ab0")["input_ids"]  # raw: the prompt alone, virtual tokens in front
    again = save(model, "default", tmp_path / "again")  # saved once more, it still says how
    assert json.loads((again / "deltatune.json").read_text())["record"] == record
    other = load(model, again, "other")
    assert model.deltatune_state.records[other]["objective"]["sft"]["template"] == TEMPLATE


def test_the_command_line_and_the_chat_ask_with_the_template(templated):
    model, tokenizer, _ = open_adapted(str(templated / "chat"), templated / "run" / "adapter")
    words = ["generate", "--adapter", str(templated / "run"), "--prompt", "ab0", "--max-new-tokens", "4", "--json"]
    for more, how in (([], {}), (["--raw"], {"raw": True}), (["--soft-prompt", "1"], {"prompt": 1}),
                      (["--combine", "vote"], {"combine": "vote"})):  # fmt: skip
        shown = CliRunner().invoke(main, [*words, *more])
        assert shown.exit_code == 0, shown.output
        said = json.loads(shown.stdout)["answers"][0]["answer"]
        assert [said] == generate(model, tokenizer, ["ab0"], Decoding(4, **how))
    refused = CliRunner().invoke(main, [*words[:-1], "--soft-prompt", "2"])
    assert refused.exit_code == 2
    assert "there are 2, counted from 0" in " ".join(refused.stderr.split())
    speak = speaker(model, tokenizer, Voice(4))
    said = speak([{"role": "user", "content": "ab0"}], True, 0.0, lambda piece: None).text
    assert [said] == generate(model, tokenizer, ["ab0"], Decoding(4))


def test_an_adapter_just_trained_in_python_is_asked_as_it_was_trained(tmp_path):
    model, tokenizer, _ = open_adapted(str(t.chat_model(tmp_path / "chat")), None)
    pairs = t.lines(tmp_path / "pairs.jsonl", [{"prompt": f"ab{i}", "completion": "ba"} for i in range(4)])
    attach(model, LoRA(r=2))
    given = {
        "data": pairs,
        "tokenizer": tokenizer,
        "steps": 1,
        "retention": False,
        "observers": (),
        "max_new_tokens": 4,
    }
    train(model, SFT(template="Q: {prompt} A:"), out=tmp_path / "run", **given)
    asked = []
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: asked.append(args[0].tolist()), prepend=True)
    generate(model, tokenizer, ["ab0"], Decoding(1))
    with disabled(model):
        generate(model, tokenizer, ["ab0"], Decoding(1))
    assert [tokenizer.decode(ids[0]) for ids in asked] == ["Q: ab0 A:", "ab0"]


# ---- prompts of each task --------------------------------------------------------------------------------------------
def sets(folder: Path) -> dict[str, str]:
    """Two tasks of unlike sizes with the same questions: say it backwards, say it twice."""
    turned = [{"prompt": f"ab{i}", "completion": f"{i}ba"} for i in range(3)]
    twice = [{"prompt": f"ab{i}", "completion": f"ab{i}ab{i}"} for i in range(9)]
    return {"turn": t.lines(folder / "turn.jsonl", turned), "twice": t.lines(folder / "twice.jsonl", twice)}


TASKED = [({"prompt": {"length": 2}}, 1), ({"prompt": {"length": 2, "count": 2}}, 2), ({"ptuning": {"length": 2}}, 1)]


@pytest.mark.parametrize(("method", "count"), TASKED)
def test_each_tasks_rows_carry_its_own_prompts_in_one_batch(tmp_path, method, count):
    model, data = t.chat_model(tmp_path / "m"), sets(tmp_path)
    objective = {"sft": {"template": "{prompt}<soft:2>"}} if "ptuning" in method else "sft"
    job = prepare(t.config(model, "", method=method, objective=objective,
                           data={"train": data, "mix": {"temperature": 0.0}}))  # fmt: skip
    assert (job.encoding.tasks, job.sizes) == (("turn", "twice"), [3, 9])
    assert len(job.encoding.prompt_sets) == 2 * count
    assert any("vectors of its own for each task (turn, twice)" in note for note in job.notes)
    batch = job.batch([job.rows[0], job.rows[-1]], packs=False)
    ids = batch.inputs["input_ids"].tolist()
    assert len(ids) == 2 * count
    for line, own in zip(ids, job.encoding.prompt_sets, strict=True):
        assert [i for i in line if i >= job.model.config.vocab_size] == list(own)
    assert virtual_ids(job.model, "default", "twice") == job.encoding.prompt_sets[count]
    # only the prompts of the rows in a batch learn
    alone = job.batch([job.rows[0]], packs=False)
    job.objective.loss(job.model, alone)[0].backward()
    (table,) = [p for n, p in job.model.named_parameters() if p.requires_grad and p.ndim == 2 and len(p) == 4 * count]
    moved = table.grad.abs().sum(1) > 0
    assert moved.tolist() == [True] * 2 * count + [False] * 2 * count


def test_a_run_over_tasks_is_stored_and_asked_by_name(tmp_path):
    data = sets(tmp_path)
    folder, text = t.chat_model(tmp_path / "m"), "".join(f"    {k}: {v}\n" for k, v in data.items())
    (tmp_path / "c.yaml").write_text(
        f"model: {folder}\nmethod: {{prompt: {{length: 3}}}}\n"
        "train: {steps: 30, batch_rows: 8, lr: 0.3, precision: fp32}\neval: {retention: false, max_new_tokens: 8}\n"
        f"data:\n  train:\n{text}  eval:\n{text}  mix: {{temperature: 0.5}}\n"
    )
    shown = CliRunner().invoke(main, ["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run"), "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert {task: sides["after"]["rows"] for task, sides in told["tasks"].items()} == {"turn": 3, "twice": 9}
    for side in ("before", "after"):
        each = {task: sides[side][told["metric"]] for task, sides in told["tasks"].items()}
        assert (3 * each["turn"] + 9 * each["twice"]) / 12 == pytest.approx(told[side][told["metric"]])
    assert f"task turn: {told['metric']} " in (tmp_path / "run" / "report.md").read_text()
    model, tokenizer, _ = open_adapted(str(folder), tmp_path / "run" / "adapter")
    (method,) = model.deltatune_state.methods["default"]
    assert method.tasks == ("turn", "twice")
    said = {task: generate(model, tokenizer, ["ab1"], Decoding(8, task=task)) for task in data}
    assert said["turn"] != said["twice"]
    row = Example("x:1", prompt="ab1", extra={"task": "twice"})
    assert generate(model, tokenizer, [row], Decoding(8)) == said["twice"]
    with pytest.raises(BadRow, match="no task is named; there are prompts for turn, twice"):
        generate(model, tokenizer, ["ab1"], Decoding(8))
    words = ["generate", "--adapter", str(tmp_path / "run"), "--max-new-tokens", "8", "--json"]
    for more in (["--prompt", "ab1", "--task", "twice"], ["--data", f"twice={data['twice']}"]):
        shown = CliRunner().invoke(main, [*words, *more])
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.stdout)["answers"][-8 if "--data" in more else 0]["answer"] == said["twice"][0]
    words = ["eval", "--adapter", str(tmp_path / "run"), "--set", "eval.max_new_tokens=8", "--json"]
    found = {k: json.loads(CliRunner().invoke(main, [*words, "--data", f"{k}={v}"]).stdout) for k, v in data.items()}
    wrong = json.loads(CliRunner().invoke(main, [*words, "--data", f"turn={data['twice']}"]).stdout)
    assert list(found["twice"]["tasks"]) == ["twice"]
    assert found["twice"]["loss"] < wrong["loss"]  # the other task's prompts fit its rows less
    bare = CliRunner().invoke(main, [*words[:-1], "--data", data["turn"]])
    assert bare.exit_code == 2
    assert "no task is named" in " ".join(bare.stderr.split())


def test_tasks_are_named_alike_in_yaml_flags_and_python(tmp_path):
    from deltatune.config import Config, dump, load

    named = {"sst": "a.jsonl", "rte": ["b.jsonl", "c.jsonl"]}
    flat = ("sst=a.jsonl", "rte=b.jsonl", "rte=c.jsonl")
    assert Config(model="m", data={"train": named, "eval": named}).data.train == flat
    config = load(f"model: m\ndata: {{train: {json.dumps(named)}, mix: {{temperature: 0.5}}}}\n").config
    assert (config.data.train, config.data.mix.temperature) == (flat, 0.5)
    assert load(dump(config)).config == config
    with pytest.raises(ValueError, match=r"'a b' is no name for a task"):
        Config(model="m", data={"train": {"a b": "x"}})
    data = sets(tmp_path)
    model, tokenizer, _ = open_adapted(str(t.chat_model(tmp_path / "chat")), None)
    attach(model, Prompt(2, tasks=("turn", "twice")))
    given = {"tokenizer": tokenizer, "steps": 1, "retention": False, "observers": (), "max_new_tokens": 4}
    done = train(model, SFT(), data=data, mix={"temperature": 0.0}, out=tmp_path / "run", **given)
    assert done.status in ("finished", "unverified", "done")
    shown = CliRunner().invoke(
        main,
        ["train", "--model", str(tmp_path / "chat"), "--method", "{prompt: {length: 2}}", "--out", str(tmp_path / "r"),
         *(w for k, v in data.items() for w in ("--data", f"{k}={v}")), "--set", "data.mix.temperature=0.5",
         "--set", "train.steps=1", "--set", "eval.retention=false", "--set", "train.precision=fp32", "--json"],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    manifest = json.loads((tmp_path / "r" / "adapter" / "deltatune.json").read_text())
    assert manifest["methods"][0]["prompt"]["tasks"] == ["turn", "twice"]


FAULTS = [
    ({"tasks": ("a", "a")}, "Prompt tasks must be different names"),
    ({"tasks": "ab"}, "Prompt tasks must be different names"),
    ({"combine": "mean"}, "Prompt combine 'mean': choose from vote, average"),
    ({"init": "vocap"}, "Prompt init 'vocap'.*Did you mean 'vocab'"),
]


@pytest.mark.parametrize(("fields", "said"), FAULTS)
def test_a_wrong_field_is_an_error(fields, said):
    with pytest.raises(ValueError, match=said):
        Prompt(2, **fields)


def test_a_row_of_an_unknown_task_is_named_with_its_line(tmp_path):
    model = t.chat_model(tmp_path / "m")
    data = t.lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "task": task} for task in ("sst", "rtee")])
    config = t.config(model, data, method={"prompt": {"length": 2, "tasks": ["sst", "rte"]}})
    with pytest.raises(ValueError, match=r"a\.jsonl:2.*unknown task 'rtee'.*sst, rte.*Did you mean 'rte'"):
        prepare(config)
