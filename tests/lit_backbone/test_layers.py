import torch
import torch.nn.functional as F

from lit_backbone.dtm import DeformableTokenMerging
from lit_backbone.layers import ConvBNMerging, ReducedAttention, resize_table


def test_resize_table_by_hand() -> None:
    table = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    # with align_corners=False, two pixels enlarged to four are sampled at 0, 0.25, 0.75 and 1
    step = torch.tensor([0.0, 0.25, 0.75, 1.0])
    expected = 2 * step[:, None] + step[None, :]
    torch.testing.assert_close(resize_table(table, 4, 4, mode="bilinear")[0, 0], expected)
    assert resize_table(table, 2, 2, mode="bicubic") is table
    assert resize_table(table.bfloat16(), 4, 4, mode="bicubic").dtype == torch.bfloat16


def test_conv_bn_merging_is_dtm_without_offsets() -> None:
    dtm, merging = DeformableTokenMerging(3, 8), ConvBNMerging(3, 8)  # offsets are zero at initialization
    merging.load_state_dict({key: value for key, value in dtm.state_dict().items() if not key.startswith("offset.")})
    x = torch.randn(2, 5, 6, 3)
    torch.testing.assert_close(merging(x), dtm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merging.eval()(x), dtm.eval()(x), rtol=1e-5, atol=1e-5)


def test_reduced_attention_matches_pytorch() -> None:
    """Compare with PyTorch's attention from the tokens to their reduction by a convolution and LayerNorm."""
    attention, x = ReducedAttention(12, 3, sr_ratio=2), torch.randn(2, 4, 6, 12)
    sr = attention.sr
    keys = attention.norm(F.conv2d(x.permute(0, 3, 1, 2), sr.weight, sr.bias, stride=2).flatten(2).transpose(1, 2))
    expected = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    state = {f"out_proj.{name}": value for name, value in attention.proj.state_dict().items()}
    state["in_proj_weight"] = torch.cat([attention.q.weight, attention.kv.weight])
    state["in_proj_bias"] = torch.cat([attention.q.bias, attention.kv.bias])
    expected.load_state_dict(state)
    torch.testing.assert_close(attention(x).flatten(1, 2), expected(x.flatten(1, 2), keys, keys)[0])
