"""Deformable token merging (DTM), the learned downsampling between LIT's stages.

DTM is a 2x2 stride-2 deformable convolution, BatchNorm and GELU. As kernel and stride are equal and nothing is padded,
the four taps of all output tokens tile the input map exactly, so the deformable convolution equals a bilinear warp of
the whole map followed by an ordinary convolution: no im2col, nothing to build when installing.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from .layers import HAS_TRITON, is_exporting

TAPS = 4  # of a 2x2 kernel; each has an offset of two channels, (dy, dx)
_BILINEAR, _ZEROS = 0, 0  # interpolation and padding modes of aten's sampler
_GEOMETRY = ([2, 2], [0, 0], [1, 1], False, [0, 0], 1)  # stride to groups of aten's 2x2 stride-2 convolution


def sampling_positions(offset: Tensor) -> Tensor:
    """Where the taps of a 2x2 stride-2 deformable convolution read its input map.

    Args:
        offset: `(B, 8, h, w)`, in pixels of the input map; channel `2 * (2 * ky + kx)` is dy of tap (ky, kx), the next
            one dx.

    Returns:
        `(B, 2h, 2w, 2)`: (y, x) for each position of the map, in pixels from the centre of its first pixel; float32,
        or float64 where the offset is.
    """
    batch, _, h, w = offset.shape
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    offset = offset.reshape(batch, 2, 2, 2, h, w)  # (B, 8, h, w) -> (B, ky, kx, yx, h, w)
    offset = offset.permute(0, 4, 1, 5, 2, 3).reshape(batch, 2 * h, 2 * w, 2)  # -> (B, 2h, 2w, yx)
    y = torch.arange(2 * h, device=offset.device, dtype=offset.dtype)
    x = torch.arange(2 * w, device=offset.device, dtype=offset.dtype)
    return offset + torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def _normalize(position: Tensor, size: int) -> Tensor:
    """Pixels to the [-1, 1] of `grid_sample(align_corners=True)`, safe at whole pixels.

    The derivative of bilinear sampling is one-sided at a whole pixel, where every sample lies when training starts.
    `deform_conv2d` takes the side of `floor`, but rounding on the way to [-1, 1] and back may end just below the
    integer, on the other side. Adding two ulps of the map's size prevents this.
    """
    whole = position == position.floor()
    position = position + whole * (2 * torch.finfo(position.dtype).eps * size)
    return position * (2 / max(size - 1, 1)) - 1


def _sampling_grid(offset: Tensor, height: int, width: int) -> Tensor:
    """The grid `(B, 2h, 2w, 2)` of (x, y) by which `grid_sample` reads a map at offsets `(B, 8, h, w)`."""
    row, column = sampling_positions(offset).unbind(-1)
    return torch.stack((_normalize(column, width), _normalize(row, height)), dim=-1)


def _portable_sample(x: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples `(B, C, 2h, 2w)` of a map `(B, C, H, W)` by PyTorch's sampler, which wants one dtype for map and grid."""
    grid = _sampling_grid(offset, x.shape[2], x.shape[3])
    common = torch.promote_types(x.dtype, grid.dtype)
    # not F.grid_sample: on a GPU it would take cuDNN's sampler, whose arithmetic _normalize is not made for
    return torch.ops.aten.grid_sampler_2d(x.to(common), grid.to(common), _BILINEAR, _ZEROS, True).to(dtype)


