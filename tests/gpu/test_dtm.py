"""Deformable token merging on a GPU, compared with torchvision's operator."""

import pytest
import torch
from torch import Tensor

from lit_backbone import dtm_kernels
from lit_backbone.dtm import deformable_sample
from tests.gpu.conftest import DEVICE, needs_gpu, relative_error
from tests.lit_backbone.test_dtm import oracle, output_and_gradients, random_inputs, warp_and_merge


def inputs_on_device(*shape: int, reach: float) -> list[Tensor]:
    """Create a feature map, offsets of at most `reach` pixels, weight and bias, in float64."""
    x, offset, weight, bias = random_inputs(2, *shape, reach=reach)
    offset = offset if reach else torch.zeros_like(offset)
    return [tensor.double().to(DEVICE) for tensor in (x, offset, weight, bias)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("reach", [0.0, 0.5, 3.0, 60.0])  # the last is far outside
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 33, 21), (96, 56, 56), (130, 7, 12)])
def test_agrees_with_torchvision(
    shape: tuple[int, int, int], reach: float, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = [tensor.to(dtype) for tensor in inputs_on_device(*shape, reach=reach)]
    actual, expected = (output_and_gradients(function, *inputs) for function in (warp_and_merge, oracle))
    for result, reference, name in zip(actual, expected, ["output", "x", "offset", "weight", "bias"], strict=True):
        assert relative_error(result, reference) < tolerance, name


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("channels", [1, 3, 96, 130])
def test_half_precision_rounds_only_results(channels: int, dtype: torch.dtype, tolerance: float) -> None:
    x, offset, _, _ = inputs_on_device(channels, 9, 14, reach=3.0)
    x, offset = x.to(dtype), offset.float()
    actual = output_and_gradients(lambda *args: deformable_sample(*args).double(), x, offset)
    expected = output_and_gradients(deformable_sample, x.double(), offset.double())
    for result, reference, name in zip(actual, expected, ["output", "x", "offset"], strict=True):
        assert relative_error(result, reference) < tolerance, name


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_used(dtype: torch.dtype) -> None:
    assert dtm_kernels._use_kernels(torch.zeros(1, 4, 4, 96, dtype=dtype, device=DEVICE))


@needs_gpu
def test_out_of_memory_does_not_disable_the_kernels(recwarn: pytest.WarningsRecorder) -> None:
    dtm_kernels._has_kernels.cache_clear()
    x = torch.zeros(64, 96, 112, 112, dtype=torch.bfloat16, device=DEVICE)
    offset = torch.zeros(64, 8, 56, 56, device=DEVICE)
    torch.cuda.empty_cache()
    share = (torch.cuda.memory_reserved() + 2**20) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            deformable_sample(x, offset)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert dtm_kernels._use_kernels(x.permute(0, 2, 3, 1))
    assert not any("kernels" in str(warning.message) for warning in recwarn)
    assert deformable_sample(x, offset).shape == x.shape
