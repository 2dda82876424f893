"""Faulty COCO files: errors and warnings before the first step, for training and validation data."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmdet.evaluation import CocoMetric
from mmengine.logging import MMLogger
from pycocotools.cocoeval import COCOeval

from lit_backbone.mm import DataError, cli
from lit_backbone.mm.coco import repair_ground_truth
from tests.dense import error_of
from tests.detection.conftest import DEMO, check_data

CONFIG = DEMO / "retinanet_lit_digit_scenes.py"
Change = Callable[[dict, dict, int], Any]  # annotation, its image, its position


def to_unit(a: dict, image: dict, i: int) -> None:
    x, y, w, h = a["bbox"]
    a["bbox"] = [x / image["width"], y / image["height"], w / image["width"], h / image["height"]]


def to_corners(a: dict, image: dict, i: int) -> None:
    x, y, w, h = a["bbox"]
    a["bbox"] = [x, y, x + w, y + h]


def write(scenes: Path, out: Path, change: Change, split: str = "train") -> Path:
    """Write the scenes with changed annotations of one split, and return the annotation file."""
    (out / "annotations").mkdir(parents=True)
    (out / "images").symlink_to(scenes / "images")
    for name in ("train", "val"):
        coco = json.loads((scenes / "annotations" / f"{name}.json").read_text())
        images = {image["id"]: image for image in coco["images"]}
        for i, annotation in enumerate(coco["annotations"] if name == split else ()):
            change(annotation, images[annotation["image_id"]], i)
        (out / "annotations" / f"{name}.json").write_text(json.dumps(coco))
    return out / "annotations" / f"{split}.json"


INVALID: dict[str, tuple[Change, str]] = {
    "noarea": (lambda a, image, i: a.pop("area"), r"annotations.0..area is missing. Use width \* height."),
    "sameid": (lambda a, image, i: a.update(id=1), "annotations: ids are not unique .1."),
    "short": (lambda a, image, i: a.update(bbox=a["bbox"][:3]), r"annotations.0..bbox is .* Use \[x, y, width, "),
    "nan": (lambda a, image, i: a.update(bbox=[math.nan] * 4), "annotations.0..bbox is .nan"),
    "textid": (lambda a, image, i: a.update(image_id=str(a["image_id"])), "annotations.0..image_id is '0'. Use"),
    "crowdtext": (lambda a, image, i: a.update(iscrowd="no"), "annotations.0..iscrowd is 'no'. Use 0 or 1"),
    "points": (lambda a, image, i: a.update(segmentation=[[1, 2, 3, 4]]), "annotations.0..segmentation is .* Use poly"),
    "nanpoint": (lambda a, image, i: a.update(segmentation=[[math.nan] * 6]), "annotations.0..segmentation is .*nan"),
    "nomask": (lambda a, image, i: a.pop("segmentation"), "annotations.0..segmentation is "),
    "masksize": (lambda a, image, i: a["segmentation"].update(size=[9, 9]), "annotations.0..segmentation.size is .9"),
    "noname": (lambda a, image, i: image.pop("file_name", 0), "images.0..file_name is missing. Use"),
    # nothing is left
    "area0": (lambda a, image, i: a.update(area=0), r"no instance .*\d+ annotations, \d+: area is 0 or negative"),
    "unit": (to_unit, r"no instance .*are coordinates in 0..1"),
    "category": (lambda a, image, i: a.update(category_id=99), "no instance .* category_id is not in categories"),
    "negative": (lambda a, image, i: a.update(bbox=[*a["bbox"][:2], -5, -5]), "no instance .* the box is smaller"),
    "outside": (lambda a, image, i: a.update(bbox=[10_000, 10_000, 5, 5]), "no instance .* the box is outside the im"),
    "crowd": (lambda a, image, i: a.update(iscrowd=1), "no instance .* iscrowd is 1"),
    "otherimage": (lambda a, image, i: a.update(image_id=99), "no instance .* image_id is not in images"),
    "ignore": (lambda a, image, i: a.update(ignore=1), "no instance .* ignore is set"),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", INVALID)
def test_unusable_annotations(kind: str, split: str, scenes: Path, tmp_path: Path) -> None:
    change, message = INVALID[kind]
    write(scenes, tmp_path / "faulty", change, split)
    with pytest.raises(DataError, match=f"annotations/{split}.json: {message}"):
        check_data(CONFIG, tmp_path / "faulty", split)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"images": [', "no valid JSON"),
        ("[1]", "has no list 'images'"),
        ('{"images": [3], "categories": [], "annotations": []}', "images.0..id is missing"),
        ('{"images": [{"id": 1, "width": 9, "height": 9, "file_name": 5}]}', "images.0..file_name is 5"),
        ('{"images": [], "categories": [{"id": 1}], "annotations": []}', "categories.0..name is missing"),
    ],
)
def test_invalid_files(text: str, message: str, scenes: Path, tmp_path: Path) -> None:
    write(scenes, tmp_path / "faulty", lambda *_: None).write_text(text)
    with pytest.raises(DataError, match=f"annotations/train.json: {message}"):
        check_data(CONFIG, tmp_path / "faulty")


def test_filtered_images_leave_nothing(scenes: Path, tmp_path: Path) -> None:
    """Name the reason also if the dataset is empty, because it drops images without boxes."""
    write(scenes, tmp_path / "faulty", INVALID["category"][0])
    with pytest.raises(DataError, match="train.json: no instance of .* category_id is not in categories"):
        check_data(CONFIG, tmp_path / "faulty", filter_cfg=dict(filter_empty_gt=True))


WARNINGS: dict[str, tuple[Change, str]] = {
    "half": (lambda a, image, i: a.update(area=0) if i % 2 else None, "annotations, 16: area is 0"),
    "corners": (to_corners, "Write them as x, y, width, height instead of x1, y1, x2, y2."),
    "lost": (lambda a, image, i: a.update(area=0) if a["category_id"] == 1 else None, "no instances of 0"),
}


@pytest.mark.parametrize("kind", WARNINGS)
def test_doubtful_annotations_are_a_warning(
    kind: str, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = WARNINGS[kind]
    write(scenes, tmp_path / "faulty", change)
    MMLogger.get_instance(f"annotations-{kind}").addHandler(caplog.handler)  # the current logger
    check_data(CONFIG, tmp_path / "faulty")
    assert any(message in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)


def test_masks_are_not_needed_for_boxes(scenes: Path, tmp_path: Path) -> None:
    write(scenes, tmp_path / "boxes", lambda a, image, i: a.update(segmentation=[]))
    check_data(CONFIG, tmp_path / "boxes", pipeline=[dict(type="LoadAnnotations", with_bbox=True)])


@pytest.mark.parametrize(
    "change", [lambda a, image, i: a.update(id=i), lambda a, image, i: a.pop("iscrowd")], ids=["ids0", "noiscrowd"]
)
def test_ground_truth_is_repaired(change: Change, scenes: Path, tmp_path: Path) -> None:
    file = write(scenes, tmp_path / "scenes", change, "val")
    truth = CocoMetric(ann_file=str(file))._coco_api
    repair_ground_truth(truth)
    keys = ("image_id", "category_id", "bbox")
    results = [{key: a[key] for key in keys} | {"score": 1.0} for a in json.loads(file.read_text())["annotations"]]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


@pytest.mark.parametrize("key", ["area", "id"])
def test_validation_file_is_checked_before_the_first_step(key: str, scenes: Path, tmp_path: Path, options: Any) -> None:
    file = write(scenes, tmp_path / "faulty", lambda a, image, i: a.pop(key), "val")
    changes = dict(val_dataloader__dataset__ann_file=file, val_evaluator__ann_file=file)
    message = error_of(cli.train, "", [str(CONFIG), *options(**changes)])
    assert f"val.json: annotations[0].{key} is missing." in message
    assert not list((tmp_path / "run").glob("*.pth"))
