"""Deformable token merging (DTM), the learned downsampling between LIT's stages.

DTM is a 2x2 stride-2 deformable convolution, BatchNorm and GELU. Kernel and stride are equal and nothing is padded, so
the four taps of all output tokens tile the input. The deformable convolution therefore equals a bilinear warp of the
whole feature map followed by an ordinary convolution, and needs no im2col.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .biased_attention import is_exporting
from .dtm_kernels import portable_sample, sample_tokens, sampling_positions

torch.fx.wrap("autocast_dtype")
torch.fx.wrap("convolve_offsets")
torch.fx.wrap("deformable_sample")
TAPS = 4  # taps of a 2x2 kernel; each has an offset of two channels, (dy, dx)


def deformable_sample(x: Tensor, offset: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sample a feature map at learned positions, as the input of a 2x2 stride-2 convolution.

    `F.conv2d(deformable_sample(x, offset), weight, bias, stride=2)` equals torchvision's
    `deform_conv2d(x, offset, weight, bias, stride=2)`. The feature map is `(B, C, H, W)`, the result
    `(B, C, 2 * (H // 2), 2 * (W // 2))` in `dtype`, by default that of `x`. Positions and interpolation use float32 or
    float64. It is a Triton kernel on a GPU, one operator under torch.compile, and `grid_sample` in exported models.
    """
    dtype = dtype or x.dtype
    if not is_exporting() and (torch.compiler.is_compiling() or x.is_cuda):
        return sample_tokens(x.permute(0, 2, 3, 1), offset, dtype).permute(0, 3, 1, 2)
    return portable_sample(x, offset, dtype)


def offset_statistics(offset: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute the mean length of offsets `(B, 8, h, w)` in pixels, and the share of samples outside a map of `size`."""
    offset = offset.float()
    length = offset.unflatten(1, (TAPS, 2)).norm(dim=2).mean()
    y, x = sampling_positions(offset).unbind(-1)
    outside = (y <= -1) | (y >= size[0]) | (x <= -1) | (x >= size[1])
    return length, outside.float().mean()


def convolve_offsets(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 2x2 stride-2 convolution in the dtype of the weight, also under autocast.

    bfloat16 rounds an offset of 10 pixels by up to 0.03 pixels. cuDNN may use TF32, whose 10-bit mantissa rounds each
    factor by up to 2^-11: about 0.01 pixels if all products have one sign. `torch.backends.cudnn.allow_tf32 = False`
    disables TF32.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return F.conv2d(x, weight, bias, stride=2)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x.to(weight.dtype), weight, bias, stride=2)


class OffsetConv2d(nn.Conv2d):
    """2x2 stride-2 convolution that autocast leaves in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute offsets `(B, 8, H // 2, W // 2)` from a feature map `(B, C, H, W)`."""
        return convolve_offsets(x, self.weight, self.bias)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast gives to a convolution's input `x`."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device)


class DeformableTokenMerging(nn.Module):
    """Deformable token merging: each output token reads four input tokens at learned positions.

    Offsets are zero at initialization, so that training starts from a plain convolution. They are computed in the dtype
    of the weights, also under autocast.
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
        """Set the offsets to zero."""
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens `(B, H, W, C)` to `(B, H // 2, W // 2, C')` in the same dtype.

        An odd last row or column has no output token, but can be sampled.
        """
        dtype = x.dtype  # under autocast, the residual stream stays in float32
        x = x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W), channels-last in memory
        x = deformable_sample(x, self.offset(x), autocast_dtype(x))  # -> (B, C, 2(H//2), 2(W//2))
        x = self.act(self.norm(self.proj(x).to(dtype)))  # -> (B, C', H//2, W//2)
        return x.permute(0, 2, 3, 1).contiguous()  # -> (B, H//2, W//2, C')


@contextmanager
def captured_offsets(model: nn.Module) -> Iterator[list[tuple[Tensor, tuple[int, int]]]]:
    """Collect the offsets of each merging while the model runs.

    A forward pass adds one pair per merging to the list: offsets `(B, 8, h, w)` in float32, and the size (H, W) of the
    sampled feature map.
    """
    captured: list[tuple[Tensor, tuple[int, int]]] = []

    def capture(module: nn.Module, args: tuple[Tensor], offset: Tensor) -> None:
        captured.append((offset.detach().float(), (args[0].shape[2], args[0].shape[3])))

    with ExitStack() as hooks:
        for merging in (module for module in model.modules() if isinstance(module, DeformableTokenMerging)):
            hooks.enter_context(merging.offset.register_forward_hook(capture))
        yield captured


@torch.no_grad()
def dtm_statistics(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return :func:`offset_statistics` of each DTM for images `(B, 3, H, W)`, as `dtm/{name}/length` and `/outside`."""
    names = [name for name, module in model.named_modules() if isinstance(module, DeformableTokenMerging)]
    model.eval()
    with captured_offsets(model) as captured:
        model.forward(images)  # not model(images): a compiled model calls no hooks
    return {
        f"dtm/{name}/{key}": value.item()
        for name, (offset, size) in zip(names, captured, strict=True)
        for key, value in zip(("length", "outside"), offset_statistics(offset, size))
    }
