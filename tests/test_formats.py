"""Every format people have becomes the same few shapes."""

import json

import pytest

from deltatune import blocks
from deltatune.data.example import Example, Turn
from deltatune.data.formats import FORMATS, convert, examples, load, sniff, unknown
from deltatune.data.problems import BadRow, Problems
from deltatune.data.readers import Row
from deltatune.data.wanted import WANTS, Intake

USER, SAID = Turn("user", "Hi"), Turn("assistant", "Yo")
CHAT = (USER, SAID)
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def ex(**values):
    return Example("f:1", **values)


TABLE = [
    ("text", {"text": "Hi"}, ex(text="Hi"), "text"),
    ("prompt_completion", {"prompt": "Hi", "completion": "Yo"}, ex(prompt="Hi", completion="Yo"), "pair"),
    ("prompt_completion", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
     ex(turns=(Turn("user", "Hi", False), SAID)), "chat"),
    ("query_response", {"query": "Hi", "response": "Yo"}, ex(prompt="Hi", completion="Yo"), "pair"),
    ("query_response", {"question": "Hi", "answer": "Yo"}, ex(prompt="Hi", completion="Yo"), "pair"),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Yo"}, ex(turns=CHAT), "chat"),
    ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["Hi", "Yo"]]},
     ex(turns=(Turn("system", "S"), *CHAT, Turn("user", "Add\n1 2"), Turn("assistant", "3"))), "chat"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
     ex(turns=CHAT), "chat"),
    ("sharegpt", {"conversation": [{"human": "Hi", "assistant": "Yo"}], "system": "S"},
     ex(turns=(Turn("system", "S"), *CHAT)), "chat"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"},
                                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                                    {"from": "observation", "value": "2"}]},
     ex(turns=(USER, Turn("assistant", "", None, {"tool_calls": [CALL]}), Turn("tool", "2"))), "chat"),
    ("messages", {"messages": MESSAGES}, ex(turns=CHAT), "chat"),
    ("messages", {"messages": json.dumps(MESSAGES)}, ex(turns=CHAT), "chat"),
    ("messages", {"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": None}]}, ex(turns=CHAT), "chat"),
    ("messages", {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 1}, MESSAGES[0], {**MESSAGES[1], "loss": False}]},
     ex(turns=(USER, Turn("assistant", "Yo", True), USER, Turn("assistant", "Yo", False))), "chat"),
    ("messages", {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, MESSAGES[1]],
        "tools": [{"type": "function"}]},
     ex(turns=CHAT, tools=({"type": "function"},)), "chat"),
    ("messages", {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}]},
     ex(turns=(USER, Turn("assistant", "", None, {"tool_calls": [{**CALL, "id": "c1"}]}))), "chat"),
    ("tagging", {"tokens": ["Hi", "Ann"], "tags": ["O", "B-PER"]},
     ex(text="Hi Ann", extra={"tokens": ("Hi", "Ann"), "tags": ("O", "B-PER")}), "tagging"),
    ("tagging", {"id": "7", "tokens": '["Hi", "Ann"]', "ner_tags": [0, 1]},
     ex(text="Hi Ann", extra={"id": "7", "tokens": ("Hi", "Ann"), "tags": (0, 1)}), "tagging"),
    ("question_answering", {"question": "Who?", "context": "Hi Ann", "answers": {"text": ["Ann"], "answer_start": [3]}},
     ex(text="Who?", text_pair="Hi Ann", extra={"answers": (("Ann", 3),)}), "answers"),
    ("question_answering", {"question": "Who?", "context": "Hi Ann", "answers": [{"text": "Ann", "answer_start": 3}]},
     ex(text="Who?", text_pair="Hi Ann", extra={"answers": (("Ann", 3),)}), "answers"),
    ("question_answering", {"question": "Who?", "context": "Hi", "answers": {"text": [], "answer_start": []}},
     ex(text="Who?", text_pair="Hi", extra={"answers": ()}), "answers"),
    ("preference", {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
     ex(prompt="Hi", extra={"chosen": "Yo", "rejected": "No"}), "preference"),
    ("preference", {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "No"}]},
     ex(turns=(USER,), extra={"chosen": (SAID,), "rejected": (Turn("assistant", "No"),)}), "preference"),
    ("preference", {"instruction": "Hi", "input": "", "chosen": "Yo", "rejected": "No"},
     ex(turns=(USER,), extra={"chosen": "Yo", "rejected": "No"}), "preference"),
    ("preference", {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yo"},
                    "rejected": {"from": "gpt", "value": "No"}},
     ex(turns=(USER,), extra={"chosen": (SAID,), "rejected": (Turn("assistant", "No"),)}), "preference"),
    ("rejected", {"messages": MESSAGES, "rejected_response": "No"},
     ex(turns=(USER,), extra={"chosen": (SAID,), "rejected": (Turn("assistant", "No"),)}), "preference"),
    ("unpaired", {"prompt": "Hi", "completion": "Yo", "label": False},
     ex(prompt="Hi", completion="Yo", extra={"desirable": False}), "unpaired"),
    ("messages", {"messages": MESSAGES, "label": True}, ex(turns=CHAT, extra={"desirable": True}), "unpaired"),
    ("stepwise", {"prompt": "Hi", "completions": ["a", "b"], "labels": [True, False]},
     ex(prompt="Hi", extra={"completions": ("a", "b"), "labels": (True, False)}), "stepwise"),
    ("prompt", {"prompt": "Hi"}, ex(prompt="Hi"), "prompt"),
    ("classification", {"text": "Hi", "label": "pos"}, ex(text="Hi", label="pos"), "classification"),
    ("classification", {"sentence": "Hi", "label": 0, "idx": 3}, ex(text="Hi", label=0, extra={"idx": 3}),
     "classification"),
    ("classification", {"sentence1": "a", "sentence2": "b", "label": 0.5}, ex(text="a", text_pair="b", label=0.5),
     "classification"),
    ("classification", {"premise": "a", "hypothesis": "b", "label": True}, ex(text="a", text_pair="b", label=1),
     "classification"),
    ("classification", {"text": "Hi", "labels": ["a", "b"]}, ex(text="Hi", label=("a", "b")), "classification"),
    ("classification", {"text": "Hi", "labels": []}, ex(text="Hi", label=()), "classification"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "expected", "kind"), TABLE, ids=[f"{c[0]}-{i}" for i, c in enumerate(TABLE)])
