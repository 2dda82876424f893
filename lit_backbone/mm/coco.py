"""Checks of COCO annotation files, and of the instances that mmdetection keeps from them."""

import json
import logging
import math
from collections import Counter
from typing import Any, NamedTuple

from mmengine.fileio import get_text
from mmengine.logging import print_log

from ..images import DataError
from ..safe_reader import preview, printable

Entry = dict[str, Any]
CROWD = "iscrowd is 1"
MARGIN, MAX_SHARE = 1.1, 0.2  # warn if boxes end beyond MARGIN times the image size in more than this share of images


def _are_numbers(*values: Any) -> bool:
    return all(type(x) in (int, float) and math.isfinite(x) for x in values)


def _is_mask(x: Any) -> bool:
    """Return True for run lengths, and for polygons of three or more points. pycocotools reads two points as a box."""
    if isinstance(x, dict):
        return isinstance(x.get("counts"), list | str) and isinstance(x.get("size"), list)
    polygons = x if isinstance(x, list) and x else [None]
    return all(isinstance(y, list) and len(y) > 5 and len(y) % 2 == 0 and _are_numbers(*y) for y in polygons)


INTEGER = (lambda x: type(x) is int, "an integer")  # test of a value, and a description of valid values
TEXT = (lambda x: isinstance(x, str) and x, "a text")
PIXELS = (lambda x: _are_numbers(x) and x > 0, "a number of pixels")
BOX = (lambda x: isinstance(x, list) and len(x) == 4 and _are_numbers(*x), "[x, y, width, height]")
AREA = (_are_numbers, "width * height")
FLAG = (lambda x: x in (None, 0, 1), "0 or 1")
MASK = (_is_mask, "polygons of three or more points, or run lengths, or set with_mask=False")
FIELDS = {
    "images": dict(id=INTEGER, file_name=TEXT, width=PIXELS, height=PIXELS),
    "categories": dict(id=INTEGER, name=TEXT),
    "annotations": dict(id=INTEGER, image_id=INTEGER, category_id=INTEGER, bbox=BOX, area=AREA, iscrowd=FLAG),
}


class CocoFile(NamedTuple):
    """Content of an annotation file: images and names of categories by id, and annotations of the config's classes."""

    path: str
    images: dict[int, Entry]
    categories: dict[int, str]
    annotations: list[Entry]


def read_annotations(file: str, backend_args: Any = None, test_mode: bool = True, with_mask: bool = False) -> Entry:
    """Read an annotation file. Raise DataError if an entry lacks a field or has an invalid one."""
    try:
        content = json.loads(get_text(file, backend_args=backend_args))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: no valid JSON ({error}). The file may be truncated. Export it again.") from error
    if test_mode and isinstance(content, dict):
        content.setdefault("annotations", [])  # not published for many test sets
    for name, fields in FIELDS.items():
        fields = fields | (dict(segmentation=MASK) if with_mask and name == "annotations" else {})
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{file}: has no list {name!r}. Use a COCO file with {', '.join(FIELDS)}.")
        for i, entry in enumerate(entries):
            for key, (is_valid, expected) in fields.items():
                if not is_valid(x := entry.get(key) if isinstance(entry, dict) else None):
                    actual = "missing" if x is None else printable(repr(x), 200)
                    raise DataError(f"{file}: {name}[{i}].{key} is {actual}. Use {expected}.")
        if duplicates := [i for i, count in Counter(entry["id"] for entry in entries).items() if count > 1]:
            raise DataError(f"{file}: {name}: ids are not unique ({preview(duplicates)}). Renumber the {name}.")
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for i, annotation in enumerate(content["annotations"] if with_mask else ()):
        mask, expected = annotation["segmentation"], sizes.get(annotation["image_id"])
        if isinstance(mask, dict) and expected and mask["size"] != expected:
            raise DataError(f"{file}: annotations[{i}].segmentation.size is {mask['size']}. Use {expected}.")
    return content


