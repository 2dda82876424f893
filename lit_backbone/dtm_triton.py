"""Deformable sampling on a GPU: one kernel forward, one backward.

A program handles some samples and some channels of each: it reads the four rows of the channels-last token map around a
sample in the map's own dtype, and interpolates in float32. Nothing but the result is written. On the way back, samples
meet where they read the same token, so that the map's gradient is summed by atomic additions, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # samples x channels of a program; with 4096, backward passes take a fifth longer on an H100


@triton.jit
def _clamp(position, low, high):
    position = tl.maximum(position, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(position, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _locate(sample, offset, H, W, h, w, in_range):
    """The image and upper left corner of each sample, its distance from that, and its place in `offset`."""
    column, rest = sample % (2 * w), sample // (2 * w)
    row, image = rest % (2 * h), rest // (2 * h)
    place = 8 * ((image.to(tl.int64) * h + row // 2) * w + column // 2) + 4 * (row % 2) + 2 * (column % 2)
    dy = tl.load(offset + place, mask=in_range, other=0.0).to(tl.float32)
    dx = tl.load(offset + place + 1, mask=in_range, other=0.0).to(tl.float32)
    # the limits keep far positions within integers, and read nothing, like all that is more than a pixel outside
    y = _clamp(row + dy, -2.0, H + 1.0)
    x = _clamp(column + dx, -2.0, W + 1.0)
    top, left = tl.floor(y), tl.floor(x)
    return image.to(tl.int64), top.to(tl.int32), left.to(tl.int32), y - top, x - left, place


@triton.jit
def _corner(image, y, x, H, W, in_range):
    """Row of the token map that holds a corner, and whether there is one."""
    return (image * H + y) * W + x, in_range & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _load_rows(tokens, row, exists, channel, C):
    mask = exists[:, None] & (channel < C)[None, :]
    return tl.load(tokens + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    tokens, offset, out, samples, H, W, h, w, C, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_range = sample < samples
    image, top, left, fy, fx, _ = _locate(sample, offset, H, W, h, w, in_range)
    total = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    for corner in tl.static_range(4):
        below, right = corner // 2, corner % 2
        row, exists = _corner(image, top + below, left + right, H, W, in_range)
        weight = (fy if below else 1 - fy) * (fx if right else 1 - fx)
        total += weight[:, None] * _load_rows(tokens, row, exists & (weight != 0), channel, C)
    place = sample.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=in_range[:, None] & (channel < C)[None, :])


@triton.jit
def _backward_kernel(
    grad_out, tokens, offset, grad_tokens, grad_offset,
    samples, H, W, h, w, C, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    in_range = sample < samples
    image, top, left, fy, fx, place = _locate(sample, offset, H, W, h, w, in_range)
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
    tl.store(grad_offset + place, grad_y.to(grad_offset.dtype.element_ty), mask=in_range)
    tl.store(grad_offset + place + 1, grad_x.to(grad_offset.dtype.element_ty), mask=in_range)


def _tile(channels: int) -> dict[str, int]:
    width = min(triton.next_power_of_2(channels), 128)
    return {"SAMPLES": TILE // width, "CHANNELS": width}


def compile_kernels(device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Compile what samples a map of this dtype, without a tensor, and raise what the compiler raises."""
    sizes, f32 = (4 * 28 * 28, 56, 56, 28, 28, channels), torch.float32
    with torch.cuda.device(device):
        _forward_kernel.warmup(dtype, f32, dtype, *sizes, grid=(1,), **_tile(channels))
        _backward_kernel.warmup(dtype, dtype, f32, f32, f32, *sizes, grid=(1,), **_tile(channels))


def sample_forward(tokens: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """The samples `(B, 2h, 2w, C)` in `dtype` of tokens `(B, H, W, C)` at offsets `(B, 8, h, w)`."""
    batch, height, width, channels = tokens.shape
    h, w = offset.shape[2:]
    out = tokens.new_empty(batch, 2 * h, 2 * w, channels, dtype=dtype)
    samples, tile = batch * 4 * h * w, _tile(channels)
    if out.numel():
        tokens, offset = tokens.contiguous(), offset.permute(0, 2, 3, 1).contiguous()
        grid = (triton.cdiv(samples, tile["SAMPLES"]), triton.cdiv(channels, tile["CHANNELS"]))
        with torch.cuda.device_of(tokens):
            _forward_kernel[grid](tokens, offset, out, samples, height, width, h, w, channels, **tile)
    return out


def sample_backward(grad_out: Tensor, tokens: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of tokens and offsets, the latter channels-last in memory, from that of the samples."""
    grad_out, tokens, offset = grad_out.contiguous(), tokens.contiguous(), offset.permute(0, 2, 3, 1).contiguous()
    batch, height, width, channels = tokens.shape
    h, w = offset.shape[1:3]
    grad_tokens = torch.zeros_like(tokens, dtype=torch.float32)
    grad_offset = torch.empty_like(offset)
    samples, tile = batch * 4 * h * w, _tile(channels)
    if grad_out.numel():
        arguments = (grad_out, tokens, offset, grad_tokens, grad_offset, samples, height, width, h, w, channels)
        with torch.cuda.device_of(tokens):
            _backward_kernel[(triton.cdiv(samples, tile["SAMPLES"]),)](*arguments, **tile)
    return grad_tokens.to(tokens.dtype), grad_offset.permute(0, 3, 1, 2)
