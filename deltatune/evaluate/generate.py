"""Text from a model: batched generation that equals one by one, and a token-by-token stream for the chat."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attach import rows_of, shifted
from ..core.places import places
from .asking import asking
from .cache import continues, prefilled, room, shared
from .hear import heard, hears, listened, opening
from .processors import Repetition, Stop, Together, average, choose


@dataclass(frozen=True)
class Decoding:
    """How text is generated: greedy at temperature 0, else sampled from a private generator of `seed`.

    batch_tokens: rows x (longest prompt + max_new_tokens) of one batch stays below it (None: what `cache.room` of this
    model says). stop: strings that end an answer and are cut off. prompt_ids: virtual ids put before every prompt of a
    decoder, or of an encoder; None: those of the active adapters' soft prompts.
    prompt, task, combine: one of several soft prompts by number, those of a task by its name, and how several answer
    together ("average" of the next token's probabilities, "vote" of whole answers); None: as the adapter says. raw:
    ignore the template that the adapter was trained with.
    top_k 0 and top_p 1 mean off; repetition_penalty sees real tokens only, never padding or virtual ids.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 1
    repetition_penalty: float = 1.0
    seed: int = 0
    batch_tokens: int | None = None
    stop: tuple[str, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    prompt: int | None = None
    task: str | None = None
    combine: str | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": self.max_new_tokens < 1,
            "temperature": self.temperature < 0,
            "top_p": not 0 < self.top_p <= 1,
            "top_k": self.top_k < 0,
            "beams": self.beams < 1 or (self.beams > 1 and self.temperature > 0),
            "repetition_penalty": self.repetition_penalty <= 0,
            "combine": self.combine not in (None, "average", "vote"),
            "prompt": self.prompt is not None and (isinstance(self.prompt, bool) or self.prompt < 0),
            "stop": isinstance(self.stop, str) or "" in self.stop,
        }
        for name in (n for n, bad in wrong.items() if bad):
            raise ValueError(f"{name}={getattr(self, name)!r} is no setting for generation: {_LEGAL[name]}")


_LEGAL = {
    "max_new_tokens": "at least 1",
    "temperature": "0 (greedy) or more",
    "top_p": "above 0, at most 1 (off)",
    "top_k": "0 (off) or more",
    "beams": "at least 1, and more than 1 only at temperature 0",
    "repetition_penalty": "above 0; 1 is off",
    "combine": "average, vote, or None (as the adapter says)",
    "prompt": "a number from 0, or None (all of them, combined)",
    "stop": "a tuple of non-empty strings",
}


@dataclass(frozen=True)
class Answers:
    """Generated texts in the prompts' order, with what they cost; `cut` rows ran into max_new_tokens."""

    texts: list[str]
    tokens: int
    seconds: float
    cut: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows by wall-clock time, prompt processing included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[Any], settings: Decoding | None = None) -> list[str]:
    """The answers to `prompts` (see `ids_of` for what a prompt may be), in their order."""
    return answers(model, tokenizer, prompts, settings).texts


def answers(model: Any, tokenizer: Any, prompts: Sequence[Any], settings: Decoding | None = None) -> Answers:
    """`generate`, timed. ValueError for an empty prompt, one longer than the model's context, or a model without a
    language head. The global random state, the modules' training modes and the configuration stay as they were."""
    settings = settings or Decoding()
    can_generate(model)
    seq2seq = bool(model.config.is_encoder_decoder)
    asked = asking(model, settings)
    prompts = heard(model, prompts)
    front = opening(model, tokenizer) if any(map(hears, prompts)) else []
    units: list[list[Any]] = [
        [p] if hears(p) else asked.rows(tokenizer, p, lambda q: ids_of(tokenizer, q, seq2seq), seq2seq) for p in prompts
    ]
    fits([front if hears(rows[0]) else rows[0] for rows in units], model, settings.max_new_tokens)
    if not asked.together:
        units = [[row] for rows in units for row in rows]
    found: list[list[int]] = [[] for _ in units]
    start, budget = time.perf_counter(), settings.batch_tokens or room(model) // settings.beams
    side = asked.count if asked.together else 1
    with measuring(model, settings.seed):
        sizes = [max(len(front), rows[0].size) if hears(rows[0]) else len(rows[0]) for rows in units]
        for group in grouped(sizes, settings.max_new_tokens, max(1, budget // side)):
            with rows_of(model, group, len(units)):
                made = _batch(model, tokenizer, [row for i in group for row in units[i]], settings, side)
                for i, new in zip(group, made[::side], strict=True):
                    found[i] = new
    seconds = time.perf_counter() - start
    ends = stop_ids(model, tokenizer) | ({tokenizer.pad_token_id} - {None})  # padding follows a row that ended early
    done = [_finish(tokenizer, new, ends, settings.stop) for new in found]
    tokens = sum(d.tokens for d in done)
    if not asked.together:
        done = elected(done, asked.count)
    return Answers([d.text for d in done], tokens, seconds, sum(d.cut for d in done))


def elected(done: Sequence[_Done], count: int) -> list[_Done]:
    """Of every `count` answers side by side, the commonest (of equally common ones the first), without its margins."""
    parts = [done[i : i + count] for i in range(0, len(done), count)]
    said = [Counter(d.text.strip() for d in part).most_common(1)[0][0] for part in parts]
    return [next(d for d in part if d.text.strip() == text) for part, text in zip(parts, said, strict=True)]


def can_generate(model: Any) -> None:
    """ValueError unless the model has a head that generates text."""
    if not hasattr(model, "can_generate") or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} cannot generate text: it has no language head that predicts the next token. "
            "Load it as a causal or an encoder-decoder model, or measure it with labels instead"
        )


