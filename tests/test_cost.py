"""What a step costs, in numbers that no machine changes: operations, bytes kept for the backward pass, kernels called.

Tables of literal numbers: a kernel more in a layer, or a tensor more that is kept, fails here. Counts are of what one
block more adds, so that nothing outside the blocks is in them.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deltatune import LoRA, activate, attach, rows
from deltatune.core.attach import packing
from deltatune.core.site import widths
from deltatune.core.slot import deltas
from deltatune.data.batch import Batch
from deltatune.methods import build
from deltatune.objectives import SFT
from deltatune.train.step import Step
from deltatune.train.work import Work
from models import HEADS, HIDDEN, VOCAB, tiny

TOKENS = 64
WIDE = 48  # of the feed-forward part
METHODS: dict[str, Any] = {
    "base": [],
    "lora": [{"lora": {"r": 2, "targets": ["all"]}}],
    "dora": [{"dora": {"r": 2, "targets": ["all"]}}],
    "adalora": [{"adalora": {"init_r": 2, "r": 1}}],
    "adapter": [{"adapter": {"bottleneck": 4}}],
    "ia3": [{"ia3": {}}],
    "prefix": [{"prefix": {"length": 3}}],
    "bitfit": [{"bitfit": {"create": True}}],  # a bias for each of Llama's linears, which have none
}


def made(name: str, layers: int = 2, **fields: Any) -> Any:
    """A tiny Llama that trains a method; "base" passes gradients on to its embeddings and trains nothing."""
    model = tiny("llama", num_hidden_layers=layers, **fields)
    if name != "base":
        return attach(model, build(METHODS[name])).train()
    model.requires_grad_(False)
    model.model.embed_tokens.register_forward_hook(lambda _, args, y: y.requires_grad_())
    return model.train()


def packed_batch(*lens: int, learned: int | None = None) -> Batch:
    """Rows end to end; of each, the last `learned` tokens are supervised (all but the first, by default)."""
    ids = (torch.arange(sum(lens)) % 90 + 5)[None]
    labels = torch.full_like(ids, -100)
    start = 0
    for n in lens:
        labels[0, start + (1 if learned is None else n - learned) : start + n] = 7
        start += n
    places = torch.cat([torch.arange(n) for n in lens])[None]
    return Batch({"input_ids": ids, "position_ids": places}, labels, lens=lens)


def padded_batch(*lens: int) -> Batch:
    mask = (torch.arange(max(lens)) < torch.tensor(lens)[:, None]).long()
    ids = (torch.arange(mask.numel()) % 90 + 5).view(mask.shape)
    return Batch({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100))


def step_of(model: Any, batch: Batch) -> Step:
    """Asked once before: an objective then learns how the model finishes its logits, which is no part of a step."""
    if batch.lens:
        packing(model)
    step = Step(model, SFT()).train()
    step(batch)
    return step


# ---- operations ------------------------------------------------------------------------------------------------------
def test_a_step_runs_the_bases_products_and_loras_own_and_no_other() -> None:
    """Guards against a weight's gradient that nobody wants, a product made twice, logits of unsupervised tokens."""
    r, model = 2, made("lora")
    batch = packed_batch(20, 12, learned=4)
    step = step_of(model, batch)
    work, counter = Work(step), FlopCounterMode(display=False)
    with counter:
        step(batch)[0].backward()
    work.close()
    work.attention.clear()  # torch has no count of the CPU's fused attention
    tokens, inputs = 32, [widths(m) for m in model.modules() if type(m) is torch.nn.Linear and m is not model.lm_head]
    # A x and B (A x) forward; backward the gradients of A x, of B and of A; and of x, where something below trains:
    # q, k and v of the first block read the embeddings
    own = 3 * sum(2 * r * tokens * (k + n) for k, n in inputs) - 3 * 2 * r * tokens * HIDDEN
    assert len(inputs) == 14
    assert work.rows[HIDDEN, VOCAB] == 8  # tokens that the vocabulary was asked for
    assert counter.get_total_flops() == work.flops() + own


