"""Fixtures shared by all tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU, if Triton is imported after this, which timm does

import timm

import lit_backbone  # noqa: F401, registers the models
from demo.digit_scenes import write_scenes
from demo.digits import write_digits

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
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of digits, 6 to train on and 4 held out; read only."""
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, size=128, train=6, val=4)
    return root


@pytest.fixture(scope="session")
def digits_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as that of `make demo`, untrained, in the form that the trainer writes."""
    torch.manual_seed(0)
    config = yaml.safe_load((Path(__file__).parents[1] / "classification/configs/lit-digits.yaml").read_text())
    arch = config["MODEL"]["LIT"]
    path = tmp_path_factory.mktemp("digits") / "latest.pth"
    torch.save({"model": timm.create_model("lit_s", **arch, img_size=64, num_classes=10).state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def digits_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier that `make demo` trains, which takes two minutes: for slow tests."""
    folder = tmp_path_factory.mktemp("digits_classifier")
    write_digits(folder / "data")
    command = [sys.executable, "main.py", "--cfg", "configs/lit-digits.yaml", "--output", str(folder)]
    command += ["--data-path", str(folder / "data")]
    subprocess.run(command, cwd=Path(__file__).parents[1] / "classification", check=True)
    return next(folder.glob("*/*/latest.pth"))
