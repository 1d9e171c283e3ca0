"""Images and sounds: ViT, CLIP and Whisper's sites, attention and inputs, and visual prompts against their equation."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conformance import logits
from deltatune import (
    Gate,
    Head,
    LoRA,
    NewTokens,
    Prefix,
    Prompt,
    SpotTune,
    VisualPrompt,
    activate,
    attach,
    detach,
    load,
    save,
)
from deltatune.core import attention, site
from deltatune.core.attach import rows
from deltatune.core.delta import Refusal
from deltatune.core.fingerprint import fingerprint
from deltatune.core.site import reader
from deltatune.core.slot import deltas
from deltatune.core.vocabulary import grow, vocabulary
from deltatune.methods.visual import bound
from deltatune.train.neftune import noise
from models import BEYOND_TEXT, inputs, tiny
from test_methods import fill
from tiny_tokenizers import bert_like

# family: (layers of each role, blocks, attention modules by kind, the layer that reads the input)
ANATOMY = {
    "vit": (2, 2, {"self": 2}, "vit.embeddings.patch_embeddings"),
    "clip": (4, 4, {"text_model": 2, "vision_model": 2}, "text_model.embeddings.token_embedding"),
    "whisper": (6, 4, {"encoder": 2, "decoder": 2, "cross": 2}, "model.encoder.conv1"),
}


@pytest.mark.parametrize("family", BEYOND_TEXT)
def test_roles_blocks_attention_and_input_layer(family):
    model = tiny(family)
    layers, blocks, kinds, reads = ANATOMY[family]
    assert [len(site.find(model, role)) for role in "qkvo"] == [layers] * 4
    assert [len(site.find(model, role)) for role in ("up", "down")] == [blocks] * 2
    assert len(site.blocks(model)) == len(site.block_ends(model)) == blocks
    found = [kind for _, _, kind in attention.attention_modules(model)]
    assert {kind: found.count(kind) for kind in found} == kinds
    assert site.embedding(model) == reads


# model class -> its head; the projections of CLIP and Whisper were pre-trained and are none
HEADS = {
    ("vit", "classify"): ["classifier"],
    ("clip", "classify"): ["classifier"],
    ("clip", "lm"): [],
    ("whisper", "classify"): ["projector", "classifier"],
    ("whisper", "lm"): [],
}


@pytest.mark.parametrize(("family", "task"), HEADS)
def test_heads(family, task):
    assert site.head_modules(tiny(family, task)) == HEADS[family, task]


@pytest.mark.parametrize("family", BEYOND_TEXT)
def test_every_attention_runs_the_registered_function_and_its_logits_stay(family, monkeypatch):
    """With our function in place of the model's own: the same logits, and every module went through it."""
    model, called = tiny(family), []
    given = inputs(model)
    plain = logits(model, given)

    def counted(module, *args, **kwargs):
        called.append(module)
        return attention.attend(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.IMPLEMENTATION, counted)
    previous = attention.use_attention(model)
    torch.testing.assert_close(logits(model, given), plain, rtol=0, atol=2e-6)
    assert {id(m) for m in called} == {id(m) for _, m, _ in attention.attention_modules(model)}
    attention.restore_attention(model, previous)


def test_a_prefix_reaches_vits_class_token():
    """Attention over [P_k; K], [P_v; V] written out, at the one block of a ViT, for the logits of its first token."""
    model = attach(tiny("vit", num_hidden_layers=1), Prefix(3))
    (delta,) = fill(model)
    given = {"pixel_values": inputs(model)["pixel_values"].double()}
    vit, block = model.vit, model.vit.layers[0]
    x = vit.embeddings(given["pixel_values"])
    y = block.layernorm_before(x)
    heads = lambda t: t.view(2, -1, 4, 8).transpose(1, 2)  # noqa: E731
    q, k, v = (heads(p(y)) for p in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj))
    k, v = (torch.cat([own.expand(2, -1, -1, -1), t], 2) for own, t in ((delta.k, k), (delta.v, v)))
    out = (torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1) @ v).transpose(1, 2).reshape(2, -1, 32)
    x = x + block.attention.o_proj(out)
    x = x + block.mlp(block.layernorm_after(x))
    torch.testing.assert_close(logits(model, given), model.classifier(vit.layernorm(x)[:, 0]), rtol=0, atol=1e-10)


