"""Odd image files, links and names: the same through every door, read alike or refused in one line."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from lit_classification.config_file import load_config
from lit_classification.datasets import ImageFolder, build_dataset
from lit_classification.loaders import image_loader
from PIL import Image

import predict
import visualize_offset
from lit_backbone.images import MAX_RATIO, DataError, find_images, naming, open_rgb
from lit_classification.sampler import SampleKey

Y, X = np.mgrid[:40, :48]
GREY = (4 * Y + X).astype(np.uint8)  # (40, 48)
RGB = np.stack((GREY, 255 - GREY, GREY // 2), axis=2)
DEEP = (GREY.astype(np.uint16) << 8) + 7
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\n(%s) run\nshowpage\n"

READ = {  # how to write the file, what is seen in it
    "16-bit.png": (Image.fromarray(DEEP), "PNG", {}, GREY),
    "16-bit-tiff.jpg": (Image.fromarray(DEEP), "TIFF", {}, GREY),
    "16-bit-pgm.png": (Image.fromarray(DEEP), "PPM", {}, GREY),
    "transparent.png": (Image.fromarray(GREY).convert("P"), "PNG", {"transparency": bytes(range(256))}, GREY),
    "cmyk.jpg": (Image.fromarray(RGB).convert("CMYK"), "JPEG", {"quality": 95}, RGB),
    "webp.png": (Image.fromarray(RGB), "WEBP", {"lossless": True}, RGB),
    "bmp.jpg": (Image.fromarray(RGB), "BMP", {}, RGB),
    "gif.png": (Image.fromarray(GREY), "GIF", {}, GREY),
}


def write_png(path: Path, *size: int) -> None:
    Image.new("L", size).save(path, "PNG")


def write_truncated(path: Path) -> None:
    Image.fromarray(RGB).save(path)
    path.write_bytes(path.read_bytes()[:500])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {  # how to make the file, what is said of it
    "eps.jpg": (lambda path: path.write_bytes(EPS), "none of BMP, "),  # and no Ghostscript starts
    "truncated.jpg": (write_truncated, "Truncated|truncated"),
    "empty.png": (Path.touch, "none of"),
    "pipe.jpg": (os.mkfifo, "no regular file"),  # to open it would take for ever
    "float.png": (lambda path: Image.fromarray(RGB[..., 0] / 255).convert("F").save(path, "TIFF"), "32 bits a channel"),
    "thin.png": (lambda path: write_png(path, 1, 3_000_000), "1 x 3000000 pixels"),
    "huge.png": (lambda path: path.write_bytes(b"P6 20000 20000 255\n"), "decompression bomb"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.fixture(params=["training", "predict", "visualize_offset"])
def read(request, tmp_path, tiny_cfg, monkeypatch) -> Callable[[Path], np.ndarray]:
    """Reads a file as one of the doors does."""

    def training(path: Path) -> np.ndarray:
        folder = tmp_path / "data" / "train" / "a"
        folder.mkdir(parents=True)
        (folder / path.name).symlink_to(path)
        config = load_config(tiny_cfg(), ["MODEL.NUM_CLASSES", "1"], data_path=str(tmp_path / "data"))
        dataset = build_dataset(config, is_training=True)
        assert len(dataset) == 1
        return np.asarray(dataset.read(0)[0])

    def files(path: Path) -> np.ndarray:
        ((_, found),) = next(iter(image_loader([str(path)], np.asarray)))
        if isinstance(found, DataError):
            raise found
        return found

    def visualize(path: Path) -> np.ndarray:
        seen = []
        see = SimpleNamespace(model=None, transform=lambda image: seen.append(image) or sys.exit())
        monkeypatch.setattr(visualize_offset, "load_model", lambda args, device: see)
        with pytest.raises(SystemExit) as ended:
            visualize_offset.main(["--resume", "x.pth", "--vis_image", str(path)])
        if not seen:
            raise DataError(str(ended.value).removeprefix("error: "))
        return np.asarray(seen[0])

    return {"training": training, "visualize_offset": visualize, "predict": files}[request.param]


@pytest.mark.parametrize("name", READ)
def test_unusual_files_look_the_same_through_every_door(name, read, tmp_path):
    image, format, options, expected = READ[name]
    image.save(tmp_path / name, format, **options)
    found = read(tmp_path / name).astype(int)
    assert found.shape == (40, 48, 3)
    expected = expected if expected.ndim == 3 else expected[..., None]
    tolerance = 10 if name == "cmyk.jpg" else 0
    assert np.abs(found - expected).max() <= tolerance


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_files_are_refused_through_every_door(name, read, tmp_path):
    write, said = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=rf"^\S*/{name}: no readable image \(.*({said}).*\); repair or remove "):
        read(tmp_path / name)


def test_data_sets_of_torchvision_open_files_as_all_others(tiny_cfg, tmp_path):
    folder = tmp_path / "2021_train" / "00000_Animalia_Phylum_Class_Order_Family_Felis_catus"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(EPS)
    options = ["DATA.DATASET", "torch/inaturalist", "MODEL.NUM_CLASSES", "1"]
    dataset = build_dataset(load_config(tiny_cfg(), options, data_path=str(tmp_path)), is_training=True)
    with pytest.raises(DataError, match=r"0\.jpg: no readable image \(none of BMP"):
        dataset.read(0)


def test_too_many_open_files_are_no_fault_of_an_image(own_folder, tiny_cfg, monkeypatch):
    config = load_config(tiny_cfg(), ["DATA.ON_BAD_IMAGE", "skip"], data_path=str(own_folder))
    dataset = build_dataset(config, is_training=True)
    monkeypatch.setattr(Image, "open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(DataError, match=r"\.jpg: .*Too many open files.*ulimit -n"):
        dataset[SampleKey(0, 0, 0)]


def test_a_long_image_is_none_too_long(tmp_path):
    write_png(tmp_path / "banner.png", MAX_RATIO, 1)
    assert open_rgb(tmp_path / "banner.png").size == (MAX_RATIO, 1)


def test_classification_ignores_orientation_and_the_dense_tools_do_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_rgb(tmp_path / "turned.png"), RGB)
    assert np.array_equal(open_rgb(tmp_path / "turned.png", upright=True), RGB[::-1].transpose(1, 0, 2))


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), KeyError(7), AssertionError(), MemoryError()])
def test_whatever_decoders_raise_names_the_file(error):
    with pytest.raises(DataError, match=r"^x\.tif: no readable image \(.+\); repair or remove the file$"):
        with naming("x.tif"):
            raise error


def test_names_that_no_terminal_shows_are_escaped(tmp_path):
    """One is not UTF-8, one has a line break and an escape."""
    for name in (b"caf\xe9.png", b"a\n\x1b[31m.png"):
        write_png(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), 8, 8)
    first, second = find_images([str(tmp_path)])
    assert [open_rgb(path).size for path in (first, second)] == [(8, 8)] * 2
    said = [f"{tmp_path}/a\\n\\x1b[31m.png", f"{tmp_path}/caf\\udce9.png"]
    assert [predict.as_text(path, []) for path in (first, second)] == said
    for path, name in zip((first, second), said):
        Path(path).write_bytes(b"")
        with pytest.raises(DataError) as caught:
            open_rgb(path)
        assert str(caught.value).startswith(f"{name}: no readable image")


# ---- folders


@pytest.mark.parametrize("archive", [False, True])
def test_every_usual_kind_of_image_counts(archive, tiny_cfg, own_folder):
    """Those of torchvision's ImageFolder, not only timm's three."""
    for kind in ("webp", "bmp", "TIFF"):
        with Image.open(own_folder / "val" / "bee" / "0.jpg") as image:
            image.save(own_folder / "val" / "bee" / f"{kind}.{kind}")
    assert len(find_images([str(own_folder / "val")])) == 15
    if archive:
        with tarfile.open(own_folder / "val.tar", "w") as tar:
            tar.add(own_folder / "val", "val")
        shutil.rmtree(own_folder / "val")
    assert len(build_dataset(load_config(tiny_cfg(), data_path=str(own_folder)), is_training=False)) == 15


def test_links_are_followed_once(own_folder, tmp_path):
    """Not round a loop, and not a second time where two links lead to one folder."""
    (tmp_path / "more").mkdir()
    write_png(tmp_path / "more" / "linked.png", 8, 8)
    train = own_folder / "train"
    before = find_images([str(train)])
    for name, target in [("ant/0", train), ("ant/ring", train / "ant"), ("a", train / "bee"), ("cat/own", "own")]:
        (train / name).symlink_to(target)
    assert find_images([str(train)]) == before
    for name in ("ant/one", "bee/two"):
        (train / name).symlink_to(tmp_path / "more")
    assert find_images([str(train)]) == sorted([*before, str(train / "ant" / "one" / "linked.png")])


ORDER = """
import json, sys
from lit_classification.datasets import ImageFolder
folder = ImageFolder(sys.argv[1])
print(json.dumps([folder.classes, [[file[len(sys.argv[1]) + 1 :], label] for file, label in folder.samples]]))
"""


@pytest.mark.parametrize("seed", ["0", "1"])
def test_labels_and_files_have_one_order(seed, tmp_path):
    """Timm leaves class folders that its natural order ties to Python's hashes, and fails on a superscript."""
    classes = ["001", "01", "1", "5²", "10", "B", "b"]
    files = [*(f"{name}/0.png" for name in classes), "b/01.png", "b/1.png", "b/A.png", "b/a.PNG"]
    for file in files[::-1]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_png(tmp_path / file, 8, 8)
    options = dict(cwd=Path(predict.__file__).parent, env=os.environ | {"PYTHONHASHSEED": seed})
    found = subprocess.check_output([sys.executable, "-c", ORDER, str(tmp_path)], **options)
    assert json.loads(found) == [classes, [[file, classes.index(file.split("/")[0])] for file in files]]


def test_an_archive_of_tied_classes_is_refused(tiny_cfg, tmp_path):
    write_png(tmp_path / "0.png", 8, 8)
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for name in ("a", "01", "A"):
            archive.add(tmp_path / "0.png", arcname=f"val/{name}/0.png")
    config = load_config(tiny_cfg(), data_path=str(tmp_path))
    with pytest.raises(DataError, match=r"val\.tar: .*differ in case or zeros only; unpack it"):
        build_dataset(config, is_training=False)


def test_an_image_outside_of_class_folders_is_no_class(own_folder):
    write_png(own_folder / "train" / "stray.png", 8, 8)
    with pytest.raises(DataError, match=r"train/stray\.png: an image in no class folder; move or remove it"):
        ImageFolder(own_folder / "train")
