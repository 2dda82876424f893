"""Training on a custom dataset with the configs in configs/own, and error messages for invalid data."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import DictAction
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from PIL import Image

from lit_backbone.mm import DataError, load_file
from lit_backbone.mm.data import check_dataset, check_metric
from lit_backbone.mm.inference import load_model
from tests.dense import TINY, draw_shapes
from tests.detection.conftest import check_data, read_config
from tests.programs import Program
from tests.segmentation.conftest import SEGMENTATION

CONFIG, TOOLS = SEGMENTATION / "configs" / "own" / "lit_s_fpn_own.py", SEGMENTATION / "tools"
MINI = CONFIG.with_name("lit_mini_fpn_own.py")
SHORT = ["model.data_preprocessor.size=(64,64)", "train_cfg.max_iters=2", "train_cfg.val_interval=2"]
SHORT += ["default_hooks.checkpoint.interval=2", "default_hooks.logger.interval=1", "train_dataloader.batch_size=2"]
SHORT += [f"train_dataloader.dataset.pipeline.{value}" for value in ("2.scale=(96,72)", "3.crop_size=(64,64)")]
for _split in ("train", "val", "test"):
    SHORT += [f"{_split}_dataloader.num_workers=0", f"{_split}_dataloader.persistent_workers=False"]
for _split in ("val", "test"):
    SHORT += [f"{_split}_dataloader.dataset.pipeline.1.scale=(96,72)"]
OPTIONS = [*TINY, "model.decode_head.in_channels=[16,16,16,16]", "model.decode_head.channels=16", *SHORT]


def write_dataset(
    root: Path, suffix: str = ".jpg", change: Callable[[np.ndarray], np.ndarray] = np.array, train=6, val=4
) -> None:
    """Write images and their masks, with two ignored rows. `change` is applied to the masks."""
    for split, seeds in (("train", range(train)), ("val", range(train, train + val))):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for seed in seeds:
            image, mask, _ = draw_shapes(seed)
            image.save(root / "images" / split / f"{seed}{suffix}")
            labels = np.array(mask)
            labels[:2] = 255
            Image.fromarray(change(labels)).save(root / "masks" / split / f"{seed}.png")


def train(config: Path, folder: Path, *options: str, status: int = 0, base: list[str] = OPTIONS) -> str:
    arguments = [config, "--work-dir", "run", "--cfg-options", *base, *options]
    return Program(TOOLS / "train.py", *arguments, prepare=partial(os.chdir, folder)).finish(status=status)


def test_config_trains_and_tools_accept_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "own")
    assert re.search(r"mIoU: \d", train(CONFIG, tmp_path))
    checkpoint, cfg = tmp_path / "run" / "iter_2.pth", read_config(CONFIG)
    assert load_file(str(checkpoint))["meta"]["dataset_meta"]["classes"] == ("ground", "disc", "square")
    assert cfg.load_from.endswith("/sem_fpn_lit_s.pth")
    assert cfg.optim_wrapper.optimizer.lr == 1e-4 * cfg.train_dataloader.batch_size / 16

    pairs = (option.split("=", 1) for option in OPTIONS)
    overrides = {key: DictAction._parse_iterable(value) for key, value in pairs}
    model = load_model(str(CONFIG), str(checkpoint), "cpu", **overrides)
    assert model.cfg.test_pipeline[1]["scale"] == (96, 72)  # from the test data, not from ADE20K
    drawn = []
    for i, config in enumerate([[CONFIG, "--cfg-options", *OPTIONS], [tmp_path / "run" / CONFIG.name]]):
        flags = ["--checkpoint", checkpoint, "--out-dir", tmp_path / f"drawn{i}", "--config", *config]
        Program(TOOLS / "segment.py", tmp_path / "data" / "own" / "images" / "val" / "9.jpg", *flags).finish()
        drawn.append((tmp_path / f"drawn{i}" / "9.png").read_bytes())
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_mini_learns(tmp_path: Path) -> None:
    """Train for 300 iterations with a batch of 8, for a minute."""
    write_dataset(tmp_path / "data" / "own", train=240, val=40)
    options = ["train_dataloader.batch_size=8", "train_cfg.max_iters=300", "train_cfg.val_interval=300"]
    options += ["param_scheduler.0.end=30", "param_scheduler.1.begin=30"]
    output = train(MINI, tmp_path, *options, base=SHORT)
    assert float(re.findall(r"mIoU: ([\d.]+)", output)[-1]) > 90


def test_other_suffix_and_reduce_zero_label(tmp_path: Path) -> None:
    write_dataset(tmp_path, suffix=".bmp")
    metainfo = dict(classes=("disc", "square"), palette=[(230, 25, 75), (0, 130, 200)])
    check_data(CONFIG, tmp_path, img_suffix=".bmp", reduce_zero_label=True, metainfo=metainfo)


def test_other_ignore_index(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "own", change=lambda mask: np.where(mask == 255, 7, mask).astype(np.uint8))
    text = CONFIG.read_text().replace("ignore = 255", "ignore = 7")
    (tmp_path / "copied.py").write_text(text.replace('"../lit', f'"{CONFIG.parents[1]}/lit'))
    train(tmp_path / "copied.py", tmp_path)


# ---- invalid data


def test_images_with_other_suffix(tmp_path: Path) -> None:
    write_dataset(tmp_path, suffix=".png")
    with pytest.raises(DataError, match="images/train: img_suffix='.jpg' leaves out"):
        check_data(CONFIG, tmp_path)
    folder = tmp_path / "images" / "train"
    for image in folder.iterdir():
        image.rename(image.with_suffix(".jpg"))
    for name in (".thumbnail.JPG", "depth.png"):
        (folder / name).touch()
    check_data(CONFIG, tmp_path)
    for ending in (".JPG", ".jpeg"):
        renamed = (folder / "3.jpg").rename(folder / f"3{ending}")
        with pytest.raises(DataError, match=f"images/train: img_suffix='.jpg' leaves out 3{ending}"):
            check_data(CONFIG, tmp_path)
        renamed.rename(folder / "3.jpg")


def test_output_files_share_a_name(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    dataset = BaseSegDataset(data_prefix=dict(img_path=str(tmp_path)), metainfo=dict(classes=("ground",)))
    check_dataset(BaseSegDataset(data_prefix=dict(img_path=str(tmp_path))))  # has no classes
    check_metric(dataset, IoUMetric())
    with pytest.raises(DataError, match="--out: images in different folders are named 1"):
        check_metric(dataset, IoUMetric(output_dir=str(tmp_path / "maps")))


def test_invalid_mask_in_dataloader_worker(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "own", change=lambda mask: mask[:, 1:])
    line = train(CONFIG, tmp_path, "train_dataloader.num_workers=1", status=1).splitlines()[-1]
    assert re.match(r"error: data/own/masks/train/\d.png: shape is \(72, 95\)", line)
