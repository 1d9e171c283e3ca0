"""A job settles what was left open: lengths, recomputation, memory; and restores the model it was lent."""

import warnings

import pytest
import torch

import tiny_run as t
from deltatune.train import memory
from deltatune.train.job import in_training, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    t.chat_model(folder / "model")
    t.chat_rows(folder / "rows.jsonl", 8)
    return folder


def job(made, **over):
    return prepare(t.config(made / "model", str(made / "rows.jsonl"), **over))


def test_rows_never_outgrow_the_models_positions(made):
    assert job(made, train={"max_length": 4096}).encoding.max_length == 512
    assert job(made, train={"max_length": 100}).encoding.max_length == 100
    moved = job(made, train={"max_length": 4096}, method={"prefix": {"length": 12}})
    assert moved.encoding.max_length == 500  # real tokens stand after the prefix


def test_activations_are_recomputed_when_memory_would_not_do(made, monkeypatch):
    assert job(made).recompute == 0
    monkeypatch.setattr(memory, "free", lambda: 1)
    tight = job(made)
    assert tight.recompute == 2
    assert tight.config.train.checkpoint_gradients == "on"  # a resumed run does the same
    assert any("gradient checkpointing is on" in note for note in tight.notes)
    assert job(made, train={"checkpoint_gradients": "off"}).recompute == 0


def test_recomputation_lowers_the_prediction(made):
    one = job(made)
    parts = memory.estimate(one)
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    assert parts["weights"] == 4 * sum(p.numel() for n, p in one.model.named_parameters() if "delta_slot" not in n)
    one.recompute = 1
    assert memory.estimate(one)["activations"] < parts["activations"]


@pytest.mark.parametrize("together", [False, True])
def test_every_answer_and_every_prompt_of_a_row_counts(made, tmp_path, monkeypatch, together):
    """Side by side behind one text, or each behind it anew; several prompts read each row side by side."""
    monkeypatch.setattr(memory, "branches", lambda model, starts: together)
    from deltatune.commands.train import foreseen
    from deltatune.train.run import plan

    row = {"text": "abcd efgh", "choices": ["ab", "cd", "efgh"], "label": 1}
    rows = t.lines(tmp_path / "rows.jsonl", [row] * 8)
    given = {"objective": "choice", "train": {"steps": 6, "batch_tokens": None, "batch_rows": 2}}
    config = t.config(made / "model", rows, **given)
    one = job(made, data={"train": rows}, **given)
    length, answers = one.rows[0].length, [len(ids) for ids in one.rows[0].choices]
    whole = length + 3 * (max(answers) - 1) if together else 3 * (length + max(answers))
    more = 2 if together else 6  # a prompt of two tokens, with each text
    assert memory.batch_tokens(one) == 2 * whole
    assert next(foreseen(plan(config))) == (
        f"rows: 8{'' if together else ' (24 sequences: every answer, every prompt)'}, {8 * whole} tokens, "
        f"{8 * sum(answers)} of them learned; 6 steps"
    )
    logits = memory.estimate(one)["logits"]
    assert logits > 0
    assert plan(t.config(made / "model", rows, **given, method={"prompt": {"length": 2, "count": 3}}))[
        "learned_tokens"
    ] == 3 * 8 * sum(answers)
    assert logits % (12 * one.model.config.vocab_size) == 0
    several = job(made, data={"train": rows}, method={"prompt": {"length": 2, "count": 3}}, **given)
    assert memory.batch_tokens(several) == 2 * 3 * (whole + more)
    by_tokens = job(made, data={"train": rows}, **given | {"train": {"batch_tokens": 2 * length}})
    assert memory.batch_tokens(by_tokens) == 2 * whole  # batches are made by the rows' own tokens


def test_logits_are_predicted_a_piece_at_a_time_where_they_are_made_so(made, monkeypatch):
    one = job(made)
    whole = memory.estimate(one)["logits"]
    monkeypatch.setattr(memory, "CHUNK", 1000)
    assert memory.estimate(one)["logits"] == 12000 < whole
    monkeypatch.setattr(memory, "in_pieces", lambda head: False)
    assert memory.estimate(one)["logits"] == whole


def test_the_model_is_given_back_as_it_was(made):
    one = job(made, train={"checkpoint_gradients": "on", "deterministic": True})
    before = one.model.config._attn_implementation
    with in_training(one):
        one.model.train()
        assert torch.are_deterministic_algorithms_enabled()
        assert one.model.config._attn_implementation != before  # packed batches need ours
        assert any(getattr(m, "gradient_checkpointing", False) for m in one.model.modules())
    assert not torch.are_deterministic_algorithms_enabled()
    assert one.model.config._attn_implementation == before
    assert not one.model.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in one.model.modules())


def test_steps_count_parts_of_an_epoch(made):
    def steps(epochs):
        one = job(made, train={"steps": None, "epochs": epochs, "batch_rows": 2, "batch_tokens": None})
        return one.steps(one.sampler())

    assert [steps(e) for e in (1.0, 2.0, 0.5, 1.25)] == [4, 8, 2, 5]


