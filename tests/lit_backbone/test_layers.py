import pytest
import torch
import torch.nn.functional as F

from lit_backbone.biased_attention import relative_position_bias
from lit_backbone.dtm import DeformableTokenMerging
from lit_backbone.layers import Attention, ConvBNMerging, ConvMerging, ReducedAttention, pad_to_multiple, resize_table


def test_resize_table_by_hand() -> None:
    table = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    # with align_corners=False, two pixels enlarged to four are sampled at 0, 0.25, 0.75 and 1
    step = torch.tensor([0.0, 0.25, 0.75, 1.0])
    expected = 2 * step[:, None] + step[None, :]
    torch.testing.assert_close(resize_table(table, 4, 4, mode="bilinear")[0, 0], expected)
    assert resize_table(table, 2, 2, mode="bicubic") is table
    assert resize_table(table.bfloat16(), 4, 4, mode="bicubic").dtype == torch.bfloat16


@pytest.mark.parametrize("size, padded", [((8, 12), (8, 12)), ((9, 11), (12, 12)), ((7, 4), (8, 4))])
def test_pad_to_multiple(size: tuple[int, int], padded: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    expected = torch.zeros(2, 3, *padded)
    expected[:, :, : size[0], : size[1]] = x
    assert torch.equal(pad_to_multiple(x, 4), expected)


def test_conv_merging_pads_or_crops() -> None:
    x = torch.randn(1, 10, 9, 3)
    crop, pad = ConvMerging(3, 8, 4), ConvMerging(3, 8, 4, pad=True)
    pad.load_state_dict(crop.state_dict())
    torch.testing.assert_close(crop(x), crop(x[:, :8, :8]))
    torch.testing.assert_close(pad(x), crop(F.pad(x, (0, 0, 0, 3, 0, 2))))
    torch.testing.assert_close(crop(x).mean(-1), torch.zeros(1, 2, 2), rtol=0, atol=1e-6)  # LayerNorm is last


def test_conv_bn_merging_is_dtm_without_offsets() -> None:
    dtm, merging = DeformableTokenMerging(3, 8), ConvBNMerging(3, 8)  # offsets are zero at initialization
    merging.load_state_dict({key: value for key, value in dtm.state_dict().items() if not key.startswith("offset.")})
    x = torch.randn(2, 5, 6, 3)
    torch.testing.assert_close(merging(x), dtm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merging.eval()(x), dtm.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_matches_formula(with_bias: bool) -> None:
    attention = Attention(12, 3, map_size=(2, 3) if with_bias else None)
    if with_bias:
        torch.nn.init.normal_(attention.rel_pos_bias)
    x = torch.randn(2, 2, 3, 12)
    tokens = x.flatten(1, 2)
    heads = []
    for head in range(3):
        q, k, v = (
            tokens @ attention.qkv.weight[rows].T + attention.qkv.bias[rows]
            for rows in (slice(part * 12 + head * 4, part * 12 + head * 4 + 4) for part in range(3))
        )
        scores = q @ k.transpose(1, 2) / 4**0.5
        if with_bias:
            scores = scores + relative_position_bias(attention.rel_pos_bias, 2, 3)[:, head]
        heads += [scores.softmax(-1) @ v]
    expected = torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected.view(2, 2, 3, 12))


def test_attention_resizes_its_table_bicubically() -> None:
    attention, resized = Attention(12, 3, map_size=(14, 14)), Attention(12, 3, map_size=(5, 7))
    table = F.interpolate(attention.rel_pos_bias.detach(), size=(9, 13), mode="bicubic", align_corners=False)
    resized.load_state_dict(attention.state_dict() | {"rel_pos_bias": table})
    x = torch.randn(2, 5, 7, 12)
    torch.testing.assert_close(attention(x), resized(x), rtol=0, atol=0)


def test_reduced_attention_matches_pytorch() -> None:
    """Compare with PyTorch's attention from the tokens to their reduction by a convolution and LayerNorm."""
    attention, x = ReducedAttention(12, 3, 2), torch.randn(2, 4, 6, 12)
    conv, norm = attention.reduce.proj, attention.reduce.norm
    keys = norm(F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2).flatten(2).transpose(1, 2))
    expected = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    names |= {"proj.weight": "out_proj.weight", "proj.bias": "out_proj.bias"}
    expected.load_state_dict({names[k]: v for k, v in attention.state_dict().items() if k in names})
    torch.testing.assert_close(attention(x).flatten(1, 2), expected(x.flatten(1, 2), keys, keys)[0])


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="num_heads=5: does not divide 12 channels"):
        Attention(12, 5)


@torch.no_grad()
def test_evaluation_uses_the_current_table() -> None:
    attention, x = Attention(12, 3, map_size=(4, 4)), torch.randn(1, 4, 4, 12)
    before = attention(x)
    attention.rel_pos_bias.data.mul_(-300)  # like fused optimizers, this does not increase the version counter
    fresh = Attention(12, 3, map_size=(4, 4))
    fresh.load_state_dict(attention.state_dict())
    assert torch.equal(attention(x), fresh(x)) and not torch.equal(attention(x), before)
