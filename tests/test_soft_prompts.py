"""Prefixes, prompts and P-tuning: the papers' equations, counts and starts, peft as the oracle, its deviations."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

import tiny_tokenizers as tt
from conformance import batch, logits, train_step
from deltatune import Prefix, Prompt, PTuning, attach, load, save, virtual_ids
from deltatune.core import peft_format
from deltatune.core.attach import fold, parameters, trainable
from deltatune.core.delta import Refusal
from deltatune.core.slot import deltas
from deltatune.core.store import prompt_sets, state
from deltatune.data.batch import pad, side_by_side
from deltatune.data.encode import Encoded
from deltatune.methods import METHODS, build
from deltatune.methods._encoders import Recurrent, feedforward, fit
from deltatune.methods._rows import Rows, sampled
from deltatune.objectives.common import combined
from models import inputs, tiny
from test_methods import bert, fill, llama_3b


# ---- prefixes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reparam", ["none", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_of_words_is_those_words_in_front(family, reparam):
    """Real activations: the adapted model on x says what the base says on [words; x]. Words repeat up to `length`."""
    model = tiny(family)
    given = inputs(model)
    words = torch.tensor([[7, 8, 9, 7]]).expand(2, -1)
    expected = logits(model, {"input_ids": torch.cat([words, given["input_ids"]], 1)})[:, 4:]
    attach(model, Prefix(4, init="words", ids=(7, 8, 9), reparam=reparam, hidden=8))
    torch.testing.assert_close(logits(model, given), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_words_start_an_encoder_and_all_three_prefixes(family):
    model = attach(tiny(family), Prefix(3, init="words", ids=(7, 8, 9)))
    assert all(d.k.abs().max() > 0.1 for d in deltas(model))  # random ones are below
    assert logits(model, inputs(model)).isfinite().all()


def test_a_reparametrised_prefix_is_an_mlp_until_it_is_folded():
    """P[i] = W2 tanh(W1 p[i] + b1) + b2 against NumPy, and the same logits and gradients' owner after `fold`."""
    model = attach(tiny("bert"), Prefix(3, reparam="mlp", hidden=5))
    found = fill(model)
    root = found[0].root
    hidden = np.tanh(array(root.p) @ array(root.up.weight).T + array(root.up.bias))
    for delta in found:
        both = (hidden @ array(delta.out.weight).T + array(delta.out.bias)).reshape(3, 2, 4, 8)
        for now, part in zip(delta.now(), (both[:, 0], both[:, 1]), strict=True):
            np.testing.assert_allclose(array(now), part.transpose(1, 0, 2), rtol=0, atol=1e-12)
    before, training = logits(model, inputs(model)), set(parameters(model, "default"))
    fold(model)
    assert torch.equal(logits(model, inputs(model)), before)
    assert {k.rpartition(".")[2] for k in state(model)} == {"k", "v"}
    assert not training & set(trainable(model))
    assert all(p.requires_grad for p in trainable(model).values())


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


