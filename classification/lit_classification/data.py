"""Images: read, augmented and distributed as a pure function of configuration, seed and position in the run."""

import logging
import multiprocessing
import os
import random
import resource
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, Mixup, create_dataset, create_transform, get_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from lit_backbone.images import (
    DataError,
    decode_rgb,
    images_below,
    is_shortage,
    naming,
    natural_key,
    open_rgb,
    to_rgb,
)
from lit_backbone.text import printable
from lit_classification.config import Config
from lit_classification.distributed import Processes, end_with_parent

_logger = logging.getLogger(__name__)

LOADER_FAILURES = {  # what PyTorch says, what it means
    "DataLoader worker (pid": "a data loader's process was killed, often for want of memory: lower DATA.NUM_WORKERS",
    "DataLoader timed out": "no data came for RUNTIME.TIMEOUT minutes: see to the disk or network that "
    "DATA.DATA_PATH is on, or raise the limit",
    "Too many open files": "raise the number of files that a process may open, ulimit -n, or lower DATA.NUM_WORKERS",
}


def loader_failure(error: Exception) -> str:
    """What to do about an error of PyTorch's data loading, on one line; empty if the error is none of these."""
    meanings = [meaning for words, meaning in LOADER_FAILURES.items() if words in str(error)]
    if not meanings:
        return ""
    end_loaders()
    return f"{meanings[0]} ({printable(str(error).strip().splitlines()[-1])})"


