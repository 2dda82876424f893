"""Fixtures shared by all tests."""

import json
from pathlib import Path
from typing import Any

import pytest

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def goldens() -> dict[str, Any]:
    """Figures measured on the reference implementation, by the name of their file."""
    return {path.stem: json.loads(path.read_text()) for path in GOLDENS.glob("*.json")}
