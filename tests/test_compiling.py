"""Compiled blocks: the same numbers, switched on by a rule, by the same step again when a run is resumed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tiny_run as t
from conformance import stir
from deltatune import LoRA, activate, attach, rows
from deltatune.config import load
from deltatune.core.attach import packing, trainable
from deltatune.core.compiling import Compiled, compiles, parts, programs
from deltatune.core.delta import Refusal
from deltatune.core.recompute import recomputing
from deltatune.core.site import name_of
from deltatune.data.batch import pack
from deltatune.data.encode import Encoded
from deltatune.methods import build
from deltatune.objectives import SFT
from deltatune.train import compiling, worth
from deltatune.train.run import resume, run
from deltatune.train.step import Step
from deltatune.train.work import Work
from deltatune.train.worth import Gain, Verdict, verdict
from models import inputs, tiny

made = t.made
pytestmark = [  # torch's compiler warns of torch's own code, and hides it from users only
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler to compile with"
)

# ---- the rule --------------------------------------------------------------------------------------------------------
RULE = [  # (seconds that are left, what was measured, on, why)
    (60.0, None, False, "60 s are left, compiling may take 60 s"),
    (1199.0, None, False, "1199 s are left, compiling may take 60 s"),
    (1200.0, None, None, "not measured"),
    (600.0, Gain(0.15, 31.0), False, "600 s are left, compiling takes 31 s"),
    (600.0, Gain(0.15, 30.0), True, "it saves 15.0 % of the 600 s that are left and takes 30 s"),
    (600.0, Gain(0.149, 30.0), False, "it saves 14.9 % of the 600 s that are left and takes 30 s"),
    (1e6, Gain(0.0, 1.0), False, "blocks are not faster compiled (0.0 %)"),
    (1e6, Gain(-0.04, 30.0), False, "blocks are not faster compiled (-4.0 %)"),
    (0.0, Gain(0.5, 0.0), False, "0 s are left, compiling takes 0 s"),
    (1e6, Gain(0.01, 30.0), True, "it saves 1.0 % of the 1000000 s that are left and takes 30 s"),
]


@pytest.mark.parametrize(("rest", "gain", "on", "why"), RULE)
def test_the_rule(rest, gain, on, why):
    assert verdict(rest, gain) == Verdict(on, why)


def test_measurements_are_kept_and_a_damaged_file_is_as_good_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    notes: list[str] = []
    assert worth.measurements(notes) == {}
    file = tmp_path / "compile.json"
    file.write_text('{"a": {"saved": 0.2, "seconds": 9}}')
    assert worth.measurements(notes) == {"a": {"saved": 0.2, "seconds": 9.0}}
    assert notes == []
    for damaged in ("{", "[1]", '{"a": 3}', '{"a": {"saved": "much", "seconds": 9}}'):
        file.write_text(damaged)
        assert worth.measurements(notes) == {}
    assert len(notes) == 4
    assert f"{file} cannot be read" in notes[0]


# ---- what is compiled ------------------------------------------------------------------------------------------------
NORMS = ["input_layernorm", "post_attention_layernorm"]
PARTS = {
    "llama": ["mlp", *NORMS],
    "qwen": ["self_attn.q_norm", "self_attn.k_norm", "mlp", *NORMS],
    "gpt2": ["ln_1", "ln_2", "mlp"],
    "bert": ["attention.output", "intermediate", "output"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "mamba": ["norm"],
}


@pytest.mark.parametrize(("family", "names"), PARTS.items())
def test_parts_hold_no_attention(family, names):
    model = attach(tiny(family), LoRA(r=2))
    found = [name_of(model, part) for part in parts(model)]
    assert len(found) == 2 * len(names)
    first = found[0].removesuffix(names[0])
    assert found[: len(names)] == [first + name for name in names]


def packs(*lens: int):
    draw = torch.Generator().manual_seed(sum(lens))
    ids = [torch.randint(5, 97, (n,), generator=draw).tolist() for n in lens]
    return pack([Encoded(tuple(row), (-100, *row[1:])) for row in ids])


BATCHES = [packs(5, 9, 3), packs(12, 4), packs(2, 2, 2, 17)]


def learned(step: Step, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A batch's loss and its gradients; dropout drawn anew and alike."""
    chosen = trainable(step.model)
    step.zero_grad()
    torch.manual_seed(7)
    loss = step.train()(batch)[0]
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in chosen.items()}


