"""Datasets, transforms and loaders."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lit_backbone.checkpoints import eval_data_config
from lit_backbone.datasets import ImageFolder, ImageTar
from lit_backbone.images import DataError, decode_rgb, open_rgb, to_rgb, wrap_decode_errors
from lit_classification.config import Config, ConfigError
from lit_classification.distributed import Ranks
from lit_classification.sampler import SampleKey, TrainSampler, seed_everything


class SeededImages(Dataset):
    """Transformed images of a dataset of `(PIL image, label)`, as `(image (3, H, W) uint8, label)`.

    An int key gives the image at that index. A :class:`SampleKey` also fixes the random numbers of its augmentation.
    """

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], Tensor], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        if isinstance(dataset, ImageDataset):
            names = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
        else:
            names = getattr(dataset, "classes", None) or dataset.all_categories  # the latter in INaturalist
        self.classes = [", ".join(name) if isinstance(name, tuple) else name for name in names]  # ImageNet's synonyms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int]:
        image, label = self.read(key.index if isinstance(key, SampleKey) else key)
        if isinstance(key, SampleKey):
            seed_everything("augmentation", self.seed, key.epoch, key.position, devices=False)
        return self.transform(image), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded RGB image at an index, and its label."""
        with wrap_decode_errors(self.name(index)):
            if isinstance(self.dataset, ImageDataset):  # whose __getitem__ replaces an unreadable image by the next one
                file, label = self.dataset.reader[index]
                with file:
                    return decode_rgb(file), label
            image, label = self.dataset[index]
            return to_rgb(image), label

    def name(self, index: int) -> str:
        """Return the file of an image, as far as the dataset knows it."""
        if isinstance(self.dataset, ImageDataset):
            with suppress(Exception):  # some datasets of Hugging Face have no paths
                return self.dataset.filename(index, absolute=True)
        if isinstance(self.dataset, (ImageFolder, ImageTar)):
            prefix = f"{self.dataset.path}: " if isinstance(self.dataset, ImageTar) else ""
            return prefix + self.dataset.samples[index][0]
        return f"{type(self.dataset).__name__}[{index}]"


def build_dataset(config: Config, is_training: bool) -> SeededImages:
    """Build the training or validation set: a folder, a tar archive, or a dataset that timm knows by name."""
    name, root = config.DATA.DATASET, config.DATA.DATA_PATH
    split = config.DATA.TRAIN_SPLIT if is_training else config.DATA.VAL_SPLIT
    if "/" in name:
        try:
            dataset = create_dataset(name, root=root, split=split)
        except Exception as error:  # each dataset fails in its own way
            raise DataError(f"DATA.DATASET {name!r} in {root!r}: {error}") from error
        if type(dataset) is torchvision.datasets.ImageFolder:  # timm falls back to the root for both splits
            raise DataError(f"DATA.DATASET {name!r}: image folders need no name. Leave it empty.")
        is_test_set = is_training and not getattr(dataset, "train", True)  # timm's answer to unknown splits
        if is_test_set or (name.startswith("torch/") and "[" in split):
            raise DataError(f"DATA.DATASET {name!r}: has no split {split!r}. Use train, training or val.")
        if hasattr(dataset, "loader"):
            dataset.loader = open_rgb
        if hasattr(dataset, "all_categories"):  # INaturalist
            dataset.index.sort()  # listed in the order of the file system, which may differ between nodes
    elif root and (place := Path(root, split)).is_dir():
        dataset = ImageFolder(place)
    elif root and (place := Path(root, f"{split}.tar")).is_file():
        dataset = ImageTar(place)
    else:
        raise DataError(f"DATA.DATA_PATH {root!r}: has neither {split}/ nor {split}.tar. Name it with --data-path.")
    return SeededImages(dataset, build_transform(config, is_training), config.SEED)


