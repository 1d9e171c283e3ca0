"""Pictures and sounds of rows: read when their batch comes, through the model's own processor."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from .fields import Faults, what
from .problems import BadRow, nearest, short

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Media", "Reader", "Wordless", "keep_rows", "media", "parted", "reader", "reads"]

NOUNS = {"image": "pictures", "audio": "sound"}
EXTRAS = {"PIL.Image": ("image", "pillow"), "soundfile": ("audio", "soundfile")}
CACHE_BYTES = 512 * 2**20  # of what the processor made: rows beyond that are read anew in every epoch
FORMS = {
    "image": 'a path, {"bytes": ...}, or {"array": [height, width(, 3)] of 0 to 255}',
    "audio": 'a path, {"bytes": ...}, or {"array": [samples] in -1 to 1, "sampling_rate": Hz}',
}


@dataclass(frozen=True, eq=False)
class Media:
    """A row's picture or sound. kind: image or audio; source: a path, a file's bytes, or an array (sounds: at `rate`).

    Arrays: pictures [height, width(, channels)] of 0 to 255, sounds [samples(, channels)] in -1 to 1.
    """

    kind: str
    source: Path | bytes | np.ndarray = field(repr=False)
    rate: int | None = None
    where: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 of the file's bytes or the array's values: the same wherever the file lies."""
        source = self.source
        data = source.read_bytes() if isinstance(source, Path) else source
        found = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes() + repr(data.shape).encode()
        return hashlib.sha256(found).hexdigest()

    @property
    def name(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"[{self.kind}]"

    def bad(self, kind: str, reason: str, fix: str) -> BadRow:
        return BadRow(kind, self.where, self.kind, reason, fix)

    def file(self) -> Any:
        """What a library opens: a path, or the bytes as a file."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)

    def picture(self) -> Any:
        """A PIL image in RGB. BadRow for what no picture can be read from."""
        return self.opened(lambda found: found.convert("RGB"))

    def opened(self, then: Callable[[Any], Any] = lambda found: None) -> Any:
        """`then` of the picture, opened; BadRow where either fails."""
        pil = _needs("PIL.Image")
        try:
            if isinstance(self.source, np.ndarray):
                return then(pil.fromarray(self.source.clip(0, 255).astype(np.uint8)))
            with pil.open(self.file()) as found:
                return then(found)
        except (OSError, ValueError, TypeError, SyntaxError, pil.DecompressionBombError) as error:
            raise self.broken("picture", error, "Save it again as PNG or JPEG") from None

    def sound(self, rate: int) -> np.ndarray:
        """Samples [n] float32 at `rate` Hz, channels averaged. BadRow for what no sound can be read from."""
        try:
            samples, own = (self.source, self.rate) if isinstance(self.source, np.ndarray) else _samples(self)
        except (OSError, EOFError, RuntimeError, ValueError, wave.Error) as error:
            if isinstance(error, Missing):
                raise
            raise self.broken("sound", error, "Save it again as wav or flac") from None
        samples = np.asarray(samples, dtype=np.float32)
        samples = samples.mean(1) if samples.ndim == 2 else samples
        if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
            reason = f"the sound is no row of finite samples: shape {samples.shape}"
            raise self.bad("broken_audio", reason, "Give at least one sample, all of them numbers in -1 to 1")
        return samples if own == rate else _resampled(samples, int(own or rate), rate)

    def broken(self, noun: str, error: BaseException, fix: str) -> BadRow:
        reason = f"{short(self.name)} is no {noun} that can be read: {short(str(error) or type(error).__name__)}"
        return self.bad(f"broken_{self.kind}", reason, f"{fix}, or leave the row out")


class Missing(ValueError):
    """A library that is not installed."""


def _needs(module: str) -> Any:
    """An optional library, or Missing, which says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra, package = EXTRAS[module]
        raise Missing(f"reading {extra} files needs {package}: pip install 'deltatune[{extra}]'") from error


def _samples(sound: Media) -> tuple[np.ndarray, int]:
    """([samples, channels], Hz): plain 16-bit wav by the standard library, everything else by soundfile."""
    try:
        with wave.open(sound.file()) as file:
            if file.getsampwidth() == 2:
                raw, channels, rate = file.readframes(file.getnframes()), file.getnchannels(), file.getframerate()
                return np.frombuffer(raw, dtype="<i2").reshape(-1, channels).astype(np.float32) / 32768, rate
    except (wave.Error, EOFError):
        pass
    found, rate = _needs("soundfile").read(sound.file(), dtype="float32", always_2d=True)
    return found, rate


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    from scipy.signal import resample_poly

    shared = gcd(rate, wanted)
    return resample_poly(samples, wanted // shared, rate // shared).astype(np.float32)


# ---- a row's column --------------------------------------------------------------------------------------------------
def media(value: Any, kind: str, faults: Faults) -> Media | None:
    """The picture or sound of column `kind`; a path is relative to the data file. None after a fault."""
    fix = f"Write {FORMS[kind]}"
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return Media(kind, bytes(value["bytes"]), None, faults.where)
        value = value["path"] if value.get("array") is None and "path" in value else value
    if isinstance(value, Mapping) and value.get("array") is not None:
        return _array(value, kind, faults)
    if isinstance(value, bytes):
        return Media(kind, value, None, faults.where)
    if value is None or value == "":
        faults.add("null_field", kind, f"the {kind} is missing", f"{fix}, or leave the row out")
    elif not isinstance(value, str):
        faults.add("data_type", kind, f"the {kind} is {what(value)}: {short(value)}", fix)
    elif "://" in value:
        faults.add("data_type", kind, f"{short(value)} is an address, not a file", "Download it and give the path")
    else:
        return _file(value, kind, faults)
    return None


def _file(value: str, kind: str, faults: Faults) -> Media | None:
    home = Path(faults.where.rpartition(":")[0]).parent
    path = home / Path(value).expanduser()
    if path.is_file():
        return Media(kind, path, None, faults.where)
    if path.is_dir():
        faults.add("data_type", kind, f"{short(value)} is a folder", "Give the file in it")
        return None
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    fix = f"Paths are relative to the data file's folder, {home}.{nearest(path.name, beside)}"
    faults.add("missing_file", kind, f"there is no file {short(value)}", fix)
    return None


def _array(value: Mapping[str, Any], kind: str, faults: Faults) -> Media | None:
    rate = value.get("sampling_rate")
    try:
        found = np.asarray(value["array"], dtype=np.float32)
    except (ValueError, TypeError):
        found = np.zeros(0, dtype=np.float32)
    sizes = (1, 2) if kind == "audio" else (2, 3)
    if found.ndim not in sizes or not found.size:
        faults.add("data_type", kind, f"the array is none of numbers with {sizes[0]} or {sizes[1]} axes", FORMS[kind])
    elif kind == "audio" and (isinstance(rate, bool) or not isinstance(rate, int) or rate < 1):
        faults.add(
            "missing_field", "audio.sampling_rate", f"it is {short(rate)}, not a whole number of Hz", FORMS[kind]
        )
    else:
        return Media(kind, found, rate if kind == "audio" else None, faults.where)
    return None


def keep_rows(rows: Iterable[Mapping[str, Any]], folder: Path | str) -> str:
    """Rows held in Python -> a data file for `train(data=...)`: `folder`/rows.jsonl, its pictures and sounds beside it.

    `image`: bytes of a file, an array [height, width(, 3)] of 0 to 255, or a PIL image. `audio`: bytes, or
    {"array": [samples] in -1 to 1, "sampling_rate": Hz}. Every other column as JSON. Returns the file's path.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({k: _kept(k, v, place / f"{i:06}") for k, v in row.items()}) for i, row in enumerate(rows)]
    path = place / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def _kept(column: str, value: Any, path: Path) -> Any:
    """A picture or sound as the name of the file it is written to; any other value as it is."""
    if column not in NOUNS or isinstance(value, str | Path):
        return str(Path(value).absolute()) if column in NOUNS else value
    if isinstance(value, bytes):
        path.write_bytes(value)
        return path.name
    if column == "image":
        path = path.with_suffix(".png")
        picture = value if hasattr(value, "save") else _needs("PIL.Image").fromarray(np.asarray(value).astype(np.uint8))
        picture.save(path)
        return path.name
    faults = Faults(str(path))
    found = media(value, column, faults)
    if found is None:
        raise faults[0]
    samples = np.asarray(found.source)
    path = path.with_suffix(".wav")
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1] if samples.ndim == 2 else 1, 2, found.rate or 0, 0, "NONE", ""))
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return path.name


# ---- a model's processor ---------------------------------------------------------------------------------------------
def reads(config: Any) -> str | None:
    """'image' or 'audio' where a model of this configuration reads that, None where it reads text."""
    from transformers.models.auto import modeling_auto as auto

    if type(config) in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return "image"
    heard = (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING)
    return "audio" if any(type(config) in mapping for mapping in heard) else None


def reader(config: Any, processor: Any = None) -> Reader | None:
    """What reads the pictures or sounds of a model of this configuration; None for models of text."""
    kind = reads(config)
    return Reader(config, kind, processor) if kind else None


class Reader:
    """Media -> the model's own inputs, without the batch axis; the first CACHE_BYTES of them are kept in memory."""

    def __init__(self, config: Any, kind: str, processor: Any = None):
        self.config, self.kind, self.given = config, kind, processor
        self.kept: WeakKeyDictionary[Media, dict[str, Tensor]] = WeakKeyDictionary()  # gone with its row
        self.room = CACHE_BYTES

    @cached_property
    def processor(self) -> Any:
        """The processor given, or the one that lies beside the model. ValueError where there is none."""
        if self.given is not None:
            return self.given
        import transformers

        name = getattr(self.config, "_name_or_path", "")
        auto = transformers.AutoImageProcessor if self.kind == "image" else transformers.AutoFeatureExtractor
        if self.kind == "image":
            _needs("PIL.Image")
        try:
            return auto.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            fix = f"save one there ({auto.__name__}.save_pretrained), or give train(..., tokenizer=processor)"
            raise ValueError(f"no {self.kind} processor at {name or 'the model in memory'!r}: {fix}") from error

    @cached_property
    def size(self) -> int:
        """Positions that one picture or sound takes in the model: what `batch_tokens` counts."""
        config = getattr(self.config, "vision_config", self.config)
        patch, side = getattr(config, "patch_size", None), getattr(config, "image_size", None)
        if isinstance(patch, int) and isinstance(side, int):
            return (side // patch) ** 2 + 1
        return int(getattr(config, "max_source_positions", 1))

    def row(self, given: Media | None, where: str) -> dict[str, Any]:
        """The fields of an `Encoded` row. BadRow for a row without media, of another kind, unreadable, or too long.

        As long as there is room in memory the row is read here, else only opened: pictures by their first bytes.
        """
        if given is None or given.kind != self.kind:
            have = "text alone" if given is None else NOUNS[given.kind]
            reason = f"the model ({self.config.model_type}) reads {NOUNS[self.kind]}, the row holds {have}"
            raise BadRow("wrong_input", where, self.kind, reason, f"Give a column {self.kind!r}, or another model")
        if self.room > 0:
            self(given)
        elif self.kind == "image":
            given.opened()
        else:
            rate = int(self.processor.sampling_rate)
            self.fits(given, len(given.sound(rate)) / rate)
        return {"read": partial(self, given), "size": self.size}

    def __call__(self, given: Media) -> dict[str, Tensor]:
        if given not in self.kept:
            found = self.made(given)
            size = sum(t.numel() * t.element_size() for t in found.values())
            if size > self.room:
                return found
            self.room -= size
            self.kept[given] = found
        return self.kept[given]

    def made(self, given: Media) -> dict[str, Tensor]:
        """What the processor makes of one picture or sound."""
        if self.kind == "image":
            found = self.processor(images=given.picture(), return_tensors="pt")
            return {"pixel_values": found["pixel_values"][0]}
        rate = int(self.processor.sampling_rate)
        samples = given.sound(rate)
        self.fits(given, len(samples) / rate)
        found = self.processor(samples, sampling_rate=rate, return_tensors="pt")
        name = self.processor.model_input_names[0]
        return {name: self.framed(found[name][0])}

    def fits(self, given: Media, seconds: float) -> None:
        window = getattr(self.processor, "chunk_length", None)
        if window and seconds > window:
            reason = f"{seconds:.1f} s of sound, and the model hears {window:g} s"
            raise given.bad("too_long", reason, f"Cut it into pieces of at most {window:g} s, each with its own text")

    def framed(self, features: Tensor) -> Tensor:
        """Features as they are; ValueError where the processor's window is not the model's."""
        frames = 2 * int(getattr(self.config, "max_source_positions", 0))  # two by the stride of the convolutions
        if self.config.model_type == "whisper" and features.shape[-1] != frames:
            seconds = frames * self.processor.hop_length / self.processor.sampling_rate
            raise ValueError(
                f"the processor makes {features.shape[-1]} frames, the model reads {frames}: "
                f"give it chunk_length={seconds:g} (seconds)"
            )
        return features


class Wordless:
    """In the place of a tokenizer, for a model that reads pictures or sounds and writes no text."""

    pad_token_id = eos_token_id = bos_token_id = eos_token = mask_token_id = chat_template = None
    all_special_tokens: tuple[str, ...] = ()
    all_special_ids: tuple[int, ...] = ()
    is_fast = True

    def __call__(self, *texts: Any, **options: Any) -> Any:
        raise ValueError("this model reads no text: give rows with pictures or sounds (columns image or audio)")

    def add_tokens(self, tokens: Sequence[str]) -> int:
        return self(*tokens) if tokens else 0

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        return self(*tokens) if tokens else []

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True


def parted(given: Any) -> tuple[Any, Any]:
    """(tokenizer, processor) of what a caller gives: a tokenizer, a processor of media, or one that holds both."""
    processor = getattr(given, "image_processor", None) or getattr(given, "feature_extractor", None)
    if processor is not None:
        return getattr(given, "tokenizer", None) or Wordless(), processor
    return (
        (Wordless(), given) if hasattr(given, "model_input_names") and not hasattr(given, "decode") else (given, None)
    )
