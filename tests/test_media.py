"""Rows of pictures and sounds: read, refused with a place and a way out, trained, measured, opened again."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest
import torch
import transformers as hf

import tiny_run as t
from deltatune import LoRA, Prefix, attach, keep_rows, train
from deltatune.config import Config
from deltatune.core.delta import Refusal
from deltatune.data.batch import pack, pad
from deltatune.data.check import leaks
from deltatune.data.encode import Encoding
from deltatune.data.example import Example
from deltatune.data.formats import load, sniff
from deltatune.data.media import Media, Reader, Wordless, parted, reader, reads
from deltatune.evaluate.generate import Decoding, answers, generate
from deltatune.evaluate.hear import opening
from deltatune.evaluate.metrics import METRICS, for_task
from deltatune.methods.freeze import Head
from deltatune.objectives import QA, SFT, Classify
from deltatune.train import memory
from deltatune.train.job import prepare
from deltatune.train.run import evaluate_file, open_adapted, run
from models import BEYOND_TEXT, IMAGE, MELS, tiny
from test_commands import call

RATE = 16_000
FRAMES = 100  # a window of one second, 10 ms a frame
LETTERS = "abcdefgh"


def pil():
    return pytest.importorskip("PIL.Image")


# ---- models and rows -------------------------------------------------------------------------------------------------
def ears(seconds=1):
    return hf.WhisperFeatureExtractor(feature_size=MELS, chunk_length=seconds)


def listener(task="lm"):
    return tiny("whisper", task, max_source_positions=FRAMES // 2)


def speech_words():
    """A letter a token, between the tokens that a Whisper's text begins and ends with."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate(["<pad>", "<bos>", "</s>", "<start>", "<notimes>", "<unk>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> <notimes> $A </s>", special_tokens=[("<start>", 3), ("<notimes>", 4), ("</s>", 2)]
    )
    raw.add_special_tokens(["<start>", "<notimes>"])
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def whisper(folder, task="lm"):
    model = listener(task)
    model.save_pretrained(folder)
    ears().save_pretrained(folder)
    speech_words().save_pretrained(folder)
    return folder


