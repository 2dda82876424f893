import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from lit_backbone import dtm_kernels
from lit_backbone.dtm import DeformableTokenMerging, deformable_sample, offset_statistics
from lit_backbone.dtm_kernels import sampling_positions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU runs the kernels in Triton's interpreter


def warp_and_merge(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(deformable_sample(x, offset), weight, bias, stride=2)


def oracle(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, stride=2)


def output_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=out.dtype, device="cpu").to(out.device)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def sample_by_operator(x: Tensor, offset: Tensor) -> Tensor:
    """Sample with the custom operator, as compiled models and models on a GPU do."""
    return dtm_kernels.sample_tokens(x.permute(0, 2, 3, 1), offset, x.dtype).permute(0, 3, 1, 2)


@pytest.fixture(params=["portable", "operator", "kernels"])
def sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test with each implementation; kernels run in Triton's interpreter without a GPU."""
    if request.param != "portable":
        monkeypatch.setitem(globals(), "deformable_sample", sample_by_operator)
        monkeypatch.setattr(dtm_kernels, "_use_kernels", lambda tokens: request.param == "kernels")
    if request.param == "kernels":
        pytest.importorskip("triton")
        with torch.device(DEVICE):
            yield
    else:
        yield


def random_inputs(batch: int, channels: int, height: int, width: int, *, reach: float) -> tuple[Tensor, ...]:
    """Return feature map, offsets of up to `reach` pixels, weight and bias.

    No sample lies near a whole pixel, where the derivative is one-sided.
    """
    offset = reach * (2 * torch.rand(batch, 8, height // 2, width // 2) - 1)
    offset = offset.floor() + 0.1 + 0.8 * (offset - offset.floor())
    return torch.randn(batch, channels, height, width), offset, torch.randn(3, channels, 2, 2), torch.randn(3)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("sampler")
@pytest.mark.parametrize("reach", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("size", [(2, 2), (7, 12), (33, 21)])
def test_agrees_with_torchvision(size: tuple[int, int], reach: float) -> None:
    inputs = random_inputs(2, 5, *size, reach=reach)
    expected = output_and_gradients(oracle, *inputs)
    actual = output_and_gradients(warp_and_merge, *inputs)
    assert actual[0].shape == (2, 3, size[0] // 2, size[1] // 2)
    for result, reference, name in zip(actual, expected, ["output", "x", "offset", "weight", "bias"], strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=2e-4, msg=lambda text, of=name: f"{of}: {text}")
        assert relative_error(result, reference) < 2e-5 or reference.norm() == 0, name


def assert_gradients_on_whole_pixels(offset: Tensor, height: int, width: int) -> None:
    x, weight, bias = torch.randn(1, 1, height, width), torch.randn(1, 1, 2, 2), torch.zeros(1)
    expected = output_and_gradients(oracle, x, offset, weight, bias)
    actual = output_and_gradients(warp_and_merge, x, offset, weight, bias)
    cosine = torch.cosine_similarity(actual[2].flatten(), expected[2].flatten(), dim=0)
    assert cosine > 1 - 1e-6, f"offset gradients of a {height}x{width} map: cosine {cosine}"
    for result, reference, name in zip(actual, expected, ["output", "x", "offset", "weight"], strict=False):
        assert relative_error(result, reference) < 2e-4, f"{name} of a {height}x{width} map"


def test_gradients_at_zero_offsets_for_every_size() -> None:
    """Training starts at these one-sided derivatives; rounding selects the wrong side for some sizes only."""
    for size in range(2, 131):
        for height, width in ((size, 2), (2, size)):
            assert_gradients_on_whole_pixels(torch.zeros(1, 8, height // 2, width // 2), height, width)
    assert_gradients_on_whole_pixels(torch.zeros(1, 8, 100, 167), 200, 334)


@pytest.mark.usefixtures("sampler")
@pytest.mark.parametrize("height, width", [(14, 14), (29, 18), (56, 56)])
def test_gradients_at_whole_offsets(height: int, width: int) -> None:
    offset = torch.randint(-4, 5, (1, 8, height // 2, width // 2)).float()  # many lie outside the map
    assert_gradients_on_whole_pixels(offset, height, width)


@pytest.mark.parametrize("autocast", [False, True])
def test_coordinates_stay_float32_in_half_precision(autocast: bool) -> None:
    x = torch.zeros(1, 1, 2, 256, dtype=torch.bfloat16)
    x[..., 201] = 1
    offset = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16)
    offset[0, 3, 0, 100] = 0.5  # tap (0, 1) at column 201 samples 201.5; bfloat16 would round to 202
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = deformable_sample(x, offset)
        assert deformable_sample(x.float(), offset).dtype == torch.float32
    assert sampling_positions(offset).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert out[0, 0, 0, 201].item() == 0.5


def test_offset_statistics_by_hand() -> None:
    offset = torch.zeros(1, 8, 1, 1)
    offset[0, :, 0, 0] = torch.tensor([3, 4, 0, 0.5, -2, 0, 0, 0])
    length, outside = offset_statistics(offset, (2, 2))  # samples at (3, 4), (0, 1.5), (-1, 0) and (1, 1)
    assert length.item() == pytest.approx((5 + 0.5 + 2 + 0) / 4)
    assert outside.item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("size", [(8, 8), (7, 11)])
def test_module_is_deformable_convolution_batch_norm_gelu(size: tuple[int, int]) -> None:
    merging = DeformableTokenMerging(6, 10)
    torch.nn.init.normal_(merging.offset.weight, std=0.3)
    torch.nn.init.uniform_(merging.offset.bias, 0.1, 0.9)
    x = torch.randn(2, *size, 6)
    out, image = merging(x), x.permute(0, 3, 1, 2)
    offset = F.conv2d(image, merging.offset.weight, merging.offset.bias, stride=2)
    expected = deform_conv2d(image, offset, merging.proj.weight, merging.proj.bias, stride=2)
    expected = F.gelu(F.batch_norm(expected, None, None, training=True)).permute(0, 2, 3, 1)
    assert out.shape == (2, size[0] // 2, size[1] // 2, 10) and out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", ["eager", "compile", "export"])
def test_offsets_are_float32_under_autocast(graph: str) -> None:
    merging, x = DeformableTokenMerging(6, 10).eval(), torch.randn(2, 6, 8, 8)
    torch.nn.init.normal_(merging.offset.weight)
    offset: Callable[..., Tensor] = merging.offset
    expected, tokens = offset(x), merging(x.permute(0, 2, 3, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if graph == "compile":
            offset = torch.compile(offset, fullgraph=True, backend="aot_eager")
        elif graph == "export":
            offset = torch.export.export(merging.offset, (x,)).module()
        assert torch.equal(offset(x), expected)
        out = merging(x.permute(0, 2, 3, 1))
    assert out.dtype == torch.float32 and 0 < (out - tokens).abs().max() < 0.05


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend: str) -> None:
    inputs = random_inputs(2, 4, 8, 6, reach=2.0)
    expected = output_and_gradients(oracle, *inputs)
    actual = output_and_gradients(torch.compile(warp_and_merge, fullgraph=True, backend=backend), *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_graph_holds_the_operator_and_export_holds_grid_sample() -> None:
    class Sample(torch.nn.Module):
        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return deformable_sample(x, offset)

    graphs = []
    inputs = random_inputs(2, 4, 12, 8, reach=2.0)[:2]
    compiled = torch.compile(Sample(), fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph)
    torch.testing.assert_close(compiled(*inputs), deformable_sample(*inputs))
    assert "lit.deformable_sample" in graphs[0] and "grid_sampler" not in graphs[0]
    free = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    exported = torch.export.export(Sample(), inputs, dynamic_shapes=(free, free)).graph_module
    assert "grid_sampler" in exported.code and "lit.deformable_sample" not in exported.code


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operator_registration(memory_format: torch.memory_format) -> None:
    x, offset, _, _ = random_inputs(2, 4, 7, 6, reach=2.0)
    offset = offset.contiguous(memory_format=memory_format).requires_grad_()
    torch.library.opcheck(dtm_kernels.sample_tokens, (x.permute(0, 2, 3, 1).requires_grad_(), offset, torch.bfloat16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels compile on a GPU")
def test_kernels_that_do_not_compile_warn() -> None:
    pytest.importorskip("triton")
    dtm_kernels._has_kernels.cache_clear()
    with pytest.warns(UserWarning, match="Triton kernels do not compile"):
        assert not dtm_kernels._has_kernels(torch.device("cuda"), torch.float32, 96)


@pytest.mark.parametrize(
    "channels, dtype", [(1, torch.float32), (3, torch.bfloat16), (3, torch.float16), (130, torch.bfloat16)]
)
def test_kernels_round_only_their_results(channels: int, dtype: torch.dtype) -> None:
    """Positions and sums are float32 for features of every dtype; 130 channels need more than one tile."""
    pytest.importorskip("triton")
    x, offset, _, _ = random_inputs(2, channels, 7, 5, reach=3.0)
    x, offset = x.to(DEVICE), offset.to(DEVICE)
    tokens, offset = x.permute(0, 2, 3, 1).to(dtype), offset.contiguous(memory_format=torch.channels_last)
    out = dtm_kernels.kernel_forward(tokens, offset, torch.float32)
    grad_out = torch.randn_like(out).to(dtype)
    inputs = tokens.float().permute(0, 3, 1, 2).requires_grad_(), offset.requires_grad_()
    expected = deformable_sample(*inputs)
    grad_tokens, grad_offset = torch.autograd.grad(expected, inputs, grad_out.float().permute(0, 3, 1, 2))
    torch.testing.assert_close(out, expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    actual = dtm_kernels.kernel_backward(grad_out, tokens, offset.detach())
    assert (actual[0].dtype, actual[1].dtype) == (dtype, torch.float32)
    torch.testing.assert_close(actual[0], grad_tokens.permute(0, 2, 3, 1).to(dtype), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(actual[1], grad_offset, rtol=1e-4, atol=1e-4)


def test_gradients_of_half_precision_accumulate_in_float32() -> None:
    """All samples read one token; in bfloat16, a sum of ones stops growing at 256."""
    pytest.importorskip("triton")
    tokens = torch.ones(3, 40, 40, 1, dtype=torch.bfloat16)
    position = sampling_positions(torch.zeros(3, 8, 20, 20))
    offset = torch.zeros(3, 8, 20, 20)
    for tap in range(4):
        offset[:, 2 * tap : 2 * tap + 2] = -position[:, tap // 2 :: 2, tap % 2 :: 2].permute(0, 3, 1, 2)
    tokens, offset = tokens.to(DEVICE), offset.to(DEVICE)
    grad_tokens, _ = dtm_kernels.kernel_backward(torch.ones_like(tokens), tokens, offset)
    assert grad_tokens[:, 0, 0, 0].tolist() == 3 * [1600.0]
    assert grad_tokens.float().sum() == 3 * 1600


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lit_backbone.dtm_kernels import _backward_kernel, _forward_kernel, _tile

for features in ("*fp16", "*bf16", "*fp32"):
    for kernel in (_forward_kernel, _backward_kernel):
        names = kernel.arg_names
        pointers = dict(tokens=features, grad_out=features, out=features)
        pointers |= dict(offset="*fp32", grad_tokens="*fp32", grad_offset="*fp32")
        types = pointers | dict(SAMPLES="constexpr", CHANNELS="constexpr")
        signature = {name: types.get(name, "i32") for name in names}
        tile = {(names.index(name),): size for name, size in _tile(128).items()}
        divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in [*pointers, "C"]}
        source = ASTSource(kernel, signature=signature, constexprs=tile, attrs=divisible)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        print("v4" in code and "max.NaN" in code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton supports Linux only")
@pytest.mark.slow
def test_kernels_compile_without_a_gpu() -> None:
    """The code for compute capability 9.0 must load 16 bytes at a time and propagate NaN."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == 6 * ["True"], result.stderr
