"""Attention over a whole map with a relative position bias, a row of queries at a time: no tensor has N x N entries."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def bias_strips(table: Tensor, width: int) -> Tensor:
    """The biases of a table, so laid out that those of a query to all keys are next to each other.

    Args:
        table: `(1, heads, 2H-1, 2W-1)`, by the displacement from key to query.
        width: W.

    Returns:
        `(heads, W, 2H-1, W)`: `strips[:, x, H-1-y : 2H-1-y]` are the biases of query (y, x) to all keys.
    """
    windows = table[0].flip(1, 2).unfold(2, width, 1)  # (1, heads, 2H-1, 2W-1) -> (heads, 2H-1, W, W), a view
    return windows.flip(2).transpose(1, 2).contiguous()


def _table_gradient(grad_strips: Tensor) -> Tensor:
    """The gradient `(1, heads, 2H-1, 2W-1)` of a table from that of its :func:`bias_strips`."""
    heads, width, displacements, _ = grad_strips.shape
    grad = grad_strips.new_zeros(heads, displacements, 2 * width - 1)
    for x in range(width):
        grad[:, :, width - 1 - x : 2 * width - 1 - x] += grad_strips[:, x]
    return grad.flip(1, 2)[None]


class RowAttention(torch.autograd.Function):
    """Attention whose softmax is computed again in the backward pass, which PyTorch's kernels for a CPU deny a bias.

    `RowAttention.apply(q, k, v, table, height, width)`; queries, keys and values are `(B, heads, N, C/heads)` with
    `N = height * width`, the table is `(1, heads, 2 * height - 1, 2 * width - 1)`, the result is like the queries.
    Gradients are computed in float32 at least. There are no gradients of gradients.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
        strips = bias_strips(table.to(q.dtype), width)
        biases = strips.unfold(2, height, 1).permute(0, 2, 1, 4, 3)  # -> (heads, H, W, H, W), the last row's first
        biases = biases.flatten(3)  # -> (heads, H, W, N), a view
        # To the kernel, heads are images and rows are heads: what it reads for one head stays in the cache. On a CPU it
        # reads biases from the view; elsewhere it may copy what it is given, and gets one row.
        rows = height if q.device.type == "cpu" else 1
        images = []
        for query, key, value in zip(q, k.contiguous(), v.contiguous(), strict=True):
            query = query.unflatten(1, (height, width)).flip(1)  # (heads, N, C) -> (heads, H, W, C)
            key, value = (x[:, None].expand(-1, rows, -1, -1) for x in (key, value))  # -> (heads, rows, N, C), views
            parts = [
                F.scaled_dot_product_attention(part, key, value, bias)
                for part, bias in zip(query.split(rows, 1), biases.split(rows, 1), strict=True)
            ]
            images.append(torch.cat(parts, 1).flip(1).flatten(1, 2))  # -> (heads, N, C)
        return torch.stack(images) if images else q.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
        *tensors, ctx.height, ctx.width = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, out = ctx.saved_tensors
        dtype = torch.promote_types(q.dtype, torch.float32)
        strips = bias_strips(table.to(dtype), ctx.width)
        grad_strips = torch.zeros_like(strips)
        grads = torch.zeros(3, *q.shape, dtype=dtype, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            for tensors, image_grads in zip(zip(grad_out, out, q, k, v, strict=True), grads.unbind(1), strict=True):
                _add_gradients(*(x.to(dtype).contiguous() for x in tensors), strips, image_grads, grad_strips)
        return *grads.to(q.dtype), _table_gradient(grad_strips).to(table.dtype), None, None


def _add_gradients(
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, strips: Tensor, grads: Tensor, grad_strips: Tensor
) -> None:
    """Add an image's gradients to those of queries, keys and values `(3, heads, N, C/heads)` and of the strips."""
    heads, width, _, _ = strips.shape
    height, scale = q.shape[1] // width, q.shape[2] ** -0.5
    grad_q, grad_k, grad_v = grads
    offset = (grad_out * out).sum(-1, keepdim=True)  # (heads, N, 1), what softmax's gradient subtracts
    q, k_t, v_t = q * scale, k.transpose(1, 2), v.transpose(1, 2)
    for y in range(height):
        row, reach = slice(y * width, (y + 1) * width), slice(height - 1 - y, 2 * height - 1 - y)
        scores = torch.baddbmm(strips[:, :, reach].flatten(2), q[:, row], k_t)  # (heads, W, N)
        attention = torch.softmax(scores, -1, out=scores)
        grad_v.baddbmm_(attention.transpose(1, 2), grad_out[:, row])
        grad_scores = torch.bmm(grad_out[:, row], v_t).sub_(offset[:, row]).mul_(attention)
        grad_q[:, row] = torch.bmm(grad_scores, k).mul_(scale)
        grad_k.baddbmm_(grad_scores.transpose(1, 2), q[:, row])
        grad_strips[:, :, reach] += grad_scores.view(heads, width, height, width)
