"""Saved adapters: strict on the base and on every tensor, whole or absent on disk, readable by peft and from peft."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conformance import SUMS, batch, close, logits, snapshot, stir, values
from deltatune import IA3, Adapter, BitFit, Full, LoRA, NewTokens, Prefix, attach, detach, load, merge, save
from deltatune.core import peft_format, peft_parts, store
from deltatune.core.attach import attached, parameters
from deltatune.core.store import MANIFEST, OWN, add_tokens, load_state, state, virtual_ids
from deltatune.methods.freeze import Head
from models import tiny

CONFIG, TENSORS = peft_format.CONFIG, peft_format.TENSORS


def stirred(model, method, name="default", seed=0):
    attach(model, method, name)
    stir(model, name, seed)
    return model


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(stirred(tiny("llama"), LoRA(4)), "default", tmp_path / "math")


def refused(folder: Path, said: str, model=None) -> None:
    """load() fails with `said` and leaves the model as it was."""
    model = model if model is not None else tiny("llama")
    before, kept = snapshot(model), values(model)
    with pytest.raises(ValueError, match=said):
        load(model, folder)
    assert snapshot(model) == before
    assert all(torch.equal(t, values(model)[k]) for k, t in kept.items())


def edit(path: Path, change) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a saved adapter, with a digest that fits."""
    file = folder / TENSORS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    edit(folder / MANIFEST, lambda m: m.update(sha256=store.digest(file)))


# ---- what is on disk -------------------------------------------------------------------------------------------------
def test_the_folder_holds_what_was_trained_and_no_more(saved):
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, TENSORS, MANIFEST]
    manifest = json.loads((saved / MANIFEST).read_text())
    fields = {"r": 4, "alpha": 16.0, "dropout": 0.0, "targets": ["all"], "patterns": {}}
    assert manifest["methods"] == [{"lora": {**fields, "scaling": "standard", "init": "kaiming", "lr_ratio": 1.0}}]
    assert manifest["base"]["class"] == "LlamaForCausalLM"
    assert len(manifest["tensors"]) == 28
    assert sum(t.numel() for t in load_file(saved / TENSORS).values()) == sum(
        p.numel() for p in parameters(attach(tiny("llama"), LoRA(4)), "default").values()
    )


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", Adapter(4)),
        ("bert", BitFit()),
        ("bert", Prefix(2)),
        ("llama", [LoRA(), IA3()]),
        ("mistral", Prefix(2)),
    ],
    ids=str,
)
def test_without_a_peft_form_no_peft_config_is_written(tmp_path, family, method):
    folder = save(stirred(tiny(family), method), "default", tmp_path / "a")
    assert sorted(p.name for p in folder.iterdir()) == [OWN, MANIFEST]


def test_the_name_is_the_folders(saved):
    model = tiny("llama")
    assert load(model, saved) == "math"
    assert load(model, saved, "b") == "b"
    assert attached(model) == ("math", "b")
    assert load(tiny("llama"), shutil.copytree(saved, saved.with_name("a b.c"))) == "a_b_c"