# ---- visual prompts --------------------------------------------------------------------------------------------------
def written_out(model, tokens, pixels):
    """[x_i, Z_i, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]) with the tokens after the class token, as in the paper."""
    vit = model.vit
    x = vit.embeddings(pixels)
    for i, block in enumerate(vit.layers):
        own = tokens[i].expand(len(x), -1, -1) if i < len(tokens) else None
        rest = x[:, 1:] if i == 0 else x[:, 1 + tokens[0].shape[0] :]
        x = x if own is None else torch.cat([x[:, :1], own, rest], 1)
        x = block.forward(x)
    return model.classifier(vit.layernorm(x)[:, 0])


@pytest.mark.parametrize("deep", [False, True])
def test_visual_prompts_are_the_papers_function_and_gradient(deep):
    model, plain = attach(tiny("vit"), VisualPrompt(3, deep)), tiny("vit").double()
    tokens = [d.tokens for d in fill(model) if "tokens" in d._parameters]
    assert len(tokens) == (2 if deep else 1)
    pixels = inputs(model)["pixel_values"].double()
    copies = [t.detach().clone().requires_grad_() for t in tokens]
    ours, theirs = model(pixel_values=pixels).logits, written_out(plain, copies, pixels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for own, other in zip(tokens, copies, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-9)


def test_visual_prompts_start_within_the_papers_bound():
    """U(-v, v), v = sqrt(6 / (channels patch^2 + d)): 1/16 at ViT-base, whose patches are 16 x 16 in 3 channels."""
    with torch.device("meta"):
        model = hf.ViTForImageClassification(hf.ViTConfig())
    assert bound(model) == 0.0625
    tokens = deltas(attach(tiny("vit"), VisualPrompt(200)))[0].tokens
    config = tiny("vit").config
    most = (6 / (config.num_channels * config.patch_size**2 + 32)) ** 0.5
    assert 0.99 * most < tokens.abs().max() <= most
    assert tokens.mean().abs() < 0.05 * most


@pytest.mark.parametrize(("length", "deep", "count"), [(10, False, 7_680), (10, True, 92_160), (50, True, 460_800)])
def test_visual_prompt_counts_at_vit_base(length, deep, count):
    """length d, or 12 blocks length d, at d = 768."""
    with torch.device("meta"):
        model = hf.ViTForImageClassification(hf.ViTConfig())
        found = list(VisualPrompt(length, deep).deltas(model))
    assert sum(p.numel() for _, d in found for p in d.parameters()) == count


@pytest.mark.parametrize("kind", [hf.DeiTConfig, hf.Dinov2Config])
def test_heads_that_read_other_tokens_see_the_image_alone(kind):
    """DeiT's distillation token and DINOv2's patch mean stay where they were: the trunk's output keeps its shape."""
    config = kind(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config).eval()
    pixels = torch.randn(2, 3, 8, 8)
    before = model(pixels).last_hidden_state
    attach(model, VisualPrompt(3, deep=True))
    after = model(pixels).last_hidden_state
    assert after.shape == before.shape
    assert (after - before).abs().max() > 1e-4


def test_two_visual_prompts_at_once_keep_their_own_tokens():
    """A deep and a shallow adapter together: the same as the two written into one."""
    model, plain = tiny("vit"), tiny("vit").double()
    attach(model, VisualPrompt(3, deep=True), "a")
    attach(model, VisualPrompt(2), "b")
    model.double()
    a, b = ([d.tokens for d in deltas(model, n) if "tokens" in d._parameters] for n in "ab")
    activate(model, "a", "b")
    pixels = inputs(model)["pixel_values"].double()
    x = plain.vit.embeddings(pixels)
    x = torch.cat([x, a[0].expand(2, -1, -1), b[0].expand(2, -1, -1)], 1)
    x = plain.vit.layers[0].forward(x)
    x = torch.cat([x[:, :5], a[1].expand(2, -1, -1), x[:, 8:]], 1)
    x = plain.vit.layers[1].forward(x)
    expected = plain.classifier(plain.vit.layernorm(x)[:, 0])
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected, rtol=0, atol=1e-10)