# ---- bytes -----------------------------------------------------------------------------------------------------------
def kept(model: Any, batch: Batch) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Every storage that a forward pass keeps for its backward pass: its bytes, a shape; parameters left out."""
    step, own = step_of(model, batch), {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, tuple[int, tuple[int, ...]]] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            alive.append(storage)  # its address is not given away meanwhile
            found[storage._cdata] = (storage.nbytes(), tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step(batch)
    return found


def total(model: Any, batch: Batch) -> int:
    return sum(size for size, _ in kept(model, batch).values())


@cache
def per_token(name: str, *lens: int) -> float:
    """Bytes that one block more keeps, of a token."""
    batch = packed_batch(*lens) if name != "base" else padded_batch(TOKENS)
    return (total(made(name, 3), batch) - total(made(name, 2), batch)) / sum(lens)


# of the base: two norms (x, x's normalised form, 1 / its size), q and k after their turn, v, attention's result and its
# log-sums, gate, its activation and up; q, k, v, o, gate, up and down keep nothing
BASE = 4 * (2 * (HIDDEN + 1) + 2 * HIDDEN + 2 * (HIDDEN // 2) + HEADS + 3 * WIDE)
MOST = {
    "base": BASE,
    "lora": BASE + 4 * (2 * HIDDEN + WIDE + 7 * 2),  # x of q k v, of gate up, of down; A x of 7
    "adapter": BASE + 4 * 2 * (HIDDEN + 4 + 4),  # what both read, before and after the activation
    "ia3": BASE + 4 * (2 * (HIDDEN // 2) + WIDE),  # what is scaled
    "bitfit": BASE,  # the gradient of a bias needs no input
}


@pytest.mark.parametrize("name", MOST)
def test_a_block_keeps_what_its_gradients_need_and_nothing_else(name: str) -> None:
    """Guards against inputs of frozen layers that are kept, copies beside what is kept already, casts that are kept."""
    assert per_token(name, TOKENS) == MOST[name]


DORA = 4 * (3 * HIDDEN + 2 * (HIDDEN // 2) + 2 * WIDE)  # y of every layer, for its magnitude, where nothing else has it


def test_dora_keeps_each_output_once_and_no_weight() -> None:
    """Guards against W + B A, or its norm's graph, in memory."""
    beside = per_token("dora", TOKENS) - MOST["lora"]
    vectors = per_token("dora", 2 * TOKENS) - MOST["lora"]
    assert 2 * vectors - beside <= DORA  # what grows with the tokens
    assert (beside - vectors) * 2 * TOKENS < 4 * 7 * HIDDEN * HIDDEN  # what does not: less than the weights


