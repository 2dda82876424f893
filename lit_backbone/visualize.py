"""What a LIT sees: where its deformable token merging samples an image, and where its attention looks.

Offsets and attention are read while a model runs as it is; nothing in the model knows of it.
"""

import argparse
import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from .dtm import captured_offsets, sampling_positions
from .layers import AttentionBlock
from .lit import LIT, PATCH_SIZE

LEGIBLE = 448  # pixels of the shorter side below which a picture is enlarged, for what is drawn or written in it
CELL_COLOR, POINT_COLOR = (0, 200, 0), (255, 0, 0)
HEAT = dict(black="#10123c", mid="#d4424c", white="#fdf6b0")  # from no attention to the most


# ---- sampling points


class NoOffsetsError(ValueError):
    """A model without deformable token merging was to show its offsets."""


class SamplingChains(NamedTuple):
    """Where DTM reads an image for each final token, back from the last merging to the first.

    points: for each merging, the last one first, `(h, w, 4**level, 2)`: (y, x) in pixels from the image's upper left
        corner, NaN where the chain has left a map. Sample i follows from sample `i // 4` of the merging before.
    cell: side of a final token's cell in pixels.
    """

    points: list[Tensor]
    cell: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of final tokens."""
        height, width = self.points[0].shape[:2]
        return height, width

    def of(self, row: int, column: int) -> Tensor:
        """`(N, 2)`: the points in the image of one token, those that have left a map dropped."""
        points = self.points[-1][row, column]
        return points[~points.isnan().any(dim=-1)]


@torch.inference_mode()
def sampling_chains(model: LIT, image: Tensor) -> SamplingChains:
    """The points that a model's DTM samples in an image.

    Args:
        model: any LIT with DTM, dense backbones included, in evaluation mode.
        image: `(3, H, W)`, normalised as in evaluation.

    Raises:
        NoOffsetsError: the model has no DTM.
    """
    with captured_offsets(model) as captured:
        model(image[None])
    if not captured:
        raise NoOffsetsError("the model has no deformable token merging, and so no offsets to draw")
    return follow_offsets([offset[0].cpu() for offset, _ in captured], captured[0][1])


def follow_offsets(offsets: Sequence[Tensor], map_size: tuple[int, int]) -> SamplingChains:
    """Follow each final token back through the mergings, as the reference does: a sample's position is rounded to the
    token whose own samples come next, and samples that leave the map are dropped with all that would follow from them.

    Args:
        offsets: of one image, the first merging's first, each `(8, h, w)`.
        map_size: (height, width) of the map that the first merging samples.
    """
    sizes = [map_size, *(tuple(offset.shape[1:]) for offset in offsets)]
    height, width = sizes.pop()
    rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    tokens = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)[:, :, None]  # (h, w, 1, 2)
    levels = []
    for level in reversed(range(len(offsets))):
        samples = sampling_positions(offsets[level][None].float())[0]  # (2h', 2w', 2)
        samples = samples.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2).flatten(2, 3)  # -> (h', w', 4, 2)
        row, column = tokens.nan_to_num(0).round().long().unbind(-1)  # (h, w, n)
        lost = tokens[..., :1].isnan()  # (h, w, n, 1)
        tokens = samples[row, column].masked_fill(lost[..., None], torch.nan).flatten(2, 3)  # -> (h, w, 4n, 2)
        inside = (tokens.round() >= 0) & (tokens.round() < torch.tensor(sizes[level]))
        tokens = tokens.masked_fill(~inside.all(dim=-1, keepdim=True), torch.nan)
        levels.append((tokens + 0.5) * (PATCH_SIZE * 2**level))
    return SamplingChains(levels, PATCH_SIZE * 2 ** len(offsets))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced."""
    most = min(count, most)
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def enlargement(height: int, width: int) -> int:
    """How many times a picture is enlarged before anything is drawn or written in it."""
    return math.ceil(LEGIBLE / min(height, width))


