"""What frozen blocks make of a row is computed once: the same training, from fewer forward passes of them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny_run as t
from deltatune.data.batch import Batch
from deltatune.train import known
from deltatune.train.job import in_training, prepare
from deltatune.train.run import resume, run
from models import tiny
from test_soft_runs import Stop


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("known")
    for family in ("llama", "gpt2", "opt", "gemma"):
        t.chat_model(d / family, family)
    t.masked_model(d / "bert"), t.seq2seq_model(d / "t5")
    t.chat_rows(d / "chat.jsonl"), t.label_rows(d / "label.jsonl")
    return d


def config(made, model="llama", rows="chat", **over):
    train = {"steps": None, "epochs": 3.0} | over.pop("train", {})
    return t.config(
        made / model, str(made / f"{rows}.jsonl"), **{"method": {"freeze": {"last": 1}}} | over, train=train
    )


RUNS = {
    "packed": {},
    "padded": {"data": {"packing": "off"}},
    "gpt2": {"model": "gpt2"},
    "opt": {"model": "opt"},
    "gemma": {"model": "gemma"},
    "head alone": {"model": "bert", "rows": "label", "method": "head", "objective": "classify"},
    "the last block": {"model": "bert", "rows": "label", "objective": "classify"},
    "cloze": {"model": "bert", "rows": "label", "objective": {"cloze": {"labels": {"pos": ["good"], "neg": ["bad"]}}},
              "method": {"lora": {"targets": [r".*\.layer\.1\..*query"]}}},
    "recomputed": {"train": {"checkpoint_gradients": "on"}},
}  # fmt: skip


class Losses:
    def __init__(self):
        self.found = []

    def on_step(self, record):
        self.found.append(record["loss"])

    def on_start(self, record): ...

    on_eval = on_end = on_start


def passes(monkeypatch) -> list:
    """How often the frozen blocks are asked for their result."""
    seen, real = [], known.Below.reached
    monkeypatch.setattr(known.Below, "reached", lambda self, batch: seen.append(batch) or real(self, batch))
    return seen


@pytest.mark.parametrize("name", RUNS)
def test_the_training_is_the_same_from_one_pass_over_the_rows(made, tmp_path, monkeypatch, name):
    seen, losses = passes(monkeypatch), {}
    for how in ("on", "off"):
        over = RUNS[name] | {"train": RUNS[name].get("train", {}) | {"cache_activations": how}}
        watch = Losses()
        assert run(config(made, **over), out=tmp_path / how, observers=[watch]).status == "done"
        losses[how] = watch.found
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-5)
    assert losses["on"][-1] < losses["on"][0]
    tokens = sum(batch.inputs["attention_mask"].sum() if "attention_mask" in batch.inputs else sum(batch.lens)
                 for batch in seen[1:])  # the first was to try them  # fmt: skip
    whole = [json.loads(line) for line in (tmp_path / "off" / "metrics.jsonl").read_text().splitlines()]
    assert tokens * 3 == sum(line["tokens"] for line in whole if line["event"] == "step")


def test_auto_does_it_where_rows_are_read_again_and_says_so(made, tmp_path):
    done = run(config(made), out=tmp_path / "run", observers=())
    said = (done.dir / "report.md").read_text()
    assert "1 of 2 blocks are frozen below everything that trains: what they make of all rows is computed once" in said


def test_a_run_cut_in_the_middle_goes_on_bitwise(made, tmp_path):
    """The pieces are the same whichever step needs them first."""
    settings = config(made, train={"cache_activations": "on", "save_every": 3})
    run(settings, out=tmp_path / "straight", observers=())
    assert run(settings, out=tmp_path / "cut", observers=[Stop(4)]).status == "interrupted"
    assert resume(tmp_path / "cut").status == "done"
    one, two = (load_file(next((tmp_path / n / "adapter").glob("*.safetensors"))) for n in ("straight", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


FIRST = {  # family -> what hands rows to the first block as it reads them
    "llama": "model.embed_tokens", "gpt2": "transformer.drop", "bert": "bert.embeddings", "opt": None,
}  # fmt: skip


@pytest.mark.parametrize("family", FIRST)
def test_what_stands_before_the_frozen_blocks_is_not_run_for_nothing(family):
    """A head alone on a small encoder would else spend its steps on embeddings."""
    model = tiny(family).train().requires_grad_(False)
    ids = torch.arange(5, 17).view(2, 6)
    batch, ran = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids), []
    found = known.below(model, batch)
    assert {id(m): n for n, m in model.named_modules()}.get(id(found.first)) == FIRST[family]
    before = model(**batch.inputs).logits
    model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    states = found.reached(batch)
    ran.clear()
    with found.known(states):
        assert torch.equal(model(**batch.inputs).logits, before)
    assert len(ran) == (family != "bert")  # a hook of a module that is passed by runs
    assert torch.equal(model(**batch.inputs).logits, before)


def drops(model):
    model.model.layers[0].self_attn.attention_dropout = 0.1


def skips(model):
    model.model.decoder.layerdrop = 0.1


CHOICE = {"rows": "label", "objective": {"choice": {"labels": {"pos": "good", "neg": "bad"}}}}
WHY = {
    "a lower block learns": ({"method": "lora"}, None, r"layers\.0\S* is adapted"),
    "the embedding learns": ({"method": {"freeze": {"last": 1, "names": [r"model\.embed_tokens\.weight"]}}}, None,
                             "embed_tokens is (trained|adapted)"),
    "chance": ({}, drops, "drops out at random"),
    "blocks left out at random": ({"model": "opt"}, skips, "decoder drops out at random"),
    "once": ({"train": {"epochs": 1.0}}, None, "it reads its rows once"),
    "a row for each answer": (CHOICE, None, "choice reads every row with its answers behind it"),
    "noise": ({"train": {"neftune": 5.0}}, None, "NEFTune draws noise anew"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHY)
def test_what_stands_against_it_is_named(made, name):
    over, change, why = WHY[name]
    job = prepare(config(made, **over | {"train": over.get("train", {}) | {"cache_activations": "on"}}))
    if change:
        change(job.model)
    with in_training(job), pytest.raises(ValueError, match=f"cache_activations: on is not possible here .*{why}"):
        known.reuse(job)


def test_auto_leaves_choice_alone(made):
    job = prepare(config(made, **CHOICE))
    with in_training(job):
        known.reuse(job)
    assert job.known is None


def test_models_of_several_stacks_have_none():
    assert "more than one stack" in known.below(tiny("t5"), None).why
    assert "more than one stack" in known.below(tiny("clip"), None).why


@pytest.mark.parametrize(("memory", "disk", "rows"), [(10**9, 0, 24), (0, 10**9, 24), (0, 9000 * 4, 4), (0, 0, 0)])
def test_what_does_not_fit_the_memory_goes_to_a_file_and_what_does_not_fit_that_is_computed(
    made, monkeypatch, memory, disk, rows
):
    """A row is about 17 tokens of 32 numbers of 4 bytes."""
    monkeypatch.setattr(known, "free_memory", lambda: memory)
    monkeypatch.setattr(known, "free_disk", lambda: disk)
    found, room = known.space([17] * 24, 32, torch.float32)
    assert (found, room.shape) == (rows, (17 * rows, 32))
    room.fill_(1.0)
    assert float(room.sum()) == 17 * rows * 32
    job = prepare(config(made))
    with in_training(job):
        known.reuse(job)
        assert job.known.rows == rows or job.known.lengths != [17] * 24
        assert f"MiB, in {'memory' if memory else 'a temporary file'})" in job.notes[-1]
        batch = job.grouped([0, len(job.rows) - 1])
        assert (batch.known is not None) is (job.known.rows == len(job.rows))
