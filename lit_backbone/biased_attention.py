"""Self-attention with a relative position bias over the whole feature map.

:func:`biased_attention` selects one of three implementations. Small feature maps use a bias tensor with N x N entries.
Large feature maps use FlexAttention on a GPU, and rows of queries for inference on a CPU.
"""

import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import flex_attention

# Number of tokens from which the bias is no longer a tensor. On a CPU, rows of queries are faster from here on.
# On a GPU, FlexAttention is as fast from here on (H100, bfloat16, docs/performance.md) and uses less memory.
LARGE_MAP, LARGE_MAP_ON_GPU = 576, 2048

compiled_flex_attention = torch.compile(flex_attention, dynamic=True)


def is_exporting() -> bool:
    """Return True while torch.export or torch.jit.trace traces the model.

    Up to PyTorch 2.11, `torch.compiler.is_exporting` is also True under torch.compile.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False) or torch.jit.is_tracing()


def relative_position_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Expand a table of relative position biases to a bias tensor `(1, heads, N, N)` in the same dtype.

    The table is indexed by the displacement from key to query, the result by query token and key token in row-major
    order. See :func:`biased_attention` for the arguments.
    """
    tokens = height * width
    if torch.compiler.is_compiling() or is_exporting():  # unfold recompiles for every size
        query, key = _displacements(height, width, table.device)
        # table.flatten(2)[..., index] has a backward several times slower on a CPU
        bias = table.flatten(2).index_select(2, (query[:, None] - key).flatten())  # (1, heads, L) -> (1, heads, N * N)
        return bias.unflatten(2, (tokens, tokens))  # -> (1, heads, N, N)
    biases = _bias_rows(table, height, width).flip(1)  # (heads, H, W, H, W)
    return biases.reshape(1, -1, tokens, tokens)  # -> (1, heads, N, N)


def _bias_rows(table: Tensor, height: int, width: int) -> Tensor:
    """Return a view `(heads, H, W, H, W)` of the biases of all queries to all keys, with the last query row first."""
    windows = table[0].flip(1, 2).unfold(2, width, 1)  # (1, heads, 2H-1, 2W-1) -> (heads, 2H-1, W, W)
    strips = windows.flip(2).transpose(1, 2).contiguous()  # -> (heads, W, 2H-1, W)
    return strips.unfold(2, height, 1).permute(0, 2, 1, 4, 3)  # -> (heads, H, W, H, W)


