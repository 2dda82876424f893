"""Faulty masks and images: errors and warnings before the first step, for training and validation data."""

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.logging import MMLogger
from PIL import Image

from lit_backbone.mm import DataError, cli, data
from tests.dense import error_of
from tests.detection.conftest import check_data, read_config
from tests.segmentation.conftest import DEMO

CONFIG = DEMO / "fpn_lit_digit_scenes.py"
Change = Callable[[np.ndarray], np.ndarray]


def write(scenes: Path, out: Path, change: Change) -> Path:
    """Copy the scenes with changed masks."""
    shutil.copytree(scenes, out)
    for path in (out / "semantic").rglob("*.png"):
        mask = change(np.asarray(Image.open(path)))
        Image.fromarray(mask if mask.dtype == np.uint16 else mask.astype(np.uint8)).save(path)
    return out


def classes(*names: str, **keys: Any) -> dict[str, Any]:
    return dict(metainfo=dict(classes=names, palette=[(0, 0, 0)] * len(names)), **keys)


def binary(mask: np.ndarray) -> np.ndarray:
    return np.where(mask > 0, 1, 0)


BINARY = classes("background", "object")
FAULTS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "m255": (lambda mask: 255 * binary(mask), BINARY, "object occurs in none of 6 masks, which ignore 255"),
    "empty": (lambda mask: np.full_like(mask, 255), {}, "class background, 0, 1, ... occurs in none of 6 masks"),
    "absent": (lambda mask: np.where(mask == 3, 255, mask), {}, "class 2 occurs in none of 6 masks"),
    "zeros": (np.zeros_like, BINARY, "object occurs in none of 6 masks"),
    "one": (np.ones_like, classes("object", reduce_zero_label=True), "one class cannot be told apart"),
    "reduced": (binary, BINARY | dict(reduce_zero_label=True), "object occurs in none of 6 masks, .*reduce_zero_label"),
    "value": (lambda mask: mask + 1, {}, "png: invalid class index 11"),
    "channels": (lambda mask: np.stack([mask] * 3, 2), {}, r"png: shape is \(128, 128, 3\)"),
    "bits": (lambda mask: mask.astype(np.uint16) * 256, {}, "png: more than 8 bits per pixel"),
    "size": (lambda mask: mask[:, 1:], {}, r"png: shape is \(128, 127\)"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faulty_masks(kind: str, scenes: Path, tmp_path: Path) -> None:
    change, options, message = FAULTS[kind]
    with pytest.raises(DataError, match=f"({'' if kind == 'one' else 'semantic/train'}).*{message}"):
        check_data(CONFIG, write(scenes, tmp_path / "faulty", change), **options)


def test_sound_masks(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals = []
    monkeypatch.setattr(data, "tqdm", lambda items, *args, **_: totals.append(args[1:]) or items)
    check_data(CONFIG, scenes)
    assert totals == [(), (6,)]  # progress bars: files, masks
    check_data(CONFIG, write(scenes, tmp_path / "binary", binary), **BINARY)


@pytest.mark.parametrize("kind", ["m255", "absent", "reduced"])
def test_absent_class_in_validation_is_a_warning(
    kind: str, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, options, _ = FAULTS[kind]
    MMLogger.get_instance(f"masks-{kind}").addHandler(caplog.handler)  # the current logger
    check_data(CONFIG, write(scenes, tmp_path / "faulty", change), "val", all_classes=False, **options)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("semantic/val: class " in text and "occurs in none of 4 masks" in text for text in warnings)


def test_sample_is_extended_until_each_class_occurs(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write(scenes, tmp_path / "binary", binary)
    Image.fromarray(np.full((128, 128), 2, np.uint8)).save(root / "semantic" / "train" / "00005.png")
    monkeypatch.setattr(data, "MAX_MASKS", 2)
    MMLogger.get_instance("masks-sample").addHandler(caplog.handler)
    check_data(CONFIG, root, **classes("background", "object", "rare"))
    assert "in 2 of" not in caplog.text
    check_data(CONFIG, root, "val", **BINARY)
    assert "semantic/val: counted the classes in 2 of 4 masks." in caplog.text


@pytest.mark.parametrize("name", ["semantic/val/00002.png", "images/val/00002.jpg"])
def test_bad_validation_file_is_found_before_the_first_step(
    name: str, scenes: Path, tmp_path: Path, options: Any
) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes" / name).write_text("not an image")
    changes = {"val_dataloader__dataset__data_root": f"{tmp_path}/scenes/"}
    message = error_of(cli.train, "", [str(CONFIG), *options(**changes)])
    assert f"{name}: image or annotations are unreadable" in message
    assert not list((tmp_path / "run").glob("*.pth"))


def test_absent_classes_can_be_allowed(scenes: Path, tmp_path: Path, options: Any) -> None:
    root = write(scenes, tmp_path / "scenes", FAULTS["absent"][0])
    changes = {"train_dataloader__dataset__data_root": f"{root}/"}
    cli.train("", [str(CONFIG), *options(allow_absent_classes=True, **changes)])
    assert (tmp_path / "run" / "iter_1.pth").exists()


def test_classes_are_counted_over_concatenated_datasets(scenes: Path, tmp_path: Path, options: Any) -> None:
    change = FAULTS["absent"][0]
    faulty = [f"{write(scenes, tmp_path / name, change)}/" for name in ("first", "second")]
    for roots, message in ((faulty, "class 2 occurs in none of 12 masks"), ([*faulty[:1], f"{scenes}/"], "")):
        cfg = copy.deepcopy(read_config(CONFIG))
        loader = cfg.train_dataloader
        loader.dataset = dict(type="ConcatDataset", datasets=[dict(loader.dataset, data_root=root) for root in roots])
        cfg.dump(tmp_path / "config.py")
        run = options(f"run{len(message)}")
        command = [str(tmp_path / "config.py"), *(x for x in run if not x.startswith("train_dataloader.dataset"))]
        if message:
            assert message in error_of(cli.train, "", command)
        else:
            cli.train("", command)
