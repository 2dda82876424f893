"""Fixtures shared by all tests."""

import gc
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # runs kernels on a CPU; must be set before timm imports Triton


import lit_backbone  # noqa: F401  # registers the models
from demo.digit_scenes import write_scenes
from tests.programs import Program

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Reset the compiler after each test.

    Otherwise a second input size makes height and width dynamic in a later test, which inductor cannot compile.
    """
    yield
    torch.compiler.reset()


@pytest.fixture
def bfloat16_attention() -> None:
    """Skip the test if PyTorch's attention fails in bfloat16: ATEN_CPU_CAPABILITY=default on CPUs with AMX."""
    x = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def end_programs() -> Iterator[None]:
    """Kill the processes that a test has started and shut down its DataLoader workers."""
    yield
    children = multiprocessing.active_children()
    for process in children:
        if isinstance(process, Program):
            process.kill()
    if not all(isinstance(process, Program) for process in children):
        # A loader in an exception's traceback is collected in a later test, which then waits 10 seconds.
        for loader in [item for item in gc.get_objects() if type(item) is _MultiProcessingDataLoaderIter]:
            loader._shutdown_workers()


@pytest.fixture(scope="session")
def goldens() -> dict[str, Any]:
    """Return the figures measured on the reference implementation by file name."""
    return {path.stem: json.loads(path.read_text()) for path in GOLDENS.glob("*.json")}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 6 training and 4 validation scenes of digits. Tests must not change them."""
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, size=128, train=6, val=4)
    return root
