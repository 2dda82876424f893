"""Training on a custom dataset with the configs in configs/own, and error messages for invalid data."""

import json
import os
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.structures import InstanceData

from lit_backbone.mm import DataError, cli, load_file
from lit_backbone.mm.data import check_dataset
from tests.dense import TINY, draw_shapes, error_of
from tests.detection.conftest import DETECTION, check_data, read_config
from tests.programs import Program

CONFIG, TOOLS = DETECTION / "configs" / "own" / "retinanet_lit_s_own.py", DETECTION / "tools"
SHORT = ["train_cfg.max_epochs=1", "train_dataloader.batch_size=2"]
for _split, _resize in (("train", 2), ("val", 1), ("test", 1)):
    SHORT += [f"{_split}_dataloader.num_workers=0", f"{_split}_dataloader.persistent_workers=False"]
    SHORT += [f"{_split}_dataloader.dataset.pipeline.{_resize}.scale=(96,72)"]
HEAD = ["model.bbox_head.in_channels=16", "model.bbox_head.feat_channels=16", "model.bbox_head.stacked_convs=1"]
OPTIONS = [*TINY, *HEAD, *SHORT]
ROI_HEADS = ["model.roi_head.bbox_head.fc_out_channels=16", "model.roi_head.mask_head.conv_out_channels=16"]
ROI_HEADS += ["model.rpn_head.in_channels=16", "model.rpn_head.feat_channels=16"]
ROI_HEADS += [f"model.roi_head.{kind}_roi_extractor.out_channels=16" for kind in ("bbox", "mask")]
ROI_HEADS += [f"model.roi_head.{kind}_head.in_channels=16" for kind in ("bbox", "mask")]


