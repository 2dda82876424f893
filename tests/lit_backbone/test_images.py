import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_backbone.images import DataError, find_images, open_rgb, wrap_decode_errors
from tests.images import GRAY, RGB, UNREADABLE

DEEP = (GRAY.astype(np.uint16) << 8) + 7

READABLE = {  # name: image, format, options, expected pixels
    "16-bit.png": (Image.fromarray(DEEP), "PNG", {}, GRAY),
    "16-bit-tiff.jpg": (Image.fromarray(DEEP), "TIFF", {}, GRAY),
    "16-bit-pgm.png": (Image.fromarray(DEEP.astype(np.int32)), "PPM", {}, GRAY),
    "transparent.png": (Image.fromarray(GRAY).convert("P"), "PNG", {"transparency": bytes(range(256))}, GRAY),
    "webp.png": (Image.fromarray(RGB), "WEBP", {"lossless": True}, RGB),
    "bmp.jpg": (Image.fromarray(RGB), "BMP", {}, RGB),
    "cmyk.jpg": (Image.fromarray(RGB).convert("CMYK"), "JPEG", {"quality": 95}, RGB),
    "gif.png": (Image.fromarray(GRAY), "GIF", {}, GRAY),
}


@pytest.mark.parametrize("name", READABLE)
def test_formats_and_modes(name: str, tmp_path: Path) -> None:
    image, format, options, expected = READABLE[name]
    image.save(tmp_path / name, format, **options)
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    tolerance = 10 if format == "JPEG" else 0
    assert np.abs(np.asarray(open_rgb(tmp_path / name)).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images_name_the_file(name: str, tmp_path: Path) -> None:
    write, reason = UNREADABLE[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=rf"^\S*/{name}: unreadable image \(.*{reason}.*\). Repair or remove"):
        open_rgb(tmp_path / name)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), KeyError(7), AssertionError(), MemoryError()])
def test_decoder_errors_name_the_file_except_too_many_open_files(error: Exception) -> None:
    with pytest.raises(DataError, match=r"^x\\n\.tif: unreadable image \(.+\)"), wrap_decode_errors("x\n.tif"):
        raise error
    with pytest.raises(OSError, match="Too many open files"), wrap_decode_errors("x.png"):
        raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("suffix, upright", [("png", RGB[::-1].transpose(1, 0, 2)), ("webp", RGB)])
def test_exif_orientation_is_optional(suffix: str, upright: np.ndarray, tmp_path: Path) -> None:
    """Rotate as OpenCV does, which mmcv uses."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    path = tmp_path / f"rotated.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif, lossless=True)
    assert np.array_equal(open_rgb(path), RGB)
    assert np.array_equal(open_rgb(path, upright=True), upright)
    cv2 = pytest.importorskip("cv2")
    assert np.array_equal(cv2.imread(str(path))[..., ::-1], upright)


@pytest.mark.parametrize("name", ["._1.png", ".ipynb_checkpoints/1.png", "a/@eaDir/1.png", "__MACOSX/a/1.png"])
def test_find_images_skips_hidden_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"^{tmp_path}: no images"):
        find_images([tmp_path])
    with pytest.raises(DataError, match="none: no such file or directory"):
        find_images([tmp_path / "none"])


def test_find_images_in_natural_order(tmp_path: Path) -> None:
    names = ["1/9.png", "1/10.PNG", "2/a.jpeg", "10/b.webp"]
    for name in [*names[::-1], "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "1" / "loop").symlink_to(tmp_path)  # links to parent directories are skipped
    expected = [str(tmp_path / name) for name in names]
    assert find_images([str(tmp_path)]) == expected
    for folder, target in (("1", "10"), ("10", "1")):  # links that lead to each other
        (tmp_path / folder / "other").symlink_to(tmp_path / target)
    assert len(find_images([tmp_path])) == 7
    for folder in ("1", "10"):
        (tmp_path / folder / "other").unlink()
    (tmp_path / "3").symlink_to(tmp_path / "10")
    assert find_images([str(tmp_path)]) == [*expected[:3], str(tmp_path / "3" / "b.webp"), expected[3]]
    assert find_images([tmp_path / "notes.txt", tmp_path / "2"]) == [str(tmp_path / "notes.txt"), expected[2]]