# ---- refusals say what works -----------------------------------------------------------------------------------------
REFUSED = {
    "prompt on images": ("vit", Prompt(3), "VisualPrompt"),
    "prompt on sounds": ("whisper", Prompt(3), "Prefix"),
    "words on images": ("vit", Prefix(3, init="words", ids=(7,)), "random"),
    "tokens on images": ("vit", NewTokens((3,)), "VisualPrompt"),
    "visual prompts on text": ("bert", VisualPrompt(3), "Prompt"),
    "visual prompts on sounds": ("whisper", VisualPrompt(3), "Prefix"),
    "a policy over two inputs": ("clip", SpotTune(), "one tower"),
    "visual prompts, gated": ("vit", Gate(of=(VisualPrompt(3),)), "beside"),
    "visual prompts, routed": ("vit", SpotTune(of=(VisualPrompt(3),)), "in a list, where all sequences get it"),
    "a head where none is": ("whisper", Head(), "classification"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    family, method, instead = REFUSED[case]
    with pytest.raises(Refusal, match=instead):
        attach(tiny(family), method)


def test_visual_prompts_by_row_are_refused():
    model = attach(tiny("vit"), VisualPrompt(3), "a")
    with pytest.raises(Refusal, match="equally many"), rows(model, ["a", None]):
        pass


@pytest.mark.parametrize("length", [0, -1, 2.5])
def test_bad_lengths(length):
    with pytest.raises(ValueError, match="VisualPrompt length"):
        VisualPrompt(length)


def test_a_text_prompt_on_clips_old_configuration_is_refused():
    """With eos_token_id 2, CLIP pools at the highest id of a text, which a virtual id would be."""
    model = tiny("clip")
    model.text_model.eos_token_id = 2
    with pytest.raises(Refusal, match="eos_token_id"):
        attach(model, Prompt(3))


def test_gates_of_two_towers_read_their_own_input():
    """A gate over the vision tower does not take the text's padding for the image's: 5 tokens in both."""
    model = attach(tiny("clip"), Gate(of=(LoRA(r=2),)))
    with torch.no_grad():
        for d in deltas(model):
            for p in d.parameters():
                p.normal_()
    given = inputs(model, seq=5)
    padded = given | {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])}
    with torch.no_grad():
        whole, part = model(**given), model(**padded)
    assert torch.equal(whole.image_embeds, part.image_embeds)
    assert not torch.equal(whole.text_embeds[1], part.text_embeds[1])


def test_a_spottune_policy_reads_patches_and_frames():
    """The mean over what the input layer returns, d last: [2, 4, 32] patches of a ViT, 20 frames of Whisper."""
    for family, expected in (("vit", (2, 4, 32)), ("whisper", (2, 20, 32))):
        model = tiny(family)
        layer = model.get_submodule(site.embedding(model))
        seen: list = []
        layer.register_forward_hook(lambda m, a, y, seen=seen: seen.append(site.sequence(m, y)))
        logits(model, inputs(model))
        assert seen[0].shape == expected
        assert site.reads_width(layer) == 32


@pytest.mark.parametrize("family", BEYOND_TEXT)
def test_fingerprints_tell_bases_apart(family):
    model = tiny(family)
    assert fingerprint(model) == fingerprint(tiny(family)) != fingerprint(tiny(family, seed=1))
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        first.weight += 1
    assert fingerprint(model) != fingerprint(tiny(family))


def test_clip_is_asked_for_its_embeddings_in_one_place(tmp_path):
    """CLIPModel raises where other models answer get_input_embeddings(): the text tower answers for it."""
    model = tiny("clip")
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    table = model.text_model.embeddings.token_embedding
    ids = inputs(model)["input_ids"]
    with noise(model.train(), 5.0, 0) as hook:
        hook.start(1)
        assert not torch.equal(table(ids), table.weight[ids])
    assert torch.equal(table(ids), table.weight[ids])
    with pytest.raises(ValueError, match="ViTForImageClassification has no token embedding"), noise(tiny("vit"), 1, 0):
        pass
    attach(model.eval(), Prompt(2), "a")
    save(model, "a", tmp_path / "a")
    assert load(tiny("clip"), tmp_path / "a") == "a"


def test_clip_learns_words(tmp_path):
    """Rows added to the text tower's table, trained, stored, loaded into another copy, taken out again."""
    model, tokenizer = tiny("clip"), bert_like("a b c")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    base = vocabulary(model)
    grow(model, base + 2)
    assert torch.equal(reader(model).weight[base:], reader(model).weight[:base].mean(0).expand(2, -1))
    attach(model, NewTokens((base, base + 1)), "a")
    fill(model, "a")
    save(model, "a", tmp_path / "a")
    told = json.loads((tmp_path / "a" / "deltatune.json").read_text())["base"]
    assert (told["vocab"], told["grown_to"]) == (base, base + 2)
    again = tiny("clip")
    load(again, tmp_path / "a", "a", tokenizer=tokenizer)
    assert vocabulary(again) == base + 2
    assert torch.equal(reader(again).weight[base:], reader(model).weight[base:])
    detach(again, "a")
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in before.items())
    assert again.config.text_config.vocab_size == base
