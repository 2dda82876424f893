"""Where a LIT's deformable token merging samples an image: in numbers, in pictures, and as a page to explore.

Offsets are read while the model runs as it is; nothing in the model knows of it.
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from .dtm import captured_offsets, sampling_positions
from .images import DataError, enlargement
from .lit import LIT, PATCH_SIZE

CELL_COLOR, POINT_COLOR = (0, 200, 0), (255, 0, 0)


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
        DataError: the model has no DTM.
    """
    with captured_offsets(model) as captured:
        model(image[None])
    if not captured:
        raise DataError("the model has no deformable token merging, and so no offsets to draw")
    return follow_offsets([offset[0].cpu() for offset, _ in captured], captured[0][1])


def follow_offsets(offsets: Sequence[Tensor], map_size: tuple[int, int]) -> SamplingChains:
    """Follow each final token back through the mergings, as the reference does.

    A sample's position is rounded to the nearest token, whose own samples come next. A sample that leaves the map is
    dropped, with all that would follow from it.

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
        "levels": [points.double().flip(-1).round(decimals=1).tolist() for points in chains.points],  # [x, y], or NaNs
    }
    template = files(__package__).joinpath("offsets.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/ null", json.dumps(data).replace("<", "\\u003c"))
