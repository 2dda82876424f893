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

import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .images import IMG_EXTENSIONS, DataError, decode_rgb, open_rgb, skip_reason

_logger = logging.getLogger(__name__)

PREDICT_BATCH, MAX_PREDICT_WORKERS = 32, 8
MAX_LINKS = 40  # links that lead to each other, as in Linux


def sort_classes(names: Collection[str]) -> list[str]:
    """Sort class names as torchvision does, except that integers sort as numbers (ImageNet-V2 has 0 to 999)."""
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def log_contents(root: str | Path, classes: list[str], labels: Collection[int], skipped: Counter[str]) -> None:
    """Log the number of images, of classes and of skipped files.

    Raises:
        DataError: a class has no images, or there are no classes.
    """
    counts = Counter(labels)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty or not classes:
        problem = f"no images in class folders {', '.join(empty[:5])}" if empty else "no class folders"
        raise DataError(f"{root}: {problem}. Expected CLASS/IMAGE ({' '.join(IMG_EXTENSIONS)}).")
    (most, maximum), (fewest, minimum) = counts.most_common()[0], counts.most_common()[-1]
    spread = f"{minimum} ({classes[fewest]}) to {maximum} ({classes[most]})"
    _logger.info(f"{root}: {len(labels)} images in {len(classes)} classes of {spread} images")
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common(5))
        _logger.warning(f"{root}: skipped {sum(skipped.values())} files and folders: {reasons}")


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder with :func:`sort_classes`; it logs what it skips. Empty classes raise DataError."""

    def __init__(self, root: str | Path):
        self.skipped: Counter[str] = Counter()
        super().__init__(root, loader=open_rgb, is_valid_file=self._is_image, allow_empty=True)
        log_contents(root, self.classes, self.targets, self.skipped)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return class names and their labels."""
        entries = list(os.scandir(directory))
        self.skipped += Counter("hidden" for entry in entries if skip_reason(entry.name) == "hidden")
        self.skipped += Counter(
            "in no class folder" for entry in entries if entry.is_file() and not skip_reason(entry.name)
        )
        classes = sort_classes([e.name for e in entries if e.is_dir() and skip_reason(e.name) != "hidden"])
        if not classes:
            raise DataError(f"{directory}: no class folders. Expected CLASS/IMAGE ({' '.join(IMG_EXTENSIONS)}).")
        return classes, {name: label for label, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        name = path.removeprefix(str(self.root)).replace(os.sep, "/").lstrip("/")
        if reason := skip_reason(name):
            self.skipped[reason] += 1
        return not reason


class ImageTar(Dataset):
    """Images in a tar archive, with the classes, labels and order of the folder that it packs.

    The archive holds class folders, one folder around them, or one tar per class as ImageNet's does.

    Raises:
        DataError: the archive is damaged, see :func:`index_tar`, or a class has no images.
    """

    def __init__(self, path: str | Path):
        self.path, places = str(path), index_tar(path)
        files = [name for name in places if not name.endswith("/")]
        images = [name for name in files if not skip_reason(name)]
        roots = {name.partition("/")[0] for name in images}
        is_wrapped = roots == {Path(path).stem} or (len(roots) == 1 and all(name.count("/") > 1 for name in images))
        prefix = f"{roots.pop()}/" if is_wrapped else ""  # the folder around the classes
        folders = {n.removeprefix(prefix).partition("/")[0] for n in places if "/" in n.removeprefix(prefix)}
        self.classes = sort_classes({name for name in folders if skip_reason(name) != "hidden"})
        labels = {name: label for label, name in enumerate(self.classes)}
        class_of = {n: n.removeprefix(prefix).partition("/")[0] for n in images if "/" in n.removeprefix(prefix)}
        names = sorted(class_of, key=lambda name: (class_of[name], *posixpath.split(name)))
        self.samples = [(name, labels[class_of[name]]) for name in names]
        self._places = [places[name] for name in names]
        skipped = Counter(filter(None, map(skip_reason, files)))
        skipped += Counter("in no class folder" for name in images if name not in class_of)
        log_contents(path, self.classes, [label for _, label in self.samples], skipped)

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
        `(offset, size)` in bytes by name. A file in `a.tar` is named `a/NAME`. Names of folders end in a slash.

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
            if (name in places or name in links) and not member.isdir():
                raise DataError(f"{path}: {name}: is in the archive twice. Pack it again.")
            if member.isfile() and name.endswith(".tar") and skip_reason(name) != "hidden":
                inner = _index_tar(cast(IO[bytes], tar.extractfile(member)), path, start + member.offset_data)
                places |= {f"{name.removesuffix('.tar')}/{key}": place for key, place in inner.items()}
            elif member.isfile():
                places[name] = start + member.offset_data, member.size
            elif member.isdir() and name != ".":
                places[f"{name}/"] = (0, 0)
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
