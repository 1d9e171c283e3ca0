"""The quickstart's rows: US addresses to one line of JSON, and prose to see what tuning forgets.

Real addresses, labelled token by token by people (usaddress, MIT); the prose is in the public domain.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltatune import fetch, zoo

FIELDS = ("name", "building", "number", "street", "unit", "box", "city", "state", "zip", "country")
FIELD_OF = {  # a label's beginning -> the field it belongs to
    "Recipient": "name",
    "BuildingName": "building",
    "LandmarkName": "building",
    "AddressNumber": "number",
    "StreetName": "street",
    "Occupancy": "unit",
    "Subaddress": "unit",
    "USPSBox": "box",
    "PlaceName": "city",
    "StateName": "state",
    "Zip": "zip",
    "CountryName": "country",
}
NOT_ADDRESSES = {"NotAddress", "IntersectionSeparator", "CornerOf"}
TASK = "Address to JSON."  # all that a tuned model needs; the untuned one is measured with what helps it most
INSTRUCTION = (
    "Split the US address into its parts. Answer with one line of JSON that has only these keys, "
    f"and only those the address has: {', '.join(FIELDS)}."
)
SHOTS = 4
SHOT_FIELDS = range(3, 7)
EVAL_ROWS = 48
PARAGRAPHS = 64
PARAGRAPH_CHARACTERS = range(350, 800)
EDITION = 4  # raise it when the rows change


def field(label: str) -> str | None:
    """The field that a usaddress label belongs to."""
    return next((name for start, name in FIELD_OF.items() if label.startswith(start)), None)


def parts(tokens: list[tuple[str, str]]) -> dict[str, str] | None:
    """The fields of one labelled address, in the order of FIELDS; None for what is no plain address."""
    if any(label in NOT_ADDRESSES for label, _ in tokens):
        return None
    found: dict[str, list[str]] = {}
    for label, text in tokens:
        name = field(label)
        if name is None:
            return None
        found.setdefault(name, []).append(text)
    whole = {name: " ".join(found[name]).strip(" ,;") for name in FIELDS if name in found}
    return whole if len(whole) > 1 and all(whole.values()) else None


def addresses(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(address, its fields) of every usable row of usaddress' labelled XML, each address once."""
    from defusedxml.ElementTree import parse

    seen = set()
    for element in parse(file).getroot():
        address = " ".join("".join(element.itertext()).split())
        fields = parts([(token.tag, (token.text or "").strip()) for token in element])
        if fields is not None and address.casefold() not in seen:
            seen.add(address.casefold())
            yield address, fields


def street_key(address: str) -> str:
    """Equal for addresses that differ in numbers, case or punctuation only: they stay on one side of the split."""
    letters = re.sub(r"[^a-z]+", " ", address.casefold()).strip()
    return hashlib.sha256(letters.encode()).hexdigest()


def row(address: str, fields: dict[str, str]) -> dict[str, Any]:
    """One training row in the `messages` format."""
    turns = (("system", TASK), ("user", address), ("assistant", json.dumps(fields, ensure_ascii=False)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def prompts(train: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Ways to ask the untuned model: by name, the turns that come before the user's address.

    `zero-shot` says what is wanted; `N-shot` shows N plain rows of the training data as well.
    """
    asked = {"role": "system", "content": INSTRUCTION}
    shown = shots([r["messages"] for r in train])
    return {
        "zero-shot": [asked],
        f"{SHOTS}-shot": [asked, *(turn for messages in shown for turn in messages[1:])],
    }


def shots(rows: list[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    """The first SHOTS plain rows: with these the untuned model gets more fields right than with the richest ones."""
    plain = [r for r in rows if len(json.loads(r[-1]["content"])) in SHOT_FIELDS]
    return plain[:SHOTS]


def split(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, eval) rows, in an order and a split that depend on the addresses alone."""
    ordered = sorted((street_key(address), address, fields) for address, fields in addresses(file))
    first = {key: (address, fields) for key, address, fields in reversed(ordered)}
    held = sorted(first)[:EVAL_ROWS]  # one address of each kind: eval rows are independent
    kept = [row(address, fields) for key, address, fields in ordered if key > held[-1]]
    return kept, [row(*first[key]) for key in held]


def prose(file: Path) -> list[str]:
    """Full paragraphs of the proceedings, evenly spread over the book, one line each."""
    blocks = re.split(r"\n\s*\n", file.read_text(encoding="latin-1").replace("\r", ""))
    plain = [" ".join(block.split()) for block in blocks if not block.startswith((" ", "*", "+"))]
    fit = [p for p in plain if len(p) in PARAGRAPH_CHARACTERS and p[0].isupper() and p.endswith(".") and "+" not in p]
    fit = fit[2:]  # the first ones are Project Gutenberg's notice
    return [fit[i * len(fit) // PARAGRAPHS] for i in range(PARAGRAPHS)]


def write_lines(path: Path, lines: list[str]) -> None:
    """UTF-8, one line each."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def sources() -> dict[str, dict[str, str]]:
    """Where the rows come from: package, version, sha256, file inside, licence."""
    return {name: zoo.provenance(zoo.DATA[f"pypi:{name}"]) for name in ("usaddress", "brotli")}


def folder() -> Path:
    """Where the rows are kept."""
    return fetch.cache("data", f"quickstart-{EDITION}")


def rows() -> dict[str, Path]:
    """Local files: train and eval (messages, JSONL), general (prose, a paragraph a line) and source (JSON).

    Fetched and made on first use, then kept in the cache. No eval address appears in train, nor does one that
    differs from it in numbers only.
    """
    target = folder()
    files = {
        "train": target / "train.jsonl",
        "eval": target / "eval.jsonl",
        "general": target / "general.txt",
        "source": target / "SOURCE.json",
    }
    if not files["source"].is_file():
        with fetch.locked(target), fetch.fresh_folder(target) as made:
            train, held = split(zoo.data_path("pypi:usaddress"))
            for name, part in (("train", train), ("eval", held)):
                write_lines(made / files[name].name, [json.dumps(r, ensure_ascii=False) for r in part])
            write_lines(made / files["general"].name, prose(zoo.data_path("pypi:brotli")))
            write_lines(made / files["source"].name, [json.dumps(sources(), indent=2)])
    return files


# --- scoring ---


def valid(answer: str) -> bool:
    """Whether the answer is what was asked for and nothing else: one JSON object, known keys, non-empty strings."""
    try:
        found = json.loads(answer.strip())
    except ValueError:
        return False
    if not isinstance(found, dict) or not found or not set(found) <= set(FIELDS):
        return False
    return all(isinstance(value, str) and value for value in found.values())


def fields(answer: str) -> dict[str, str]:
    """The fields of the first JSON object in the answer, read kindly.

    Words and code fences around it are forgiven, so are numbers for strings, empty values and other keys: the
    untuned model gets credit for all it knows.
    """
    try:
        found, _ = json.JSONDecoder().raw_decode(answer, max(answer.find("{"), 0))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: str(v).strip() for k, v in found.items() if k in FIELDS and v and not isinstance(v, dict | list)}


def score(answer: str, reference: str) -> dict[str, float]:
    """valid (the schema is kept to the letter), exact (every field right, none extra) and field F1, in [0, 1]."""
    wanted, found = fields(reference), fields(answer)
    right = len(set(found.items()) & set(wanted.items()))
    return {
        "valid": float(valid(answer)),
        "exact": float(found == wanted),
        "field_f1": 2 * right / (len(found) + len(wanted)),
    }