def eyes(family):
    pil()
    kind = {"vit": hf.ViTImageProcessorPil, "clip": hf.CLIPImageProcessorPil}[family]
    size = {"height": IMAGE, "width": IMAGE}
    return kind(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def sighted(folder, family="vit"):
    tiny(family, "classify").save_pretrained(folder)
    eyes(family).save_pretrained(folder)
    return folder


def tone(path, hertz, seconds=0.15, rate=RATE, channels=1):
    wave_form = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(np.repeat((wave_form * 32767).astype("<i2"), channels).tobytes())
    return wave_form


def sounds(folder, count=16, labelled=False):
    """Low tones are 'a b', high ones 'c d e'."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        high = i % 2
        tone(folder / f"{i}.wav", (3000 if high else 300) + 7 * i)
        said = {"label": ("low", "high")[high]} if labelled else {"text": ("a b", "c d e")[high]}
        rows.append({"audio": f"{i}.wav", **said})
    return t.lines(folder / "rows.jsonl", rows)


def pictures(folder, count=16):
    """Bright or dark, over noise."""
    folder.mkdir(exist_ok=True)
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        values = draw.integers(0, 60, (12, 10, 3)) + 180 * (i % 2)
        pil().fromarray(values.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": ("dark", "bright")[i % 2]})
    return t.lines(folder / "rows.jsonl", rows)


def settings(model, rows, objective, **over):
    method = over.pop("method", {"lora": {"r": 4}})
    return Config(
        model=str(model), method=method, objective=objective, data={"train": rows, "eval": rows},
        train={"steps": 12, "batch_rows": 8, "lr": 1e-2, "precision": "fp32", **over},
        eval={"retention": False, "max_new_tokens": 6},
    )  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------
KINDS = {  # columns -> (kind of row, kind of media)
    ("image", "label"): ("classification", "image"),
    ("audio", "label"): ("classification", "audio"),
    ("audio", "text"): ("transcription", "audio"),
    ("audio", "sentence", "id"): ("transcription", "audio"),
    ("audio", "label", "text"): ("classification", "audio"),
    ("audio",): ("audio", "audio"),
    ("image",): ("image", "image"),
    ("prompt", "completion", "image"): ("pair", None),
    ("text", "label"): ("classification", None),
}


@pytest.mark.parametrize("columns", KINDS)
def test_a_rows_columns_tell_what_it_is(columns, tmp_path):
    tone(tmp_path / "x", 300)
    (example,) = load(t.lines(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "x")]))[0]
    assert (example.kind, example.media and example.media.kind) == KINDS[columns]


def test_the_formats_of_pictures_and_sounds_are_told_by_their_columns():
    names = {sniff(columns) for columns, (_, media) in KINDS.items() if media}
    assert names == {"image_classification", "audio_classification", "transcription", "media"}


def test_a_path_is_relative_to_its_file_wherever_the_run_begins(tmp_path, monkeypatch):
    rows = sounds(tmp_path / "deep", 2)
    monkeypatch.chdir(tmp_path)
    for ref in (rows, "deep/rows.jsonl"):
        first = load(ref)[0][0]
        assert first.media.sound(RATE).shape == (2400,)


FAULTS = {
    "a file that is not there": ({"image": "1.pnk", "label": 1}, "image: there is no file '1.pnk'", "mean '1.png'"),
    "a folder": ({"audio": "..", "text": "a"}, "audio: '..' is a folder", "Give the file"),
    "a number": ({"image": 7, "label": 1}, "image: the image is a number: 7", "Write a path"),
    "nothing": ({"audio": None, "text": "a"}, "audio: the audio is missing", "leave the row out"),
    "an address": ({"image": "https://x.y/z.png", "label": 1}, "is an address, not a file", "Download it"),
    "an empty text": ({"audio": "1.wav", "text": " "}, "text: the text is empty", "Write a text"),
    "an empty label": ({"image": "1.png", "label": ""}, "label: the label is empty", "Fill it in"),
    "words for samples": ({"audio": {"array": ["a"], "sampling_rate": 9}, "text": "a"}, "none of numbers", "samples"),
    "no sampling rate": ({"audio": {"array": [0.1]}, "text": "a"}, "sampling_rate: it is None", "sampling_rate"),
    "a flat picture": ({"image": {"array": [1, 2]}, "label": 1}, "with 2 or 3 axes", "height, width"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_a_row_is_told_with_its_place_and_a_way_out(name, tmp_path):
    row, reason, fix = FAULTS[name]
    (tmp_path / "1.png").write_bytes(b"a picture")
    tone(tmp_path / "1.wav", 300)
    with pytest.raises(ValueError) as told:
        load(t.lines(tmp_path / "rows.jsonl", [row]))
    for part in ("rows.jsonl:1", reason, fix):
        assert part in str(told.value)


def parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_bytes_and_arrays_of_a_column_file_hold_what_the_files_held(tmp_path):
    pil().new("RGB", (4, 4), (9, 200, 30)).save(tmp_path / "1.png")
    form = tone(tmp_path / "1.wav", 300)
    held = {"bytes": (tmp_path / "1.png").read_bytes(), "path": "gone.png"}
    (row,) = load(parquet(tmp_path / "a.parquet", [{"image": held, "label": "x"}]))[0]
    assert np.asarray(row.media.picture())[0, 0].tolist() == [9, 200, 30]
    held = {"array": form.tolist(), "sampling_rate": RATE}
    (row,) = load(parquet(tmp_path / "b.parquet", [{"audio": held, "text": "a"}]))[0]
    np.testing.assert_allclose(row.media.sound(RATE), form, atol=1e-6)


# ---- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rate", "channels"), [(RATE, 1), (RATE, 2), (48_000, 1), (8_000, 2)])
def test_sound_of_any_rate_and_channels_becomes_the_models(rate, channels, tmp_path):
    tone(tmp_path / "x.wav", 300, 0.15, rate, channels)
    found = Media("audio", tmp_path / "x.wav").sound(RATE)
    wanted = 0.3 * np.sin(2 * np.pi * 300 * np.arange(2400) / RATE)
    assert found.shape == (2400,)
    np.testing.assert_allclose(found[200:-200], wanted[200:-200], atol=5e-3)


@pytest.mark.parametrize(("name", "kind"), [("x.flac", "PCM_16"), ("x.wav", "FLOAT"), ("x.ogg", "VORBIS")])
def test_other_files_are_read_by_soundfile(name, kind, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    form = tone(tmp_path / "plain.wav", 300)
    soundfile.write(tmp_path / name, form, RATE, subtype=kind)
    np.testing.assert_allclose(Media("audio", tmp_path / name).sound(RATE), form, atol=3e-2)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_picture_of_any_mode_is_read_as_rgb(mode, tmp_path):
    pil().new("RGB", (5, 4), (200, 200, 200)).convert(mode).save(tmp_path / "x.tiff")
    found = np.asarray(Media("image", tmp_path / "x.tiff").picture())
    assert found.shape == (4, 5, 3)
    assert (abs(found.astype(int) - 200) < 6).all()


@pytest.mark.parametrize(
    ("module", "kind", "extra"), [("PIL.Image", "image", "image"), ("soundfile", "audio", "audio")]
)
def test_a_missing_library_is_named_with_what_installs_it(module, kind, extra, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "x").write_bytes(b"fLaC")
    held = Media(kind, tmp_path / "x")
    with pytest.raises(ValueError, match=rf"pip install 'deltatune\[{extra}\]'"):
        held.picture() if kind == "image" else held.sound(RATE)


@pytest.mark.parametrize(("kind", "noun"), [("image", "picture"), ("audio", "sound")])
def test_a_damaged_file_is_told_with_its_row_before_training(kind, noun, tmp_path):
    pytest.importorskip("soundfile")
    rows = pictures(tmp_path / "d", 4) if kind == "image" else sounds(tmp_path / "d", 4, labelled=True)
    (tmp_path / "d" / f"2.{'png' if kind == 'image' else 'wav'}").write_bytes(b"\x89PNG and no more")
    model = sighted(tmp_path / "m") if kind == "image" else whisper(tmp_path / "m", "classify")
    with pytest.raises(
        ValueError, match=rf"rows.jsonl:3: .broken_{kind}. {kind}: .* is no {noun} that can be read"
    ) as told:
        run(settings(model, rows, "classify"), out=tmp_path / "run")
    assert "Save it again" in str(told.value)


# ---- a model's processor ---------------------------------------------------------------------------------------------
def test_which_models_read_what():
    found = {name: reads(tiny(name).config) for name in ("vit", "clip", "whisper", "bert", "llama", "t5")}
    assert found == {"vit": "image", "clip": "image", "whisper": "audio", "bert": None, "llama": None, "t5": None}


def test_a_row_is_what_the_processor_makes_of_it(tmp_path):
    tone(tmp_path / "x.wav", 300)
    pil().effect_noise((9, 9), 80).save(tmp_path / "x.png")
    heard = Reader(listener().config, "audio", ears())
    seen = Reader(tiny("vit").config, "image", eyes("vit"))
    sound, image = Media("audio", tmp_path / "x.wav"), Media("image", tmp_path / "x.png")
    wanted = ears()(sound.sound(RATE), sampling_rate=RATE, return_tensors="pt")["input_features"][0]
    torch.testing.assert_close(heard(sound)["input_features"], wanted, rtol=0, atol=0)
    assert wanted.shape == (MELS, FRAMES)
    wanted = eyes("vit")(images=image.picture(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(seen(image)["pixel_values"], wanted, rtol=0, atol=0)
    assert (heard.size, seen.size) == (50, 5)  # 100 frames by stride 2; 4 patches and the class token


def test_rows_are_kept_while_there_is_room_and_read_anew_beyond(tmp_path, monkeypatch):
    for i in range(3):
        tone(tmp_path / f"{i}.wav", 300 + i)
    heard, made = Reader(listener().config, "audio", ears()), []
    heard.room = 2 * MELS * FRAMES * 4
    monkeypatch.setattr(heard, "made", lambda m, own=heard.made: (made.append(m), own(m))[1])
    media = [Media("audio", tmp_path / f"{i}.wav") for i in range(3)]
    rows = [heard.row(m, "x:1") for m in media]
    first = [row["read"]() for row in rows]
    again = [row["read"]() for row in rows]
    assert [made.count(m) for m in media] == [1, 1, 2]
    assert all(torch.equal(a["input_features"], b["input_features"]) for a, b in zip(first, again, strict=True))


def test_a_sound_beyond_the_window_and_a_processor_of_another_one_are_refused(tmp_path):
    tone(tmp_path / "x.wav", 300, seconds=1.5)
    config = listener().config
    with pytest.raises(ValueError, match=r"x:1: audio: 1.5 s of sound, and the model hears 1 s. Cut it"):
        Reader(config, "audio", ears()).row(Media("audio", tmp_path / "x.wav", None, "x:1"), "x:1")
    with pytest.raises(ValueError, match=r"makes 200 frames, the model reads 100: give it chunk_length=1 "):
        Reader(config, "audio", ears(2)).row(Media("audio", tmp_path / "x.wav", None, "x:1"), "x:1")


def test_a_processor_that_is_nowhere_is_asked_for(tmp_path):
    rows = sounds(tmp_path / "d", 2)
    whisper(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no audio processor at .*AutoFeatureExtractor"):
        run(settings(tmp_path / "m", rows, "sft"), out=tmp_path / "run")


def test_a_processor_that_holds_both_is_parted():
    both = hf.WhisperProcessor(ears(), speech_words())
    assert parted(both) == (both.tokenizer, both.feature_extractor)
    words, _ = parted(eyes("vit"))
    assert words.eos_token_id is None
    assert parted(speech_words())[1] is None
    with pytest.raises(ValueError, match="reads no text"):
        words("hello")


# ---- wrong pairs -----------------------------------------------------------------------------------------------------
WRONG = {
    "pictures for a model of text": ("bert", "image", "classify", "the model reads text, the row holds an image"),
    "sound for a model of text": ("llama", "audio", "sft", "the model reads text, the row holds an audio"),
    "pictures for a Whisper": ("whisper", "image", "classify", r"reads sound, the row holds pictures"),
    "sound for a ViT": ("vit", "label", "classify", r"reads pictures, the row holds sound"),
    "text for a ViT": ("vit", "text", "classify", r"reads pictures, the row holds text alone"),
    "labels where a Whisper writes": ("whisper", "label", "sft", "a 'classification' row has no text"),
    "pictures to write from": ("vit", "image", "sft", "vit models.*pictures.*objective classify.* image and label"),
    "pictures with two towers": ("clip", "image", "sft", "clip models.*objective classify.* image and label"),
    "a cloze over pictures": ("vit", "image", {"cloze": {"labels": {"dark": "a", "bright": "b"}}}, "objective class"),
    "words asked of a sound": ("whisper", "audio", {"sft": {"template": "{prompt}"}}, "a template asks with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_a_model_cannot_take_are_refused_before_training(name, tmp_path):
    family, kind, objective, reason = WRONG[name]
    task = "classify" if objective == "classify" else "lm"
    made = {
        "bert": lambda: t.masked_model(tmp_path / "m", task), "llama": lambda: t.chat_model(tmp_path / "m"),
        "vit": lambda: sighted(tmp_path / "m"), "clip": lambda: sighted(tmp_path / "m", "clip"),
        "whisper": lambda: whisper(tmp_path / "m", task),
    }  # fmt: skip
    rows = {
        "image": pictures, "audio": sounds, "label": lambda f, n: sounds(f, n, labelled=True),
        "text": lambda f, n: (f.mkdir(), t.label_rows(f / "rows.jsonl", n))[1],
    }[kind](tmp_path / "d", 4)  # fmt: skip
    with pytest.raises(ValueError, match=reason):
        run(settings(made[family](), rows, objective), out=tmp_path / "run")


def test_a_head_that_no_model_of_a_kind_has_is_refused_before_its_folder_is_read(tmp_path):
    with pytest.raises(Refusal, match=r"vit models do not have.*objective classify"):
        QA().load(tmp_path / "nowhere", tiny("vit").config)


def test_rows_without_a_place_in_a_batch_of_tokens_say_what_helps(tmp_path):
    config = settings(whisper(tmp_path / "m"), sounds(tmp_path / "d", 4), "sft", batch_rows=None, batch_tokens=8)
    with pytest.raises(ValueError, match=r"takes 50 positions of whisper, more than train.batch_tokens 8: give"):
        run(config, out=tmp_path / "run")


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_a_picture_counts_as_the_positions_that_it_takes(tmp_path, family):
    """4 patches and the class token; what the model has positions for in a text (32 of CLIP's) says nothing of it."""
    model, rows = sighted(tmp_path / "m", family), pictures(tmp_path / "d", 7)
    job = prepare(settings(model, rows, "classify", batch_rows=None, batch_tokens=14))
    assert [row.length for row in job.rows] == [5] * 7
    assert sorted(map(len, job.sampler().plan(0))) == [1, 2, 2, 2]  # 2 rows of 5 in 14
    assert job.encoding.max_length == 1024
    assert not [note for note in job.notes if "positions" in note]
    by_rows = prepare(settings(model, rows, "classify", batch_rows=3))
    by_tokens, three = (memory.estimate(one)["activations"] for one in (job, by_rows))
    assert by_tokens * 15 == three * 14  # 3 rows of 5


def test_a_sound_counts_by_the_positions_of_its_text_too(tmp_path):
    """Whisper's answers end where its decoder does."""
    job = prepare(settings(whisper(tmp_path / "m"), sounds(tmp_path / "d", 4), "sft"))
    assert [row.length for row in job.rows] == [50] * 4
    assert job.encoding.max_length == 32
    assert [note for note in job.notes if "rows may have 32 tokens, not 1024" in note]


def test_pictures_and_sounds_are_not_packed(tmp_path):
    config = settings(whisper(tmp_path / "m"), sounds(tmp_path / "d", 4), "sft", batch_rows=None, batch_tokens=640)
    packed = config.model_copy(update={"data": config.data.model_copy(update={"packing": "on"})})
    with pytest.raises(ValueError, match="packing: on does not work for sft on Whisper"):
        run(packed, out=tmp_path / "run")
    row = Classify(labels=("a", "b")).encode(
        Example("x:1", media=Media("image", np.zeros((4, 4, 3))), label="a"), Wordless(),
        Encoding(media=Reader(tiny("vit").config, "image", eyes("vit"))),
    )  # fmt: skip
    with pytest.raises(ValueError, match="a picture or sound cannot be packed"):
        pack(row)


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["vit", "clip"])
def test_pictures_are_classified_from_the_command_line_and_the_adapter_is_used_again(family, tmp_path):
    rows, model = pictures(tmp_path / "d"), sighted(tmp_path / "m", family)
    words = ["--model", model, "--data", rows, "--eval", rows, "--objective", "classify", "--out", tmp_path / "run"]
    sets = ["train.steps=20", "train.batch_rows=8", "train.lr=1e-2", "train.precision=fp32"]
    call("train", *words, "--method", "{lora: {r: 4}}", *(x for s in sets for x in ("--set", s)))
    measured = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert measured["after"]["accuracy"] == 1.0
    assert json.loads((tmp_path / "run" / "verified.json").read_text())["status"] == "done"
    again = json.loads(call("eval", "--adapter", tmp_path / "run", "--data", rows, "--json").stdout)
    assert again["accuracy"] == 1.0
    assert again["loss"] == pytest.approx(measured["after"]["loss"], abs=1e-6)
    assert call("data", "check", rows, "--model", model).stdout.count("16 usable (16 classification)")
    bare = t.lines(tmp_path / "d" / "bare.jsonl", [{"image": f"{i}.png"} for i in range(4)])
    asked = json.loads(call("predict", "--adapter", tmp_path / "run", "--data", bare, "--json").stdout)
    assert [one["label"] for one in asked["predictions"]] == ["dark", "bright"] * 2


def test_a_classifier_of_other_classes_gets_a_new_head(tmp_path):
    """sighted() saves three classes, the rows have two: the head is drawn anew, the rest is kept."""
    made = Classify().fit(load(pictures(tmp_path / "d", 4))[0]).load(sighted(tmp_path / "m"), tiny("vit").config)
    assert made.classifier.out_features == 2
    kept, other = made.vit.state_dict(), tiny("vit", "classify").vit.state_dict()
    assert all(torch.equal(kept[k], other[k]) for k in kept)


def test_rows_in_python_are_written_trained_on_and_named(tmp_path):
    pil()
    draw = np.random.default_rng(0)
    rows = [{"image": draw.integers(0, 60, (8, 8)) + 180 * (i % 2), "label": i % 2, "idx": i} for i in range(16)]
    path = keep_rows(rows, tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "rows.jsonl").read_text().splitlines()[3]) == {
        "image": "000003.png", "label": 1, "idx": 3,
    }  # fmt: skip
    model = tiny("vit", "classify", num_labels=2)
    attach(model, [LoRA(r=4), Head()], name="mine")
    with pytest.raises(ValueError, match=r"deltatune.keep_rows\(rows, folder\)"):
        train(model, Classify(), data=rows, adapter="mine")
    done = train(
        model, Classify(), data=path, eval=path, adapter="mine", out=tmp_path / "run", tokenizer=eyes("vit"),
        steps=20, batch_rows=8, lr=1e-2, observers=(),
    )  # fmt: skip
    assert json.loads((done.dir / "eval.json").read_text())["after"]["accuracy"] == 1.0


