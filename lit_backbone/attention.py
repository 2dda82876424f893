"""Where a LIT's attention looks: the probabilities of one query token, and pictures of them.

They are computed beside the model, which runs as it is; nothing in the model knows of it.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .images import LEGIBLE
from .layers import AttentionBlock
from .lit import LIT
from .offsets import CELL_COLOR

HEAT = dict(black="#10123c", mid="#d4424c", white="#fdf6b0")  # from no attention to the most


class QueryAttention(TorchFunctionMode):
    """Records the probabilities of one query token in each call of `scaled_dot_product_attention`.

    The call itself runs as it is; only the one row of its score matrix is computed again.
    """

    def __init__(self, queries: Iterable[int]):
        super().__init__()
        self.queries = iter(queries)  # the index of the query token in each call
        self.rows: list[Tensor] = []  # (B, heads, N)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            (query, key, _), index = args, next(self.queries)  # (B, heads, N, C/heads)
            scores = torch.einsum("bhc,bhnc->bhn", query[:, :, index], key) / math.sqrt(query.shape[3])
            if (bias := kwargs.get("attn_mask")) is not None:
                scores = scores + bias[:, :, index]  # (1, heads, N, N)
            self.rows.append(scores.softmax(dim=-1))
        return func(*args, **kwargs)


@torch.inference_mode()
def query_attention(model: LIT, images: Tensor, queries: Sequence[int]) -> dict[int, Tensor]:
    """Attention of one query token per stage to all tokens of its map.

    Args:
        model: any LIT in evaluation mode.
        images: `(B, 3, H, W)`, normalised as in evaluation.
        queries: for each stage, the number of the query token on the map, row by row; a class token does not count.

    Returns:
        For each stage that attends, by its number from 0, `(B, blocks, heads, h, w)`: probabilities, which add up to 1
        over the map or, with a class token, to what the class token leaves.
    """
    attending = [
        (i, stage.cls_token is not None)
        for i, stage in enumerate(model.stages)
        for block in stage.blocks
        if isinstance(block, AttentionBlock)
    ]
    fused, experimental = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(False)  # a kernel that looks biases up itself hides them from the recorder
    try:
        with QueryAttention(queries[i] + prefix for i, prefix in attending) as recorder:
            maps = model.forward_intermediates(images, intermediates_only=True)
    finally:
        set_fused_attn(fused, experimental)
    stages: dict[int, list[Tensor]] = {}
    for (i, prefix), row in zip(attending, recorder.rows, strict=True):
        stages.setdefault(i, []).append(row[..., int(prefix) :].unflatten(-1, maps[i].shape[2:]))  # (B, heads, h, w)
    return {i: torch.stack(rows, dim=1) for i, rows in stages.items()}


def draw_attention(heat: Tensor, query: int, caption: str) -> Image.Image:
    """A heat map `(h, w)`, brightest at its own maximum, with the query token outlined, below a line of text."""
    height, width = heat.shape
    levels = (heat * (255 / heat.max().clamp(min=torch.finfo(heat.dtype).tiny))).round().to(torch.uint8)
    side = max(4, round(LEGIBLE / 2 / min(height, width)))  # of a token
    picture = ImageOps.colorize(Image.fromarray(levels.cpu().numpy()), **HEAT)
    picture = picture.resize((side * width, side * height), Image.Resampling.NEAREST)
    y, x = side * (query // width), side * (query % width)
    ImageDraw.Draw(picture).rectangle((x - 1, y - 1, x + side, y + side), None, CELL_COLOR, 2)
    font, line = ImageFont.load_default(13), 20
    labelled = Image.new("RGB", (picture.width, picture.height + line), "white")
    labelled.paste(picture, (0, line))
    ImageDraw.Draw(labelled).text((2, line / 2), caption, "black", font, anchor="lm")
    return labelled
