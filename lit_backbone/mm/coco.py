"""Checks of COCO annotation files, and of the instances that mmdetection keeps from them."""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from mmengine.fileio import get_text
from mmengine.logging import print_log

from ..images import DataError
from ..safe_reader import printable

Entry = dict[str, Any]
CROWD = "iscrowd is 1"
MARGIN, MAX_SHARE = 1.1, 0.2  # boxes beyond MARGIN times the image size are counted; share of images with such boxes


class CocoFile(NamedTuple):
    """Contents of an annotation file.

    Attributes:
        path: the file.
        categories: its categories, in order.
        count: number of annotations, without those of categories that the config does not use.
        dropped: number of annotations that mmdetection drops, by reason.
        first: id of the first dropped annotation.
        far: share of the annotated images that have a box far outside the image.
    """

    path: str
    categories: list[Entry]
    count: int
    dropped: Counter[str]
    first: int | None
    far: float


# ---- structure of the file


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _is_box(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 4 and all(map(_is_number, x))


Field = tuple[Callable[[Any], bool], str]  # test of a value, and a description of valid values
INTEGER: Field = (lambda x: type(x) is int, "an integer")
TEXT: Field = (lambda x: isinstance(x, str) and bool(x), "a text")
PIXELS: Field = (lambda x: _is_number(x) and x > 0, "a number of pixels")
FIELDS: dict[str, dict[str, Field]] = {
    "images": {"id": INTEGER, "file_name": TEXT, "width": PIXELS, "height": PIXELS},
    "categories": {"id": INTEGER, "name": TEXT},
    "annotations": {
        "id": INTEGER,
        "image_id": INTEGER,
        "category_id": INTEGER,
        "bbox": (_is_box, "[x, y, width, height]"),
        "area": (_is_number, "width * height"),
    },
}
SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}


def is_coco(cls: Any) -> bool:
    """Return True for dataset classes that read their file as CocoDataset of mmdetection does."""
    methods = [getattr(cls, name, None) for name in ("load_data_list", "parse_data_info")]
    names = [getattr(method, "__qualname__", "").partition(".")[0] for method in methods]
    return names == ["CocoDataset"] * 2 and cls.COCOAPI.__name__ == "COCO"


def read_coco(dataset: Any) -> CocoFile:
    """Read and check the annotation file of a CocoDataset, whose data need not be loaded.

    Raises:
        DataError: the file is no valid COCO file.
    """
    file = dataset.ann_file
    try:
        content = json.loads(get_text(file, backend_args=dataset.backend_args))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: no valid JSON ({error}). The file may be truncated. Export it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a {type(content).__name__}. Use a COCO file with {', '.join(FIELDS)}.")
    for name in FIELDS:
        if name == "annotations" and dataset.test_mode:
            content.setdefault(name, [])  # not published for many test sets
        _check_entries(content.get(name), name, file)
    images = {image["id"]: image for image in content["images"]}
    if any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms):
        for annotation in content["annotations"]:
            if problem := _mask_problem(annotation.get("segmentation"), images.get(annotation["image_id"])):
                raise DataError(f"{file}: annotation {annotation['id']}: {problem}")
    return _count(file, content, images, dataset.metainfo.get("classes"))


def _check_entries(entries: Any, name: str, file: str) -> None:
    """Raise DataError if a list of an annotation file is missing, or an entry lacks a field or has an invalid one."""
    if not isinstance(entries, list):
        raise DataError(f"{file}: has no list {name!r}. Use a COCO file with {', '.join(FIELDS)}.")
    ids = set()
    for i, entry in enumerate(entries):
        label = f"{SINGULAR[name]} at index {i}"
        if not isinstance(entry, dict):
            raise DataError(printable(f"{file}: {label}: is {entry!r}. Use an object with {', '.join(FIELDS[name])}."))
        if type(entry.get("id")) is int:
            label = f"{SINGULAR[name]} {entry['id']}"
        for key, (is_valid, expected) in FIELDS[name].items():
            if entry.get(key) is None:
                raise DataError(f"{file}: {label}: has no {key}. Add it ({expected}).")
            if not is_valid(entry[key]):
                raise DataError(printable(f"{file}: {label}: {key} is {entry[key]!r}. Use {expected}.", 500))
        if entry["id"] in ids:
            raise DataError(f"{file}: {label}: its id is not unique. Give each of the {name} another id.")
        ids.add(entry["id"])
        if entry.get("iscrowd", 0) not in (0, 1):
            raise DataError(printable(f"{file}: {label}: iscrowd is {entry['iscrowd']!r}. Use 0 or 1.", 500))


