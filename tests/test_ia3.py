"""(IA)^3: published counts, peft's loss curve, and an unmerge that does not divide."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from peft import IA3Config, get_peft_model

from conformance import close, logits
from deltatune import IA3, LoRA, attach, detach, merge
from deltatune.core.attach import trainable
from models import inputs, tiny


def test_t0_3b():
    config = hf.T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.AutoModelForSeq2SeqLM.from_config(config)
        found = list(IA3().deltas(model))
    assert sum(p.numel() for _, d in found for p in d.parameters()) == 540_672


TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "bert": (["key", "value", "layer.0.output.dense", "layer.1.output.dense"],) * 1
    + (["layer.0.output.dense", "layer.1.output.dense"],),
}


@pytest.mark.parametrize("family", TARGETS)
def test_twenty_steps_have_pefts_losses(family):
    targets, feedforward = TARGETS[family]
    ours = attach(tiny(family), IA3())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny(family), IA3Config(target_modules=targets, feedforward_modules=feedforward))
    curves = []
    for model, chosen in ((ours, trainable(ours).values()), (theirs, theirs.parameters())):
        chosen = [p for p in chosen if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(chosen, lr=3e-2), []
        for step in range(20):
            loss = model(**inputs(ours, rows=4, seed=step % 3)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert sum(p.numel() for p in trainable(ours).values()) == sum(p.numel() for p in chosen)
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)
    assert abs(curves[0][-1] - curves[0][1]) > 1e-2
    given = {k: v for k, v in inputs(ours).items() if k != "labels" or ours.config.is_encoder_decoder}
    close(logits(ours, given), logits(theirs, given), 2e-5)


@pytest.mark.parametrize("method", [IA3(), LoRA(r=4)], ids=["ia3", "lora"])
def test_unmerging_is_exact_in_half_precision(method):
    """Deviation 13: neither W - D nor W / (l + eps), but the weights that never went away."""
    model = tiny("llama", dtype=torch.bfloat16)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    attach(model, method)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.3 * torch.randn(p.shape))
    merged = merge(model).state_dict()
    assert any(not torch.equal(merged[k], before[k]) for k in before)
    detach(model, "default")
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
