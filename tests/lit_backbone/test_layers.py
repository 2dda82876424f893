import torch

from lit_backbone.dtm import DeformableTokenMerging
from lit_backbone.layers import ConvBNMerging, resize_table


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
