"""Generation: a batch equals one by one, nothing global moves, answers end where they should."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import deltatune.evaluate.generate as generation
from deltatune.data.encode import Encoded
from deltatune.data.example import Example, Turn
from deltatune.evaluate.generate import (
    Decoding,
    Repetition,
    answers,
    end_of_turn,
    evaluating,
    generate,
    grouped,
    ids_of,
    private_rng,
    shared,
    stop_ids,
    stream,
)
from letters import letters
from models import FAMILIES, VOCAB, tiny

TOK = letters()
PROMPTS = ["hello there", "a", "the quick brown fox", "one two", "xyz", "what is it?"]
SHORT = Decoding(max_new_tokens=8)
GENERATING = [name for name, family in FAMILIES.items() if family.kind != "masked"]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def logits_loop(model: nn.Module, ids: list[int], new: int) -> list[int]:
    """Greedy by full recomputation, without cache, mask, padding or generate()."""
    made: list[int] = []
    start = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else []
    while len(made) < new:
        with torch.no_grad():
            if start:
                out = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([start + made]))
            else:
                out = model(input_ids=torch.tensor([ids + made]))
        made.append(int(out.logits[0, -1].argmax()))
        if made[-1] in stop_ids(model, TOK) | {0}:
            break
    return made


@pytest.mark.parametrize("family", GENERATING)
def test_a_batch_equals_a_loop_over_logits(family: str) -> None:
    model = tiny(family)
    got = answers(model, TOK, PROMPTS, replace(SHORT, batch_tokens=100))
    loops = [logits_loop(model, ids_of(TOK, p, model.config.is_encoder_decoder), 8) for p in PROMPTS]
    assert got.texts == [TOK.decode(ids, skip_special_tokens=True) for ids in loops]
    assert got.tokens == sum(map(len, loops))
    assert len(set(got.texts)) > 1
    assert got.tokens_per_second > 0


BEGINNING = "a long instruction that every prompt begins with, twice over: "


@pytest.mark.parametrize("family", [f for f in GENERATING if FAMILIES[f].kind == "causal"])
def test_a_common_beginning_is_computed_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    rows = [ids_of(TOK, BEGINNING + p) for p in PROMPTS]
    used = shared(model, rows)
    assert used == (0 if getattr(model.config, "sliding_window", None) else len(TOK(BEGINNING)["input_ids"]))
    together = answers(model, TOK, rows, SHORT)
    assert together.texts == [answers(model, TOK, [row], SHORT).texts[0] for row in rows]
    if family == "llama":  # a beginning that is not common is seen (some tiny models end in a loop whatever they read)
        rows = [row for row in rows if len(row) > used + 3]
        right = answers(model, TOK, rows, SHORT).texts
        monkeypatch.setattr(generation, "shared", lambda model, rows: used + 3)
        assert answers(model, TOK, rows, SHORT).texts != right


def test_what_is_not_shared(llama) -> None:
    rows = [[5] * 60 + [i] for i in range(3)]
    assert shared(llama, rows) == 60
    assert shared(llama, rows[:1]) == 0
    assert shared(llama, [[5] * 40 + [i] for i in range(3)]) == 0
    assert shared(llama, [[5] * 60, [5] * 61]) == 59  # a row that is the beginning keeps its last token


@pytest.mark.parametrize(
    "settings",
    [
        SHORT,
        replace(SHORT, repetition_penalty=1.7),
        replace(SHORT, stop=("e", "xx")),
        replace(SHORT, beams=3),
        replace(SHORT, prompt_ids=(90, 91, 92)),
    ],
)
def test_a_batch_equals_one_by_one(llama, settings: Decoding) -> None:
    together = answers(llama, TOK, PROMPTS, settings)
    apart = [answers(llama, TOK, [p], settings) for p in PROMPTS]
    assert together.texts == [a.texts[0] for a in apart]
    assert together.tokens == sum(a.tokens for a in apart) or settings.stop or settings.beams > 1
    assert together.cut == sum(a.cut for a in apart)


def test_stock_repetition_penalty_counts_padding_and_ours_does_not() -> None:
    scores = torch.ones(2, VOCAB)
    ids = torch.tensor([[0, 0, 7], [8, 9, VOCAB + 4]])  # two of padding; one virtual id
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    got = Repetition(2.0, mask)(ids, scores)
    assert (got != 1).nonzero().tolist() == [[0, 7], [1, 8], [1, 9]]
    later = Repetition(2.0, mask)(torch.cat([ids, torch.tensor([[0], [5]])], dim=1), -scores)
    assert (later == -2).nonzero().tolist() == [[0, 0], [0, 7], [1, 5], [1, 8], [1, 9]]


class Rows(nn.Module):
    """An embedding with extra rows for virtual ids, as a soft prompt gives it."""

    def __init__(self, base: nn.Embedding, extra: int) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Embedding(extra, base.embedding_dim)
        nn.init.normal_(self.extra.weight, generator=torch.Generator().manual_seed(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        real = self.base(ids.clamp(max=VOCAB - 1))
        return torch.where((ids >= VOCAB)[..., None], self.extra((ids - VOCAB).clamp(min=0)), real)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_virtual_ids_steer_and_are_never_decoded(family: str, penalty: float) -> None:
    model = tiny(family)
    plain = generate(model, TOK, PROMPTS, replace(SHORT, repetition_penalty=penalty))
    if model.config.is_encoder_decoder:
        inner = model.get_encoder()
        inner.embed_tokens = Rows(inner.embed_tokens, 3)
    else:
        model.set_input_embeddings(Rows(model.get_input_embeddings(), 3))
    settings = replace(SHORT, prompt_ids=(VOCAB, VOCAB + 1, VOCAB + 2), repetition_penalty=penalty)
    together = generate(model, TOK, PROMPTS, settings)
    assert together == [generate(model, TOK, [p], settings)[0] for p in PROMPTS]
    assert together != plain
    encoded = Encoded((*settings.prompt_ids, *ids_of(TOK, PROMPTS[0])), None)  # rows that have the virtual ids already
    assert generate(model, TOK, [encoded], settings)[0] == together[0]
    assert "<unk>" not in "".join(together)


CHAT = [{"role": "user", "content": "hi"}]
TURNS = (Turn("user", "hi"), Turn("assistant", "reference"))


# what a prompt may be -> its text
RENDERED = [
    ("hi", "hi"),
    (CHAT, "<user>hi</s><assistant>"),
    (TURNS, "<user>hi</s><assistant>"),
    (Example("f:1", turns=TURNS), "<user>hi</s><assistant>"),
    (Example("f:1", prompt="p", completion="c"), "p"),
    (Example("f:1", text="t", label="l"), "t"),
    ([5, 7, 8], "<user>ab"),
    (Encoded((5, 7, 8, 9), (-100, -100, 8, 9)), "<user>a"),
    (Encoded((5, 7, 8, 9, 7, 8), (-100, 7, 8, -100, 7, -100)), "<user>abc"),
    (Encoded((5, 7), (-100, -100)), "<user>a"),
    (Encoded((5, 7), None), "<user>a"),
    (Encoded((5, 7), (9, 9), decoder=True), "<user>a"),
]


@pytest.mark.parametrize(("prompt", "text"), RENDERED)
def test_every_form_of_a_prompt(prompt, text: str) -> None:
    assert TOK.decode(ids_of(TOK, prompt)) == text


def test_an_appended_end_token_is_dropped_for_decoders_only() -> None:
    ending = letters(ends=True)
    assert ids_of(ending, "ab") == [7, 8]
    assert ids_of(ending, "ab", seq2seq=True) == [7, 8, 2]


def test_ends_come_from_config_tokenizer_and_template(llama) -> None:
    other = letters()
    other.chat_template = other.chat_template.replace("</s>", "<user>")
    assert end_of_turn(TOK) == {2}
    assert end_of_turn(other) == {5}
    assert end_of_turn(letters(chat=False)) == set()
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 9]
    assert stop_ids(model, other) == {2, 5, 9}


def test_an_answer_ends_at_an_end_token_and_at_a_stop_string(llama) -> None:
    prompt = next(p for p in PROMPTS if len(generate(llama, TOK, [p], SHORT)[0]) == 8)
    free = answers(llama, TOK, [prompt], SHORT)
    text = free.texts[0]
    assert (free.tokens, free.cut) == (8, 1)
    stopped = answers(llama, TOK, [prompt], replace(SHORT, stop=(text[2:4],)))
    assert (stopped.texts[0], stopped.cut) == (text[: text.index(text[2:4])], 0)
    assert stopped.tokens < 8
    model = tiny("llama")
    model.generation_config.eos_token_id = TOK.convert_tokens_to_ids(text[1])
    ended = answers(model, TOK, [prompt], SHORT)
    assert (ended.texts[0], ended.tokens, ended.cut) == (text[: text.index(text[1])], text.index(text[1]) + 1, 0)


def global_state() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_global_generators_do_not_move(llama, temperature: float) -> None:
    before = global_state()
    settings = replace(SHORT, temperature=temperature, top_k=40, top_p=0.95)
    first = generate(llama, TOK, PROMPTS, settings)
    list(stream(llama, TOK, CHAT, settings))
    assert global_state() == before
    torch.rand(3)  # whatever the global generator does, the answers stay
    assert generate(llama, TOK, PROMPTS, settings) == first
    assert (generate(llama, TOK, PROMPTS, replace(settings, seed=1)) == first) == (temperature == 0)


def test_a_private_generator_is_restored_after_an_error() -> None:
    before = global_state()
    with pytest.raises(ZeroDivisionError), private_rng("cpu", 3):
        assert 1 / (torch.rand(2).numel() - 2)
    assert global_state() == before


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    plain = generate(model, TOK, PROMPTS, SHORT)
    model.activation_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()  # somebody keeps a part frozen in evaluation mode
    own, modes = model.generation_config, [m.training for m in model.modules()]
    config = own.to_dict()
    assert generate(model, TOK, PROMPTS, SHORT) == plain
    assert [m.training for m in model.modules()] == modes
    assert model.generation_config is own
    assert own.to_dict() == config
    assert model.is_activation_checkpointing
    pieces = stream(model, TOK, CHAT, SHORT)
    next(pieces)
    assert torch.is_grad_enabled()
    pieces.close()
    assert [m.training for m in model.modules()] == modes


def test_dropout_is_off_inside_and_modes_come_back_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Linear(1, 1).eval())
    with pytest.raises(ZeroDivisionError), evaluating(module):
        assert 1 / sum(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == [True, True, False]


def test_the_models_own_taste_does_not_creep_in(llama) -> None:
    model = tiny("llama")
    taste = {
        "do_sample": True,
        "temperature": 3.0,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "max_length": 5,
    }
    model.generation_config.update(**taste)
    assert generate(model, TOK, PROMPTS, SHORT) == generate(llama, TOK, PROMPTS, SHORT)


def test_no_warning_is_logged(llama, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        generate(llama, TOK, PROMPTS, SHORT)
        generate(llama, TOK, PROMPTS, replace(SHORT, temperature=0.7, top_p=0.9))
        generate(tiny("t5"), TOK, PROMPTS, SHORT)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("lengths", "new", "budget", "groups"),
    [
        ([3, 9, 1, 9], 1, 20, [[1, 3], [0, 2]]),
        ([50, 2], 1, 20, [[0], [1]]),
        ([2, 2, 2], 0, 4, [[0, 1], [2]]),
        ([], 1, 20, []),
    ],
)
def test_groups_are_longest_first_within_the_budget(lengths, new: int, budget: int, groups) -> None:
    assert list(grouped(lengths, new, budget)) == groups


@pytest.mark.parametrize("prompt", [CHAT, "hello there", [7, 8, 9]])
@pytest.mark.parametrize("stop", [(), ("e", "xx"), ("never found",)])
def test_the_stream_joined_is_the_answer(llama, prompt, stop: tuple) -> None:
    settings = Decoding(max_new_tokens=20, stop=stop, repetition_penalty=1.2)
    pieces = list(stream(llama, TOK, prompt, settings))
    assert "".join(pieces) == generate(llama, TOK, [prompt], settings)[0]
    assert all(pieces)
    assert len(pieces) > 5 or stop


def test_the_stream_withholds_half_a_stop_string() -> None:
    from deltatune.evaluate.generate import _pieces

    ids = TOK("ab--ab---c", add_special_tokens=False)["input_ids"]
    assert list(_pieces(TOK, iter(ids), ("---",))) == ["a", "b", "--a", "b"]


def test_sampling_in_the_stream_is_seeded(llama) -> None:
    warm = replace(SHORT, temperature=2.0, top_k=50, top_p=0.99)
    first = "".join(stream(llama, TOK, CHAT, warm))
    assert "".join(stream(llama, TOK, CHAT, warm)) == first
    assert "".join(stream(llama, TOK, CHAT, replace(warm, seed=1))) != first


REFUSED = [
    (lambda m: generate(tiny("bert"), TOK, ["a"], SHORT), "BertForMaskedLM cannot generate text"),
    (lambda m: generate(m, TOK, ["a", ""], SHORT), "prompt 1 is empty"),
    (lambda m: generate(m, TOK, ["a" * 125], SHORT), "125 tokens and max_new_tokens=8.*128 positions"),
    (lambda m: generate(m, letters(chat=False), [CHAT], SHORT), "no chat template"),
    (lambda m: generate(m, TOK, [[{"role": "assistant", "content": "a"}]], SHORT), "without a user's turn"),
    (lambda m: generate(m, TOK, [Example("f:1")], SHORT), "f:1: a row of kind 'text' has no prompt"),
    (lambda m: stream(m, TOK, CHAT, replace(SHORT, beams=2)), "use generate"),
    (lambda m: stream(tiny("t5"), TOK, CHAT, SHORT), "use generate"),
    (lambda m: Decoding(max_new_tokens=0), "max_new_tokens=0"),
    (lambda m: Decoding(temperature=-1), "temperature=-1"),
    (lambda m: Decoding(top_p=0), "top_p=0"),
    (lambda m: Decoding(beams=2, temperature=1), "beams=2"),
    (lambda m: Decoding(stop="word"), "stop='word'.*tuple"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_refusals(llama, call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(llama)


def test_a_soft_prompt_steers_by_itself_and_not_when_it_is_off() -> None:
    from deltatune import Prompt, attach, disabled, virtual_ids

    model = tiny("llama")
    base = answers(model, TOK, PROMPTS, SHORT).texts
    torch.manual_seed(0)  # not every prompt steers
    attach(model, Prompt(length=4, init="uniform"))
    steered = answers(model, TOK, PROMPTS, SHORT).texts
    ids = virtual_ids(model)
    assert steered == answers(model, TOK, PROMPTS, replace(SHORT, prompt_ids=ids)).texts != base
    assert answers(model, TOK, PROMPTS, replace(SHORT, prompt_ids=())).texts == base
    assert "".join(stream(model, TOK, PROMPTS[0], SHORT)) == steered[0]
    with disabled(model):
        assert answers(model, TOK, PROMPTS, SHORT).texts == base


def test_the_cache_grows_in_place_and_survives_reordering(llama) -> None:
    """Views of one buffer while it has room; beams reordered, repeated or cropped still read right."""
    from deltatune.evaluate.cache import AHEAD, Roomy

    layer, plain, torch_layer = Roomy(), [], torch.Generator().manual_seed(0)

    def step(rows: int, new: int) -> None:
        keys, values = (torch.randn(rows, 2, new, 4, generator=torch_layer) for _ in range(2))
        plain[:] = (
            [torch.cat([a, b], 2) for a, b in zip(plain, (keys, values), strict=True)] if plain else [keys, values]
        )
        assert all(torch.equal(a, b) for a, b in zip(layer.update(keys, values), plain, strict=True))

    step(2, 5)
    place = layer.buffers[0].data_ptr()
    for _ in range(AHEAD):
        step(2, 1)
    assert layer.buffers[0].data_ptr() == place
    step(2, 1)  # full: moved
    for change in (
        lambda x: x.reorder_cache(torch.tensor([1, 1])),
        lambda x: x.batch_select_indices(torch.tensor([1, 0])),
        lambda x: x.crop(-3),
    ):
        change(layer)
        plain[:] = [layer.keys.clone(), layer.values.clone()]
        kept = [t.clone() for t in plain]
        step(2, 2)
        assert all(torch.equal(a[:, :, : k.shape[2]], k) for a, k in zip(plain, kept, strict=True))
    layer.batch_repeat_interleave(3)
    plain[:] = [t.repeat_interleave(3, 0) for t in plain]
    step(6, 1)


def test_batches_fit_the_memory_a_model_needs_per_token(llama) -> None:
    from deltatune.evaluate.cache import CACHE_BYTES, MOST_TOKENS, room

    config = llama.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert room(llama) == min(MOST_TOKENS, CACHE_BYTES // token)
    for family in ("gpt2", "t5", "bart", "neox"):
        assert room(tiny(family)) == MOST_TOKENS


def test_rows_on_different_adapters_keep_theirs_in_any_order(llama) -> None:
    """Batches are cut longest first; each prompt must still be answered by its own adapter."""
    from conformance import stir
    from deltatune import IA3, LoRA, attach, disabled, rows
    from deltatune.core.attach import activate

    for seed, (name, method) in enumerate({"a": LoRA(r=4), "b": IA3()}.items()):
        attach(llama, method, name)
        stir(llama, name, seed)
    names = ["a", "b", None, "b"]
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12], [5, 9, 3, 3], [13, 4, 8]]
    alone = []
    for name, prompt in zip(names, prompts, strict=True):
        activate(llama, *([name] if name else []))
        alone += generate(llama, TOK, [prompt], SHORT)
    with disabled(llama):
        assert generate(llama, TOK, prompts, SHORT) != alone
    for budget in (None, 20):
        with rows(llama, names):
            assert generate(llama, TOK, prompts, replace(SHORT, batch_tokens=budget)) == alone
    with rows(llama, names), pytest.raises(ValueError, match="given 4 names for 3 rows"):
        generate(llama, TOK, prompts[:3], SHORT)
    with rows(llama, ["a"]):  # one name is for all rows, however they are cut into batches
        told = generate(llama, TOK, prompts, replace(SHORT, batch_tokens=20))
    activate(llama, "a")
    assert told == generate(llama, TOK, prompts, SHORT)
