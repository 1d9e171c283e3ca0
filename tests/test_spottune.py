"""SpotTune: forward and policy gradient in float64, one decision per sequence, statistics; gated deltas separately."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny_run
from conformance import logits
from deltatune import Adapter, BitFit, Freeze, LoRA, Prefix, activate, attach, detach, disabled, load, rows, save
from deltatune.core.attach import packing, parameters
from deltatune.core.attention import packed, positions
from deltatune.core.delta import Refusal
from deltatune.core.routing import Beside, Block, Policy, Routed
from deltatune.core.slot import deltas, slots
from deltatune.methods import METHODS
from deltatune.train.run import run
from models import inputs, tiny

SpotTune = METHODS["spottune"].cls


def stirred(family: str, method, seed: int = 0, size: float = 0.3):
    model = tiny(family, dtype=torch.float64)
    torch.manual_seed(seed)
    attach(model, method)
    model.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters(model, "default").values():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def policy_of(model) -> Policy:
    return next(d for d in deltas(model) if isinstance(d, Policy))


def decide(model, hard: list[list[bool]]):
    """Fix the policy's decisions; `soft` is a leaf whose gradient is the policy gradient."""
    policy = policy_of(model)
    soft = torch.full((len(hard), len(hard[0])), 0.5, dtype=torch.float64, requires_grad=True)

    def fixed(x):
        policy.now.chosen = torch.tensor(hard)
        policy.now.hard, policy.now.soft = torch.tensor(hard), soft if torch.is_grad_enabled() else None

    policy.decide = fixed
    return soft


DECISIONS = [[True, False], [False, True], [True, True]]


def reference(model, hard):
    """x_l = I F'(x) + (1 - I) F(x) with both blocks written out, I a float64 leaf: (logits, I)."""
    choice = torch.tensor(hard, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(model)
    detach(plain, "default")
    changed = {i: copy.deepcopy(model.model.layers[i]) for i in range(2)}
    for i, block in changed.items():  # every sequence through the changed block
        for module in block.modules():
            if isinstance(module, Routed):
                module.heard = lambda y, new: new
                module.visible = lambda rows: None
        for hooks in (block._forward_hooks, block._forward_pre_hooks):
            hooks.clear()
        frozen = plain.model.layers[i]
        forward = frozen.forward

        def both(x, *args, i=i, block=block, forward=forward, **kwargs):
            share = choice[:, i, None, None]
            kwargs = {k: v for k, v in kwargs.items() if k != "past_key_values"}
            return share * block.forward(x, *args, **kwargs) + (1 - share) * forward(x, *args, **kwargs)

        frozen.forward = both
    return plain, choice


NORMS = Freeze(names=(r".*input_layernorm.*",))
INSIDE = {
    "lora": (LoRA(r=2),),
    "full": (),
    "prefix": (Prefix(3),),
    "in place": (NORMS,),
    "both": (Prefix(2), LoRA(r=2)),
}


@pytest.mark.parametrize("of", INSIDE.values(), ids=list(INSIDE))
def test_the_blocks_forward_and_policy_gradient_are_the_papers(of):
    model = stirred("llama", SpotTune(of=of, hidden=5))
    given = inputs(model, rows=3)
    soft = decide(model, DECISIONS)
    out = model(**given)
    out.loss.backward()
    plain, choice = reference(model, DECISIONS)
    expected = plain(**given)
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(soft.grad, choice.grad, rtol=0, atol=1e-10)
    assert soft.grad.abs().min() > 1e-6


def test_a_trained_deltas_gradient_comes_from_the_sequences_routed_to_it():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5))
    given = inputs(model, rows=3)
    decide(model, DECISIONS)
    model(**given).loss.backward()
    ours = {k: p.grad.clone() for k, p in parameters(model, "default").items() if "lora" in k}
    plain, _ = reference(model, DECISIONS)
    blocks = [plain.model.layers[i].forward.__kwdefaults__ for i in range(2)]
    held = {f"model.layers.{i}.{k}": p for i, d in enumerate(blocks) for k, p in named(d["block"])}
    plain(**given).loss.backward()
    assert len(held) == len(ours)
    for (_, mine), (_, theirs) in zip(sorted(ours.items()), sorted(held.items()), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=0, atol=1e-10)


def named(block):
    return [
        (k.replace("delta_slot.default.0.", ""), p)
        for k, p in block.named_parameters()
        if "lora" in k and p.requires_grad
    ]


def test_gating_each_delta_is_the_same_forward_and_another_policy_gradient():
    found = {}
    for level in ("block", "delta"):
        model = stirred("llama", SpotTune(of=(LoRA(r=2),), level=level, hidden=5))
        soft = decide(model, DECISIONS)
        out = model(**inputs(model, rows=3))
        out.loss.backward()
        found[level] = out.logits.detach(), soft.grad
        assert any(isinstance(d, Block) for d in deltas(model)) == (level == "block")
    torch.testing.assert_close(found["block"][0], found["delta"][0], rtol=0, atol=1e-12)
    assert (found["block"][1] - found["delta"][1]).abs().max() > 1e-3


