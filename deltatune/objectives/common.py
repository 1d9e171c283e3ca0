"""What every objective shares: loading the model its head needs, running a batch, and logits only where they count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.attention import packed, positions
from ..core.delta import Refusal
from ..core.site import head_modules, output_layer
from ..data.batch import Batch
from ..data.media import reads
from .projection import Projection, exact, states

IGNORE = -100
FITTED = MappingProxyType({"fitted": True})  # a field that `fit` reads off the training rows where nothing is said


def load(auto: str, path: Path | str, config: Any, **options: Any) -> Any:
    """A transformers Auto class's from_pretrained: safetensors only, never remote code, nothing but a new head missing.

    config: the configuration that `path` holds. Refusal, before anything of `path` is read, where it has no such head.
    A head of other classes than the rows have is a new one too. Weights that the checkpoint lacks (a pooler, a head)
    are drawn from a fixed seed: the base is the same every time.
    """
    import transformers

    headed_for(auto, config)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with quiet(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        opener = getattr(transformers, auto).from_pretrained
        headed = {"ignore_mismatched_sizes": True} if auto in HEADED else {}
        if headed and "quantization_config" in options:
            options["quantization_config"].llm_int8_skip_modules = unpacked(auto, config)
        model, info = opener(path, use_safetensors=True, output_loading_info=True, **headed, **options)
    heads = tuple(head_modules(model)) if auto in HEADED else ()
    sizes = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    lost = sorted(
        k for k in {*info["missing_keys"], *sizes} if not (heads and k.startswith(heads)) and "pooler" not in k
    )
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} weights that {type(model).__name__} needs, such as {lost[0]}: "
            "it is a checkpoint of another architecture or task, and untrained weights would pass for trained ones"
        )
    return model


def unpacked(auto: str, config: Any) -> list[str]:
    """What a checkpoint may lack, so that there is nothing to pack: the task heads, and a pooler before them."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config)
    return [*head_modules(model), *(name for name, _ in model.named_modules() if name.endswith("pooler"))]


def headed_for(auto: str, config: Any) -> None:
    """Refusal where transformers has no such head for this configuration, with the objectives that it has one for."""
    import transformers

    def takes(name: str) -> bool:
        return type(config) in getattr(transformers, name)._model_mapping

    if takes(auto):
        return
    wanted = {
        "classify": class_head(config),
        "sft": language_class(config),
        "tag": "AutoModelForTokenClassification",
        "qa": "AutoModelForQuestionAnswering",
    }
    fit = [name for name, head in wanted.items() if takes(head) and not (name == "sft" and head == MASKED_HEAD)]
    columns, kind = {"image": ("image", "pictures"), "audio": ("audio", "sound")}.get(
        reads(config) or "", ("text", "text")
    )
    raise Refusal(
        f"this objective needs a head that {config.model_type} models do not have ({auto}).",
        found=f"{type(config).__name__}, which reads {kind}",
        instead=" or ".join(f"objective {name}" for name in fit) + f", with rows of {columns} and label"
        if fit
        else "another model: no objective has a head for this one",
    )


MASKED_HEAD = "AutoModelForMaskedLM"
HEADED = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


def name_classes(model: Any, names: list[str]) -> Any:
    """The model with the classes of its head by name in its configuration."""
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {n: i for i, n in enumerate(names)}
    if getattr(model.config, "pad_token_id", 0) is None:  # models of pictures have none
        model.config.pad_token_id = model.config.eos_token_id
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters in them is checked here."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def language_class(config: Any) -> str:
    """The Auto class whose head predicts tokens for this configuration."""
    names = " ".join(config.architectures or ())
    if config.is_encoder_decoder:
        return "AutoModelForSpeechSeq2Seq" if reads(config) == "audio" else "AutoModelForSeq2SeqLM"
    masked = "MaskedLM" in names or config.model_type in MASKED
    return MASKED_HEAD if masked else "AutoModelForCausalLM"


