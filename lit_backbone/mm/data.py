"""Looks at data sets and their files, so that a mistake there ends a run in one line that names the place."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import Compose, LoadAnnotations, LoadImageFromFile
from mmengine.fileio import load
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..checkpoints import name_some
from ..images import DataError


def leaves(dataset: Any) -> list[Any]:
    """The data sets within a loader and wrappers such as ConcatDataset, or those within their configs."""
    inner = dataset if isinstance(dataset, dict) else {k: getattr(dataset, k, None) for k in ("dataset", "datasets")}
    parts = inner.get("datasets") or [inner.get("dataset")]
    return [dataset] if parts == [None] else [leaf for part in parts for leaf in leaves(part)]


def check_classes(config: dict[str, Any]) -> None:
    """Raise DataError if the classes in a data set's config are one string, which has letters for items, or have
    too few colours."""
    classes, palette = ((config.get("metainfo") or {}).get(key) for key in ("classes", "palette"))
    if isinstance(classes, str) and not os.path.isfile(classes):  # mmengine takes a file of names, too
        raise DataError(f'metainfo.classes={classes!r}: is a string; a single class needs a comma: ("{classes}",)')
    if isinstance(palette, list) and classes and not isinstance(classes, str) and len(palette) < len(classes):
        raise DataError(f"metainfo.palette: has {len(palette)} colours for {len(classes)} classes; give each its own")


def check_heads(model: nn.Module, classes: Sequence[str] | None) -> None:
    """Raise DataError if a detector's or segmentor's head is not for as many classes as the data have, if these say."""
    for name, module in model.named_modules():
        number = getattr(module, "num_classes", None)
        if not classes or number in (None, len(classes)):
            continue
        if re.search(r"(bbox|mask|decode)_head(\.\d+)?$", name):  # in a cascade they are numbered
            key = f"model.{name.removeprefix('module.')}.num_classes"
            raise DataError(f"{key}={number}: the data has {len(classes)} classes; set it so")


def check_dataset(dataset: Any) -> None:
    """Raise DataError if a category or file of a data set is missing, or all images are; opens no image."""
    source = getattr(dataset, "ann_file", "") or dataset.data_root
    classes, found = dataset.metainfo.get("classes"), getattr(dataset, "cat_ids", None)
    # of data sets that know their classes, whose files are large, only COCO's numbers are compared
    known = list(classes or ()) == list(dataset.METAINFO.get("classes") or ())
    if known and type(dataset).__name__ == "CocoDataset":
        known = bool(found) and found[-1] == len(found) + 10  # COCO's own 80 categories go to number 90
    if found is not None and not known:
        categories = load(dataset.ann_file)["categories"]
        own, names = [category["name"] for category in categories], {c["id"]: c["name"] for c in categories}
        if twice := name_some([name for name in classes if own.count(name) > 1]):
            raise DataError(f"{source}: has several categories named {twice}; give each its own name there")
        if odd := name_some([name for name in classes if name not in names.values()]):
            raise DataError(f"{source}: has no category {odd}; name its own in metainfo.classes: {', '.join(own)}")
        if list(classes) != (order := [names[number] for number in found]):  # as mmdetection numbers them
            raise DataError(f"{source}: has the categories in another order; in metainfo.classes, write {order}")
    if (suffix := getattr(dataset, "img_suffix", "")) and not dataset.ann_file:  # it lists a folder
        folder = dataset.data_prefix["img_path"]
        names = [name for _, _, names in os.walk(folder) for name in names if not name.startswith(".")]
        if not len(dataset):
            there = sorted({Path(name).suffix for name in names})
            raise DataError(f"{folder}: no file ends in the data set's img_suffix, {suffix}; there are {there}")
        for name in names:  # mmsegmentation leaves it out
            if not name.endswith(suffix) and _spelt(name).endswith(_spelt(suffix)):
                raise DataError(f"{folder}: {name} does not end in the data set's img_suffix, {suffix}; rename it")
    if not len(dataset):
        raise DataError(f"{source}: holds no image with annotations; see data_root and data_prefix of the data set")
    names_in = cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    missing = []
    for i in tqdm(range(len(dataset)), f"checking {source}", delay=2, disable=None):
        info = dataset.get_data_info(i)
        for path in filter(None, (info.get("img_path"), info.get("seg_map_path"))):
            folder, name = os.path.split(path)
            if "://" not in path and name not in names_in(folder):
                missing.append(path)
    if missing:
        raise DataError(f"{missing[0]}: no such file; {source} names {len(missing)} files that are not there")


def _spelt(name: str) -> str:
    """A file's name as all who write JPEG files differently might have it."""
    return name.lower().replace(".jpeg", ".jpg")


