"""Virtual tokens at any place of a template, and sets mixed by temperature."""

import numpy as np
import pytest

import tiny_run as t
import tiny_tokenizers as tt
from deltatune import SFT, Prompt
from deltatune.data.encode import Encoding
from deltatune.data.example import Example
from deltatune.data.mix import Mixture
from deltatune.data.order import Batching
from deltatune.data.problems import BadRow
from deltatune.prompting.template import Filler, Template
from deltatune.train.job import prepare

WORDS = tt.bert_like("good film it was great . [MASK] say")
WORDS.add_special_tokens({"mask_token": "[MASK]"})
LETTERS = tt.byte_level(tt.CHATML)
ROW = Example("f:1", text="good film", prompt="ab", completion="yes")
FRONT = (900, 901, 902)

FILLED = [  # masked template -> words, virtual tokens by number
    ("<soft:3>{text} it was <mask>", "[CLS] 0 1 2 good film it was [MASK] [SEP]"),
    ("{text} <soft:2> it <soft> was <mask>", "[CLS] good film 0 1 it 2 was [MASK] [SEP]"),
    ("<soft>{text}<soft><mask><soft>", "[CLS] 0 good film 1 [MASK] 2 [SEP]"),
    ("{text} it was <mask>", "[CLS] 0 1 2 good film it was [MASK] [SEP]"),  # no place: in front
]


@pytest.mark.parametrize(("template", "tokens"), FILLED)
def test_virtual_tokens_stand_where_the_template_says(template, tokens):
    found = Filler(WORDS, True, front=FRONT)(Template(template), ROW)
    said = [str(i - 900) if i >= 900 else WORDS.convert_ids_to_tokens(i) for i in found.ids]
    assert said == tokens.split()
    assert said[found.mask_at] == "[MASK]"


def test_a_causal_template_ends_with_its_last_virtual_token():
    found = Filler(LETTERS, False, front=FRONT)(Template("<soft>{text} is<soft:2> <mask>."), ROW)
    assert found.ids[0] == 900
    assert found.ids[-2:] == (901, 902)
    assert LETTERS.decode(found.ids[1:-2]) == "good film is"
    assert found.mask_at == len(found.ids) - 1


def test_without_virtual_tokens_the_base_reads_the_plain_template():
    soft, plain = Template("<soft:3>{text} it <soft>was <mask>"), Template("{text} it was <mask>")
    assert Filler(WORDS, True)(soft, ROW) == Filler(WORDS, True)(plain, ROW)


def test_only_the_rows_own_text_is_cut_around_virtual_tokens():
    long = Example("f:1", text="good film " * 20)
    found = Filler(WORDS, True, 10, FRONT)(Template("<soft:3>{text} it was <mask>"), long)
    assert len(found.ids) <= 10
    assert [i for i in found.ids if i >= 900] == list(FRONT)


def test_a_rows_own_text_places_nothing():
    sly = Example("f:1", text="<soft:3> good")
    found = Filler(WORDS, True, front=FRONT)(Template("<soft:3>{text}<mask>"), sly)
    assert [i for i in found.ids if i >= 900] == list(FRONT)


