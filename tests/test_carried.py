"""What a run recorded goes along when its adapter is merged, combined or exported: it is asked as the run was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as hf
from peft import PeftModel
from typer.testing import CliRunner

import tiny_run as t
from deltatune import LoRA, attach, combine, predict
from deltatune.cli import main
from deltatune.core.manifest import is_model, record_in, write_record
from deltatune.data.formats import load, used
from deltatune.data.wanted import Intake
from deltatune.evaluate.asking import asking, recorded
from deltatune.evaluate.generate import Decoding
from deltatune.objectives.common import load as load_base
from deltatune.train.opening import model_config
from deltatune.train.run import run
from models import tiny


def call(*given, code: int = 0):
    found = CliRunner().invoke(main, [str(word) for word in given])
    assert found.exit_code == code, found.output
    return found


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


COLUMNS = {"subject": "text", "folder": "label"}
SHORT = {"steps": 4, "batch_rows": 4, "batch_tokens": None, "lr": 0.05}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A classifier with columns of its own, with LoRA and with (IA)^3, and answers by a template."""
    here = tmp_path_factory.mktemp("made")
    bert, chat = t.masked_model(here / "bert"), t.chat_model(here / "chat")
    rows = [json.loads(line) for line in Path(t.label_rows(here / "l.jsonl")).read_text().splitlines()]
    mail = t.lines(here / "mail.jsonl", [{"subject": r["text"], "folder": r["label"]} for r in rows])
    data = {"columns": COLUMNS}
    for name in ("lora", "ia3"):
        config = t.config(bert, mail, mail, objective="classify", data=data, method=name, train=SHORT)
        assert run(config, out=here / name).status == "done"
    said = t.lines(here / "said.jsonl", [{"topic": "abc", "answer": "cba"}] * 8)
    goal = {"sft": {"template": "About {topic}:"}}
    assert run(t.config(chat, said, objective=goal, train={"steps": 2}), out=here / "said").status == "done"
    return here


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is retiring
def test_a_classifier_is_exported_and_merged_with_one_command_each(made, tmp_path):
    wanted = lines(call("predict", "--adapter", made / "lora", "--data", made / "mail.jsonl").stdout)
    told = call("export", made / "lora", "--lora", "--out", tmp_path / "e", "--data", made / "mail.jsonl")
    assert "the task head goes along whole" in told.stdout
    call("merge", made / "lora", "--out", tmp_path / "m")
    call("merge", made / "lora", "--with", f"{made / 'lora'}:0.5", "--adapter-only", "--out", tmp_path / "two")
    record = record_in(made / "lora" / "adapter")
    assert record["read"] == ["subject"]
    for folder, how in (("e", "--adapter"), ("m", "--model")):
        assert record_in(tmp_path / folder) == record
        found = lines(call("predict", how, tmp_path / folder, "--data", made / "mail.jsonl").stdout)
        for one, other in zip(found, wanted, strict=True):
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
        document = json.loads(call("eval", how, tmp_path / folder, "--data", made / "mail.jsonl", "--json").stdout)
        assert document["rows"] == 24
    assert record_in(tmp_path / "two") == record
    row = lines(call("predict", "--adapter", tmp_path / "two", '{"subject": "good"}').stdout)
    assert set(row[0]["scores"]) == {"pos", "neg"}
    base = load_base("AutoModelForSequenceClassification", made / "bert", model_config(made / "bert"), num_labels=2)
    ours = PeftModel.from_pretrained(base, str(tmp_path / "e")).eval()
    ids = hf.AutoTokenizer.from_pretrained(made / "bert")(json.loads(
        (made / "mail.jsonl").read_text().splitlines()[0])["subject"], return_tensors="pt")  # fmt: skip
    assert ours(**ids).logits.softmax(-1)[0].tolist() == pytest.approx(
        [wanted[0]["scores"]["neg"], wanted[0]["scores"]["pos"]], abs=1e-5
    )


def test_python_asks_a_merged_folder_without_being_told_what(made, tmp_path):
    call("merge", made / "ia3", "--out", tmp_path / "m")
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    (found,) = predict(model, None, [{"subject": "good"}])
    assert set(found["scores"]) == {"pos", "neg"}
    assert is_model(tmp_path / "m")
    assert not is_model(made / "lora" / "adapter")


