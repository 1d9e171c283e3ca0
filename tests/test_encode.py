"""Loss masks, literally: for every chat template, exactly the text that is learned."""

import pytest

from deltatune.data.encode import Encoder, Encoding, classified, encode, encode_all, encoder, label_names, target
from deltatune.data.example import Example, Turn
from deltatune.data.problems import BadRow
from tiny_tokenizers import (
    CHATML,
    GEMMA,
    LLAMA3,
    MARKED,
    MISTRAL,
    NO_STOP,
    PHI3,
    QWEN3,
    SQUEEZED,
    VICUNA,
    bert_like,
    byte_level,
    t5_like,
)

SHORT = (("user", "Hi"), ("assistant", "Yo"))
LONG = (*SHORT, ("user", "Why?"), ("assistant", "Because."))
SYSTEM = (("system", "Sir."), *LONG)
TOOL = (("user", "Hi"), ("assistant", "Wait"), ("tool", "42"), ("assistant", "It is 42"))
# one token may not span the border of prompt and answer: here "\n" + "\n" is one token
GREEDY = (("Ċ", "Ċ"), ("Y", "o"))


def turns(*pairs):
    return Example("f:1", tuple(Turn(role, content) for role, content in pairs))


def learned(row, tokenizer):
    """The learned runs of a row, as text."""
    runs, inside = [], False
    for i, label in zip(row.ids, row.labels, strict=True):
        assert label in (-100, i)
        if label != -100:
            runs = [*runs[:-1], [*runs[-1], i]] if inside else [*runs, [i]]
        inside = label != -100
    return [tokenizer.decode(run) for run in runs]


