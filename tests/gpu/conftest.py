"""Tests that need a GPU, and are skipped without one.

`LIT_TEST_DEVICE=cpu pytest tests/gpu` runs on a CPU whatever can run there, to check the tests themselves.
"""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms; read when cuBLAS starts

from tests.classification.conftest import image_folder, tiny_cfg  # noqa: F401

DEVICE = os.environ.get("LIT_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="has no meaning on a CPU")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32, which PyTorch allows in convolutions, so that float32 can be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


def autocast(dtype: torch.dtype) -> torch.autocast:
    """For half precision, else nothing."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(DEVICE, dtype if half else torch.bfloat16, enabled=half)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a tensor's norm; zero where both are zero."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