def test_an_export_that_must_be_told_more_says_all_of_it(made, tmp_path):
    said = call("export", made / "ia3", "--lora", "--out", tmp_path / "e", code=2).stderr
    assert "--drop" in said
    assert "--energy 0.99" in said
    call("export", made / "ia3", "--lora", "--drop", "--energy", "0.99", "--out", tmp_path / "e")
    assert record_in(tmp_path / "e") == record_in(made / "ia3" / "adapter")


def test_a_merged_model_is_asked_in_the_template_of_its_run(made, tmp_path):
    call("merge", made / "said", "--out", tmp_path / "m")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert recorded(model)[0]["objective"]["sft"]["template"] == "About {topic}:"
    asked = asking(model, Decoding(4))
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "m")
    (ids,) = asked.rows(tokenizer, {"topic": "abc"}, lambda _: [])
    assert tokenizer.decode(ids).endswith("About abc:")
    attach(model, LoRA(r=2), name="next")  # a new adapter is asked as its own run says
    assert recorded(model) == [{}]
    rows = t.lines(tmp_path / "new.jsonl", [{"topic": "ab"}])
    assert call("generate", "--model", tmp_path / "m", "--data", rows, "--max-new-tokens", "2").stdout
    bad = t.lines(tmp_path / "bad.jsonl", [{"topik": "ab"}])
    assert "Did you mean 'topik'?" in call("generate", "--model", tmp_path / "m", "--data", bad, code=2).stderr


RECORDS = [  # of the first and the second adapter -> of the two together
    ({"objective": {"sft": {}}, "columns": {"a": "text"}}, {"objective": {"sft": {}}, "columns": {}},
     {"objective": {"sft": {}}}),
    ({"objective": {"sft": {}}, "max_length": 8}, {}, {"objective": {"sft": {}}, "max_length": 8}),
    ({"objective": {"sft": {}}}, {"objective": {"qa": {}}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "both"), RECORDS, ids=["columns", "one", "objective"])
def test_adapters_together_keep_what_their_runs_agree_on(first, second, both):
    model = tiny("llama")
    for name, record in (("a", first), ("b", second)):
        attach(model, LoRA(r=2), name=name)
        model.deltatune_state.records[name] = record
    for name, parameter in model.named_parameters():
        if "delta_slot" in name:
            parameter.data += 0.01
    combine(model, {"a": 1.0, "b": 1.0}, "c")
    assert model.deltatune_state.records["c"] == both


def test_what_is_not_kept_is_said_with_the_way_out(made, tmp_path):
    adapter = tmp_path / "bare"
    model = hf.AutoModelForCausalLM.from_pretrained(made / "chat")
    attach(model, LoRA(r=2), name="a")
    from deltatune import save

    save(model, "a", adapter, base=str(made / "chat"))
    said = call("merge", adapter, "--out", tmp_path / "m").stderr
    assert "what was learned is not kept (no run recorded it): eval and predict need --objective" in said
    assert not (tmp_path / "m" / "deltatune.json").exists()
    write_record(tmp_path / "m", {"objective": {"sft": {}}})
    assert record_in(tmp_path / "m") == {"objective": {"sft": {}}}


USED = [
    ({"subject": "a", "folder": "x", "id": 1}, Intake(columns=COLUMNS), ("subject",)),
    ({"text": "a", "label": "x", "more": 1}, Intake(), ("text",)),
    ({"premise": "a", "hypothesis": "b", "label": "x"}, Intake(), ("premise", "hypothesis")),
    ({"prompt": "a", "completion": "b"}, Intake(), ("prompt",)),
    ({"question": "a", "context": "b a", "answers": "a"}, Intake(format="question_answering"), ("question", "context")),
]


@pytest.mark.parametrize(("row", "how", "columns"), USED, ids=[str(c) for *_, c in USED])
def test_the_columns_of_the_question_are_known_by_the_files_names(tmp_path, row, how, columns):
    from dataclasses import replace

    from deltatune.data.wanted import ANSWERS, LABELS

    found = load(t.lines(tmp_path / "r.jsonl", [row]), how)[0][0]
    answer = LABELS if "label" in row or "folder" in row else ANSWERS if "answers" in row else ()
    assert used(found, replace(how, wanted=replace(how.wanted, answer=answer))) == columns
