"""What tuning forgot: the likelihood of general text before and after, KL(base || tuned), and out-of-domain gaps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .generate import free, grouped, measuring, padded, padding_id
from .intervals import Resampling, mean_difference
from .metrics import find, perplexity

Kind = Literal["perplexity", "continuation", "pseudo-perplexity", "drift"]
Base = Callable[[], AbstractContextManager[Any]]
SHORTEST = 4  # tokens of a window: enough for a question and an answer
CHUNK = 256  # positions whose fp32 log-probabilities exist at once: 50 MB for a vocabulary of 49k


@dataclass(frozen=True)
class Windows:
    """How general text is read: pieces of `window` tokens (None: 512, or the model's context if that is shorter), as
    many as `limit` tokens hold (None: all), `batch_tokens` at a time.

    masked: the share of tokens a masked language model has to guess, drawn from a private generator of `seed`.
    """

    window: int | None = None
    limit: int | None = 2048
    batch_tokens: int = 1024
    masked: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        few = min(x for x in (self.window, self.limit, self.batch_tokens, SHORTEST) if x is not None)
        if few < SHORTEST or not 0 < self.masked < 1:
            raise ValueError(f"{self}: every length must be at least {SHORTEST} tokens, masked between 0 and 1")


def retention(
    model: Any, tokenizer: Any, texts: Sequence[str], settings: Windows | None = None, base: Base | None = None
) -> dict[str, Any]:
    """How well the model still reads `texts`, one number and its parts, ready for JSON.

    {"kind", "nll" (nats per token), "perplexity", "tokens", "windows": [[nll sum, tokens], ...], "sha256" of the texts
    and windows} and, with `base` (a function that gives a context in which the model is the untuned one), "kl": mean
    KL(base || tuned) per token. Causal models: every token of a window but its first. Encoder-decoders: the second half
    of a window given the first. Masked models: pseudo-perplexity of masked tokens (Salazar et al. 2020, 15 % at a
    time). A model without a language head has no likelihood: "drift", 1 - cosine of mean-pooled last hidden states
    between base and tuned, with `base` required. The global random state and the training modes are left alone.
    """
    settings = settings or Windows()
    kind = kind_of(model)
    if kind == "drift" and base is None:
        raise ValueError(
            f"{type(model).__name__} has no language head, so there is no likelihood to keep; "
            "give base=lambda: disabled(model) and the drift of its representations is measured instead"
        )
    rows = cut(model, tokenizer, texts, settings)
    result = {"kind": kind, "sha256": digest(texts, settings), "rows": len(rows)}
    with measuring(model):
        if kind == "drift":
            return result | _drift(model, tokenizer, rows, settings, base)
        sums = _likelihoods(model, tokenizer, rows, settings, base)
    total, tokens, kl = sums.sum(axis=0).tolist()
    result |= {"nll": total / tokens, "perplexity": perplexity(total, tokens), "tokens": int(tokens)}
    return result | {"windows": sums[:, :2].tolist()} | ({"kl": kl / tokens} if base is not None else {})


def forgotten(before: Mapping[str, Any], after: Mapping[str, Any], how: Resampling | None = None) -> dict[str, Any]:
    """{"kind", "forgotten", "interval": [low, high], "before", "after"}: nll after - before, over the same windows.

    Positive: general text became less likely. Drift models: the drift itself, in its own unit. ValueError when the two
    were not measured on the same text in the same way.
    """
    for key in ("kind", "sha256", "rows"):
        if before[key] != after[key]:
            raise ValueError(f"retention before and after differ in {key}: {before[key]!r} and {after[key]!r}")
    own = {k: v for k, v in after.items() if k in ("kind", "sha256", "tokens", "kl")}
    if after["kind"] == "drift":
        return own | {"forgotten": after["drift"], "before": before["drift"], "after": after["drift"]}
    gap = mean_difference(np.array(before["windows"]), np.array(after["windows"]), how)
    parts = {name: {k: side[k] for k in ("nll", "perplexity")} for name, side in (("before", before), ("after", after))}
    return own | {"forgotten": gap.value, "interval": gap.bounds, **parts}


def kind_of(model: Any) -> Kind:
    """Which number the model can give, by the class transformers lists it under."""
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    if name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values() or name == "EncoderDecoderModel":
        return "continuation"
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and not model.config.is_encoder_decoder:
        return "pseudo-perplexity"
    return "perplexity" if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else "drift"


def cut(model: Any, tokenizer: Any, texts: Sequence[str], settings: Windows) -> list[list[int]]:
    """The windows' token ids: each text by itself, in pieces; a last piece shorter than 4 tokens is left out.

    Special tokens stay where the tokenizer puts them. ValueError if nothing is left or a window exceeds the context.
    """
    room = free(model)
    window = settings.window or min(512, room or 512)
    if room is not None and window > room:
        raise ValueError(f"window={window} is more than the model's {room} positions; choose a smaller window")
    rows: list[list[int]] = []
    left = math.inf if settings.limit is None else settings.limit
    for text in texts:
        ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])[: int(min(left, 2**62))]
        left -= len(ids)
        rows += [ids[i : i + window] for i in range(0, len(ids), window) if len(ids) - i >= SHORTEST]
    if not rows:
        raise ValueError(f"{len(texts)} texts hold no window of at least {SHORTEST} tokens; give more general text")
    return rows


def digest(texts: Sequence[str], settings: Windows) -> str:
    """sha256 of the texts and of how they are cut: equal digests mean comparable numbers."""
    whole = hashlib.sha256(repr((settings.window, settings.limit, settings.masked, settings.seed)).encode())
    for text in texts:
        whole.update(b"\0" + text.encode())
    return whole.hexdigest()


@dataclass(frozen=True)
class _Asked:
    """One batch: what the model is given, and which positions [rows, seq] of its logits must name which ids."""

    inputs: dict[str, Any]
    targets: Tensor


Prepare = Callable[[Any, Any, Sequence[Sequence[int]], Windows], _Asked]


def _causal(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], settings: Windows) -> _Asked:
    ids, mask = padded(rows, padding_id(model, tokenizer), left=False)
    targets = ids.masked_fill(mask == 0, -100).roll(-1, dims=1)
    targets[:, -1] = -100
    return _Asked({"input_ids": ids, "attention_mask": mask, "use_cache": False}, targets)


def _continued(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], settings: Windows) -> _Asked:
    pad = padding_id(model, tokenizer)
    ids, mask = padded([r[: len(r) // 2] for r in rows], pad, left=False)
    out, known = padded([r[len(r) // 2 :] for r in rows], pad, left=False)
    start = model.config.decoder_start_token_id
    fed = torch.cat([torch.full((len(rows), 1), pad if start is None else start), out[:, :-1]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": fed}
    return _Asked(inputs, out.masked_fill(known == 0, -100))


def _masked(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], settings: Windows) -> _Asked:
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, so a masked language model cannot be asked for likelihoods")
    ids, mask = padded(rows, padding_id(model, tokenizer), left=False)
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):  # by the row's own content: the same tokens before and after, in any batch
        own = int.from_bytes(hashlib.sha256(repr((settings.seed, list(row))).encode()).digest()[:7], "big")
        rank = torch.rand(len(row), generator=torch.Generator().manual_seed(own)).masked_fill(special[i, : len(row)], 2)
        count = max(1, round(settings.masked * int((rank < 2).sum())))
        chosen[i, rank.argsort()[:count]] = True
    chosen &= (mask == 1) & ~special
    inputs = {"input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id), "attention_mask": mask}
    return _Asked(inputs, ids.masked_fill(~chosen, -100))


_PREPARE: dict[str, Prepare] = {"perplexity": _causal, "continuation": _continued, "pseudo-perplexity": _masked}


def _likelihoods(model: Any, tokenizer: Any, rows: list[list[int]], settings: Windows, base: Base | None) -> np.ndarray:
    """Per window: summed nll, tokens, summed KL(base || tuned) [windows, 3]."""
    prepare = _PREPARE[kind_of(model)]
    found = np.zeros((len(rows), 3))
    for group in grouped([len(r) for r in rows], 0, settings.batch_tokens):
        asked = prepare(model, tokenizer, [rows[i] for i in group], settings)
        logits = _logits(model, asked)
        other = None
        if base is not None:
            with base():
                other = _logits(model, asked)
        found[group] = _sums(logits, asked.targets.to(logits.device), other)
    if not found[:, 1].sum():
        raise ValueError("no token of the general text can be predicted: it holds special tokens only")
    return found


def _logits(model: Any, asked: _Asked) -> Tensor:
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in asked.inputs.items()}
    return model(**inputs).logits


def _sums(logits: Tensor, targets: Tensor, base: Tensor | None) -> np.ndarray:
    """[rows, 3] float64 from logits [rows, seq, vocab]; fp32 only for CHUNK positions at a time."""
    row, place = (targets != -100).nonzero(as_tuple=True)
    sums = torch.zeros(len(targets), 3, dtype=torch.float64, device=logits.device)
    for r, p in zip(row.split(CHUNK), place.split(CHUNK), strict=True):
        logp = logits[r, p].float().log_softmax(-1)
        losses = F.nll_loss(logp, targets[r, p], reduction="none")
        kl = torch.zeros_like(losses) if base is None else _kl(base[r, p], logp)
        sums.index_add_(0, r, torch.stack([losses, torch.ones_like(losses), kl], dim=1).double())
    return sums.cpu().numpy()


def _kl(base: Tensor, logp: Tensor) -> Tensor:
    return F.kl_div(logp, base.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _drift(
    model: Any, tokenizer: Any, rows: list[list[int]], settings: Windows, base: Base | None
) -> dict[str, float | int]:
    assert base is not None
    total = 0.0
    for group in grouped([len(r) for r in rows], 0, settings.batch_tokens):
        ids, mask = padded([rows[i] for i in group], padding_id(model, tokenizer), left=False)
        tuned = _pooled(model, ids, mask)
        with base():
            untuned = _pooled(model, ids, mask)
        total += float((1 - F.cosine_similarity(tuned, untuned, dim=-1)).sum())
    return {"drift": total / len(rows), "tokens": sum(map(len, rows))}


def _pooled(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over real tokens [rows, hidden], fp32."""
    out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), output_hidden_states=True)
    hidden = out.get("encoder_last_hidden_state", None)
    last = (hidden if hidden is not None else out.hidden_states[-1]).float()
    weight = mask.to(last.device)[..., None].float()
    return (last * weight).sum(1) / weight.sum(1)