@pytest.mark.parametrize("method", [Prefix(3, reparam="mlp", hidden=8), PTuning(3), PTuning(3, encoder="mlp")], ids=str)
@pytest.mark.parametrize("folded", [False, True])
def test_saved_before_or_after_the_fold_it_loads_and_trains_on_exactly(tmp_path, method, folded):
    """peft 0.21 saves only the encoder's output and reads it back as the encoder's input (deviation 1)."""
    model, other = attach(tiny("llama"), method), tiny("llama")
    train_step(model)
    if folded:
        fold(model)
    save(model, "default", tmp_path / "a")
    assert (tmp_path / "a" / peft_format.CONFIG).exists() is folded  # the folded form is one that peft has
    load(other, tmp_path / "a", "default")
    assert torch.equal(logits(other, batch(other)), logits(model, batch(model)))
    for one in (model, other):
        train_step(one)
    ours, theirs = state(model), state(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_has_three_prefixes(family):
    """Encoder self, decoder self and cross: each changes the output and is trained (deviation 2: peft has one)."""
    model = attach(tiny(family), Prefix(2))
    words = ("EncDecAttention", "encoder_attn")
    kinds: dict[str, list] = {"encoder": [], "decoder": [], "cross": []}
    for delta in deltas(model):
        name = delta.site.write
        kinds["cross" if name.endswith(words) else "decoder" if "decoder" in name else "encoder"].append(delta)
    assert {kind: len(found) for kind, found in kinds.items()} == {"encoder": 2, "decoder": 2, "cross": 2}
    with torch.no_grad():
        for delta in deltas(model):
            delta.v.zero_()
    plain = logits(model, inputs(model))
    for found in kinds.values():
        with torch.no_grad():
            for delta in found:
                delta.v += 1
        assert (logits(model, inputs(model)) - plain).abs().max() > 1e-3
        with torch.no_grad():
            for delta in found:
                delta.v -= 1
    model(**inputs(model)).loss.backward()
    assert all(p.grad.abs().max() > 0 for d in deltas(model) for p in d.parameters() if p is d.v)


@pytest.mark.parametrize("reparam", ["none", "mlp"])
def test_a_prefix_trains_under_gradient_checkpointing(reparam):
    """peft refuses it (deviation 3)."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = attach(tiny("llama"), Prefix(3, reparam=reparam, hidden=8)).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**inputs(model)).loss.backward()
        grads.append({k: p.grad for k, p in trainable(model).items()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-7)


# ---- prompts ---------------------------------------------------------------------------------------------------------
def tokens(model: nn.Module, *ids: int) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor(ids)).detach()


def prompt_of(model: nn.Module) -> torch.Tensor:
    (delta,) = deltas(model)
    return delta.vectors().detach()


def test_a_text_is_repeated_or_cut_and_labels_are_followed_by_sampled_words():
    tokenizer = tt.bert_like("good bad very fine film")
    text = Prompt(5, init="text", text="very good film").bind(tokenizer)
    assert text.ids == ((6,), (4,), (8,))
    model = attach(tiny("llama"), text)
    assert torch.equal(prompt_of(model), tokens(model, 6, 4, 8, 6, 4))
    (listed,) = build({"prompt": {"length": 2, "init": "text", "ids": [[6], [4]]}})
    assert torch.equal(prompt_of(attach(tiny("llama"), listed)), tokens(model, 6, 4))
    named = Prompt(4, init="labels", labels=("very good", "bad")).bind(tokenizer)
    assert named.ids == ((6, 4), (5,))
    rows = prompt_of(attach(tiny("llama"), named))
    torch.testing.assert_close(rows[0], tokens(model, 6, 4).mean(0))
    torch.testing.assert_close(rows[1], tokens(model, 5)[0])
    words = model.get_input_embeddings().weight
    assert all((words == row).all(-1).any() for row in rows[2:])


def test_vocab_is_sampled_by_the_seed_and_is_the_default():
    """peft starts from N(0, 1) noise by default, which its own benchmark shows to fail (deviation 5)."""

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return prompt_of(attach(tiny("llama"), Prompt(6)))

    rows, words = drawn(0), tiny("llama").get_input_embeddings().weight
    assert [int((words == row).all(-1).sum()) for row in rows] == [1] * 6
    assert len({tuple(row.tolist()) for row in rows}) == 6
    assert torch.equal(rows, drawn(0))
    assert not torch.equal(rows, drawn(1))


def test_vocab_samples_among_the_5000_commonest():
    """Section 3.2 of the paper: the 5,000 first of the vocabulary, wherever its end is."""
    torch.manual_seed(0)
    model = tiny("llama", vocab_size=12_000)
    rows, words = prompt_of(attach(model, Prompt(400))), model.get_input_embeddings().weight[:12_000]
    ids = torch.cdist(rows, words.detach()).argmin(-1)
    assert torch.equal(words[ids], rows)
    assert 4900 < ids.max() < 5000
    assert len(ids.unique()) == 400


def test_uniform_is_within_half():
    torch.manual_seed(0)
    rows = prompt_of(attach(tiny("llama"), Prompt(60, "uniform")))
    assert 0.49 < rows.abs().max() < 0.5
    assert rows.std().item() == pytest.approx(12**-0.5, rel=0.03)  # of U(-0.5, 0.5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_prefix_starts_at_words_sampled_from_the_vocabulary(family):
    """Random keys take the place of the attention that real first tokens draw: SmolLM2 never recovered from them."""
    model = tiny(family)
    torch.manual_seed(3)
    ids = tuple(i for (i,) in sampled(model.get_input_embeddings(), 5))
    torch.manual_seed(3)
    ours = deltas(attach(model, Prefix(5), "ours"), "ours")
    theirs = deltas(attach(model, Prefix(5, init="words", ids=ids), "theirs"), "theirs")
    assert all(torch.equal(a.k, b.k) and torch.equal(a.v, b.v) for a, b in zip(ours, theirs, strict=True))
    assert len(set(ids)) == 5
    assert all(t.is_contiguous() for d in ours for t in (d.k, d.v))  # as a checkpoint's, or sums differ after a resume


@pytest.mark.parametrize("family", ["vit", "clip", "whisper"])
def test_a_prefix_of_a_model_without_words_starts_at_random(family):
    torch.manual_seed(0)
    found = deltas(attach(tiny(family), Prefix(60)))
    assert {round(delta.k.std().item(), 2) for delta in found} == {0.02}


def test_a_prefix_leaves_every_module_in_its_mode():
    """Its start is a forward pass in eval mode; a model may train with some parts at rest, or the other way round."""
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    attach(model, Prefix(3))
    assert {name: m.training for name, m in model.named_modules() if name in before} == before


def test_a_stored_prefix_is_loaded_without_a_pass_through_the_base(tmp_path):
    """Its start is not needed, and costs a forward pass of the base."""
    model, ran = tiny("llama"), []
    model.model.register_forward_hook(lambda *_: ran.append(1))
    attach(model, Prefix(3))
    assert ran == [1]
    save(model, "default", tmp_path / "p")
    load(model, tmp_path / "p", "again")
    assert ran == [1]


def test_a_random_prefix_is_drawn_small():
    torch.manual_seed(0)
    for delta in deltas(attach(tiny("llama"), Prefix(60, init="random"))):
        assert delta.k.std().item() == pytest.approx(0.02, rel=0.1)
        assert delta.v.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_label_is_the_word_with_the_space_that_it_has_in_a_text():
    """Where a tokenizer tells ' good' from 'good'; a text starts as it is written."""
    tokenizer = tt.byte_level(tt.CHATML)
    spaced, bare = (tuple(tokenizer(w)["input_ids"]) for w in (" good", "good"))
    assert spaced != bare
    assert Prompt(9, init="labels", labels=("good",)).bind(tokenizer).ids == (spaced,)
    assert Prompt(9, init="text", text="good").bind(tokenizer).ids == tuple((i,) for i in bare)


FOLDED = ((PTuning(3, init="random"), 1e-7), (PTuning(3), 5e-7), (PTuning(2, encoder="mlp", count=2), 0.0))


@pytest.mark.parametrize(("method", "rounding"), FOLDED, ids=str)
def test_the_fold_writes_what_evaluation_sees(method, rounding):
    """To the last bit; a training step's LSTM rounds otherwise (words have values up to 2, random starts up to 0.3)."""
    model = attach(tiny("llama", hidden_size=128), method)
    (delta,) = deltas(model)
    training = prompt_of(model)
    with torch.no_grad():
        seen = delta.vectors().clone()
    fold(model)
    assert torch.equal(prompt_of(model), seen)
    torch.testing.assert_close(prompt_of(model), training, rtol=0, atol=rounding)


@pytest.mark.parametrize("method", [PTuning(3), PTuning(2, encoder="mlp", count=2, tasks=("a", "b"))], ids=str)
def test_an_encoder_starts_where_a_prompt_would(method):
    """Its last layer is fitted to the words; at random they have nothing of words."""
    model = attach(tiny("llama"), method)
    (delta,) = deltas(model)
    words = model.get_input_embeddings().weight
    near = (delta.vectors()[:, None] - words).norm(dim=-1).min(1)
    assert near.values.max() < 1e-5 * words.norm(dim=1).mean()
    assert len(set(near.indices.tolist())) == len(delta.vectors())
    (drawn,) = deltas(attach(tiny("llama"), dataclasses.replace(method, init="random")))
    assert (drawn.vectors()[:, None] - words).norm(dim=-1).min() > 0.1 * words.norm(dim=1).mean()


# encoder, vectors of 32 numbers up to 3: (largest distance by the words' size, largest weight)
FITS = {("lstm", 20): (1e-5, 20), ("mlp", 20): (1e-5, 20), ("lstm", 24): (1e-5, 30), ("lstm", 48): (0.7, 20)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("encoder", "n"), FITS)
def test_many_vectors_are_fitted_by_moderate_weights(encoder, n, seed):
    """ReLUs of an LSTM's small outputs depend on each other: fitted as they are, weights of 900 leave a quarter."""
    torch.manual_seed(seed)
    words = nn.Embedding(97, 32)
    wanted = words.weight[torch.randperm(97)[:n]].detach()
    made = Rows(words, torch.randn(n, 32), n, Recurrent(32) if encoder == "lstm" else feedforward(32))
    fit(made, wanted)
    far, largest = FITS[encoder, n]
    assert (made.vectors() - wanted).norm() < far * wanted.norm()
    assert max(p.abs().max() for p in made.encode.parameters()) < largest


def test_few_vectors_are_fitted_by_the_last_layer_alone():
    """By the smallest change of it, as a least-squares solver finds it."""
    torch.manual_seed(0)
    words, inputs = nn.Embedding(97, 32), torch.randn(3, 32)
    made = Rows(words, inputs, 3, Recurrent(32))
    was = copy.deepcopy(made.encode.state_dict())
    fit(made, words.weight[:3].detach())
    now = made.encode.state_dict()
    assert [name for name in was if not torch.equal(was[name], now[name])] == ["mlp.2.weight", "mlp.2.bias"]
    seen = made.encode.mlp[:2](made.encode.lstm(inputs[None])[0])[0].detach().double()
    missing = words.weight[:3].detach() - seen.float() @ was["mlp.2.weight"].T - now["mlp.2.bias"]
    change = torch.linalg.lstsq(seen, missing.double(), driver="gelsd").solution.T.float()
    torch.testing.assert_close(now["mlp.2.weight"], was["mlp.2.weight"] + change, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [Prompt, PTuning])
def test_a_text_starts_both_forms_alike(kind):
    method = kind(3, init="text", text="very good film").bind(tt.bert_like("good bad very fine film"))
    model = attach(tiny("llama"), method)
    wanted = model.get_input_embeddings().weight[[i for (i,) in method.ids]]
    torch.testing.assert_close(prompt_of(model), wanted, rtol=0, atol=1e-5)


NO_ATTENTION = {
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97, state_size=4)
    ),
    "plain": lambda: nn.Sequential(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("form", [Prefix(3), Prefix(3, reparam="mlp"), Prefix(2, init="words", ids=(3,))])
@pytest.mark.parametrize("model", NO_ATTENTION.values(), ids=NO_ATTENTION)
def test_a_prefix_without_attention_is_refused(model, form):
    made = model()
    with pytest.raises(Refusal, match=r"no attention layer.*What works: LoRA"):
        attach(made, form)
    assert not hasattr(made, "deltatune_state")


def test_several_prompts_start_apart_and_read_each_row_once():
    torch.manual_seed(0)  # prompts are drawn each for itself: two may begin with one word
    model = attach(tiny("llama"), Prompt(2, count=3))
    sets = prompt_sets(model)
    assert sets == ((97, 98), (99, 100), (101, 102))
    assert virtual_ids(model) == (97, 98)
    assert len({tuple(row.tolist()) for row in prompt_of(model)}) == 6
    row = Encoded((1, 97, 98, 5), (-100, -100, -100, 5), where="f:1")
    assert [r.ids for r in side_by_side([row], sets)] == [(1, 97, 98, 5), (1, 99, 100, 5), (1, 101, 102, 5)]
    together = logits(model, pad(side_by_side([row], sets), 0).inputs)
    for k, alone in enumerate(side_by_side([row], sets)):
        torch.testing.assert_close(together[k], logits(model, pad([alone], 0).inputs)[0], rtol=0, atol=1e-5)


COMBINED = [  # probabilities of three prompts for two classes -> the chosen class
    ("vote", [[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]], 1),
    ("average", [[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]], 0),
    ("vote", [[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], 0),
]


@pytest.mark.parametrize(("how", "said", "chosen"), COMBINED)
def test_prompts_vote_or_are_averaged(how, said, chosen):
    one = pad([Encoded((1,), None, 0)] * 3, 0)
    together = type(one)(one.inputs, one.labels, prompts=3, combine=how)
    assert combined(torch.tensor(said).log(), together).argmax(-1).tolist() == [chosen]


def test_two_votes_that_are_equal_go_to_the_likelier():
    one = pad([Encoded((1,), None, 0)] * 2, 0)
    together = type(one)(one.inputs, one.labels, prompts=2, combine="vote")
    assert combined(torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log(), together).argmax(-1).tolist() == [0]


# ---- P-tuning --------------------------------------------------------------------------------------------------------
def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def direction(x: np.ndarray, w: dict[str, np.ndarray], end: str) -> np.ndarray:
    """One LSTM direction by hand; x [length, d_in] -> [length, units]."""
    units = w[f"weight_hh_{end}"].shape[1]
    h, c, out = np.zeros(units), np.zeros(units), []
    for step in x[::-1] if end.endswith("reverse") else x:
        z = w[f"weight_ih_{end}"] @ step + w[f"bias_ih_{end}"] + w[f"weight_hh_{end}"] @ h + w[f"bias_hh_{end}"]
        i, f, g, o = np.split(z, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out[::-1] if end.endswith("reverse") else out)


def test_the_prompt_is_mlp_of_bilstm():
    """The paper's encoder in NumPy, two prompts through one encoder; its gradient by finite differences."""
    model = attach(tiny("llama"), PTuning(3, count=2))
    (delta,) = fill(model)
    w = {name: array(p) for name, p in delta.encode.lstm.named_parameters()}
    assert w["weight_hh_l1_reverse"].shape == (4 * 16, 16)  # d / 2 units a direction, two layers
    first, last = delta.encode.mlp[0], delta.encode.mlp[2]
    for k, x in enumerate(array(delta.inputs).reshape(2, 3, 32)):
        for layer in ("l0", "l1"):
            x = np.concatenate([direction(x, w, layer), direction(x, w, f"{layer}_reverse")], 1)
        x = np.maximum(x @ array(first.weight).T + array(first.bias), 0) @ array(last.weight).T + array(last.bias)
        np.testing.assert_allclose(array(delta.vectors())[3 * k : 3 * k + 3], x, rtol=0, atol=1e-10)
    aim = torch.randn(6, 32, dtype=torch.float64)
    (delta.vectors() * aim).sum().backward()
    slope = float(delta.inputs.grad[4, 5])
    with torch.no_grad():
        delta.inputs[4, 5] += 1e-6
        up = float((delta.vectors() * aim).sum())
        delta.inputs[4, 5] -= 2e-6
        assert (up - float((delta.vectors() * aim).sum())) / 2e-6 == pytest.approx(slope, rel=1e-5)


def d_model(d: int):
    return lambda: hf.BertConfig(hidden_size=d, num_attention_heads=12, num_hidden_layers=1, intermediate_size=8)


def t5(d: int):
    return lambda: hf.T5Config(d_model=d, num_layers=1)


def gpt2_m():
    return hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16)


def roberta_large():
    return hf.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, hidden_size=1024, num_hidden_layers=24,
        num_attention_heads=16, intermediate_size=4096,
    )  # fmt: skip


