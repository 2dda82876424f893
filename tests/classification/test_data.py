"""Sampler, loaders, transforms and datasets: batches are a function of config, seed and position alone."""

import gzip
import lzma
import math
import os
import re
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import create_transform

from lit_backbone.datasets import ImageFolder, ImageTar
from lit_backbone.images import DataError
from lit_classification.config import Config, ConfigError
from lit_classification.config_reader import load_config
from lit_classification.data import build_dataset, build_train_loader, build_val_loader, check_classes
from lit_classification.distributed import Ranks
from lit_classification.engine import build_erasing, to_device
from lit_classification.sampler import SampleKey, TrainSampler, seed_everything
from tests.classification.conftest import CLASSES
from tests.images import EPS

CPU = torch.device("cpu")
ONE_RANK = Ranks(0, 1, CPU)
LIT_S = Path(__file__).parents[2] / "classification" / "configs" / "lit-s.yaml"


def steps_of_epoch(num_images: int, world_size: int, batch_size: int, **options) -> list[set[SampleKey]]:
    """Return the samples of each step, over all ranks, of an epoch with a global batch of 24."""
    steps: list[set] = [set() for _ in range(num_images // 24)]
    for rank in range(world_size):
        batches = list(TrainSampler(num_images, 24, batch_size, rank=rank, world_size=world_size, **options))
        for i, batch in enumerate(batches):
            steps[i * len(steps) // len(batches)].update(batch)
    return steps


class TestTrainSampler:
    def test_epoch_is_a_permutation_without_the_remainder(self):
        steps = steps_of_epoch(100, world_size=1, batch_size=24)
        images = [key.index for step in steps for key in step]
        assert len(steps) == 100 // 24 and len(images) == len(set(images)) == 96

    @pytest.mark.parametrize("world_size, batch_size", [(1, 8), (2, 4), (3, 8), (4, 2), (6, 4)])
    @pytest.mark.parametrize("repeats", [1, 3])
    def test_steps_do_not_depend_on_the_number_of_ranks(self, world_size, batch_size, repeats):
        expected = steps_of_epoch(100, world_size=1, batch_size=24, repeats=repeats)
        assert steps_of_epoch(100, world_size, batch_size, repeats=repeats) == expected
        ranks = [list(TrainSampler(100, 24, 4, rank=rank, world_size=2, repeats=repeats)) for rank in range(2)]
        micro_batches = [batch for pair in zip(*ranks, strict=True) for batch in pair]
        assert micro_batches == list(TrainSampler(100, 24, 4, repeats=repeats))

    def test_repeated_augmentation_keeps_the_length_and_spreads_copies(self):
        batches = list(TrainSampler(96, 24, 8, repeats=3))
        images = Counter(key.index for batch in batches for key in batch)
        assert set(images.values()) == {3} and len(images) == 96 // 3
        assert all(len({key.index for key in batch}) == 8 for batch in batches)  # no two copies in a micro-batch
        assert len({key.position for batch in batches for key in batch}) == 96  # each copy is augmented differently


# Loaders


def accumulation_steps(world_size: int, *opts: str) -> int:
    config = load_config(LIT_S, ["DATA.NUM_WORKERS", "0", *opts])
    loaders = [build_train_loader(range(2048), config, Ranks(rank, world_size, CPU)) for rank in range(world_size)]
    (steps,) = {len(loader.batch_sampler.local_groups) for loader in loaders}
    return steps


def test_accumulation_follows_from_the_global_batch():
    assert [accumulation_steps(world_size) for world_size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="33 is odd"):  # mixup and cutmix pair images
        accumulation_steps(2, "DATA.BATCH_SIZE", "33", "TRAIN.GLOBAL_BATCH", "66")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_reads_every_image_once(tiny_cfg, world_size):
    config, indices, labels = load_config(tiny_cfg()), [], []
    images = build_dataset(config, is_training=False)
    for rank in range(world_size):
        loader = build_val_loader(images, config, Ranks(rank, world_size, CPU))
        indices += list(loader.dataset.indices)
        labels += [label for _, targets in loader for label in targets.tolist()]
    assert sorted(indices) == list(range(12)) and Counter(labels) == {0: 4, 1: 4, 2: 4}


def two_epochs(config: Config) -> list[torch.Tensor]:
    loader = build_train_loader(build_dataset(config, is_training=True), config, ONE_RANK)
    return [images for epoch in range(2) for images, _ in (loader.batch_sampler.set_epoch(epoch), loader)[1]]


def test_samples_do_not_depend_on_workers_or_global_state(tiny_cfg):
    cfg = tiny_cfg(AUG={"REPEATED": 3})
    seed_everything("test", 1)
    expected = two_epochs(load_config(cfg))
    seed_everything("test", 2)
    for workers in ("1", "3"):
        torch.testing.assert_close(
            two_epochs(load_config(cfg, ["DATA.NUM_WORKERS", workers])), expected, rtol=0, atol=0
        )
    other_seed = two_epochs(load_config(cfg, ["SEED", "1"]))
    assert not any(torch.equal(a, b) for a, b in zip(expected, other_seed, strict=True))
    assert not torch.equal(expected[0], expected[len(expected) // 2])  # the next epoch


# Transforms


def test_transforms_are_those_of_the_paper(tiny_cfg):
    """Compare with timm's training transform, and with torchvision's resize to 256 and crop to 224.

    The workers return uint8; the training process normalizes, then erases and mixes.
    """
    config = load_config(tiny_cfg(DATA={"IMG_SIZE": 224}))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (300, 400, 3), dtype=np.uint8))
    options = dict(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic")
    ranks, targets = Ranks(0, 1, torch.device("cpu")), torch.zeros(1)
    expected = create_transform(224, is_training=True, re_prob=0, **options)
    actual = build_dataset(config, is_training=True).transform
    for seed in range(20):
        outputs = [(seed_everything("test", seed), transform(image))[1] for transform in (actual, expected)]
        assert outputs[0].dtype == torch.uint8
        assert torch.equal(to_device((outputs[0][None], targets), config, ranks)[0][0], outputs[1])

    erase, x = build_erasing(config, ranks), torch.zeros(2000, 3, 32, 32)
    erased = erase(x).abs().sum(dim=1) > 0  # (2000, 32, 32)
    shares = erased.flatten(1).float().mean(dim=1)
    noise = x[erased[:, None].expand_as(x)]
    assert 0.21 < (shares > 0).float().mean() < 0.29 and noise.std() == pytest.approx(1, abs=0.05)
    assert 0.02 - 0.01 < shares[shares > 0].min() and shares.max() < 1 / 3 + 0.02

    resized = torchvision.transforms.functional.resize(image, 256, torchvision.transforms.InterpolationMode.BICUBIC)
    cropped = torchvision.transforms.functional.center_crop(resized, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(np.array(cropped)).float() / 255 - mean) / std
    actual = build_dataset(config, is_training=False).transform(image)[None]
    actual = to_device((actual, targets), config, ranks)[0][0]
    torch.testing.assert_close(actual, expected.permute(2, 0, 1), rtol=0, atol=1e-6)


def test_training_transform_augments_every_image(tiny_cfg):
    """Draw often: Pillow 13 fails once in some hundred draws, on RandAugment's strongest posterize."""
    transform = build_dataset(load_config(tiny_cfg()), is_training=True).transform
    image = Image.effect_noise((40, 40), 100).convert("RGB")
    for seed in range(500):
        seed_everything("test", seed)
        assert transform(image).shape == (3, 32, 32)


# Folders and archives


def write_tree(root: Path, *names: str) -> Path:
    """Write a different image at each name, or an empty file if no image has the name's suffix."""
    random = np.random.RandomState(0)
    for path in (root / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.randint(0, 256, (4, 5, 3), dtype=np.uint8))
        image.save(path) if path.suffix not in ("", ".txt") else path.touch()
    return root


TREES = {
    "flat": "b/0.png b/10.png b/9.png a/1.png B/1.png ä/ü.png",
    "kinds": "a/0.JPG a/1.webp b/2.bmp b/3.TIFF b/4.jpeg b/notes.txt",
    "nested": "ant/z.png ant/a-b/0.png ant/a/1.png ant/a/b/2.png bee/x/0.png",
    "long names": f"{'a' * 90}/{'b' * 120}.png b/0.png",
    "integers": " ".join(f"{i}/{j}.png" for i in (0, 1, "01", 2, 10, 100, 21) for j in (9, 10)),
    "integers and text": "10/0.png 9/0.png x/0.png",
    "hidden": "a/0.png a/._0.png a/.DS_Store b/1.png b/.x/2.png .ipynb_checkpoints/0.png a/@eaDir/0.jpg",
    "outside of classes": "0.png a/1.png b/2.png notes.txt",
    "links": "ant/0.png bee/1.png cat/x/2.png",
}


@pytest.fixture(params=TREES)
def tree(request, tmp_path) -> Path:
    root = write_tree(tmp_path / request.param, *TREES[request.param].split())
    if request.param == "links":
        (root / "bee" / "0.png").symlink_to("../ant/0.png")
        (root / "cat" / "0.png").symlink_to("../bee/0.png")  # a link to a link
        (root / "cat" / "x" / "3.png").hardlink_to(root / "bee" / "1.png")
    return root


def pack(tree: Path, archive: Path, arcname: str = ".") -> Path:
    with tarfile.open(archive, "w") as tar:
        tar.add(tree, arcname)
    return archive


def test_folder_is_read_as_by_torchvision(tree):
    """Compare all but hidden files. Integers sort as numbers."""
    actual, expected = ImageFolder(tree), torchvision.datasets.ImageFolder(tree)
    classes = [name for name in expected.classes if not name.startswith(".")]
    assert actual.classes == (["0", "01", "1", "2", "10", "21", "100"] if tree.name == "integers" else classes)
    is_hidden = re.compile("/[.@]").search
    files = [[(path, d.classes[i]) for path, i in d.samples if not is_hidden(path)] for d in (actual, expected)]
    assert files[0] == files[1] and len(files[0]) == len(actual)


def write_ilsvrc(tree: Path, path: Path) -> Path:
    """Pack one tar per class into a tar, as ImageNet's training images come."""
    with tarfile.open(path, "w") as outer:
        for folder in tree.iterdir():
            pack(folder, inner := path.with_name(f"{folder.name}.tar"))
            outer.add(inner, inner.name)
    return path


@pytest.mark.parametrize("layout", ["pax", "one folder around", "one archive per class"])
def test_archive_equals_its_folder(tree, layout, tmp_path):
    path, prefix = tmp_path / "tree.tar", "val/" if layout == "one folder around" else ""
    if layout.startswith("one"):
        for name in ("0.png", "notes.txt"):  # an image beside the classes would make the folder around a class
            (tree / name).unlink(missing_ok=True)
    folder = ImageFolder(tree)
    if tree.name == "links":
        with pytest.raises(DataError, match=f"^{path}: .*: is a link"):
            ImageTar((write_ilsvrc if "class" in layout else pack)(tree, path))
        return
    if layout == "one archive per class":
        archive = ImageTar(write_ilsvrc(tree, path))
    else:
        archive = ImageTar(pack(tree, path, prefix or "."))
    assert archive.classes == folder.classes
    assert archive.samples == [(prefix + os.path.relpath(path, tree), label) for path, label in folder.samples]
    for i in range(len(folder)):
        assert np.array_equal(*(np.asarray(dataset[i][0]) for dataset in (folder, archive)))


DAMAGES: dict[str, Callable[[bytes, list[int]], list[bytes]]] = {  # bytes of an archive, offsets of its headers
    "cut at a header": lambda data, headers: [data[:i] for i in headers],
    "cut elsewhere": lambda data, headers: [data[: i + n] for i in headers for n in (1, 511, 513)],
    "flipped bit": lambda data, headers: [data[: i + 5] + bytes([data[i + 5] ^ 1]) + data[i + 6 :] for i in headers],
    "no end": lambda data, _: [data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512)],
    "more than an end": lambda data, _: [data + data, data + bytes(2**21) + b"x"],
    "compressed": lambda data, _: [gzip.compress(data), lzma.compress(data)],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_nested", [False, True])
def test_damaged_archive_is_refused(damage, is_nested, tmp_path):
    tree, path = write_tree(tmp_path / "tree", "ant/0.png", "ant/1.png", "bee/2.png"), tmp_path / "val.tar"
    data = (write_ilsvrc if is_nested else pack)(tree, path).read_bytes()
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    for version in DAMAGES[damage](data, headers):
        path.write_bytes(version)
        with pytest.raises(DataError, match=f"^{path}: not a sound tar archive"):
            ImageTar(path)


def test_archive_with_repeated_files_is_refused(tmp_path):
    tree, path = write_tree(tmp_path / "tree", "ant/0.png", "bee/1.png"), tmp_path / "val.tar"
    pack(tree, path)
    with tarfile.open(path, "a") as tar:
        tar.add(tree / "ant", "ant")
    with pytest.raises(DataError, match=f"^{path}: ant/0.png: "):
        ImageTar(path)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ((), "no class folders"),
        (("0.png", "notes.txt"), "no class folders"),
        (("a/notes.txt", "a/._0.png", "b/0.png"), "class folders a"),
    ],
)
def test_folders_and_archives_without_classes_or_with_empty_ones_are_refused(names, problem, tmp_path):
    tree = write_tree(tmp_path / "tree", *names)
    tree.mkdir(exist_ok=True)
    for kind, path in ((ImageFolder, tree), (ImageTar, pack(tree, tmp_path / "val.tar"))):
        with pytest.raises(DataError, match=f"^{path}: .*{problem}"):
            kind(path)


# Datasets


@pytest.mark.parametrize("is_archive", [False, True])
def test_images_and_labels_match(is_archive, tiny_cfg, image_folder, tmp_path):
    """The brightest channel is the label."""
    if is_archive:
        pack(image_folder / "train", tmp_path / "train.tar")
    config = load_config(tiny_cfg(), ["DATA.NUM_WORKERS", "2"], data_path=str(tmp_path if is_archive else image_folder))
    dataset = build_dataset(config, is_training=True)
    assert dataset.classes == list(CLASSES) and len(dataset) == 33
    for image, label in map(dataset.read, range(33)):
        assert np.asarray(image).mean((0, 1)).argmax() == label
    images, _ = next(iter(build_train_loader(dataset, config, ONE_RANK)))
    assert images.shape == (4, 3, 32, 32)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".tar", ".yaml"}  # no index is left beside the data


def test_inaturalist(tiny_cfg, tmp_path):
    """Read torchvision's folder layout of iNaturalist 2021, with two species, and open its files as all others."""
    for i, species in enumerate(("Apis_mellifera", "Felis_catus")):
        for split in ("2021_train", "2021_valid"):
            folder = tmp_path / split / f"{i:05}_Animalia_Phylum_Class_Order_Family_{species}"
            folder.mkdir(parents=True)
            for name in ("2.png", "0.png", "1.png"):
                Image.new("RGB", (50, 40), (i, 0, 0)).save(folder / name)
    config = load_config(tiny_cfg(), ["DATA.DATASET", "torch/inaturalist"], data_path=str(tmp_path))
    train, val = (build_dataset(config, is_training) for is_training in (True, False))
    assert len(train.classes) == 2 and train.classes[0].endswith("Apis_mellifera")
    assert all(np.asarray(image).max() == label for image, label in map(train.read, range(6)))
    assert train.dataset.index == [(i, f"{j}.png") for i in range(2) for j in range(3)]  # on any file system
    assert train[SampleKey(0, 0, 1)][0].shape == (3, 32, 32)
    (folder / "0.png").write_bytes(EPS)  # Pillow would start Ghostscript
    with pytest.raises(DataError, match=r"Felis_catus/0\.png: unreadable image"):
        val.read(3)


def write_mnist(root: Path) -> None:
    """Write six training and two test images in MNIST's format."""
    (folder := root / "MNIST" / "raw").mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 2)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + bytes(math.prod(shape)))


