import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from demo.digits import draw_digit, split_digits, write_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    assert write_digits(root)
    return root


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_every_scan_is_written_once_under_its_label(folder, digits):
    train, val = (list((folder / split).glob("*/*.png")) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert sorted(int(path.stem) for path in train + val) == list(range(1797))
    assert all(path.parent.name == str(digits.target[int(path.stem)]) for path in train + val)


def test_no_scan_appears_twice_in_the_data(digits):
    assert len(np.unique(digits.data, axis=0)) == 1797


def test_split_keeps_the_proportions(digits):
    share = np.bincount(digits.target) / 1797
    for members in split_digits(digits.target).values():
        assert np.bincount(digits.target[members]) == pytest.approx(share * len(members), abs=1)


def test_a_complete_folder_is_left_alone_and_any_other_is_written(folder, tmp_path):
    assert not write_digits(folder)
    assert write_digits(tmp_path) and content(tmp_path) == content(folder)
    next(tmp_path.rglob("0000.png")).unlink()
    assert write_digits(tmp_path) and content(tmp_path) == content(folder)


@pytest.mark.parametrize("number", [0, 7, 1796])
def test_image_goes_through_the_intensities_of_the_scan(digits, number):
    scan = digits.images[number]
    pixels = np.asarray(draw_digit(scan, size=40), dtype=float)  # five pixels per scanned one: the third is its centre
    assert pixels[2::5, 2::5] * 16 / 255 == pytest.approx(scan, abs=0.05)


def test_written_image_is_8_bit_grey(folder):
    with Image.open(next(folder.rglob("0000.png"))) as image:
        assert (image.mode, image.size, image.format) == ("L", (64, 64), "PNG")
        assert image.getextrema()[1] > 200