def test_no_machine_path_is_written(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    local = type(model).from_pretrained(tmp_path / "base")
    folder = save(attach(local, LoRA()), "default", tmp_path / "a")
    assert all(str(tmp_path) not in (folder / n).read_text() for n in (MANIFEST, CONFIG))
    assert json.loads((folder / MANIFEST).read_text())["base"]["reference"] == "base"


def test_only_adapters_are_overwritten(tmp_path, saved):
    model = stirred(tiny("llama"), LoRA(4), seed=9)
    save(model, "default", saved)
    other = tiny("llama")
    load(other, saved, "default")
    assert all(torch.equal(t, state(other)[k]) for k, t in state(model).items())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for place in ("thesis", "file"):
        with pytest.raises(ValueError, match="nothing was overwritten"):
            save(model, "default", tmp_path / place)
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save(model, "default", tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "math", "thesis"]


def link(folder: Path) -> None:
    (folder / OWN).symlink_to(folder.parent / "elsewhere")


STRANGERS = {
    "model.safetensors, notes.txt, optimizer.pt": lambda folder: [
        (folder / name).write_text("kept") for name in ("notes.txt", "optimizer.pt", "model.safetensors")
    ],
    "README.md": lambda folder: (folder / "README.md").write_text("kept"),
    "more": lambda folder: (folder / "more").mkdir(),
    OWN: link,  # one of our names, and yet none of our files
    "f0, f1, f2, f3, f4 and 2 more": lambda folder: [(folder / f"f{i}").write_text("kept") for i in range(7)],
}


@pytest.mark.parametrize("said", STRANGERS)
def test_what_lies_beside_an_adapter_is_never_deleted(tmp_path, saved, said):
    STRANGERS[said](saved)
    before = {p.name: p.read_bytes() if p.is_file() else None for p in saved.iterdir()}
    with pytest.raises(ValueError, match=f"no part of an adapter: {said}. Choose another place"):
        save(stirred(tiny("llama"), LoRA(4), seed=9), "default", saved)
    assert {p.name: p.read_bytes() if p.is_file() else None for p in saved.iterdir()} == before
    assert os.listdir(tmp_path) == ["math"]


@pytest.mark.parametrize("step", ["save_file", "sync", "digest"])
def test_a_failing_save_leaves_the_old_adapter_and_no_rubbish(saved, monkeypatch, step):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, step, fail)
    with pytest.raises(OSError, match="No space"):
        save(stirred(tiny("llama"), LoRA(4), seed=9), "default", saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert os.listdir(saved.parent) == ["math"]


# ---- the base --------------------------------------------------------------------------------------------------------
def test_another_base_is_refused(saved):
    refused(saved, "trained on another base: LlamaForCausalLM with fingerprint", tiny("llama", seed=1))
    refused(saved, "trained on another base", tiny("gpt2"))
    model = tiny("llama", seed=1)
    load(model, saved, verify=False)
    assert attached(model) == ("math",)


def test_another_revision_is_refused(saved):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] += 0.5
    refused(saved, "same revision", model)


def test_another_vocabulary_is_refused(saved):
    model = tiny("llama")
    model.resize_token_embeddings(100, mean_resizing=False)
    refused(saved, "trained on another base", model)


def test_a_second_adapter_is_checked_against_the_base_not_the_first(saved):
    """Full weights are active when the second adapter is loaded: the fingerprint is the base's."""
    model = stirred(tiny("llama"), Full(), "full")
    load(model, saved)
    assert attached(model) == ("full", "math")


# ---- the tensors -----------------------------------------------------------------------------------------------------
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CHANGES = {
    "1 missing, such as .*q_proj.lora_A": lambda t: t.pop(KEY),
    "1 unexpected, such as extra": lambda t: t.update(extra=torch.zeros(1)),
    r"1 of another shape, such as .*q_proj.lora_A.weight \(4, 31\) != \(4, 32\)": lambda t: t.update(
        {KEY: t[KEY][:, 1:].contiguous()}
    ),
}


@pytest.mark.parametrize("said", CHANGES)
def test_tensors_are_strict(saved, said):
    rewrite(saved, CHANGES[said])
    refused(saved, said)


@pytest.mark.parametrize("said", CHANGES)
def test_a_peft_folder_is_strict_too(saved, said, capsys):
    rewrite(saved, CHANGES[said])
    (saved / MANIFEST).unlink()
    if "shape" not in said and "lora_A" in said:
        said = "missing|unexpected"  # without its A, peft's folder does not say that the layer is adapted
    refused(saved, said)
    assert "base not verified" in capsys.readouterr().err


def test_damage_is_found(saved):
    file = saved / TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(saved, "is damaged: sha256")
    file.unlink()
    refused(saved, "pickled files")
    (saved / MANIFEST).write_text("{")
    refused(saved, "deltatune.json is damaged")


NO_MANIFEST = {
    "[]": r"deltatune.json is damaged: it holds \[\] where an object belongs. Copy the folder again",
    '{"format": 1}': "deltatune.json is damaged: 'methods' is missing or is no list",
}


@pytest.mark.parametrize("text", NO_MANIFEST)
def test_a_manifest_of_another_shape_is_refused(saved, text):
    (saved / MANIFEST).write_text(text)
    refused(saved, NO_MANIFEST[text])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../secret.safetensors"}, "file '../secret.safetensors' is none that an adapter has"),
        ({"file": "/etc/passwd"}, "file '/etc/passwd' is none"),
        ({"file": 3}, "'file' is missing or is no str"),
        ({"base": []}, "'base' is missing or is no dict"),
        ({"base": {}}, "'base.fingerprint' is missing or is no str"),
        (
            {"base": {"fingerprint": "", "class": "", "grown_to": "99"}},
            "grown_to must be a whole number >= 1, got '99'",
        ),
        ({"methods": [{"lora": 3}]}, "in 'methods' is no {name: fields}"),
        ({"methods": [{"lora": {"r": "x"}}]}, "LoRA r must be a whole number"),
        ({"sha256": None}, "'sha256' is missing"),
    ],
)
def test_a_manifest_with_a_wrong_part_is_refused(saved, change, said):
    edit(saved / MANIFEST, lambda m: m.update(change))
    refused(saved, said)


