"""Image files and names in training, `predict.py` and `visualize_offset.py`, which read them alike."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import predict
import visualize_offset
from lit_backbone.datasets import image_loader
from lit_backbone.images import DataError, find_images, open_rgb
from lit_classification.config_reader import load_config
from lit_classification.data import build_dataset
from tests.images import GRAY, UNREADABLE


@pytest.fixture(params=["training", "predict", "visualize_offset"])
def read(request, tmp_path, tiny_cfg, monkeypatch) -> Callable[[Path], np.ndarray]:
    """Return a function that reads a file as one of the programs does."""

    def training(path: Path) -> np.ndarray:
        folder = tmp_path / "data" / "train" / "a"
        folder.mkdir(parents=True)
        (folder / path.name).symlink_to(path)
        dataset = build_dataset(load_config(tiny_cfg(), data_path=str(tmp_path / "data")), is_training=True)
        assert len(dataset) == 1
        return np.asarray(dataset.read(0)[0])

    def files(path: Path) -> np.ndarray:
        ((_, result),) = next(iter(image_loader([str(path)], np.asarray)))
        if isinstance(result, DataError):
            raise result
        return result

    def visualize(path: Path) -> np.ndarray:
        images = []
        classifier = SimpleNamespace(model=None, transform=lambda image: images.append(image) or sys.exit())
        monkeypatch.setattr(visualize_offset, "load_classifier", lambda *args: classifier)
        with pytest.raises(SystemExit) as info:
            visualize_offset.main(["--resume", "x.pth", "--vis_image", str(path)])
        if not images:
            raise DataError(str(info.value).removeprefix("error: "))
        return np.asarray(images[0])

    return {"training": training, "visualize_offset": visualize, "predict": files}[request.param]


def test_16_bits_are_scaled_and_exif_orientation_is_ignored(read, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray((GRAY.astype(np.uint16) << 8) + 7).save(tmp_path / "16-bit.png", exif=exif)
    assert np.array_equal(read(tmp_path / "16-bit.png"), np.repeat(GRAY[..., None], 3, axis=2))


@pytest.mark.parametrize("name", ["eps.jpg", "truncated.jpg"])  # lit_backbone/test_images.py has the others
def test_unreadable_file_is_refused_by_every_program(name, read, tmp_path):
    write, problem = UNREADABLE[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=rf"^\S*/{name}: unreadable image .*({problem})"):
        read(tmp_path / name)


def test_unprintable_names_are_escaped(tmp_path):
    """Read a name that is not UTF-8, and one with a line break and an escape sequence."""
    for name in (b"caf\xe9.png", b"a\n\x1b[31m.png"):
        Image.new("L", (8, 8)).save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    paths = find_images([str(tmp_path)])
    escaped = [f"{tmp_path}/a\\n\\x1b[31m.png", f"{tmp_path}/caf\\udce9.png"]
    assert [open_rgb(path).size for path in paths] == [(8, 8)] * 2
    assert [predict.describe(path, [], as_json=False) for path in paths] == escaped