def read_coco(dataset: Any) -> CocoFile | None:
    """Read and check the file of a CocoDataset, whose data need not be loaded; return None for other datasets."""
    methods = [getattr(dataset, name, None) for name in ("load_data_list", "parse_data_info")]
    is_coco = {getattr(method, "__qualname__", "").partition(".")[0] for method in methods} == {"CocoDataset"}
    if not is_coco or dataset.COCOAPI.__name__ != "COCO":  # LVIS and panoptic files have other fields
        return None
    with_mask = any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms)
    content = read_annotations(dataset.ann_file, dataset.backend_args, dataset.test_mode, with_mask)
    images, categories = ({entry["id"]: entry for entry in content[key]} for key in ("images", "categories"))
    names, classes = {i: category["name"] for i, category in categories.items()}, dataset.metainfo.get("classes")
    unused = {i for i, name in names.items() if classes is not None and name not in classes}
    annotations = [entry for entry in content["annotations"] if entry["category_id"] not in unused]
    return CocoFile(dataset.ann_file, images, names, annotations)


def _drop_reason(annotation: Entry, coco: CocoFile) -> str:
    """Return the first reason for which mmdetection drops an annotation, or an empty string."""
    x, y, width, height = annotation["bbox"]
    image = coco.images.get(annotation["image_id"], {"width": math.inf, "height": math.inf})
    is_outside = x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0
    reasons = {
        "category_id is not in categories": annotation["category_id"] not in coco.categories,
        "image_id is not in images": annotation["image_id"] not in coco.images,
        "ignore is set": annotation.get("ignore"),
        "the box is smaller than a pixel (are coordinates in 0..1?)": width < 1 or height < 1,
        "the box is outside the image": is_outside,
        "area is 0 or negative": annotation["area"] <= 0,
        CROWD: annotation.get("iscrowd"),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _is_far_outside(annotation: Entry, coco: CocoFile) -> bool:
    """Return True if a box reaches far beyond the right or bottom of its image."""
    x, y, width, height = annotation["bbox"]
    image = coco.images.get(annotation["image_id"])
    return bool(image) and (x + width > MARGIN * image["width"] or y + height > MARGIN * image["height"])


def check_instances(coco: CocoFile, kept: Counter[str], *, required: bool) -> None:
    """Warn if mmdetection keeps other instances, counted per class, than the file has.

    Raise DataError if it keeps none and `required`.
    """
    count, total = len(coco.annotations), kept.total()
    reasons = Counter(filter(None, (_drop_reason(annotation, coco) for annotation in coco.annotations)))
    num_crowd, num_filtered = reasons[CROWD], count - reasons.total() - total
    reasons += Counter({"the image is filtered out": num_filtered})
    counts = f"{count} annotations" + "".join(f", {number}: {reason}" for reason, number in reasons.most_common())

    def warn(problem: str) -> None:
        print_log(f"{coco.path}: {problem}", "current", logging.WARNING)

    if not total:
        problem = f"no instance of metainfo.classes is left ({counts}). Fix or add annotations."
        if required:
            raise DataError(f"{coco.path}: {problem}")
        return warn(problem)
    if count - num_crowd > total:
        warn(f"annotations are left out ({counts}). Fix them if needed.")
    if empty := [name for name, number in kept.items() if not number]:
        warn(f"no instances of {printable(', '.join(empty), 300)}. Add some, or remove the classes.")
    annotated = {annotation["image_id"] for annotation in coco.annotations}
    far = {annotation["image_id"] for annotation in coco.annotations if _is_far_outside(annotation, coco)}
    if len(far) > MAX_SHARE * len(annotated):
        advice = "Write them as x, y, width, height instead of x1, y1, x2, y2."
        warn(f"boxes reach far outside {len(far) / len(annotated):.0%} of the annotated images. {advice}")


def repair_ground_truth(coco: Any) -> None:
    """Complete annotations that pycocotools evaluates, in memory: no `iscrowd` means 0, and ids start at 1.

    pycocotools reads the id 0 as "no match".
    """
    annotations = coco.dataset.get("annotations", [])
    shift = max(1 - min((annotation["id"] for annotation in annotations), default=1), 0)
    for annotation in annotations:
        annotation.update(id=annotation["id"] + shift, iscrowd=annotation.get("iscrowd") or 0)
    coco.anns = {annotation["id"]: annotation for annotation in annotations}
