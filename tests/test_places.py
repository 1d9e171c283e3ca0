"""How many positions a model has, family by family, and what is said where a text does not fit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as hf

import tiny_run as t
import tiny_tokenizers as tt
from deltatune import LoRA, Prefix, Prompt, attach, rows
from deltatune.core.attach import packing
from deltatune.core.attention import packed, positions
from deltatune.core.places import TABLE, first, places, positions_of, tabled
from deltatune.core.site import stem
from deltatune.core.store import virtual_ids
from deltatune.evaluate.generate import Decoding, generate
from deltatune.train.job import prepare
from deltatune.train.run import run
from models import ALL, RECURRENT, enliven, inputs, tiny

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


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_are_those_of_the_model(family):
    """Left padding: OPT counts from the mask, others count columns; given positions_of must give the same logits."""
    model = tiny(family)
    given = {k: v for k, v in inputs(model).items() if k != "labels"}
    given["attention_mask"][0, :3] = 0
    told = positions_of(stem(model), (), given)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, model(**given, position_ids=told.expand(2, -1)).logits)


_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "max_position_embeddings": 24, "pad_token_id": 3}  # fmt: skip
# model type -> (configuration, the number of the first real token, padding that needs no position)
NUMBERED: dict[str, tuple[Any, int, bool]] = {
    "roberta": (hf.RobertaConfig(**_BERT), 4, True),
    "xlm-roberta": (hf.XLMRobertaConfig(**_BERT), 4, True),
    "xlm-roberta-xl": (hf.XLMRobertaXLConfig(**_BERT), 4, True),
    "roberta-prelayernorm": (hf.RobertaPreLayerNormConfig(**_BERT), 4, True),
    "camembert": (hf.CamembertConfig(**_BERT), 4, True),
    "longformer": (hf.LongformerConfig(**_BERT, attention_window=4), 4, True),
    "esm": (hf.EsmConfig(**_BERT, position_embedding_type="absolute", mask_token_id=4, vocab_size=97), 4, True),
    "mpnet": (hf.MPNetConfig(**_BERT | {"pad_token_id": 1}), 2, True),
    "data2vec-text": (hf.Data2VecTextConfig(**_BERT), 4, True),
    "xmod": (hf.XmodConfig(**_BERT, languages=["en"], default_language="en"), 4, True),
    "luke": (hf.LukeConfig(**_BERT, entity_vocab_size=9, entity_emb_size=32), 4, True),
    "markuplm": (hf.MarkupLMConfig(**_BERT), 4, True),
    "bert": (hf.BertConfig(**_BERT), 0, False),
    "distilbert": (hf.DistilBertConfig(dim=32, n_layers=1, n_heads=4, max_position_embeddings=24, pad_token_id=3),
                   0, False),
    "electra": (hf.ElectraConfig(**_BERT, embedding_size=32), 0, False),
    "opt": (hf.OPTConfig(**_BERT, ffn_dim=48, word_embed_proj_dim=32), 0, True),
    "biogpt": (hf.BioGptConfig(**_BERT), 0, False),
    "gpt2": (hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=24, bos_token_id=1, eos_token_id=2), 0, False),
}  # fmt: skip


def numbered(kind: str) -> Any:
    """A trunk of this type in eval mode, with every value drawn anew."""
    with torch.random.fork_rng():
        model = hf.AutoModel.from_config(NUMBERED[kind][0]).eval()
        enliven(model)
    return model


def padded(model: Any, real: int, columns: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of `real` tokens and padding up to `columns`."""
    ids = torch.full((2, columns), model.config.pad_token_id or 0)
    where = slice(columns - real, None) if left else slice(real)
    ids[:, where] = torch.arange(5, 5 + real)
    mask = torch.zeros_like(ids)
    mask[:, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", NUMBERED)
def test_the_first_real_token_has_the_number_that_the_model_gives_it(kind):
    """Read from the model: which row of its table of positions it looks up for the first token of a text."""
    model, expected = numbered(kind), NUMBERED[kind][1]
    table = next(m for n, m in model.named_modules() if TABLE.search(n) and isinstance(m, torch.nn.Embedding))
    weight, seen = table.weight, []
    table.weight = torch.nn.Parameter(torch.arange(len(weight)).float()[:, None].expand_as(weight).clone())
    table.register_forward_hook(lambda layer, args, out: seen.append(out[0, :5, 0].tolist()))
    model(**padded(model, 5, 5))
    offset = getattr(table, "offset", 0)  # OPT's table has rows in front that no number means
    assert seen[-1:] == [[float(expected + offset + i) for i in range(5)]] or kind in ("bert", "electra")
    assert first(model.config) == expected
    assert positions(model, (2, 3)).tolist() == [[expected, expected + 1, *range(expected, expected + 3)]]
    assert positions_of(model, (), padded(model, 5, 5)).tolist()[0] == list(range(expected, expected + 5))


@pytest.mark.parametrize("kind", NUMBERED)
def test_a_text_may_fill_its_table_in_every_family_and_no_more(kind):
    model = attach(numbered(kind), LoRA(r=2, targets=(r".*\.(query|q|q_proj|q_lin|c_attn)",)))
    room = places(model.config)
    assert room == 24 - NUMBERED[kind][1]
    model(**padded(model, room, room))
    with pytest.raises(ValueError, match=f"text of {room + 1} tokens"):
        model(**padded(model, room + 1, room + 1))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", NUMBERED)
def test_padding_needs_a_position_only_where_the_model_gives_it_one(kind, left):
    """A batch of more columns than the table has rows: real tokens fit, so it runs; families that number columns
    cannot run it with or without an adapter."""
    bare, (_, _, free) = numbered(kind), NUMBERED[kind]
    model = attach(numbered(kind), LoRA(r=2, targets=(r".*\.(query|q|q_proj|q_lin|c_attn)",)))
    room = places(model.config)
    given = padded(model, room, room + 8, left)
    refused = pytest.raises(ValueError, match=f"text of {room + 8} tokens")
    with torch.no_grad(), nullcontext() if free else refused:
        found = model(**given)[0]
        torch.testing.assert_close(found, bare(**given)[0])
    if not free:
        with pytest.raises((IndexError, RuntimeError)):
            bare(**given)
    with pytest.raises(ValueError, match=f"text of {room + (1 if free else 8)} tokens"):
        model(**padded(model, room + 1, room + 8, left))


@pytest.mark.parametrize("kind", [k for k, (_, number, _) in NUMBERED.items() if "roberta" in k or k == "camembert"])
def test_a_prefix_moves_the_tokens_of_a_decoder_from_where_they_are(kind):
    """A decoder of RoBERTa's kind numbers from behind the padding id, with a prefix and with a cache too."""
    config = type(NUMBERED[kind][0])(**_BERT | {"is_decoder": True})
    with torch.random.fork_rng():
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        enliven(model)
    attach(model, Prefix(3))
    seen = []
    table = next(m for n, m in model.named_modules() if TABLE.search(n))
    table.register_forward_pre_hook(lambda layer, args: seen.append(args[0].tolist()))
    given = padded(model, 5, 7)
    past = model(**given, use_cache=True).past_key_values
    assert seen[-1] == [[7, 8, 9, 10, 11, 6, 6]] * 2
    mask = torch.cat([given["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    model(input_ids=torch.tensor([[9], [9]]), attention_mask=mask, past_key_values=past)
    assert seen[-1] == [[14], [14]]  # 4 + 7 cached + 3
    model(inputs_embeds=torch.zeros(2, 3, 32))
    assert seen[-1] == [[7, 8, 9]]


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
    for most in (longest, longest + 1):
        lens = (most, 100)
        given = {"input_ids": torch.full((1, sum(lens)), 9), "position_ids": positions(model, lens)}
        given |= {"token_type_ids": torch.zeros(1, sum(lens), dtype=torch.long)} if family == "roberta" else {}
        refused = pytest.raises(ValueError, match=f"take {longest + 1} positions") if most > longest else nullcontext()
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
