"""The parts of LIT's stages: convolutional patch merging, position tables, attention, MLP and attention blocks."""

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_, use_fused_attn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import flex_attention

from .row_attention import RowAttention, bias_strips

# Tokens of a map from which its bias is no longer a tensor. On a CPU rows of queries are then faster, and save memory;
# on a GPU FlexAttention is then as fast (an H100 in bfloat16, docs/performance.md), in a fraction of the memory.
LARGE_MAP, LARGE_MAP_ON_GPU = 576, 2048

HAS_TRITON = find_spec("triton") is not None


def is_exporting() -> bool:
    """Whether torch.export or torch.jit.trace traces the model. (PyTorch's and timm's functions of this name are also
    true, up to PyTorch 2.11, under torch.compile, which may take the sizes of its example for granted.)"""
    return getattr(torch.compiler, "_is_exporting_flag", False) or torch.jit.is_tracing()


def resize_table(table: Tensor, height: int, width: int, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """Interpolate a position table `(1, C, h, w)` to `(1, C, height, width)`, in float32, keeping its dtype.

    As the reference does: bilinear for absolute embeddings, bicubic for relative biases, half-pixel centres, no
    antialiasing.
    """
    # an export with free height and width must not bake in that one example needed no resizing
    if not is_exporting() and tuple(table.shape[-2:]) == (height, width):
        return table
    return F.interpolate(table.float(), (height, width), mode=mode, align_corners=False).to(table.dtype)


def relative_position_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Bias of attention over a whole map, looked up by the displacement from key to query.

    Args:
        table: `(1, heads, 2h-1, 2w-1)`; resized bicubically if the map is not h x w.
        height, width: size of the map, in tokens.

    Returns:
        `(1, heads, N, N)` with `N = height * width`: query token, then key token, both in row-major order.
    """
    table = resize_table(table, 2 * height - 1, 2 * width - 1, mode="bicubic")
    tokens = height * width
    if torch.compiler.is_compiling() or is_exporting():  # windows would be compiled anew for each size
        query, key = displacements(height, width, table.device)
        # not table.flatten(2)[..., index]: its backward is several times slower on a CPU
        bias = table.flatten(2).index_select(2, (query[:, None] - key).flatten())  # (1, heads, L) -> (1, heads, N * N)
        return bias.unflatten(2, (tokens, tokens))  # -> (1, heads, N, N)
    biases = bias_strips(table, width).unfold(2, height, 1)  # -> (heads, W, H, W, H), a view: the last row's first
    biases = biases.permute(0, 2, 1, 4, 3).flip(1)  # -> (heads, H, W, H, W), a copy
    return biases.reshape(1, -1, tokens, tokens)  # -> (1, heads, N, N)


def displacements(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two numbers for each token of a map, as query and as key, whose difference is their index in the table."""
    y = torch.arange(height, device=device, dtype=torch.int32)
    x = torch.arange(width, device=device, dtype=torch.int32)
    key = (y[:, None] * (2 * width - 1) + x).flatten()  # (N,)
    return key + (height - 1) * (2 * width - 1) + (width - 1), key


def flex_attention_with_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Attention with the relative position bias looked up in the kernel: no tensor has N x N entries.

    Args:
        q, k, v: `(B, heads, N, C/heads)` with `N = height * width`.
        table: `(1, heads, 2h-1, 2w-1)`, of any floating dtype; gets its gradient by atomic additions.
        height, width: size of the map, in tokens.

    Returns:
        `(B, heads, N, C/heads)`.
    """
    table = resize_table(table.float(), 2 * height - 1, 2 * width - 1, mode="bicubic")[0].flatten(1)  # (heads, L)
    table = table.clone()  # of a view that is captured, the compiler's `aot_eager` backend loses the gradient
    query, key = displacements(height, width, q.device)
    # sizes are read from tensors, not from numbers, so that one compilation serves every map

    def add_bias(score: Tensor, image: Tensor, head: Tensor, query_token: Tensor, key_token: Tensor) -> Tensor:
        return score + table[head, query[query_token] - key[key_token]]

    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return attend(q, k, v, score_mod=add_bias)


@lru_cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


@lru_cache
def _has_flex_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlexAttention compiles with a bias, forward and backward; rows of queries step in where it doesn't."""
    own = saved_tensors_hooks(lambda x: x, lambda x: x)  # those of a checkpoint around would run its block again
    try:
        with own, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            q, k, v = torch.zeros(3, 2, 2, 256, head_dim, device=device, dtype=dtype, requires_grad=True)
            table = torch.zeros(1, 2, 31, 31, device=device, requires_grad=True)
            flex_attention_with_bias(q, k, v, table, 16, 16).sum().backward()
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # says nothing about the kernel
        raise
    except Exception as error:
        warnings.warn(f"large maps are attended to more slowly: FlexAttention failed with {error!r}", stacklevel=1)
        return False
    return True


def _is_large(q: Tensor, tokens: int) -> bool:
    if q.is_cuda:
        return not is_exporting() and tokens >= LARGE_MAP_ON_GPU
    # a graph for all sizes must not depend on one
    traced = torch.compiler.is_compiling() or is_exporting()
    return not (traced or q.is_meta) and tokens >= LARGE_MAP


def _use_flex_attention(q: Tensor) -> bool:
    return (
        q.is_cuda
        and HAS_TRITON
        and not torch.are_deterministic_algorithms_enabled()  # its gradients come by atomic additions
        and q.shape[-1] >= 16  # which it asks for
        and q.dtype != torch.float64
        # in a graph that is being compiled nothing can be tried out
        and (torch.compiler.is_compiling() or _has_flex_attention(q.device, q.dtype, q.shape[-1]))
    )


def _aligned(bias: Tensor, images: int, dtype: torch.dtype) -> Tensor:
    tokens = bias.shape[-1]
    rows = bias.new_zeros(*bias.shape[:-1], tokens + -tokens % 8, dtype=dtype).narrow(3, 0, tokens)
    return rows.copy_(bias).expand(images, -1, -1, -1)


# A bias (1, heads, N, N) as fused attention wants it on a GPU: in the dtype of queries, for each image, in rows that
# begin at multiples of 8 entries. PyTorch does this itself, but its compiler (2.11) has laid out the result so that the
# kernels refused it: in LIT-S's backward pass at batch 256, and for a map of one token under activation checkpointing.
_align = torch.library.custom_op("lit::align_bias", _aligned, mutates_args=())
_align.register_fake(_aligned)


def _align_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad.sum(0, keepdim=True, dtype=torch.promote_types(grad.dtype, torch.float32)), None, None


_align.register_autograd(_align_backward)


@torch.fx.wrap
def biased_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Attention over a whole map with a relative position bias, see :func:`flex_attention_with_bias` for the shapes.

    The bias of a large map is looked up in the kernel or by rows of queries. It stays a tensor in exported models, on a
    CPU in compiled ones, and at timm's switch: TIMM_FUSED_ATTN=0 or `set_fused_attn(False)`.
    """
    if use_fused_attn() and _is_large(q, height * width):
        if _use_flex_attention(q):
            return flex_attention_with_bias(q, k, v, table, height, width)
        if not torch.compiler.is_compiling():
            table = resize_table(table, 2 * height - 1, 2 * width - 1, mode="bicubic")
            return RowAttention.apply(q, k, v, table, height, width)
    bias = relative_position_bias(table, height, width)  # in the table's dtype, in which its gradient is summed
    bias = _align(bias, len(q), q.dtype) if q.is_cuda and not is_exporting() else bias.to(q.dtype)
    if torch.onnx.is_in_onnx_export():  # a mask that asks for gradients takes a path that PyTorch cannot export
        bias = bias.detach()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def require_size(x: Tensor, smallest: int) -> Tensor:
    """The images `(B, C, H, W)`; raises ValueError if a side has fewer than `smallest` pixels."""
    if not is_exporting() and min(x.shape[2:]) < smallest:
        size = f"{x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"an input of {size} pixels is too small, the smallest is {smallest} x {smallest}")
    return x


@torch.fx.wrap
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map `(B, C, H, W)` on the right and at the bottom until `multiple` divides H and W."""
    bottom = (multiple - x.shape[2] % multiple) % multiple
    right = (multiple - x.shape[3] % multiple) % multiple
    return F.pad(x, (0, right, 0, bottom)) if is_exporting() or bottom or right else x


class ConvMerging(nn.Module):
    """k x k convolution with stride k, and LayerNorm: the patch embedding of LIT (k = 4), the merging of PVT (k = 2).

    Shapes: `(B, H, W, C)` to `(B, H // k, W // k, C')`; with `pad`, to `(B, ceil(H / k), ceil(W / k), C')`.
    """

    def __init__(self, in_chs: int, out_chs: int, patch_size: int, *, pad: bool = False, device=None, dtype=None):
        super().__init__()
        self.patch_size = patch_size
        self.pad = pad
        self.proj = nn.Conv2d(in_chs, out_chs, patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_chs, device=device, dtype=dtype)  # its eps is 1e-5 in every variant

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
        if self.pad:
            x = pad_to_multiple(x, self.patch_size)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # -> (B, H/k, W/k, C')


class ConvBNMerging(nn.Module):
    """2x2 convolution with stride 2, BatchNorm and GELU: DTM without offsets, which tells what these are worth.

    Shapes: `(B, H, W, C)` to `(B, H // 2, W // 2, C')`.
    """

    def __init__(self, in_chs: int, out_chs: int, *, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(in_chs, out_chs, kernel_size=2, stride=2, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_chs, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype  # float32 under autocast, in which the residual stream then stays
        x = self.proj(x.permute(0, 3, 1, 2)).to(dtype)  # (B, H, W, C) -> (B, C', H//2, W//2)
        return self.act(self.norm(x)).permute(0, 2, 3, 1).contiguous()  # -> (B, H//2, W//2, C')


class Attention(nn.Module):
    """Global multi-head self-attention, with a relative position bias over the whole map where `map_size` is given.

    Shapes: `(B, H, W, C)` or, without the bias, any `(B, ..., C)`; the output has the input's shape.
    """

    def __init__(self, dim: int, num_heads: int, *, map_size: tuple[int, int] | None = None, device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
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
        if self.rel_pos_bias is not None:
            trunc_normal_(self.rel_pos_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, -2).unflatten(2, (3, self.num_heads, x.shape[-1] // self.num_heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, N, 3, heads, C/heads) -> 3 x (B, heads, N, C/heads)
        if self.rel_pos_bias is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = biased_attention(q, k, v, self.rel_pos_bias, x.shape[1], x.shape[2])
        return self.proj(out.transpose(1, 2).reshape(x.shape))  # (B, heads, N, C/heads) -> (B, ..., C)


class MlpBlock(nn.Module):
    """The block of LIT's attention-free stages: `x + DropPath(MLP(LN(x)))` on `(B, ..., C)`."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm2 = norm_layer(dim, **dd)  # norm1 belongs to attention
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AttentionBlock(MlpBlock):
    """The pre-norm transformer block of LIT's later stages: attention, then MLP, each with a residual."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        map_size: tuple[int, int] | None,
        mlp_ratio: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, mlp_ratio=mlp_ratio, drop_path=drop_path, norm_layer=norm_layer, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(dim, num_heads, map_size=map_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return super().forward(x)
