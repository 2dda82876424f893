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


def skip_reason(name: str) -> str:
    """Return why the file of a relative path is no image: "hidden" or its suffix; empty for images."""
    # systems and notebooks create hidden files and folders
    if any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in name.split("/")):
        return "hidden"
    suffix = posixpath.splitext(name)[1].lower()
    return "" if suffix in IMG_EXTENSIONS else suffix or "without suffix"


def walk_files(root: str | Path) -> list[str]:
    """List the files and folders below a directory, relative to it. Names of folders end in a slash."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: unreadable ({error.strerror}). Check its permissions.") from error

    names: list[str] = []
    above = {str(root): {os.path.realpath(root)}}  # folders on the way to a folder, to which a link would loop
    for parent, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        targets = {name: os.path.realpath(f"{parent}/{name}") for name in folders}
        loops = {name for name, path in targets.items() if any(Path(x).is_relative_to(path) for x in above[parent])}
        folders[:] = [name for name in folders if name not in loops]
        above |= {os.path.join(parent, name): above[parent] | {targets[name]} for name in folders}
        prefix = "" if parent == str(root) else f"{Path(os.path.relpath(parent, root)).as_posix()}/"
        names += [prefix + name for name in files] + [f"{prefix}{name}/" for name in folders]
    return names


def find_images(paths: Sequence[str | Path]) -> list[str]:
    """List the given files, and the images in and below the given directories in natural order.

    Raises:
        DataError: a path does not exist, or a directory is unreadable or has no images.
    """
    images: list[str] = []
    for path in map(str, paths):
        if os.path.isdir(path):
            names = [name for name in walk_files(path) if not name.endswith("/") and not skip_reason(name)]
            if not names:
                raise DataError(f"{path}: no images. Supported file names end in {', '.join(IMG_EXTENSIONS)}.")
            images += [os.path.join(path, name) for name in sorted(sorted(names), key=_natural_key)]
        elif os.path.exists(path):
            images.append(path)
        else:
            raise DataError(f"{path}: no such file or directory.")
    return images


def _natural_key(name: str) -> list[int | str]:
    """Sort numbers by value. timm's function fails on digits such as a superscript 2."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def open_rgb(path: str | Path, upright: bool = False) -> Image.Image:
    """Open an image file, see :func:`decode_rgb`; raises DataError if it cannot be decoded."""
    with wrap_decode_errors(path), open(path, "rb") as file:
        return decode_rgb(file, upright)


@contextmanager
def wrap_decode_errors(file: str | Path) -> Iterator[None]:
    """Convert exceptions of image decoders to a DataError that names the file."""
    try:
        yield
    except Exception as error:  # decoders raise exceptions of many types
        is_valid = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)  # too many open files
        if is_valid or isinstance(error, DataError):
            raise
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        raise DataError(f"{file}: unreadable image ({reason[:200]}). Repair or remove the file.") from error


def decode_rgb(file: BinaryIO, upright: bool = False) -> Image.Image:
    """Decode an image to RGB with 8 bits per channel.

    `upright` rotates it according to EXIF data, as mmcv does, except in WebP files. The reference does not in
    classification.
    """
    with Image.open(file, formats=FORMATS) as image:
        if upright and image.format != "WEBP":
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel, scaling 16 bits; raises ValueError for 32 bits per channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # Pillow clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel, range unknown; convert it to 8 or 16 bits")
    return image.convert("RGB")