def test_sounds_in_python_come_back_as_they_were(tmp_path):
    form = tone(tmp_path / "x.wav", 300)
    held = (tmp_path / "x.wav").read_bytes()
    made = [{"array": form, "sampling_rate": RATE}, held, str(tmp_path / "x.wav")]
    found = load(keep_rows([{"audio": one, "text": "a"} for one in made], tmp_path / "kept"))[0]
    for example in found:
        np.testing.assert_allclose(example.media.sound(RATE), form, atol=1e-4)
    assert found[1].media.digest == found[2].media.digest


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """A Whisper with the three prefixes and LoRA, trained to write what it hears: (rows, run folder)."""
    place = tmp_path_factory.mktemp("heard")
    rows = sounds(place / "d")
    config = settings(
        whisper(place / "m"),
        rows,
        "sft",
        method=[{"prefix": {"length": 4}}, {"lora": {"r": 8, "targets": ["all"]}}],
        steps=80,
    )
    run(config, out=place / "run")
    return rows, place / "run"


def test_a_whisper_learns_to_write_what_it_hears(heard):
    measured = json.loads((heard[1] / "eval.json").read_text())
    assert measured["metric"] == "wer"
    assert not measured["higher_is_better"]
    assert measured["before"]["wer"] > 0.9
    assert measured["after"]["wer"] < 0.2
    assert measured["gain"]["wer"][2] < 0
    assert json.loads((heard[1] / "verified.json").read_text())["status"] == "done"


