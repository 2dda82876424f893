import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_language

ROOT = Path(__file__).parents[2]


def lines_with_violations(path: Path, text: str) -> list[int]:
    path.write_text(text)
    return [line for line, _ in check_language.violations(path)]


@pytest.mark.parametrize(
    "source",
    [
        "x = 1  # train anew",
        'def f():\n    """Return x.\n\n    It shall be positive.\n    """',
        "raise ValueError('what a run holds is unknown')",
        'raise ValueError(f"{path} is corrupt in spite of {x}")',
        "# The loader is slow for\n# want of workers.",
        'raise ValueError(\n    "corrupt in spite "\n    f"of the checksum {x}"\n)',
        "class_misfit = 1",
        'def f():\n    """Whether x is positive."""',
        'class A:\n    """\n    How it works.\n    """',
        "x = 1  # of a token",
        "# nor an address",
    ],
)
def test_violations_in_python(tmp_path: Path, source: str) -> None:
    assert len(lines_with_violations(tmp_path / "a.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "x = 1  # Kept by shallow copies, as which is not the first word.",
        "# The widths are those\n# of the four stages.",
        'def f():\n    """Return x.\n\n    Which x is returned depends on y.\n    """',
        "# shall  language: ignore",
    ],
)
def test_clean_python(tmp_path: Path, source: str) -> None:
    assert not lines_with_violations(tmp_path / "a.py", source)


def test_other_files(tmp_path: Path) -> None:
    assert lines_with_violations(tmp_path / "a.yaml", "a: 1\nb: 2  # by label\n# Sizes\n# of maps\n") == [2]
    assert lines_with_violations(tmp_path / "a.sh", 'echo "${x#of}" # of a run\ntrain anew') == [1, 2]
    assert lines_with_violations(tmp_path / "a.md", "# of which\n\nA batch\n> by\n> turns <!-- nothing else -->\n") == [
        4
    ]
    assert not lines_with_violations(tmp_path / "a.md", 'It says "anew". <!-- language: ignore -->')


def test_the_command_names_file_line_and_replacement(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Fine.\nTrain anew.\n")
    command = [sys.executable, "tools/check_language.py", str(tmp_path / "a.md")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.endswith("a.md:2: phrase 'anew'; use again\n")
    exempt = subprocess.run([*command[:2], "LICENSE", "pyproject.toml"], cwd=ROOT, capture_output=True, text=True)
    assert exempt.returncode == 0 and not exempt.stderr
