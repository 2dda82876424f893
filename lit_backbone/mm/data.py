"""Checks of datasets and their files. A mistake stops the run with a one-line error that names the file or key."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import Compose, LoadAnnotations, LoadImageFromFile
from mmengine.fileio import load
from mmengine.logging import print_log
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..images import DataError
from ..safe_reader import preview, printable
from ..visualize import evenly_spaced
from .coco import CocoFile, check_instances

MAX_MASKS = 3000  # masks that are read before the first step; more if a class does not occur in them


def unwrap_datasets(dataset: Any) -> list[Any]:
    """List the datasets in a dataloader and wrappers such as ConcatDataset, or in their configs."""
    inner = dataset if isinstance(dataset, dict) else {k: getattr(dataset, k, None) for k in ("dataset", "datasets")}
    children = inner.get("datasets") or [inner.get("dataset")]
    return [dataset] if children == [None] else [leaf for child in children for leaf in unwrap_datasets(child)]


# ---- classes


def check_metainfo(configs: Sequence[dict[str, Any]]) -> None:
    """Raise DataError if the classes in a dataset config are a single string or the palette has too few colors."""
    for config in configs:
        classes, palette = ((config.get("metainfo") or {}).get(key) for key in ("classes", "palette"))
        if isinstance(classes, str) and not os.path.isfile(classes):  # mmengine also accepts a file of names
            raise DataError(f'metainfo.classes={classes!r}: expected a tuple. Write ("{classes}",) for a single class.')
        if isinstance(palette, list) and classes and not isinstance(classes, str) and len(palette) < len(classes):
            raise DataError(f"metainfo.palette: {len(palette)} colors for {len(classes)} classes. Add the others.")


def check_num_classes(model: nn.Module, classes: Sequence[str] | None) -> None:
    """Raise DataError if a head of a detector or segmentor is for another number of classes than the data."""
    for name, module in model.named_modules():
        num_classes = getattr(module, "num_classes", None)
        if not classes or num_classes in (None, len(classes)):
            continue
        if re.search(r"(bbox|mask|decode)_head(\.\d+)?$", name):  # a cascade has numbered heads
            key = f"model.{name.removeprefix('module.')}.num_classes"
            raise DataError(f"{key}={num_classes}: the data has {len(classes)} classes. Set {key}={len(classes)}.")


def check_equal_classes(datasets: Sequence[Any]) -> None:
    """Raise DataError if datasets differ in their class names or the order of these."""
    classes = [tuple(dataset.metainfo.get("classes") or ()) for dataset in datasets]
    if mismatch := [names for names in classes if names != classes[0]]:
        problem = f"datasets have different classes, {classes[0]} and {mismatch[0]}"
        raise DataError(printable(f"metainfo.classes: {problem}. Use the same classes in the same order.", 500))


def _check_categories(dataset: Any) -> None:
    """Compare the categories in a COCO file with the classes in the config, in the order that mmdetection uses."""
    file, classes, ids = dataset.ann_file, list(dataset.metainfo.get("classes") or ()), dataset.cat_ids
    if classes == list(dataset.METAINFO.get("classes") or ()):  # a public dataset, whose large file is not read again
        if type(dataset).__name__ != "CocoDataset" or (len(ids), ids[-1:]) == (80, [90]):  # the last id in COCO is 90
            return
    coco: CocoFile | None = getattr(dataset, "coco_file", None)
    categories = coco.categories if coco else load(file)["categories"]
    names, by_id = [category["name"] for category in categories], {c["id"]: c["name"] for c in categories}
    if duplicates := preview([name for name in classes if names.count(name) > 1]):
        raise DataError(f"{file}: several categories are named {duplicates}. Give each category a unique name.")
    if missing := preview([name for name in classes if name not in names]):
        raise DataError(f"{file}: category {missing} is missing. Set metainfo.classes to {', '.join(names)}.")
    if classes != (order := [by_id[i] for i in ids]):
        raise DataError(f"{file}: the categories are in another order. Set metainfo.classes to {order}.")


# ---- files


def check_dataset(dataset: Any, required: bool = True) -> None:
    """Raise DataError if a category or file is missing or the dataset is empty. No image is opened.

    Args:
        dataset: a dataset of mmdetection or mmsegmentation.
        required: raise DataError if a COCO file has no usable instance; else only log a warning.
    """
    source = getattr(dataset, "ann_file", "") or dataset.data_root
    if getattr(dataset, "cat_ids", None) is not None:
        _check_categories(dataset)
    if getattr(dataset, "img_suffix", "") and not dataset.ann_file:
        _check_suffixes(dataset)
    coco = None if getattr(dataset, "_indices", None) else getattr(dataset, "coco_file", None)
    if coco and not len(dataset):
        check_instances(coco, Counter(), required=required)
    if not len(dataset):
        raise DataError(f"{source}: no image with annotations. Check data_root and data_prefix of the dataset.")
    classes = dataset.metainfo.get("classes") or ()
    kept = Counter(dict.fromkeys(classes, 0))
    list_folder = cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    missing = []
    for i in tqdm(range(len(dataset)), f"checking {source}", delay=2, disable=None):
        info = dataset.get_data_info(i)
        if coco:
            kept.update(classes[x["bbox_label"]] for x in info["instances"] if not x["ignore_flag"])
        for path in filter(None, (info.get("img_path"), info.get("seg_map_path"))):
            folder, name = os.path.split(path)
            if "://" not in path and name not in list_folder(folder):
                missing.append(path)
    if missing:
        raise DataError(f"{missing[0]}: no such file. {source} refers to {len(missing)} missing files.")
    if coco:
        check_instances(coco, kept, required=required)


def _check_suffixes(dataset: Any) -> None:
    """Check that a dataset that lists a folder does not skip images because of another suffix."""
    folder, suffix = dataset.data_prefix["img_path"], dataset.img_suffix
    names = [name for _, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    if not len(dataset):
        suffixes = sorted({Path(name).suffix for name in names})
        raise DataError(f"{folder}: no file ends in img_suffix={suffix!r}. Set img_suffix to one of {suffixes}.")
    for name in names:
        if not name.endswith(suffix) and _normalize_suffix(name).endswith(_normalize_suffix(suffix)):
            raise DataError(f"{folder}: {name} does not end in img_suffix={suffix!r}. Rename the file.")


def _normalize_suffix(name: str) -> str:
    """Lower-case a file name and map .jpeg to .jpg."""
    return name.lower().replace(".jpeg", ".jpg")


def check_metric(dataset: Any, metric: Any) -> None:
    """Raise DataError if output files would share a name or a COCO metric has the annotations of other images."""
    if getattr(metric, "output_dir", None):
        counts = Counter(Path(dataset.get_data_info(i)["img_path"]).stem for i in range(len(dataset)))
        name, count = counts.most_common(1)[0]
        if count > 1:
            raise DataError(
                f"--out: {count} images in different folders are named {name}. Test each folder separately."
            )
    if coco := getattr(metric, "_coco_api", None):
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            name = coco.imgs.get(info["img_id"], {}).get("file_name")
            if not name or os.path.basename(info["img_path"]) != os.path.basename(name):
                advice = "Set it to the dataset's ann_file."
                raise DataError(f"{info['img_path']}: image is {name} in the evaluator's ann_file. {advice}")


# ---- images and annotations when they are loaded


class CheckedStep:
    """Wrap a pipeline step that loads an image or annotations. Errors are DataErrors that name the file."""

    def __init__(self, step: LoadImageFromFile | LoadAnnotations, dataset: Any):
        self.step = step
        self.num_classes = len(dataset.metainfo.get("classes") or ()) if hasattr(dataset, "label_map") else 0
        self.ignore_index = getattr(dataset, "ignore_index", 255)
        self.first_class = int(getattr(dataset, "reduce_zero_label", 0))  # in the file

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Run the step on `results` and check what it loaded."""
        path = isinstance(self.step, LoadAnnotations) and results.get("seg_map_path") or results["img_path"]
        annotated_size = results.get("height"), results.get("width")
        try:
            loaded = self.step(results)
        except Exception as error:  # decoders raise many types of exceptions
            raise DataError(f"{path}: image or annotations are unreadable ({error!r}). Repair the file.") from error
        if not loaded:
            return loaded
        if isinstance(self.step, LoadImageFromFile) and all(annotated_size) and loaded["ori_shape"] != annotated_size:
            problem = f"height and width are {loaded['ori_shape']}, but {annotated_size} in the annotations"
            raise DataError(f"{path}: {problem}. Fix the annotations, or rotate the image to match.")
        if self.num_classes and "gt_seg_map" in loaded:
            self._check_mask(loaded["gt_seg_map"], loaded["ori_shape"], path)
        return loaded

    def _check_mask(self, mask: np.ndarray, shape: tuple[int, int], path: str) -> None:
        """Check the type, shape and values of a mask `(H, W)`."""
        if os.path.isfile(path):
            with Image.open(path) as file:
                if file.mode[0] in "IF":  # mmsegmentation would truncate the values to 8 bits
                    raise DataError(f"{path}: more than 8 bits per pixel. Save the class indices with 8 bits.")
        if mask.ndim != 2:
            raise DataError(f"{path}: {mask.shape[-1]} channels. Save the class indices in a single channel.")
        if mask.shape != shape:
            raise DataError(f"{path}: height and width are {mask.shape}, but {shape} in the image. Replace the mask.")
        invalid = mask[(mask >= self.num_classes) & (mask != self.ignore_index)]
        if invalid.size:
            first, last = self.first_class, self.first_class + self.num_classes - 1
            advice = (
                f"Use {first} to {last} for the classes in metainfo.classes and {self.ignore_index} to ignore a pixel."
            )
            raise DataError(f"{path}: invalid class index {invalid[0] + first}. {advice}")


