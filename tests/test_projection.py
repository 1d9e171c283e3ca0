"""Losses from hidden states: the same loss and gradients as from all logits, and never all logits at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune import SFT, LoRA, attach
from deltatune.data.batch import pad
from deltatune.data.encode import Encoded
from deltatune.objectives import projection
from deltatune.objectives.common import decoder_inputs, states_at
from deltatune.objectives.projection import Chunked, Finish, Projection
from models import FAMILIES, inputs, tiny

FINISHES = {
    "plain": Finish(),
    "scaled, capped": Finish(0.5, 3.0),
    "biased": Finish(2.0, None, torch.linspace(-1, 1, 300)),
}
WORDS = [name for name in FAMILIES if name not in ("electra",)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(projection, "CHUNK", 5000)  # 300 words: 16 tokens at a time


def given(dtype: torch.dtype, n: int = 70) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, 16), (300, 16), (300,)))
    return states.requires_grad_(), weight.mul_(0.3).requires_grad_(), bias.requires_grad_(), torch.arange(n) * 4


# ---- the function ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("even", [True, False], ids=["a sum", "own weights"])
@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
def test_losses_and_all_gradients_are_cross_entropys(finish, even):
    states, weight, bias, wanted = given(torch.float64)
    g = torch.full((70,), 0.3, dtype=torch.float64) if even else torch.linspace(0, 1, 70, dtype=torch.float64)
    losses, hits = Chunked.apply(states, weight, bias, wanted, finish)
    ours = torch.autograd.grad((losses * g).sum(), (states, weight, bias))
    logits = finish(F.linear(states, weight, bias))
    expected = F.cross_entropy(logits, wanted, reduction="none")
    theirs = torch.autograd.grad((expected * g).sum(), (states, weight, bias))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(hits, logits.argmax(-1) == wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_half_precision_sums_in_fp32(dtype):
    states, weight, _, wanted = given(dtype)
    losses, _ = Chunked.apply(states, weight, None, wanted, Finish())
    exact = F.cross_entropy(states.float() @ weight.float().T, wanted, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2)


def test_a_token_of_hopeless_odds_has_a_finite_loss():
    states = torch.eye(2).mul(500.0).requires_grad_()
    losses, hits = Chunked.apply(states, torch.eye(2), None, torch.tensor([1, 1]), Finish())
    assert losses.tolist() == [500.0, 0.0]
    assert hits.tolist() == [False, True]


def test_a_second_derivative_is_refused_not_wrong():
    states, weight, _, wanted = given(torch.float64)
    losses, _ = Chunked.apply(states, weight, None, wanted, Finish())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(losses.sum(), states, create_graph=True)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.size = max(self.size, t.numel() if isinstance(t, Tensor) else 0)
        return out


def test_no_more_logits_than_a_piece_are_ever_held():
    states, weight, _, wanted = given(torch.float32)
    with Largest() as seen:
        losses, _ = Chunked.apply(states, weight.detach(), None, wanted, Finish())
        losses.sum().backward()
    assert seen.size <= 5000 < 70 * 300


# ---- models ----------------------------------------------------------------------------------------------------------
SIZE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "pad_token_id": 0}
FINISHED = {  # what only configurations tell
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=0.5)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZE, logit_scale=0.25)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZE, logits_scaling=4.0)),
}


@pytest.mark.parametrize("family", [*FAMILIES, *FINISHED])
def test_states_and_projection_give_every_familys_own_logits(family):
    model = (FINISHED[family]() if family in FINISHED else tiny(family)).eval()
    call = asked(model)
    expected = model(**call).logits
    at = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 4])
    found, made = projection.states(model, lambda: model(**call), at)
    again, _ = projection.states(model, lambda: model(**call), at)  # the first pass shows a logit, others none
    assert made.head is not None
    torch.testing.assert_close(made.logits(found), expected[at].float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, again)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0


def test_logits_that_something_else_makes_are_the_models_own():
    """A head after which the model does what its configuration does not tell."""
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda head, args, y: y)
    inner = model.forward
    model.forward = lambda **kwargs: odd(inner(**kwargs))
    call = asked(model)
    at = torch.tensor([0, 1]), torch.tensor([1, 2])
    for _ in range(2):
        found, made = projection.states(model, lambda: model(**call), at)
        assert made.head is None
        assert torch.equal(made.logits(found), model(**call).logits[at])


def test_hooks_in_front_of_a_head_see_and_change_what_is_projected_in_pieces():
    """As in a call of the layer, which projecting in pieces is not."""
    head, seen = nn.Linear(4, 7), []
    states, wanted = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 4])
    expected = projection.Projection(head, projection.Finish()).losses(2 * states, wanted)
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    assert projection.in_pieces(head)
    found = projection.Projection(head, projection.Finish()).losses(states, wanted)
    assert seen == [(5, 4)]
    assert all(map(torch.equal, found, expected))
    head.register_forward_pre_hook(lambda _, args, kwargs: None, with_kwargs=True)
    assert not projection.in_pieces(head)


def asked(model: Any) -> dict[str, Tensor]:
    return {name: t for name, t in inputs(model).items() if name != "labels"}


def odd(out: Any) -> Any:
    out.logits = out.logits.square()
    return out


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bart", "t5"])
def test_the_loss_of_a_batch_is_that_of_the_models_logits(family):
    model, objective = tiny(family), SFT()
    rows = [Encoded((7, 8, 9, 10, 11), (-100, -100, 9, 10, 11)), Encoded((12, 13, 14), (-100, 13, 14))]
    if model.config.is_encoder_decoder:
        rows = [Encoded((7, 8, 9), (9, 10, 11), decoder=True), Encoded((12, 13), (14,), decoder=True)]
    batch = pad(rows, 0)
    loss, metrics = objective.loss(model, batch)
    if model.config.is_encoder_decoder:
        logits = model(**batch.inputs, decoder_input_ids=decoder_inputs(model, batch.labels)).logits
        wanted = batch.labels
    else:
        logits, wanted = model(**batch.inputs).logits[:, :-1], batch.labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(
        float((logits.argmax(-1) == wanted)[wanted != -100].float().mean())
    )


def test_an_adapter_on_the_head_is_heard_and_trained():
    model = attach(tiny("llama", tie_word_embeddings=False), LoRA(2, targets=("lm_head",)), "a")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    batch = pad([Encoded((7, 8, 9, 10), (-100, 8, 9, 10))], 0)
    loss, _ = SFT().loss(model, batch)
    logits = model(**batch.inputs).logits[0, :-1]
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([8, 9, 10]), reduction="sum"))
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def test_a_batch_without_a_supervised_token_has_loss_zero():
    model = attach(tiny("llama"), LoRA(2), "a")
    loss, metrics = SFT().loss(model, pad([Encoded((7, 8, 9), (-100,) * 3)], 0))
    assert (loss.item(), metrics["token_accuracy"]) == (0.0, 0.0)
    loss.backward()


def test_a_trained_head_gets_its_gradient():
    model = tiny("llama", tie_word_embeddings=False)
    batch = pad([Encoded((7, 8, 9, 10), (-100, 8, 9, 10))], 0)
    SFT().loss(model, batch)[0].backward()
    ours, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    logits = model(**batch.inputs).logits[0, :-1]
    F.cross_entropy(logits, torch.tensor([8, 9, 10]), reduction="sum").backward()
    torch.testing.assert_close(ours, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    assert isinstance(states_at(model, batch, (torch.tensor([0]), torch.tensor([1])))[1], Projection)


class Capped(torch.nn.Module):
    """A llama whose logits are capped at 30, as its configuration does not tell."""

    def __init__(self):
        super().__init__()
        self.inner = tiny("llama")
        self.config, self.get_output_embeddings = self.inner.config, self.inner.get_output_embeddings

    def forward(self, **given):
        out = self.inner(**given)
        return type(out)(logits=30 * torch.tanh(out.logits / 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_nothing_tells_is_found_where_logits_are_small(dtype):
    model = Capped().to(dtype).eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert model(input_ids=ids).logits.abs().max() < 7  # where a cap of 30 changes less than 2 %
    assert not projection.settled(model, lambda: model(input_ids=ids))
    assert projection.settled(model.inner, lambda: model.inner(input_ids=ids))


def test_the_question_leaves_no_trace_and_has_one_answer():
    """In training or not, with an adapter on the head that drops out or not: a resumed run asks elsewhere."""
    model = attach(tiny("llama"), LoRA(r=2, targets=("lm_head",), dropout=0.5))
    ids = torch.arange(3, 13)[None]
    for training in (True, False):
        model.train(training)
        projection.SETTLED.pop(model, None)
        before = torch.random.get_rng_state()
        assert projection.settled(model, lambda: model(input_ids=ids))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(module.training is training for module in model.modules())


def test_a_changed_configuration_is_asked_again():
    model = tiny("gemma")
    ids = torch.arange(3, 13)[None]
    assert projection.settled(model, lambda: model(input_ids=ids))
    model.config.final_logit_softcapping = 3.0
    assert projection.settled(model, lambda: model(input_ids=ids))
    assert projection.told(model).cap == 3.0
    rows, at = torch.zeros(2, dtype=torch.long), torch.tensor([3, 4])
    found, how = projection.states(model, lambda: model(input_ids=ids), (rows, at))
    torch.testing.assert_close(how.logits(found), model(input_ids=ids).logits[0, 3:5], rtol=0, atol=1e-5)
