"""Faulty masks: errors and warnings before the first step, for training and validation data."""

import copy
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from PIL import Image

from lit_backbone.mm import DataError, cli, data
from lit_backbone.mm.data import check_loaded_files, check_masks
from lit_backbone.mm.runner import StrictRunner
from tests.dense import error_of
from tests.segmentation.conftest import DEMO

CONFIG = DEMO / "fpn_lit_digit_scenes.py"
BINARY, OBJECT = ("background", "object"), ("object",)
Change = Callable[[np.ndarray], np.ndarray]


def write(scenes: Path, out: Path, change: Change) -> None:
    """Copy the scenes with changed masks."""
    shutil.copytree(scenes, out)
    for path in (out / "semantic").rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path))).astype(np.uint8)).save(path)


@functools.cache
def read_config() -> Config:
    return cli.read_config(str(CONFIG))


def check(root: Path, split: str = "train", classes: tuple = (), *, required: bool = True, **overrides: Any) -> None:
    """Check the masks of the demo data as a training does."""
    cfg = copy.deepcopy(read_config())
    init_default_scope(cfg.default_scope)
    loader = cfg[f"{split}_dataloader"] | dict(num_workers=0, persistent_workers=False)
    loader["dataset"] |= dict(data_root=f"{root}/") | overrides
    if classes:
        loader["dataset"]["metainfo"] = dict(classes=classes, palette=[(0, 0, 0)] * len(classes))
    dataset = StrictRunner.build_dataloader(loader, seed=0).dataset
    check_loaded_files(dataset.pipeline, dataset)
    check_masks(dataset, required=required)


FAULTS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "m255": (
        lambda mask: np.where(mask > 0, 255, 0),
        dict(classes=BINARY),
        "class object occurs in none of 6 masks, which ignore 255.",
    ),
    "empty": (lambda mask: np.full_like(mask, 255), {}, "class background, 0, 1, ... occurs in none of 6 masks"),
    "absent": (
        lambda mask: np.where(mask == 3, 255, mask),
        {},
        "class 2 occurs in none of 6 masks, which ignore 255. Fix the masks, remove it, or set allow_absent",
    ),
    "zeros": (np.zeros_like, dict(classes=BINARY), "class object occurs in none of 6 masks"),
    "one": (np.ones_like, dict(classes=OBJECT, reduce_zero_label=True), "one class cannot be told apart"),
    "reduced": (
        lambda mask: np.where(mask > 0, 1, 0),
        dict(classes=BINARY, reduce_zero_label=True),
        "class object occurs in none of 6 masks, which ignore 255 and, with reduce_zero_label=True, 0.",
    ),
    "invalid": (lambda mask: mask + 1, {}, "invalid class index 11"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faulty_masks(kind: str, scenes: Path, tmp_path: Path) -> None:
    change, options, message = FAULTS[kind]
    write(scenes, tmp_path / "faulty", change)
    with pytest.raises(DataError) as error:
        check(tmp_path / "faulty", **options)
    assert message in str(error.value) and ("semantic/train" in str(error.value) or kind == "one")


def test_sound_masks(scenes: Path, tmp_path: Path) -> None:
    check(scenes)
    write(scenes, tmp_path / "binary", lambda mask: np.where(mask > 0, 1, 0))
    check(tmp_path / "binary", classes=BINARY)


@pytest.mark.parametrize("kind", ["m255", "absent", "reduced"])
def test_absent_class_in_validation_is_a_warning(
    kind: str, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, options, message = FAULTS[kind]
    write(scenes, tmp_path / "faulty", change)
    MMLogger.get_instance(f"masks-{kind}").addHandler(caplog.handler)  # the current logger
    check(tmp_path / "faulty", "val", required=False, **options)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("semantic/val: class " in text and "occurs in none of 4 masks" in text for text in warnings)


def test_sample_is_extended_until_each_class_occurs(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(scenes, tmp_path / "binary", lambda mask: np.where(mask > 0, 1, 0))
    last = tmp_path / "binary" / "semantic" / "train" / "00005.png"
    Image.fromarray(np.full((128, 128), 2, np.uint8)).save(last)
    monkeypatch.setattr(data, "MAX_MASKS", 2)
    MMLogger.get_instance("masks-sample").addHandler(caplog.handler)
    check(tmp_path / "binary", classes=(*BINARY, "rare"))
    assert "in 2 of" not in caplog.text
    check(tmp_path / "binary", "val", classes=BINARY)
    assert "semantic/val: counted the classes in 2 of 4 masks." in caplog.text


@pytest.mark.parametrize("fault", ["mask", "image"])
def test_bad_validation_file_is_found_before_the_first_step(
    fault: str, scenes: Path, tmp_path: Path, options: Any
) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    name = {"mask": "semantic/val/00002.png", "image": "images/val/00002.jpg"}[fault]
    (tmp_path / "scenes" / name).write_text("not an image")
    changes = {"val_dataloader__dataset__data_root": f"{tmp_path}/scenes/"}
    message = error_of(cli.train, "", [str(CONFIG), *options(**changes)])
    assert f"{name}: image or annotations are unreadable" in message
    assert not list((tmp_path / "run").glob("*.pth"))


def test_absent_classes_can_be_allowed(scenes: Path, tmp_path: Path, options: Any) -> None:
    write(scenes, tmp_path / "scenes", FAULTS["absent"][0])
    changes = {"train_dataloader__dataset__data_root": f"{tmp_path}/scenes/"}
    assert "class 2 occurs in none" in error_of(cli.train, "", [str(CONFIG), *options(**changes)])
    cli.train("", [str(CONFIG), *options(allow_absent_classes=True, **changes)])
    assert (tmp_path / "run" / "iter_1.pth").exists()