def end_loaders() -> None:
    """End the loaders' processes, of which a stopped or waiting one would keep this process from ending."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which PyTorch would raise an error
    for worker in torch.multiprocessing.active_children():
        worker.kill()


class ImageFolder(Dataset):
    """The images below a folder and their classes, each named after the folder that its images lie in.

    Attributes:
        classes: their names in natural order, which is that of the labels.
        samples: (file, label) of each image, in natural order of the files.

    Raises:
        DataError: there are no class folders; one of them holds no image, or an image lies in none, which would shift
            the labels.
    """

    def __init__(self, root: str | Path):
        files = images_below(root)
        entries = {entry.name: entry.path for entry in os.scandir(root) if os.path.isdir(entry.path)}
        if not entries:
            raise DataError(f"{root}: holds no class folders; expected {os.path.basename(root)}/CLASS/IMAGE")
        filled = {file[len(str(root)) + 1 :].split(os.sep)[0]: file for file in files}
        for name in sorted(entries.keys() ^ filled.keys(), key=natural_key):
            if name in filled:
                raise DataError(f"{filled[name]}: an image in no class folder; move or remove it")
            kinds = " ".join(get_img_extensions())
            problem = f"a class folder without images ({kinds}) of its own"
            raise DataError(f"{entries[name]}: {problem}; fill it or remove it everywhere")
        names = [os.path.basename(os.path.dirname(file)) for file in files]
        self.classes = sorted(set(names), key=natural_key)
        labels = {name: label for label, name in enumerate(self.classes)}
        self.samples = [(file, labels[name]) for file, name in zip(files, names)]
        self.root = str(root)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.samples[index]
        return open_rgb(file), label


def derive_seed(purpose: str, *key: int) -> int:
    """A 32-bit seed that follows from what it is for and from the numbers in `key`, unrelated for any other call."""
    entropy = (zlib.crc32(purpose.encode()), len(key), *key)  # SeedSequence itself takes (1,) and (1, 0) for the same
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_everything(purpose: str, *key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, see :func:`derive_seed`."""
    seed = derive_seed(purpose, *key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SampleKey(NamedTuple):
    """One sample of training: its epoch, its position in the epoch's order, and the image that stands there."""

    epoch: int
    position: int
    index: int


class TrainSampler(Sampler[list[SampleKey]]):
    """Batches of one process, in an order that follows from (seed, epoch) alone.

    An epoch is `len(images) // global_batch` updates. The global batch of each is dealt out to `global_batch //
    batch_size` micro-batches, which the processes take in turn, so that neither order nor the composition of
    micro-batches depends on the number of processes. timm's RepeatAugSampler has neither property, ignores the seed and
    cannot start within an epoch; with `repeats` the copies of an image go to different micro-batches as they do there.

    Args:
        num_images: size of the data set.
        global_batch: images of an update, over all processes.
        batch_size: images of a micro-batch; divides `global_batch`.
        repeats: how often an image stands in the order, each time augmented differently; an epoch keeps its length.
        seed, rank, world_size: of the run and of this process.
    """

    def __init__(
        self,
        num_images: int,
        global_batch: int,
        batch_size: int,
        *,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_images = num_images
        self.global_batch = global_batch
        self.groups = global_batch // batch_size  # micro-batches of an update, over all processes
        self.updates = num_images // global_batch
        self.repeats = repeats
        self.seed = seed
        self.own_groups = range(rank, self.groups, world_size)
        self.epoch = self.first_update = 0

    def start(self, epoch: int, update: int = 0) -> None:
        """Begin the next pass at an update within an epoch."""
        self.epoch, self.first_update = epoch, update

    def order(self) -> Tensor:
        """`(updates * global_batch,)`: index of the image at each position of the epoch."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.updates * self.global_batch]

    def micro_batches(self, order: Tensor, update: int) -> list[list[SampleKey]]:
        """This process's micro-batches of one update."""
        end = (update + 1) * self.global_batch
        own = [range(end - self.global_batch + group, end, self.groups) for group in self.own_groups]
        return [[SampleKey(self.epoch, p, i) for p, i in zip(ps, order[list(ps)].tolist(), strict=True)] for ps in own]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self.order()
        for update in range(self.first_update, self.updates):
            yield from self.micro_batches(order, update)

    def __len__(self) -> int:
        return (self.updates - self.first_update) * len(self.own_groups)


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
            image, target = self.read_or_skip(key.index) if self.skip else self.read(key.index)
            seed_everything("augmentation", self.seed, key.epoch, key.position)
        return self.transform(image), target

    def read_or_skip(self, index: int) -> tuple[Image.Image, int]:
        """The image at an index or, where it is unreadable, the next one that is not."""
        for offset in range(len(self)):
            try:
                return self.read((index + offset) % len(self))
            except DataError as error:
                if is_shortage(error.__cause__):
                    raise  # the image may be sound
                with self.skipped.get_lock():
                    self.skipped.value += 1
                _logger.warning(f"skipped {error}")
        raise DataError(f"none of the {len(self)} images is readable")

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image, RGB, and its class."""
        with naming(self.name(index)):
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


def build_transform(config: Config, is_training: bool):
    """timm's transform of PIL images to normalised `(3, H, W)` tensors."""
    data, aug = config.DATA, config.AUG
    if is_training:
        return create_transform(
            data.IMG_SIZE,
            is_training=True,
            scale=aug.SCALE,
            ratio=aug.RATIO,
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=aug.AUTO_AUGMENT or None,
            interpolation=data.INTERPOLATION,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
        )
    return create_transform(**evaluation_input(config))


def evaluation_input(config: Config) -> dict[str, Any]:
    """How evaluation prepares an image, in timm's terms."""
    interpolation = "bilinear" if config.DATA.INTERPOLATION == "random" else config.DATA.INTERPOLATION
    crop = dict(crop_pct=224 / 256) if config.TEST.CROP else dict(crop_pct=1.0, crop_mode="squash")
    return dict(input_size=(3, *config.DATA.IMG_SIZE), interpolation=interpolation, **crop)


def _image_root(config: Config, split: str) -> Path:
    """The folder `DATA_PATH/split`, or the archive `DATA_PATH/split.tar`."""
    if not config.DATA.DATA_PATH:
        raise DataError("DATA.DATA_PATH is empty; give the data set's folder by --data-path")
    root = Path(config.DATA.DATA_PATH)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the data set's folder by --data-path")
    for path in (root / split, root / f"{split}.tar"):
        if path.is_dir() or path.is_file():
            return path
    raise DataError(f"{root}: holds neither {split}/ nor {split}.tar; expected an image folder as ImageNet's")


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
        raise DataError(
            f"{where}: holds {len(classes)} classes, the head has {config.MODEL.NUM_CLASSES}; "
            f"to train on them, set MODEL.NUM_CLASSES {len(classes)}"
        )
    skip = is_training and config.DATA.ON_BAD_IMAGE == "skip"
    return Images(dataset, build_transform(config, is_training), classes, config.SEED, skip)


def _from_timm(name: str, where: str | Path, split: str) -> Dataset:
    """A data set that timm knows by name, or an archive, whose files are opened as all others are.

    timm leaves to chance which of two classes comes first that differ in case or leading zeros only.
    """
    archive = isinstance(where, Path)
    try:
        options = {"cache_tarinfo": False} if archive else {}  # a pickle beside the data
        dataset = create_dataset("" if archive else name, root=str(where), split=split, **options)
    except Exception as error:  # each kind fails in its own way
        raise DataError(f"DATA.DATASET {name!r} in {where}: {error}") from error
    if archive and len({str(natural_key(name)[0]) for name in _class_names(dataset)}) < len(_class_names(dataset)):
        raise DataError(f"{where}: holds classes whose names differ in case or zeros only; unpack it, or rename them")
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


def build_train_loader(config: Config, processes: Processes) -> DataLoader:
    """Loader of this process's training batches, `(images (b, 3, H, W), classes (b,))`.

    Its `batch_sampler`, a :class:`TrainSampler`, can start at any update.

    Raises:
        DataError: the data set is unusable, or smaller than one global batch.
    """
    images = build_dataset(config, is_training=True)
    if len(images) < config.TRAIN.GLOBAL_BATCH:
        raise DataError(
            f"{config.DATA.DATA_PATH}: its {len(images)} training images do not fill TRAIN.GLOBAL_BATCH "
            f"{config.TRAIN.GLOBAL_BATCH}; lower it"
        )
    sampler = TrainSampler(
        len(images),
        config.TRAIN.GLOBAL_BATCH,
        config.DATA.BATCH_SIZE,
        repeats=config.AUG.REPEATED,
        seed=config.SEED,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    return DataLoader(images, batch_sampler=sampler, **_loader_options(config, processes))


def build_val_loader(config: Config, processes: Processes) -> DataLoader:
    """Loader of this process's share of the validation images; over all processes each image comes exactly once."""
    images = build_dataset(config, is_training=False)
    own = Subset(images, range(processes.rank, len(images), processes.world_size))
    return DataLoader(own, batch_size=config.DATA.BATCH_SIZE, **_loader_options(config, processes))


def sample_images(loader: DataLoader, count: int = 32) -> Tensor:
    """`(count, 3, H, W)`: images spread evenly over a loader's data set, whose classes follow each other."""
    step = max(len(loader.dataset) // count, 1)
    return torch.stack([loader.dataset[i][0] for i in range(0, len(loader.dataset), step)][:count])


def _loader_options(config: Config, processes: Processes) -> dict:
    pin_memory = config.DATA.PIN_MEMORY and processes.device.type == "cuda"
    workers = config.DATA.NUM_WORKERS
    if workers:
        _allow_files(64 + 16 * workers, workers)
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory)
    timeout = 60 * config.RUNTIME.TIMEOUT if workers else 0
    return options | dict(worker_init_fn=leave_process_group, timeout=timeout)


def _allow_files(count: int, workers: int) -> None:
    """Make room for the pipes and shared tensors of loaders; short of it, PyTorch's may wait for ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < count:  # -1: there is no limit
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
        except (OSError, ValueError) as error:
            problem = f"DATA.NUM_WORKERS {workers}: needs {count} open files, of which this process may have {hard}"
            raise DataError(f"{problem}; raise the limit (ulimit -n {count}), or lower the number") from error


def leave_process_group(worker: int) -> None:
    """Ctrl-C and torchrun signal the whole group; a loader's process that died of it would keep the run from saving.

    It must not outlive the run, either, however that ends.
    """
    end_with_parent(signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended before, which PyTorch would not notice
        os._exit(1)
    os.setsid()


def check_same_classes(train: Images, val: Images) -> None:
    """Raise DataError unless labels mean the same in both sets."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes), key=natural_key)
        raise DataError(f"train/ and val/ hold different classes ({', '.join(odd[:5])}); give both the same folders")


def build_mixup(config: Config) -> Mixup | None:
    """timm's Mixup, which also smooths the labels; None where mixup and cutmix are off."""
    aug = config.AUG
    if not aug.mixing:
        return None
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )
