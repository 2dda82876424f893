"""Image files: find them and decode them to RGB, in the same way for training, evaluation and every tool."""

import errno
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import folder

from .safe_reader import printable

IMG_EXTENSIONS = (*folder.IMG_EXTENSIONS, ".jfif", ".gif")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow detects more, and runs Ghostscript for EPS


class DataError(RuntimeError):
    """Data that cannot be used; its text is one line that names the file."""

    def __str__(self) -> str:
        return printable(super().__str__().rpartition("DataError: ")[2].strip())  # without a DataLoader's traceback


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return a key that sorts 9 before 10 and ignores case, as timm does, but without ties."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def skip_reason(name: str) -> str:
    """Return why the file of a relative path is no image: "hidden" or its suffix; empty for images.

    Hidden are files and folders of systems and notebooks: `._0.jpg`, `.ipynb_checkpoints`, `__MACOSX`, `@eaDir`.
    """
    if any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in name.split("/")):
        return "hidden"
    suffix = posixpath.splitext(name)[1].lower()
    return "" if suffix in IMG_EXTENSIONS else suffix or "without suffix"


def find_images(paths: Sequence[str | Path]) -> list[str]:
    """List the given files, and the images in and below the given directories in natural order.

    Hidden files and directories are skipped, see :func:`skip_reason`.

    Raises:
        DataError: a path does not exist, or a directory is unreadable or has no images.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: unreadable ({error.strerror}). Check its permissions.") from error

    images: list[str] = []
    for path in map(str, paths):
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise DataError(f"{path}: no such file or directory.")
            images.append(path)
            continue
        files = []
        for parent, directories, names in os.walk(path, onerror=refuse, followlinks=True):
            real = Path(os.path.realpath(parent))  # a link to a parent directory would loop
            directories[:] = [d for d in directories if not real.is_relative_to(os.path.realpath(f"{parent}/{d}"))]
            directories[:] = [d for d in directories if skip_reason(d) != "hidden"]
            files += [os.path.join(parent, name) for name in names if not skip_reason(name)]
        if not files:
            raise DataError(f"{path}: no images. Supported file names end in {', '.join(IMG_EXTENSIONS)}.")
        images += sorted(files, key=natural_key)
    return images


def open_rgb(path: str | Path, upright: bool = False) -> Image.Image:
    """Open an image file, see :func:`decode_rgb`; raises DataError if it cannot be decoded."""
    with wrap_decode_errors(path), open(path, "rb") as file:
        return decode_rgb(file, upright)


@contextmanager
def wrap_decode_errors(file: str | Path, advice: str = "Repair or remove the file.") -> Iterator[None]:
    """Convert exceptions of image decoders to a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders raise exceptions of many types
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files; the image may be valid
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        raise DataError(f"{file}: unreadable image ({reason[:200]}). {advice}") from error


def decode_rgb(file: BinaryIO, upright: bool = False) -> Image.Image:
    """Decode an image to RGB with 8 bits per channel.

    Args:
        file: opened at its start.
        upright: rotate according to EXIF data, as mmcv does. The reference does not in classification.
    """
    with Image.open(file, formats=FORMATS) as image:
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel, scaling 16 bits; raises ValueError for 32 bits per channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # Pillow clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel, range unknown; convert it to 8 or 16 bits")
    return image.convert("RGB")