COUNTS = {
    "prefix 5 GPT-2 M": (gpt2_m, Prefix(5), 245_760),
    "prefix 5 GPT-2 M in training": (gpt2_m, Prefix(5, reparam="mlp", hidden=512), 25_744_896),
    "prefix 50 Llama-3.2-3B": (llama_3b, Prefix(50), 2_867_200),
    "prefix 200 Llama-3.2-3B": (llama_3b, Prefix(200), 11_468_800),
    "P-tuning v2 128 RoBERTa-large": (roberta_large, Prefix(128), 6_291_456),
    # d = 768: the encoder's published 8,271,360 = 14 d^2 + 18 d, and the inputs
    "P-tuning 6 BERT-base": (bert, PTuning(6), 8_271_360 + 6 * 768),
    "P-tuning MLP 20 Llama-3.2-3B": (llama_3b, PTuning(20, encoder="mlp"), 28_382_208),  # as peft's, of the same shape
    # the paper's shape where peft's LSTM has 434,371,584 (deviation 4)
    "P-tuning LSTM 50 Llama-3.2-3B": (llama_3b, PTuning(50), 14 * 3072**2 + 18 * 3072 + 50 * 3072),
    "prompt 5 x 20 BERT-base": (bert, Prompt(20, count=5), 5 * 20 * 768),
    "prompt 5 T5-XXL": (t5(4096), Prompt(5), 20_480),
    "prompt 100 T5-XXL": (t5(4096), Prompt(100), 409_600),
    "prompt 100 T5-base": (t5(768), Prompt(100), 76_800),
}