@lru_cache
def _has_kernels(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether the Triton kernels compile for a device; if not, PyTorch's sampler is used."""
    if device.type != "cuda" or not HAS_TRITON:
        return False
    from .dtm_triton import compile_kernels

    try:  # it takes a C compiler and a GPU that Triton knows; no memory, whose lack would be no answer
        compile_kernels(device, dtype, channels)
    except Exception as error:
        warnings.warn(
            f"DTM runs on PyTorch's sampler, more slowly: its Triton kernels do not compile: {error!r}", stacklevel=1
        )
        return False
    return True


def _use_kernels(tokens: Tensor) -> bool:
    # the kernels add atomically, in any order; PyTorch's sampler does too, but raises if determinism is asked for
    if tokens.dtype == torch.float64 or torch.are_deterministic_algorithms_enabled():
        return False
    return _has_kernels(tokens.device, tokens.dtype, tokens.shape[3])


@torch.library.custom_op("lit::deformable_sample", mutates_args=())
def _sample_tokens(tokens: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples `(B, 2h, 2w, C)` of tokens `(B, H, W, C)`; a single operator under `torch.compile`."""
    if _use_kernels(tokens):
        from .dtm_triton import sample_forward

        return sample_forward(tokens, offset, dtype)
    return _portable_sample(tokens.permute(0, 3, 1, 2), offset, dtype).permute(0, 2, 3, 1).contiguous()


@_sample_tokens.register_fake
def _(tokens: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    batch, _, h, w = offset.shape
    return tokens.new_empty((batch, 2 * h, 2 * w, tokens.shape[3]), dtype=dtype)


@torch.library.custom_op("lit::deformable_sample_backward", mutates_args=())
def _sample_tokens_backward(grad_out: Tensor, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and of offsets, these channels-last in memory."""
    if _use_kernels(tokens):
        from .dtm_triton import sample_backward

        return sample_backward(grad_out, tokens, offset)
    height, width = tokens.shape[1:3]
    grid = _sampling_grid(offset, height, width)
    common = torch.promote_types(tokens.dtype, grid.dtype)
    grad_tokens, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
        *(tensor.permute(0, 3, 1, 2).to(common) for tensor in (grad_out, tokens)),
        grid.to(common), _BILINEAR, _ZEROS, True, (True, True),
    )  # fmt: skip
    grad_offset = grad_grid.flip(-1) * grid.new_tensor((2 / max(height - 1, 1), 2 / max(width - 1, 1)))
    grad_offset = grad_offset.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, 2h, 2w, yx) -> (B, h, ky, w, kx, yx)
    grad_offset = grad_offset.transpose(2, 3).flatten(3).to(offset.dtype).contiguous()  # -> (B, h, w, 8)
    return grad_tokens.permute(0, 2, 3, 1).to(tokens.dtype).contiguous(), grad_offset.permute(0, 3, 1, 2)