def check_metric(dataset: Any, metric: Any) -> None:
    """Raise DataError if a metric of COCO compares the images of a data set with the annotations of others, or one that
    writes maps would give two images' the same name."""
    if getattr(metric, "output_dir", None):
        counts = Counter(Path(dataset.get_data_info(i)["img_path"]).stem for i in range(len(dataset)))
        name, count = counts.most_common(1)[0]
        if count > 1:
            raise DataError(f"--out: {count} images are named {name}, in several folders; test these one by one")
    if truth := getattr(metric, "_coco_api", None):
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            name = truth.imgs.get(info["img_id"], {}).get("file_name")
            if not name or os.path.basename(info["img_path"]) != os.path.basename(name):
                key = "the evaluator's ann_file"
                raise DataError(f"{info['img_path']}: {key} has {name} in its place; name that of the data set there")


class Loading:
    """A step of a pipeline that reads an image, its annotations or mask; raises DataError that names a bad file."""

    def __init__(self, step: LoadImageFromFile | LoadAnnotations, dataset: Any):
        self.step = step
        self.classes = len(dataset.metainfo.get("classes") or ()) if hasattr(dataset, "label_map") else 0  # of masks
        self.ignored, self.first = getattr(dataset, "ignore_index", 255), int(getattr(dataset, "reduce_zero_label", 0))

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        path = isinstance(self.step, LoadAnnotations) and results.get("seg_map_path") or results["img_path"]
        size = results.get("height"), results.get("width")  # by COCO's annotations, which may not know it
        try:
            loaded = self.step(results)
        except Exception as error:  # decoders fail in many ways
            raise DataError(f"{path}: it, or its annotations, cannot be read ({error!r})") from error
        if isinstance(self.step, LoadImageFromFile) and all(size) and loaded and loaded["ori_shape"] != size:
            problem = f"has height and width {loaded['ori_shape']}, its annotations say {size}"
            raise DataError(f"{path}: {problem}; mend these, or turn the picture as they have it")
        if self.classes and loaded and "gt_seg_map" in loaded:
            self.check_mask(loaded["gt_seg_map"], loaded["ori_shape"], path)
        return loaded

    def check_mask(self, mask: np.ndarray, shape: tuple[int, int], path: str) -> None:
        """Raise DataError if a mask `(H, W)` is none, or does not fit its image's `shape` or the classes."""
        if os.path.isfile(path):
            with Image.open(path) as file:
                if file.mode[0] in "IF":  # mmsegmentation would take their number modulo 256
                    raise DataError(f"{path}: has more than 8 bits a pixel; write its class numbers with 8")
        if mask.ndim != 2:
            raise DataError(f"{path}: has {mask.shape[-1]} channels; a mask has one, of class numbers")
        if mask.shape != shape:
            raise DataError(f"{path}: has height and width {mask.shape}, its image {shape}")
        odd = mask[(mask >= self.classes) & (mask != self.ignored)]
        if odd.size:
            span = f"{self.first} to {self.classes - 1 + self.first}, or {self.ignored} for none"
            raise DataError(f"{path}: holds {odd[0] + self.first}; by metainfo.classes it is {span}")


def name_files(pipeline: Compose, dataset: Any) -> None:
    """Make the loading steps of a data set's pipeline name the files that they cannot use."""
    for i, step in enumerate(pipeline.transforms):
        for routine in getattr(step, "subroutines", ()):  # of TestTimeAug
            name_files(routine, dataset)
        if isinstance(step, (LoadImageFromFile, LoadAnnotations)):
            pipeline.transforms[i] = Loading(step, dataset)