@pytest.mark.parametrize("case", COUNTS.values(), ids=COUNTS)
def test_published_counts(case):
    config, method, published = case
    with torch.device("meta"):
        model = hf.AutoModel.from_config(config())
        found = list(method.deltas(model))
    assert sum(p.numel() for _, d in found for p in d.parameters()) == published


# ---- peft ----
def twenty_losses(model: nn.Module, given: dict, chosen: list[nn.Parameter]) -> list[float]:
    optimizer, losses = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.01), []
    for _ in range(20):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def by_file(model, folder):
    """peft with what we save."""
    theirs = PeftModel.from_pretrained(tiny(model.config.model_type), str(save(model, "default", folder / "a")))
    (start,) = [p.requires_grad_() for name, p in theirs.named_parameters() if "prompt_encoder" in name]
    return theirs, [start]


def encoded(model, config: peft.PromptLearningConfig, values: dict[str, torch.Tensor]):
    """peft with a prompt encoder of its own, and our values in it."""
    theirs = peft.get_peft_model(tiny(model.config.model_type), config)
    encoder = theirs.prompt_encoder["default"]
    encoder.load_state_dict(values)  # strict: the same names and shapes
    return theirs, list(encoder.parameters())


def by_ptuning(model, folder):
    """peft's P-tuning in the paper's shape: half its default width a direction, two layers."""
    (delta,) = deltas(model)
    kind = "MLP" if isinstance(delta.encode, nn.Sequential) else "LSTM"
    units = {"encoder_reparameterization_type": kind, "encoder_hidden_size": 32 if kind == "MLP" else 16}
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_num_layers=2, **units)
    parts = (
        {"mlp_head": delta.encode} if kind == "MLP" else {"lstm_head": delta.encode.lstm, "mlp_head": delta.encode.mlp}
    )
    values = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}
    return encoded(model, config, {"embedding.weight": delta.inputs.detach(), **values})


