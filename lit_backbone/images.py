"""Image files: found in folders, opened and made RGB in one way, by training, evaluation and every tool."""

import errno
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from .text import printable

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow goes by content, and would run Ghostscript
LEGIBLE = 448  # pixels of the shorter side below which a picture is enlarged, for what is drawn or written in it
MAX_RATIO = 200  # of an image's sides; resizing the shorter one to 256 pixels makes the longer one of 51,200


class DataError(RuntimeError):
    """Data that cannot be used; its text is one line that names the place and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__().rpartition("DataError: ")[2].strip())  # less the trace of a loader's process


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sorts names as timm does, 9 before 10 and ignoring case, but without ties (A, a)."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def find_images(paths: list[str]) -> list[str]:
    """The files themselves, and all images in and below the folders, each folder's in natural order.

    Raises:
        DataError: a path is neither, or a folder holds none or cannot be read.
    """
    images: list[str] = []
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder")
        found = images_below(path) if os.path.isdir(path) else [path]
        if not found:
            raise DataError(f"{path}: holds no images ({', '.join(IMG_EXTENSIONS)})")
        images += found
    return images


def images_below(folder: str | Path) -> list[str]:
    """All files named like images, readable or not, in natural order. A folder that several links reach counts once."""
    found, entered, starts = [], set(), [str(folder)]

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: a folder that cannot be read ({error.strerror})") from error

    while starts:  # links, after all that is reached without them
        starts.sort()
        for here, folders, names in os.walk(starts.pop(0), onerror=refuse):
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in entered:
                folders.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            starts += filter(os.path.islink, (os.path.join(here, name) for name in folders))
            found += [os.path.join(here, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    return sorted(found, key=natural_key)


def open_rgb(path: str | Path, upright: bool = False) -> Image.Image:
    """A file's image, see :func:`decode_rgb`.

    Raises:
        DataError: the file is no image, or has none that can be used.
    """
    with naming(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe may take for ever
            raise OSError("no regular file")
        with open(path, "rb") as file:
            return decode_rgb(file, upright)


@contextmanager
def naming(file: str | Path, remedy: str = "repair or remove the file") -> Iterator[None]:
    """Turn whatever decoders raise into a DataError that names the file, and the remedy."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders fail in many ways
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        if is_shortage(error):
            remedy = "raise the number of files that a process may open, ulimit -n"
        raise DataError(f"{file}: no readable image ({reason[:200]}); {remedy}") from error


def is_shortage(error: BaseException | None) -> bool:
    """Whether a file could not be opened because too many others are."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def decode_rgb(file: BinaryIO, upright: bool = False) -> Image.Image:
    """The image in an open file, in RGB with 8 bits a channel.

    Args:
        file: at its start.
        upright: whether to turn it as its EXIF data says, as mmcv does; the original's classification does not.
    """
    with Image.open(file, formats=FORMATS) as image:
        if max(image.size) > MAX_RATIO * min(image.size):
            width, height = image.size
            raise ValueError(f"{width} x {height} pixels, one side more than {MAX_RATIO} times as long as the other")
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, 8 bits a channel; decodes it."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # Pillow clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a channel, of unknown range; convert it to 8 or 16")
    return image.convert("RGB")


def enlargement(height: int, width: int) -> int:
    """How many times a picture is enlarged before anything is drawn or written in it."""
    return math.ceil(LEGIBLE / min(height, width))
