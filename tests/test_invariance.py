"""A step's loss and gradients do not depend on how its rows are cut into batches: real tiny models, core, objective."""

import pytest
import torch

from deltatune import SFT, LoRA, attach
from deltatune.core.attach import packing, trainable
from deltatune.data.batch import pack, pad
from deltatune.data.encode import Encoded
from models import tiny

FAMILIES = ("llama", "gpt2", "gemma", "neox", "opt")
LENGTHS = (3, 9, 5, 12, 7, 4)
SPLITS = {
    "one batch": [[0, 1, 2, 3, 4, 5]],
    "halves": [[0, 1, 2], [3, 4, 5]],
    "one by one": [[0], [1], [2], [3], [4], [5]],
    "uneven, another order": [[5, 3], [1], [0, 4, 2]],
}


def rows() -> list[Encoded]:
    """Rows of unlike lengths with unlike numbers of learned tokens."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for i, length in enumerate(LENGTHS):
        ids = tuple(torch.randint(5, 97, (length,), generator=draw).tolist())
        learned = length // 2 if i % 2 else length - 1
        found.append(Encoded(ids, (-100,) * (length - learned) + ids[length - learned :], where=f"row {i}"))
    return found


def adapted(family: str, dtype: torch.dtype):
    """A model whose LoRA does something already, ready for packed batches."""
    model = attach(tiny(family, dtype=dtype), LoRA(r=4))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainable(model).values():
            p.copy_((torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.02).to(p.dtype))
    model.to(dtype)
    packing(model)
    return model


def step(model, batches) -> tuple[float, torch.Tensor]:
    """(loss, all gradients end to end) of one optimizer step over `batches`."""
    tuned = trainable(model)
    total, loss = sum(batch.targets for batch in batches), 0.0
    for p in tuned.values():
        p.grad = None
    for batch in batches:
        part = SFT().loss(model, batch)[0] / total
        part.backward()
        loss += float(part.detach())
    return loss, torch.cat([p.grad.flatten() for p in tuned.values()])


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "split", "packed"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-10, 1e-10)])
def test_loss_and_gradients_are_those_of_one_by_one(family, dtype, split, packed):
    model, encoded = adapted(family, dtype), rows()
    loss, grads = step(model, [pad([row], 0) for row in encoded])
    assert grads.norm() > 1e-3
    for name, groups in SPLITS.items():
        for put, limit in ((lambda part: pad(part, 0), split), (pack, packed)):
            ours = step(model, [put([encoded[i] for i in group]) for group in groups])
            assert abs(ours[0] - loss) <= limit * abs(loss), (name, limit)
            assert gap(ours[1], grads) <= limit, (name, limit)


def test_rows_that_saw_each_other_would_be_noticed():
    """The comparison can fail: the same tokens as one sequence give other gradients."""
    model, encoded = adapted("llama", torch.float64), rows()
    _, grads = step(model, [pack(encoded)])
    joined = Encoded(tuple(i for r in encoded for i in r.ids), tuple(i for r in encoded for i in r.labels))
    assert gap(step(model, [pad([joined], 0)])[1], grads) > 1e-2


@pytest.mark.parametrize("family", [*FAMILIES, "bart", "t5"])
def test_the_loss_is_that_of_a_plain_forward_pass(family):
    """Oracle: every logit of the model, labels shifted by hand, torch's own cross-entropy."""
    model = tiny(family)
    decoder = model.config.is_encoder_decoder
    encoded = [Encoded(r.ids, r.labels if not decoder else r.ids[2:], where=r.where, decoder=decoder) for r in rows()]
    batch = pad(encoded, model.config.pad_token_id or 0)
    found, metrics = SFT().loss(model, batch)
    with torch.no_grad():
        if decoder:
            start = model.config.decoder_start_token_id
            shifted = torch.cat([torch.full((6, 1), start), batch.labels[:, :-1]], 1)
            shifted[shifted == -100] = model.config.pad_token_id
            logits, wanted = model(**batch.inputs, decoder_input_ids=shifted).logits, batch.labels
        else:
            logits, wanted = model(**batch.inputs).logits[:, :-1], batch.labels[:, 1:]
    sums, right = 0.0, 0
    for logit, label in zip(logits.double().flatten(0, 1), wanted.flatten(), strict=True):
        if label != -100:
            sums -= float(logit[label] - logit.logsumexp(-1))
            right += int(logit.argmax() == label)
    assert found.item() == pytest.approx(sums, rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(right / batch.targets)


def test_a_model_that_cannot_leave_logits_out_gives_the_same_loss():
    """Without logits_to_keep in its signature a model makes all logits, and the unneeded are dropped."""
    model, batch = tiny("llama"), pad(rows(), 0)
    with_it = SFT().loss(model, batch)[0].item()
    plain = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache=False: plain(input_ids, attention_mask)
    assert SFT().loss(model, batch)[0].item() == pytest.approx(with_it, rel=1e-6)