def test_splits_of_torchvision(tiny_cfg, tmp_path):
    """Timm reads test images for any unknown split."""
    write_mnist(tmp_path)

    def count(is_training: bool, *opts: str) -> int:
        config = load_config(tiny_cfg(), ["DATA.DATASET", "torch/mnist", *opts], data_path=str(tmp_path))
        return len(build_dataset(config, is_training))

    assert (count(True), count(False), count(False, "DATA.VAL_SPLIT", "train")) == (6, 2, 6)
    for is_training, key, split in (
        (True, "TRAIN", "trainval"),
        (True, "TRAIN", "train[:90%]"),
        (False, "VAL", "train[90%:]"),
    ):
        with pytest.raises(DataError, match=f"has no split '{re.escape(split)}'"):
            count(is_training, f"DATA.{key}_SPLIT", split)


def test_imagenet_of_torchvision(tiny_cfg, tmp_path):
    """Its class is a folder of images, too, but reads the split that it is asked for."""
    torch.save(({"n01440764": ("tench",), "n01443537": ("goldfish", "carp")}, []), tmp_path / "meta.bin")
    write_tree(tmp_path / "train", "n01440764/0.png", "n01443537/1.png")
    config = load_config(tiny_cfg(), ["DATA.DATASET", "torch/imagenet"], data_path=str(tmp_path))
    assert build_dataset(config, is_training=True).classes == ["tench", "goldfish, carp"]


