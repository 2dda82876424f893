"""Fixtures shared by all tests."""

import json
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