def draw_points(image: Image.Image, chains: SamplingChains, row: int, column: int) -> Image.Image:
    """The image with a final token's cell outlined in green and the points it samples in red, enlarged if small."""
    factor = enlargement(image.height, image.width)
    picture = image.resize((factor * image.width, factor * image.height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    cell = factor * chains.cell
    width = max(2, min(picture.size) // 200)
    draw.rectangle((column * cell, row * cell, (column + 1) * cell, (row + 1) * cell), None, CELL_COLOR, width)
    radius = round(min(min(picture.size) / 120, 0.4 * factor * PATCH_SIZE))  # undeformed, they do not touch
    for y, x in (factor * chains.of(row, column)).round().tolist():
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, POINT_COLOR, "white" if radius > 2 else None)
    return picture


def draw_sheet(pictures: Iterable[Image.Image], count: int, columns: int, most: int = 2400) -> Image.Image:
    """`count` pictures of one size side by side, row by row, scaled down to be at most `most` pixels wide."""
    gap, sheet = 4, None
    for i, picture in enumerate(pictures):
        if sheet is None:
            scale = min(1.0, (most / columns - gap) / picture.width)
            width, height = round(scale * picture.width), round(scale * picture.height)
            size = (columns * (width + gap) - gap, math.ceil(count / columns) * (height + gap) - gap)
            sheet = Image.new("RGB", size, "white")
        place = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    return sheet


def add_offset_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which the three tasks' commands choose what :func:`write_offsets` writes."""
    parser.add_argument("--grid", action="store_true", help="one sheet of all tokens in place of a picture for each")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to explore the points with, instead")
    help = "draw at most N rows and N columns of tokens, evenly spaced (all)"
    parser.add_argument("--at-most", type=_positive, default=None, metavar="N", help=help)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def write_offsets(
    model: LIT,
    x: Tensor,
    image: Image.Image,
    folder: Path,
    *,
    grid: bool = False,
    html: Path | None = None,
    at_most: int | None = None,
) -> str:
    """Draw the sampling points of an image into files, and return a line about them.

    Args:
        model: see :func:`sampling_chains`.
        x: the input of the model, `(3, H, W)`.
        image: the same as a picture.
        folder: for `<row>-<column>.png`, or `grid.png`.
        grid: one sheet instead of a picture for each token.
        html: file for a page instead of pictures.
        at_most: number of rows and columns of tokens to draw, evenly spaced; None for all.
    """
    chains = sampling_chains(model, x)
    (height, width), total = chains.size, chains.points[-1].shape[:3].numel()
    lost = int(chains.points[-1].isnan().any(dim=-1).sum())
    summary = f"{height} x {width} tokens, {total - lost} sampling points, {lost} dropped outside the map"
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(image, chains, f"Where DTM samples {folder.name}"), encoding="utf-8")
        return f"{html}: {summary}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = spread(height, at_most or height), spread(width, at_most or width)
    places = [(row, column) for row in rows for column in columns]
    if len(places) < height * width:
        summary += f"; {len(places)} tokens drawn"
    bar = tqdm(places, disable=None, delay=2, leave=False)
    if grid:
        pictures = (draw_points(image, chains, row, column) for row, column in bar)
        draw_sheet(pictures, len(places), len(columns)).save(folder / "grid.png")
        return f"{folder / 'grid.png'}: {summary}"
    for row, column in bar:
        draw_points(image, chains, row, column).save(folder / f"{row}-{column}.png")
    return f"{folder}: {summary}"


def page(image: Image.Image, chains: SamplingChains, title: str) -> str:
    """A self-contained HTML page on which a final token is chosen and its sampling points are seen."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    data = {
        "title": title,
        "image": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
        "cell": chains.cell,
        "levels": [_numbers(points) for points in chains.points],
    }
    template = files(__package__).joinpath("visualize.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/ null", json.dumps(data).replace("<", "\\u003c"))


def _numbers(points: Tensor) -> list:
    """`(h, w, n, 2)` as lists of [x, y] or None, rounded to a tenth of a pixel."""
    if points.ndim > 1:
        return [_numbers(part) for part in points]
    return None if points.isnan().any() else [round(value, 1) for value in points.flip(0).tolist()]


# ---- attention


class QueryAttention(TorchFunctionMode):
    """Records, in each call of `scaled_dot_product_attention` below it, the probabilities of one query token.

    The call itself goes on as it is; only the one row of its score matrix is computed again.
    """

    def __init__(self, queries: Iterable[int]):
        super().__init__()
        self.queries = iter(queries)  # the index of the query token in each call
        self.rows: list[Tensor] = []  # (B, heads, N)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, _ = args
            self.rows.append(self.probabilities(query, key, kwargs.get("attn_mask"), next(self.queries)))
        return func(*args, **kwargs)

    @staticmethod
    def probabilities(query: Tensor, key: Tensor, bias: Tensor | None, index: int) -> Tensor:
        """Softmax of one row of the scores: `(B, heads, N)` from queries and keys `(B, heads, N, C/heads)`."""
        scores = (query[:, :, index, None] @ key.transpose(2, 3)).squeeze(2) / math.sqrt(
            query.shape[3]
        )  # (B, heads, N)
        return (scores if bias is None else scores + bias[:, :, index]).softmax(dim=-1)


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