def by_projection(model, folder):
    """peft's prefix_projection: one last layer for all of ours."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=6, prefix_projection=True
    )
    found, (root,) = deltas(model), deltas(model)[0].source
    values = {f"transform.0.{end}": getattr(root.up, end) for end in ("weight", "bias")}
    values |= {f"transform.2.{end}": torch.cat([getattr(d.out, end) for d in found]) for end in ("weight", "bias")}
    return encoded(model, config, {k: t.detach() for k, t in {"embedding.weight": root.p, **values}.items()})


ORACLES = {
    "prefix": (Prefix(4), by_file, ("llama", "gpt2")),
    "prefix-mlp": (Prefix(4, reparam="mlp", hidden=6), by_projection, ("gpt2",)),
    "prompt": (Prompt(4), by_file, ("llama", "gpt2")),
    "ptuning": (PTuning(4), by_ptuning, ("llama", "gpt2")),
    "ptuning-mlp": (PTuning(4, encoder="mlp"), by_ptuning, ("llama", "gpt2")),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
@pytest.mark.filterwarnings("ignore:for MLP, the argument `encoder_num_layers` is ignored:UserWarning")
@pytest.mark.parametrize(("name", "family"), [(n, f) for n, (_, _, families) in ORACLES.items() for f in families])
def test_twenty_steps_go_as_in_peft(tmp_path, family, name):
    """From the same start: equal logits, equal losses, and equal logits again."""
    method, made, _ = ORACLES[name]
    torch.manual_seed(0)
    model, given = attach(tiny(family), method), batch(tiny(family), None)
    theirs, chosen = made(model, tmp_path)
    own, asked = batch(model), {**given, "labels": given["input_ids"]}
    width = own["input_ids"].shape[1]
    own["labels"] = torch.cat([torch.full((2, width - 7), -100), given["input_ids"]], 1)
    agree(model, own, theirs, asked)
    losses = twenty_losses(model, own, list(trainable(model).values()))
    assert losses[-1] < losses[0] - 0.01
    np.testing.assert_allclose(losses, twenty_losses(theirs, asked, chosen), rtol=0, atol=2e-5)
    agree(model, own, theirs, asked, 2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifier_with_a_prefix_says_what_peft_says(family):
    """P-tuning v2's home: the real tokens of an encoder stand after the prefix too."""
    torch.manual_seed(0)
    model = attach(tiny(family, "classify"), Prefix(4))
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = peft.get_peft_model(tiny(family, "classify"), config).eval()
    kept = torch.stack([torch.stack([d.k, d.v]) for d in deltas(model)])  # [layers, 2, heads, length, dim]
    with torch.no_grad():
        weight = kept.permute(3, 0, 1, 2, 4).flatten(1)
        theirs.prompt_encoder["default"].embedding.weight.copy_(weight)
        ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(logits(model, given), theirs(**given).logits, rtol=0, atol=1e-5)