def test_a_prefixs_mask_is_made_once_for_all_layers() -> None:
    """Guards against a mask of tokens x tokens that every layer makes and keeps."""
    rest = per_token("prefix", TOKENS) - BASE
    assert rest <= 4 * 2 * (HIDDEN // 2) + 4 * 2 * HEADS * 8 * 3 / TOKENS + 1  # k and v repeated for q's heads, longer


ROWS = {"lora": 4 * HIDDEN, "bitfit": 0}  # rows of several lengths are put together anew, which o's A reads


@pytest.mark.parametrize(("name", "anew"), ROWS.items())
def test_packed_rows_keep_nothing_for_padding(name: str, anew: int) -> None:
    """Guards against filling up, and against copies of rows beside the rows."""
    assert per_token(name, 16, 16, 16, 16) == MOST[name]
    assert per_token(name, 40, 24) == MOST[name] + anew
    filled = [total(made(name, layers), padded_batch(40, 24)) for layers in (2, 3)]
    assert filled[1] - filled[0] >= 80 * MOST[name]  # rows of 40 twice


@pytest.mark.parametrize("learned", [1, 8])
def test_logits_exist_for_supervised_tokens_alone_and_are_not_kept(learned: int) -> None:
    """Guards against logits of all tokens, and against any that wait for the backward pass."""
    batch, vocabulary = packed_batch(40, 24, learned=learned), 1009
    model = made("lora", vocab_size=vocabulary)
    assert not any(vocabulary in shape for _, shape in kept(model, batch).values())
    step, sizes = step_of(model, batch), Sizes()
    with sizes:
        step(batch)[0].backward()
    assert max(size for size in sizes.found if size % vocabulary == 0) == 2 * learned * vocabulary


class Sizes(TorchDispatchMode):
    """How many numbers each result of an operation has, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and kernel(func):
            self.found.append(out.numel())
        return out


# ---- kernels ---------------------------------------------------------------------------------------------------------
ALIASES = {"aten._unsafe_view.default", "aten.promote_types.default"}  # no work, and not said to be views


def kernel(func: Any) -> bool:
    """Whether an operation computes something: views and questions of types do not."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not views and str(func) not in ALIASES


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kernel(func):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def called(run: Any) -> Counter[str]:
    with Kernels() as mode:
        run()
    return mode.found


@cache
def of_a_block(name: str, *lens: int) -> tuple[int, int]:
    """Kernels that one block more calls, (forward, backward)."""
    found = []
    for layers in (2, 3):
        model, batch = made(name, layers), padded_batch(TOKENS) if name == "base" else packed_batch(*lens)
        step, losses = step_of(model, batch), []
        forward = called(lambda step=step, batch=batch, losses=losses: losses.append(step(batch)[0]))
        found.append((forward.total(), called(losses[0].backward).total()))
    return found[1][0] - found[0][0], found[1][1] - found[0][1]


KERNELS = {  # forward, backward: of the base 7 products and attention, the rest is norms, turns and the activation
    "base": (34, 56),
    "lora": (48, 108),  # forward 2 of each of 7 layers
    "dora": (125, 143),  # forward 11 more than LoRA of each of 7: a norm, and what it is divided into
    "adapter": (42, 75),  # forward 4 of each of 2: two products, the activation, the sum
    "ia3": (37, 68),  # forward 1 of each of 3
    "prefix": (41, 65),
    "bitfit": (41, 66),  # forward 1 of each of 7
}


@pytest.mark.parametrize(("name", "counts"), KERNELS.items())
def test_kernels_of_a_block(name: str, counts: tuple[int, int]) -> None:
    """Guards against an operation more in a layer: a cast, a copy, a product by 1. Fewer is a number to write here."""
    assert of_a_block(name, TOKENS) == counts


@pytest.mark.parametrize("name", ["lora", "adapter", "ia3", "bitfit"])
def test_rows_of_one_length_cost_no_kernels_of_their_own(name: str) -> None:
    """Guards against taking packed rows apart, and putting them together, where they lie side by side."""
    assert of_a_block(name, 16, 16, 16, 16) == of_a_block(name, 64)


def ranked(layers: int) -> tuple[int, int]:
    """Kernels that AdaLoRA asks for beside a step's, (of its penalty, of what it sees of gradients), at the second."""
    model, found = made("adalora", layers), []
    every = deltas(model)
    for delta in every:
        delta.begin(1000)
    for step in (1, 2):
        penalty = called(lambda: found.append(sum(delta.penalty() for delta in every)))
        found[-1].backward()
        for delta in every:
            delta.lora_E.grad = torch.zeros_like(delta.lora_E)
        after = called(lambda step=step: [delta.after_step(step) for delta in every])
    return penalty.total(), after.total()


def test_what_adalora_sees_costs_the_same_for_any_number_of_layers() -> None:
    """Guards against a handful of tiny kernels for each of three factors of each layer. 7 of a penalty, and its sum."""
    two, three = ranked(2), ranked(3)
    assert three[0] - two[0] == 7 * 8
    assert two[1] == three[1] == 8


def test_rows_of_several_lengths_are_taken_apart_once() -> None:
    """Guards against a gradient of the whole pack, mostly zeros, for each of its rows."""
    found = set()
    for lens in ((64,), (20, 12, 9, 23), (9, 9, 20, 9, 17)):
        step = step_of(made("lora"), packed_batch(*lens))
        loss = step(packed_batch(*lens))[0]
        found.add(called(loss.backward)["aten.slice_backward.default"])
    assert len(found) == 1
    assert found != {0}  # turning q and k has some


# ---- several adapters, and tokens one by one -------------------------------------------------------------------------
def of_a_call(run: Any) -> Counter[str]:
    """Kernels of the second call: what is kept from call to call is there."""
    with torch.no_grad():
        run()
        return called(run)


@cache
def mixed(batch: int, adapters: int, tokens: int) -> int:
    """Kernels of a forward pass over `batch` rows, each on one of the adapters, beyond those of the base."""
    model = tiny("llama")
    ids = torch.full((batch, tokens), 5)
    base = of_a_call(lambda: model(input_ids=ids, use_cache=False)).total()
    for i in range(adapters):
        attach(model, LoRA(r=2, targets=("all",)), name=str(i))
    with rows(model, [str(i % adapters) for i in range(batch)]):
        return of_a_call(lambda: model(input_ids=ids, use_cache=False)).total() - base


def test_a_mixed_batchs_kernels_do_not_depend_on_its_rows() -> None:
    """Guards against a loop over rows or adapters. 14 linears: 2 products and a choice each for a token alone; where
    there are more tokens than ranks, 2 products of factors that are taken out first."""
    for tokens, each in ((1, 3), (7, 4)):
        found = {mixed(batch, adapters, tokens) for batch in (4, 8, 16) for adapters in (2, 4)}
        assert found == {14 * each}


def test_a_generated_token_costs_the_calls_that_a_step_does() -> None:
    """Guards against what is made anew for every token: factors, masks, casts."""
    model = tiny("llama")
    attach(model, LoRA(r=2, targets=("all",)), name="a")
    found = {}
    for name in ((), ("a",)):
        activate(model, *name)
        with torch.no_grad():
            cache = model(input_ids=torch.full((3, 7), 5), use_cache=True).past_key_values
        token = torch.full((3, 1), 6)
        found[name] = of_a_call(lambda cache=cache, token=token: model(input_ids=token, past_key_values=cache)).total()
    assert found["a",] - found[()] == 2 * (KERNELS["lora"][0] - KERNELS["base"][0]) == 28
