"""Images of the points that DTM samples, read from a LIT while it runs."""

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
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from .dtm import captured_offsets
from .dtm_kernels import sampling_positions
from .images import DataError
from .lit import LIT, PATCH_SIZE

CELL_COLOR, POINT_COLOR = (0, 200, 0), (255, 0, 0)
MIN_DISPLAY_SIZE = 448  # pixels of the shorter side; smaller images are enlarged before drawing


class SamplingChains(NamedTuple):
    """Positions in the image that DTM samples for each final token, followed from the last merging to the first.

    Attributes:
        points: for each merging, the last one first, `(h, w, 4**level, 2)`: (y, x) in pixels of the image, NaN where a
            chain has left a feature map. Sample i continues sample `i // 4` of the previous entry.
        cell: side length of a final token's cell in pixels.
    """

    points: list[Tensor]
    cell: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of final tokens."""
        return tuple(self.points[0].shape[:2])  # pyrefly: ignore[bad-return]

    def of(self, row: int, column: int) -> Tensor:
        """Return the points `(N, 2)` of one final token, without those that have left a feature map."""
        points = self.points[-1][row, column]
        return points[~points.isnan().any(dim=-1)]

    def scaled(self, factor: int) -> "SamplingChains":
        """Return the same chains in an image that is `factor` times as large."""
        return SamplingChains([factor * points for points in self.points], factor * self.cell)

    def undeformed(self) -> "SamplingChains":
        """Return the chains of plain 2x2 merging, which are those of DTM without offsets."""
        (height, width), levels = self.size, len(self.points)
        offsets = [torch.zeros(8, height << i, width << i) for i in reversed(range(levels))]
        plain = follow_offsets(offsets, (height << levels, width << levels))
        return plain.scaled(self.cell // plain.cell)


@torch.inference_mode()
def sampling_chains(model: LIT, image: Tensor) -> SamplingChains:
    """Compute the points that the DTM of a LIT or of a dense backbone samples in a normalized image `(3, H, W)`.

    Raises:
        DataError: the model has no DTM.
    """
    with captured_offsets(model) as captured:
        model(image[None])
    if not captured:
        raise DataError("the model has no deformable token merging. Use a model with merging='dtm'.")
    return follow_offsets([offset[0].cpu() for offset, _ in captured], captured[0][1])


def follow_offsets(offsets: Sequence[Tensor], map_size: tuple[int, int]) -> SamplingChains:
    """Follow each final token back through the mergings, as the reference does.

    The position of a sample is rounded to the nearest token, whose samples come next. A sample that leaves the feature
    map is dropped with all samples that would follow from it. `offsets`, each `(8, h, w)`, start with those of the
    first merging, which samples a map of `map_size` (height, width).
    """
    sizes = [map_size, *(tuple(offset.shape[1:]) for offset in offsets)]
    height, width = sizes.pop()
    tokens = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float().view(height, width, 1, 2)
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


def enlargement(height: int, width: int) -> int:
    """Return the integer factor that enlarges an image to MIN_DISPLAY_SIZE."""
    return math.ceil(MIN_DISPLAY_SIZE / min(height, width))


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced numbers from `range(count)`."""
    limit = min(count, limit)
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def draw_points(image: Image.Image, chains: SamplingChains, row: int, column: int) -> Image.Image:
    """Outline the cell of a final token in green and mark its sampling points in red; small images are enlarged."""
    factor = enlargement(image.height, image.width)
    drawing = image.resize((factor * image.width, factor * image.height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(drawing)
    cell = factor * chains.cell
    width = max(2, min(drawing.size) // 200)
    draw.rectangle((column * cell, row * cell, (column + 1) * cell, (row + 1) * cell), None, CELL_COLOR, width)
    spacing = cell / 2 ** len(chains.points)  # distance of neighboring points without offsets
    radius = round(min(min(drawing.size) / 120, 0.4 * spacing))
    for y, x in (factor * chains.of(row, column)).round().tolist():
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, POINT_COLOR, "white" if radius > 2 else None)
    return drawing


def draw_sheet(images: Iterable[Image.Image], columns: int, max_width: int = 2400) -> Image.Image:
    """Arrange images of one size in rows, scaled down to at most `max_width` pixels in total."""
    tiles, gap = [], 4
    for image in images:
        tiles.append(image.copy())
        tiles[-1].thumbnail((max_width // columns - gap, image.height), Image.Resampling.LANCZOS)
    width, height = tiles[0].width + gap, tiles[0].height + gap
    sheet = Image.new("RGB", (columns * width - gap, math.ceil(len(tiles) / columns) * height - gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def write_offsets(
    model: LIT,
    x: Tensor,
    image: Image.Image,
    folder: Path,
    *,
    grid: bool = False,
    plain: bool = False,
    html: Path | None = None,
    at_most: int | None = None,
) -> str:
    """Draw the sampling points of the model input `x` `(3, H, W)` into `image` and return a one-line summary.

    `image` shows the same as `x`. Its resolution may be higher by an integer factor. The files are
    `<row>-<column>.png` or `grid.png` in `folder`. :func:`add_offset_arguments` describes the options.
    """
    chains = sampling_chains(model, x).scaled(image.width // x.shape[-1])
    (height, width), is_lost = chains.size, chains.points[-1].isnan().any(dim=-1)
    summary = f"{height} x {width} tokens, {(~is_lost).sum()} sampling points"
    summary += f", {is_lost.sum()} dropped outside the feature map"
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(render_html(image, chains, f"Sampling points of {folder.name}"), encoding="utf-8")
        return f"{html}: {summary}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = evenly_spaced(height, at_most or height), evenly_spaced(width, at_most or width)
    tokens = [(row, column) for row in rows for column in columns]
    if len(tokens) < height * width:
        summary += f"; {len(tokens)} tokens drawn"
    shown = [chains.undeformed(), chains] if plain else [chains]
    drawings = (
        draw_sheet([draw_points(image, item, row, column) for item in shown], len(shown))
        for row, column in tqdm(tokens, disable=None, delay=2, leave=False)
    )
    if grid:
        draw_sheet(drawings, len(columns)).save(folder / "grid.png")
        return f"{folder / 'grid.png'}: {summary}"
    for (row, column), drawing in zip(tokens, drawings):
        drawing.save(folder / f"{row}-{column}.png")
    return f"{folder}: {summary}"


def render_html(image: Image.Image, chains: SamplingChains, title: str) -> str:
    """Render a self-contained HTML viewer that shows the sampling points of a selected token."""
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
    template = files("lit_backbone").joinpath("offsets.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/ null", json.dumps(data).replace("<", "\\u003c"))


def positive(text: str) -> int:
    """Convert the text of a command-line option to an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def add_offset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options that correspond to the keywords of :func:`write_offsets`."""
    parser.add_argument("--grid", action="store_true", help="write one sheet of all tokens instead of separate images")
    parser.add_argument("--plain", action="store_true", help="draw plain 2x2 merging beside each token")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an HTML viewer instead of images")
    parser.add_argument("--at-most", type=positive, metavar="N", help="draw N evenly spaced rows and columns (all)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options that choose a classifier: `--resume`, its expected `--model`, and another `--img_size`."""
    parser.add_argument("--resume", required=True, metavar="FILE", help="checkpoint of main.py, or a released one")
    parser.add_argument("--model", metavar="NAME", help="expected model (default: that of the checkpoint)")
    parser.add_argument("--img_size", type=_image_side, nargs="+", metavar="N", help="height and width, or one number")
    add_import_argument(parser)


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--import`, which names modules to import before a checkpoint is loaded."""
    help = "modules that register the checkpoint's model or merging"
    parser.add_argument("--import", dest="imports", nargs="+", default=[], metavar="MODULE", help=help)


def _image_side(text: str) -> int:
    if not 32 <= int(text) <= 2048:
        raise argparse.ArgumentTypeError(f"expected 32 to 2048, got {text}")
    return int(text)