def ids_of(tokenizer: Any, prompt: Any, seq2seq: bool = False) -> list[int]:
    """Token ids of one prompt: a string, token ids, chat messages (mappings or turns), an example, or an encoded row.

    A chat ends with the marker that opens the assistant's turn; a trailing assistant turn is the reference and is left
    out. An encoded row of a decoder ends before its last run of supervised tokens.
    """
    if isinstance(prompt, str):
        return open_ids(tokenizer, prompt, seq2seq)
    if hasattr(prompt, "ids"):
        return _unlabelled(prompt)
    tools = getattr(prompt, "tools", None)
    if hasattr(prompt, "turns"):
        prompt = prompt.turns or _question(prompt)
        return (
            ids_of(tokenizer, prompt, seq2seq) if isinstance(prompt, str) else _chat(tokenizer, prompt, tools, seq2seq)
        )
    prompt = list(prompt)
    return prompt if prompt and isinstance(prompt[0], int) else _chat(tokenizer, prompt, None, seq2seq)


def open_ids(tokenizer: Any, text: str, seq2seq: bool = False, special: bool = True) -> list[int]:
    """Ids of a text that is to be continued: a decoder must not see an end token that the tokenizer appends."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    appended = not seq2seq and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if appended else ids


def _chat(tokenizer: Any, turns: Sequence[Any], tools: Any, seq2seq: bool) -> list[int]:
    text = chat_text(tokenizer, turns, tools)
    return list(tokenizer(text, add_special_tokens=seq2seq)["input_ids"])


def _unlabelled(encoded: Any) -> list[int]:
    """What comes before the last run of supervised tokens: the question that the last answer is for."""
    if encoded.decoder or encoded.labels is None:
        return list(encoded.ids)
    end = len(encoded.ids)
    while end and encoded.labels[end - 1] == -100:
        end -= 1
    while end and encoded.labels[end - 1] != -100:
        end -= 1
    return list(encoded.ids[: end or len(encoded.ids)])


def _question(example: Any) -> str:
    for part in (example.prompt, example.text):
        if part:
            return part
    raise ValueError(f"{example.where}: a row of kind {example.kind!r} has no prompt to answer")


def chat_text(tokenizer: Any, messages: Sequence[Any], tools: Any = None) -> str:
    """The chat template's text up to where the assistant is to answer; ValueError without a template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so chat messages cannot be rendered; "
            "use a chat model, set tokenizer.chat_template, or give prompts as plain strings"
        )
    plain = [_message(m) for m in messages]
    while plain and plain[-1]["role"] == "assistant":
        plain.pop()
    if not plain:
        raise ValueError("a chat without a user's turn cannot be answered")
    return tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=True)


def _message(turn: Any) -> dict[str, Any]:
    return dict(turn) if isinstance(turn, Mapping) else turn.message()


def fits(rows: Sequence[Sequence[int]], model: Any, new: int) -> None:
    """ValueError if a prompt is empty or does not fit the model's context together with `new` tokens."""
    limit = free(model)
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty after tokenisation; there is nothing to continue")
        length = max(len(row), new) if model.config.is_encoder_decoder else len(row) + new
        if limit is not None and length > limit:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens and max_new_tokens={new}, together more than the model's {limit} "
                f"positions{taken(model)}; shorten the prompt or lower max_new_tokens"
            )