def test_padding_on_either_side_decides_nothing():
    model = stirred("bert", SpotTune(of=(LoRA(r=2),), hidden=5))
    policy, seen = policy_of(model), []
    policy.decide = lambda x: (seen.append(x), Policy.decide(policy, x))
    given = inputs(model, rows=1)
    logits(model, {k: given[k] for k in ("input_ids", "attention_mask")})
    for side in ((3, 0), (0, 3)):
        ids = torch.nn.functional.pad(given["input_ids"], side, value=9)
        mask = torch.nn.functional.pad(given["attention_mask"], side, value=0)
        places = torch.cat([torch.zeros(side[0]), torch.arange(7), torch.zeros(side[1])]).long()[None]
        logits(model, {"input_ids": ids, "attention_mask": mask, "position_ids": places})
    for x in seen[1:]:
        torch.testing.assert_close(x, seen[0], rtol=0, atol=1e-12)


def test_gumbel_softmax_draws_in_training_and_not_in_evaluation():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5))
    policy, x = policy_of(model), torch.zeros(4000, 32, dtype=torch.float64)
    with torch.no_grad():
        policy.up.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
        policy.down.bias.zero_()
    policy.decide(x)
    assert policy.now.hard[:, 0].all()
    assert not policy.now.hard[:, 1].any()
    expected = torch.softmax(torch.tensor([0.0, 1.0]) / 5, 0)[1].item()
    assert policy.now.soft[0, 0].item() == pytest.approx(expected)
    model.train()
    torch.manual_seed(0)
    policy.decide(x)  # P(tuned) = sigmoid(1), sigmoid(-1), whatever the temperature
    share = policy.now.hard.double().mean(0).tolist()
    assert share == pytest.approx([0.731, 0.269], abs=0.025)


def test_decisions_are_drawn_in_evaluation_too_where_that_is_asked_for():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5, sample=True)).eval()
    policy, x = policy_of(model), torch.zeros(4000, 32, dtype=torch.float64)
    with torch.no_grad():
        policy.up.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
        policy.down.bias.zero_()
    torch.manual_seed(0)
    policy.decide(x)
    assert policy.now.hard.double().mean(0).tolist() == pytest.approx([0.731, 0.269], abs=0.025)


def test_a_policy_starts_in_favour_of_tuning_and_learns_at_its_own_rate():
    policy = policy_of(attach(tiny("llama"), SpotTune(policy_ratio=0.25)))
    assert policy.up.bias.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert policy.rates == dict.fromkeys(("down.weight", "down.bias", "up.weight", "up.bias"), 0.25)
    assert set(policy_of(attach(tiny("llama"), SpotTune())).rates.values()) == {0.1}


def test_a_sequence_is_decided_once_and_kept_while_it_is_generated():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5)).float()
    policy, seen = policy_of(model), []
    policy.decide = lambda x: (seen.append(len(x)), Policy.decide(policy, x))
    given = {k: v for k, v in inputs(model, rows=2).items() if k != "labels"}
    model.generate(**given, max_new_tokens=5, do_sample=False)
    assert seen == [2]
    model.generate(**given, max_new_tokens=5, do_sample=False, num_beams=3)
    assert seen == [2, 6]


def test_a_causal_policy_reads_the_first_tokens_alone():
    """What a causal model must predict may not choose its blocks."""
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5, pool=3))
    policy, seen = policy_of(model), []
    policy.decide = lambda x: (seen.append(x), Policy.decide(policy, x))
    given = inputs(model, rows=2)
    logits(model, given)
    given["input_ids"][:, 3:] = 11
    logits(model, given)
    assert torch.equal(*seen)
    assert policy_of(attach(tiny("llama"), SpotTune())).first == 16
    assert policy_of(attach(tiny("bert"), SpotTune())).first is None


def test_packed_sequences_are_decided_one_by_one():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5, pool=3)).float()
    given = inputs(model, rows=2)["input_ids"]
    decided = policy_of(model).now
    alone = [logits(model, {"input_ids": row}) for row in (given[:1], given[1:, :5])]
    packing(model)
    with packed((7, 5)), torch.no_grad():
        ids = torch.cat([given[0], given[1, :5]])[None]
        out = model(input_ids=ids, position_ids=positions(model, (7, 5)), use_cache=False).logits
    torch.testing.assert_close(out, torch.cat([x[0] for x in alone])[None], rtol=0, atol=2e-5)
    assert decided.hard.shape == (12, 2)


def test_the_copy_starts_as_the_block_and_holds_all_of_it():
    model = tiny("bert")
    plain = logits(model, inputs(model))
    attach(model, SpotTune(of=(), hidden=5))
    assert torch.equal(logits(model, inputs(model)), plain)
    copied = sum(p.numel() for k, p in parameters(model, "default").items() if ".copy." in k)
    assert copied == sum(p.numel() for n, p in tiny("bert").named_parameters() if ".layer." in n)


def test_shares_are_reported():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5))
    method, policy = SpotTune(), policy_of(model)
    with torch.no_grad():
        policy.up.weight.zero_()
        policy.up.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
    logits(model, inputs(model, rows=3))
    said = method.report(model, deltas(model))
    assert said == {"share_tuned": {"model.layers.0": 1.0, "model.layers.1": 0.0}, "sequences": 3}


@pytest.mark.parametrize("objective", ["sft", "classify"])
def test_the_report_counts_the_evaluation_rows_and_nothing_else(tmp_path, objective):
    """Checks, general text, the loss and the predictions of the same rows all pass the policy."""
    (tmp_path / "d").mkdir()
    model = tiny_run.masked_model(tmp_path / "m") if objective == "classify" else tiny_run.chat_model(tmp_path / "m")
    rows = tiny_run.label_rows if objective == "classify" else tiny_run.chat_rows
    config = tiny_run.config(
        model, rows(tmp_path / "d" / "train.jsonl", 8), rows(tmp_path / "d" / "eval.jsonl", 5, seed=1),
        method={"spottune": {"of": [{"lora": {"r": 2}}], "hidden": 4}}, objective=objective,
        data={"ood": {"far": rows(tmp_path / "d" / "far.jsonl", 3, seed=2)}}, train={"steps": 2},
    )  # fmt: skip
    done = run(config, out=tmp_path / "run")
    assert done.summary["methods"]["spottune"]["sequences"] == 5
    assert "sequences 5 (of the evaluation rows)" in (tmp_path / "run" / "report.md").read_text()


def test_a_sequence_sees_a_prefix_only_in_the_blocks_routed_to_it():
    """Padded, packed and under rows(): whoever is routed past every prefix gets the base."""
    model = stirred("llama", SpotTune(of=(Prefix(3),), hidden=5, pool=3))
    given = {k: v for k, v in inputs(model, rows=3).items() if k != "labels"}
    with disabled(model):
        plain = logits(model, given)
    decide(model, [[False, False], [True, False], [False, False]])
    routed = logits(model, given)
    assert ((routed - plain).abs().flatten(1).max(1).values > 1e-3).tolist() == [False, True, False]
    torch.testing.assert_close(routed[::2], plain[::2], rtol=0, atol=1e-10)
    decide(model, [[True, False]])
    with rows(model, [None, "default", None]), torch.no_grad():
        torch.testing.assert_close(model(**given).logits, routed, rtol=0, atol=1e-10)
    activate(model, "default")
    decide(model, [[False, False], [True, False], [False, False]])
    packing(model)
    with packed((7, 7, 7)), torch.no_grad():
        policy_of(model).now.hard = None
        ids = given["input_ids"].reshape(1, -1)
        decided = policy_of(model).now
        fixed = policy_of(model).decide

        def by_token(x):
            fixed(x)
            decided.hard = decided.hard.repeat_interleave(7, 0)

        policy_of(model).decide = by_token
        out = model(input_ids=ids, position_ids=positions(model, (7, 7, 7)), use_cache=False).logits
    torch.testing.assert_close(out.view_as(routed), routed, rtol=0, atol=1e-10)


def test_biases_of_a_block_are_routed_beside_it():
    """The layer keeps its own bias; routed sequences get the trained one."""
    model = stirred("bert", SpotTune(of=(BitFit(targets=("query", "intermediate")),), hidden=5))
    plain = tiny("bert", dtype=torch.float64)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in plain.named_parameters())
    trained = {n: p for n, p in parameters(model, "default").items() if "query" in n or "intermediate" in n}
    assert sum(p.numel() for p in trained.values()) == 2 * (32 + 48)
    given = {k: v for k, v in inputs(model, rows=2).items() if k != "labels"}
    decide(model, [[True, True], [False, False]])
    routed = logits(model, given)
    with torch.no_grad():
        for name, p in trained.items():
            layer = name.partition(".inner")[0]
            plain.get_submodule(layer).bias.copy_(p)
    torch.testing.assert_close(routed[:1], logits(plain, given)[:1], rtol=0, atol=1e-10)
    torch.testing.assert_close(routed[1:], logits(tiny("bert", dtype=torch.float64), given)[1:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5"])
@pytest.mark.parametrize("of", [Adapter(4, init="normal", init_std=0.2, norms=True), BitFit(create=True)], ids=str)
def test_norms_and_biases_outside_the_blocks_are_for_all_sequences(family, of):
    """A sequence that no changed block is chosen for gets them alone; the base keeps its own."""
    model, plain = stirred(family, SpotTune(of=(of,), hidden=5)), tiny(family, dtype=torch.float64)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in plain.named_parameters())
    given = {k: v for k, v in inputs(model, rows=2).items() if k != "labels"}
    wide = len(policy_of(model).blocks)
    decide(model, [[False] * wide, [True] * wide])
    routed = logits(model, given)
    outside = [(s, d) for s, d in slots_of(model) if isinstance(d, Beside)]
    assert bool(outside) == isinstance(of, Adapter) or family in ("opt", "bert")
    with torch.no_grad():
        for site, delta in outside:
            for name, value in delta.named_parameters():
                plain.get_submodule(site).get_parameter(name).copy_(value)
    torch.testing.assert_close(routed[:1], logits(plain, given)[:1], rtol=0, atol=1e-10)
    assert (routed[1:] - logits(plain, given)[1:]).abs().max() > 1e-3
    with rows(model, ["default", None]):
        decide(model, [[False] * wide])
        mixed = logits(model, given)
    torch.testing.assert_close(mixed[:1], routed[:1], rtol=0, atol=1e-10)
    torch.testing.assert_close(mixed[1:], logits(tiny(family, dtype=torch.float64), given)[1:], rtol=0, atol=1e-10)


def test_a_bias_outside_the_blocks_need_not_be_a_norms():
    model = attach(tiny("bert", "classify"), SpotTune(of=(BitFit(),), hidden=5))
    outside = {path: d for path, d in slots_of(model) if isinstance(d, Beside)}
    assert set(outside) == {"bert.embeddings.LayerNorm", "bert.pooler.dense"}
    given = {k: v for k, v in inputs(model, rows=2).items() if k != "labels"}
    before = model(**given).logits
    with torch.no_grad():
        outside["bert.pooler.dense"].bias.add_(1.0)
    assert (model(**given).logits - before).abs().amax(-1).min() > 1e-3


def slots_of(model):
    return [(path, d) for path, slot in slots(model).items() for d in slot.of("default")]


REFUSED = [
    ((METHODS["prompt"].cls(2),), {}, r"outside, only norms and biases.*Rows.*\[spottune, prompt\] in a list"),
    ((Freeze(names=(".*word_embeddings.*",)),), {}, r"outside, only .*InPlace at .*\[spottune, freeze\]"),
    ((Prefix(2),), {"level": "delta"}, "KeysValues.*What works: level .block."),
]


@pytest.mark.parametrize(("of", "more", "said"), REFUSED)
def test_what_cannot_be_routed_is_refused(of, more, said):
    with pytest.raises(Refusal, match=said):
        attach(tiny("bert"), SpotTune(of=of, **more))


def test_a_policy_is_not_trained_through_rows_or_a_filled_cache():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5))
    given = inputs(model, rows=2)
    with rows(model, ["default", None]), pytest.raises(Refusal, match="through rows"):
        model(**given)
    past = model(**given, use_cache=True).past_key_values
    with pytest.raises(Refusal, match="7 cached positions"):
        model(input_ids=given["input_ids"][:, :1], past_key_values=past)


def test_other_sequences_than_the_cached_ones_are_an_error():
    model = stirred("llama", SpotTune(of=(LoRA(r=2),), hidden=5))
    with torch.no_grad():
        past = model(input_ids=inputs(model, rows=2)["input_ids"], use_cache=True).past_key_values
        model(input_ids=inputs(model, rows=3)["input_ids"])
        with pytest.raises(ValueError, match="3 sequences were routed"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=past)


def test_a_nested_method_is_saved_with_its_fields(tmp_path):
    model = stirred("llama", SpotTune(of=(LoRA(r=2), METHODS["ia3"].cls()), hidden=5)).float()
    other = load_into(tiny("llama"), save(model, "default", tmp_path / "a"))
    given = inputs(model)
    assert torch.equal(logits(model, given), logits(other, given))


def load_into(model, folder):
    load(model, folder, "default")
    return model


MISTAKES = [
    ({"level": "layer"}, "SpotTune level 'layer': choose from block, delta"),
    ({"temperature": 0}, "SpotTune temperature must be a finite number > 0, got 0"),
    ({"sample": "no"}, "SpotTune sample must be true or false, got 'no'"),
    ({"hidden": 0}, "SpotTune hidden must be a whole number >= 1, got 0"),
    ({"pool": 0}, "SpotTune pool must be a whole number >= 1, got 0"),
    ({"policy_ratio": float("nan")}, "policy_ratio must be .* got nan"),
]


@pytest.mark.parametrize(("fields", "said"), MISTAKES)
def test_a_wrong_value_is_an_error_that_shows_it(fields, said):
    with pytest.raises(ValueError, match=said):
        SpotTune(**fields)
