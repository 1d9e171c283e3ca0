"""What a template may say: columns of the row, slots spelt right, braces and brackets that are text."""

from __future__ import annotations

import pytest

import tiny_run as t
import tiny_tokenizers as tt
from deltatune import SFT, Cloze, Prompt
from deltatune.core.store import load as load_adapter
from deltatune.data.encode import Encoding
from deltatune.data.example import Example
from deltatune.data.formats import convert, load
from deltatune.data.problems import BadRow
from deltatune.data.readers import Row
from deltatune.evaluate.asking import example_of
from deltatune.evaluate.generate import Decoding, answers
from deltatune.prompting.template import Template
from deltatune.train.run import run
from models import tiny

REFUSED = [
    ("It was <mask>", "reads nothing of the row: write {text}"),
    ("<soft:3> <mask>", "reads nothing of the row"),
    ("{ text }it was <mask>", "'{ text }' is no field.*Did you mean 'text'"),
    ("{text!r} <mask>", "'{text!r}' is no field.*Did you mean 'text'"),
    ("{te xt} <mask>", "'{te xt}' is no field.*Did you mean 'text'"),
    ("{} <mask>", "'{}' is no field: write {name}"),
    ("{text <mask>", "'{text ' is no field.*Did you mean 'text'"),
    ("text} <mask>", "'}' is no field"),
    ("{{text}} <mask>", "reads nothing of the row"),
    ("{text} <Soft:20><mask>", "'<Soft:20>' is no slot; write <mask> for the gap, <soft> or <soft:3>"),
    ("{text} <soft20><mask>", "'<soft20>' is no slot"),
    ("{text} <soft:00><mask>", "'<soft:00>' is no slot"),
    ("{text} <sfot:3><mask>", "'<sfot:3>' is no slot"),
    ("{text} <sfot><mask>", "'<sfot>' is no slot"),
    ("{text} <softs><mask>", "'<softs>' is no slot"),
    ("{text} <soft :3><mask>", "'<soft :3>' is no slot"),
    ("{text} < soft><mask>", "'< soft>' is no slot"),
    ("{text} <soft:3<mask>", "'<soft:3' is no slot"),
    ("{text} <MASK> <mask>", "'<MASK>' is no slot"),
    ("{text} <msak> <mask>", "'<msak>' is no slot"),
    ("{text} <mask:> <mask>", "'<mask:>' is no slot"),
    ("{text} {label} <mask>", "{label} would tell the answer"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_what_it_cannot_mean_is_an_error(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        Template(text)
    assert repr(text) in str(caught.value)


ALLOWED = [  # what is text stays text
    ("<b>{text}</b> <mask>", "<b>good</b> "),
    ("<task> {text} <mark> <h1> 2 < 3 > 1 <mask>", "<task> good <mark> <h1> 2 < 3 > 1 "),
    ("{{{text}}} {{x}} <mask>", "{good} {x} "),
    ("<soft:03>{text}<mask>", "good"),
]


@pytest.mark.parametrize(("text", "said"), ALLOWED)
def test_what_is_no_slot_is_text(text, said):
    parts = Template(text).parts(Example("f:1", text="good"))
    assert "".join(p.text for p in parts) == said
    assert sum(p.soft for p in parts) == (3 if "soft" in text else 0)


# ---- columns of the data ---------------------------------------------------------------------------------------------
ROWS = [
    {"premise": "a man sleeps", "hypothesis": "he rests", "topic": "rest", "year": 1990, "label": "pos"},
    {"premise": "a man runs", "hypothesis": "he rests", "topic": "sport", "year": 2001, "label": "neg"},
]


def test_a_template_reads_any_column(tmp_path):
    found, _ = load(t.lines(tmp_path / "rows.jsonl", ROWS))
    parts = Template("{topic} {year}: {premise}? {text_pair} <mask>").parts(found[1])
    assert "".join(p.text for p in parts) == "sport 2001: a man runs? he rests "
    assert [p.text for p in parts if p.own] == ["sport", "2001", "a man runs", "he rests"]


FAULTY = [
    ("{premse} <mask>", r"rows.jsonl:1: premse: the template .* this row does not have it. Its columns: premise, .*"
                        "Did you mean 'premise'"),
    ("{tags} <mask>", r"rows.jsonl:1: tags: .* it is no text here: \['a'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), FAULTY)
def test_a_column_that_is_missing_is_named_with_file_and_line(tmp_path, text, said):
    found, _ = load(t.lines(tmp_path / "rows.jsonl", [{**row, "tags": ["a"]} for row in ROWS]))
    words = tt.bert_like(t.WORDS)
    words.mask_token = "[MASK]"
    goal = Cloze(text, {"pos": ["good"], "neg": ["bad"]}).bind(words, "masked")
    with pytest.raises(BadRow, match=said):
        goal.encode(found[0], words, Encoding())


def test_a_run_reads_stores_and_asks_with_the_rows_own_columns(tmp_path):
    t.chat_model(tmp_path / "model")
    rows = [{"prompt": f"{c}{c}", "topic": f"topic {c}", "completion": c} for c in "abcdef"]
    objective = {"sft": {"template": "About {topic}:<soft:2>{prompt}"}}
    file = t.lines(tmp_path / "rows.jsonl", rows)
    made = t.config(
        tmp_path / "model", file, held=file, method={"prompt": {"length": 2}}, objective=objective, train={"steps": 2}
    )
    assert run(made, out=tmp_path / "run").status == "done"
    tokenizer = tt.byte_level(tt.CHATML)
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    load_adapter(model, tmp_path / "run" / "adapter", "a", verify=False)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0][0].tolist()))
    answers(model, tokenizer, [{"prompt": "xy", "topic": "topic z"}], Decoding(max_new_tokens=1))
    real = [i for i in seen[0] if i < len(tokenizer)]
    assert tokenizer.decode(real) == "About topic z:!!xy"  # id 0, !, stands under each virtual token
    with pytest.raises(BadRow, match=r"prompt: topic: the template .* this row does not have it"):
        answers(model, tokenizer, ["xy"], Decoding(max_new_tokens=1))


def test_a_chats_row_keeps_its_columns():
    row = Example("f:3", turns=(), prompt="p", row={"topic": "t"})
    assert Template("{topic} {prompt}", gap=False).parts(example_of(row))[0].text == "t"
    said = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}], "topic": "t"}
    chat = example_of(convert(Row(said, "f:3")))
    assert (chat.where, chat.row["topic"], chat.prompt) == ("f:3", "t", "why")


def test_the_prompt_method_is_bound_to_slots_still():
    with pytest.raises(ValueError, match="has 3 virtual tokens, the method has 2"):
        Template("<soft:3>{prompt}", gap=False).demand(Prompt(2).length)
    assert SFT(template="{prompt}{topic}").template == "{prompt}{topic}"