def class_head(config: Any) -> str:
    """The Auto class whose head tells classes for this configuration."""
    return {"image": "AutoModelForImageClassification", "audio": "AutoModelForAudioClassification"}.get(
        reads(config) or "", "AutoModelForSequenceClassification"
    )


MASKED = ("bert", "roberta", "distilbert", "electra", "modernbert", "albert", "deberta-v2", "xlm-roberta", "camembert")


def kind_of(model: Any) -> str:
    """'seq2seq', 'masked' or 'causal'."""
    return family(model.config)


def family(config: Any) -> str:
    """`kind_of` a model of this configuration."""
    if config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if getattr(config, "is_decoder", False) or config.model_type not in MASKED else "masked"


def needs_words(model: Any, objective: str) -> None:
    """Refusal for a model without a language head."""
    if output_layer(model) is None:
        raise Refusal(
            f"{objective} reads the language model's words, and this model has no language head.",
            found=type(model).__name__,
            instead="the model loaded as a language model (AutoModelForCausalLM and its kin), or objective classify",
        )


def run(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """The model's forward pass over a padded or a packed batch; behind a front that is known, over the rest of it."""
    if batch.front is not None:
        ids = batch.inputs["input_ids"]
        inputs = {**batch.inputs, "input_ids": ids[:, batch.front.length :]}
        return model(**inputs, **more | {"past_key_values": batch.front.of(len(ids)), "use_cache": True})
    with batch.known() if batch.known else nullcontext():
        if batch.lens is None:
            return model(**batch.inputs, **more)
        inputs = {**batch.inputs, "position_ids": positions(model, batch.lens)}
        with packed(batch.lens):
            return model(**inputs, **more)


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What the decoder reads to say `labels` [rows, seq]: the same, one place later."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    read = torch.cat([start, labels[:, :-1]], 1)
    return read.masked_fill(read == IGNORE, model.config.pad_token_id)


def states_at(model: Any, batch: Batch, at: tuple[Tensor, ...], **more: Any) -> tuple[Tensor, Projection]:
    """The states [n, d] at `at` = (rows [n], positions [n]) of a forward pass, and what makes logits of them."""
    cached = {} if kind_of(model) == "masked" else {"use_cache": False}
    if batch.front is not None:
        at = (at[0], at[1] - batch.front.length)
    return states(model, lambda: run(model, batch, **cached, **more), at)


def combined(scores: Tensor, batch: Batch) -> Tensor:
    """scores [prompts * rows, *, classes] -> log-probabilities [rows, *, classes] that all prompts agree on.

    "average": of the probabilities; "vote": the share of prompts that choose the class, equal ones told apart by the
    average (Lester et al. 2021, section 6).
    """
    if batch.prompts == 1:
        return scores
    each = scores.unflatten(0, (-1, batch.prompts)).softmax(-1)
    if batch.combine == "average":
        return each.mean(1).log()
    votes = F.one_hot(each.argmax(-1), each.shape[-1]).to(each.dtype).mean(1)
    return (votes + each.mean(1) / (2 * batch.prompts)).log()  # a tie-break stays below half a vote


def shares(scores: Tensor, names: Sequence[str]) -> dict[str, float]:
    """{name: probability} of unnormalised log-probabilities [classes]."""
    return dict(zip(names, scores.softmax(-1).tolist(), strict=True))


def summed(losses: Tensor, hits: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(the sum of each token's loss, metrics: the share of tokens predicted right)."""
    return losses.sum(), {"token_accuracy": float(hits.sum()) / max(len(hits), 1)}


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Summed cross-entropy, at least in fp32, over labels != -100; metrics: the share of tokens predicted right."""
    flat, wanted = exact(logits.flatten(0, -2)), labels.flatten()
    loss = F.cross_entropy(flat, wanted, ignore_index=IGNORE, reduction="sum")
    with torch.no_grad():
        hits = (flat.argmax(-1) == wanted).sum()
        return loss, {"token_accuracy": float(hits / (wanted != IGNORE).sum().clamp(min=1))}
