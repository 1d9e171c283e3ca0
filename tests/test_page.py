"""The end screen and report.md hold together for every kind of result."""

from pathlib import Path

import pytest
from rich.console import Console

from deltatune.config import Config
from deltatune.report import page
from deltatune.train.place import Run
from deltatune.train.verify import Check

SUMMARY = {
    "metric": "accuracy", "before": {"loss": 2.0, "accuracy": 0.5}, "after": {"loss": 1.0, "accuracy": 0.75},
    "intervals": {"accuracy": [0.6, 0.9]}, "intervals_before": {"accuracy": [0.4, 0.6]},
    "gain": {"accuracy": [0.25, 0.1, 0.4]}, "measured_on": "eval", "retention": {}, "untuned_prompts": {},
    "ood": {"far": {"loss": 3.0, "gap": {"loss": 2.0}}}, "objective": "sft", "trainable_parameters": 5,
    "parameters": 100, "steps": 3, "train_rows": 7, "peak_memory_bytes": 2**30, "seconds": {"train": 2.0},
    "memory": {"train": 2**29},
    "tokens_per_s": 10.0, "adapter": "runs/a/adapter", "notes": ["a note"], "sample": "x >>y```<<",
    "unchecked": ["merge: why"], "failed": [],
}  # fmt: skip


def shown(change: dict, status: str = "done") -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Run(Path("runs/a"), status, SUMMARY | change).screen(), crop=False)
    console.file.close()
    return console.export_text()


def test_before_and_after_stand_side_by_side():
    text = shown({})
    line = next(line for line in text.splitlines() if "accuracy" in line and "gain" not in line)
    assert line.split()[1:-1] == ["accuracy", "0.500", "[0.400,", "0.600]", "0.750", "[0.600,", "0.900]"]
    for part in ("gain: accuracy 0.250 [0.100, 0.400]", "far: loss 3.000", "(5.00%)", "verified", "- merge: why"):
        assert part in text
    assert "deltatune chat" in text


def test_the_pace_of_pictures_is_in_rows():
    assert "training 12.5 rows/s" in shown({"tokens_per_s": 0.0, "rows_per_s": 12.5})
    assert "training 10 tokens/s" in shown({"rows_per_s": 12.5})
    assert "10 tokens/s, 0.42 of what its matrix products allow" in shown({"work": {"of_floor": 0.4242}})


def test_numbers_that_are_missing_are_a_dash_and_failures_are_told():
    text = shown({"before": {"loss": None}, "gain": {}, "failed": ["base: changed"]}, "unverified")
    assert "unverified" in text
    assert "! base: changed" in text
    assert "- [0.400" in text


FACTS = {
    "asked as it is": ({"generates": True}, "with the row as it is (no examples; eval.shots=4 asks with examples too)"),
    "few rows": ({"train_rows": 120, "rows_seen": 24, "epochs": 0.2}, ", 3 steps over 24 of 120 rows"),
    "every row": ({"train_rows": 120, "rows_seen": 120, "epochs": 1.0}, ", 3 steps over 120 rows "),
    "again": ({"train_rows": 120, "rows_seen": 300, "epochs": 2.5}, ", 3 steps over 120 rows, 2.5 times "),
    "a stream": ({"train_rows": None, "rows_seen": 24, "epochs": None}, ", 3 steps over 24 streamed rows"),
    "drift": (
        {"retention": {"kind": "drift", "forgotten": 0.061, "before": 0.0, "after": 0.061}},
        "forgotten: drift 0.061 (1 - cosine to the base's states of general text, 0 to 2)",
    ),
    "nats": (
        {
            "retention": {
                "kind": "perplexity",
                "forgotten": 0.061,
                "before": {"perplexity": 7},
                "after": {"perplexity": 8},
            }
        },
        "forgotten: +0.061 nats per token of general text (perplexity 7.00 -> 8.00)",
    ),
    "all blocks": (
        {"methods": {"spottune": {"share_tuned": {"h.0": 1.0, "h.1": 1.0}, "sequences": 40}}},
        "spottune: share tuned 100% in all 2 places, sequences 40 (of the evaluation rows)",
    ),
    "some blocks": (
        {"methods": {"spottune": {"share_tuned": {"h.0": 0.25, "h.1": 1.0}}}, "measured_on": "train"},
        "spottune: share tuned 25% (h.0) to 100% (h.1) over 2 places",
    ),
    "a number that is of no place": (
        {"methods": {"any": {"ranks": {"h.0.q": 3, "rest": {"a": 1}}}}},
        "any: ranks h.0.q 3, ranks rest a 1",
    ),
    "without examples": (
        {"generates": True, "untuned_prompts": {"without_shots": "1 evaluation rows have no answer (e.jsonl:1)"}},
        "before: the untuned model asked with the row as it is (without eval.shots: 1 evaluation rows have no answer "
        "(e.jsonl:1))",
    ),
    "kinds": (
        {"methods": {"bitfit": {"drift": {"query": 0.5, "key": 0.25}}}},
        "bitfit: drift query 0.5, drift key 0.25",
    ),
}


@pytest.mark.parametrize(("change", "line"), FACTS.values(), ids=FACTS)
def test_what_a_number_is_of_is_said(change, line):
    assert line in shown(change)


def test_a_prompt_search_says_its_own_prompt():
    tried = {"prompt": "4-shot", "held_out": {"4-shot": 0.5}, "ties": {}}
    text = shown({"generates": True, "untuned_prompts": tried})
    assert "best prompt, '4-shot'" in text
    assert "no examples" not in text


def test_the_verdict_stays_on_a_narrow_screen():
    console = Console(width=80, record=True)
    console.print(Run(Path("runs/" + "long-" * 30), "done", SUMMARY).screen())
    assert "verified" in console.export_text().splitlines()[0]


def test_other_objectives_and_no_evaluation_rows():
    text = shown({"objective": "classify", "measured_on": "train"})
    assert "deltatune chat" not in text
    assert "deltatune predict --adapter" in text
    assert "as there are no evaluation rows" in text


def test_only_commands_that_work_are_suggested():
    """A prefix has no merged weights, and a chat has no columns for a template."""
    text = shown({"mergeable": False, "reads": ["animal"]})
    assert "deltatune merge" not in text
    assert "deltatune chat" not in text
    assert "deltatune generate --adapter runs/a --data FILE" in text
    assert "deltatune merge" in shown({"mergeable": True, "reads": []})


def test_an_interrupted_run_says_how_to_go_on():
    console = Console(width=100, record=True)
    console.print(Run(Path("runs/a"), "interrupted", {"step": 4}).screen())
    assert "interrupted at step 4: deltatune resume runs/a" in console.export_text()


def test_the_report_shows_the_sample_whatever_it_holds():
    text = page.markdown(
        Config(model="m", data="d"),
        SUMMARY,
        [Check("base", True, "as before"), Check("memory", None, "much", warns=True)],
    )
    assert "````text\nx >>y```<<\n````" in text
    assert "| base | yes | as before |" in text
    assert "| memory | warning | much |" in text
    assert "- a note" in text
