"""Attention is what the model uses, and its pictures show it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_backbone import LIT
from lit_backbone.attention import draw_attention, query_attention
from lit_backbone.layers import AttentionBlock, relative_position_bias
from lit_backbone.offsets import CELL_COLOR
from tests.lit_backbone.small import KINDS, small_lit


def whole_attention(block: AttentionBlock, x: Tensor) -> Tensor:
    """All of a block's attention, `(B, heads, N, N)`, written out."""
    attn = block.attn
    q, k, _ = (
        attn.qkv(block.norm1(x)).reshape(x.shape[0], -1, 3, attn.num_heads, x.shape[-1] // attn.num_heads).unbind(2)
    )
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.shape[-1])
    if attn.rel_pos_bias is not None:
        scores = scores + relative_position_bias(attn.rel_pos_bias, x.shape[1], x.shape[2])
    return scores.softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_the_model(kind: str) -> None:
    model: LIT = small_lit(kind)
    images = torch.randn(2, 3, 64, 96)
    inputs: dict[tuple[int, int], Tensor] = {}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            block.register_forward_pre_hook(lambda _, args, key=(i, j): inputs.__setitem__(key, args[0]))
    expected = model(images)
    queries = [100, 13, 7, 3]
    found = query_attention(model, images, queries)
    torch.testing.assert_close(model(images), expected)
    assert list(found) == ([0, 1, 2, 3] if kind == "conv_merging" else [2, 3])
    for i, maps in found.items():
        size = (16 // 2**i, 24 // 2**i)
        assert maps.shape == (2, len(model.stages[i].blocks), model.stages[i].blocks[0].attn.num_heads, *size)
        prefix = int(model.stages[i].cls_token is not None)
        for j, block in enumerate(model.stages[i].blocks):
            rows = whole_attention(block, inputs[i, j])[:, :, queries[i] + prefix, prefix:]
            torch.testing.assert_close(maps[:, j].flatten(-2), rows)
        assert (maps.sum((-1, -2)) < 1 - 1e-4).all() if prefix else torch.allclose(maps.sum((-1, -2)), torch.ones(()))


class CountCalls(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_the_fused_call_goes_on() -> None:
    with CountCalls() as counter:
        query_attention(small_lit(), torch.randn(1, 3, 64, 64), [0] * 4)
    assert counter.calls == 3


def test_heat_map_is_brightest_at_its_maximum() -> None:
    heat = torch.zeros(7, 7)
    heat[5, 1] = 0.25
    picture = draw_attention(heat, query=16, caption="block 1")
    side = picture.width // 7
    assert picture.height - picture.width == 20  # the caption
    lightness = np.array(picture.convert("L"), dtype=int)[20:]
    cells = lightness.reshape(7, side, 7, side)[:, side // 2, :, side // 2]
    assert np.unravel_index(cells.argmax(), cells.shape) == (5, 1)
    assert picture.getpixel((2 * side + 2, 20 + 2 * side - 1)) == CELL_COLOR  # token (2, 2)
