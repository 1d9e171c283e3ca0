"""What a run's steps cannot do without: counted as torch counts what it runs."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import tiny_run
from deltatune import LoRA, attach, train
from deltatune.core.attach import packing
from deltatune.data.batch import Batch, pack, pad
from deltatune.data.encode import IGNORE, Encoded
from deltatune.methods.bitfit import BitFit
from deltatune.methods.freeze import Freeze, Full
from deltatune.objectives import QA, SFT, Choice, Classify, Tag
from deltatune.train.guard import Interrupted
from deltatune.train.known import below
from deltatune.train.run import run
from deltatune.train.step import Step
from deltatune.train.work import Work
from models import tiny

ATEN = torch.ops.aten
IN_PLACE = {ATEN.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # torch's counter leaves it out
PRODUCTS = (ATEN.mm, ATEN.addmm, ATEN.addmm_)  # of layers: attention's are others, or not counted by torch
IDS = torch.arange(3, 27).view(2, 12)
FULL = Full()


def counted(model: Any, objective: Any, *batches: Batch) -> tuple[Work, int]:
    """(what Work says of a pass over each batch, the layers' products that torch ran in them)."""
    step = Step(model, objective).train()
    step(batches[0])  # asks once how the model finishes its logits: no part of a step
    work, counter = Work(step), FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counter:
        for batch in batches:
            step(batch)[0].backward()
    work.close()
    return work, sum(counter.get_flop_counts()["Global"].get(kind, 0) for kind in PRODUCTS)


def layers_alone(work: Work) -> float:
    work.attention.clear()
    return work.flops()


def rows(labels: torch.Tensor) -> Batch:
    return Batch({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, labels)


@pytest.mark.parametrize("method", [Full(), BitFit(), Freeze(last=1)])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_it_counts_what_torch_runs(family: str, method: Any) -> None:
    model = tiny(family)
    attach(model, method, name="a")
    labels = IDS.clone()
    labels[:, :4] = IGNORE
    work, ran = counted(model, SFT(), rows(labels))
    assert layers_alone(work) == ran


# ---- passes that differ ----------------------------------------------------------------------------------------------
def tokens(n: int, seed: int = 0) -> tuple[int, ...]:
    """Of a text; the last ends a sequence in families that read there."""
    drawn = torch.randint(5, 90, (n - 1,), generator=torch.Generator().manual_seed(100 * n + seed))
    return (*drawn.tolist(), 2)


def text(n: int, learned: int) -> Encoded:
    return Encoded(tokens(n), (IGNORE,) * (n - learned) + tokens(n)[n - learned :])


def translated(n: int, said: int) -> Encoded:
    return Encoded(tokens(n), tokens(said), decoder=True)


def asked(n: int, answer: int) -> Encoded:
    return Encoded(tokens(n), None, 1, choices=tuple(tokens(answer, seed) for seed in range(3)))


def labelled(n: int, label: int) -> Encoded:
    return Encoded(tokens(n), None, label)


def tags(n: int, _: int) -> Encoded:
    return Encoded(tokens(n), (1,) * n)


def spanned(n: int, end: int) -> Encoded:
    return Encoded(tokens(n), None, (1, end))


@dataclass(frozen=True)
class Case:
    family: str
    objective: Any
    row: Any
    one: tuple[int, int]  # of rows that differ
    two: tuple[int, int]
    task: Any = "lm"
    method: Any = FULL
    packed: bool = False

    def model(self) -> Any:
        made = tiny(self.family, self.task)
        if self.objective.name in HEADS:
            made.config.num_labels = 3 - (self.objective.name == "qa")
            made = HEADS[self.objective.name].from_config(made.config)
        attach(made, self.method, name="a")
        if self.objective.name == "choice":  # of a trained head, its gradient for tokens of unlike weight is made twice
            made.get_output_embeddings().weight.requires_grad_(False)
        if self.packed:
            packing(made)
        return made

    def batch(self, *sizes: tuple[int, int]) -> Batch:
        return (pack if self.packed else partial(pad, pad_id=0))([self.row(*size) for size in sizes])


HEADS = {"tag": hf.AutoModelForTokenClassification, "qa": hf.AutoModelForQuestionAnswering}
SAID = {"labels": {"x": "a", "y": "b"}}
CLASSES = Classify("single", ("a", "b", "c"))
CASES = {
    "sft": Case("llama", SFT(), text, (5, 3), (24, 8)),
    "sft packed": Case("llama", SFT(), text, (5, 3), (24, 8), packed=True),
    "sft masked answers": Case("gpt2", SFT(), text, (20, 1), (6, 5)),
    "encoder-decoder": Case("t5", SFT(), translated, (40, 4), (4, 40)),
    "encoder-decoder of equal lengths": Case("bart", SFT(), translated, (40, 4), (8, 40)),
    "choice together": Case("llama", Choice(**SAID), asked, (9, 2), (5, 12)),
    "choice, its head in pieces": Case("llama", Choice(**SAID), asked, (9, 2), (5, 12), method=Freeze(last=1)),
    "choice apart": Case("mistral", Choice(**SAID), asked, (9, 2), (5, 12)),
    "choice of an encoder-decoder": Case("t5", Choice(seq2seq=True, **SAID), asked, (19, 2), (5, 12)),
    "classify": Case("bert", CLASSES, labelled, (20, 1), (4, 2), "classify"),
    "classify the last token": Case("llama", CLASSES, labelled, (20, 1), (4, 2), "classify"),
    "classify by a decoder": Case("bart", CLASSES, labelled, (20, 1), (4, 2), "classify"),
    "tag": Case("bert", Tag(("a", "b", "c")), tags, (20, 0), (4, 0)),
    "qa": Case("bert", QA(), spanned, (20, 9), (4, 2)),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each
@pytest.mark.parametrize("turned", [False, True])
def test_unlike_passes_are_counted_in_either_order(case: Case, turned: bool) -> None:
    """Two rows, then three of another form; in each batch nothing is filled up."""
    batches = [case.batch(case.one, case.one), case.batch(case.two, case.two, case.two)]
    work, ran = counted(case.model(), case.objective, *reversed(batches) if turned else batches)
    assert layers_alone(work) == ran


@each
def test_padding_is_no_work(case: Case) -> None:
    """Unlike rows side by side are as much work as each alone; attention is in it."""
    model = case.model()
    alone, _ = counted(model, case.objective, case.batch(case.one), case.batch(case.two))
    both, _ = counted(model, case.objective, case.batch(case.one, case.two))
    assert both.flops() == pytest.approx(alone.flops(), rel=1e-12)
    assert both.attention == alone.attention


ATTENTION = {
    # family -> squares of the lengths 24 and 5, forward and twice backward, of 2 layers; a window of 4 sees less
    "llama": {True: 6.0 * (24**2 + 5**2)}, "mistral": {}, "t5": {},
}  # fmt: skip


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_is_counted_where_it_is_known(family: str) -> None:
    case = CASES["encoder-decoder"] if family == "t5" else replace(CASES["sft"], family=family)
    work, _ = counted(case.model(), SFT(), case.batch((24, 8), (5, 3)))
    assert {causal: squares for (_, causal), squares in work.attention.items()} == ATTENTION[family]


def test_a_layer_that_did_not_run_is_no_work() -> None:
    model, case = tiny("llama"), CASES["sft"]
    attach(model, Freeze(last=1), name="a")
    batch, other = case.batch(case.one), case.batch(case.two)
    found = below(model.train(), batch)
    assert len(found.found) == 1
    known = replace(batch, known=partial(found.known, found.reached(batch).detach()))
    work, ran = counted(model, SFT(), known, other, batch)
    assert layers_alone(work) == ran
    assert ran < counted(model, SFT(), batch, other, batch)[1]


def test_what_is_run_again_for_the_gradient_is_no_work() -> None:
    case = CASES["sft"]
    plain, recomputed = case.model(), case.model()
    recomputed.activation_checkpointing_enable({"use_reentrant": False})
    batch = case.batch(case.one)
    (work, ran), (again, ran_again) = (counted(model, SFT(), batch) for model in (plain, recomputed))
    assert again.flops() == work.flops()
    assert ran_again > ran


def test_a_pass_does_not_wait_for_the_device(monkeypatch: Any) -> None:
    """Guards against a mask that is looked at in every pass. What waits is bounded, and nothing of it is lost."""
    case, seen = CASES["sft masked answers"], []
    step = Step(case.model(), SFT()).train()
    batch = case.batch(case.one, case.two)
    for name in ("item", "tolist", "__int__", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, real=real: seen.append(x) or real(x))

    def looks() -> int:
        seen.clear()
        step(batch)
        return len(seen)

    looks()  # asks once how the model finishes its logits
    before = looks()
    monkeypatch.setattr("deltatune.train.work.WAITING", 3)
    work = Work(step)
    assert [looks() for _ in range(7)] == [before, before, before + 1] * 2 + [before]
    six = dict(work.rows)
    work.close()
    assert work.rows == {shape: pytest.approx(rows * 7 / 6) for shape, rows in six.items()}
    assert work.sequences == 14


# ---- its time --------------------------------------------------------------------------------------------------------
def test_a_floor_is_timed_and_leaves_no_trace() -> None:
    model = tiny("llama")
    attach(model, Freeze(last=1), name="a")
    work, _ = counted(model, SFT(), rows(IDS.clone().index_fill(1, torch.tensor([0]), IGNORE)))
    assert work.record() == {}  # no step has told its seconds
    work.on_step({"seconds": 2.0})
    before, weights = torch.random.get_rng_state(), [p.clone() for p in model.parameters()]
    found = work.record()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(map(torch.equal, weights, model.parameters()))
    assert found["of_floor"] == found["floor_seconds"] / 2.0 > 0
    assert found["flops"] == work.flops() > 0


@pytest.mark.parametrize(
    ("error", "said"),
    [(torch.OutOfMemoryError("tried 2 GiB\nof 1"), "tried 2 GiB"), (Interrupted(), "Interrupted")],
)
def test_a_floor_that_cannot_be_timed_is_a_word(monkeypatch: Any, error: BaseException, said: str) -> None:
    model = tiny("llama")
    attach(model, Full(), name="a")
    work, _ = counted(model, SFT(), rows(IDS))
    work.on_step({"seconds": 2.0})

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("deltatune.train.work.timed", fail)
    assert work.record() == {"steps": 1, "seconds": 2.0, "flops": work.flops(), "floor": f"not timed: {said}"}


def test_what_experts_multiply_is_said_to_be_left_out() -> None:
    """Their weights are one parameter of three dimensions, which no layer multiplies by."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**{**tiny("llama").config.to_dict(), **sizes}))
    attach(model, LoRA(r=2), name="a")
    work, _ = counted(model, SFT(), rows(IDS))
    work.on_step({"seconds": 2.0})
    said = "not counted: experts multiply by parameters that are no layers"
    assert work.record() == {"steps": 1, "seconds": 2.0, "floor": said}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_matrix_is_copied_for_it(monkeypatch: Any, family: str) -> None:
    """The weights that are timed are the layers' own, GPT-2's lying the other way round."""
    model = tiny(family)
    attach(model, Full(), name="a")
    work, _ = counted(model, SFT(), rows(IDS))
    own, used = {p.data_ptr() for p in model.parameters()}, []
    monkeypatch.setattr("deltatune.train.work.timed", lambda run, device: used.append(run.args) or run() is None)
    work.on_step({"seconds": 2.0})
    work.record()
    weights = [args[1] for args in used if len(args) == 2]
    assert len(weights) == len(work.rows) > 3
    assert {w.data_ptr() for w in weights} <= own


def test_no_hook_is_left() -> None:
    model = tiny("t5")
    attach(model, Full(), name="a")
    step = Step(model, SFT())
    before = hooks(step)
    work = Work(step)
    assert hooks(step) > before
    work.on_end({})
    assert hooks(step) == before


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- in a run --------------------------------------------------------------------------------------------------------
made = tiny_run.made
SHORT = {"steps": 2, "batch_tokens": 160, "retention": False, "max_new_tokens": 4, "observers": ()}


def ended(made: Path, folder: Path, monkeypatch: Any, timed: Any) -> dict[str, Any]:
    """The summary of a finished run whose products take `timed(run, device)` seconds each."""
    monkeypatch.setattr("deltatune.train.work.timed", timed)
    done = run(tiny_run.run_of(made, "lora"), out=folder)
    assert done.status == "done"
    assert {"summary.json", "report.md", "eval.json", "verified.json"} <= {path.name for path in folder.iterdir()}
    assert "of what its matrix products allow" not in (folder / "report.md").read_text()
    return json.loads((folder / "summary.json").read_text())


def test_a_run_does_not_end_for_its_floor(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The device is full when the rest is known; its peak is that of the run, not of the timing."""
    peaks = iter(range(100, 200))
    monkeypatch.setattr("deltatune.train.run.peak_bytes", lambda: next(peaks))

    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    said = ended(made, tmp_path / "run", monkeypatch, full)
    assert said["work"].pop("flops") > 0
    assert said["work"] == {"steps": 6, "seconds": ANY, "floor": "not timed: tried to allocate 2 GiB"}
    assert list(said["seconds"]) == ["prepare", "before", "train", "save", "after", "floor"]
    assert (list(said["memory"])[-1], said["memory"]["after"], said["peak_memory_bytes"]) == ("after", 104, 104)


def test_a_stop_request_ends_the_timing_alone(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    said = ended(made, tmp_path / "run", monkeypatch, stopped)
    assert said["work"]["floor"] == "not timed: Interrupted"


class Fails(SFT):
    """Raises in the first step."""

    def loss(self, model: Any, batch: Batch) -> Any:
        found = super().loss(model, batch)
        if model.training:
            raise RuntimeError("a loss of one's own")
        return found


def test_hooks_are_as_before_after_a_run_that_fails_or_ends(made: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(made / "model")
    attach(model, LoRA(r=2), name="a")
    given = {"data": made / "rows.jsonl", "tokenizer": hf.AutoTokenizer.from_pretrained(made / "model"), **SHORT}
    before = hooks(model)
    for turn in range(2):
        with pytest.raises(RuntimeError, match="a loss of one's own"):
            train(model, Fails(), adapter="a", out=tmp_path / f"failed {turn}", **given)
        assert hooks(model) == before
    assert train(model, SFT(), adapter="a", out=tmp_path / "run", **given).status == "done"
    assert hooks(model) == before