def test_its_adapter_is_opened_measured_and_transcribes_rows_without_text(heard, tmp_path):
    rows, folder = heard
    model, words, record = open_adapted(str(folder.parent / "m"), folder / "adapter")
    section = Config(model="any", data="any", eval={"retention": False, "max_new_tokens": 6}).eval
    again = evaluate_file(model, words, record, rows, section)
    assert again["wer"] == json.loads((folder / "eval.json").read_text())["after"]["wer"]
    bare = t.lines(folder.parent / "d" / "bare.jsonl", [{"audio": "0.wav"}, {"audio": "1.wav"}])
    said = generate(model, words, load(bare)[0], Decoding(max_new_tokens=6))
    told = json.loads(call("generate", "--adapter", folder, "--data", bare, "--max-new-tokens", 6, "--json").stdout)
    assert [row["answer"] for row in told["answers"]] == said
    assert told["answers"][0]["prompt"].endswith("0.wav")
    with pytest.raises(ValueError, match="writes what it hears: give rows with a column audio"):
        generate(model, words, ["hello"])


def test_generation_is_the_greedy_search_step_by_step_alone_and_in_a_batch(heard):
    rows, folder = heard
    model, words, _ = open_adapted(str(folder.parent / "m"), folder / "adapter")
    examples = load(rows)[0][:3]
    found = reader(model.config)
    texts = []
    for example in examples:
        ids = torch.tensor([opening(model, words)])
        assert ids.tolist() == [[3, 4]]
        given = {name: x[None] for name, x in found(example.media).items()}
        for _ in range(6):
            with torch.no_grad():
                best = model(**given, decoder_input_ids=ids, use_cache=False).logits[0, -1].argmax()
            if int(best) == words.eos_token_id:
                break
            ids = torch.cat([ids, best[None, None]], 1)
        texts.append(words.decode(ids[0], skip_special_tokens=True))
    settings = Decoding(max_new_tokens=6)
    assert answers(model, words, examples, settings).texts == texts
    assert [generate(model, words, [e], settings)[0] for e in examples] == texts


