"""Lengths: what rows and a model's positions allow of each other, told before anything is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.attach import shifted
from ..core.places import places

if TYPE_CHECKING:
    from .job import Job


def unread(job: Job) -> list[str]:
    """What is not measured on a model of pictures or sounds. ValueError for settings that need a model of text."""
    if job.media is None:
        return []
    if job.config.eval.shots:
        raise ValueError(f"eval.shots puts examples into a prompt, and {job.model.config.model_type} reads no text")
    if not job.config.eval.retention:
        return []
    return ["the model reads no text: what it forgets of general text (eval.retention) is not measured"]


def fitting(job: Job) -> None:
    """ValueError for training rows that no batch can hold, before anything is measured."""
    most = job.batching().tokens
    long = {row.where: row.length for row in job.rows if most and row.length > most}
    if long:
        longest, shown = max(long.values()), ", ".join(list(long)[:5])
        if job.media is not None:
            raise ValueError(
                f"a picture or sound takes {longest} positions of {job.model.config.model_type}, more than "
                f"train.batch_tokens {most}: give train.batch_rows, or raise train.batch_tokens to {longest}"
            )
        raise ValueError(
            f"{len(long)} rows are longer than train.batch_tokens {most} ({shown}; up to {longest} tokens). "
            f"Raise train.batch_tokens to {longest}, or lower train.max_length to {most}"
        )


def longest(job: Job) -> int:
    """train.max_length, or what the model has positions for."""
    wanted, config = job.config.train.max_length, job.model.config
    room = places(config)
    if room is None or (job.media is not None and job.media.kind == "image"):
        return wanted
    taken = shifted(job.model)
    room -= taken
    if room < 1:
        raise ValueError(
            f"the prefix leaves no room: {config.model_type} has {places(config)} positions, and the "
            f"adapter takes {taken} of them; choose a shorter one"
        )
    if room < wanted:
        job.notes.append(f"rows may have {room} tokens, not {wanted}: {config.model_type} has no more positions")
    return min(room, wanted)
