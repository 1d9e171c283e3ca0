"""The package's front door: cheap to open, and every name behind it is there."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

import deltatune
from deltatune.core.registry import METHODS
from deltatune.core.registry import method as register

HEAVY = "import sys, deltatune; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), *dir(deltatune))"


def test_import_is_cheap_and_lists_the_names() -> None:
    told = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True).stdout
    assert told.startswith("[] ")
    assert {"attach", "LoRA", "SFT", "train", "__version__"} <= set(told.split())


@pytest.mark.parametrize("name", deltatune.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(deltatune, name).__name__.rpartition(".")[2] == name


def test_a_new_method_needs_no_line_here() -> None:
    @dataclass(frozen=True)
    class Fresh:
        pass

    register("fresh", paper="0000.00000", kind="linear")(Fresh)
    try:
        assert deltatune.Fresh is Fresh
    finally:
        del METHODS["fresh"]
    with pytest.raises(AttributeError, match="no attribute 'Fresh'"):
        _ = deltatune.Fresh


def test_train_is_a_room_and_a_function() -> None:
    from deltatune import train
    from deltatune.train import loop

    assert callable(train)
    assert train.loop is loop