CASES = [
    ("chatml", CHATML, SHORT, ["Yo<|im_end|>"]),
    ("chatml turns", CHATML, LONG, ["Yo<|im_end|>", "Because.<|im_end|>"]),
    ("chatml system", CHATML, SYSTEM, ["Yo<|im_end|>", "Because.<|im_end|>"]),
    ("chatml tool", CHATML, TOOL, ["Wait<|im_end|>", "It is 42<|im_end|>"]),
    ("chatml same text", CHATML, (("user", "Yo"), ("assistant", "Yo"), ("user", "o"), ("assistant", "o")),
     ["Yo<|im_end|>", "o<|im_end|>"]),
    ("llama3", LLAMA3, LONG, ["Yo<|eot_id|>", "Because.<|eot_id|>"]),
    ("llama3 trims", LLAMA3, (("user", " Hi "), ("assistant", "\n Yo \n")), ["Yo<|eot_id|>"]),
    ("gemma", GEMMA, LONG, ["Yo<end_of_turn>", "Because.<end_of_turn>"]),
    ("gemma without a system role", GEMMA, SYSTEM, ["Yo<end_of_turn>", "Because.<end_of_turn>"]),
    ("mistral", MISTRAL, LONG, [" Yo</s>", " Because.</s>"]),
    # the first answer's prompt holds the system text, the whole conversation has it later: found by its place
    ("mistral system", MISTRAL, SYSTEM, ["Yo</s>", " Because.</s>"]),
    ("phi3", PHI3, LONG, ["Yo<|end|>", "Because.<|end|>"]),
    ("qwen3", QWEN3, SHORT, ["<think>\n\n</think>\n\nYo<|im_end|>"]),
    ("qwen3 short answer inside the markup", QWEN3, (("user", "Hi"), ("assistant", "in")),
     ["<think>\n\n</think>\n\nin<|im_end|>"]),
    ("qwen3 thinks", QWEN3, (("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nYo")),
     ["<think>\nhm\n</think>\n\nYo<|im_end|>"]),
    # the template strips the first turn's reasoning: without it the turn would teach not to think
    ("qwen3 earlier thought", QWEN3,
     (("user", "Hi"), ("assistant", "<think>hm</think>Yo"), ("user", "Why?"), ("assistant", "<think>eh</think>So")),
     ["<think>\neh\n</think>\n\nSo<|im_end|>"]),
    ("vicuna", VICUNA, LONG, [" Yo</s>", " Because.</s>"]),
    ("generation marks", MARKED, LONG, ["Yo<|im_end|>", "Because.<|im_end|>"]),
    ("white space changed", SQUEEZED, (SHORT[0], ("assistant", "a\n\nb"), *SHORT), ["a\nb<|im_end|>", "Yo<|im_end|>"]),
    ("no template", None, LONG, [" Yo</s>", " Because.</s>"]),
    ("a template without stops", NO_STOP, SHORT, [" Yo</s>"]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "pairs", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_exactly_the_assistants_turns_and_their_ends_are_learned(template, pairs, expected):
    tokenizer = byte_level(template)
    assert learned(encode(turns(*pairs), tokenizer), tokenizer) == expected


def test_the_ids_are_the_templates_own():
    tokenizer = byte_level(LLAMA3)
    messages = [{"role": role, "content": content} for role, content in LONG]
    assert encode(turns(*LONG), tokenizer).ids == tuple(tokenizer.apply_chat_template(messages, return_dict=False))


def test_a_token_across_the_border_is_cut_where_generation_begins():
    tokenizer = byte_level(CHATML, GREEDY)
    row = encode(turns(("user", "Hi"), ("assistant", "\n\nYo")), tokenizer)
    at = next(i for i, label in enumerate(row.labels) if label != -100)
    assert tokenizer.decode(row.ids[:at]).endswith("assistant\n")
    assert tokenizer.convert_ids_to_tokens(row.ids[at:]) == ["Ċ", "Ċ", "Yo", "<|im_end|>", "Ċ"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert list(row.ids[:at]) == prompt


def test_thinking_turns_become_rows_of_their_own():
    tokenizer = byte_level(QWEN3)
    example = turns(("user", "Hi"), ("assistant", "<think>hm</think>Yo"), ("user", "Why?"), ("assistant", "So"))
    rows = encode_all(example, tokenizer)
    said = [tokenizer.decode([i for i, to in zip(row.ids, row.labels, strict=True) if to != -100]) for row in rows]
    assert said == ["<think>\nhm\n</think>\n\nYo<|im_end|>", "<think>\n\n</think>\n\nSo<|im_end|>"]
    assert len(encode_all(turns(*LONG), byte_level(CHATML))) == 1


def test_reasoning_beside_the_content():
    tokenizer = byte_level(QWEN3)
    said = [Turn("assistant", text, None, {"reasoning_content": "hm"}) for text in ("Yo", "So")]
    example = Example("f:1", (Turn("user", "Hi"), said[0], Turn("user", "Why?"), said[1]))
    assert learned(encode(example, tokenizer), tokenizer) == ["<think>\nhm\n</think>\n\nSo<|im_end|>"]
    rows = [learned(row, tokenizer) for row in encode_all(example, tokenizer)]
    assert rows == [[f"<think>\nhm\n</think>\n\n{text}<|im_end|>"] for text in ("Yo", "So")]
    inside = Example("f:1", (Turn("user", "Hi"), Turn("assistant", "in", None, {"reasoning_content": "hm"})))
    assert learned(encode(inside, tokenizer), tokenizer) == ["<think>\nhm\n</think>\n\nin<|im_end|>"]
    # a template that never writes reasoning still teaches the answers
    plain = byte_level(CHATML)
    assert learned(encode(example, plain), plain) == ["Yo<|im_end|>", "So<|im_end|>"]


def test_notes_say_what_was_decided():
    for template, pairs, part in [
        (None, SHORT, "no chat template"),
        (GEMMA, SYSTEM, "takes no system message"),
        (NO_STOP, SHORT, "with no token"),
    ]:
        made = Encoder(byte_level(template))
        made(turns(*pairs))
        assert any(part in note for note in made.notes)


def test_a_template_that_refuses_is_an_error_with_its_line():
    with pytest.raises(BadRow, match=r"f:1: messages: the chat template refuses it: Conversation roles must alternate"):
        encode(turns(("user", "a"), ("user", "b"), ("assistant", "c")), byte_level(GEMMA))


def test_tool_calls_are_learned():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level(template, eos_token="<|im_end|>", bos_token="<|im_start|>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = encode(Example("f:1", (Turn("user", "1?"), Turn("assistant", "", None, {"tool_calls": [call]}))), tokenizer)
    said = tokenizer.decode([label for label in row.labels if label != -100])
    assert said == '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>'


def test_weights_and_train_on():
    tokenizer = byte_level(CHATML)
    first, second = Turn("assistant", "Yo", False), Turn("assistant", "So")
    example = Example("f:1", (Turn("user", "Hi"), first, Turn("user", "Why?"), second))
    said = lambda row: tokenizer.decode([label for label in row.labels if label != -100])  # noqa: E731
    assert said(encode(example, tokenizer)) == "So<|im_end|>"
    assert said(encode(turns(*LONG), tokenizer, Encoding(train_on="last"))) == "Because.<|im_end|>"
    row = encode(turns(*SHORT), tokenizer, Encoding(train_on="all"))
    assert row.labels == (-100, *row.ids[1:])


def test_prompt_and_completion():
    tokenizer = byte_level()
    row = encode(Example("f:1", prompt="ab", completion="cd"), tokenizer)
    a, b, c, d = (tokenizer.convert_tokens_to_ids(char) for char in "abcd")
    eos = tokenizer.eos_token_id
    assert (row.ids, row.labels) == ((a, b, c, d, eos), (-100, -100, c, d, eos))


def test_prompt_and_completion_do_not_share_a_token():
    tokenizer = byte_level(None, (("b", "c"),))
    row = encode(Example("f:1", prompt="ab", completion="cd"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["a", "b", "c", "d", "</s>"]


def test_virtual_ids_come_first_and_are_never_targets():
    row = encode(
        Example("f:1", prompt="ab", completion="c"), byte_level(), Encoding(prompt_ids=(900, 901), max_length=6)
    )
    assert row.ids[:2] == (900, 901)
    assert row.labels[:4] == (-100,) * 4
    assert len(row.ids) == 6


def test_every_token_of_a_long_text_is_learned_exactly_once():
    tokenizer = byte_level()
    text = "the quick brown fox jumps over it"
    for length in (2, 5, 7, 33, 34, 35):
        rows = encode_all(Example("f:1", text=text), tokenizer, Encoding(max_length=length))
        targets = [label for row in rows for label in row.labels if label != -100]
        assert tokenizer.decode(targets) == text[1:] + "</s>"
        assert all(len(row.ids) <= length and row.labels[0] == -100 for row in rows)


def test_truncation_is_counted_and_never_leaves_a_masked_row():
    tokenizer, example = byte_level(), Example("f:7", prompt="abcdef", completion="xyz")
    cut = Encoder(tokenizer, Encoding(max_length=8))
    assert tokenizer.decode([label for label in cut(example).labels if label != -100]) == "xy"
    assert (cut.truncated, cut.lost_tokens) == (1, 2)
    encode_all(example, tokenizer, Encoding(max_length=8))
    assert encoder(tokenizer, Encoding(max_length=8)).truncated == 1
    left = encode(example, tokenizer, Encoding(max_length=5, truncate="left"))
    assert tokenizer.decode(left.ids) == "fxyz</s>"
    with pytest.raises(BadRow, match=r"f:7: the row has 10 tokens, max_length allows 8\. Raise max_length to 10"):
        encode(example, tokenizer, Encoding(max_length=8, truncate="refuse"))
    with pytest.raises(BadRow, match=r"f:7: nothing to learn is left after cutting the row to 6 tokens"):
        encode(example, tokenizer, Encoding(max_length=6))


def test_encoder_decoder():
    tokenizer = t5_like("a b c d e")
    for example in (Example("f:1", prompt="a b", completion="c d"), turns(("user", "a b"), ("assistant", "c d"))):
        row = encode(example, tokenizer, Encoding(decoder=True))
        assert (row.ids, row.labels, row.decoder) == ((3, 4, 1), (5, 6, 1), True)
    cut = encode(Example("f:1", prompt="a", completion="a b c d e"), tokenizer, Encoding(decoder=True, max_length=3))
    assert cut.labels == (3, 4, 1)


@pytest.mark.parametrize(
    ("labels", "names", "targets"),
    [
        (["pos", "neg"], ("neg", "pos"), [1, 0]),
        ([10, 2, 10.0], ("2", "10"), [1, 0, 1]),
        (["1", "0"], ("0", "1"), [1, 0]),
        ([0.5, 2], (), [0.5, 2.0]),
        (["3.8", "1"], (), [3.8, 1.0]),
        ([("a", "b"), ("b",), ()], ("a", "b"), [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]),
    ],
)
def test_labels(labels, names, targets):
    assert label_names(Example("f:1", text="x", label=label) for label in labels) == names
    assert [target(label, names, "f:1") for label in labels] == targets


def test_an_unknown_label_names_the_nearest():
    with pytest.raises(BadRow, match=r"dev:3: label: unknown label 'positiv'; .* Did you mean 'positive'\?"):
        target("positiv", ("negative", "positive"), "dev:3")


def test_a_pair_of_texts_has_segments():
    row = classified(Example("f:1", text="a b", text_pair="c", label="yes"), bert_like("a b c"), ("no", "yes"))
    assert (row.ids, row.type_ids, row.target, row.labels) == ((2, 4, 5, 3, 6, 3), (0, 0, 0, 0, 1, 1), 1, None)
    cut = classified(
        Example("f:1", text="a b c", label="no"),
        bert_like("a b c"),
        ("no", "yes"),
        Encoding(max_length=5, prompt_ids=(90,)),
    )
    assert (cut.ids, cut.type_ids) == ((2, 90, 4, 5, 3), (0, 0, 0, 0, 0))


def test_classified_texts_are_cut_on_the_side_that_is_asked_for_and_counted():
    example, tokenizer = Example("f:1", text="a b c", label="no"), bert_like("a b c")
    for side, ids in [("right", (2, 4, 5, 3)), ("left", (2, 5, 6, 3))]:
        made = Encoder(tokenizer, Encoding(max_length=4, truncate=side))
        assert made.classified(example, ("no", "yes")).ids == ids
        assert (made.truncated, made.lost_tokens, tokenizer.truncation_side) == (1, 1, "right")
    with pytest.raises(BadRow, match="f:1: the row has 5 tokens, max_length allows 4"):
        classified(example, tokenizer, ("no", "yes"), Encoding(max_length=4, truncate="refuse"))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"truncate: 'rigth' is none of refuse, right, left. Did you mean 'right'\?"):
        Encoding(truncate="rigth")
    with pytest.raises(ValueError, match="leaves no room"):
        Encoding(max_length=2, prompt_ids=(1, 2))


def test_virtual_ids_of_a_classified_text_leave_the_first_token_where_a_head_reads_it():
    tokenizer = bert_like("a b")
    plain = classified(Example("f:1", text="a b", label="yes"), tokenizer, ("no", "yes"))
    row = classified(Example("f:1", text="a b", label="yes"), tokenizer, ("no", "yes"), Encoding(prompt_ids=(90, 91)))
    assert plain.ids == (2, 4, 5, 3)
    assert row.ids == (2, 90, 91, 4, 5, 3)
    assert row.type_ids == (0,) * 6
