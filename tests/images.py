"""Pixels and unusual image files for tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Y, X = np.mgrid[:40, :48]
GRAY = (4 * Y + X).astype(np.uint8)  # (40, 48)
RGB = np.stack((GRAY, 255 - GRAY, GRAY // 2), axis=2)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\n(%s) run\nshowpage\n"


def write_truncated(path: Path) -> None:
    Image.fromarray(RGB).save(path)
    path.write_bytes(path.read_bytes()[:500])


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {  # function that writes the file, part of the reason
    "eps.jpg": (lambda path: path.write_bytes(EPS), "none of BMP, "),  # Pillow would start Ghostscript
    "truncated.jpg": (write_truncated, "[Tt]runcated"),
    "empty.png": (Path.touch, "none of"),
    "float.png": (lambda path: Image.fromarray(RGB[..., 0] / 255).convert("F").save(path, "TIFF"), "32 bits"),
    "huge.png": (lambda path: path.write_bytes(b"P6 20000 20000 255\n"), "decompression bomb"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere"), "No such file"),
}
