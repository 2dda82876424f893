from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lit_backbone import biased_attention as module
from lit_backbone.biased_attention import (
    biased_attention,
    flex_attention_with_bias,
    row_attention,
)
from lit_backbone.layers import Attention


def reference_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Compute attention by its formula, with the bias gathered by displacement."""
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    bias = table[0][:, y[:, None] - y + height - 1, x[:, None] - x + width - 1]  # (heads, N, N)
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + bias).softmax(-1) @ v


def output_and_gradients(function: Callable[..., Tensor], height: int, width: int, *tensors: Tensor) -> list[Tensor]:
    """Return the output of an attention function and the gradients of queries, keys, values and table."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors, height, width)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.sin(torch.arange(out.numel())).view(out.shape))]


def random_inputs(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return queries, keys and values with the strides they have in a layer, and a table."""
    q, k, v = torch.randn(batch, height * width, 3, 2, 16, dtype=dtype).permute(2, 0, 3, 1, 4)
    return q, k, v, torch.randn(1, 2, 2 * height - 1, 2 * width - 1, dtype=dtype)


# ---- bias tensor


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("map_size", [(5, 7), (3, 1)])
def test_bias_tensor_matches_formula(map_size: tuple[int, int], compiled: bool) -> None:
    inputs = random_inputs(2, *map_size, torch.float64)
    expected = output_and_gradients(reference_attention, *map_size, *inputs)
    attend = torch.compile(biased_attention, backend="eager", fullgraph=True, disable=not compiled)
    torch.testing.assert_close(output_and_gradients(attend, *map_size, *inputs), expected)


# ---- FlexAttention


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run FlexAttention without compilation, which supports backward on a CPU if the device check is disabled."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr(module, "compiled_flex_attention", flex_attention)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("backend, map_size", [("eager", (4, 6)), ("eager", (5, 7)), ("aot_eager", (3, 11))])
def test_flex_attention_matches_formula(backend: str, map_size: tuple[int, int], monkeypatch: Any) -> None:
    """The backend `aot_eager` compiles backward on a CPU. It loses the gradient of a captured view."""
    if backend != "eager":
        compiled = torch.compile(flex_attention, backend=backend, dynamic=True, fullgraph=True)
        monkeypatch.setattr(module, "compiled_flex_attention", compiled)
    inputs = random_inputs(2, *map_size)
    expected = output_and_gradients(reference_attention, *map_size, *inputs)
    actual = output_and_gradients(flex_attention_with_bias, *map_size, *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_unavailable_flex_attention_warns_but_lack_of_memory_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, compiled FlexAttention has no backward."""

    def fail(*args: object, **kwargs: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module._has_flex_attention.cache_clear()
    with pytest.warns(UserWarning, match="FlexAttention is unavailable"):
        assert not module._has_flex_attention(torch.device("cpu"), torch.float32, 16)
    module._has_flex_attention.cache_clear()
    monkeypatch.setattr(module, "compiled_flex_attention", fail)
    with pytest.raises(torch.OutOfMemoryError):
        module._has_flex_attention(torch.device("cpu"), torch.float32, 16)


@pytest.mark.slow
@torch.inference_mode()
def test_one_compilation_serves_all_feature_maps() -> None:
    for height, width in ((9, 6), (20, 31), (12, 12), (3, 4)):
        inputs = random_inputs(2, height, width)
        with torch.compiler.set_stance("default" if height == 9 else "fail_on_recompile"):
            out = flex_attention_with_bias(*inputs, height, width)
        expected = reference_attention(*inputs, height, width)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# ---- rows of queries


@pytest.mark.parametrize("batch, map_size", [(1, (5, 7)), (2, (6, 3)), (3, (1, 4)), (2, (4, 1)), (0, (3, 4))])
def test_rows_of_queries_match_formula(batch: int, map_size: tuple[int, int]) -> None:
    *inputs, table = random_inputs(batch, *map_size, torch.float64)
    expected = reference_attention(*inputs, table, *map_size)
    torch.testing.assert_close(row_attention(*inputs, table, *map_size), expected)
    for dtype in (torch.bfloat16, torch.float16):
        out = row_attention(*(tensor.to(dtype) for tensor in inputs), table, *map_size)
        assert out.dtype == dtype
        assert (out.double() - expected).norm() <= 0.02 * expected.norm()


class LargestTensor(TorchDispatchMode):
    """Record the number of entries in the largest tensor storage."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_on_large_maps_has_no_bias_tensor(context: Callable, request: pytest.FixtureRequest) -> None:
    attention, x = Attention(32, 2, map_size=(4, 4)), torch.randn(1, 24, 25, 32)
    torch.nn.init.normal_(attention.rel_pos_bias)
    with context(), LargestTensor() as rows:
        actual = attention(x)
    request.addfinalizer(lambda: set_fused_attn(True))
    set_fused_attn(False)
    with context(), LargestTensor() as tensor:
        expected = attention(x)
    assert rows.entries < 2 * 600 * 600 // 4 and tensor.entries >= 2 * 600 * 600
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_training_on_large_maps_uses_the_bias_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "row_attention", lambda *args: pytest.fail("rows of queries during training"))
    attention, x = Attention(32, 2, map_size=(24, 25)), torch.randn(1, 24, 25, 32)
    for frozen in (False, True):  # with frozen queries and keys, the table still needs its gradient
        attention.qkv.requires_grad_(not frozen)
        (gradient,) = torch.autograd.grad(attention(x).square().sum(), [attention.rel_pos_bias])
        assert gradient.isfinite().all() and gradient.count_nonzero() == gradient.numel()