def free(model: Any) -> int | None:
    """The positions that active prefixes leave to a prompt and its answer; None: no fixed number."""
    limit = places(model.config)
    return None if limit is None else limit - shifted(model)


def taken(model: Any) -> str:
    shift = shifted(model)
    return f" ({shift} more are taken by the prefix, which a shorter one would leave free)" if shift else ""


def grouped(lengths: Sequence[int], new: int, budget: int) -> Iterator[list[int]]:
    """Row numbers in batches, longest first (memory runs out at once or never), each within the token budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = max(1, budget // (lengths[order[0]] + new))
        yield order[:size]
        order = order[size:]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no gradient checkpointing); afterwards every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def private_rng(device: torch.device | str, seed: int) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device` inside, and leave them as they were before."""
    device = torch.device(device)
    kind = None if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=[device] if kind else [], device_type=kind):
        torch.default_generator.manual_seed(seed)
        if kind:
            torch.get_device_module(kind).manual_seed(seed)
        yield


@contextmanager
def measuring(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """What a model is measured in: evaluation mode, no gradient, and a generator of its own, since a method may draw in
    evaluation too (SpotTune's `sample`). The same model says the same, whatever was drawn before."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model), private_rng(device, seed), torch.no_grad():
        yield


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every id that ends an answer: the end tokens of the generation config, the tokenizer and the chat template."""
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        end = getattr(source, "eos_token_id", None)
        ids.update(end if isinstance(end, list | tuple) else [] if end is None else [end])
    return ids | end_of_turn(tokenizer)


def end_of_turn(tokenizer: Any) -> set[int]:
    """The special token the chat template puts after an assistant's words; empty where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    words = "deltatune-answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": words}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(words)[2]
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return set(ids[:1]) & special


def padding_id(model: Any, tokenizer: Any) -> int:
    """An id for padding; any will do under the attention mask, a real one keeps the embedding in range."""
    ends = sorted(stop_ids(model, tokenizer))
    return next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """ids and attention mask [rows, longest]."""
    width = max(map(len, rows))
    gaps = [width - len(r) for r in rows]
    ids = [[pad] * g + list(r) if left else list(r) + [pad] * g for r, g in zip(rows, gaps, strict=True)]
    mask = [[0] * g + [1] * len(r) if left else [1] * len(r) + [0] * g for r, g in zip(rows, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


# What a model's own generation config says about its form, not about taste.
_STRUCTURE = (
    "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def _config(model: Any, tokenizer: Any, settings: Decoding) -> Any:
    """A complete generation config: what a model's own file asks for (sampling, penalties) must not creep in."""
    from transformers import GenerationConfig

    own = model.generation_config
    sampled = settings.temperature > 0
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        max_length=None,
        do_sample=sampled,
        num_beams=settings.beams,
        repetition_penalty=1.0,
        eos_token_id=sorted(stop_ids(model, tokenizer)) or None,
        pad_token_id=padding_id(model, tokenizer),
        use_cache=True,
        **{name: getattr(own, name, None) for name in _STRUCTURE},
        **({"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k} if sampled else {}),
    )


@contextmanager
def _defaults(model: Any, config: Any) -> Iterator[None]:
    """`config` as the model's own: generate() fills what a given config leaves open from the model's."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _batch(model: Any, tokenizer: Any, rows: Sequence[Any], settings: Decoding, side: int = 1) -> list[list[int]]:
    """The new ids of each row of one batch, padding and end tokens included; every `side` rows answer as one."""
    from transformers import GenerationMixin

    sounds, seq2seq = hears(rows[0]), bool(model.config.is_encoder_decoder)
    start = 0 if seq2seq else shared(model, rows)
    inputs = listened(model, tokenizer, rows) if sounds else _written(model, tokenizer, rows, start)
    skip = inputs["decoder_input_ids"].shape[1] if sounds else 1 if seq2seq else inputs["input_ids"].shape[1]
    more: dict[str, Any] = {"logits_processor": [], "stopping_criteria": []}
    if settings.repetition_penalty != 1:
        seen = inputs["attention_mask"][:, : 0 if seq2seq else None]
        more["logits_processor"].append(Repetition(settings.repetition_penalty, seen))
    if side > 1:
        more["logits_processor"].append(Together(side, settings))
    if settings.stop:
        more["stopping_criteria"].append(Stop(tokenizer, settings.stop, skip))
    drawn = settings.temperature > 0 and side > 1  # by Together
    config = _config(model, tokenizer, replace(settings, temperature=0) if drawn else settings)
    # the plain search for sounds: Whisper's own generate is for long sound, which it decodes window by window
    search = partial(GenerationMixin.generate, model) if sounds else model.generate
    with _defaults(model, config), torch.no_grad():
        if not seq2seq and continues(model):
            more["past_key_values"] = begun = prefilled(model, rows, start)
            if settings.beams > 1 and begun.get_seq_length():  # of one, a copy that has no room to grow in
                begun.batch_repeat_interleave(settings.beams)
        out = search(**inputs, **more)
    return out[:, skip:].tolist()


def _written(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], start: int) -> dict[str, Tensor]:
    """Prompts padded to one length, the side by the family; their common beginning of `start` tokens stays in front."""
    left = not model.config.is_encoder_decoder
    ids, mask = padded([row[start:] for row in rows], padding_id(model, tokenizer), left=left)
    front = torch.tensor([rows[0][:start]] * len(rows), dtype=torch.long).view(len(rows), start)
    mask = torch.cat([torch.ones_like(front), mask], 1).to(model.device)
    return {"input_ids": torch.cat([front, ids], 1).to(model.device), "attention_mask": mask}


@dataclass(frozen=True)
class _Done:
    """One answer: its text, the tokens spent on it (the end token is one), and whether it was cut short."""

    text: str
    tokens: int
    cut: bool


def _finish(tokenizer: Any, new: Sequence[int], ends: set[int], stop: tuple[str, ...]) -> _Done:
    """The text before the first end token or stop string."""
    end = next((i for i, token in enumerate(new) if token in ends), None)
    body = [t for t in new[:end] if t < len(tokenizer)]  # a padded output layer may name ids no tokenizer knows
    text = tokenizer.decode(body, skip_special_tokens=True)
    kept = _until(text, stop)
    return _Done(kept, len(new) if end is None else end + 1, end is None and kept == text)


def _until(text: str, stop: tuple[str, ...]) -> str:
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text


def stream(model: Any, tokenizer: Any, messages: Sequence[Any], settings: Decoding | None = None) -> Iterator[str]:
    """Pieces of the answer to a chat (or any single prompt) as they are made; joined, they are `generate`'s text.

    The model is in evaluation mode until the iterator ends or is closed. Sampling draws from a generator of its own.
    """
    settings = settings or Decoding()
    can_generate(model)
    if model.config.is_encoder_decoder or settings.beams > 1:
        raise ValueError("stream() makes one token after the other: causal models without beams; use generate()")
    asked = asking(model, settings)
    rows = asked.rows(tokenizer, messages, lambda prompt: ids_of(tokenizer, prompt))
    fits(rows, model, settings.max_new_tokens)
    if len(rows) > 1 and not asked.together:  # votes are counted when all have answered
        return (text for text in generate(model, tokenizer, [messages], settings))
    return _pieces(tokenizer, _tokens(model, tokenizer, rows, settings), settings.stop)


def _tokens(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], settings: Decoding) -> Iterator[int]:
    """New ids one by one with the key-value cache, up to the end token (which is not given): those of several rows
    (prompts of one question) together."""
    ids = torch.tensor(rows, device=model.device)
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    penalty = Repetition(settings.repetition_penalty, torch.ones_like(ids))
    stops, cache = stop_ids(model, tokenizer), None
    with evaluating(model):
        for _ in range(settings.max_new_tokens):
            fed = ids if cache is None else ids[:, -1:]
            with torch.no_grad():  # not around the yield: the caller's own gradient mode must not change
                out = model(input_ids=fed, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            scores = penalty(ids, out.logits[:, -1].float())
            token = choose(average(scores[None], len(ids)) if len(ids) > 1 else scores, ids[:1], settings, generator)
            if int(token) in stops:
                return
            yield int(token)
            ids = torch.cat([ids, token.expand(len(ids), 1)], dim=1)


def _pieces(tokenizer: Any, tokens: Iterator[int], stop: tuple[str, ...]) -> Iterator[str]:
    """Text as soon as it is certain: no half characters, and nothing that may be the beginning of a stop string."""
    seen: list[int] = []
    given = 0
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True)
        kept = _until(text, stop)
        if len(kept) < len(text):
            yield from _new(kept, given)
            return
        sure = len(text) if not text.endswith("\ufffd") else given
        sure -= max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if sure > given:
            yield text[given:sure]
            given = sure
    yield from _new(tokenizer.decode(seen, skip_special_tokens=True), given)


def _new(text: str, given: int) -> Iterator[str]:
    if len(text) > given:
        yield text[given:]
