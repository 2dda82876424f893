"""The folder of scanned digits."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from demo.digits import draw_digit, write_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_every_scan_is_written_once(digits, tmp_path):
    """An incomplete folder is written again."""
    assert write_digits(tmp_path) and not write_digits(tmp_path)
    before = content(tmp_path)
    train, val = (list((tmp_path / split).glob("*/*.png")) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert sorted(int(path.stem) for path in train + val) == list(range(1797))
    assert all(path.parent.name == str(digits.target[int(path.stem)]) for path in train + val)
    first = next(tmp_path.rglob("0000.png"))
    with Image.open(first) as image:
        assert (image.mode, image.size, image.format) == ("L", (64, 64), "PNG")
        assert image.getextrema()[1] > 200
    first.unlink()
    assert write_digits(tmp_path) and content(tmp_path) == before


def test_image_interpolates_the_scan(digits):
    scan = digits.images[7]
    pixels = np.asarray(draw_digit(scan, size=40), dtype=float)  # five pixels per pixel of the scan
    assert pixels[2::5, 2::5] * 16 / 255 == pytest.approx(scan, abs=0.05)