def _displacements(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two int32 tensors `(N,)`; query minus key is the index of a pair of tokens in the flattened table."""
    y, x = (torch.arange(size, device=device, dtype=torch.int32) for size in (height, width))
    key = (y[:, None] * (2 * width - 1) + x).flatten()
    return key + (height - 1) * (2 * width - 1) + (width - 1), key


def flex_attention_with_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Compute attention with FlexAttention, which reads the bias from the table inside the kernel.

    No tensor has N x N entries. Atomic additions in float32 accumulate the gradient of the table. See
    :func:`biased_attention` for the arguments.
    """
    # Without the clone, the compiler backend `aot_eager` loses the gradient of a captured view.
    table = table.float()[0].flatten(1).clone()  # (1, heads, 2H-1, 2W-1) -> (heads, L)
    query, key = _displacements(height, width, q.device)

    # The function reads sizes from tensors instead of numbers, so that one compilation serves every feature map.
    def add_bias(score: Tensor, image: Tensor, head: Tensor, query_token: Tensor, key_token: Tensor) -> Tensor:
        return score + table[head, query[query_token] - key[key_token]]

    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention
    return attend(q, k, v, score_mod=add_bias)  # pyrefly: ignore[bad-return]


@lru_cache
def _has_flex_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if FlexAttention with a bias compiles and runs, forward and backward."""
    # Under activation checkpointing, the surrounding hooks would run the block again.
    no_hooks = saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with no_hooks, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            q, k, v = torch.zeros(3, 2, 2, 256, head_dim, device=device, dtype=dtype, requires_grad=True)
            table = torch.zeros(1, 2, 31, 31, device=device, requires_grad=True)
            flex_attention_with_bias(q, k, v, table, 16, 16).sum().backward()
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # unrelated to support for the kernel
        raise
    except Exception as error:
        warnings.warn(f"FlexAttention is unavailable ({error!r}). Using a bias tensor for large maps.", stacklevel=1)
        return False
    return True


def _use_flex_attention(q: Tensor) -> bool:
    # FlexAttention needs 16 channels per head; the gradient of the table uses atomic additions
    if q.shape[-1] < 16 or q.dtype == torch.float64 or torch.are_deterministic_algorithms_enabled():
        return False
    # the probe cannot run inside a graph that is being compiled
    return torch.compiler.is_compiling() or _has_flex_attention(q.device, q.dtype, q.shape[-1])


def row_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Compute attention by rows of queries, for inference on a CPU. See :func:`biased_attention` for the arguments.

    PyTorch's CPU kernel reads the biases of a row from an overlapping view, so that no tensor has N x N entries.
    """
    biases = _bias_rows(table.to(q.dtype), height, width).flatten(3)  # -> (heads, H, W, N), a view
    # Heads take the place of images, and query rows that of heads, so that the biases of a head stay in the cache.
    images = []
    for query, key, value in zip(q, k.contiguous(), v.contiguous(), strict=True):
        query = query.unflatten(1, (height, width)).flip(1)  # (heads, N, C) -> (heads, H, W, C)
        key, value = (x[:, None].expand(-1, height, -1, -1) for x in (key, value))  # -> (heads, H, N, C), views
        image = F.scaled_dot_product_attention(query, key, value, biases)
        images.append(image.flip(1).flatten(1, 2))  # -> (heads, N, C)
    return torch.stack(images) if images else q.clone()


def _aligned(bias: Tensor, images: int, dtype: torch.dtype) -> Tensor:
    tokens = bias.shape[-1]
    rows = bias.new_zeros(*bias.shape[:-1], tokens + -tokens % 8, dtype=dtype).narrow(3, 0, tokens)
    return rows.copy_(bias).expand(images, -1, -1, -1)


# Fused attention on a GPU needs a bias `(B, heads, N, N)` in the queries' dtype, with rows aligned to 8 entries.
# PyTorch aligns it as well, but torch.compile (2.11) has changed the strides afterwards, and the kernels failed:
# in the backward pass of LIT-S at batch size 256, and for a map of one token under activation checkpointing.
_align = torch.library.custom_op("lit::align_bias", _aligned, mutates_args=())
_align.register_fake(_aligned)


def _align_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad.sum(0, keepdim=True, dtype=torch.promote_types(grad.dtype, torch.float32)), None, None


_align.register_autograd(_align_backward)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Compute attention over a whole feature map with a relative position bias.

    Queries, keys, values and the result are `(B, heads, N, C / heads)` with `N = height * width`. The table is
    `(1, heads, 2 * height - 1, 2 * width - 1)` in any floating dtype.

    The bias is a tensor for small feature maps, for training on a CPU, in exported models, and in compiled models on a
    CPU. It is also a tensor if timm's fused attention is disabled: TIMM_FUSED_ATTN=0 or `set_fused_attn(False)`.
    """
    is_training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, table))
    if use_fused_attn() and not is_exporting():
        if q.is_cuda and height * width >= LARGE_MAP_ON_GPU and _use_flex_attention(q):
            return flex_attention_with_bias(q, k, v, table, height, width)
        # a compiled graph for all sizes must not depend on the number of tokens
        if q.is_cpu and not is_training and not torch.compiler.is_compiling() and height * width >= LARGE_MAP:
            return row_attention(q, k, v, table, height, width)
    bias = relative_position_bias(table, height, width)  # in the table's dtype, which accumulates its gradient
    bias = _align(bias, len(q), q.dtype) if q.is_cuda and not is_exporting() else bias.to(q.dtype)
    if torch.onnx.is_in_onnx_export():  # PyTorch cannot export a mask that requires gradients
        bias = bias.detach()
    if q.is_cpu and is_training and not is_exporting():  # with gradients, PyTorch's function is slower on a CPU
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
