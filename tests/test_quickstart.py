"""The quickstart's rows: which labelled addresses become which JSON, the split, the prose, and how answers score."""

import json
from pathlib import Path

import pytest

from deltatune import quickstart

PARTS = [
    (
        "street and city",
        [
            ("AddressNumber", "219"),
            ("StreetNamePreDirectional", "S."),
            ("StreetName", "Dearborn"),
            ("PlaceName", "Chicago,"),
        ],
        {"number": "219", "street": "S. Dearborn", "city": "Chicago"},
    ),
    (
        "unit before box, in the order of the fields",
        [("USPSBoxType", "PO"), ("USPSBoxID", "Box 7"), ("OccupancyType", "ste"), ("OccupancyIdentifier", "5;")],
        {"unit": "ste 5", "box": "PO Box 7"},
    ),
    ("an intersection", [("StreetName", "A"), ("IntersectionSeparator", "&"), ("StreetName", "B")], None),
    ("one field only", [("PlaceName", "Chicago")], None),
    ("a label nobody mapped", [("PlaceName", "Chicago"), ("Planet", "Earth")], None),
    ("a field of punctuation", [("PlaceName", "Chicago"), ("StateName", ",")], None),
]

REFERENCE = '{"number": "12", "city": "Rome", "state": "NY"}'
SCORES = [
    ("right, other order", '{"city": "Rome", "number": "12", "state": "NY"}', (1.0, 1.0, 1.0)),
    ("one missing", '{"number": "12", "city": "Rome"}', (1.0, 0.0, 0.8)),
    ("one wrong", '{"number": "13", "city": "Rome", "state": "NY"}', (1.0, 0.0, 2 / 3)),
    ("unknown key", '{"number": "12", "city": "Rome", "region": "NY"}', (0.0, 0.0, 0.8)),
    ("a number, not a string", '{"number": 12, "city": "Rome", "state": "NY"}', (0.0, 1.0, 1.0)),
    ("an empty field too many", '{"number": "12", "city": "Rome", "state": "NY", "zip": ""}', (0.0, 1.0, 1.0)),
    ("a field too many", '{"number": "12", "city": "Rome", "state": "NY", "zip": "1"}', (1.0, 0.0, 6 / 7)),
    ("cut off", '{"number": "12", "city": "Ro', (0.0, 0.0, 0.0)),
    ("words around it", 'Here it is: {"number": "12", "city": "Rome", "state": "NY"}', (0.0, 1.0, 1.0)),
    ("empty", "", (0.0, 0.0, 0.0)),
    ("a list", '["12"]', (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("tokens", "expected"), [row[1:] for row in PARTS], ids=[row[0] for row in PARTS])
def test_parts(tokens: list[tuple[str, str]], expected: dict[str, str] | None) -> None:
    found = quickstart.parts(tokens)
    assert found == expected
    assert found is None or list(found) == [name for name in quickstart.FIELDS if name in found]


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in SCORES], ids=[row[0] for row in SCORES])
def test_score(answer: str, expected: tuple[float, float, float]) -> None:
    assert tuple(quickstart.score(answer, REFERENCE).values()) == pytest.approx(expected)


def xml(path: Path, count: int) -> Path:
    """`count` streets with three house numbers each, and one exact copy in other letters."""
    letters = ["".join(chr(97 + (i // 26**k) % 26) for k in range(3)) for i in range(count)]
    rows = [
        f"<a><AddressNumber>{n}</AddressNumber> <StreetName>{s}</StreetName> <PlaceName>Rome</PlaceName></a>"
        for s in letters
        for n in (1, 2, 3)
    ]
    rows.append("<a><AddressNumber>1</AddressNumber> <StreetName>AAA</StreetName> <PlaceName>Rome</PlaceName></a>")
    path.write_text(f"<all>{''.join(rows)}</all>")
    return path


def test_split_keeps_look_alikes_together(tmp_path: Path) -> None:
    train, held = quickstart.split(xml(tmp_path / "labels.xml", 200))
    assert (len(held), len(train)) == (quickstart.EVAL_ROWS, 3 * (200 - quickstart.EVAL_ROWS))
    streets = [{json.loads(r["messages"][-1]["content"])["street"] for r in part} for part in (train, held)]
    assert not streets[0] & streets[1]
    assert len(streets[1]) == quickstart.EVAL_ROWS
    assert quickstart.split(tmp_path / "labels.xml") == (train, held)


def test_a_row_is_a_chat(tmp_path: Path) -> None:
    assert quickstart.row("1 Elm", {"number": "1", "street": "Elm"}) == {
        "messages": [
            {"role": "system", "content": "Address to JSON."},
            {"role": "user", "content": "1 Elm"},
            {"role": "assistant", "content": '{"number": "1", "street": "Elm"}'},
        ]
    }


def test_prompts_show_different_rows_of_the_training_data(tmp_path: Path) -> None:
    train, _ = quickstart.split(xml(tmp_path / "labels.xml", 200))
    asked = quickstart.prompts(train)
    assert list(asked) == ["zero-shot", f"{quickstart.SHOTS}-shot"]
    shown = [turn["content"] for turn in asked[f"{quickstart.SHOTS}-shot"] if turn["role"] == "user"]
    assert len(set(shown)) == quickstart.SHOTS
    assert set(shown) <= {r["messages"][1]["content"] for r in train}


def test_prose_keeps_whole_paragraphs(tmp_path: Path) -> None:
    good = "\n\n".join(f"Number {i} is a paragraph. " + "It goes on\nfor a while. " * 20 + "End." for i in range(300))
    file = tmp_path / "book.txt"
    file.write_text(f"*** heading ***\n\n     an indented note.\n\nshort.\n\n{good}\n\n+++ table +++\n")
    found = quickstart.prose(file)
    assert len(found) == quickstart.PARAGRAPHS
    assert all("\n" not in text and text.startswith("Number") and text.endswith("End.") for text in found)
    assert len(set(found)) == quickstart.PARAGRAPHS
