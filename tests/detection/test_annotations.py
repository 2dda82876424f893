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
    "noarea": (lambda a, image, i: a.pop("area"), "annotation 1: has no area"),
    "nocategory": (lambda a, image, i: a.pop("category_id"), "annotation 1: has no category_id"),
    "noimage": (lambda a, image, i: a.pop("image_id"), "annotation 1: has no image_id"),
    "noid": (lambda a, image, i: a.pop("id"), "annotation at index 0: has no id"),
    "nobox": (lambda a, image, i: a.pop("bbox"), "annotation 1: has no bbox"),
    "sameid": (lambda a, image, i: a.update(id=1), "annotation 1: its id is not unique"),
    "short": (lambda a, image, i: a.update(bbox=a["bbox"][:3]), "annotation 1: bbox is"),
    "nan": (lambda a, image, i: a.update(bbox=[math.nan] * 4), "annotation 1: bbox is .nan"),
    "nanarea": (lambda a, image, i: a.update(area=math.nan), "annotation 1: area is nan"),
    "textid": (lambda a, image, i: a.update(image_id=str(a["image_id"])), "annotation 1: image_id is '0'"),
    "textbox": (lambda a, image, i: a.update(bbox=[*map(str, a["bbox"])]), "annotation 1: bbox is"),
    "crowdtext": (lambda a, image, i: a.update(iscrowd="no"), "annotation 1: iscrowd is 'no'"),
    "points": (lambda a, image, i: a.update(segmentation=[[1, 2, 3, 4]]), "annotation 1: a polygon has 4 coordinates"),
    "odd": (lambda a, image, i: a.update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 1: a polygon has 7 coord"),
    "nanpoint": (lambda a, image, i: a.update(segmentation=[[math.nan] * 6]), "annotation 1: a coordinate of"),
    "nomask": (lambda a, image, i: a.pop("segmentation"), "annotation 1: has no segmentation"),
    "emptymask": (lambda a, image, i: a.update(segmentation=[[]]), "annotation 1: has no segmentation"),
    "masksize": (lambda a, image, i: a["segmentation"].update(size=[9, 9]), "annotation 1: the mask has size .9, 9."),
    "noname": (lambda a, image, i: image.pop("file_name", 0), "image 0: has no file_name"),
    "nosize": (lambda a, image, i: image.pop("width", 0), "image 0: has no width"),
    # nothing is left
    "area0": (lambda a, image, i: a.update(area=0), r"none of \d+ annotations is left .*area is 0 or negative.* 1 and"),
    "unit": (to_unit, r"none of \d+ annotations is left .*the box is in 0..1, not in pixels"),
    "category": (lambda a, image, i: a.update(category_id=99), "none of .* category_id is not in categories"),
    "negative": (lambda a, image, i: a.update(bbox=[*a["bbox"][:2], -5, -5]), "none of .* of the box is negative"),
    "outside": (lambda a, image, i: a.update(bbox=[10_000, 10_000, 5, 5]), "none of .* the box is outside the image"),
    "crowd": (lambda a, image, i: a.update(iscrowd=1), "none of .* iscrowd is 1"),
    "otherimage": (lambda a, image, i: a.update(image_id=99), "none of .* image_id is not in images"),
    "ignore": (lambda a, image, i: a.update(ignore=1), "none of .* ignore is set"),
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
        ("", "no valid JSON"),
        ('{"images": [', "no valid JSON"),
        ("\x00\xff", "no valid JSON"),
        ("[1]", "holds a list"),
        ("{}", "has no list 'images'"),
        ('{"images": [3], "categories": [], "annotations": []}', "image at index 0: is 3"),
        ('{"images": [{"id": 1, "width": 9, "height": 9, "file_name": 5}]}', "image 1: file_name is 5"),
        ('{"images": [], "categories": [{"id": 1}], "annotations": []}', "category 1: has no name"),
    ],
)
def test_invalid_files(text: str, message: str, scenes: Path, tmp_path: Path) -> None:
    write(scenes, tmp_path / "faulty", lambda *_: None).write_text(text)
    with pytest.raises(DataError, match=f"annotations/train.json: {message}"):
        check_data(CONFIG, tmp_path / "faulty")


WARNINGS: dict[str, tuple[Change, str]] = {
    "half": (lambda a, image, i: a.update(area=0) if i % 2 else None, "annotations are left out (16: area is 0"),
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


def test_validation_file_is_checked_before_the_first_step(scenes: Path, tmp_path: Path, options: Any) -> None:
    write(scenes, tmp_path / "faulty", INVALID["noarea"][0], "val")
    changes = {"val_dataloader__dataset__data_root": f"{tmp_path}/faulty/"}
    assert "val.json: annotation 1: has no area." in error_of(cli.train, "", [str(CONFIG), *options(**changes)])
    assert not list((tmp_path / "run").glob("*.pth"))