@pytest.mark.parametrize("length", [0, 7, 1000])
def test_a_cut_off_peft_file_is_refused(saved, length):
    (saved / MANIFEST).unlink()
    file = saved / TENSORS
    file.write_bytes(file.read_bytes()[:length])
    refused(saved, f"math/{TENSORS} is damaged or cut off: .* Copy the folder again")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_peft_config_is_refused(saved, text):
    (saved / MANIFEST).unlink()
    (saved / CONFIG).write_bytes(text.encode("latin-1"))
    refused(saved, f"math/{CONFIG} is damaged: .* Copy the folder again")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 8}, "math: adapter_config.json says r=8, but the tensors of .*_proj have rank 4"),
        ({"r": 513}, "r=513 is above 512"),
        ({"r": None}, "r must be a whole number >= 1, got None"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number > 0, got nan"),
        ({"lora_alpha": float("inf")}, "got inf"),
        ({"lora_alpha": 1e30}, r"lora_alpha=1e\+30 is above 100000"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "got nan"),
        ({"alpha_pattern": ["q_proj"]}, "must be an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "got '4'"),
        ({"lora_dropout": "much"}, "LoRA dropout must be a finite number, got 'much'"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens must be a whole number >= 1, got None"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**12}, "but prompt_embeddings .* is not there"),
    ],
)
def test_a_peft_config_that_lies_is_refused(saved, change, said):
    (saved / MANIFEST).unlink()
    edit(saved / CONFIG, lambda c: c.update(change))
    refused(saved, said)


def test_what_is_no_adapter(tmp_path, saved):
    refused(tmp_path / "nowhere", "no adapter folder")
    refused(tmp_path, "is no adapter folder: it has neither")
    edit(saved / MANIFEST, lambda m: m.update(format=2))
    refused(saved, "format 2, this version reads 1")


def test_load_state_is_strict():
    model = attach(tiny("llama"), LoRA(2, targets=("q",)))
    tensors = {k: t + 1 for k, t in state(model).items()}
    load_state(model, "default", tensors)
    assert all(torch.equal(t, tensors[k]) for k, t in state(model).items())
    with pytest.raises(ValueError, match="1 missing"):
        load_state(model, "default", dict(list(tensors.items())[1:]))


def test_a_failed_load_keeps_the_adapter_that_was_active(saved):
    model = stirred(tiny("llama"), IA3(), "a")
    live = logits(model, batch(model, None))
    rewrite(saved, lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="unexpected"):
        load(model, saved)
    assert model.deltatune_state.active == ("a",)
    close(logits(model, batch(model, None)), live, 0)


@pytest.mark.parametrize("method", [Full(), BitFit()], ids=str)
def test_bf16_weights_trained_in_place_reload_to_the_bit(tmp_path, method):
    model = stirred(tiny("bert", dtype=torch.bfloat16), method)
    folder = save(model, "default", tmp_path / "a")
    assert {t.dtype for t in load_file(folder / OWN).values()} == {torch.bfloat16}
    other = tiny("bert", dtype=torch.bfloat16)
    load(other, folder, "default")
    assert all(torch.equal(t, state(other)[k]) for k, t in state(model).items())
    close(logits(other, batch(other, None)), logits(model, batch(model, None)), 0)


def test_saving_does_not_depend_on_what_is_active(tmp_path):
    model = stirred(stirred(tiny("bert"), BitFit(), "a"), LoRA(), "b")  # b is active, a's biases are not in the layers
    folder = save(model, "a", tmp_path / "a")
    other = tiny("bert")
    load(other, folder)
    detach(model, "b")
    assert all(torch.equal(t, state(other, "a")[k]) for k, t in state(model, "a").items())


# ---- peft ------------------------------------------------------------------------------------------------------------
def their_lora(model, place, **how):
    """A real peft adapter with values, saved; its logits."""
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, **how)).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    theirs.save_pretrained(str(place))
    with torch.no_grad():
        return theirs(**{k: v for k, v in batch(model, None).items() if k != "labels"}).logits


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is retiring
@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 9}},
        {"target_modules": r".*\.1\..*_proj"},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    ],
    ids=["patterns", "rslora", "rslora with ranks", "regex", "layers"],
)
def test_lora_from_peft(tmp_path, how, capsys):
    model = tiny("llama")
    expected = their_lora(model, tmp_path / "theirs", **how)
    load(model, tmp_path / "theirs")
    assert capsys.readouterr().err == f"theirs: base not verified (a peft folder without {MANIFEST})\n"
    assert (logits(tiny("llama"), batch(model, None)) - expected).abs().max() > 1e-2
    close(logits(model, batch(model, None)), expected, SUMS)
    folder = save(model, "theirs", tmp_path / "ours")  # and on to peft again
    again = peft.PeftModel.from_pretrained(tiny("llama"), str(folder)).eval()
    with torch.no_grad():
        close(again(**batch(model, None)).logits, expected, SUMS)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "modernbert"])
