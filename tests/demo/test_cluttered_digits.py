"""Cluttered digits: whole digits, balanced, the same every time, of scans that the splits do not share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from demo.cluttered_digits import DIGIT_SIDE, SIDE, Composer, distort, draw_sheet, write_images
from demo.digits import split_digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluttered")
    assert write_images(root, train=30, val=20)
    return root


def test_every_digit_is_shown_as_often(folder: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        assert {d.name: len(list(d.iterdir())) for d in (folder / split).iterdir()} == {
            str(i): count for i in range(10)
        }
    with Image.open(folder / "train" / "7" / "00017.png") as image:
        assert image.size == (SIDE, SIDE) and image.mode == "L"


def test_images_follow_from_split_and_number(folder: Path) -> None:
    train, val = (Composer(split).compose(17) for split in ("train", "val"))
    assert np.array_equal(np.asarray(Image.open(folder / "train" / "7" / "00017.png")), train)
    assert not np.array_equal(train, val)
    assert not np.array_equal(train, Composer("train", seed=1).compose(17))


def test_only_the_splits_own_scans_are_drawn() -> None:
    """Painting over the other split's scans changes nothing."""
    members = split_digits(load_digits().target)
    whole, spoilt = Composer("val"), Composer("val")
    spoilt.images = spoilt.images.copy()
    spoilt.images[members["train"]] = 1
    assert all(np.array_equal(whole.compose(i), spoilt.compose(i)) for i in range(20))
    spoilt.images[members["val"]] = 1
    assert not np.array_equal(whole.compose(0), spoilt.compose(0))


def test_a_distorted_digit_stays_whole() -> None:
    """None of it is cut off: its brightness is that of the scan, times the area of one of its pixels."""
    scan = np.ones((8, 8))
    areas = [distort(scan, np.random.default_rng(i)).sum() for i in range(200)]
    assert 0.9 * DIGIT_SIDE[0] ** 2 < min(areas) and max(areas) < 1.1 * DIGIT_SIDE[1] ** 2
    for i in range(200):
        border = distort(scan[2:6, 2:6], np.random.default_rng(i))
        assert max(border[0].max(), border[-1].max(), border[:, 0].max(), border[:, -1].max()) < 0.6


def test_what_is_there_is_not_written_again(folder: Path) -> None:
    assert not write_images(folder, train=30, val=20)
    (folder / "val" / "3" / "00013.png").unlink()
    assert write_images(folder, train=30, val=20)
    assert not write_images(folder, train=30, val=20)


def test_what_is_there_of_another_seed_or_cut_off_is_written_again(tmp_path: Path) -> None:
    assert write_images(tmp_path, train=10, val=10, seed=1)
    assert write_images(tmp_path, train=10, val=10)
    last = tmp_path / "val" / "9" / "00009.png"
    last.write_bytes(last.read_bytes()[:100])
    assert write_images(tmp_path, train=10, val=10)
    assert not write_images(tmp_path, train=10, val=10)


def test_preview() -> None:
    assert draw_sheet("val", rows=1).size == (20 * SIDE, 2 * SIDE)
