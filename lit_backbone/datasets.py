"""Datasets of images: class folders, tar archives of them, and lists of files."""

import io
import logging
import os
import posixpath
import tarfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import IO

import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .images import DataError, decode_rgb, open_rgb

_logger = logging.getLogger(__name__)

PREDICT_BATCH, MAX_PREDICT_WORKERS = 32, 8
MAX_LINKS = 40  # links that lead to each other, as in Linux


def is_hidden(name: str) -> bool:
    """Tell if a relative path belongs to a system or a notebook, such as `._0.jpg` or `.ipynb_checkpoints/0.jpg`."""
    return any(part.startswith(".") for part in name.split("/"))


def sort_classes(names: Collection[str]) -> list[str]:
    """Sort class names as torchvision does, except that integers sort as numbers (ImageNet-V2 has 0 to 999)."""
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def warn_of_hidden(root: str | Path, names: Collection[str]) -> None:
    """Log how many hidden files and folders a dataset skipped."""
    if names:
        _logger.warning(f"{root}: skipped {len(names)} hidden files and folders, such as {min(names)}")


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder with :func:`sort_classes`, without hidden files. Empty classes raise DataError."""

    def __init__(self, root: str | Path):
        self.hidden: list[str] = []
        try:
            super().__init__(root, loader=open_rgb, is_valid_file=self._is_image)
        except FileNotFoundError as error:
            raise DataError(f"{root}: {error} Expected CLASS/IMAGE ({' '.join(IMG_EXTENSIONS)}).") from error
        warn_of_hidden(root, self.hidden)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return class names and their labels."""
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
        self.hidden += filter(is_hidden, names)
        classes = sort_classes([name for name in names if not is_hidden(name)])
        if not classes:
            raise FileNotFoundError("No class folders found.")
        return classes, {name: label for label, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        if is_hidden(name := path.removeprefix(str(self.root)).replace(os.sep, "/").lstrip("/")):
            self.hidden.append(name)
            return False
        return name.lower().endswith(IMG_EXTENSIONS)


class ImageTar(Dataset):
    """Images in a tar archive, with the classes, labels and order of the folder that it packs.

    The archive holds class folders, one folder around them, or one tar per class as ImageNet's does. Raise DataError
    if it is damaged, see :func:`index_tar`, or empty.
    """

    def __init__(self, path: str | Path):
        self.path, places = str(path), index_tar(path)
        warn_of_hidden(path, list(filter(is_hidden, places)))
        names = [name for name in places if not is_hidden(name) and name.lower().endswith(IMG_EXTENSIONS)]
        roots = {name.partition("/")[0] for name in names}
        prefix = f"{roots.pop()}/" if len(roots) == 1 and all(name.count("/") > 1 for name in names) else ""
        labeled = {
            name: name.removeprefix(prefix).partition("/")[0] for name in names if name.count("/") > bool(prefix)
        }
        self.classes = sort_classes(set(labeled.values()))
        if not self.classes:
            raise DataError(f"{path}: has no images in class folders ({' '.join(IMG_EXTENSIONS)}).")
        labels = {name: label for label, name in enumerate(self.classes)}
        names = sorted(labeled, key=lambda name: (labeled[name], *posixpath.split(name)))
        self.samples = [(name, labels[labeled[name]]) for name in names]
        self._places = [places[name] for name in names]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        offset, size = self._places[index]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return decode_rgb(io.BytesIO(file.read(size))), self.samples[index][1]


def index_tar(path: str | Path) -> dict[str, tuple[int, int]]:
    """Index the files in an uncompressed tar archive, and those in tar archives within it.

    Links are followed within the archive.

    Returns:
        `(offset, size)` in bytes by name; a file in `a.tar` is named `a/NAME`.

    Raises:
        DataError: the archive is damaged or truncated, has a file twice, or has a link to something outside of it.
    """
    try:
        with open(path, "rb") as file:
            return _index_tar(file, str(path), start=0)
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a sound tar archive ({error}). Pack it again.") from error


def _index_tar(file: IO[bytes], path: str, start: int) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = posixpath.normpath(member.name)
            if name in places or name in links:
                raise DataError(f"{path}: {name}: is in the archive twice. Pack it again.")
            if member.isfile() and name.endswith(".tar") and not is_hidden(name):
                inner = _index_tar(tar.extractfile(member), path, start + member.offset_data)
                places |= {f"{name.removesuffix('.tar')}/{key}": place for key, place in inner.items()}
            elif member.isfile():
                places[name] = start + member.offset_data, member.size
            elif member.islnk() or member.issym():
                folder = posixpath.dirname(name) if member.issym() else ""
                links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
        file.seek(tar.offset)  # for tarfile, a damaged header is the end
        is_end = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        if not is_end or any(chunk.strip(b"\0") for chunk in iter(partial(file.read, 2**20), b"")):
            raise tarfile.ReadError(f"damaged or truncated at byte {start + tar.offset}")
    for name, target in links.items():
        for _ in range(MAX_LINKS):  # links to links
            target = links.get(target, target)
        if target not in places:
            raise DataError(f"{path}: {name}: links to {target}, no file of the archive. Use tar --dereference.")
        places[name] = places[target]
    return places


def image_loader(paths: list[str], transform: Callable[[Image.Image], Tensor]) -> DataLoader:
    """Build a loader of lists of `(path, image (3, H, W) float32)`. A DataError stands for an unreadable image."""
    workers = min(len(paths) // PREDICT_BATCH, MAX_PREDICT_WORKERS, os.cpu_count() or 1)
    return DataLoader(paths, PREDICT_BATCH, num_workers=workers, collate_fn=partial(_read_images, transform))


def _read_images(transform: Callable[[Image.Image], Tensor], paths: list[str]) -> list[tuple[str, Tensor | DataError]]:
    results: list[tuple[str, Tensor | DataError]] = []
    for path in paths:
        try:
            results.append((path, transform(open_rgb(path))))
        except DataError as error:
            results.append((path, error))
    return results
