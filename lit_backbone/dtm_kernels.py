"""Deformable sampling as a custom operator: Triton kernels on a GPU, PyTorch's sampler elsewhere.

Each Triton program handles some samples and some of their channels. It reads the four corners of a sample from the
channels-last feature map in its dtype and interpolates in float32. The backward kernel accumulates the gradient of the
feature map with atomic additions in float32.
"""

import warnings
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not available on every platform; the kernels below are then plain functions that nobody calls
    triton: Any = None
    tl: Any = SimpleNamespace(constexpr=int)
jit = triton.jit if triton else lambda function: function

TILE = 1024  # samples x channels per program; 4096 makes the backward pass 20 % slower (H100)
BILINEAR, ZEROS = 0, 0  # interpolation and padding modes of aten's sampler


# ---- PyTorch's sampler


def sampling_positions(offset: Tensor) -> Tensor:
    """Return the positions `(B, 2h, 2w, yx)` that a 2x2 stride-2 deformable convolution samples.

    Offsets `(B, 8, h, w)` are in pixels of the input. Channel `2 * (2 * ky + kx)` is dy of tap (ky, kx), and the next
    channel is its dx. Positions are relative to the center of the first pixel, in float32 or for such offsets float64.
    """
    batch, _, h, w = offset.shape
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    offset = offset.reshape(batch, 2, 2, 2, h, w)  # (B, 8, h, w) -> (B, ky, kx, yx, h, w)
    offset = offset.permute(0, 4, 1, 5, 2, 3).reshape(batch, 2 * h, 2 * w, 2)  # -> (B, 2h, 2w, yx)
    y = torch.arange(2 * h, device=offset.device, dtype=offset.dtype)
    x = torch.arange(2 * w, device=offset.device, dtype=offset.dtype)
    return offset + torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def _sampling_grid(offset: Tensor, height: int, width: int) -> Tensor:
    """Convert offsets `(B, 8, h, w)` to the grid `(B, 2h, 2w, xy)` of `grid_sample(align_corners=True)`, in [-1, 1].

    The derivative of bilinear sampling is one-sided at whole pixels, where every sample lies at the start of training.
    `deform_conv2d` takes the side of `floor`. Rounding during the conversion can end just below the integer, on the
    other side. Adding two ulps of the size prevents this.
    """
    y, x = sampling_positions(offset).unbind(-1)
    axes = []
    for position, size in ((x, width), (y, height)):
        whole = position == position.floor()
        position = position + whole * (2 * torch.finfo(position.dtype).eps * size)
        axes.append(position * (2 / max(size - 1, 1)) - 1)
    return torch.stack(axes, dim=-1)


def portable_sample(x: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Sample a feature map `(B, C, H, W)` with PyTorch's sampler; returns `(B, C, 2h, 2w)` in `dtype`."""
    grid = _sampling_grid(offset, x.shape[2], x.shape[3])
    common = torch.promote_types(x.dtype, grid.dtype)
    # F.grid_sample may select cuDNN's sampler on a GPU, which rounds positions differently
    return torch.ops.aten.grid_sampler_2d(x.to(common), grid.to(common), BILINEAR, ZEROS, True).to(dtype)


def _portable_backward(grad_out: Tensor, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    height, width = tokens.shape[1:3]
    grid = _sampling_grid(offset, height, width)
    common = torch.promote_types(tokens.dtype, grid.dtype)
    maps = (tensor.permute(0, 3, 1, 2).to(common) for tensor in (grad_out, tokens))  # (B, H, W, C) -> (B, C, H, W)
    grad_tokens, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
        *maps, grid.to(common), BILINEAR, ZEROS, True, (True, True)
    )
    grad_offset = grad_grid.flip(-1) * grid.new_tensor((2 / max(height - 1, 1), 2 / max(width - 1, 1)))
    grad_offset = grad_offset.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, 2h, 2w, yx) -> (B, h, ky, w, kx, yx)
    grad_offset = grad_offset.transpose(2, 3).flatten(3).to(offset.dtype).contiguous()  # -> (B, h, w, 8)
    return grad_tokens.permute(0, 2, 3, 1).to(tokens.dtype).contiguous(), grad_offset.permute(0, 3, 1, 2)


