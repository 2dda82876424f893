"""docs/config.md lists every key."""

from pathlib import Path

from tools.config_docs import render


def test_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text() == render(), "run python -m tools.config_docs"