def test_rows_become_examples(format, row, expected, kind):
    assert sniff(row) == format
    found = convert(Row(row, "f:1"))
    assert found == expected
    assert found.kind == kind


def test_every_format_is_in_the_table():
    media = {"image_classification", "audio_classification", "transcription", "media"}  # in test_media.py
    assert {case[0] for case in TABLE} | media == set(FORMATS)


def test_a_given_format_wins(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Hi", "label": "pos"}\n')
    assert next(examples(path, Problems(), Intake("text"))) == Example(f"{path}:1", text="Hi")
    with pytest.raises(ValueError, match=r"unknown format 'mesages'; choose from .* Did you mean 'messages'\?"):
        next(examples(path, Problems(), Intake("mesages")))


def test_the_format_is_that_of_the_first_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"text": "c"}\n{"prompt": "d"}\n')
    problems = Problems()
    assert [example.prompt for example in examples(path, problems)] == ["a"]
    assert [(p.kind, p.lines) for p in problems.errors] == [("mixed_schema", [2, 3])]
    assert (problems.seen, problems.good, problems.bad) == (3, 1, 2)


def test_one_row_tells_all_its_faults():
    with pytest.raises(BadRow, match=r"f:1: prompt: the value is null"):
        convert(Row({"prompt": None, "completion": ""}, "f:1"))
    problems = Problems()
    from deltatune.data.formats import converted

    assert list(converted([Row({"prompt": None, "completion": ""}, "f:1")], problems)) == []
    assert [(p.field, p.count) for p in problems.errors] == [("prompt", 1), ("completion", 1)]
    assert problems.bad == 1


def test_bad_rows_stop_a_load_unless_leniency_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"1 of 2 rows cannot be used:\n.*a.jsonl:2: \[empty_field\]"):
        load(path)
    found, problems = load(path, skip_bad=True)
    assert len(found) == problems.bad == 1


def test_how_rows_are_read_by_a_template_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "topic": "b", "label": "c"}\n')
    wanted = blocks.wanted({"choice": {"template": "{topic}: {text} <mask>"}})
    (said, *_) = load(path, Intake(wanted=wanted))[1].notes
    assert said == f"{path}: read the columns that the template '{{topic}}: {{text}} <mask>' names: topic, text"


NAMED = {  # columns and their values -> the example that the error gives
    "nothing alike": ({"id": 1, "letter": "dear sir", "dept": "a"}, "{letter: text, dept: label}"),
    "a near name": ({"body": "dear sir", "txt": "a", "lable": "b"}, "{txt: text, lable: label}"),
    "too few": ({"letter": "dear sir"}, "{letter: text, yours: label}"),
}


@pytest.mark.parametrize(("row", "said"), NAMED.values(), ids=NAMED)
def test_columns_that_are_wanted_are_named_once_beside_the_files_own(row, said):
    text = str(unknown(Row(row, "f:1"), Intake(wanted=WANTS["classify"])))
    assert f"data.columns={said}" in text
    names = text.split("which lacks ")[1].split(". Name yours")[0].replace(", ", "|").split("|")
    assert len(names) == len(set(names)) > 2


def test_unknown_columns_name_the_nearest_format():
    with pytest.raises(BadRow, match=r"nearest is 'alpaca', which lacks output\|response"):
        convert(Row({"instruction": "a", "input": "b", "ouput": "c"}, "f:1"))
