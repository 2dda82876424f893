"""docs/config.md lists every key."""

from tools.config_docs import PAGE, render


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run python -m tools.config_docs"
