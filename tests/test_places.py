"""How many positions a model has, family by family, and what is said where a text does not fit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import tiny_run as t
import tiny_tokenizers as tt
from deltatune import LoRA, Prefix, Prompt, attach, rows
from deltatune.core.attach import packing
from deltatune.core.attention import packed, positions
from deltatune.core.places import places, tabled
from deltatune.core.store import virtual_ids
from deltatune.evaluate.generate import Decoding, generate
from deltatune.train.job import prepare
from deltatune.train.run import run
from models import ALL, RECURRENT, inputs, tiny

# family -> (positions, whether they are rows of a table)
PLACES = {
    "llama": (128, False), "qwen": (128, False), "mistral": (128, False), "gemma": (128, False),
    "phi3": (128, False), "gpt2": (128, True), "neox": (128, False), "opt": (128, True), "bert": (128, True),
    "roberta": (126, True), "distilbert": (128, True), "electra": (128, True), "modernbert": (128, False),
    "t5": (None, False), "bart": (128, True), "vit": (None, False), "clip": (32, True), "whisper": (32, True),
    "mamba": (None, False), "mamba2": (None, False),
}  # fmt: skip


def test_the_table_names_every_family():
    assert set(PLACES) == {*ALL, *RECURRENT}


@pytest.mark.parametrize("family", PLACES)
def test_places(family):
    model = tiny(family)
    room, table = PLACES[family]
    assert places(model.config) == room
    assert tabled(model) == (room if table else None)


def test_a_table_of_pictures_says_nothing_of_texts():
    """In models of pictures and words, whose texts may have computed positions."""
    model = tiny("llama")
    model.add_module("vision", torch.nn.Module())
    model.vision.position_embedding = torch.nn.Embedding(17, 4)
    assert tabled(model) is None


def text(model, length: int) -> dict:
    given = inputs(model, rows=2, seq=length)
    return {k: v for k, v in given.items() if k not in ("labels", "decoder_input_ids")}


@pytest.mark.parametrize("family", [f for f, (_, table) in PLACES.items() if table and f not in ("clip", "whisper")])
def test_a_text_may_fill_the_table_and_no_more(family):
    """The last position works, so the number is right; one more is refused before the forward pass."""
    model, room = attach(tiny(family), LoRA(r=2)), PLACES[family][0]
    model(**text(model, room))
    with pytest.raises(ValueError, match=rf"0 virtual tokens and a text of {room + 1} tokens.* has {room}: shorten"):
        model(**text(model, room + 1))


def test_prefixes_and_prompts_take_places_of_the_text():
    model = attach(tiny("gpt2"), Prefix(10))
    model(**text(model, 118))
    with pytest.raises(ValueError, match=r"10 virtual tokens and a text of 119 .*take 129 .*gpt2 has 128.*fewer"):
        model(**text(model, 119))
    model = attach(tiny("gpt2"), Prompt(10))
    front = torch.tensor([virtual_ids(model)] * 2)
    ids = torch.cat([front, text(model, 119)["input_ids"]], 1)
    with pytest.raises(ValueError, match=r"10 virtual tokens and a text of 119 .*at most 118"):
        model(input_ids=ids)
    model(input_ids=ids[:, :-1])


def test_rows_of_unlike_prefixes_are_measured_by_the_longest():
    model = attach(attach(tiny("gpt2"), Prefix(10), "a"), Prefix(4), "b")
    with rows(model, ["a", "b"]):
        model(**text(model, 118))
        with pytest.raises(ValueError, match="10 virtual tokens and a text of 119"):
            model(**text(model, 119))


def test_cached_positions_count():
    model = attach(tiny("gpt2"), LoRA(r=2))
    past = model(**text(model, 128), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="take 129 positions"):
        model(input_ids=torch.tensor([[7], [7]]), past_key_values=past)


@pytest.mark.parametrize(("family", "longest"), [("gpt2", 128), ("roberta", 126)])
def test_packed_sequences_have_places_of_their_own(family, longest):
    """Also where positions are counted from after the padding id."""
    model = attach(tiny(family), LoRA(r=2))
    packing(model)
    for first in (longest, longest + 1):
        lens = (first, 100)
        given = {"input_ids": torch.full((1, sum(lens)), 9), "position_ids": positions(model, lens)}
        given |= {"token_type_ids": torch.zeros(1, sum(lens), dtype=torch.long)} if family == "roberta" else {}
        refused = pytest.raises(ValueError, match=f"take {longest + 1} positions") if first > longest else nullcontext()
        with refused, packed(lens):
            model(**given)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b"], "row 1: token id 97 is a virtual token of adapter 'a', which does not run on that row"),
        ([None, "a"], "row 0: token id 97 is a virtual token of adapter 'a'"),
        (["b", None], "row 0: token id 97 is a virtual token of adapter 'a'"),
    ],
)
def test_virtual_ids_of_another_rows_adapter(names, said):
    model = tiny("llama")
    attach(model, Prompt(2), name="a")
    attach(model, Prompt(3), name="b")
    ids = torch.cat([torch.tensor([virtual_ids(model, "a")] * 2), text(model, 5)["input_ids"]], 1)
    with rows(model, ["a"]):
        model(input_ids=ids)
    with rows(model, names), pytest.raises(ValueError, match=said):
        model(input_ids=ids)


def test_ids_that_nobody_has():
    model = attach(tiny("llama"), Prompt(2))
    with pytest.raises(ValueError, match=r"row 1: token id 500 is no token \(the vocabulary has 97\)"):
        model(input_ids=torch.tensor([[5, 6], [5, 500]]))


def test_generation_leaves_room_for_the_prefix():
    tokenizer = tt.byte_level()
    model = attach(tiny("gpt2", vocab_size=len(tokenizer)), Prefix(10))
    generate(model, tokenizer, [[9] * 114], Decoding(max_new_tokens=4))
    with pytest.raises(ValueError, match=r"118 positions \(10 more are taken by the prefix"):
        generate(model, tokenizer, [[9] * 115], Decoding(max_new_tokens=4))


@pytest.mark.parametrize("method", [{"prefix": {"length": 500}}, {"prompt": {"length": 500}}], ids=str)
def test_training_rows_are_cut_to_what_virtual_tokens_leave(method, tmp_path):
    """512 positions: the rows keep 12."""
    model = t.chat_model(tmp_path / "m", "gpt2")
    rows = t.lines(tmp_path / "rows.jsonl", [{"text": "a" * n} for n in (9, 30)] * 4)
    config = t.config(model, rows, method=method, train={"steps": 1, "batch_tokens": 2100})
    front = 500 if "prompt" in method else 0
    assert max(row.length - front for row in prepare(config).rows) == 12
    assert run(config, out=tmp_path / "run").status == "done"


@pytest.mark.parametrize("method", [{"prefix": {"length": 600}}, {"prompt": {"length": 600}}], ids=str)
def test_virtual_tokens_that_leave_no_room(method, tmp_path):
    model = t.chat_model(tmp_path / "m", "gpt2")
    rows = t.lines(tmp_path / "rows.jsonl", [{"text": "abc"}] * 4)
    with pytest.raises(ValueError, match=r"(?s)512.*600"):
        run(t.config(model, rows, method=method), out=tmp_path / "run")