def write_dataset(root: Path, train: int = 6, val: int = 4) -> None:
    """Write images with two categories and their annotations in COCO format."""
    (root / "images").mkdir(parents=True)
    for name, seeds in (("train", range(train)), ("val", range(train, train + val))):
        coco = dict(images=[], annotations=[], categories=[dict(id=3, name="disc"), dict(id=7, name="square")])
        for seed in seeds:
            image, _, boxes = draw_shapes(seed)
            image.save(root / "images" / f"{seed}.png")
            coco["images"].append(dict(id=seed, file_name=f"{seed}.png", width=96, height=72))
            for category, box in zip((3, 7), boxes):
                x, y = box[:2]
                labels = dict(image_id=seed, category_id=category, bbox=box, area=900, iscrowd=0)
                labels |= dict(segmentation=[[x, y, x + 30, y, x + 30, y + 30, x, y + 30]])
                coco["annotations"].append(labels | dict(id=10 * seed + category))
        (root / f"{name}.json").write_text(json.dumps(coco))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a dataset in `data/own`."""
    home = tmp_path_factory.mktemp("home")
    write_dataset(home / "data" / "own")
    return home


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """Work directory of a run."""
    Program(TOOLS / "train.py", CONFIG, "--cfg-options", *OPTIONS, prepare=partial(os.chdir, home)).finish()
    return home / "work_dirs" / CONFIG.stem


def test_config_trains_and_validates(trained: Path) -> None:
    meta = load_file(str(trained / "epoch_1.pth"))["meta"]
    assert meta["iter"] == 3 and meta["dataset_meta"]["classes"] == ("disc", "square")
    cfg = read_config(CONFIG)
    assert cfg.load_from.endswith("/retina_lit_s.pth")
    assert cfg.optim_wrapper.optimizer.lr == 1e-4 * cfg.train_dataloader.batch_size / 16


def test_mask_rcnn_trains_and_validates(home: Path) -> None:
    config = CONFIG.with_name("mask_rcnn_lit_s_own.py")
    command = [TOOLS / "train.py", config, "--cfg-options", *TINY, *ROI_HEADS, *SHORT]
    Program(*command, prepare=partial(os.chdir, home)).finish("coco/bbox_mAP:", "coco/segm_mAP:")
    meta = load_file(str(home / "work_dirs" / config.stem / "epoch_1.pth"))["meta"]
    assert meta["iter"] == 3 and meta["dataset_meta"]["classes"] == ("disc", "square")


@pytest.mark.slow
def test_mini_learns(tmp_path: Path) -> None:
    """Train for two epochs of 240 images with a batch of 8."""
    write_dataset(tmp_path / "data" / "own", train=240, val=40)
    options = [*SHORT, "train_dataloader.batch_size=8", "train_cfg.max_epochs=2", "param_scheduler.0.end=30"]
    options += ["train_dataloader.dataset.pipeline.2.scale=(192,144)"]
    options += [f"{split}_dataloader.dataset.pipeline.1.scale=(192,144)" for split in ("val", "test")]
    command = [TOOLS / "train.py", CONFIG.with_name("retinanet_lit_mini_own.py"), "--cfg-options", *options]
    output = Program(*command, prepare=partial(os.chdir, tmp_path)).finish()
    assert float(re.findall(r"coco/bbox_mAP_50: ([\d.]+)", output)[-1]) > 0.9


def test_own_configs_slow_down_offsets_and_do_not_pad_test_images() -> None:
    paths = list(DETECTION.parent.glob("*/configs/own/*.py"))
    assert len(paths) == 5
    for path in paths:
        cfg = read_config(path)
        if path.stem == "mask_rcnn_lit_s_own":
            assert cfg.load_from.endswith("/mask_rcnn_lit_s.pth")
            assert cfg.optim_wrapper.optimizer.lr == 2e-4 * cfg.train_dataloader.batch_size / 16
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys.offset.lr_mult == 0.01
        assert cfg.val_dataloader.batch_size == cfg.test_dataloader.batch_size == 1


def test_tools_accept_options_and_saved_config(trained: Path, home: Path) -> None:
    drawn = []
    for i, config in enumerate(([CONFIG, "--cfg-options", *OPTIONS], [trained / CONFIG.name])):
        flags = ["--checkpoint", trained / "epoch_1.pth", "--config", *config]
        out, image = home / f"drawn{i}", home / "data" / "own" / "images" / "9.png"
        Program(TOOLS / "detect.py", image, "--score-thr", "0", "--out-dir", out, *flags).finish()
        drawn.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")})
    assert len(drawn[0]) == 1 and drawn[0] == drawn[1]


def test_class_agnostic_nms() -> None:
    class_agnostic_nms = runpy.run_path(str(TOOLS / "detect.py"))["class_agnostic_nms"]
    boxes = torch.tensor([[0, 0, 30, 30], [50, 0, 80, 30], [1, 0, 31, 30], [20, 0, 50, 30]]).float()
    scores, labels = torch.tensor([0.4, 0.5, 0.9, 0.3]), torch.tensor([5, 6, 6, 5])
    instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
    result = class_agnostic_nms(instances, 0.5)
    assert result.labels.tolist() == [5, 6, 6] and result.bboxes.tolist() == boxes[[3, 1, 2]].tolist()
    assert len(class_agnostic_nms(instances[:0], 0.5)) == 0


# ---- invalid data


def edit_annotations(file: Path, name: str, entries: list[dict] | dict) -> None:
    """Replace a list in an annotation file, or some values in all of its entries."""
    content = json.loads(file.read_text())
    content[name] = entries if isinstance(entries, list) else [entry | entries for entry in content[name]]
    file.write_text(json.dumps(content))


def classes(*names: str) -> dict[str, Any]:
    return dict(metainfo=dict(classes=names))


FAULTS: dict[str, tuple[dict[str, Any], tuple, str]] = {  # keys of the dataset, edit of the file, message
    "misspelled": (classes("disc", "sqare"), (), "train.json: not exactly one category named sqare"),
    "order": (classes("square", "disc"), (), "the categories are in another order"),
    "duplicate": ({}, ("categories", {"name": "disc"}), "train.json: not exactly one category named disc, square"),
    "rotated": ({}, ("images", dict(width=72, height=96)), r"png: height and width are \(72, 96\), but \(96, 72\)"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_inconsistent_data(kind: str, tmp_path: Path) -> None:
    overrides, edit, message = FAULTS[kind]
    write_dataset(tmp_path)
    if edit:
        edit_annotations(tmp_path / "train.json", *edit)
    with pytest.raises(DataError, match=message):
        check_data(CONFIG, tmp_path, **overrides)


COCO = [dict(id=i, name=name) for i, name in enumerate(sorted(CocoDataset.METAINFO["classes"]))]


@pytest.mark.parametrize("categories", [COCO, COCO[:2]], ids=["alphabetical", "two"])
def test_coco_classes_with_other_categories(categories: list[dict], tmp_path: Path) -> None:
    write_dataset(tmp_path)
    edit_annotations(tmp_path / "val.json", "categories", categories)
    annotations = [dict(id=1, image_id=6, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)]
    edit_annotations(tmp_path / "val.json", "annotations", annotations)
    dataset = CocoDataset(ann_file=str(tmp_path / "val.json"), data_prefix=dict(img=str(tmp_path / "images")))
    with pytest.raises(DataError, match="val.json: (the categories are in another order|not exactly one category)"):
        check_dataset(dataset)


def test_images_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path)
    monkeypatch.chdir(tmp_path / "images")
    dataset = CocoDataset(ann_file="../val.json", data_prefix=dict(img=""), **classes("disc", "square"))
    assert dataset.get_data_info(0)["img_path"] == "6.png"
    check_dataset(dataset)


def test_training_and_validation_have_the_same_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "own")
    swapped = [dict(id=3, name="square"), dict(id=7, name="disc")]
    edit_annotations(tmp_path / "data" / "own" / "val.json", "categories", swapped)
    options = [*OPTIONS, "val_dataloader.dataset.metainfo.classes=(square,disc)"]
    message = error_of(cli.train, "", [str(CONFIG), "--cfg-options", *options])
    assert "metainfo.classes: datasets have different classes" in message


def test_evaluator_has_other_annotations(trained: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    options = [*OPTIONS, "test_evaluator.ann_file=data/own/train.json"]
    message = error_of(cli.test, "", [str(CONFIG), str(trained / "epoch_1.pth"), "--cfg-options", *options])
    assert "images/6.png: image is None in the evaluator's ann_file" in message
    content = json.loads(Path("data/own/val.json").read_text())
    Path("reversed.json").write_text(json.dumps(content | dict(categories=content["categories"][::-1])))
    options[-1] = "test_evaluator.ann_file=reversed.json"
    message = error_of(cli.test, "", [str(CONFIG), str(trained / "epoch_1.pth"), "--cfg-options", *options])
    assert "metainfo.classes is ['disc', 'square'], but ['square', 'disc'] in the evaluator's ann_file" in message


def test_unreadable_image_in_dataloader_worker(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "own")
    (tmp_path / "data" / "own" / "images" / "4.png").write_text("not an image")
    command = [TOOLS / "train.py", CONFIG, "--cfg-options", *OPTIONS, "train_dataloader.num_workers=1"]
    output = Program(*command, prepare=partial(os.chdir, tmp_path)).finish(status=1)
    assert output.splitlines()[-1].startswith("error: data/own/images/4.png: image or annotations are unreadable")