# ---- Triton kernels


@jit
def _locate(sample, offset, H, W, in_range):
    """Return image, top left corner and fraction of each sample, and its index in `offset`."""
    h, w = H // 2, W // 2
    column, rest = sample % (2 * w), sample // (2 * w)
    row, image = rest % (2 * h), rest // (2 * h)
    index = 8 * ((image.to(tl.int64) * h + row // 2) * w + column // 2) + 4 * (row % 2) + 2 * (column % 2)
    dy = tl.load(offset + index, mask=in_range, other=0.0).to(tl.float32)
    dx = tl.load(offset + index + 1, mask=in_range, other=0.0).to(tl.float32)
    # Distant positions must fit in int32. Samples more than one pixel outside the map read zero anyway.
    y = tl.clamp(row + dy, -2.0, H + 1.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.clamp(column + dx, -2.0, W + 1.0, propagate_nan=tl.PropagateNan.ALL)
    top, left = tl.floor(y), tl.floor(x)
    return image.to(tl.int64), top.to(tl.int32), left.to(tl.int32), y - top, x - left, index


@jit
def _corner(image, y, x, H, W, in_range):
    """Return the row of a corner in the flattened feature map, and a mask of the corners inside the map."""
    return (image * H + y) * W + x, in_range & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@jit
def _load_rows(tokens, row, exists, channel, C):
    mask = exists[:, None] & (channel < C)[None, :]
    return tl.load(tokens + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _forward_kernel(tokens, offset, out, samples, H, W, C, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr):
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_range = sample < samples
    image, top, left, fy, fx, _ = _locate(sample, offset, H, W, in_range)
    total = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    for corner in tl.static_range(4):
        below, right = corner // 2, corner % 2
        row, exists = _corner(image, top + below, left + right, H, W, in_range)
        weight = (fy if below else 1 - fy) * (fx if right else 1 - fx)
        total += weight[:, None] * _load_rows(tokens, row, exists & (weight != 0), channel, C)
    index = sample.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + index, total.to(out.dtype.element_ty), mask=in_range[:, None] & (channel < C)[None, :])


@jit
def _backward_kernel(
    grad_out, tokens, offset, grad_tokens, grad_offset, samples, H, W, C, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    in_range = sample < samples
    image, top, left, fy, fx, index = _locate(sample, offset, H, W, in_range)
    grad_y = tl.zeros((SAMPLES,), tl.float32)
    grad_x = tl.zeros((SAMPLES,), tl.float32)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        grad = _load_rows(grad_out, sample.to(tl.int64), in_range, channel, C)
        for corner in tl.static_range(4):
            below, right = corner // 2, corner % 2
            row, exists = _corner(image, top + below, left + right, H, W, in_range)
            weight_y, weight_x = (fy if below else 1 - fy), (fx if right else 1 - fx)
            weight = weight_y * weight_x
            adds = (exists & (weight != 0))[:, None] & (channel < C)[None, :]
            tl.atomic_add(
                grad_tokens + row[:, None] * C + channel[None, :], weight[:, None] * grad, mask=adds, sem="relaxed"
            )
            product = tl.sum(grad * _load_rows(tokens, row, exists, channel, C), axis=1)
            grad_y += weight_x * (product if below else -product)
            grad_x += weight_y * (product if right else -product)
    tl.store(grad_offset + index, grad_y.to(grad_offset.dtype.element_ty), mask=in_range)
    tl.store(grad_offset + index + 1, grad_x.to(grad_offset.dtype.element_ty), mask=in_range)


def _tile(channels: int) -> dict[str, int]:
    width = min(triton.next_power_of_2(channels), 128)
    return {"SAMPLES": TILE // width, "CHANNELS": width}


def kernel_forward(tokens: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Sample tokens `(B, H, W, C)` at offsets `(B, 8, h, w)`; returns `(B, 2h, 2w, C)` in `dtype`."""
    batch, height, width, channels = tokens.shape
    h, w = offset.shape[2:]
    out = tokens.new_empty(batch, 2 * h, 2 * w, channels, dtype=dtype)
    samples, tile = batch * 4 * h * w, _tile(channels)
    if out.numel():
        tokens, offset = tokens.contiguous(), offset.permute(0, 2, 3, 1).contiguous()
        grid = (triton.cdiv(samples, tile["SAMPLES"]), triton.cdiv(channels, tile["CHANNELS"]))
        with torch.cuda.device_of(tokens):
            _forward_kernel[grid](tokens, offset, out, samples, height, width, channels, **tile)
    return out


def kernel_backward(grad_out: Tensor, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and offsets, in their dtypes; those of the offsets are channels-last in memory."""
    grad_out, tokens, offset = grad_out.contiguous(), tokens.contiguous(), offset.permute(0, 2, 3, 1).contiguous()
    batch, height, width, channels = tokens.shape
    h, w = offset.shape[1:3]
    grad_tokens = torch.zeros_like(tokens, dtype=torch.float32)
    grad_offset = torch.empty_like(offset)
    samples, tile = batch * 4 * h * w, _tile(channels)
    if grad_out.numel():
        arguments = (grad_out, tokens, offset, grad_tokens, grad_offset, samples, height, width, channels)
        with torch.cuda.device_of(tokens):
            _backward_kernel[(triton.cdiv(samples, tile["SAMPLES"]),)](*arguments, **tile)
    return grad_tokens.to(tokens.dtype), grad_offset.permute(0, 3, 1, 2)


@lru_cache
def _has_kernels(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Return True if the kernels compile; needs a C compiler and a supported GPU, and allocates no memory there."""
    if device.type != "cuda" or triton is None:
        return False
    sizes, f32 = (56 * 56, 56, 56, channels), torch.float32
    try:
        with torch.cuda.device(device):
            _forward_kernel.warmup(dtype, f32, dtype, *sizes, grid=(1,), **_tile(channels))
            _backward_kernel.warmup(dtype, dtype, f32, f32, f32, *sizes, grid=(1,), **_tile(channels))
    except Exception as error:
        warnings.warn(f"DTM's Triton kernels do not compile ({error!r}). Using PyTorch's sampler.", stacklevel=1)
        return False
    return True


def _use_kernels(tokens: Tensor) -> bool:
    # atomic additions are not deterministic; PyTorch's sampler then raises, as PyTorch documents
    is_supported = tokens.dtype != torch.float64 and not torch.are_deterministic_algorithms_enabled()
    return is_supported and _has_kernels(tokens.device, tokens.dtype, tokens.shape[3])


# ---- custom operator


@torch.library.custom_op("lit::deformable_sample", mutates_args=())
def sample_tokens(tokens: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Sample tokens as :func:`kernel_forward` does, opaque to torch.compile, whose decomposed sampler is slower."""
    if _use_kernels(tokens):
        return kernel_forward(tokens, offset, dtype)
    return portable_sample(tokens.permute(0, 3, 1, 2), offset, dtype).permute(0, 2, 3, 1).contiguous()


@sample_tokens.register_fake
def _(tokens: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    batch, _, h, w = offset.shape
    return tokens.new_empty((batch, 2 * h, 2 * w, tokens.shape[3]), dtype=dtype)


@torch.library.custom_op("lit::deformable_sample_backward", mutates_args=())
def _sample_tokens_backward(grad_out: Tensor, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return (kernel_backward if _use_kernels(tokens) else _portable_backward)(grad_out, tokens, offset)


@_sample_tokens_backward.register_fake
def _(grad_out: Tensor, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, h, w = offset.shape
    return tokens.new_empty(tokens.shape), offset.new_empty(batch, h, w, channels).permute(0, 3, 1, 2)


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_sample_tokens_backward(grad_out, *ctx.saved_tensors), None


sample_tokens.register_autograd(_backward, setup_context=_setup_context)