def test_task_heads_go_through_peft(tmp_path, family, capsys):
    model = tiny(family, "classify")
    heads = [n for n in ("pre_classifier", "classifier", "score") if hasattr(model, n)]
    attention = {"distilbert": ["q_lin"], "llama": ["q_proj"], "modernbert": ["Wo"]}.get(family, ["query"])
    heads += ["head"] if family == "modernbert" else []
    expected = their_lora(
        model, tmp_path / "theirs", task_type="SEQ_CLS", target_modules=attention, modules_to_save=heads
    )
    load(model, tmp_path / "theirs")
    close(logits(model, batch(model, None)), expected, SUMS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "missing, such as .*lora_magnitude_vector"),
        ({"use_bdlora": {"target_modules_bd_a": []}}, "use_bdlora=.* is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a base that peft has changed"),
        ({"alpha_pattern": {"(a+)+": 2}}, r"the pattern '\(a\+\)\+' could take for ever to match"),
        ({"alpha_pattern": {"[": 2}}, "no regular expression"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not read; choose from LORA, ADALORA, IA3, PREFIX_TUNING, PRO"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_what_cannot_be_read_from_peft_is_refused(saved, change, said, capsys):
    (saved / MANIFEST).unlink()
    edit(saved / CONFIG, lambda c: c.update(change))
    refused(saved, said)


def test_lora_config_says_what_serving_engines_expect(tmp_path):
    config = json.loads(
        (save(attach(tiny("llama"), LoRA(4, targets=("q", "v"))), "default", tmp_path / "a") / CONFIG).read_text()
    )
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16.0, ["q_proj", "v_proj"])
    assert config["task_type"] == "CAUSAL_LM"


# ---- new tokens ------------------------------------------------------------------------------------------------------
class Words:
    """A tokenizer of 97 words that can grow: the three calls add_tokens makes."""

    def __init__(self):
        self.words = {f"w{i}": i for i in range(97)}

    def __len__(self):
        return len(self.words)

    def add_tokens(self, tokens):
        for token in tokens:
            self.words.setdefault(token, len(self.words))

    def convert_tokens_to_ids(self, tokens):
        return [self.words[t] for t in tokens]


def tied(model) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma", "gpt2", "opt", "bert", "modernbert", "t5", "bart"])
def test_new_tokens_survive_save_load_and_merge(tmp_path, family):
    model = tiny(family)
    was_tied = tied(model)
    ids = add_tokens(model, Words(), ["<a>", "<b>"])
    assert ids == (97, 98)
    assert tied(model) is was_tied
    given = batch(model, None)
    for key in ("input_ids", "decoder_input_ids"):
        if key in given:
            given[key][:, 2:4] = torch.tensor(ids)
    grown = logits(model, given)
    stirred(model, [NewTokens(ids), LoRA(2)])
    live = logits(model, given)
    assert (live[..., 97:] - grown[..., 97:]).abs().max() > 1e-2

    folder = save(model, "default", tmp_path / "a")
    rows = {k: t for k, t in load_file(folder / OWN).items() if k.endswith(".rows")}
    assert [tuple(t.shape) for t in rows.values()] == [(2, 32)] * (1 if was_tied else 2)

    other = tiny(family)  # the base as it was published, not grown
    load(other, folder, "default")
    close(logits(other, given), live, 0)
    assert tied(other) is was_tied

    plain = merge(other)
    assert tied(plain) is was_tied
    assert plain.config.vocab_size == 99
    close(logits(plain, given), live, SUMS)


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma", "gpt2", "opt", "bert", "modernbert", "t5", "bart"])
def test_detach_takes_the_tokens_back_that_load_grew(tmp_path, family):
    grown = tiny(family)
    ids = add_tokens(grown, Words(), ["<a>", "<b>"])
    folder = save(stirred(grown, [NewTokens(ids), LoRA(2)]), "default", tmp_path / "a")
    model = tiny(family)
    model.requires_grad_(False)
    plain = logits(model, batch(model, None))  # first: some families add hooks of their own on their first call
    was_tied, before, kept = tied(model), snapshot(model), values(model)
    load(model, folder)
    attach(model, LoRA(), "b")
    detach(model, "a")
    assert model.get_input_embeddings().num_embeddings == 99  # b was attached to the grown vocabulary
    detach(model, "b")
    assert snapshot(model) == before
    assert all(torch.equal(t, values(model)[k]) for k, t in kept.items())
    assert (model.config.vocab_size, tied(model)) == (97, was_tied)
    close(logits(model, batch(model, None)), plain, 0)
    load(model, folder)  # and the whole way again
    assert attached(model) == ("a",)


