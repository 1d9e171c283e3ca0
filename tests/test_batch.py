"""Tensors of rows; plans, streams and mixtures that are pure functions of their seed and give every row once."""

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from deltatune.data.batch import Batching, generator, pack, pad, plan
from deltatune.data.encode import Encoded
from deltatune.data.mix import mixture, portions, shares, tempered
from deltatune.data.problems import Problems
from deltatune.data.stream import Order, index, stream

A = Encoded((5, 6, 2), (-100, 6, 2), where="f:1")
B = Encoded((7, 2), (-100, 2), where="f:2")


def test_padding():
    batch = pad([A, B], pad_id=2)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    # pad is the end token here, as in SmolLM2: the mask and the labels must still tell them apart
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert (batch.targets, batch.where, batch.lens) == (3, ("f:1", "f:2"), None)


def test_padding_on_the_left():
    batch = pad([A, B], 0, side="left")
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 2], [0, 7, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.labels.tolist() == [[-100, 6, 2], [-100, -100, 2]]
    with pytest.raises(ValueError, match="neither 'right' nor 'left'"):
        pad([A], 0, side="top")


def test_classification_rows():
    rows = [Encoded((1, 2), None, 1, (0, 1), 1, "f:1"), Encoded((3,), None, 0, (0,), 0, "f:2")]
    batch = pad(rows, 0)
    assert (batch.labels.tolist(), batch.labels.dtype, batch.targets) == ([1, 0], torch.long, 2)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert batch.mask_at.tolist() == [1, 0]
    assert pad(rows, 0, "left").mask_at.tolist() == [1, 1]
    scores = pad([Encoded((1,), None, (1.0, 0.0)), Encoded((1,), None, (1.0, 1.0))], 0)
    assert (scores.labels.dtype, scores.targets) == (torch.float32, 2)
    with pytest.raises(ValueError, match="f:9: the row has neither labels nor a target"):
        pad([Encoded((1,), None, where="f:9")], 0)


def test_encoder_decoder_rows():
    rows = [Encoded((1, 2, 3), (4, 1), decoder=True), Encoded((1,), (5, 6, 7, 1), decoder=True)]
    batch = pad(rows, 0)
    assert batch.labels.tolist() == [[4, 1, -100, -100], [5, 6, 7, 1]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.targets == 6
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(rows)


def test_packing():
    batch = pack([A, B])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 2, 7, 2]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[-100, 6, 2, -100, 2]]
    assert (batch.lens, batch.targets, "attention_mask" in batch.inputs) == ((3, 2), 3, False)


LENGTHS = random.Random(0).choices(range(1, 60), k=700)
PLANS = [
    Batching(rows=8),
    Batching(rows=8, group=True),
    Batching(tokens=128),
    Batching(tokens=128, group=True),
    Batching(tokens=128, packing=True),
]


@pytest.mark.parametrize("batching", PLANS, ids=str)
def test_every_row_once_an_epoch_and_no_batch_too_large(batching):
    for epoch in range(2):
        batches = plan(LENGTHS, batching, seed=3, epoch=epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
        for batch in batches:
            sizes = [LENGTHS[i] for i in batch]
            if batching.rows:
                assert len(batch) <= batching.rows
            elif batching.packing:
                assert sum(sizes) <= 128
            else:
                assert len(sizes) * max(sizes) <= 128


@pytest.mark.parametrize("batching", PLANS, ids=str)
def test_a_plan_depends_on_seed_and_epoch_only(batching):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = plan(LENGTHS, batching, 3, 1)
    random.seed(1)
    assert plan(LENGTHS, batching, 3, 1) == first
    assert plan(LENGTHS, batching, 3, 2) != first
    assert plan(LENGTHS, batching, 4, 1) != first
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_plans_are_the_same_in_every_process_and_for_good():
    code = "from deltatune.data.order import *; print(plan([3, 1, 4, 1, 5, 9, 2, 6], Batching(10, packing=True), 7, 2))"
    for seed in ("1", "2"):
        run = [sys.executable, "-c", code]
        out = subprocess.run(run, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        assert out == "[[7, 3, 0], [2, 6, 1], [5], [4]]\n"


def test_packing_and_grouping_save_tokens():
    def cost(batching):
        rows = [[LENGTHS[i] for i in batch] for batch in plan(LENGTHS, batching)]
        return len(rows) * 128 if batching.packing else sum(len(row) * max(row) for row in rows)

    total = sum(LENGTHS)
    assert cost(Batching(tokens=128, packing=True)) < 1.05 * total
    assert cost(Batching(tokens=128, group=True)) < 1.1 * total < cost(Batching(tokens=128))


def test_options_of_a_plan():
    with pytest.raises(ValueError, match="give one of batch_tokens"):
        Batching()
    with pytest.raises(ValueError, match="at least 1"):
        Batching(rows=0)
    with pytest.raises(ValueError, match=r"1 rows are longer than batch_tokens 50 \(rows 1; up to 60 tokens\)"):
        plan([3, 60], Batching(tokens=50))


@pytest.fixture
def shards(tmp_path):
    paths = []
    for name, count in (("a.jsonl", 23), ("b.jsonl", 10), ("c.jsonl", 1)):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps({"text": f"{name} {i}"}) for i in range(count)))
        paths.append(path)
    return paths


