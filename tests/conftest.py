"""Fixtures shared by all tests."""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU, if Triton is imported after this, which timm does

import timm

import lit_backbone  # noqa: F401, registers the models
from demo.digit_scenes import write_scenes
from demo.digits import write_digits
from tests.programs import Program

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """What one test compiled must not make sizes free in another's: inductor cannot compile free heights and widths."""
    yield
    torch.compiler.reset()


@pytest.fixture
def bfloat16_attention() -> None:
    """Skips where PyTorch's own attention fails in bfloat16: ATEN_CPU_CAPABILITY=default on CPUs that have AMX."""
    x = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def end_programs() -> Iterator[None]:
    """However a test ends, nobody waits for what it has started."""
    yield
    children = multiprocessing.active_children()
    for process in children:
        if isinstance(process, Program):
            process.kill()
    if not all(isinstance(process, Program) for process in children):
        # a loader that an exception's traceback holds would be collected in some later test, which it halts for 10 s
        for loader in [found for found in gc.get_objects() if type(found) is _MultiProcessingDataLoaderIter]:
            loader._shutdown_workers()


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
    """The classifier that `make demo` trains, which takes two minutes: for slow tests, once for all their processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "digits_classifier"
    command = [sys.executable, "main.py", "--cfg", "configs/lit-digits.yaml", "--output", str(folder)]
    command += ["--data-path", str(folder / "data")]
    with FileLock(f"{folder}.lock"):
        write_digits(folder / "data")
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        where = Path(__file__).parents[1] / "classification"
        subprocess.run(command, cwd=where, env=environment, check=True)  # which only says so where it is trained
    return next(folder.glob("*/*/latest.pth"))
