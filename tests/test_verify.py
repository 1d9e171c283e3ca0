"""Every check sees the fault it guards against: each fault is planted in a whole, tiny job."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_run as t
from deltatune import LoRA, attach
from deltatune.core import store
from deltatune.core.slot import slots
from deltatune.train import memory, verify
from deltatune.train.guard import GuardStop, VerificationError
from deltatune.train.job import prepare
from deltatune.train.run import run
from models import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    t.chat_model(folder / "model")
    t.chat_rows(folder / "rows.jsonl", 8)
    return folder


@pytest.fixture
def job(made):
    return prepare(t.config(made / "model", str(made / "rows.jsonl"), method={"lora": {"r": 2}}))


def moved(job) -> dict:
    """Train by hand: every tensor moves. Returns the tensors of before."""
    start = {k: v.clone() for k, v in store.state(job.model, job.adapter).items()}
    with torch.no_grad():
        for p in job.trainable().values():
            p.add_(0.05)
    return start


def saved(job, folder: Path) -> Path:
    return store.save(job.model, job.adapter, folder / "adapter", base="tiny")


def resave(folder: Path, change) -> None:
    """Change the saved tensors and give the manifest their new digest: damage that no checksum tells."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    old = store.digest(file)
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = folder / store.MANIFEST
    manifest.write_text(manifest.read_text().replace(old, store.digest(file)))


def relabel(job, change) -> None:
    job.rows[3] = dataclasses.replace(job.rows[3], labels=tuple(change(job.rows[3].labels)))


def test_a_sound_job_passes_every_check(job, tmp_path):
    weights, start = verify.base_weights(job), moved(job)
    folder = saved(job, tmp_path)
    after = [verify.saved_whole(job, folder, start), verify.reloads(job, folder), verify.merges(job)]
    checks = [verify.labels_audited(job), verify.covered(job), *after, verify.base_untouched(job, weights)]
    assert [c.ok for c in checks] == [True] * 6, checks
    verify.demand(checks)
    assert "14 layers, 100% of the blocks' linear layers" in checks[1].detail


# ---- before step 1 ---------------------------------------------------------------------------------------------------
def test_a_turn_without_its_end_is_refused_with_its_line(job):
    end = job.tokenizer.eos_token_id
    relabel(job, lambda labels: [-100 if label == end else label for label in labels])
    check = verify.labels_audited(job)
    assert check.ok is False
    assert "1 rows have a learned turn without its end-of-turn token" in check.detail
    assert check.detail.endswith("rows.jsonl:4")
    with pytest.raises(VerificationError, match=r"labels: 1 rows.*rows.jsonl:4") as caught:
        verify.demand([check])
    assert caught.value.exit_code == 3