def read_texts(path: Path | str) -> list[str]:
    """The documents of a UTF-8 text file: ended by blank lines, or one a line where there is no blank line."""
    text = Path(path).read_text(encoding="utf-8").strip()
    found = [part.strip() for part in text.split("\n\n" if "\n\n" in text else "\n") if part.strip()]
    if not found:
        raise ValueError(f"{path}: no text in it; general text is needed to measure what was forgotten")
    return found


def default_texts() -> list[str]:
    """The quickstart's general text: what a run without text of its own is measured on."""
    from deltatune import quickstart

    return read_texts(quickstart.rows()["general"])


Measure = Callable[[Sequence[Any]], Mapping[str, Any]]


def out_of_domain(measure: Measure, inside: Mapping[str, Any], sets: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """{set: {"rows", its numbers, "gap": {metric: how much worse than `inside`}}} with `measure` from evaluate().

    A gap is positive where the set is worse than the evaluation set, whichever way the metric points.
    """
    found: dict[str, Any] = {}
    for name, examples in sets.items():
        if not examples:
            raise ValueError(f"data.ood {name!r} has no rows")
        numbers = {k: v for k, v in measure(examples).items() if isinstance(v, int | float)}
        shared = [k for k in numbers if k in inside and k != "rows" and not k.endswith("seconds")]
        found[name] = numbers | {"gap": {k: _worse(k, inside[k], numbers[k]) for k in shared}}
    return found


def _worse(name: str, inside: float, outside: float) -> float:
    up = name != "loss" and find(name).higher_is_better
    return inside - outside if up else outside - inside
