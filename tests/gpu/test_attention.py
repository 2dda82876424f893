"""Attention that looks its relative position bias up in the kernel, against the bias as a tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_backbone.layers import biased_attention, relative_position_bias
from tests.gpu.conftest import DEVICE, ON_GPU, relative_error
from tests.lit_backbone.test_layers import looked_up


def with_tensor(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=relative_position_bias(table, height, width))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("map_size", [(46, 46), (50, 84)])
def test_output_and_gradients(map_size: tuple[int, int], dtype: torch.dtype, tolerance: float, compiled: bool) -> None:
    """Of queries, keys, values and table, which is resized for one of the maps."""
    tokens, heads = map_size[0] * map_size[1], 3
    with torch.device(DEVICE):
        inputs = [torch.randn(1, heads, tokens, 32, dtype=dtype) for _ in range(3)]
        table = torch.randn(1, heads, 91, 91)
        expected = looked_up(with_tensor, *map_size, *(tensor.double() for tensor in (*inputs, table)))
        attend = torch.compile(biased_attention) if compiled and ON_GPU else biased_attention
        looked_up(attend, *map_size, *inputs, table)  # compiles
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        actual = looked_up(attend, *map_size, *inputs, table)
    if ON_GPU:  # no tensor of the bias's size
        assert torch.cuda.max_memory_allocated() - held < heads * tokens**2 * dtype.itemsize
    for result, reference, name in zip(actual, expected, ["output", "q", "k", "v", "table"], strict=True):
        assert relative_error(result, reference) < tolerance, name
