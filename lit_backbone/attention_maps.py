"""Attention of one query token per stage, as probabilities and as images.

Attention is read while the model runs; the model itself is unchanged.
"""

import math
from collections.abc import Sequence, Sized
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .biased_attention import relative_position_bias
from .images import DataError
from .layers import Attention, ReducedAttention
from .lit import LIT
from .visualize import CELL_COLOR, MIN_DISPLAY_SIZE, draw_sheet

PAPER_TOKENS = (1260, 294, 92, 17)  # query tokens of the paper's figure
PAPER_SIDES = (56, 28, 14, 7)  # side lengths of its feature maps
HEAT_COLORS = dict(black="#10123c", mid="#d4424c", white="#fdf6b0")  # from no attention to the maximum


def attention_row(attn: Attention, x: Tensor, query: int) -> Tensor:
    """Compute the attention probabilities `(B, heads, N)` of one query token in the input `x` of a module."""
    q, k, _ = attn.project(x)  # (B, heads, N, C/heads)
    scores = torch.einsum("bhc,bhnc->bhn", q[:, :, query], k) / math.sqrt(q.shape[-1])
    if attn.rel_pos_bias is not None:
        height, width = x.shape[1:3]
        scores = scores + relative_position_bias(attn.bias_table(height, width), height, width)[:, :, query]
    return scores.softmax(dim=-1)


@torch.inference_mode()
def query_attention(model: LIT, images: Tensor, queries: Sequence[int]) -> dict[int, Tensor]:
    """Compute the attention of one query token per stage to all tokens of its feature map.

    The result maps the 0-based index of each attention stage to probabilities `(B, blocks, heads, h, w)`. They sum to 1
    over the feature map, or with a class token to 1 minus its share. `queries` holds the row-major index of the query
    token in each stage, without the class token.
    """
    if any(isinstance(module, ReducedAttention) for module in model.modules()):
        raise DataError("attention maps are not drawn for models with sr_ratios. Use one with full attention.")
    rows: dict[int, list[Tensor]] = {}  # stage: (B, heads, N) of each block

    def record(attn: Attention, args: tuple[Tensor], stage: int, prefix: int) -> None:
        row = attention_row(attn, args[0], queries[stage] + prefix)
        rows.setdefault(stage, []).append(row[..., prefix:])

    with ExitStack() as hooks:
        for i, stage in enumerate(model.stages):
            hook = partial(record, stage=i, prefix=int(stage.cls_token is not None))
            for attn in (module for module in stage.modules() if isinstance(module, Attention)):
                hooks.enter_context(attn.register_forward_pre_hook(hook))
        maps = cast(list[Tensor], model.forward_intermediates(images, intermediates_only=True))
    return {i: torch.stack(blocks, dim=1).unflatten(-1, maps[i].shape[2:]) for i, blocks in rows.items()}


def draw_attention(heat: Tensor, query: int, caption: str) -> Image.Image:
    """Draw a heat map `(h, w)` scaled to its maximum, with the query token outlined and a caption above."""
    height, width = heat.shape
    levels = (heat * (255 / heat.max().clamp(min=torch.finfo(heat.dtype).tiny))).round().to(torch.uint8)
    side = max(4, round(MIN_DISPLAY_SIZE / 2 / min(height, width)))  # pixels per token
    drawing = ImageOps.colorize(Image.fromarray(levels.cpu().numpy()), **HEAT_COLORS)
    drawing = drawing.resize((side * width, side * height), Image.Resampling.NEAREST)
    y, x = side * (query // width), side * (query % width)
    ImageDraw.Draw(drawing).rectangle((x - 1, y - 1, x + side, y + side), None, CELL_COLOR, 2)
    labeled = ImageOps.expand(drawing, (0, 20, 0, 0), "white")
    ImageDraw.Draw(labeled).text((2, 10), caption, "black", ImageFont.load_default(13), anchor="lm")
    return labeled


def choose_tokens(tokens: list[int] | None, map_sizes: list[tuple[int, int]]) -> list[int]:
    """Return the query token of each stage, by default at the same relative place as in the paper."""
    if tokens is None:
        places = [(token // side / side, token % side / side) for token, side in zip(PAPER_TOKENS, PAPER_SIDES)]
        return [int(y * height) * width + int(x * width) for (y, x), (height, width) in zip(places, map_sizes)]
    for token, (height, width) in zip(tokens, map_sizes):
        if not 0 <= token < height * width:
            raise DataError(f"--tokens {token}: the feature map has {height} x {width} tokens, from 0 on.")
    return tokens


def average_attention(model: LIT, loader: DataLoader, queries: list[int], device: torch.device) -> dict[int, Tensor]:
    """Average :func:`query_attention` over images: `(blocks, heads, h, w)` for each stage that has attention."""
    total: dict[int, Tensor] = {}
    for batch in tqdm(loader, "attend", disable=None, leave=False, unit="batch"):
        images = [image for _, image in batch]
        for error in (image for image in images if isinstance(image, DataError)):
            raise error
        for stage, maps in query_attention(model, torch.stack(images).to(device), queries).items():
            total[stage] = total.get(stage, 0) + maps.double().sum(dim=0)
    return {stage: maps / len(cast(Sized, loader.dataset)) for stage, maps in total.items()}


def draw_attention_maps(maps: Tensor, query: int, folder: Path) -> None:
    """Draw each of the maps `(blocks, heads, h, w)` of a stage into `folder`, and all into one image beside it."""
    images = []
    for i, block in enumerate(maps, 1):
        (folder / f"block-{i}").mkdir(parents=True, exist_ok=True)
        for j, heat in enumerate(block, 1):
            images.append(draw_attention(heat.float(), query, f"block {i}, head {j}: up to {heat.max():.2g}"))
            images[-1].save(folder / f"block-{i}" / f"head-{j}.png")
    draw_sheet(images, columns=maps.shape[1]).save(folder.with_suffix(".png"))