def test_tokens_that_the_user_added_stay(tmp_path):
    model = tiny("gpt2")
    ids = add_tokens(model, Words(), ["<a>", "<b>"])
    folder = save(attach(model, NewTokens(ids)), "default", tmp_path / "a")
    detach(model, "default")
    assert model.config.vocab_size == 99
    other = tiny("gpt2")
    add_tokens(other, Words(), ["<a>"])
    load(other, folder)
    assert other.config.vocab_size == 99
    detach(other, "a")
    assert (other.config.vocab_size, other.deltatune_vocab) == (98, 97)


@pytest.mark.parametrize("method", [LoRA(2), Prefix(2), Adapter(4)], ids=str)
def test_loading_leaves_the_random_numbers_alone(tmp_path, method):
    model = tiny("llama")
    ids = add_tokens(model, Words(), ["<a>"])
    folder = save(attach(model, [method, NewTokens(ids)]), "default", tmp_path / "a")
    other = tiny("llama")
    before = torch.get_rng_state()
    load(other, folder)
    detach(other, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failed_load_takes_grown_tokens_back(tmp_path):
    model = tiny("gpt2")
    ids = add_tokens(model, Words(), ["<a>"])
    folder = save(attach(model, NewTokens(ids)), "default", tmp_path / "a")
    tensors = load_file(folder / OWN) | {"extra": torch.zeros(1)}
    save_file(tensors, folder / OWN)
    edit(folder / MANIFEST, lambda m: m.update(sha256=store.digest(folder / OWN)))
    refused(folder, "1 unexpected", tiny("gpt2"))


def test_tokens_are_added_before_adapters(tmp_path):
    model = tiny("gpt2")
    ids = add_tokens(model, Words(), ["<a>"])
    folder = save(attach(model, NewTokens(ids)), "default", tmp_path / "a")
    with pytest.raises(ValueError, match="before attaching adapters"):
        add_tokens(model, Words(), ["<b>"])
    refused(folder, r"adds tokens \(up to 98\): load it before b", attach(tiny("gpt2"), LoRA(), "b"))


def test_virtual_ids_stand_behind_new_tokens():
    from deltatune import Prompt

    model = tiny("llama")
    add_tokens(model, Words(), ["<a>"])
    assert virtual_ids(attach(model, Prompt(2))) == (98, 99)


def test_heads_are_stored_with_their_adapter(tmp_path):
    model = stirred(tiny("roberta", "classify"), [LoRA(2), Head()])
    folder = save(model, "default", tmp_path / "a")
    assert json.loads((folder / CONFIG).read_text())["modules_to_save"] == ["classifier"]
    other = tiny("roberta", "classify")
    nn.init.zeros_(other.classifier.out_proj.weight)  # a head drawn anew: it is not part of the base
    load(other, folder, "default")
    close(logits(other, batch(other, None)), logits(model, batch(model, None)), 0)


def test_reading_a_peft_folder_does_not_walk_the_model_once_a_layer(tmp_path, monkeypatch):
    """Guards against a time that grows with the square of the layers: most of a start."""
    walks = []
    for layers in (2, 4):
        save(attach(tiny("llama", num_hidden_layers=layers), LoRA(r=2), name="a"), "a", tmp_path / str(layers))
        model, count = tiny("llama", num_hidden_layers=layers), []
        with monkeypatch.context() as patch:
            for place in (peft_format, peft_parts):
                patch.setattr(place, "slots", lambda m, n=count, real=peft_parts.slots: n.append(1) or real(m))
            load(model, tmp_path / str(layers), "a")
        walks.append(len(count))
    assert walks[0] == walks[1] > 0