@pytest.mark.parametrize("place", ["eval", "ood"])
def test_rows_too_long_to_be_answered_are_refused_before_training(made, tmp_path, place):
    long = t.lines(tmp_path / "long.jsonl", [{"prompt": "a b " * 118, "completion": "c"}])
    with pytest.raises(ValueError, match=r"long.jsonl:1: .*more than the model's 512 positions"):
        job(made, data={place: long}, eval={"max_new_tokens": 64})


@pytest.mark.parametrize("metric", ["pearson", "json_schema"])
def test_metrics_that_do_not_suit_the_rows_are_refused_before_training(made, metric):
    with pytest.raises(ValueError, match=f"eval.metrics: {metric} cannot be measured on these rows .*chrf can"):
        job(made, data={"eval": str(made / "rows.jsonl")}, eval={"metrics": [metric]})


def test_a_prefix_as_long_as_the_model_leaves_no_room(made):
    with pytest.raises(ValueError, match="has 512 positions, and the adapter takes 600 of them"):
        job(made, method={"prefix": {"length": 600}})


HEADS = {  # what is attached, and whether the head comes with the checkpoint (None: the model was made in memory)
    "a new head, LoRA alone": ("LoRA", False, "refused"),
    "a new head, LoRA on it": ("on the head", False, "refused"),  # over a base that is drawn anew
    "a new head, its biases": ("biases", False, "refused"),
    "a new head, Head": ("Head", False, True),
    "a trained head, LoRA alone": ("LoRA", True, True),
    "made in memory, LoRA alone": ("LoRA", None, None),
    "made in memory, Head": ("Head", None, True),
}
TASKS = {
    "classify": ("AutoModelForSequenceClassification", 3, {"text": "the film was good"}),
    "tag": ("AutoModelForTokenClassification", 3, {"tokens": ["good", "film", "was"], "tags": ["x", "y", "z"]}),
    "qa": ("AutoModelForQuestionAnswering", 2, {"question": "was it", "context": "it was good", "answers": "good"}),
}


@pytest.mark.parametrize(("attached", "brought", "kept"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("goal", TASKS)
def test_a_head_that_a_later_load_would_not_find_is_refused(tmp_path, goal, attached, brought, kept):
    """Drawn anew with every load and saved by nobody: the run's numbers could not be had again."""
    import transformers as hf

    from deltatune import BitFit, Freeze, Head, LoRA, attach
    from deltatune.train.job import from_model
    from deltatune.train.verify import head_kept

    auto, labels, row = TASKS[goal]
    names = [{"label": name} if goal == "classify" else {} for name in "xyz"]
    config = t.config("any", t.lines(tmp_path / "rows.jsonl", [row | n for n in names]), objective={goal: {}})
    folder = t.masked_model(tmp_path / "m")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = getattr(hf, auto).from_pretrained(folder, num_labels=labels)
    if brought:
        model.save_pretrained(tmp_path / "m")
        model = getattr(hf, auto).from_pretrained(tmp_path / "m")
    elif brought is None:
        model = getattr(hf, auto).from_config(model.config)
    head = "qa_outputs" if goal == "qa" else "classifier"
    methods = {
        "LoRA": LoRA(r=2),
        "on the head": LoRA(r=2, targets=("q", head)),
        "biases": [BitFit(), Freeze(names=(f"{head}.bias",))],
        "Head": [LoRA(r=2), Head()],
    }
    attach(model, methods[attached], "mine")
    given = {"adapter": "mine", "tokenizer": tokenizer}
    if goal == "classify" and attached == "Head" and brought is False:  # a pooler is new, too: Head would not be enough
        with pytest.raises(
            ValueError, match=r"did not bring bert\.pooler.*neither.*them.*model\.save_pretrained\(DIR\)"
        ):
            from_model(model, goal, config, given)
    elif kept == "refused":
        beside = r".*\(\.\.\.\), Head\(\)\], name='mine'\)" if goal != "classify" else r".*save_pretrained"
        with pytest.raises(ValueError, match=rf"is new: .*{head}{beside}"):
            from_model(model, goal, config, given)
    else:
        assert head_kept(from_model(model, goal, config, given)).ok is kept


def test_a_model_in_bf16_on_a_machine_that_is_slow_at_it_is_said(made, monkeypatch):
    from transformers import AutoModelForCausalLM

    from deltatune import LoRA, attach
    from deltatune.train import job as jobs

    monkeypatch.setattr(jobs, "best_dtype", lambda: torch.float32)
    for dtype, warns in ((torch.bfloat16, True), (torch.float32, False)):
        model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=dtype)
        attach(model, LoRA(r=2), "mine")
        config = t.config("any", str(made / "rows.jsonl"), train={"precision": "auto"})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            jobs.from_model(model, "sft", config, {"adapter": "mine"})
        assert any("many times slower than fp32" in str(w.message) for w in said) is warns