WRONG = [
    ("{text} <soft:0> <mask>", "'<soft:0>' is no slot; write <mask> for the gap, <soft> or <soft:3>"),
    ("{text} <soft:x> <mask>", "'<soft:x>' is no slot"),
    ("{text} <soft:-1><mask>", "'<soft:-1>' is no slot"),
    ("{text} <soft>", "exactly one <mask>, it has 0"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_wrong_template_is_an_error(text, said):
    with pytest.raises(ValueError, match=said):
        Template(text)


DISAGREE = [  # method, objective -> what is said
    ({"prompt": {"length": 2}}, {"cloze": {"template": "<soft:3>{text}<mask>"}}, "has 3 .* has 2: .* length to 3"),
    ("lora", {"cloze": {"template": "<soft:3>{text}<mask>"}}, "has 3 virtual tokens, the method has 0: use the method"),
    ({"ptuning": {"length": 2}}, {"cloze": {"template": "{text}<mask>"}}, "has 0 .* has 2: write <soft:2> where"),
]


@pytest.mark.parametrize(("method", "objective", "said"), DISAGREE)
def test_template_and_method_must_agree_on_virtual_tokens(tmp_path, method, objective, said):
    model, rows = t.masked_model(tmp_path / "m"), t.label_rows(tmp_path / "rows.jsonl")
    objective["cloze"]["labels"] = {"pos": ["good"], "neg": ["bad"]}
    with pytest.raises(ValueError, match=said):
        prepare(t.config(model, rows, method=method, objective=objective))


# ---- sft -------------------------------------------------------------------------------------------------------------
def test_an_sft_template_asks_and_the_completion_is_learned():
    (found,) = SFT(template="<soft:2>{prompt}?<soft>").encode(ROW, LETTERS, Encoding(prompt_ids=FRONT))
    learned = [label for label in found.labels if label != -100]
    assert LETTERS.decode(learned) == "yes<|im_end|>"
    assert found.ids[-len(learned) :] == tuple(learned)
    asked = found.ids[: -len(learned)]
    assert asked[:2] == (900, 901)
    assert LETTERS.decode(asked[2:-1]) == "ab?"
    assert asked[-1] == 902
    (short,) = SFT(template="{prompt}").encode(Example("f:1", prompt="a" * 50, completion="b"), LETTERS, Encoding(9))
    assert len(short.ids) <= 9


def test_an_encoder_reads_the_template_and_the_decoder_answers():
    tokenizer = tt.t5_like("a b yes")
    row = Example("f:1", prompt="a b", completion="yes")
    (found,) = SFT(template="<soft>{prompt}<soft>").encode(row, tokenizer, Encoding(prompt_ids=(90, 91), decoder=True))
    assert found.ids == (90, *tokenizer("a b", add_special_tokens=False)["input_ids"], 91, tokenizer.eos_token_id)
    assert found.labels == (*tokenizer("yes", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def test_an_sft_template_needs_an_answer_and_has_no_gap():
    with pytest.raises(ValueError, match=r"leave <mask> out$"):
        SFT(template="{prompt} <mask>")
    with pytest.raises(BadRow, match=r"f:1.*the row has no answer"):
        SFT(template="{prompt}").encode(Example("f:1", text="a"), LETTERS, Encoding())


# ---- several prompts in one forward pass -----------------------------------------------------------------------------
def test_all_prompts_of_a_row_share_one_forward_pass_and_one_loss(tmp_path):
    """The loss of the batch is the mean of each prompt's own loss."""
    model, rows = t.masked_model(tmp_path / "m"), t.label_rows(tmp_path / "rows.jsonl", 8)
    objective = {"cloze": {"labels": {"pos": ["good"], "neg": ["bad"]}}}
    job = prepare(t.config(model, rows, method={"prompt": {"length": 2, "count": 3}}, objective=objective))
    calls, batch = [], job.batch(job.rows[:4])
    job.objective.parts(job.model, batch)  # the first pass of a model asks how it finishes its logits
    job.model.bert.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    assert (batch.prompts, batch.targets) == (3, 12)
    loss = float(job.objective.loss(job.model, batch)[0].detach()) / batch.targets
    assert len(job.objective.parts(job.model, batch)) == 4
    assert calls == [12, 12]
    alone = [
        float(job.objective.loss(job.model, part)[0].detach()) / 4
        for k in range(3)
        for part in [type(batch)({n: x[k::3] for n, x in batch.inputs.items()}, batch.labels[k::3],
                                 mask_at=batch.mask_at[k::3])]
    ]  # fmt: skip
    assert loss == pytest.approx(np.mean(alone), rel=1e-6)
    assert len(set(alone)) == 3


def test_binding_reaches_every_method_of_a_job(tmp_path):
    model, rows = t.masked_model(tmp_path / "m"), t.label_rows(tmp_path / "rows.jsonl", 8)
    method = {"prompt": {"length": 3, "init": "text", "text": "good film"}}
    objective = {"cloze": {"labels": {"pos": ["good"], "neg": ["bad"]}}}
    job = prepare(t.config(model, rows, method=method, objective=objective))
    (bound,) = job.model.deltatune_state.methods["default"]
    assert isinstance(bound, Prompt)
    assert len(bound.ids) == 2


# ---- mixing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tau", "small"), [(1.0, 10), (0.5, 25), (0.0, 50)])
def test_an_epoch_draws_each_set_by_its_size_to_the_power_of_tau(tau, small):
    """p ~ n^tau: of 100 rows, 10 and 90, sqrt gives 1 : 3."""
    mix = Mixture((10, 90), tau, seed=3)
    rows = mix.rows(0)
    assert (len(rows), sum(r < 10 for r in rows)) == (100, small)
    assert rows == mix.rows(0) != mix.rows(1)
    groups = mix.plan([1] * 100, Batching(rows=8), 2)
    assert sorted(r for group in groups for r in group) == sorted(mix.rows(2))


def test_a_small_set_repeats_evenly():
    counts = np.bincount([r for r in Mixture((10, 90), 0.0).rows(0) if r < 10])
    assert counts.tolist() == [5] * 10


@pytest.mark.parametrize(("data", "said"), [
    ({"mix": {"temperature": 0.5}}, "data.mix is for several sets"),
    ({"mix": {"temperature": -1}}, "data.mix.temperature"),
    ({"mix": {"tau": 1}}, "data.mix.tau"),
])  # fmt: skip
def test_a_wrong_mix_is_an_error(tmp_path, data, said):
    model, rows = t.masked_model(tmp_path / "m"), t.label_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=said):
        prepare(t.config(model, rows, data=data, objective="classify"))


def test_mixed_sets_keep_their_rows_apart(tmp_path):
    model = t.chat_model(tmp_path / "m")
    few, many = t.chat_rows(tmp_path / "few.jsonl", 4, 5), t.chat_rows(tmp_path / "many.jsonl", 12)
    config = t.config(model, few, data={"train": [few, many], "mix": {"temperature": 0.0}})
    job = prepare(config)
    assert job.sizes == [4, 12]
    sampler = job.sampler()
    drawn = [i for step in range(sampler.steps(1)) for group in sampler(step) for i in group]
    assert (len(drawn), sum(i < 4 for i in drawn)) == (16, 8)
    assert "few.jsonl" in job.rows[3].where
    assert "many.jsonl" in job.rows[4].where
