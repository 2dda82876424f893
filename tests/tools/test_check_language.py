from pathlib import Path

import pytest

from tools import check_language

FILES = {  # name: text, lines with a violation
    "comment.py": ("x = 1  # train anew", [1]),
    "paragraph.py": ("# The loader is slow for\n# want of workers.", [1]),
    "docstring.py": ('def f():\n    """Whether x is positive."""', [2]),
    "string.py": ('raise ValueError(\n    "corrupt in spite "\n    f"of the checksum {x}"\n)', [2]),
    "name.py": ("class_misfit = 1", [1]),
    "words.py": ("x = 1  # Kept by shallow copies, as which is not the first word.", []),
    "ignored.py": ("# shall  language: ignore", []),
    "a.yaml": ("a: 1\nb: 2  # by label\n# Sizes\n# of maps\n", [2]),
    "a.sh": ('echo "${x#of}" # of a run\ntrain anew', [1, 2]),
    "a.md": ("# of which\n\nA batch\n> by\n> turns <!-- nothing else -->\n", [4]),
    "ignored.md": ('It says "anew". <!-- language: ignore -->', []),
}


@pytest.mark.parametrize("name", FILES)
def test_lines_with_violations(name: str, tmp_path: Path) -> None:
    text, lines = FILES[name]
    (tmp_path / name).write_text(text)
    assert [line for line, _ in check_language.violations(tmp_path / name)] == lines