def agree(model, own, theirs, asked, atol=2e-5):
    with torch.no_grad():
        wanted = theirs(**{k: v for k, v in asked.items() if k != "labels"}).logits
        torch.testing.assert_close(logits(model, own), wanted, rtol=0, atol=atol)


# ---- mistakes ----
MISTAKES = [
    (PTuning, {"length": 1}, "PTuning length 1 gives encoder 'lstm' nothing to recur over: choose 'mlp'"),
    (Prefix, {"offset_positions": "no"}, "Prefix offset_positions must be true or false, got 'no'"),
    (Prompt, {"init": "labels", "labels": "good"}, "labels a list of words: got '' and 'good'"),
    (Prompt, {"init": "text", "text": 5}, "Prompt text is a text, labels a list of words: got 5"),
    (Prompt, {"ids": ((3,),)}, "Prompt ids start an init text or labels, not 'vocab', which reads none"),
    (Prefix, {"init": "word"}, "Prefix init 'word': choose from vocab, words, random. Did you mean 'words'"),
    (Prefix, {"reparam": "lstm"}, "Prefix reparam 'lstm': choose from none, mlp"),
    (Prefix, {"hidden": 0}, "Prefix hidden must be a whole number >= 1, got 0"),
    (Prefix, {"init": "words"}, "init 'words' needs words"),
    (Prefix, {"words": "a b"}, "init 'vocab', words 'a b'"),
    (Prompt, {"init": "txt"}, "Prompt init 'txt': choose from vocab, uniform, text, labels.* Did you mean 'text'"),
    (Prompt, {"init": "text"}, "init 'text' needs text"),
    (PTuning, {"init": "vocb"}, "PTuning init 'vocb': choose from vocab, random, text, labels.* Did you mean 'vocab'"),
    (PTuning, {"init": "text"}, "PTuning init 'text' needs text"),
    (Prompt, {"labels": ("a",)}, "needs labels, no other: init='vocab'"),
    (Prompt, {"count": 0}, "Prompt count must be a whole number >= 1, got 0"),
    (Prompt, {"combine": "mean"}, "Prompt combine 'mean': choose from vote, average"),
    (Prompt, {"length": 1, "init": "labels", "labels": ("a", "b")}, "length 1 is too short for 2 labels"),
    (Prompt, {"count": 2, "init": "text", "text": "a"}, "2 prompts that start from the same words would stay the same"),
    (PTuning, {"encoder": "gru"}, "PTuning encoder 'gru': choose from lstm, mlp"),
    (PTuning, {"length": 0}, "PTuning length must be .* got 0"),
]


@pytest.mark.parametrize(("method", "fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(method, fields, said):
    with pytest.raises(ValueError, match=said):
        method(**fields)


@pytest.mark.parametrize("method", [Prefix(init="words", words="a"), Prompt(init="text", text="a")], ids=str)
def test_words_that_are_no_ids_yet_say_what_to_do(method):
    with pytest.raises(ValueError, match=r"\.bind\(tokenizer\)"):
        attach(tiny("llama"), method)


def test_the_default_of_every_soft_method_is_registered():
    assert {"prefix", "prompt", "ptuning"} <= set(METHODS)