def test_every_learned_turn_counts_not_only_one(made, tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": said} for role, said in turns]}
    job = prepare(t.config(made / "model", t.lines(tmp_path / "two.jsonl", [row])))
    assert verify.labels_audited(job).ok is True
    labels = list(job.rows[0].labels)
    labels[labels.index(job.tokenizer.eos_token_id)] = -100  # the first turn's end alone
    job.rows[0] = dataclasses.replace(job.rows[0], labels=tuple(labels))
    assert verify.labels_audited(job).ok is False


def test_rows_cut_on_the_right_lose_their_end_rightly_and_are_counted(made):
    lengths = [len(row.ids) for row in prepare(t.config(made / "model", str(made / "rows.jsonl"))).rows]
    room = max(lengths) - 2
    longer = sum(length > room + 1 for length in lengths)  # what follows the end-of-turn token is one token
    check = verify.labels_audited(
        prepare(t.config(made / "model", str(made / "rows.jsonl"), train={"max_length": room}))
    )
    assert 0 < longer < 8
    assert check.ok is True
    assert f"{longer} rows lost their end to max_length {room}" in check.detail


def test_a_completion_without_its_end_is_refused(made, tmp_path):
    rows = t.lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    job = prepare(t.config(made / "model", rows))
    assert verify.labels_audited(job).ok is True
    relabel(job, lambda labels: [*labels[:-1], -100])
    assert verify.labels_audited(job).ok is False


def test_plain_text_needs_no_end(made, tmp_path):
    rows = t.lines(tmp_path / "text.jsonl", [{"text": "x" * 100}])
    assert verify.labels_audited(prepare(t.config(made / "model", rows, train={"max_length": 30}))).ok is True


def test_a_row_with_every_label_masked_is_refused(job):
    relabel(job, lambda labels: [-100] * len(labels))
    check = verify.labels_audited(job)
    assert (check.ok, check.detail[-12:]) == (False, "rows.jsonl:4")


def test_a_sample_shows_what_is_learned(job):
    shown = verify.sample(job)
    assert shown.count(">>") == 1
    assert shown.index("assistant") < shown.index(">>") < shown.index("<|im_end|><<")


def test_an_adapter_that_changes_nothing_is_refused(job):
    for slot in slots(job.model).values():
        del slot[job.adapter]
    check = verify.covered(job)
    assert check.ok is False
    assert check.detail.startswith("0 layers, 0%")


def test_an_adapter_that_does_not_start_as_the_base_is_refused(job):
    assert verify.starts_as_base(job).ok is True
    key = next(k for k in job.trainable() if "lora_B" in k)
    with torch.no_grad():
        job.trainable()[key].fill_(0.5)
    assert verify.starts_as_base(job).ok is False
    job.fresh = False  # one that was trained before goes on
    assert verify.starts_as_base(job).ok is None


def test_a_prediction_that_does_not_fit_warns(job, monkeypatch):
    assert memory.warning({"weights": 10, "total": 10}) is None
    said = memory.warning({"weights": 2**30, "logits": 2**50, "total": 2**50 + 2**30})
    assert "mostly logits" in said
    assert "lower train.batch_tokens" in said
    monkeypatch.setattr(memory, "free", lambda: 5 * 2**30)
    predicted = {"weights": 8 * 2**30, "logits": 6 * 2**30, "total": 14 * 2**30}
    assert memory.warning(predicted | {"total": 13 * 2**30}, loaded=8 * 2**30) is None  # 5 more, 5 are free
    said = memory.warning(predicted, loaded=8 * 2**30)
    assert "14.0 GiB (mostly weights; weights of 8.0 GiB are loaded already), free 5.0 GiB" in said


def test_weights_that_are_loaded_are_not_free_and_those_of_a_mapped_file_are(tmp_path):
    model = attach(tiny("llama"), LoRA(r=2))  # the adapter is in an estimate's other parts
    whole = sum(p.nbytes for p in tiny("llama").parameters())
    assert memory.there(model) == whole
    weight = model.model.layers[0].mlp.up_proj.weight
    file = tmp_path / "weights"
    file.write_bytes(bytes(weight.nbytes))
    weight.data = torch.from_file(str(file), shared=False, size=weight.numel()).view(weight.shape)
    mapped = weight.nbytes if sys.platform == "linux" else 0
    assert memory.there(model) == whole - mapped


# ---- after training --------------------------------------------------------------------------------------------------
def test_an_emptied_file_is_seen(job, tmp_path):
    start, folder = moved(job), saved(job, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for check in (verify.saved_whole(job, folder, start), verify.reloads(job, folder)):
        assert check.ok is False
        assert "is damaged" in check.detail


def test_a_lost_tensor_is_seen_though_the_digest_fits(job, tmp_path):
    start, folder = moved(job), saved(job, tmp_path)
    resave(folder, lambda tensors: tensors.pop(next(iter(tensors))))
    assert verify.saved_whole(job, folder, start).ok is False
    assert verify.reloads(job, folder).ok is False


def test_one_value_that_differs_on_disk_is_seen(job, tmp_path):
    start, folder = moved(job), saved(job, tmp_path)

    def flip(tensors):
        next(v for k, v in tensors.items() if "q_proj.lora_A" in k)[0, 0] += 1e-2

    resave(folder, flip)
    check = verify.saved_whole(job, folder, start)
    assert (check.ok, check.detail[:33]) == (False, "1 of 28 tensors differ on disk: m")
    again = verify.reloads(job, folder)
    assert again.ok is False
    assert "logit after loading" in again.detail


def test_an_adapter_that_never_moved_is_seen(job, tmp_path):
    folder = saved(job, tmp_path)
    start = dict(store.state(job.model, job.adapter))
    check = verify.saved_whole(job, folder, start)
    assert check.ok is False
    assert "28 of 28 tensors never moved" in check.detail


def test_lora_b_left_at_zero_is_seen_though_lora_a_moved(job, tmp_path):
    start = {k: v.clone() for k, v in store.state(job.model, job.adapter).items()}
    with torch.no_grad():
        for key, p in job.trainable().items():
            p.add_(0.05 * ("lora_A" in key))
    check = verify.saved_whole(job, saved(job, tmp_path), start)
    assert check.ok is False
    assert "14 of 28 tensors were zero at the start and still are" in check.detail


def test_a_number_that_is_not_finite_is_seen(job, tmp_path):
    start, folder = moved(job), saved(job, tmp_path)
    with torch.no_grad():
        next(iter(job.trainable().values()))[0, 0] = float("nan")
    assert "1 of 28 tensors are not finite" in verify.saved_whole(job, folder, start).detail


def test_a_merge_that_says_something_else_is_seen(job, monkeypatch):
    moved(job)
    assert verify.merges(job).ok is True
    whole = verify.merge

    def wrong(model, name):
        merged = whole(model, name)
        merged.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
        return merged

    monkeypatch.setattr(verify, "merge", wrong)
    assert verify.merges(job).ok is False


def test_a_merge_of_one_score_is_compared_by_the_score(made, tmp_path, monkeypatch):
    """KL over a single class is always 0."""
    rows = t.lines(tmp_path / "scores.jsonl", [{"text": "abc"[: i + 1], "label": i / 2 + 0.25} for i in range(3)])
    batch = {"batch_rows": 2, "batch_tokens": None}
    job = prepare(t.config(made / "model", rows, objective="classify", train=batch))
    moved(job)
    assert verify.merges(job).ok is True
    whole = verify.merge
    monkeypatch.setattr(verify, "merge", lambda *given: doubled(whole(*given)))
    assert verify.merges(job).ok is False


def doubled(model):
    model.score.weight.data.mul_(2)
    return model


def test_one_changed_weight_of_the_base_is_seen(job):
    weights = verify.base_weights(job)
    assert verify.base_untouched(job, weights).ok is True
    with torch.no_grad():
        job.model.model.layers[1].mlp.up_proj.weight[7, 5] += 1e-4  # no sampled fingerprint reads this one
    check = verify.base_untouched(job, weights)
    assert check.ok is False
    assert "1 of 21 base tensors changed: model.layers.1.mlp.up_proj.weight" in check.detail


# ---- in a whole run --------------------------------------------------------------------------------------------------
def test_rows_that_make_no_number_stop_the_run(made, tmp_path):
    """One token's embedding is not a number: the guard stops before the step, with its own exit code."""
    from transformers import AutoModelForCausalLM

    folder = t.chat_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    token = t.tt.byte_level(t.tt.CHATML)("~")["input_ids"][0]
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(folder)
    rows = [{"prompt": f"{i}", "completion": "b"} for i in range(6)] + [{"prompt": "long ~ one", "completion": "b"}]
    held = t.lines(tmp_path / "held.jsonl", rows[:2])
    with pytest.raises(GuardStop, match=r"not finite|is nan") as caught:
        run(t.config(folder, t.lines(tmp_path / "rows.jsonl", rows), held), out=tmp_path / "run")
    assert caught.value.exit_code == 4


def test_a_fault_before_step_1_ends_the_run_and_is_written_down(made, tmp_path, monkeypatch):
    from deltatune.train import run as room

    fault = verify.Check("labels", False, "seeded")
    monkeypatch.setattr(room.verify, "labels_audited", lambda job: fault)
    with pytest.raises(VerificationError, match="labels: seeded"):
        run(t.config(made / "model", str(made / "rows.jsonl")), out=tmp_path / "run")
    assert '"unverified"' in (tmp_path / "run" / "verified.json").read_text()
    assert not (tmp_path / "run" / "adapter").exists()


MEASURED = [  # metric, higher is better, gain, loss before and after -> said
    ("accuracy", True, [0.1, 0.05, 0.2], 0.7, 0.6, True),
    ("accuracy", True, [0.1, -0.05, 0.2], 0.7, 0.9, True),  # surer of fewer mistakes
    ("accuracy", True, [0.0, -0.1, 0.1], 0.69, 945.7, None),
    ("accuracy", True, [-0.3, -0.4, -0.2], 0.7, 0.6, None),
    ("wer", False, [-0.3, -0.4, -0.2], 0.7, 0.6, True),
    ("loss", False, None, 0.7, float("nan"), None),
    ("loss", False, None, 0.7, 0.6, True),
]


@pytest.mark.parametrize(("metric", "higher", "gain", "was", "now", "said"), MEASURED)
def test_a_run_that_made_it_worse_is_said(metric, higher, gain, was, now, said):
    found = {"metric": metric, "higher_is_better": higher, "gain": {metric: gain} if gain else {}}
    check = verify.not_worse(found | {"before": {"loss": was}, "after": {"loss": now}})
    assert (check.ok, check.warns) == (said, said is None)
    assert said or "do not use it as it is" in str(check)
