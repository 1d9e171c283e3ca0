"""Tiny random models of every family: 2 layers, d=32, 4 heads, vocab 97, weights large enough to matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 97
HIDDEN = 32
HEADS = 4
LAYERS = 2
LABELS = 3
POSITIONS = 128
LOWEST_ID = 5  # ids below are pad, bos, eos, mask ... in one family or another

Kind = Literal["causal", "masked", "seq2seq", "vision", "contrastive", "speech"]
AUTO = {
    ("causal", "lm"): hf.AutoModelForCausalLM,
    ("masked", "lm"): hf.AutoModelForMaskedLM,
    ("seq2seq", "lm"): hf.AutoModelForSeq2SeqLM,
    ("vision", "lm"): hf.AutoModelForImageClassification,
    ("contrastive", "lm"): hf.AutoModel,
    ("speech", "lm"): hf.AutoModelForSpeechSeq2Seq,
    ("vision", "classify"): hf.AutoModelForImageClassification,
    ("contrastive", "classify"): hf.AutoModelForImageClassification,
    ("speech", "classify"): hf.AutoModelForAudioClassification,
}
TASKS = {"classify": hf.AutoModelForSequenceClassification, "trunk": hf.AutoModel}


@dataclass(frozen=True)
class Family:
    """What the tests must know about one architecture."""

    config: type
    kind: Kind
    fused: bool = False  # q, k and v (and for Phi-3 gate and up) are one linear layer
    biased: bool = False  # linear layers have biases
    gqa: bool = False  # 2 key-value heads instead of 4
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", MappingProxyType(dict(self.sizes)))


def _llama_like(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def _bert_like(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
    } | more


_HEAD_DIM = HIDDEN // HEADS
_GEMMA2 = _llama_like(
    head_dim=_HEAD_DIM, sliding_window=4, query_pre_attn_scalar=_HEAD_DIM, attn_logit_softcapping=2.0,
    final_logit_softcapping=5.0, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "llama": Family(hf.LlamaConfig, "causal", gqa=True, sizes=_llama_like()),
    "qwen": Family(hf.Qwen3Config, "causal", gqa=True, sizes=_llama_like(head_dim=_HEAD_DIM)),
    "mistral": Family(hf.MistralConfig, "causal", gqa=True, sizes=_llama_like(head_dim=_HEAD_DIM, sliding_window=4)),
    "gemma": Family(hf.Gemma2Config, "causal", gqa=True, sizes=_GEMMA2),
    "phi3": Family(hf.Phi3Config, "causal", fused=True, gqa=True, sizes=_llama_like(
        resid_pdrop=0.0, embd_pdrop=0.0, original_max_position_embeddings=POSITIONS)),
    "gpt2": Family(hf.GPT2Config, "causal", fused=True, biased=True, sizes={
        "n_embd": HIDDEN, "n_inner": 48, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "neox": Family(hf.GPTNeoXConfig, "causal", fused=True, biased=True, sizes=_bert_like(
        attention_dropout=0.0, hidden_dropout=0.0, bos_token_id=1, eos_token_id=2)),
    "opt": Family(hf.OPTConfig, "causal", biased=True, sizes={
        "hidden_size": HIDDEN, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": POSITIONS, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2} | _NO_DROPOUT),
    "bert": Family(hf.BertConfig, "masked", biased=True, sizes=_bert_like()),
    "roberta": Family(hf.RobertaConfig, "masked", biased=True, sizes=_bert_like(
        pad_token_id=1, bos_token_id=0, eos_token_id=2)),
    "distilbert": Family(hf.DistilBertConfig, "masked", biased=True, sizes={
        "dim": HIDDEN, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": POSITIONS,
        "pad_token_id": 0, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}),
    "electra": Family(hf.ElectraConfig, "masked", biased=True, sizes=_bert_like(embedding_size=HIDDEN)),
    "modernbert": Family(hf.ModernBertConfig, "masked", sizes={
        "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS, "local_attention": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}, fused=True),
    "t5": Family(hf.T5Config, "seq2seq", sizes={
        "d_model": HIDDEN, "d_kv": _HEAD_DIM, "d_ff": 48, "num_layers": LAYERS, "num_decoder_layers": LAYERS,
        "num_heads": HEADS, "dropout_rate": 0.0, "classifier_dropout": 0.0,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}),
    "bart": Family(hf.BartConfig, "seq2seq", biased=True, sizes={
        "d_model": HIDDEN, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": LAYERS,
        "decoder_layers": LAYERS, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "classifier_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": None} | _NO_DROPOUT),
})  # fmt: skip

IMAGE, FRAMES, MELS = 8, 20, 8
_TOWER = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_IMAGES = {"image_size": IMAGE, "patch_size": 4, "num_channels": 3}
# families that read images and sounds: "lm" is what they were pre-trained for (classes, for ViT)
BEYOND_TEXT: Mapping[str, Family] = MappingProxyType({
    "vit": Family(hf.ViTConfig, "vision", biased=True, sizes=_TOWER | _IMAGES),
    "clip": Family(hf.CLIPConfig, "contrastive", biased=True, sizes={
        "projection_dim": 16, "vision_config": _TOWER | _IMAGES, "text_config": _TOWER | {
            "vocab_size": VOCAB, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 3}}),
    "whisper": Family(hf.WhisperConfig, "speech", biased=True, sizes={
        "d_model": HIDDEN, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": LAYERS,
        "num_hidden_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2,
        "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 3, "classifier_proj_size": 16, "suppress_tokens": None,
        "begin_suppress_tokens": None} | _NO_DROPOUT),
})  # fmt: skip
ALL = MappingProxyType({**FAMILIES, **BEYOND_TEXT})
_STATES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 4, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2}  # fmt: skip
# families without attention: the conformance suite's methods are not all for them
RECURRENT: Mapping[str, Family] = MappingProxyType({
    "mamba": Family(hf.MambaConfig, "causal", sizes=_STATES),
    "mamba2": Family(hf.Mamba2Config, "causal", sizes=_STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 1,
                                                                 "chunk_size": 4}),
})  # fmt: skip


def tiny(
    family: str, task: str = "lm", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> hf.PreTrainedModel:
    """A model of `family` in eval mode; the same seed always gives the same weights; the global RNG is left alone.

    task: "lm" (causal, masked or conditional generation, by family), "classify" (3 labels) or "trunk".
    overrides: configuration fields.
    """
    found = {**ALL, **RECURRENT}[family]
    config = found.config(**({"vocab_size": VOCAB, "num_labels": LABELS} | dict(found.sizes) | overrides))
    auto = AUTO.get((found.kind, task)) or TASKS[task]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        enliven(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: the stock 0.02 inits hide most mistakes behind near-zero outputs."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        scales_a_norm = p.ndim == 1 and "norm" in name.lower() + type(_owner(model, name)).__name__.lower()
        if scales_a_norm and name.endswith("weight") and not _unit_offset(model):
            p.copy_(1 + 0.2 * noise)
        else:
            p.copy_(0.2 * noise)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _unit_offset(model: nn.Module) -> bool:
    """Gemma stores a norm's weight minus one."""
    return "gemma" in getattr(getattr(model, "config", None), "model_type", "")


