"""What happens to the scores of the next token before one is chosen, and what ends an answer early."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Repetition:
    """The repetition penalty (Keskar et al. 2019, arXiv:1909.05858) over real tokens: a batch then equals one by one.

    transformers' own also counts the padding of a batch, and with it often the end-of-turn token.
    """

    def __init__(self, penalty: float, mask: Tensor) -> None:
        self.penalty, self.mask = penalty, mask

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids [rows, seq], scores [rows, vocab] -> scores."""
        vocab, width = scores.shape[1], self.mask.shape[1]
        mask = self.mask.repeat_interleave(ids.shape[0] // self.mask.shape[0], dim=0).bool()
        real = torch.ones_like(ids, dtype=torch.bool)
        real[:, :width] = mask
        seen = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
        seen.scatter_(1, torch.where(real & (ids < vocab), ids, vocab), True)
        weaker = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen[:, :vocab], weaker, scores)


class Stop:
    """Ends a row once its new text holds one of the stop strings."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prompt: int) -> None:
        self.tokenizer, self.stop, self.prompt = tokenizer, stop, prompt
        self.tail = 4 * max(map(len, stop)) + 4  # a character takes at most four byte tokens

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """ids [rows, seq] -> done [rows]."""
        new = ids[:, self.prompt :][:, -self.tail :]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in new.tolist()]
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=ids.device)


def choose(scores: Tensor, ids: Tensor, settings: Any, generator: torch.Generator | None = None) -> Tensor:
    """The next ids [rows, 1] from scores [rows, vocab], by `settings` (a Decoding)."""
    if settings.temperature == 0:
        return scores.argmax(-1, keepdim=True)
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(float(settings.temperature))(ids, scores)
    scores = TopKLogitsWarper(settings.top_k)(ids, scores) if settings.top_k else scores
    scores = TopPLogitsWarper(settings.top_p)(ids, scores) if settings.top_p < 1 else scores
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)


def average(scores: Tensor, count: int) -> Tensor:
    """scores [rows, count, ..., vocab] -> log of the mean of their probabilities over `count`, [rows, ..., vocab]."""
    return scores.float().softmax(-1).mean(1).log()


class Together:
    """`count` prompts of one row, side by side, as one model: every one gets the mean of their probabilities.

    With a temperature the token is drawn here, once for all prompts of a row: the others may then only take it.
    """

    def __init__(self, count: int, settings: Any) -> None:
        self.count, self.settings = count, settings

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids [rows * count * beams, seq], scores [rows * count * beams, vocab] -> scores."""
        beams = self.settings.beams
        mean = average(scores.view(-1, self.count, beams, scores.shape[-1]), self.count)
        if self.settings.temperature > 0:
            drawn = choose(mean[:, 0], ids[:: self.count], self.settings)
            mean = torch.full_like(mean, -torch.inf).scatter(-1, drawn[:, None], 0.0)
        return mean[:, None].expand(-1, self.count, -1, -1).reshape(scores.shape).to(scores.dtype)
