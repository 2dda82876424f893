"""Fixtures shared by all tests."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """What one test compiled must not make sizes free in another's: inductor cannot compile free heights and widths."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def goldens() -> dict[str, Any]:
    """Figures measured on the reference implementation, by the name of their file."""
    return {path.stem: json.loads(path.read_text()) for path in GOLDENS.glob("*.json")}


@pytest.fixture(scope="session")
def digits_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier that `make demo` trains, which takes two minutes: for slow tests."""
    from demo.digits import write_digits

    folder = tmp_path_factory.mktemp("digits_classifier")
    write_digits(folder / "data")
    command = [sys.executable, "main.py", "--cfg", "configs/lit-digits.yaml", "--output", str(folder)]
    command += ["--data-path", str(folder / "data")]
    subprocess.run(command, cwd=Path(__file__).parents[1] / "classification", check=True)
    return next(folder.glob("*/*/latest.pth"))
