import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lit_backbone.attention_maps import average_attention, choose_tokens, query_attention
from lit_backbone.images import DataError
from lit_backbone.layers import AttentionBlock
from tests.lit_backbone.small import KINDS, small_lit


def attention_matrix(block: AttentionBlock, x: Tensor) -> Tensor:
    """Compute all attention probabilities `(B, heads, N, N)` of a block by their formula."""
    attn = block.attn
    height, width = x.shape[1:3]
    tokens = block.norm1(x).reshape(len(x), -1, x.shape[-1])
    q, k, _ = attn.qkv(tokens).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.shape[-1])
    if attn.rel_pos_bias is not None:
        size = (2 * height - 1, 2 * width - 1)
        table = F.interpolate(attn.rel_pos_bias, size, mode="bicubic", align_corners=False)[0]
        y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
        scores = scores + table[:, y[:, None] - y + height - 1, x[:, None] - x + width - 1]
    return scores.softmax(-1)


def test_reduced_feature_maps_are_not_drawn() -> None:
    with pytest.raises(DataError, match="sr_ratios"):
        query_attention(small_lit("reduced"), torch.zeros(1, 3, 64, 64), [0, 0, 0, 0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reduced"])
def test_attention_is_that_of_the_model(kind: str) -> None:
    model = small_lit(kind)
    images = torch.randn(2, 3, 64, 96)
    inputs: dict[tuple[int, int], Tensor] = {}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            block.register_forward_pre_hook(lambda _, args, key=(i, j): inputs.__setitem__(key, args[0]))
    expected = model(images)
    queries = [100, 13, 7, 3]
    result = query_attention(model, images, queries)
    torch.testing.assert_close(model(images), expected)
    assert list(result) == ([0, 1, 2, 3] if kind == "conv_merging" else [2, 3])
    for i, maps in result.items():
        size = (16 // 2**i, 24 // 2**i)
        assert maps.shape == (2, len(model.stages[i].blocks), model.stages[i].blocks[0].attn.num_heads, *size)
        prefix = int(model.stages[i].cls_token is not None)
        for j, block in enumerate(model.stages[i].blocks):
            rows = attention_matrix(block, inputs[i, j])[:, :, queries[i] + prefix, prefix:]
            torch.testing.assert_close(maps[:, j].flatten(-2), rows)
        assert (maps.sum((-1, -2)) < 1 - 1e-4).all() if prefix else torch.allclose(maps.sum((-1, -2)), torch.ones(()))


def test_attention_is_averaged_over_images() -> None:
    model = small_lit()
    images = [(str(i), image) for i, image in enumerate(torch.randn(5, 3, 64, 64))]
    loader = DataLoader(images, batch_size=2, collate_fn=list)
    queries = [5, 5, 5, 1]
    average = average_attention(model, loader, queries, torch.device("cpu"))
    single = [query_attention(model, image[None], queries) for _, image in images]
    assert list(average) == [2, 3]
    for stage, maps in average.items():
        torch.testing.assert_close(maps.float(), torch.stack([result[stage][0] for result in single]).mean(0))


def test_tokens_are_those_of_the_paper_or_at_the_same_places() -> None:
    sizes, tokens = [(56, 56), (28, 28), (14, 14), (7, 7)], [1260, 294, 92, 17]
    assert choose_tokens(None, sizes) == tokens
    scaled = [2 * (token // side) * 2 * side + 2 * (token % side) for token, (side, _) in zip(tokens, sizes)]
    assert choose_tokens(None, [(2 * h, 2 * w) for h, w in sizes]) == scaled
    assert choose_tokens([0, 1, 2, 3], sizes) == [0, 1, 2, 3]