def test_the_decoders_targets_and_the_loss_are_the_models_own(tmp_path):
    """Labels without the start token, and the loss that transformers gives for them."""
    example = load(sounds(tmp_path / "d", 1))[0][0]
    model = listener()
    encoding = Encoding(decoder=True, media=Reader(model.config, "audio", ears()))
    (row,) = SFT().encode(example, speech_words(), encoding)
    assert (row.ids, row.labels, row.length) == ((), (4, 6, 7, 2), 50)
    batch = pad([row, row], 0)
    assert {name: tuple(x.shape) for name, x in batch.inputs.items()} == {"input_features": (2, MELS, FRAMES)}
    loss, _ = SFT().loss(model, batch)
    wanted = model(**batch.inputs, labels=batch.labels).loss * batch.targets
    torch.testing.assert_close(loss, wanted)


def test_sounds_are_classified_by_a_whispers_encoder(tmp_path):
    rows = sounds(tmp_path / "d", labelled=True)
    config = settings(whisper(tmp_path / "m", "classify"), rows, "classify", steps=30)
    run(config, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["after"]["accuracy"] == 1.0


def test_a_model_of_pictures_with_a_prefix_trains_in_python(tmp_path):
    rows = pictures(tmp_path / "d")
    model = hf.AutoModelForImageClassification.from_pretrained(
        sighted(tmp_path / "m"), num_labels=2, ignore_mismatched_sizes=True
    )
    attach(model, [Prefix(3), Head()], name="mine")
    done = train(
        model, Classify(), data=rows, adapter="mine", out=tmp_path / "run", steps=3, batch_rows=8, observers=()
    )
    kept = json.loads((done.dir / "eval.json").read_text())
    assert np.isfinite(kept["after"]["loss"])
    assert kept["retention"] == {}


def test_equal_pictures_leak_whatever_their_names(tmp_path):
    rows = pictures(tmp_path / "d", 4)
    held = t.lines(tmp_path / "d" / "held.jsonl", [{"image": "1.png", "label": "bright"}])
    (tmp_path / "d" / "other.png").write_bytes((tmp_path / "d" / "3.png").read_bytes())
    again = t.lines(tmp_path / "d" / "again.jsonl", [{"image": "other.png", "label": "bright"}])
    assert leaks(load(rows)[0], load(held)[0]).count == 1
    assert leaks(load(rows)[0], load(again)[0]).count == 1
    assert leaks(load(rows)[0][:3], load(again)[0]).count == 0


# ---- word errors -----------------------------------------------------------------------------------------------------
# prediction, reference, errors and words as written, errors and words normalised
WER = [
    ("the cat sat", "the cat sat", (0, 3), (0, 3)),
    ("the cat", "the cat sat", (1, 3), (1, 3)),
    ("the fat cat sat", "the cat sat", (1, 3), (1, 3)),
    ("a b c", "c a b", (2, 3), (2, 3)),
    ("", "one two", (2, 2), (2, 2)),
    ("x x x x", "one", (4, 1), (4, 1)),
    ("My card's lost!", "my cards lost", (3, 3), (0, 3)),
    ("top-up  now", "top up now", (2, 3), (0, 3)),
    ("b", ["a", "b c"], (1, 2), (1, 2)),
]


@pytest.mark.parametrize(("said", "true", "plain", "normal"), WER)
def test_word_errors(said, true, plain, normal):
    assert METRICS["wer"].table([said], [true])[0].tolist() == list(plain)
    assert METRICS["wer_normalised"].table([said], [true])[0].tolist() == list(normal)


def test_the_rate_is_pooled_over_rows_not_averaged():
    said, true = ["a", "a b c d e f g h x"], ["x", "a b c d e f g h i"]
    assert METRICS["wer"].compute(said, true) == pytest.approx(2 / 10)


def test_rows_of_sound_and_text_are_measured_by_word_errors():
    sound = Media("audio", np.zeros(4), RATE)
    assert for_task("sft", [Example("x:1", media=sound, completion="a")])[0] == "wer"
    assert for_task("sft", [Example("x:1", prompt="p", completion="a")])[0] == "exact_match"


def test_every_family_beyond_text_is_known_here():
    assert set(BEYOND_TEXT) == {"vit", "clip", "whisper"}
