"""Code cells of docs/tutorial.ipynb, in one process as in a kernel, which needs no Jupyter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_cells(tmp_path: Path) -> None:
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "tutorial.py").write_text("\n".join(code))
    run = subprocess.run([sys.executable, tmp_path / "tutorial.py"], cwd=DOCS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "exported: [0, 3, 6] original: [0, 3, 6]" in run.stdout