def sample_images(images: SeededImages) -> Tensor:
    """Return at most 32 evenly spaced images, `(n, 3, H, W)` uint8."""
    return torch.stack([images[i][0] for i in range(0, len(images), len(images) // 32 + 1)])


def check_classes(config: Config, *datasets: SeededImages) -> None:
    """Raise DataError unless all datasets have the same classes, as many as the head has outputs."""
    classes, place = datasets[0].classes, config.DATA.DATA_PATH or config.DATA.DATASET
    for other in (dataset.classes for dataset in datasets[1:] if dataset.classes != classes):
        names = ", ".join(sorted(set(classes) ^ set(other))[:5]) or "in another order"
        raise DataError(f"{place}: train and val have different classes ({names}). Give both the same class folders.")
    if len(classes) < 2:
        raise DataError(f"{place}: has one class, for which any model is right and no loss is left. Add another class.")
    if len(classes) != (outputs := config.MODEL.NUM_CLASSES):
        fix = f"To train on them, set MODEL.NUM_CLASSES {len(classes)}."
        raise DataError(f"{place}: has {len(classes)} classes, but the head has {outputs} outputs. {fix}")


def build_transform(config: Config, is_training: bool) -> Any:
    """Build timm's transform from PIL images to `(3, H, W)` uint8 tensors.

    The training loop normalizes and erases them on its device, see :func:`lit_classification.engine.to_device`.
    """
    if not is_training:
        return create_transform(**eval_preprocessing(config), use_prefetcher=True)
    aug, size, interpolation = config.AUG, (3, *config.DATA.IMG_SIZE), config.DATA.INTERPOLATION
    colors: dict[str, Any] = dict(color_jitter=aug.COLOR_JITTER or None, auto_augment=aug.AUTO_AUGMENT or None)
    geometry = dict(scale=aug.SCALE, ratio=aug.RATIO, hflip=aug.HFLIP, interpolation=interpolation)
    return create_transform(size, is_training=True, use_prefetcher=True, **geometry, **colors)


def eval_preprocessing(config: Config) -> dict[str, Any]:
    """Describe the evaluation transform in timm's terms."""
    return eval_data_config(config.DATA.IMG_SIZE, config.DATA.INTERPOLATION, config.TEST.CROP)


def build_train_loader(images: SeededImages, config: Config, ranks: Ranks) -> DataLoader:
    """Build the loader of this rank's micro-batches, `(images (b, 3, H, W) uint8, labels (b,))`.

    :class:`TrainSampler` defines their order. Raise ConfigError if batch size and ranks do not divide the global batch,
    DataError if the dataset is smaller.
    """
    batch_size, total, step = config.DATA.BATCH_SIZE, config.TRAIN.GLOBAL_BATCH, 2 if config.AUG.mixing else 1
    if total % (batch_size * ranks.world_size):
        share, rest = divmod(total, ranks.world_size)
        sizes = [n for n in range(step, min(batch_size, share) + 1, step) if share % n == 0 and not rest]
        problem = f"{batch_size} images on each of {ranks.world_size} ranks do not divide TRAIN.GLOBAL_BATCH {total}"
        fix = f"use --batch-size {sizes[-1]}" if sizes else "use another number of ranks"
        raise ConfigError(f"DATA.BATCH_SIZE: {problem}; {fix}")
    if len(images) < total:
        raise DataError(f"TRAIN.GLOBAL_BATCH: {total} is more than the {len(images)} training images. Lower it.")
    options = config.AUG.REPEATED, config.SEED, ranks.rank, ranks.world_size
    sampler = TrainSampler(len(images), total, batch_size, *options)
    return DataLoader(images, batch_sampler=sampler, **_loader_options(config, ranks))


def build_val_loader(images: SeededImages, config: Config, ranks: Ranks) -> DataLoader:
    """Build the loader of this rank's share of the images; over all ranks each image comes exactly once."""
    share = Subset(images, range(ranks.rank, len(images), ranks.world_size))
    return DataLoader(share, config.DATA.BATCH_SIZE, **_loader_options(config, ranks))


def _loader_options(config: Config, ranks: Ranks) -> dict[str, Any]:
    workers, pin_memory = config.DATA.NUM_WORKERS, config.DATA.PIN_MEMORY and ranks.device.type == "cuda"
    options = dict(num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_leave_process_group)
    return options | dict(pin_memory=pin_memory, timeout=60 * config.RUNTIME.TIMEOUT if workers else 0)


def _leave_process_group(worker_id: int) -> None:
    """Keep Ctrl-C from killing workers, so that the training process can save."""
    os.setsid()
