"""Several adapters as one: each combination's equation in float64, and peft's own combinations from equal factors."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.utils import merge_utils

from deltatune import IA3, AdaLoRA, Adapter, BitFit, Full, LoRA, Prefix, activate, attach, detach, load, merge, save
from deltatune.core import combine as module
from deltatune.core.attach import attached, each, parameters
from deltatune.core.change import Low, changes, decompose, full
from deltatune.core.combine import combine
from deltatune.core.convert import export_lora, to_lora
from deltatune.core.delta import Refusal
from deltatune.core.store import MANIFEST
from deltatune.methods.low_rank import LowRank
from models import inputs, tiny

A = LoRA(r=4, alpha=8.0, targets=("q", "v"))
B = LoRA(r=2, alpha=3.0, targets=("q", "down"), patterns={"q": {"r": 3, "alpha": 1.5}})
B4 = LoRA(r=4, alpha=2.0, targets=("q", "v"))
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def shaken(model, method, name: str, seed: int):
    """`method` attached away from the base, drawn by `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attach(model, method, name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters(model, name).values():
            p.add_(0.2 * torch.randn(p.shape, generator=g).to(p))
    return model


def pair(second=B, family: str = "llama"):
    return shaken(shaken(tiny(family), A, "a", 1), second, "b", 2)


def change(model, name: str, path: str) -> torch.Tensor:
    return full(changes(model, name)[path, "weight"])


def by_hand(model, name: str, path: str) -> torch.Tensor:
    """(alpha / r) B A in float64, 0 where the adapter does not touch the layer."""
    found = [d for _, d in each(model, name) if d.site.write == path]
    zero = torch.zeros(model.get_submodule(path).weight.shape, dtype=torch.float64)
    return sum((d.alpha / d.r * d.lora_B.double() @ d.lora_A.double() for d in found), zero)


def ranks_of_the_sum(model, weights) -> dict[str, int]:
    """Layer -> rank of the adapter 'sum', each change of which must be that of 'a' and 'b' added up by hand."""
    ranks = {}
    for _, delta in each(model, "sum"):
        path = delta.site.write
        ranks[path.split(".")[-1]] = delta.r
        wanted = sum(w * by_hand(model, n, path) for n, w in zip("ab", weights, strict=True))
        assert torch.allclose(change(model, "sum", path), wanted, rtol=0, atol=2e-6)
    return ranks


@pytest.mark.parametrize("how", ["linear", "cat"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, -0.5), (-1.0, -1.0)])
def test_a_weighted_sum_of_loras_is_exact_whatever_their_ranks_and_targets(how, weights):
    model = pair()
    fit = combine(model, dict(zip("ab", weights, strict=True)), "sum", how)
    assert fit.error == 0
    assert ranks_of_the_sum(model, weights) == {"q_proj": 7, "v_proj": 4, "down_proj": 2}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -0.5)])
def test_ranks_never_add_up_to_more_than_a_layer_holds(weights):
    """v is 32 -> 16 here: 12 + 12 becomes 16, and nothing is lost."""
    wide = LoRA(r=12, targets=("v", "up", "down"))
    model = shaken(shaken(tiny("llama"), wide, "a", 1), wide, "b", 2)
    fit = combine(model, dict(zip("ab", weights, strict=True)), "sum")
    assert fit.error == 0
    assert ranks_of_the_sum(model, weights) == {"v_proj": 16, "up_proj": 24, "gate_proj": 24, "down_proj": 24}


def test_the_result_runs_and_one_adapter_of_weight_one_is_itself():
    model = pair()
    x = inputs(model)
    activate(model, "a", "b")  # side by side: the sum, for layers that do not feed each other's change
    combine(model, {"a": 1.0, "b": 1.0}, "sum")
    summed = model(**x).logits
    activate(model, "a", "b")
    assert torch.allclose(model(**x).logits, summed, atol=2e-5)
    combine(model, {"a": 1.0}, "same")
    for path in (Q, V):
        ours, same = changes(model, "a")[path, "weight"], changes(model, "same")[path, "weight"]
        assert torch.equal(ours.a, same.a)
        assert torch.equal(ours.b, same.b)


def test_negation_takes_a_skill_away_exactly():
    model = pair()
    combine(model, {"a": 1.0}, "plus")
    combine(model, {"plus": 1.0, "a": -1.0}, "none")
    for path in (Q, V):
        assert change(model, "none", path).abs().max() < 1e-6
    combine(model, {"a": -1.0}, "minus")
    assert torch.allclose(change(model, "minus", Q), -by_hand(model, "a", Q), atol=1e-7)


def test_svd_is_the_nearest_of_its_rank_and_says_what_is_lost():
    model = pair()
    fit = combine(model, {"a": 1.0, "b": 1.0}, "cut", "svd", r=2)
    wanted = by_hand(model, "a", Q) + by_hand(model, "b", Q)
    s = torch.linalg.svdvals(wanted)
    rest = (change(model, "cut", Q) - wanted).norm()
    assert fit.ranks[Q] == 2
    assert float(rest) == pytest.approx(float(s[2:].norm()), rel=1e-4)  # Eckart-Young: nothing of rank 2 is nearer
    assert fit.errors[Q] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-5)
    sums = {p: by_hand(model, "a", p) + by_hand(model, "b", p) for p in fit.errors}
    rests = [float((change(model, "cut", p) - tau).norm()) for p, tau in sums.items()]
    sizes = [float(tau.norm()) for tau in sums.values()]
    assert sum(r > 0.1 * s for r, s in zip(rests, sizes, strict=True)) > 2
    assert fit.error == pytest.approx((sum(e * e for e in rests) / sum(s * s for s in sizes)) ** 0.5, rel=1e-5)


def test_a_product_is_decomposed_as_its_matrix_is():
    g = torch.Generator().manual_seed(0)
    low = Low(*(torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 9), (7, 3))), 0.7)
    u, s, vt = decompose(low)
    assert torch.allclose(u * s @ vt, low.full())
    assert torch.allclose(s, torch.linalg.svdvals(low.full())[:3])


def ties_by_hand(taus, weights, density: float) -> torch.Tensor:
    """Yadav et al. 2023, algorithm 1, value by value."""
    cut = []
    for tau in taus:
        flat = tau.flatten().tolist()
        largest = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: int(density * len(flat))]
        cut.append([flat[i] if i in set(largest) else 0.0 for i in range(len(flat))])
    out = []
    for column in zip(*cut, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agree = [w * v for w, v in zip(weights, column, strict=True) if v * sign > 0]
        out.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(out, dtype=torch.float64).view_as(taus[0])


def test_ties_trims_elects_and_averages_those_that_agree():
    model = pair(B4)
    combine(model, {"a": 1.0, "b": 0.5}, "t", "ties", density=0.3)
    wanted = ties_by_hand([by_hand(model, n, Q) for n in "ab"], (1.0, 0.5), 0.3)
    assert torch.allclose(change(model, "t", Q), wanted, atol=1e-6)
    assert 0 < (wanted == 0).double().mean() < 1
    fit = combine(model, {"a": 1.0, "b": 0.5}, "low", "ties", density=0.3, r=4)
    assert isinstance(changes(model, "low")[Q, "weight"], Low)
    assert 0 < fit.errors[Q] < 1


VOTES = [  # values of three adapters -> the mean of those that agree, by sum and by count
    ((5.0, -1.0, -2.0), 5.0, -1.5),
    ((-5.0, 1.0, 2.0), -5.0, 1.5),
    ((3.0, 1.0, -2.0), 2.0, 2.0),
]


@pytest.mark.parametrize(("values", "total", "frequency"), VOTES)
def test_the_sign_is_elected_by_sum_or_by_count(values, total, frequency):
    tensors = [torch.tensor([v], dtype=torch.float64) for v in values]
    assert module.agreed(tensors, (1.0, 1.0, 1.0), "total").item() == total
    assert module.agreed(tensors, (1.0, 1.0, 1.0), "frequency").item() == frequency
    for elect in ("total", "frequency"):  # peft's own election
        mask = merge_utils.calculate_majority_sign_mask(torch.stack(tensors), elect)
        theirs = merge_utils.disjoint_merge(torch.stack(tensors), mask)
        assert module.agreed(tensors, (1.0, 1.0, 1.0), elect).item() == theirs.item()


def test_elect_reaches_the_election():
    model = shaken(pair(B4), B4, "c", 5)
    made = {}
    for elect in ("total", "frequency"):
        combine(model, {"a": 1.0, "b": 1.0, "c": 1.0}, elect, "ties", density=1.0, elect=elect)
        made[elect] = change(model, elect, Q)
        taus = [by_hand(model, n, Q) for n in "abc"]
        assert torch.allclose(made[elect], module.agreed(taus, (1.0, 1.0, 1.0), elect), atol=1e-6)
    assert (made["total"] - made["frequency"]).abs().max() > 0.01


TURNED = [  # two values, weights -> with the vote turned, and as it is (peft)
    ((2.0, 3.0), (1.0, -1.0), -3.0, -0.5),
    ((3.0, -2.0), (1.0, -0.5), 2.0, 3.0),
    ((-1.0, 4.0), (-1.0, -1.0), -4.0, -4.0),
]


@pytest.mark.parametrize(("values", "weights", "turned", "plain"), TURNED)
def test_a_negative_weight_turns_the_vote_on_changes(values, weights, turned, plain):
    tensors = [torch.tensor([v], dtype=torch.float64) for v in values]
    assert module.agreed(tensors, weights, "total").item() == turned
    assert module.agreed(tensors, weights, "total", turned=False).item() == plain
    model = pair(B4)
    combine(model, {"a": 1.0, "b": -0.5}, "t", "ties", density=1.0)
    taus = [by_hand(model, "a", Q), -by_hand(model, "b", Q)]
    assert torch.allclose(change(model, "t", Q), ties_by_hand(taus, (1.0, 0.5), 1.0), atol=1e-6)


@pytest.mark.parametrize("how", ["dare", "dare_ties"])
def test_dare_drops_by_seed_and_rescales(how):
    model = pair(B4)
    taus = [by_hand(model, n, Q) for n in "ab"]
    cut = [t * module.drawn(t.shape, 0.25, f"3 {Q}.weight {n}") / 0.25 for n, t in zip("ab", taus, strict=True)]
    combine(model, {"a": 1.0, "b": 2.0}, "d", how, density=0.25, seed=3)
    wanted = cut[0] + 2 * cut[1] if how == "dare" else ties_by_hand(cut, (1.0, 2.0), 1.0)
    assert torch.allclose(change(model, "d", Q), wanted, atol=1e-6)
    combine(model, {"b": 2.0, "a": 1.0}, "again", how, density=0.25, seed=3)  # neither order nor the global seed
    assert torch.allclose(change(model, "again", Q), change(model, "d", Q), atol=1e-12)
    combine(model, {"a": 1.0, "b": 2.0}, "other", how, density=0.25, seed=4)
    assert not torch.allclose(change(model, "other", Q), change(model, "d", Q), atol=1e-3)


def test_what_dare_keeps_is_the_density_and_the_mean_stays():
    mask = module.drawn((400, 400), 0.1, "x")
    assert float(mask.mean()) == pytest.approx(0.1, abs=0.003)
    kept = module.drop(torch.ones(400, 400, dtype=torch.float64), 0.1, "x")
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)  # 1 / (1 - p), not (1 - p)


# ---- peft as the oracle ----------------------------------------------------------------------------------------------
THEIRS = {"a": "one", "b": "two"}  # peft warns of names that are a part of "lora_"


def oracle(model, second: LoRA):
    """peft with the factors of our adapters a and b."""
    wrapped = None
    for name, method in (("a", A), ("b", second)):
        theirs = THEIRS[name]
        leaves = sorted({d.site.write.split(".")[-1] for _, d in each(model, name)})
        ranks = {d.site.write.split(".")[-1]: (d.r, d.alpha) for _, d in each(model, name)}
        config = peft.LoraConfig(
            r=method.r, lora_alpha=method.alpha, target_modules=leaves,
            rank_pattern={k: r for k, (r, _) in ranks.items()}, alpha_pattern={k: a for k, (_, a) in ranks.items()},
        )  # fmt: skip
        if wrapped is None:
            wrapped = peft.get_peft_model(tiny("llama"), config, adapter_name=theirs)
        else:
            wrapped.add_adapter(theirs, config)
        for _, delta in each(model, name):
            layer = wrapped.base_model.model.get_submodule(delta.site.write)
            layer.lora_A[theirs].weight.data.copy_(delta.lora_A)
            layer.lora_B[theirs].weight.data.copy_(delta.lora_B)
    return wrapped


def gap(model, name: str, wrapped, theirs: str) -> float:
    """The largest difference of the logits."""
    x = inputs(model)
    activate(model, name)
    wrapped.set_adapter(theirs)
    ours, other = model(**x).logits.detach(), wrapped(**x).logits.detach()
    activate(model)
    assert (model(**x).logits.detach() - ours).abs().max() > 1e-2  # both could be the base
    return float((ours - other).abs().max())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is retiring
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.4), (1.0, -0.6)])
@pytest.mark.parametrize(("how", "options"), [("cat", {}), ("svd", {"r": 3})])
def test_peft_agrees_on_changes(how, options, weights):
    model = pair()
    wrapped = oracle(model, B)
    theirs = {"svd_rank": options["r"]} if options else {}
    wrapped.add_weighted_adapter([*THEIRS.values()], list(weights), "mix", combination_type=how, **theirs)
    combine(model, dict(zip("ab", weights, strict=True)), "mix", how, **options)
    assert gap(model, "mix", wrapped, "mix") < 2e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is retiring
@pytest.mark.parametrize(
    ("how", "theirs", "weights"),
    [
        ("linear", "linear", (0.7, 0.4)),
        ("linear", "linear", (1.0, -0.6)),
        ("ties", "ties", (0.7, 0.4)),
        ("dare", "dare_linear", (0.7, 0.4)),
        ("dare", "dare_linear", (0.7, -0.4)),
        ("dare_ties", "dare_ties", (0.7, 0.4)),
        ("ties", "ties", (1.0, -0.6)),
        ("dare_ties", "dare_ties", (-0.5, 0.8)),
    ],
)
def test_peft_agrees_on_factors(monkeypatch, how, theirs, weights):
    model = pair(B4)
    wrapped = oracle(model, B4)
    paths = [d.site.write for _, d in each(model, "a")]
    # peft goes layer by layer, A of every adapter before B: hand it our masks in that order
    keys = iter([f"0 {p}.{side} {name}" for p in ordered(wrapped, paths) for side in "AB" for name in "ab"])

    def ours(tensor, density, rescale):
        return module.drop(tensor.double(), density, next(keys)).float()

    monkeypatch.setattr(merge_utils, "random_pruning", ours)
    extra = {} if theirs == "linear" else {"density": 0.6}
    wrapped.add_weighted_adapter([*THEIRS.values()], list(weights), "mix", combination_type=theirs, **extra)
    combine(model, dict(zip("ab", weights, strict=True)), "mix", how, on="factors", **extra)
    assert gap(model, "mix", wrapped, "mix") < 2e-5


def ordered(wrapped, paths: list[str]) -> list[str]:
    return [n for n, _ in wrapped.base_model.model.named_modules() if n in paths]


def test_mixing_factors_is_not_the_sum_of_changes():
    """Why on="change" is the default: A and B mixed apart have cross terms B_a A_b."""
    model = pair(B4)
    combine(model, {"a": 1.0, "b": 1.0}, "f", "linear", on="factors")
    wanted = by_hand(model, "a", Q) + by_hand(model, "b", Q)
    assert (change(model, "f", Q) - wanted).norm() > 0.3 * wanted.norm()


# ---- as low as they are ----
LOW = {
    "lora 16": LoRA(16, targets=("q",)), "pissa": LoRA(4, init="pissa", targets=("q",)),
    "pissa 20": LoRA(20, init="pissa", targets=("q",)), "olora": LoRA(4, init="olora", targets=("q",)),
    "adalora": AdaLoRA(4, 2, targets=("q",)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is retiring
@pytest.mark.parametrize("method", LOW.values(), ids=LOW)
def test_low_rank_methods_stay_low_rank_however_they_are_combined(tmp_path, capsys, method):
    """Starts out of the base, triplets, and sums above the layer's own rank (32) are LoRAs of at most that rank."""
    model = tiny("llama")
    for seed, name in enumerate("abc"):
        shaken(model, method, name, seed)
    wanted = sum(change(model, n, Q) for n in "abc")
    for how in ("linear", "cat"):
        assert combine(model, dict.fromkeys("abc", 1.0), how, how).error == 0
        assert all(isinstance(d, LowRank) and d.r <= 32 for _, d in each(model, how))
        assert torch.allclose(change(model, how, Q), wanted, atol=2e-6)
    fit = combine(model, dict.fromkeys("abc", 1.0), "svd", "svd", r=3)
    assert fit.ranks[Q] == 3
    if method.targets == ("q",) and getattr(method, "r", 0) != 20:
        combine(model, dict.fromkeys("abc", 1.0), "f", on="factors")
        assert all(isinstance(d, LowRank) for _, d in each(model, "f"))
    assert to_lora(model, "a", "one").error == 0
    assert all(isinstance(d, LowRank) for _, d in each(model, "one"))
    assert torch.allclose(change(model, "one", Q), change(model, "a", Q), atol=2e-6)
    activate(model, "a")
    given = {k: v for k, v in inputs(model).items() if k != "labels"}
    said = model(**given).logits
    save(model, "a", tmp_path / "own")
    export_lora(model, "a", tmp_path / "out")
    for folder in (tmp_path / "own", tmp_path / "out"):
        (folder / MANIFEST).unlink(missing_ok=True)
        other = tiny("llama")
        load(other, folder, "a")
        assert torch.allclose(other(**given).logits, said, atol=2e-5)
        theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(folder)).eval()
        assert torch.allclose(theirs(**given).logits, said, atol=2e-5)
    assert "base not verified" in capsys.readouterr().err


# ---- other methods ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "bert", "t5"])
def test_full_changes_are_combined_in_place_and_behave_as_merged(family):
    """(IA)^3 and LoRA on one model: W + w1 (l W - W) + w2 s B A, biases included, against float64 by hand."""
    model = shaken(shaken(tiny(family), IA3(), "a", 1), LoRA(r=2, targets=("v", "down")), "b", 2)
    base = {k: v.double() for k, v in model.named_parameters() if "delta_slot" not in k}
    plain = [dict(merge(model, n).named_parameters()) for n in "ab"]
    combine(model, {"a": 1.0, "b": -0.5}, "mix")
    got = dict(merge(model, "mix").named_parameters())
    for key, old in base.items():
        wanted = old + (plain[0][key].double() - old) - 0.5 * (plain[1][key].double() - old)
        assert torch.allclose(got[key].double(), wanted, atol=3e-6), key
    x = inputs(model)
    activate(model, "mix")
    assert torch.allclose(model(**x).logits, merge(model, "mix")(**x).logits, atol=2e-5)


@pytest.mark.parametrize("method", [BitFit(), Full()])
def test_selective_methods_have_a_linear_change(method):
    model = shaken(shaken(tiny("opt"), method, "a", 1), method, "b", 2)
    base = {k: v.clone() for k, v in merge(model, "a").state_dict().items()}
    combine(model, {"a": 0.5, "b": 0.5}, "mean")
    key = next(k for k, _ in parameters(model, "a").items() if k.endswith("bias"))
    values = {n: dict(merge(model, n).named_parameters())[key].double() for n in ("a", "b", "mean")}
    assert torch.allclose(values["mean"], (values["a"] + values["b"]) / 2, atol=1e-6)
    for name in ("a", "b", "mean"):
        detach(model, name)
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, tiny("opt").state_dict()[k])] == []
    assert base.keys() == model.state_dict().keys()


@pytest.mark.parametrize("parts", [("q", "v"), ("q",)])
@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3"])
def test_parts_of_fused_projections_become_rows_of_the_whole(family, parts):
    model = shaken(tiny(family), LoRA(r=2, targets=parts), "a", 1)
    combine(model, {"a": 1.0}, "b")
    x = inputs(model)
    activate(model, "a")
    wanted = model(**x).logits
    activate(model, "b")
    assert torch.allclose(model(**x).logits, wanted, atol=2e-5)


@pytest.mark.parametrize("method", [Adapter(4), Prefix(2)])
def test_methods_without_weights_are_refused_with_the_way_out(method):
    model = shaken(pair(), method, "c", 3)
    have = attached(model)
    with pytest.raises(Refusal, match=r"no equivalent weight.*What works: keep it attached"):
        combine(model, {"a": 1.0, "c": 1.0}, "mix")
    assert attached(model) == have


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 1.0, "z": 1.0}, {}, "no adapter 'z'"),
        ({}, {}, "no adapter: name at least one"),
        ({"a": float("nan")}, {}, "weight of adapter 'a' must be a finite number"),
        ({"a": 1.0}, {"how": "tyes"}, "how='tyes'. Did you mean 'ties'\\? Choose from linear, cat"),
        ({"a": 1.0}, {"how": "svd"}, "needs r="),
        ({"a": 1.0}, {"how": "svd", "r": 0}, "r must be a whole number >= 1"),
        ({"a": 1.0}, {"how": "ties", "density": 0.0}, "density must be a finite number > 0"),
        ({"a": 1.0}, {"how": "ties", "density": 1.5}, "0 < density <= 1"),
        ({"a": 1.0}, {"how": "cat", "on": "factors"}, "leave on='factors' out"),
        ({"a": 1.0, "b": 1.0}, {"on": "factors"}, "needs equal ranks.*'a' 4, 'b' 3.*any"),
    ],
)
def test_bad_input_is_an_error_and_nothing_is_attached(weights, options, message):
    model = pair()
    with pytest.raises(ValueError, match=message):
        combine(model, weights, "mix", **options)
    assert attached(model) == ("a", "b")
    with pytest.raises(ValueError, match="attached already"):
        combine(model, {"a": 1.0}, "b")


def test_combining_reads_the_base_whatever_is_active_and_draws_nothing():
    model = pair(Full())
    state = torch.get_rng_state()
    activate(model, "b")
    kept = copy.deepcopy(model)
    combine(model, {"a": 1.0, "b": 1.0}, "mix")
    assert torch.equal(torch.get_rng_state(), state)
    activate(kept)
    combine(kept, {"a": 1.0, "b": 1.0}, "mix")
    for key, tensor in merge(kept, "mix").state_dict().items():
        assert torch.equal(tensor, merge(model, "mix").state_dict()[key]), key