def texts(shards, **options):
    start = options.pop("start", 0)
    return [(s.cursor, s.example.text) for s in stream(shards, Problems(), Order(**{"block": 4, **options}), start)]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_stream_gives_every_row_once_and_goes_on_anywhere(shards, compressed, tmp_path):
    if compressed:
        import gzip

        for path in shards:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        shards = [path.with_suffix(".jsonl.gz") for path in shards]
    whole = texts(shards, seed=5)
    assert [cursor for cursor, _ in whole] == list(range(1, 35))
    assert len({text for _, text in whole}) == 34
    assert [text for _, text in whole] != sorted(text for _, text in whole)
    for start in range(35):
        assert texts(shards, seed=5, start=start) == whole[start:]
    assert texts(shards, seed=5, epoch=1) != whole
    in_order = [text for _, text in texts(shards, shuffle=False)]
    assert in_order == [f"{n}.jsonl {i}" for n, c in (("a", 23), ("b", 10), ("c", 1)) for i in range(c)]


def test_a_resumed_stream_reads_only_what_it_needs(shards):
    shard = index(shards[0], 4)
    assert (shard.rows, len(shard.offsets)) == (23, 6)
    lines = shards[0].read_bytes().splitlines(keepends=True)
    assert shard.offsets == tuple(sum(map(len, lines[: 4 * k])) for k in range(6))
    problems = Problems()
    assert len(list(stream(shards, problems, Order(block=4), start=30))) == problems.seen == 4


def test_a_stream_counts_bad_rows_and_keeps_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nx\n\n{"text": "b"}\n{"prompt": "c"}\n')
    problems = Problems()
    found = list(stream([path], problems, Order(shuffle=False)))
    assert [(s.cursor, s.example.where) for s in found] == [(1, f"{path}:1"), (4, f"{path}:4")]
    assert [(p.kind, p.lines) for p in problems.errors] == [("json_syntax", [2]), ("mixed_schema", [5])]
    assert (problems.good, problems.bad) == (2, 2)


def test_tempered_mixing():
    sizes = {"big": 900, "small": 100}
    assert tempered(sizes, 1.0) == {"big": 900, "small": 100}
    assert tempered(sizes, 0.0) == {"big": 500, "small": 500}
    assert tempered(sizes, 0.5) == {"big": 750, "small": 250}
    assert sum(tempered({"a": 1, "b": 1, "c": 1}, 0.3, 100).values()) == 100


def test_a_mixture_repeats_evenly_and_is_pure():
    sizes = {"big": 100, "small": 10}
    rows = mixture(sizes, {"big": 30, "small": 25}, seed=1)
    assert rows == mixture(sizes, {"big": 30, "small": 25}, seed=1) != mixture(sizes, {"big": 30, "small": 25}, 1, 1)
    counts = Counter(rows)
    assert Counter(name for name, _ in rows) == {"big": 30, "small": 25}
    assert max(counts[("big", i)] for i in range(100)) == 1
    assert {counts[("small", i)] for i in range(10)} == {2, 3}
    ten = Counter(row for epoch in range(10) for row in mixture(sizes, {"big": 30}, 1, epoch))
    assert set(ten.values()) == {3}


def test_shares():
    share = shares(["general", {"math": 0.0039}])
    assert share == {"general": 1.0, "math": 0.0039}
    assert portions({"general": 50, "math": 10_000}, share) == {"general": 50, "math": 39}
    for bad, reason in [([{"a": 0}], "share of 'a' is 0"), (["a", "a"], "twice"), ([{"a": "x"}], "neither a set nor")]:
        with pytest.raises(ValueError, match=reason):
            shares(bad)
    with pytest.raises(ValueError, match=r"unknown sets \['x'\]; there are \['a'\]"):
        portions({"a": 1}, {"x": 1.0})


def test_generators_are_private_and_apart():
    assert generator(1, 2).integers(1 << 40) != generator(2, 1).integers(1 << 40) != generator(1, 3).integers(1 << 40)
