import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_backbone.visualize import (
    CELL_COLOR,
    POINT_COLOR,
    SamplingChains,
    draw_points,
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


def assert_follows_reference(chains: SamplingChains, offsets: list[Tensor], map_size: tuple[int, int]) -> int:
    """Compare the samples of all tokens, and return the number of dropped ones."""
    dropped = 0
    for row in range(chains.size[0]):
        for column in range(chains.size[1]):
            expected = torch.tensor(follow_one(offsets, map_size, row, column)).view(-1, 2)
            torch.testing.assert_close(chains.of(row, column), 4 * expected + 2, atol=1e-3, rtol=0)
            dropped += 64 - len(expected)
    return dropped


@pytest.mark.parametrize("map_size", [(16, 16), (17, 23), (31, 9)])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_chains_match_the_reference_algorithm(map_size: tuple[int, int], scale: float) -> None:
    size, offsets = map_size, []
    for _ in range(3):
        size = (size[0] // 2, size[1] // 2)
        offsets.append(scale * torch.randn(8, *size))
    chains = follow_offsets(offsets, map_size)
    assert chains.size == size and chains.cell == 32
    assert (assert_follows_reference(chains, offsets, map_size) > 0) == (scale > 1)


def test_chains_of_a_model() -> None:
    model, image = small_lit(), torch.randn(3, 72, 100)
    before = model(image[None])
    chains = sampling_chains(model, image)
    torch.testing.assert_close(model(image[None]), before)  # hooks are removed
    maps = model.forward_intermediates(image[None], intermediates_only=True)
    offsets = [stage.merge.offset(merged)[0].detach() for merged, stage in zip(maps, model.stages[1:])]
    assert chains.size == (2, 3) and offsets[0].abs().max() > 0.1
    assert_follows_reference(chains, offsets, (18, 25))


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
needs_browser = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("CI"), reason="no Chromium; `make test-slow` installs it"
)


@pytest.fixture
def tab(chains: SamplingChains, tmp_path: Path) -> Iterator[Any]:
    """Open the viewer in headless Chromium; fail if it logs an error or sends a request for another file."""
    from playwright.sync_api import sync_playwright

    file, problems = tmp_path / "viewer.html", []
    file.write_text(render_html(Image.new("RGB", (96, 64), "green"), chains, "Test"), encoding="utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = browser.new_context(viewport={"width": 1000, "height": 800}, has_touch=True).new_page()
        tab.on("console", lambda message: problems.append((message.type, message.text)))
        tab.on("pageerror", lambda error: problems.append(("error", str(error))))
        tab.on("request", lambda request: problems.append(("request", request.url)))
        tab.goto(file.as_uri())
        yield tab
        browser.close()
    requests = [url for kind, url in problems if kind == "request" and not url.startswith("data:")]
    assert requests == [file.as_uri()] and not {"error", "warning"} & {kind for kind, _ in problems}


@pytest.mark.slow
@needs_browser
def test_points_follow_mouse_keys_and_taps_and_can_be_hidden(chains: SamplingChains, tab: Any) -> None:
    box = tab.locator("#viewer").bounding_box()
    side = min(box["width"] / 96, box["height"] / 64) * 32  # screen pixels per cell

    def center(row: int, column: int) -> tuple[float, float]:
        return box["x"] + (column + 0.5) * side, box["y"] + (row + 0.5) * side

    def shown() -> tuple[str, str, str]:
        """Return the text of the selected token, the position of its cell, and the drawn points."""
        cell = tab.locator("#cell").evaluate("cell => [cell.getAttribute('x'), cell.getAttribute('y')].join()")
        return tab.locator("#token").inner_text(), cell, tab.locator("#points").inner_html()

    seen = {}
    for row in range(2):
        for column in range(3):
            tab.mouse.move(*center(row, column))
            seen[row, column] = shown()
            assert seen[row, column][:2] == (f"Token in row {row}, column {column}", f"{32 * column},{32 * row}")
            circles = tab.locator("#points circle").count()
            assert circles == sum(int((~points[row, column].isnan().any(-1)).sum()) for points in chains.points)
    assert len({points for _, _, points in seen.values()}) == 6

    path = {"ArrowLeft": (1, 1), "ArrowUp": (0, 1), "ArrowRight": (0, 2), "ArrowDown": (1, 2), "End": (1, 2)}
    for key, position in path.items():
        tab.keyboard.press(key)
        assert shown() == seen[position]
    tab.touchscreen.tap(*center(1, 1))
    assert shown() == seen[1, 1]

    assert tab.locator("#lines line").count() == tab.locator("#points circle").count() > 0
    assert f"{len(chains.of(1, 1))} of 64 samples" in tab.locator("#counts").inner_text()
    for switch in ("#show-lines", "#show-grid", "#level0", "#level1"):
        tab.locator(switch).uncheck()
    assert tab.locator("#lines line").count() == tab.locator("#grid circle").count() == 0
    assert tab.locator("#points circle").count() == len(chains.of(1, 1))
