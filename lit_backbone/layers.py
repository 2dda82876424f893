"""Building blocks of LIT: patch merging, position tables, attention and MLP blocks."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models.twins import GlobalSubSampleAttn
from torch import Tensor, nn

from .biased_attention import biased_attention, is_exporting

torch.fx.wrap("biased_attention")
torch.fx.wrap("pad_to_multiple")
torch.fx.wrap("resize_table")
Layer = Callable[..., nn.Module]
TableMode = Literal["bilinear", "bicubic"]  # interpolation of a position table
TABLE_MODES: dict[str, TableMode] = {"pos_embed": "bilinear", "rel_pos_bias": "bicubic"}


def resize_table(table: Tensor, height: int, width: int, mode: TableMode) -> Tensor:
    """Interpolate a position table `(1, C, h, w)` to `(1, C, height, width)` in float32; keeps the dtype.

    As in the reference, absolute embeddings use bilinear and relative biases bicubic interpolation, with
    `align_corners=False` and without antialiasing.
    """
    # An export with dynamic height and width must not specialize to an example that needs no resizing.
    if not is_exporting() and tuple(table.shape[-2:]) == (height, width):
        return table
    return F.interpolate(table.float(), (height, width), mode=mode, align_corners=False).to(table.dtype)


def resize_position_tables(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a state dict whose position tables are interpolated to the sizes in `model`."""
    out = dict(state_dict)
    for name, expected in model.state_dict().items():
        mode, table = TABLE_MODES.get(name.rpartition(".")[2]), out.get(name)
        if mode and table is not None and table.ndim == 4 and table.shape[:2] == expected.shape[:2] and table.numel():
            out[name] = resize_table(table, expected.shape[2], expected.shape[3], mode=mode)
    return out


def require_size(x: Tensor, min_size: int) -> Tensor:
    """Return the images `(B, C, H, W)`; raises ValueError if height or width is less than `min_size` pixels."""
    if not is_exporting() and min(x.shape[2:]) < min_size:
        size = f"{x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"input size {size}: too small. Use at least {min_size} x {min_size} pixels.")
    return x


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a feature map `(B, C, H, W)` on the right and bottom until `multiple` divides H and W."""
    bottom, right = ((multiple - size % multiple) % multiple for size in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom)) if is_exporting() or bottom or right else x


class ConvMerging(nn.Module):
    """Convolution with kernel size and stride `patch_size`, then LayerNorm.

    With 4 this is the patch embedding of LIT. With 2 it is the patch merging of PVT. `pad` zero-pads height and width
    to a multiple of `patch_size` instead of dropping the remainder.
    """

    def __init__(self, in_chs: int, out_chs: int, patch_size: int, *, pad: bool = False, device=None, dtype=None):
        super().__init__()
        self.patch_size = patch_size
        self.pad = pad
        self.proj = nn.Conv2d(in_chs, out_chs, patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_chs, device=device, dtype=dtype)  # eps is 1e-5 in every variant

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens `(B, H, W, C)` to `(B, H/k, W/k, C')`; sizes are rounded up with `pad`, else down."""
        x = x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
        if self.pad:
            x = pad_to_multiple(x, self.patch_size)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # -> (B, H/k, W/k, C')


class ConvBNMerging(nn.Module):
    """2x2 stride-2 convolution, BatchNorm and GELU: deformable token merging without offsets, for ablations."""

    def __init__(self, in_chs: int, out_chs: int, *, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(in_chs, out_chs, kernel_size=2, stride=2, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_chs, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens `(B, H, W, C)` to `(B, H // 2, W // 2, C')`."""
        dtype = x.dtype  # under autocast, the residual stream stays in float32
        x = self.proj(x.permute(0, 3, 1, 2)).to(dtype)  # (B, H, W, C) -> (B, C', H//2, W//2)
        return self.act(self.norm(x)).permute(0, 2, 3, 1).contiguous()  # -> (B, H//2, W//2, C')


class Attention(nn.Module):
    """Global multi-head self-attention, optionally with a relative position bias over the whole feature map.

    The bias table is stored for feature maps of `map_size` (height, width) and resized for others; None for no bias.
    """

    def __init__(self, dim: int, num_heads: int, *, map_size: tuple[int, int] | None = None, device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: does not divide {dim} channels. Use a divisor of {dim}.")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.rel_pos_bias = None
        if map_size is not None:
            height, width = map_size
            self.rel_pos_bias = nn.Parameter(torch.empty(1, num_heads, 2 * height - 1, 2 * width - 1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the bias table."""
        if self.rel_pos_bias is not None:
            trunc_normal_(self.rel_pos_bias, std=0.02)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute queries, keys and values, each `(B, heads, N, C/heads)`."""
        qkv = self.qkv(x).flatten(1, -2).unflatten(2, (3, self.num_heads, x.shape[-1] // self.num_heads))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, N, 3, heads, C/heads) -> 3 x (B, heads, N, C/heads)

    def bias_table(self, height: int, width: int) -> Tensor:
        """Return the bias table `(1, heads, 2H-1, 2W-1)` for a feature map."""
        assert self.rel_pos_bias is not None
        return resize_table(self.rel_pos_bias, 2 * height - 1, 2 * width - 1, mode="bicubic")

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all tokens `(B, H, W, C)`, or any `(B, ..., C)` without bias; keeps the shape."""
        q, k, v = self.project(x)
        if self.rel_pos_bias is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            height, width = x.shape[1], x.shape[2]
            out = biased_attention(q, k, v, self.bias_table(height, width), height, width)
        return self.proj(out.transpose(1, 2).reshape(x.shape))  # (B, heads, N, C/heads) -> (B, ..., C)


class ReducedAttention(GlobalSubSampleAttn):
    """PVT's spatial-reduction attention, to a feature map that a convolution reduces by `sr_ratio`."""

    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """Attend from all tokens `(B, H, W, C)` to the reduced ones `(B, H/r, W/r, C)`; keeps the shape."""
        return super().forward(x.flatten(1, 2), (x.shape[1], x.shape[2])).reshape(x.shape)


class MlpBlock(nn.Module):
    """Pure MLP block of LIT's early stages: `x + DropPath(MLP(LN(x)))`."""

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path: float, norm_layer: Layer, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm2 = norm_layer(dim, **dd)  # norm1 belongs to attention
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens `(B, ..., C)`; keeps the shape."""
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AttentionBlock(MlpBlock):
    """Pre-norm transformer block of LIT's late stages: attention, then MLP, each with a residual connection."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        map_size: tuple[int, int] | None,
        sr_ratio: int = 1,
        mlp_ratio: float,
        drop_path: float,
        norm_layer: Layer,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, mlp_ratio=mlp_ratio, drop_path=drop_path, norm_layer=norm_layer, **dd)
        self.norm1 = norm_layer(dim, **dd)
        if sr_ratio > 1:
            self.attn = ReducedAttention(dim, num_heads, sr_ratio=sr_ratio, **dd)
        else:
            self.attn = Attention(dim, num_heads, map_size=map_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens `(B, H, W, C)`, or any `(B, ..., C)` without bias; keeps the shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return super().forward(x)
