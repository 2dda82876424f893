"""Data sets of images and classes: folders, archives, and whatever timm knows by name."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_backbone.images import DataError, decode_rgb, find_images, natural_key, open_rgb, to_rgb, wrap_decode_errors
from lit_classification.augmentation import build_transform
from lit_classification.config import Config
from lit_classification.sampler import SampleKey, seed_everything

_logger = logging.getLogger(__name__)


class ImageFolder(Dataset):
    """The images below a folder and their classes, each named after the folder in it that its images lie below.

    Attributes:
        classes: their names in natural order, which is that of the labels.
        samples: (file, label) of each image, in natural order of the files.

    Raises:
        DataError: there are no class folders; one of them holds no image, or an image lies in none, which would shift
            the labels.
    """

    def __init__(self, root: str | Path):
        def top(file: str) -> str:
            return file[len(str(root)) + 1 :].split(os.sep)[0]

        files = find_images([root])
        entries = {entry.name: entry.path for entry in os.scandir(root) if os.path.isdir(entry.path)}
        if not entries:
            raise DataError(f"{root}: holds no class folders; expected {os.path.basename(root)}/CLASS/IMAGE")
        filled = {top(file): file for file in files}
        for name in sorted(entries.keys() ^ filled.keys(), key=natural_key):
            if name in filled:
                raise DataError(f"{filled[name]}: an image in no class folder; move or remove it")
            kinds = " ".join(IMG_EXTENSIONS)
            problem = f"a class folder without images ({kinds}) of its own"
            raise DataError(f"{entries[name]}: {problem}; fill it or remove it everywhere")
        self.classes = sorted(filled, key=natural_key)
        labels = {name: label for label, name in enumerate(self.classes)}
        self.samples = [(file, labels[top(file)]) for file in files]
        self.root = str(root)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.samples[index]
        return open_rgb(file), label


class Images(Dataset):
    """A data set of `timm.data.create_dataset` whose samples depend on nothing but their key.

    An int gives the image at that index; a :class:`SampleKey` also fixes its augmentation. Items are
    `(image (3, H, W) float32, class)`.

    Args:
        dataset: of `(PIL image, class)`.
        transform: of PIL images to tensors.
        classes: their names.
        seed: of the run.
        skip: whether the next readable image takes the place of an unreadable one that has a :class:`SampleKey`.

    Attributes:
        skipped: how often that happened, a number that the loader's processes share.
    """

    def __init__(self, dataset: Dataset, transform, classes: list[str], seed: int, skip: bool = False):
        self.dataset = dataset
        self.transform = transform
        self.classes = classes
        self.seed = seed
        self.skip = skip
        self.skipped = torch.multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int]:
        if not isinstance(key, SampleKey):
            image, target = self.read(key)
        else:
            remedy = "repair it, or set DATA.ON_BAD_IMAGE skip"  # without it, epochs might have fewer updates
            image, target = self.read_or_skip(key.index) if self.skip else self.read(key.index, remedy)
            seed_everything("augmentation", self.seed, key.epoch, key.position, devices=False)
        return self.transform(image), target

    def read_or_skip(self, index: int) -> tuple[Image.Image, int]:
        """The image at an index or, where it is unreadable, the next one that is not."""
        for offset in range(len(self)):
            try:
                return self.read((index + offset) % len(self))
            except DataError as error:
                with self.skipped.get_lock():
                    self.skipped.value += 1
                _logger.warning(f"skipped {error}")
        raise DataError(f"none of the {len(self)} images is readable")

    def read(self, index: int, remedy: str = "repair or remove the file") -> tuple[Image.Image, int]:
        """The decoded image, RGB, and its class."""
        with wrap_decode_errors(self.name(index), remedy):
            if isinstance(self.dataset, ImageDataset):  # its own __getitem__ would take the next image for a bad one
                file, target = self.dataset.reader[index]
                with file:
                    return decode_rgb(file), target
            image, target = self.dataset[index]
            return to_rgb(image), target

    def name(self, index: int) -> str:
        """The file an image comes from, as far as the data set knows."""
        if isinstance(self.dataset, ImageDataset):
            return self.dataset.filename(index, absolute=True)
        if isinstance(self.dataset, ImageFolder):
            return self.dataset.samples[index][0]
        return f"{type(self.dataset).__name__}[{index}]"

    def names(self) -> Iterator[str]:
        """All images' names, of files below the data set's root."""
        root = f"{self.dataset.root}/" if isinstance(self.dataset, ImageFolder) else ""
        return (self.name(i).removeprefix(root) for i in range(len(self)))


def _image_root(config: Config, split: str) -> Path:
    """The folder `DATA_PATH/split`, or the archive `DATA_PATH/split.tar`."""
    if not config.DATA.DATA_PATH:
        raise DataError("DATA.DATA_PATH is empty; give the data set's folder by --data-path")
    root = Path(config.DATA.DATA_PATH)
    for path in (root / split, root / f"{split}.tar"):
        if path.is_dir() or path.is_file():
            return path
    raise DataError(f"{root}: no folder that holds {split}/ or {split}.tar; give the data set's folder by --data-path")


def build_dataset(config: Config, is_training: bool) -> Images:
    """The training or validation images.

    Raises:
        DataError: the place is missing, empty, or its classes are not those of the head.
    """
    split = "train" if is_training else "val"
    name, where = config.DATA.DATASET, config.DATA.DATA_PATH
    if "/" not in name:  # timm's names of folders and archives
        where = _image_root(config, split)
    dataset = ImageFolder(where) if isinstance(where, Path) and where.is_dir() else _from_timm(name, where, split)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(f"DATA.DATASET {name!r}: streams its images; expected a data set with random access")
    classes = _class_names(dataset)
    if len(classes) != config.MODEL.NUM_CLASSES:
        remedy = f"to train on them, set MODEL.NUM_CLASSES {len(classes)}; to evaluate, use data of the head's classes"
        remedy = _missing_folders(where, split) or remedy
        raise DataError(f"{where}: holds {len(classes)} classes, the head has {config.MODEL.NUM_CLASSES}; {remedy}")
    skip = is_training and config.DATA.ON_BAD_IMAGE == "skip"
    return Images(dataset, build_transform(config, is_training), classes, config.SEED, skip)


def _missing_folders(where: str | Path, split: str) -> str:
    """What to do where the other split has class folders that this one lacks; empty where it has none."""
    other = Path(where).with_name("val" if split == "train" else "train")
    if not (Path(where).is_dir() and other.is_dir()):
        return ""
    own, others = ({entry.name for entry in os.scandir(place) if entry.is_dir()} for place in (where, other))
    missing = sorted(others - own, key=natural_key)
    return f"add {', '.join(missing[:5])} to it, as in {other}" if missing else ""


def _from_timm(name: str, where: str | Path, split: str) -> Dataset:
    """A data set that timm knows by name, or an archive, whose files are opened as all others are.

    timm leaves to chance which of two classes comes first that differ in case or leading zeros only.
    """
    archive = isinstance(where, Path)
    set_img_extensions(IMG_EXTENSIONS)  # in archives, as in folders
    try:
        options = {"cache_tarinfo": False} if archive else {}  # a pickle beside the data
        dataset = create_dataset("" if archive else name, root=str(where), split=split, **options)
    except Exception as error:  # each kind fails in its own way
        raise DataError(f"DATA.DATASET {name!r} in {where}: {error}") from error
    if archive:
        count = len(_class_names(dataset))
        if len({str(natural_key(name)[0]) for name in _class_names(dataset)}) < count:
            raise DataError(
                f"{where}: holds classes whose names differ in case or zeros only; unpack it, or rename them"
            )
        folders = {os.path.dirname(dataset.filename(i, absolute=True)) for i in range(len(dataset))}
        if len(folders) > count:
            problem = f"{len(folders)} folders of images have {count} different names, which would be the classes"
            raise DataError(f"{where}: {problem}; unpack it, to have those at its root, or rename the folders")
    if hasattr(dataset, "loader"):  # torchvision's
        dataset.loader = open_rgb
    return dataset


def _class_names(dataset: Dataset) -> list[str]:
    """Names of the classes, in the order of their labels."""
    if isinstance(dataset, ImageDataset):
        reader = dataset.reader
        class_to_idx = reader.class_name_to_idx if isinstance(reader, ReaderImageInTar) else reader.class_to_idx
        return sorted(class_to_idx, key=class_to_idx.get)
    names = getattr(dataset, "classes", None) or dataset.all_categories  # the latter: torchvision's INaturalist
    return [", ".join(name) if isinstance(name, tuple) else name for name in names]  # its ImageNet has synonyms


def check_same_classes(train: Images, val: Images) -> None:
    """Raise DataError unless labels mean the same in both sets."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes), key=natural_key)
        raise DataError(f"train/ and val/ hold different classes ({', '.join(odd[:5])}); give both the same folders")