def inputs(model: hf.PreTrainedModel, rows: int = 2, seq: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for one forward pass without special tokens: ids and labels [rows, seq], nothing padded;
    pixel_values [rows, 3, 8, 8] or input_features [rows, 8, 20] for models that read these.

    Labels are token ids for language models ([rows, seq + 2] decoder targets for encoder-decoders), classes [rows]
    for classifiers, absent for trunks.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(LOWEST_ID, VOCAB, (rows, seq), generator=g)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = torch.randint(LOWEST_ID, VOCAB, (rows, seq + 2), generator=g)
    name = type(model).__name__
    if any(name.startswith(start) for start in ("ViT", "CLIP", "Whisper")):
        return beyond_text(model, out, targets, g)
    if "SequenceClassification" in name:
        if model.config.is_encoder_decoder:  # these read the class at the last end-of-sequence token
            ids[:, -1] = model.config.eos_token_id
        return out | {"labels": torch.arange(rows) % LABELS}
    if model.config.is_encoder_decoder and name.endswith("ForConditionalGeneration"):
        return out | {"decoder_input_ids": targets.roll(1, dims=1), "labels": targets}
    if model.config.is_encoder_decoder:
        return out | {"decoder_input_ids": targets}
    return out | ({"labels": ids} if "LM" in name else {})


def beyond_text(
    model: hf.PreTrainedModel, text: dict[str, Tensor], targets: Tensor, g: torch.Generator
) -> dict[str, Tensor]:
    """`inputs` of models that read images and sounds. CLIP's texts end with its end token, where it pools."""
    name, rows = type(model).__name__, len(targets)
    if name.startswith("Whisper"):
        sounds = {"input_features": torch.randn(rows, MELS, FRAMES, generator=g)}
        if "Classification" in name:
            return sounds | {"labels": torch.arange(rows) % LABELS}
        return sounds | {"decoder_input_ids": targets.roll(1, dims=1), "labels": targets}
    images = {"pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=g)}
    if name == "CLIPModel":
        text["input_ids"][:, -1] = model.config.text_config.eos_token_id
        return images | text | {"return_loss": torch.tensor(True)}
    return images | ({"labels": torch.arange(rows) % LABELS} if "Classification" in name else {})
