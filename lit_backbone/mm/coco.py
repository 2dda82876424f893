"""Checks of COCO annotation files, and of the instances that mmdetection keeps from them."""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from mmengine.fileio import get_text
from mmengine.logging import print_log

from ..images import DataError
from ..safe_reader import preview, printable

Entry = dict[str, Any]
CROWD = "iscrowd is 1"
MARGIN, MAX_SHARE = 1.1, 0.2  # boxes beyond MARGIN times the image size are counted; share of images with such boxes


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
    """Categories of an annotation file, and its annotations of the categories that the config uses."""

    path: str
    categories: list[Entry]
    count: int
    dropped: Counter[str]  # number of annotations that mmdetection drops, by reason
    far: float  # share of the annotated images that have a box far outside the image


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
    file, classes = dataset.ann_file, dataset.metainfo.get("classes")
    content = read_annotations(file, dataset.backend_args, dataset.test_mode, with_mask)
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    unused = {i for i, name in names.items() if classes is not None and name not in classes}
    annotations = [annotation for annotation in content["annotations"] if annotation["category_id"] not in unused]
    start, size = np.array([x["bbox"] for x in annotations], float).reshape(-1, 2, 2).swapaxes(0, 1)  # (N, 2) each
    end, limit = start + size, np.array([images.get(x["image_id"], (np.nan,) * 2) for x in annotations]).reshape(-1, 2)

    def where(test: Callable[[Entry], Any]) -> np.ndarray:
        return np.array([test(annotation) for annotation in annotations], bool)

    reasons = {  # the first that applies is counted
        "category_id is not in categories": where(lambda x: x["category_id"] not in names),
        "image_id is not in images": where(lambda x: x["image_id"] not in images),
        "ignore is set": where(lambda x: x.get("ignore")),
        "the box is smaller than a pixel (are coordinates in 0..1?)": (size < 1).any(1),
        "the box is outside the image": ((start >= limit) | (end <= 0)).any(1),
        "area is 0 or negative": where(lambda x: x["area"] <= 0),
        CROWD: where(lambda x: x.get("iscrowd")),
    }
    dropped = Counter(filter(None, np.select([*reasons.values()], [*reasons], "").tolist()))
    image_ids, is_far = np.array([x["image_id"] for x in annotations]), (end > MARGIN * limit).any(1)
    far = len(np.unique(image_ids[is_far])) / max(len(np.unique(image_ids)), 1)
    return CocoFile(file, content["categories"], len(annotations), dropped, far)


def check_instances(coco: CocoFile, kept: Counter[str], *, required: bool) -> None:
    """Warn if mmdetection keeps other instances, counted per class, than the file has.

    Raise DataError if it keeps none and `required`.
    """
    total, empty = kept.total(), [name for name, count in kept.items() if not count]
    reasons = coco.dropped + Counter({"the image is filtered out": coco.count - coco.dropped.total() - total})
    counts = f"{coco.count} annotations" + "".join(f", {count}: {reason}" for reason, count in reasons.most_common())
    format = "Write them as x, y, width, height instead of x1, y1, x2, y2."
    problems = {
        f"no instance of metainfo.classes is left ({counts}). Fix or add annotations.": not total,
        f"annotations are left out ({counts}). Fix them if needed.": coco.count - coco.dropped[CROWD] > total > 0,
        f"no instances of {printable(', '.join(empty), 300)}. Add some, or remove the classes.": total and empty,
        f"boxes reach far outside {coco.far:.0%} of the annotated images. {format}": total and coco.far > MAX_SHARE,
    }
    for problem in (problem for problem, applies in problems.items() if applies):
        if required and not total:
            raise DataError(f"{coco.path}: {problem}")
        print_log(f"{coco.path}: {problem}", "current", 30)


def repair_ground_truth(coco: Any) -> None:
    """Complete annotations that pycocotools evaluates, in memory: no `iscrowd` means 0, and ids start at 1.

    pycocotools reads the id 0 as "no match".
    """
    annotations = coco.dataset.get("annotations", [])
    shift = max(1 - min((annotation["id"] for annotation in annotations), default=1), 0)
    for annotation in annotations:
        annotation.update(id=annotation["id"] + shift, iscrowd=annotation.get("iscrowd") or 0)
    coco.anns = {annotation["id"]: annotation for annotation in annotations}