def _mask_problem(mask: Any, image: Entry | None) -> str:
    """Describe the problem of a segmentation of an image; empty if it is valid."""
    if not mask or mask == [[]]:
        return "has no segmentation. Add polygons or run lengths, or load boxes only (with_mask=False)."
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                length = len(polygon) if isinstance(polygon, list) else "no"
                return f"a polygon has {length} coordinates. Use three points (six numbers) or more."
            if not all(map(_is_number, polygon)):
                return "a coordinate of a polygon is not a finite number. Replace it."
        return ""
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), list | str) or "size" not in mask:
        return "the segmentation is neither polygons nor run lengths. Use a list, or a dictionary of size and counts."
    if image and mask["size"] != [image["height"], image["width"]]:
        return f"the mask has size {mask['size']}. Use that of the image, {[image['height'], image['width']]}."
    return ""


# ---- instances


def _count(file: str, content: Entry, images: dict[int, Entry], classes: Any) -> CocoFile:
    """Count the annotations that mmdetection drops, without those of categories that the config does not use."""
    categories = {category["id"]: category["name"] for category in content["categories"]}
    count, dropped, first, far = 0, Counter(), None, set()
    classes = None if classes is None else set(classes)
    for annotation in content["annotations"]:
        name, image = categories.get(annotation["category_id"]), images.get(annotation["image_id"])
        if name is not None and classes is not None and name not in classes:
            continue
        count += 1
        if image:
            x, y, width, height = annotation["bbox"]
            if x + width > MARGIN * image["width"] or y + height > MARGIN * image["height"]:
                far.add(image["id"])
        reason = "category_id is not in categories" if name is None else _drop_reason(annotation, image)
        if reason:
            dropped[reason] += 1
            first = annotation["id"] if first is None else first
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    return CocoFile(file, content["categories"], count, dropped, first, len(far) / max(len(annotated), 1))


def _drop_reason(annotation: Entry, image: Entry | None) -> str:
    """Return why mmdetection drops or ignores an annotation of a known category; empty if it does not."""
    if image is None:
        return "image_id is not in images"
    x, y, width, height = annotation["bbox"]
    reasons = {
        "ignore is set": annotation.get("ignore", False),
        "width or height of the box is negative": min(width, height) < 0,
        "the box is in 0..1, not in pixels": 0 < min(width, height) < 1 and max(x, y, x + width, y + height) <= 1.01,
        "the box is smaller than a pixel": min(width, height) < 1,
        "the box is outside the image": x >= image["width"] or y >= image["height"] or min(x + width, y + height) <= 0,
        "area is 0 or negative": annotation["area"] <= 0,
        CROWD: annotation.get("iscrowd", 0),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def check_instances(coco: CocoFile, kept: Counter[str], *, required: bool) -> None:
    """Compare an annotation file with the instances that mmdetection keeps.

    Args:
        coco: the file.
        kept: number of instances per class in the dataset, without crowds.
        required: raise DataError if no instance is left; else only log a warning.
    """
    reasons = ", ".join(f"{count}: {reason}" for reason, count in coco.dropped.most_common())
    if not kept.total():
        problem = f"none of {coco.count} annotations is left ({reasons}). Fix annotation {coco.first} and all others."
        if not reasons:
            problem = f"none of {coco.count} annotations is left. Annotate images of the classes in metainfo.classes."
        if required:
            raise DataError(f"{coco.path}: {problem}")
        _warn(f"{coco.path}: {problem}")
        return
    left_out = coco.count - coco.dropped[CROWD] - kept.total()
    if left_out > 0:
        filtered = left_out - coco.dropped.total() + coco.dropped[CROWD]
        reasons += f"{', ' * bool(reasons)}{filtered}: the image is filtered out" * (filtered > 0)
        _warn(f"{coco.path}: {left_out} of {coco.count} annotations are left out ({reasons}). Fix them if needed.")
    if empty := [name for name, count in kept.items() if not count]:
        _warn(f"{coco.path}: no instances of {printable(', '.join(empty), 300)}. Add some, or remove the classes.")
    if coco.far > MAX_SHARE:
        problem = f"boxes reach far outside {coco.far:.0%} of the annotated images"
        _warn(f"{coco.path}: {problem}. Write them as x, y, width, height instead of x1, y1, x2, y2.")


def _warn(text: str) -> None:
    print_log(text, "current", 30)


def repair_ground_truth(coco: Any) -> None:
    """Complete annotations that pycocotools evaluates, in memory: no `iscrowd` means 0, and ids start at 1.

    pycocotools reads the id 0 as "no match".
    """
    annotations = coco.dataset.get("annotations", [])
    shift = 1 - min((annotation["id"] for annotation in annotations), default=1)
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        annotation["id"] += max(shift, 0)
    coco.anns = {annotation["id"]: annotation for annotation in annotations}
