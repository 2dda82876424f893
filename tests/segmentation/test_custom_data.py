"""One's own classes, by the config to copy and the README's words; and what a mistake in the data is told."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from PIL import Image

from lit_backbone.mm import DataError, commands, load_file, runner
from lit_backbone.mm.data import check_dataset, check_metric, name_files
from lit_backbone.mm.inference import load_model
from tests.dense import TINY, derive, draw_shapes
from tests.programs import Program
from tests.segmentation.conftest import SEGMENTATION

OWN, TOOLS = SEGMENTATION / "configs" / "own" / "lit_s_fpn_own.py", SEGMENTATION / "tools"
SMALL = [*TINY, "model.decode_head.in_channels=[16,16,16,16]", "model.decode_head.channels=16"]
SMALL += ["model.data_preprocessor.size=(64,64)"]
SHORT = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
SHORT += ["default_hooks.logger.interval=1"]
SHORT += ["train_dataloader.dataset.pipeline.2.scale=(96,72)", "train_dataloader.dataset.pipeline.3.crop_size=(64,64)"]
for _split in ("train", "val", "test"):
    SHORT += [f"{_split}_dataloader.num_workers=0", f"{_split}_dataloader.persistent_workers=False"]
for _split in ("val", "test"):
    SHORT += [f"{_split}_dataloader.dataset.pipeline.1.scale=(96,72)"]


def write_pictures(root: Path, suffix: str = ".jpg", change: Callable[[np.ndarray], np.ndarray] = np.array) -> None:
    """Ten pictures and their masks, in which two rows have no class; `change` is made to the masks."""
    for split, seeds in (("train", range(6)), ("val", range(6, 10))):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for seed in seeds:
            picture, mask, _ = draw_shapes(seed)
            picture.save(root / "images" / split / f"{seed}{suffix}")
            numbers = np.array(mask)
            numbers[:2] = 255
            Image.fromarray(change(numbers)).save(root / "masks" / split / f"{seed}.png")


def train(config: Path, folder: Path, *options: str) -> str:
    arguments = [config, "--work-dir", "run", "--cfg-options", *SMALL, *SHORT, *options]
    return Program(TOOLS / "train.py", *arguments, prepare=partial(os.chdir, folder)).finish()


def test_own_classes_train_and_are_painted(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "own")
    before, _, after = train(OWN, tmp_path).partition("Iter(train)")
    assert len(before.splitlines()) <= 8 and re.search(r"mIoU: \d", after)
    meta = load_file(str(tmp_path / "run" / "iter_2.pth"))["meta"]["dataset_meta"]
    assert meta["classes"] == ("ground", "disc", "square")
    cfg = Config.fromfile(OWN)
    assert cfg.load_from.endswith("/sem_fpn_lit_s.pth")
    assert cfg.optim_wrapper.optimizer.lr == 1e-4 * cfg.train_dataloader.batch_size / 16
    assert len(OWN.read_text().splitlines()) <= 40

    drawn, overrides = [], [dict(option.split("=", 1) for option in (*SMALL, *SHORT)), {}]
    overrides[0] = {key: DictAction._parse_iterable(value) for key, value in overrides[0].items()}
    picture = tmp_path / "data" / "own" / "images" / "val" / "9.jpg"
    for i, config in enumerate([[OWN, "--cfg-options", *SMALL, *SHORT], [tmp_path / "run" / OWN.name]]):
        model = load_model(str(config[0]), str(tmp_path / "run" / "iter_2.pth"), "cpu", **overrides[i])
        assert model.cfg.test_pipeline[1]["scale"] == (96, 72)  # of the tests, not of ADE20K's
        out = tmp_path / f"drawn{i}"
        flags = ["--checkpoint", tmp_path / "run" / "iter_2.pth", "--out-dir", out, "--config", *config]
        Program(TOOLS / "segment.py", picture, *flags).finish()
        drawn.append((out / "9.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_what_the_config_has_comments_on(tmp_path: Path) -> None:
    """Images of another suffix; masks in which 0 is no class, and the first of two classes is 1."""
    write_pictures(tmp_path / "data" / "own", suffix=".bmp")
    kinds = dict(img_suffix=".bmp", reduce_zero_label=True, metainfo=dict(classes=("disc", "square")))
    kinds["metainfo"]["palette"] = [(230, 25, 75), (0, 130, 200)]
    changes = "\n".join(f"{split}_dataloader = dict(dataset={kinds})" for split in ("train", "val", "test"))
    config = derive(tmp_path / "two.py", OWN, f"{changes}\nmodel = dict(decode_head=dict(num_classes=2))")
    assert re.search(r"\|\s+disc\s+\|", train(config, tmp_path))


def test_another_value_for_no_class(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "own", change=lambda mask: np.where(mask == 255, 7, mask).astype(np.uint8))
    copied = tmp_path / "copied.py"
    text = OWN.read_text().replace("ignore = 255", "ignore = 7")
    copied.write_text(text.replace('"../lit', f'"{OWN.parents[1]}/lit'))
    train(copied, tmp_path)


# ---- mistakes


def load_first(folder: Path) -> None:
    """Loads the first training image and mask of `data/own`."""
    cfg = commands.read_config(str(OWN), **{"train_dataloader.dataset.data_root": str(folder / "data" / "own")})
    init_default_scope(cfg.default_scope)
    dataset = runner.StrictRunner.build_dataloader(cfg.train_dataloader).dataset
    check_dataset(dataset)
    name_files(dataset.pipeline, dataset)
    dataset[0]


def test_a_suffix_that_no_image_has_or_not_all(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "own", suffix=".png")
    with pytest.raises(DataError, match="images/train: no file ends in the data set.s img_suffix, .jpg; there are"):
        load_first(tmp_path)
    folder = tmp_path / "data/own/images/train"
    for image in folder.iterdir():
        image.rename(image.with_suffix(".jpg"))
    (folder / ".thumbnail.JPG").touch()
    (folder / "depth.png").touch()
    load_first(tmp_path)
    for ending in (".JPG", ".jpeg"):
        renamed = (folder / "3.jpg").rename(folder / f"3{ending}")
        with pytest.raises(DataError, match=f"images/train: 3{ending} does not end in the data set.s img_suffix, .jpg"):
            load_first(tmp_path)
        renamed.rename(folder / "3.jpg")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda mask: mask + 1, "holds 3; by metainfo.classes it is 0 to 2, or 255 for none"),
        (lambda mask: np.stack([mask] * 3, 2), "has 3 channels; a mask has one, of class numbers"),
        (lambda mask: mask.astype(np.uint16) * 256, "has more than 8 bits a pixel; write its class numbers with 8"),
        (lambda mask: mask[:, 1:], "has height and width (72, 95), its image (72, 96)"),
    ],
    ids=["value", "channels", "bits", "size"],
)
def test_a_mask_that_is_none_is_named(change: Callable, message: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "own", change=change)
    with pytest.raises(DataError, match=f"masks/train/0.png: {re.escape(message)}"):
        load_first(tmp_path)


def test_maps_of_one_name(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    dataset = BaseSegDataset(data_prefix=dict(img_path=str(tmp_path)), metainfo=dict(classes=("ground",)))
    check_dataset(BaseSegDataset(data_prefix=dict(img_path=str(tmp_path))))  # which names no classes
    check_metric(dataset, IoUMetric())
    with pytest.raises(DataError, match="--out: 2 images are named 1, in several folders"):
        check_metric(dataset, IoUMetric(output_dir=str(tmp_path / "maps")))


def test_one_line_names_a_mask_that_a_worker_loads(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "own", change=lambda mask: mask[:, 1:])
    command = [TOOLS / "train.py", OWN, "--cfg-options", *SMALL, *SHORT, "train_dataloader.num_workers=1"]
    line = Program(*command, prepare=partial(os.chdir, tmp_path)).finish(status=1).splitlines()[-1]
    assert re.match(r"error: data/own/masks/train/\d.png: has height and width \(72, 95\), its image", line)