# Unusable data


def remove_two_classes(data: Path) -> None:
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            shutil.rmtree(data / split / name)


@pytest.mark.parametrize(
    ("change", "opts", "problem"),
    [
        (shutil.rmtree, [], "DATA.DATA_PATH .*train.tar.*--data-path"),
        (None, ["DATA.DATASET", "torch/no_such_set"], "DATA.DATASET 'torch/no_such_set'"),
        (None, ["DATA.DATASET", "torch/image_folder", "DATA.TRAIN_SPLIT", "x"], "image folders need no name"),
        (None, ["TRAIN.GLOBAL_BATCH", "40"], "TRAIN.GLOBAL_BATCH: 40 is more than the 12 training images"),
        (lambda data: (data / "val/cat").rename(data / "val/dog"), [], r"train and val have different .*cat.* dog"),
        (remove_two_classes, ["MODEL.NUM_CLASSES", "1"], "one class"),
    ],
)
def test_unusable_data_is_refused(tiny_cfg, own_folder, change, opts, problem):
    if change:
        change(own_folder)
    config = load_config(tiny_cfg(), opts, data_path=str(own_folder))
    with pytest.raises(DataError, match=problem):
        train, val = (build_dataset(config, is_training) for is_training in (True, False))
        check_classes(config, train, val)
        build_train_loader(train, config, ONE_RANK)


@pytest.mark.parametrize("is_archive, workers", [(False, "0"), (False, "2"), (True, "2")])
def test_unreadable_image_is_named(tiny_cfg, own_folder, is_archive, workers):
    path = own_folder / "val" / "bee" / "bad.jpg"
    path.write_bytes(EPS)
    name = str(path)
    if is_archive:
        name = f"{pack(own_folder / 'val', own_folder / 'val.tar')}: bee/bad.jpg"
        (own_folder / "val").rename(own_folder / "unpacked")
    config = load_config(tiny_cfg(), ["DATA.NUM_WORKERS", workers], data_path=str(own_folder))
    loader = build_val_loader(build_dataset(config, is_training=False), config, ONE_RANK)
    with pytest.raises(DataError) as info:
        list(loader)
    assert str(info.value).startswith(f"{name}: unreadable image") and "\n" not in str(info.value)
