import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lit_backbone import layers
from lit_backbone.dtm import DeformableTokenMerging
from lit_backbone.layers import (
    Attention,
    ConvBNMerging,
    ConvMerging,
    biased_attention,
    flex_attention_with_bias,
    pad_to_multiple,
    relative_position_bias,
    resize_table,
)
from lit_backbone.row_attention import RowAttention


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("map_size", [(4, 4), (2, 5), (3, 1)])
def test_relative_bias_is_looked_up_by_displacement(map_size: tuple[int, int], compiled: bool) -> None:
    height, width = map_size
    table = torch.randn(1, 2, 2 * height - 1, 2 * width - 1)
    look_up = torch.compile(relative_position_bias, backend="eager", fullgraph=True, disable=not compiled)
    bias = look_up(table, height, width)
    assert bias.shape == (1, 2, height * width, height * width)
    for query in range(height * width):
        for key in range(height * width):
            dy, dx = query // width - key // width, query % width - key % width
            expected = table[0, :, dy + height - 1, dx + width - 1]
            assert torch.equal(bias[0, :, query, key], expected), (query, key)


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("tokens", [1, 4, 14, 16])
def test_rows_of_a_bias_are_aligned_for_a_gpu(tokens: int, images: int) -> None:
    """Also those of a bias whose heads are next to each other in memory."""
    bias = torch.randn(1, tokens, tokens, 2).permute(0, 3, 1, 2).requires_grad_()
    torch.library.opcheck(layers._align, (bias, images, torch.float32))
    aligned = layers._align(bias, images, torch.bfloat16)
    assert torch.equal(aligned, bias.bfloat16().expand(images, -1, -1, -1))
    assert all(stride % 8 == 0 for stride in aligned.stride()[:3]) and aligned.stride(3) == 1
    assert torch.equal(*torch.autograd.grad(aligned.sum(), bias), torch.full_like(bias, images))


def test_relative_bias_of_another_map_is_resized_bicubically() -> None:
    table = torch.randn(1, 2, 27, 27)
    resized = F.interpolate(table, size=(9, 13), mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        relative_position_bias(table, 5, 7), relative_position_bias(resized, 5, 7), rtol=0, atol=0
    )


def test_resize_table_by_hand() -> None:
    table = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    # half-pixel centres: two pixels drawn out to four are sampled at 0, 0.25, 0.75 and 1
    step = torch.tensor([0.0, 0.25, 0.75, 1.0])
    expected = 2 * step[:, None] + step[None, :]
    torch.testing.assert_close(resize_table(table, 4, 4, mode="bilinear")[0, 0], expected)
    assert resize_table(table, 2, 2, mode="bicubic") is table
    assert resize_table(table.bfloat16(), 4, 4, mode="bicubic").dtype == torch.bfloat16


