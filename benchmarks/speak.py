"""Banking77's shorter questions, spoken by synthesizers over noise: rows of sound with their text, made from packages.

    apt-get install espeak-ng flite
    python benchmarks/speak.py --data DIR          # reads DIR/banking77, writes DIR/spoken77

Six voices in turn, white noise 0 to 15 dB below the voice; mono 16 kHz wav files of at most 5 seconds. Questions of the
training file are train and dev rows, those of the test file test rows: no text comes twice. The same packages make the
same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import tempfile
import wave
from collections.abc import Iterator
from math import gcd
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

RATE, SECONDS = 16_000, 5.0
COUNTS = {"train": 320, "dev": 80, "test": 240}
VOICES = (
    ("flite", "slt"), ("flite", "rms"), ("flite", "awb"),
    ("espeak-ng", "en-us"), ("espeak-ng", "en-gb"), ("espeak-ng", "en-us+f3"),
)  # fmt: skip
NOISE = (15.0, 10.0, 5.0, 0.0)  # decibels of the voice above the noise
WORDS = range(4, 13)


def questions(path: Path) -> list[str]:
    """The distinct questions of four to twelve words, white space made single."""
    with path.open(encoding="utf-8", newline="") as file:
        found = [" ".join(row["text"].split()) for row in csv.DictReader(file)]
    return sorted({text for text in found if len(text.split()) in WORDS and text.isascii()})


def spoken(text: str, program: str, voice: str) -> np.ndarray:
    """The sentence as samples in [-1, 1] at 16 kHz."""
    with tempfile.TemporaryDirectory() as place:
        out = f"{place}/said.wav"
        how = ["-voice", voice, "-t", text, "-o", out] if program == "flite" else ["-v", voice, "-w", out, text]
        subprocess.run([program, *how], check=True, capture_output=True)
        with wave.open(out) as file:
            rate, raw = file.getframerate(), file.readframes(file.getnframes())
    samples = np.frombuffer(raw, dtype="<i2").astype(np.float64) / 32768
    shared = gcd(rate, RATE)
    return resample_poly(samples, RATE // shared, rate // shared)


def noisy(voice: np.ndarray, decibels: float, draw: np.random.Generator) -> np.ndarray:
    """The voice at a loudness of 0.1 over white noise."""
    voice = 0.1 * voice / np.sqrt(np.mean(voice**2))
    return voice + 0.1 * 10 ** (-decibels / 20) * draw.standard_normal(len(voice))


def write(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def rows(name: str, texts: list[str], out: Path) -> Iterator[dict[str, str]]:
    """As many rows as the set has, each a file of its own; what is too long for the window is left out."""
    made = 0
    for text in texts:
        if made == COUNTS[name]:
            return
        draw = np.random.default_rng([ord(c) for c in text])
        sound = spoken(text, *VOICES[made % len(VOICES)])
        if len(sound) <= SECONDS * RATE:
            file = f"{name}-{made:03}.wav"
            write(out / file, noisy(sound, NOISE[int(draw.integers(len(NOISE)))], draw))
            yield {"audio": file, "text": text}
            made += 1
    raise ValueError(f"{name}: only {made} of {COUNTS[name]} rows could be made")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77; spoken77 is made beside it")
    parser.add_argument("--out", type=Path, help="another place for spoken77")
    given = parser.parse_args()
    out = given.out or given.data / "spoken77"
    out.mkdir(parents=True, exist_ok=True)
    train, test = (questions(given.data / "banking77" / f"{name}.csv") for name in ("train", "test"))
    train = [text for text in train if text not in set(test)]
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(test)
    half = len(train) // 2
    for name, texts in (("train", train[:half]), ("dev", train[half:]), ("test", test)):
        found = list(rows(name, texts, out))
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{len(found)} rows in {out / name}.jsonl")


if __name__ == "__main__":
    main()