def close(one, two) -> bool:
    return torch.allclose(one[0], two[0], rtol=1e-5) and all(
        (one[1][key] - two[1][key]).norm() <= 1e-4 * two[1][key].norm() for key in one[1]
    )


def stirred(method) -> Step:
    torch.manual_seed(0)
    model = attach(tiny("llama", num_hidden_layers=4), build(method))
    stir(model, "default", 3)
    packing(model)
    return Step(model, SFT())


METHODS = {
    # of the four MLPs one has an adapter and three have none: torch must not take one for another
    "some": [{"lora": {"r": 2, "targets": ["q", "layers.2.mlp.up_proj"]}}],
    "union": [{"lora": {"r": 2}}, {"adapter": {"bottleneck": 4, "form": "parallel", "where": ["ffn"]}}, {"prefix": {}}],
}


@needs_compiler
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_numbers_whatever_the_lengths(method):
    step = stirred(method)
    expected = [learned(step, batch) for batch in BATCHES]
    before = programs()
    with Compiled(step.model):
        first = learned(step, BATCHES[0])
        some = programs()
        assert some > before
        again = [learned(step, batch) for batch in BATCHES]
        assert programs() == some  # one program for all lengths
        assert torch.equal(first[0], again[0][0])
        with recomputing(step.model, 2):
            recomputed = learned(step, BATCHES[1])
        activate(step.model)
        base = step(BATCHES[0])[0]
    assert all(map(close, expected, again))
    assert close(expected[1], recomputed)
    assert not torch.allclose(base, expected[0][0], rtol=1e-3)  # switching adapters is obeyed
    torch.testing.assert_close(base, step(BATCHES[0])[0])
    assert not any("forward" in vars(m) for m in step.model.modules())


@needs_compiler
def test_evaluation_and_passes_without_a_gradient_stay_as_they_are():
    """Guards against a program for every prompt, and for every way in which rows can be shared out."""
    model = attach(tiny("llama"), LoRA(r=2)).eval()
    given, before = inputs(model), programs()
    expected = model(**given).logits
    with Compiled(model):
        model(**given)
    with Compiled(model), torch.no_grad():
        assert all(map(compiles, parts(model)))
        assert torch.equal(model.eval()(**given).logits, expected)
        model.train()(**given)
    assert programs() == before
    with Compiled(model):
        seen = []
        for names in (["default", None], [None, "default"], [None, None]):
            with rows(model, names):
                model(**given)
            seen.append(programs())
    assert len(set(seen)) == 1  # norms, which no row changes
    with pytest.raises(Refusal, match="with others in their place"), Compiled(model), Compiled(model):
        pass


@needs_compiler
def test_work_counts_what_is_compiled():
    step = stirred([{"lora": {"r": 2}}])
    counts = []
    for how in (False, True):
        work = Work(step)
        if how:
            with Compiled(step.model):
                learned(step, BATCHES[0])
        else:
            learned(step, BATCHES[0])
        work.close()
        counts.append((dict(work.rows), dict(work.calls), work.flops()))
    assert counts[0] == counts[1]


# ---- in a run --------------------------------------------------------------------------------------------------------
@pytest.fixture
def home(tmp_path, monkeypatch):
    """The cache between runs, empty."""
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def chosen(folder):
    return json.loads((folder / "env.json").read_text())["compile"]


def adapter(folder):
    return load_file(next((folder / "adapter").glob("*.safetensors")))


@needs_compiler
def test_on_is_from_step_1_and_a_resumed_run_has_the_same_bits(made, tmp_path, home):
    config = t.run_of(made, "lora", compile="on", save_every=1)
    straight = run(config, out=tmp_path / "a", observers=())
    assert run(config, out=tmp_path / "b", observers=[t.Stop()]).status == "interrupted"
    assert resume(tmp_path / "b").status == "done"
    one, two = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert chosen(tmp_path / "a") == chosen(tmp_path / "b") == {"from_step": 1, "why": "train.compile: on"}
    assert any("blocks compiled (train.compile: on)" in note for note in straight.summary["notes"])
    off = run(t.run_of(made, "lora", compile="off", save_every=1), out=tmp_path / "off", observers=())
    assert off.summary["after"]["loss"] == pytest.approx(straight.summary["after"]["loss"], rel=1e-4)
    assert chosen(tmp_path / "off") == {"from_step": None, "why": "train.compile: off"}
    state = json.loads(max((tmp_path / "a" / "checkpoints").glob("ckpt-*")).joinpath("state.json").read_text())
    assert state["extra"]["compiling"]["found"]["from_step"] == 1