@_sample_tokens_backward.register_fake
def _(grad_out: Tensor, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, h, w = offset.shape
    return tokens.new_empty(tokens.shape), offset.new_empty(batch, h, w, channels).permute(0, 3, 1, 2)


def _save(ctx, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_sample_tokens_backward(grad_out, *ctx.saved_tensors), None


_sample_tokens.register_autograd(_backward, setup_context=_save)


@torch.fx.wrap
def deformable_sample(x: Tensor, offset: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Bilinear samples of a map at learned positions, laid out as the input of a 2x2 stride-2 convolution.

    `F.conv2d(deformable_sample(x, offset), weight, bias, stride=2)` equals torchvision's
    `deform_conv2d(x, offset, weight, bias, stride=2)`. Corners outside the map count as zero. On a GPU it is one Triton
    kernel, under `torch.compile` one operator; in an exported model it is `grid_sample`, which every runtime knows.

    Args:
        x: `(B, C, H, W)`, any floating dtype; a permuted view of channels-last tokens is the fast case.
        offset: `(B, 8, H // 2, W // 2)`, see :func:`sampling_positions`.
        dtype: of the result; that of `x` by default.

    Returns:
        `(B, C, 2 * (H // 2), 2 * (W // 2))`. Coordinates and interpolation are at least float32.
    """
    dtype = dtype or x.dtype
    if not is_exporting() and (torch.compiler.is_compiling() or x.is_cuda):
        return _sample_tokens(x.permute(0, 2, 3, 1), offset, dtype).permute(0, 3, 1, 2)
    return _portable_sample(x, offset, dtype)


def offset_statistics(offset: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How far DTM reaches: mean length of its offsets, and the share of samples that read only padding.

    Args:
        offset: `(B, 8, h, w)`, the output of :attr:`DeformableTokenMerging.offset`.
        size: (H, W) of the map that is sampled.

    Returns:
        Two scalars: the mean Euclidean length in pixels of the sampled map, and the share in [0, 1] of samples that
        lie a whole pixel or more outside it, where all four corners are zero.
    """
    offset = offset.float()
    length = offset.unflatten(1, (TAPS, 2)).norm(dim=2).mean()
    y, x = sampling_positions(offset).unbind(-1)
    outside = (y <= -1) | (y >= size[0]) | (x <= -1) | (x >= size[1])
    return length, outside.float().mean()


@torch.library.custom_op("lit::offset_convolution", mutates_args=())
def _convolve_without_tf32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 2x2 stride-2 convolution in float32, whatever precision PyTorch is set to; the result is channels-last."""
    flags = dict(benchmark=False, deterministic=True, cudnn_enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    out = torch.ops.aten._convolution(x, weight, bias, *_GEOMETRY, **flags)
    return out.contiguous(memory_format=torch.channels_last)


@_convolve_without_tf32.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2] // 2, x.shape[3] // 2, weight.shape[0]).permute(0, 3, 1, 2)


def _convolution_backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    mask = ctx.needs_input_grad
    return torch.ops.aten.convolution_backward(grad_out, x, weight, [weight.shape[0]], *_GEOMETRY, mask)


_convolve_without_tf32.register_autograd(_convolution_backward, setup_context=_save)


@torch.fx.wrap
def convolve_offsets(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 2x2 stride-2 convolution in the weight's dtype, which neither autocast nor TF32 rounds."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # the meta device has none
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        x = x.to(weight.dtype) if autocast else x
        if x.is_cuda and x.dtype == torch.float32 and not is_exporting():
            return _convolve_without_tf32(x, weight, bias)
        return F.conv2d(x, weight, bias, stride=2)


class OffsetConv2d(nn.Conv2d):
    """A convolution that stays in float32: bfloat16 would round an offset of 10 pixels by up to 0.03, TF32 by less."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve_offsets(x, self.weight, self.bias)


@torch.fx.wrap
def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which autocast rounds a convolution's input `x`."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device)


class DeformableTokenMerging(nn.Module):
    """Halves a token map, each output token reading four input tokens at learned positions.

    Shapes: `(B, H, W, C)` to `(B, H // 2, W // 2, C')`; an odd last row or column is dropped but can be sampled.
    """

    def __init__(self, in_chs: int, out_chs: int, *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.offset = OffsetConv2d(in_chs, 2 * TAPS, kernel_size=2, stride=2, **dd)
        self.proj = nn.Conv2d(in_chs, out_chs, kernel_size=2, stride=2, **dd)
        self.norm = nn.BatchNorm2d(out_chs, **dd)
        self.act = nn.GELU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero offsets: DTM starts as a plain convolution."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype  # float32 under autocast, in which the residual stream then stays
        x = x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W), channels-last in memory
        x = deformable_sample(x, self.offset(x), autocast_dtype(x))  # -> (B, C, 2(H//2), 2(W//2))
        x = self.act(self.norm(self.proj(x).to(dtype)))  # -> (B, C', H//2, W//2)
        return x.permute(0, 2, 3, 1).contiguous()  # -> (B, H//2, W//2, C')


class _DeformConvMerging(DeformableTokenMerging):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).contiguous()  # (B, H, W, C) -> (B, C, H, W)
        x = deform_conv2d(x.float(), self.offset(x), self.proj.weight, self.proj.bias, stride=2)
        return self.act(self.norm(x)).permute(0, 2, 3, 1).contiguous()  # -> (B, H//2, W//2, C')


def use_deform_conv(model: nn.Module) -> None:
    """Let a model compute DTM as the original does: by the operator that it equals, torchvision's, in float32."""
    for module in model.modules():
        if isinstance(module, DeformableTokenMerging):
            module.__class__ = _DeformConvMerging


@contextmanager
def captured_offsets(model: nn.Module) -> Iterator[list[tuple[Tensor, tuple[int, int]]]]:
    """Collects, while the model runs, each merging's offsets `(B, 8, h, w)` and the size of the map it samples."""
    captured: list[tuple[Tensor, tuple[int, int]]] = []

    def keep(module: nn.Module, args: tuple[Tensor], offset: Tensor) -> None:
        captured.append((offset.detach().float(), tuple(args[0].shape[2:])))

    mergings = [module for module in model.modules() if isinstance(module, DeformableTokenMerging)]
    hooks = [merging.offset.register_forward_hook(keep) for merging in mergings]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
