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
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU, if Triton is imported after this, which timm does


import lit_backbone  # noqa: F401, registers the models
from demo.digit_scenes import write_scenes
from tests.programs import Program

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Reset the compiler, which would treat sizes as dynamic after several tests; inductor cannot compile these."""
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