@pytest.fixture
def cheap(monkeypatch):
    """A rule that lets short runs compile, without a compiler: what is timed, and what is switched, is noted."""
    seen = {"timed": 0, "on": 0}

    def measured(job, step):
        seen["timed"] += 1
        return Gain(0.5, 0.0)

    monkeypatch.setattr(compiling, "measured", measured)
    monkeypatch.setattr(compiling, "rehearse", lambda job: seen.update(on=seen["on"] + 1))
    monkeypatch.setattr(worth, "GUESS", 0.0)
    monkeypatch.setattr("deltatune.core.compiling.traced", lambda kind: kind.forward)
    return seen


def test_auto_times_once_switches_at_a_step_and_resumes_there(made, tmp_path, home, cheap):
    config = t.run_of(made, "lora", steps=9)
    assert run(config, out=tmp_path / "a", observers=()).status == "done"
    assert cheap == {"timed": 1, "on": 1}
    assert chosen(tmp_path / "a")["from_step"] == 7
    assert chosen(tmp_path / "a")["why"].startswith("it saves 50.0 % of the ")
    assert run(config, out=tmp_path / "b", observers=()).status == "done"
    assert cheap == {"timed": 1, "on": 2}  # read from the cache
    (kept,) = json.loads((home / "compile.json").read_text()).values()
    assert kept == {"saved": 0.5, "seconds": 0.0}
    assert run(t.run_of(made, {"lora": {"r": 3}}, steps=9), out=tmp_path / "c", observers=()).status == "done"
    assert cheap == {"timed": 2, "on": 3}  # of other shapes
    cut = run(config, out=tmp_path / "d", observers=[t.Stop()])  # stopped at step 3, then decides at 9, with none left
    assert (cut.status, resume(tmp_path / "d").status) == ("interrupted", "done")
    assert cheap == {"timed": 2, "on": 3}


class At:
    """An observer that stops the run at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, record) -> None:
        if record["step"] == self.step:
            t.Stop().on_step({"step": 3})

    def on_start(self, record) -> None: ...
    def on_eval(self, record) -> None: ...
    def on_end(self, record) -> None: ...


def test_a_choice_is_replayed_not_made_again(made, tmp_path, home, cheap, monkeypatch):
    config = t.run_of(made, "lora", steps=10)
    assert run(config, out=tmp_path / "a", observers=[At(8)]).status == "interrupted"
    assert chosen(tmp_path / "a")["from_step"] == 7
    steps = []
    monkeypatch.setattr(compiling, "verdict", lambda *_: pytest.fail("decided anew"))
    monkeypatch.setattr(compiling.Compiling, "begin", lambda self: steps.append(self.found["from_step"]))
    assert resume(tmp_path / "a").status == "done"
    assert steps == [7]


def test_deterministic_and_short_runs_measure_nothing(made, tmp_path, home, cheap):
    for name, train in {"a": {"deterministic": True, "steps": 9}, "b": {}}.items():
        assert run(t.run_of(made, "lora", **train), out=tmp_path / name, observers=()).status == "done"
        assert load(tmp_path / name / "config.yaml").config.train.compile == "off"
        assert chosen(tmp_path / name) == {"from_step": None, "why": "train.compile: off"}
    assert cheap == {"timed": 0, "on": 0}
    assert not (home / "compile.json").exists()


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(made, tmp_path, home, monkeypatch):
    def broken(job):
        raise RuntimeError("no working C++ compiler\nmore lines")

    monkeypatch.setattr(compiling, "rehearse", broken)
    found = run(t.run_of(made, "lora", compile="on"), out=tmp_path / "a", observers=())
    assert found.status == "done"
    assert any("could not be compiled: no working C++ compiler" in note for note in found.summary["notes"])
    said = {"from_step": None, "why": "blocks could not be compiled: no working C++ compiler"}
    assert chosen(tmp_path / "a") == said