def check_loaded_files(pipeline: Compose, dataset: Any) -> None:
    """Wrap the loading steps of a dataset's pipeline in :class:`CheckedStep`, in place."""
    for i, step in enumerate(pipeline.transforms):
        for branch in getattr(step, "subroutines", ()):  # TestTimeAug has one pipeline per augmentation
            check_loaded_files(branch, dataset)
        if isinstance(step, (LoadImageFromFile, LoadAnnotations)):
            pipeline.transforms[i] = CheckedStep(step, dataset)


# ---- pixels per class


def check_masks(dataset: Any, *, required: bool) -> None:
    """Count the pixels of each class in the masks of a dataset, which must be checked by :class:`CheckedStep`.

    Args:
        dataset: a dataset of mmsegmentation.
        required: raise DataError if a class does not occur; else only log a warning.

    Raises:
        DataError: an image or mask is invalid, or there are no classes to tell apart.
    """
    steps = [step for step in dataset.pipeline.transforms if isinstance(step, CheckedStep)]
    if not any(step.num_classes and isinstance(step.step, LoadAnnotations) for step in steps):
        return
    classes, source = dataset.metainfo["classes"], dataset.ann_file or dataset.data_prefix["seg_map_path"]
    if len(classes) == 1:
        raise DataError(f"metainfo.classes={classes}: one class cannot be told apart. Add a class, as background.")
    pixels, num_masks = np.zeros(len(classes) + 1, np.int64), 0  # the last entry counts ignored pixels
    for counts in _count_pixels(dataset, steps):
        pixels, num_masks = pixels + counts, num_masks + 1
        if num_masks >= MAX_MASKS and pixels[:-1].all():
            break
    if num_masks < len(dataset):
        print_log(f"{source}: counted the classes in {num_masks} of {len(dataset)} masks.", "current")
    if absent := [name for name, count in zip(classes, pixels) if not count]:
        advice = "Add masks with it, or remove the class."
        if required:
            advice = "Add masks with it, remove the class, or set allow_absent_classes=True in the config."
        if dataset.reduce_zero_label:
            advice = "reduce_zero_label=True ignores 0 and reads 1 as the first class. Set it to False if 0 is a class."
        elif pixels[-1] and dataset.ignore_index == 255 and len(classes) == 2:
            advice = "255 is ignored. Write 1 instead of 255."
        problem = f"class {preview(absent)} occurs in none of {num_masks} masks"
        if not pixels[:-1].any():
            required, problem = True, f"all pixels of {num_masks} masks are ignored"
        if required:
            raise DataError(printable(f"{source}: {problem}. {advice}"))
        print_log(printable(f"{source}: {problem}. {advice}"), "current", 30)


def _count_pixels(dataset: Any, steps: Sequence[CheckedStep]) -> Iterator[np.ndarray]:
    """Yield the number of pixels per class, and of ignored ones, of each mask: an evenly spaced sample first."""
    num_classes = len(dataset.metainfo["classes"])

    def count(i: int) -> np.ndarray:
        results: dict[str, Any] | None = dataset.get_data_info(i)
        for step in steps:
            results = results and step(results)
        if not results:
            return np.zeros(num_classes + 1, int)
        labels = results["gt_seg_map"]
        labels = np.where(labels == dataset.ignore_index, num_classes, labels)
        return np.bincount(labels.ravel(), minlength=num_classes + 1)

    sample = evenly_spaced(len(dataset), MAX_MASKS)
    order = [*sample, *sorted(set(range(len(dataset))) - set(sample))]
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        yield from tqdm(pool.map(count, order), "counting classes", len(sample), delay=2, disable=None)
    finally:
        pool.shutdown(cancel_futures=True)
