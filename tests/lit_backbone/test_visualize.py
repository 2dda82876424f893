import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_backbone.images import DataError
from lit_backbone.visualize import (
    CELL_COLOR,
    POINT_COLOR,
    SamplingChains,
    draw_points,
    draw_sheet,
    evenly_spaced,
    follow_offsets,
    render_html,
    sampling_chains,
)
from tests.lit_backbone.small import small_lit

# ---- sampling points


def follow_one(offsets: list[Tensor], map_size: tuple[int, int], row: int, column: int) -> list[tuple[float, float]]:
    """Follow the samples of one token to the first feature map, one point at a time as in the reference."""
    sizes = [map_size, *(tuple(offset.shape[1:]) for offset in offsets)]
    points = [(float(row), float(column))]
    for level in reversed(range(len(offsets))):
        height, width = sizes[level]
        source = []
        for y, x in points:
            y, x = round(y), round(x)
            for tap, (ky, kx) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
                dy, dx = offsets[level][2 * tap : 2 * tap + 2, y, x].tolist()
                sample = (2 * y + ky + dy, 2 * x + kx + dx)
                if 0 <= round(sample[0]) < height and 0 <= round(sample[1]) < width:
                    source.append(sample)
        points = source
    return points


@pytest.mark.parametrize("map_size", [(16, 16), (17, 23), (31, 9)])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_chains_match_the_reference_algorithm(map_size: tuple[int, int], scale: float) -> None:
    size, offsets = map_size, []
    for _ in range(3):
        size = (size[0] // 2, size[1] // 2)
        offsets.append(scale * torch.randn(8, *size))
    chains = follow_offsets(offsets, map_size)
    assert chains.size == size and chains.cell == 32
    dropped = 0
    for row in range(size[0]):
        for column in range(size[1]):
            expected = follow_one(offsets, map_size, row, column)
            points = chains.of(row, column)
            dropped += 64 - len(expected)
            assert len(points) == len(expected)
            if expected:
                torch.testing.assert_close(points, 4 * torch.tensor(expected) + 2, atol=1e-3, rtol=0)
    assert (dropped > 0) == (scale > 1)


def test_samples_without_offsets_fill_the_cell() -> None:
    chains = follow_offsets([torch.zeros(8, size, size) for size in (28, 14, 7)], (56, 56))
    for row, column in [(0, 0), (3, 5), (6, 6)]:
        grid = {(32 * row + 4 * i + 2.0, 32 * column + 4 * j + 2.0) for i in range(8) for j in range(8)}
        assert set(map(tuple, chains.of(row, column).tolist())) == grid
    assert [level.shape for level in chains.points] == [(7, 7, 4, 2), (7, 7, 16, 2), (7, 7, 64, 2)]
    assert chains.points[0][2, 3].tolist() == [[72, 104], [72, 120], [88, 104], [88, 120]]  # centers of quarters


def test_samples_continue_their_parent() -> None:
    offsets = [torch.zeros(8, 8, 8), torch.zeros(8, 4, 4), torch.zeros(8, 2, 2)]
    offsets[2][2 * 3 + 1, 0, 0] = -1.0  # moves the last tap of token (0, 0) to the left by one token
    plain, moved = (follow_offsets(stack, (16, 16)) for stack in (offsets[:2] + [torch.zeros(8, 2, 2)], offsets))
    difference = [a[0, 0] - b[0, 0] for a, b in zip(moved.points, plain.points)]
    assert difference[0].nonzero().tolist() == [[3, 1]] and difference[0][3, 1] == -16
    assert difference[1].nonzero()[:, 0].tolist() == [12, 13, 14, 15]
    assert difference[2].nonzero()[:, 0].tolist() == list(range(48, 64))


def test_samples_outside_the_map_have_no_children() -> None:
    offsets = [torch.zeros(8, 8, 8), torch.zeros(8, 4, 4), torch.zeros(8, 2, 2)]
    offsets[2][0, 0, 0] = -0.6  # rounds to a row above the map
    chains = follow_offsets(offsets, (16, 16))
    assert [level[0, 0].isnan().any(-1).sum() for level in chains.points] == [1, 4, 16]
    assert len(chains.of(0, 0)) == 48 and len(chains.of(1, 1)) == 64


def test_chains_of_a_model() -> None:
    model = small_lit()
    image = torch.randn(3, 72, 100)
    before = model(image[None])
    chains = sampling_chains(model, image)
    torch.testing.assert_close(model(image[None]), before)  # hooks are removed
    offsets = []
    for merged, stage in zip(model.forward_intermediates(image[None], intermediates_only=True), model.stages[1:]):
        offsets.append(stage.merge.offset(merged)[0].detach())
    assert chains.size == (2, 3) and offsets[0].abs().max() > 0.1
    for row in range(2):
        for column in range(3):
            expected = 4 * torch.tensor(follow_one(offsets, (18, 25), row, column)) + 2
            torch.testing.assert_close(chains.of(row, column), expected, atol=1e-3, rtol=0)


def test_undeformed_chains_fill_the_cell(chains: SamplingChains) -> None:
    plain = chains.scaled(3).undeformed()
    expected = follow_offsets([torch.zeros(8, size, 3 * size // 2) for size in (8, 4, 2)], (16, 24))
    assert plain.cell == 3 * chains.cell
    assert all(torch.equal(a, 3 * b) for a, b in zip(plain.points, expected.points, strict=True))


def test_model_without_dtm_is_refused() -> None:
    with pytest.raises(DataError, match="no deformable token merging"):
        sampling_chains(small_lit("conv_merging"), torch.randn(3, 64, 64))


# ---- drawings


@pytest.fixture
def chains() -> SamplingChains:
    return sampling_chains(small_lit(), torch.randn(3, 64, 96))


@pytest.mark.parametrize("size", [(96, 64), (960, 640)])
def test_points_and_cell_are_drawn_at_their_positions(size: tuple[int, int]) -> None:
    columns, rows = size[0] // 32, size[1] // 32
    offsets = [torch.zeros(8, 2**i * rows, 2**i * columns) for i in (2, 1, 0)]
    offsets[2][:, 1, 2] = -0.4  # moves samples up and left by 6 pixels
    chains = follow_offsets(offsets, (8 * rows, 8 * columns))
    drawing = draw_points(Image.new("RGB", size, "blue"), chains, 1, 2)
    factor = drawing.width // size[0]
    assert drawing.size == (factor * size[0], factor * size[1]) and min(drawing.size) >= 448
    pixels = np.array(drawing)
    points = chains.of(1, 2)
    assert len(points)
    for y, x in (factor * points).tolist():
        near = pixels[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].reshape(-1, 3)
        assert POINT_COLOR in map(tuple, near.tolist())
    green = np.argwhere((pixels == CELL_COLOR).all(-1))  # (N, yx)
    cell = factor * chains.cell
    assert green.min(0).tolist() == [cell, 2 * cell]
    assert green.max(0).tolist() == [min(2 * cell, drawing.height - 1), min(3 * cell, drawing.width - 1)]


def test_sheet_holds_all_images() -> None:
    images = [Image.new("RGB", (100, 60), (i, 0, 0)) for i in range(10)]
    sheet = draw_sheet(images, 10, columns=4)
    assert sheet.size == (4 * 104 - 4, 3 * 64 - 4)
    assert [sheet.getpixel((50 + i % 4 * 104, 30 + i // 4 * 64))[0] for i in range(10)] == list(range(10))
    assert draw_sheet(images * 10, 100, columns=50, max_width=1000).width <= 1000


def test_evenly_spaced() -> None:
    assert evenly_spaced(7, 7) == list(range(7)) and evenly_spaced(3, 7) == [0, 1, 2]
    for count in (8, 20, 42):
        chosen = evenly_spaced(count, 7)
        assert len(chosen) == len(set(chosen)) == 7 and chosen == sorted(chosen) and chosen[-1] < count
        assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1


# ---- HTML viewer


def test_html_is_self_contained(chains: SamplingChains) -> None:
    html = render_html(Image.new("RGB", (96, 64)), chains, "a </script><b>title")
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?!data:)[^\s\"'>]", html)
    assert set(re.findall(r"https?://[^\"'\s<]*", html)) == {"http://www.w3.org/2000/svg"}  # an XML namespace
    data = json.loads(re.search(r"const data = (.*);\n", html)[1])
    assert data["title"] == "a </script><b>title" and html.count("</script>") == 1
    points = data["levels"][-1][1][2]
    for point, expected in zip(points, chains.points[-1][1, 2].tolist()):
        assert point == pytest.approx(expected[::-1], abs=0.051, nan_ok=True)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
needs_browser = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("CI"), reason="no Chromium; `make test-slow` installs it"
)


@contextmanager
def opened(html: str, tmp_path: Path, **context: Any) -> Iterator[Any]:
    """Open the viewer in headless Chromium; fail if it logs an error or sends a request for another file."""
    from playwright.sync_api import sync_playwright

    (tmp_path / "viewer.html").write_text(html, encoding="utf-8")
    errors, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_context(viewport={"width": 1000, "height": 800}, **context).new_page()
        tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((tmp_path / "viewer.html").as_uri())
        yield tab
        browser.close()
    assert not errors
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "viewer.html").as_uri()]


def shown(tab: Any) -> tuple[str, str, str]:
    """Return the text of the selected token, the position of its cell, and the drawn points."""
    cell = tab.locator("#cell").evaluate("cell => [cell.getAttribute('x'), cell.getAttribute('y')].join()")
    return tab.locator("#token").inner_text(), cell, tab.locator("#points").inner_html()


@pytest.mark.slow
@needs_browser
def test_points_follow_mouse_keys_and_taps(chains: SamplingChains, tmp_path: Path) -> None:
    html = render_html(Image.new("RGB", (96, 64), "green"), chains, "Test")
    with opened(html, tmp_path, has_touch=True) as tab:
        box = tab.locator("#viewer").bounding_box()
        side = min(box["width"] / 96, box["height"] / 64) * 32  # screen pixels per cell
        left, top = box["x"], box["y"]

        def center(row: int, column: int) -> tuple[float, float]:
            return left + (column + 0.5) * side, top + (row + 0.5) * side

        seen = {}
        for row in range(2):
            for column in range(3):
                tab.mouse.move(*center(row, column))
                seen[row, column] = shown(tab)
                assert seen[row, column][:2] == (f"Token in row {row}, column {column}", f"{32 * column},{32 * row}")
                circles = tab.locator("#points circle").count()
                assert circles == sum(int((~points[row, column].isnan().any(-1)).sum()) for points in chains.points)
        assert len({points for _, _, points in seen.values()}) == 6

        position = (1, 2)
        for key, step in [("ArrowLeft", (0, -1)), ("ArrowUp", (-1, 0)), ("ArrowRight", (0, 1)), ("ArrowDown", (1, 0))]:
            tab.keyboard.press(key)
            position = (position[0] + step[0], position[1] + step[1])
            assert shown(tab) == seen[position]
        tab.keyboard.press("ArrowRight")  # the last column is selected already
        assert shown(tab) == seen[1, 2]
        tab.touchscreen.tap(*center(0, 0))
        assert shown(tab) == seen[0, 0]


@pytest.mark.slow
@needs_browser
def test_lines_grid_and_levels_can_be_hidden(chains: SamplingChains, tmp_path: Path) -> None:
    with opened(render_html(Image.new("RGB", (96, 64)), chains, "Test"), tmp_path) as tab:
        points = sum(int((~points[1, 1].isnan().any(-1)).sum()) for points in chains.points)
        assert tab.locator("#lines line").count() == tab.locator("#points circle").count() == points
        grid = tab.locator("#grid circle").evaluate_all("all => all.map(c => [c.cx.baseVal.value, c.cy.baseVal.value])")
        undeformed = follow_offsets([torch.zeros(8, 8, 12), torch.zeros(8, 4, 6), torch.zeros(8, 2, 3)], (16, 24))
        assert grid == undeformed.of(1, 1).flip(1).tolist()
        moved = (chains.points[0][1, 1] - undeformed.points[0][1, 1]).norm(dim=-1).nanmean()
        assert tab.locator("#moved0").inner_text() == f"moved by {moved:.1f} pixels"
        assert f"{len(chains.of(1, 1))} of 64 samples" in tab.locator("#counts").inner_text()
        for box in ("#show-lines", "#show-grid", "#level0", "#level1"):
            tab.locator(box).uncheck()
        assert tab.locator("#lines line").count() == tab.locator("#grid circle").count() == 0
        assert tab.locator("#points circle").count() == len(chains.of(1, 1))