@pytest.mark.parametrize("size, padded", [((8, 12), (8, 12)), ((9, 11), (12, 12)), ((7, 4), (8, 4))])
def test_pad_to_multiple(size: tuple[int, int], padded: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    expected = torch.zeros(2, 3, *padded)
    expected[:, :, : size[0], : size[1]] = x
    assert torch.equal(pad_to_multiple(x, 4), expected)


def test_conv_merging_pads_or_cuts() -> None:
    x = torch.randn(1, 10, 9, 3)
    cut, pad = ConvMerging(3, 8, 4), ConvMerging(3, 8, 4, pad=True)
    pad.load_state_dict(cut.state_dict())
    torch.testing.assert_close(cut(x), cut(x[:, :8, :8]))
    torch.testing.assert_close(pad(x), cut(F.pad(x, (0, 0, 0, 3, 0, 2))))
    torch.testing.assert_close(cut(x).mean(-1), torch.zeros(1, 2, 2), rtol=0, atol=1e-6)  # LayerNorm comes last


def test_conv_bn_merging_is_dtm_without_offsets() -> None:
    dtm, merging = DeformableTokenMerging(3, 8), ConvBNMerging(3, 8)  # offsets are zero at first
    merging.load_state_dict({key: value for key, value in dtm.state_dict().items() if not key.startswith("offset.")})
    x = torch.randn(2, 5, 6, 3)
    torch.testing.assert_close(merging(x), dtm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merging.eval()(x), dtm.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_by_its_formula(with_bias: bool) -> None:
    attention = Attention(12, 3, map_size=(2, 3) if with_bias else None)
    if with_bias:
        torch.nn.init.normal_(attention.rel_pos_bias)
    x = torch.randn(2, 2, 3, 12)
    tokens = x.flatten(1, 2)
    heads = []
    for head in range(3):
        q, k, v = (
            tokens @ attention.qkv.weight[rows].T + attention.qkv.bias[rows]
            for rows in (slice(part * 12 + head * 4, part * 12 + head * 4 + 4) for part in range(3))
        )
        scores = q @ k.transpose(1, 2) / 4**0.5
        if with_bias:
            scores = scores + relative_position_bias(attention.rel_pos_bias, 2, 3)[:, head]
        heads += [scores.softmax(-1) @ v]
    expected = torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected.view(2, 2, 3, 12))


def test_heads_divide_channels() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide 12 channels"):
        Attention(12, 5)


def looked_up(function: Callable[..., Tensor], height: int, width: int, *tensors: Tensor) -> list[Tensor]:
    """Output of a kind of attention, and the gradients of queries, keys, values and table."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors, height, width)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.sin(torch.arange(out.numel())).view(out.shape))]


@pytest.mark.parametrize("map_size", [(4, 6), (5, 7), (3, 11)])
def test_bias_looked_up_in_the_kernel(map_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention, uncompiled, which has a backward pass on a CPU, too, once it is not refused."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr("lit_backbone.layers._compiled_flex_attention", lambda: flex_attention)
    inputs = [torch.randn(2, 3, math.prod(map_size), 16) for _ in range(3)]
    table = torch.randn(1, 3, 7, 11)  # of a map of 4 x 6, resized for the others
    expected = looked_up(biased_attention, *map_size, *inputs, table)  # on a CPU with the bias as a tensor
    actual = looked_up(flex_attention_with_bias, *map_size, *inputs, table)
    for result, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


def test_captured_table_gets_its_gradient_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend that also compiles backward on a CPU. Of a view that is captured, it loses the gradient."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    inputs = [torch.randn(2, 3, 24, 16) for _ in range(3)]
    table = torch.randn(1, 3, 7, 11)
    expected = looked_up(biased_attention, 4, 6, *inputs, table)
    compiled = torch.compile(flex_attention, backend="aot_eager", dynamic=True, fullgraph=True)
    monkeypatch.setattr("lit_backbone.layers._compiled_flex_attention", lambda: compiled)
    for result, reference in zip(looked_up(flex_attention_with_bias, 4, 6, *inputs, table), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


def test_flex_attention_is_tried_out_once_and_warns() -> None:
    """On a CPU it has no backward pass."""
    layers._has_flex_attention.cache_clear()
    with pytest.warns(UserWarning, match="FlexAttention failed"):
        assert not layers._has_flex_attention(torch.device("cpu"), torch.float32, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not layers._has_flex_attention(torch.device("cpu"), torch.float32, 16)


def test_flex_attention_is_tried_out_within_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward pass does not run the block again, of which it is no part."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr("lit_backbone.layers._compiled_flex_attention", lambda: flex_attention)
    layers._has_flex_attention.cache_clear()
    found = []

    def block(x: Tensor) -> Tensor:
        x = x.sin()
        found.append(layers._has_flex_attention(torch.device("cpu"), torch.float32, 16))
        return x.cos()

    x = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(x.sin().cos().sum(), x)[0])
    assert found == [True, True]
    layers._has_flex_attention.cache_clear()  # of the CPU that was not refused


def test_lack_of_memory_says_nothing_about_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    layers._has_flex_attention.cache_clear()
    monkeypatch.setattr("lit_backbone.layers._compiled_flex_attention", lambda: fail)
    with pytest.raises(torch.OutOfMemoryError):
        layers._has_flex_attention(torch.device("cpu"), torch.float32, 16)


@pytest.mark.slow
@torch.inference_mode()
def test_one_compilation_looks_up_the_biases_of_all_maps() -> None:
    table = torch.randn(1, 3, 7, 11)
    for height, width in ((9, 6), (20, 31), (12, 12), (3, 4)):
        inputs = [torch.randn(2, 3, height * width, 16) for _ in range(3)]
        with torch.compiler.set_stance("default" if height == 9 else "fail_on_recompile"):
            out = flex_attention_with_bias(*inputs, table, height, width)
        expected = biased_attention(*inputs, table, height, width)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_evaluation_sees_every_change_of_a_table() -> None:
    attention, x = Attention(12, 3, map_size=(4, 4)), torch.randn(1, 4, 4, 12)
    before = attention(x)
    attention.rel_pos_bias.data.mul_(-300)  # as fused optimisers in a compiled step do; bumps no version
    fresh = Attention(12, 3, map_size=(4, 4))
    fresh.load_state_dict(attention.state_dict())
    assert torch.equal(attention(x), fresh(x)) and not torch.equal(attention(x), before)


# ---- rows of queries


def by_index(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Attention written out, its bias gathered by each pair's displacement."""
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    bias = table[0][:, y[:, None] - y + height - 1, x[:, None] - x + width - 1]  # (heads, N, N)
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize("batch, map_size", [(1, (5, 7)), (2, (6, 3)), (3, (1, 4)), (2, (4, 1)), (0, (3, 4))])
def test_rows_of_queries_by_the_formula(batch: int, map_size: tuple[int, int]) -> None:
    tokens, (height, width) = math.prod(map_size), map_size
    inputs = torch.randn(batch, tokens, 3, 2, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4)  # as a layer's: strided
    table = torch.randn(1, 2, 2 * height - 1, 2 * width - 1, dtype=torch.float64)
    expected = looked_up(by_index, height, width, *inputs, table)
    for result, reference in zip(looked_up(RowAttention.apply, height, width, *inputs, table), expected, strict=True):
        torch.testing.assert_close(result, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_of_queries_in_low_precision(dtype: torch.dtype, autocast: bool) -> None:
    inputs, table = torch.randn(3, 2, 3, 24, 16).to(dtype), torch.randn(1, 3, 7, 11)
    expected = looked_up(by_index, 4, 6, *inputs.float(), table)
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        out, *gradients = looked_up(RowAttention.apply, 4, 6, *inputs, table)
    assert [x.dtype for x in (out, *gradients)] == [dtype] * 4 + [torch.float32]
    for result, reference in zip((out, *gradients), expected, strict=True):
        error = (result.float() - reference).norm() / reference.norm()
        assert error < 0.01


def test_rows_of_queries_have_no_silent_wrong_derivative() -> None:
    q, k, v, table = (
        torch.randn(1, 2, 12, 8),
        torch.randn(1, 2, 12, 8),
        torch.randn(1, 2, 12, 8),
        torch.randn(1, 2, 5, 7),
    )

    def loss(table: Tensor) -> Tensor:
        return RowAttention.apply(q, k, v, table, 3, 4).square().sum()

    (expected,) = torch.autograd.grad(by_index(q, k, v, table.requires_grad_(), 3, 4).square().sum(), table)
    torch.testing.assert_close(torch.func.grad(loss)(table.detach()), expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss(table), table, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="vmap support"):
        torch.vmap(loss)(table.detach()[None])


class LargestTensor(TorchDispatchMode):
    """Notes the most entries that a tensor's memory has while it is active."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, size)
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_large_maps_on_a_cpu_have_no_large_tensor(checkpointing: bool) -> None:
    """In the forward and backward pass of a layer, whose table is resized; the results are those of a bias tensor."""
    attention, x = Attention(32, 2, map_size=(4, 4)), torch.randn(1, 24, 25, 32)
    torch.nn.init.normal_(attention.rel_pos_bias)
    parameters = list(attention.parameters())

    def run() -> tuple[Tensor, ...]:
        out = checkpoint(attention, x, use_reentrant=False) if checkpointing else attention(x)
        return out, *torch.autograd.grad(out.square().sum(), parameters)

    with LargestTensor() as largest:
        actual = run()
    assert largest.entries < 2 * 600 * 600 // 4
    set_fused_attn(False)
    try:
        with LargestTensor() as largest:
            expected = run()
    finally:
        set_fused_attn(True)
    assert largest.entries >= 2 * 600 * 600
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
