"""Datasets of images: class folders, tar archives of them, and lists of files."""

import io
import logging
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import IO, cast

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .images import IMG_EXTENSIONS, DataError, decode_rgb, open_rgb, skip_reason, walk_files

_logger = logging.getLogger(__name__)

PREDICT_BATCH = 32


class ClassFolders(Dataset):
    """Images in class folders, with the classes, labels and order of torchvision's ImageFolder.

    Class names that are integers sort as numbers instead (ImageNet-V2 has 0 to 999). Other files than images are
    skipped with a warning. `names` are those of files, and of folders with a slash at the end.

    Raises:
        DataError: a class has no images, or there are no classes.
    """

    def __init__(self, root: str | Path, names: Collection[str]):
        folders = {name.partition("/")[0] for name in names if "/" in name}
        folders = [name for name in folders if skip_reason(name) != "hidden"]
        are_integers = all(name.isdecimal() for name in folders)
        self.classes = sorted(folders, key=lambda name: (int(name), name) if are_integers else name)
        labels = {name: label for label, name in enumerate(self.classes)}
        files = [name for name in names if not name.endswith("/")]
        reasons = [skip_reason(name) or ("" if "/" in name else "in no class folder") for name in files]
        images = [(n.partition("/")[0], *posixpath.split(n)) for n, reason in zip(files, reasons) if not reason]
        self.samples = [(f"{folder}/{file}", labels[name]) for name, folder, file in sorted(images)]
        empty = sorted({*self.classes} - {name for name, _, _ in images})
        if empty or not self.classes:
            problem = f"no images in class folders {', '.join(empty[:5])}" if empty else "no class folders"
            raise DataError(f"{root}: {problem}. Expected CLASS/IMAGE ({' '.join(IMG_EXTENSIONS)}).")
        _logger.info(f"{root}: {len(self.samples)} images in {len(self.classes)} classes")
        if skipped := Counter(filter(None, reasons)):
            counts = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common(5))
            _logger.warning(f"{root}: skipped {sum(skipped.values())} files: {counts}")

    def __len__(self) -> int:
        return len(self.samples)


class ImageFolder(ClassFolders):
    """Images in a directory of class folders."""

    def __init__(self, root: str | Path):
        super().__init__(root, walk_files(root))
        self.samples = [(os.path.join(root, name), label) for name, label in self.samples]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_rgb(path), label


class ImageTar(ClassFolders):
    """Images in an uncompressed tar archive of class folders.

    The archive holds class folders, one folder around them, or one tar per class as ImageNet's does.

    Raises:
        DataError: the archive is damaged or truncated, has a file twice, or has a link.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        try:
            with open(path, "rb") as file:
                places = _index_tar(file, self.path)
        except tarfile.TarError as error:
            raise DataError(f"{path}: not a sound tar archive ({error}). Pack it again.") from error
        images = [name for name in places if not name.endswith("/") and not skip_reason(name)]
        roots = {name.partition("/")[0] for name in images}
        is_wrapped = roots == {Path(path).stem} or (len(roots) == 1 and all(name.count("/") > 1 for name in images))
        prefix = f"{roots.pop()}/" if is_wrapped else ""  # the folder around the classes
        super().__init__(path, [name.removeprefix(prefix) for name in places if name != prefix])
        self.samples = [(prefix + name, label) for name, label in self.samples]
        self._places = [places[name] for name, _ in self.samples]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        offset, size = self._places[index]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return decode_rgb(io.BytesIO(file.read(size))), self.samples[index][1]


def _index_tar(file: IO[bytes], path: str, start: int = 0) -> dict[str, tuple[int, int]]:
    """Return `(offset, size)` in bytes of each file in a tar archive, and of those in tar archives within it, by name.

    A file in `a.tar` is named `a/NAME`. Names of folders end in a slash.
    """
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = posixpath.normpath(member.name)
            if name in places and not member.isdir():
                raise DataError(f"{path}: {name}: is in the archive twice. Pack it again.")
            if member.isfile() and name.endswith(".tar") and skip_reason(name) != "hidden":
                inner = _index_tar(cast(IO[bytes], tar.extractfile(member)), path, start + member.offset_data)
                places |= {f"{name.removesuffix('.tar')}/{key}": place for key, place in inner.items()}
            elif member.isfile():
                places[name] = start + member.offset_data, member.size
            elif member.isdir() and name != ".":
                places[f"{name}/"] = (0, 0)
            elif member.islnk() or member.issym():
                fix = "Pack files instead, with tar --dereference --hard-dereference."
                raise DataError(f"{path}: {name}: is a link. {fix}")
        file.seek(tar.offset)  # for tarfile, a damaged header is the end
        is_end = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        if not is_end or any(chunk.strip(b"\0") for chunk in iter(partial(file.read, 2**20), b"")):
            raise tarfile.ReadError(f"damaged or truncated at byte {start + tar.offset}")
    return places


def image_loader(paths: list[str], transform: Callable[[Image.Image], Tensor]) -> DataLoader:
    """Build a loader of lists of `(path, image (3, H, W) float32)`. A DataError stands for an unreadable image."""
    workers = min(len(paths) // PREDICT_BATCH, 8, os.cpu_count() or 1)
    dataset, collate = cast(Dataset, paths), partial(_read_images, transform)
    return DataLoader(dataset, PREDICT_BATCH, num_workers=workers, collate_fn=collate)


def _read_images(transform: Callable[[Image.Image], Tensor], paths: list[str]) -> list[tuple[str, Tensor | DataError]]:
    results: list[tuple[str, Tensor | DataError]] = []
    for path in paths:
        try:
            results.append((path, transform(open_rgb(path))))
        except DataError as error:
            results.append((path, error))
    return results
