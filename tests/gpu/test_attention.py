"""FlexAttention with a relative position bias, compared with the bias tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_backbone.biased_attention import (
    LARGE_MAP_ON_GPU,
    _has_flex_attention,
    biased_attention,
    relative_position_bias,
)
from tests.gpu.conftest import DEVICE, ON_GPU, needs_gpu, relative_error
from tests.lit_backbone.test_biased_attention import output_and_gradients


def with_tensor(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=relative_position_bias(table, height, width))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flex_attention_is_used(dtype: torch.dtype) -> None:
    """Make the first call within a checkpoint, as the recipes of detection do."""
    _has_flex_attention.cache_clear()
    inputs = torch.randn(3, 1, 3, 46 * 46, 32, dtype=dtype, device=DEVICE, requires_grad=True)
    table = torch.randn(1, 3, 91, 91, device=DEVICE, requires_grad=True)
    gradients = [
        torch.autograd.grad(attend(*inputs.unbind(), table, 46, 46).float().square().sum(), (inputs, table))
        for attend in (lambda *args: checkpoint(biased_attention, *args, use_reentrant=False), biased_attention)
    ]
    assert _has_flex_attention(torch.device("cuda", torch.cuda.current_device()), dtype, 32)
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("map_size", [(14, 14), (46, 46), (50, 84)])
def test_output_and_gradients(map_size: tuple[int, int], dtype: torch.dtype, tolerance: float, compiled: bool) -> None:
    """Compare with the bias tensor, which the smallest feature map uses."""
    tokens, heads = map_size[0] * map_size[1], 3
    with torch.device(DEVICE):
        inputs = [torch.randn(2, heads, tokens, 32, dtype=dtype) for _ in range(3)]
        table = torch.randn(1, heads, 2 * map_size[0] - 1, 2 * map_size[1] - 1)
        expected = output_and_gradients(with_tensor, *map_size, *(tensor.double() for tensor in (*inputs, table)))
        attend = torch.compile(biased_attention) if compiled and ON_GPU else biased_attention
        output_and_gradients(attend, *map_size, *inputs, table)  # compiles
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        actual = output_and_gradients(attend, *map_size, *inputs, table)
    if ON_GPU and tokens >= LARGE_MAP_ON_GPU:  # no tensor of the bias's size
        assert torch.cuda.max_memory_allocated() - held < heads * tokens**2 * dtype.itemsize
    for result, reference, name in zip(actual, expected, ["output", "q", "k", "v", "table"], strict=True):
        assert relative_error(result, reference) < tolerance, name
