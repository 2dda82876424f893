"""Tests that need a GPU, and are skipped without one.

`LIT_TEST_DEVICE=cpu pytest tests/gpu` runs them on a CPU as far as possible, to check the tests themselves.
"""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms; cuBLAS reads it at startup

from tests.classification.conftest import image_folder, tiny_cfg  # noqa: F401

DEVICE = os.environ.get("LIT_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable TF32, which PyTorch allows in convolutions, so that tests can compare float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Return the autocast context of a half-precision dtype; disabled for other dtypes."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(DEVICE, dtype if half else torch.bfloat16, enabled=half)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of `expected`; 0 if both are zero."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
