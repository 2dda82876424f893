"""Checks of datasets and their files. A mistake stops the run with a one-line error that names the file or key."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from multiprocessing.pool import ThreadPool
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
from ..safe_reader import preview
from .coco import CocoFile, check_instances, read_coco

MAX_MASKS = 3000  # masks that are read before the first step; more if a class does not occur in them


def unwrap_datasets(dataset: Any) -> list[Any]:
    """List the datasets in a dataloader and wrappers such as ConcatDataset, or in their configs."""
    inner = dataset if isinstance(dataset, dict) else {k: getattr(dataset, k, None) for k in ("dataset", "datasets")}
    children = inner.get("datasets") or [inner.get("dataset")]
    return [dataset] if children == [None] else [leaf for child in children for leaf in unwrap_datasets(child)]


def check_num_classes(model: nn.Module, classes: Sequence[str] | None, source: str = "the data") -> None:
    """Raise DataError if a head of a detector or segmentor is for another number of classes than the source's."""
    for name, module in model.named_modules():
        is_head = re.search(r"(bbox|mask|decode)_head(\.\d+)?$", name)  # a cascade has numbered heads
        if classes and is_head and getattr(module, "num_classes", None) not in (None, len(classes)):
            key = f"model.{name.removeprefix('module.')}.num_classes"
            problem = f"{source} has {len(classes)} classes ({preview(classes)})"
            raise DataError(f"{key}={module.num_classes}: {problem}. Set {key}={len(classes)}.")


def check_equal_classes(datasets: Sequence[Any]) -> None:
    """Raise DataError if datasets differ in their class names or the order of these."""
    classes = [tuple(dataset.metainfo.get("classes") or ()) for dataset in datasets]
    if mismatch := [names for names in classes if names != classes[0]]:
        pair = f"{classes[0]} and {mismatch[0]}"
        raise DataError(f"metainfo.classes: datasets have different classes, {pair}. Use the same in the same order.")


def _check_categories(dataset: Any, coco: CocoFile | None) -> None:
    """Compare the categories in a COCO file with the classes in the config, in the order that mmdetection uses."""
    file, classes = dataset.ann_file, list(dataset.metainfo.get("classes") or ())
    if coco is None and classes == list(dataset.METAINFO.get("classes") or ()):
        return  # a public dataset of another format, such as LVIS, whose large file is not read again
    names = coco.categories if coco else {category["id"]: category["name"] for category in load(file)["categories"]}
    if wrong := [name for name in classes if [*names.values()].count(name) != 1]:
        advice = f"Use a subset of metainfo.classes={[*names.values()]}."
        raise DataError(f"{file}: not exactly one category named {preview(wrong)}. {advice}")
    if classes != (order := [names[i] for i in dataset.cat_ids]):
        raise DataError(f"{file}: the categories are in another order. Set metainfo.classes to {order}.")


def check_dataset(dataset: Any, *, required: bool = True, is_single: bool = True) -> None:
    """Raise DataError if a category or file is missing or the dataset is empty. No image is opened.

    With `required=False`, a COCO file may have no usable instance. One of several files may have no annotation.
    """
    source, classes = getattr(dataset, "ann_file", "") or dataset.data_root, dataset.metainfo.get("classes") or ()
    coco = read_coco(dataset)
    if getattr(dataset, "cat_ids", None) is not None:
        _check_categories(dataset, coco)
    if getattr(dataset, "img_suffix", "") and not dataset.ann_file:
        _check_suffixes(dataset.data_prefix["img_path"], dataset.img_suffix)
    if getattr(dataset, "_indices", None):  # the dataset is a part of the file
        coco = None
    list_folder = cache(lambda folder: set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set())
    kept, missing = Counter(dict.fromkeys(classes, 0)), []
    for i in tqdm(range(len(dataset)), f"checking {source}", delay=2, disable=None):
        info = dataset.get_data_info(i)
        instances = info["instances"] if coco else ()
        kept.update(classes[x["bbox_label"]] for x in instances if not x["ignore_flag"])
        paths = [path for key in ("img_path", "seg_map_path") if (path := info.get(key)) and "://" not in path]
        missing += [path for path in paths if os.path.basename(path) not in list_folder(os.path.dirname(path))]
    if missing:
        raise DataError(f"{missing[0]}: no such file. Files missing in {source}: {len(missing)}.")
    if coco:
        check_instances(coco, kept, required=required and (is_single or bool(coco.annotations)))
    if not len(dataset):
        raise DataError(f"{source}: no image with annotations. Check data_root and data_prefix of the dataset.")


def _check_suffixes(folder: str, suffix: str) -> None:
    """Check that a dataset that lists a folder does not skip images because of another suffix."""
    names = [name for _, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    skipped = [name for name in names if not name.endswith(suffix)]
    if len(skipped) < len(names):  # the folder may hold files of another type, too
        ending = suffix.lower().replace(".jpeg", ".jpg")
        skipped = [name for name in skipped if name.lower().replace(".jpeg", ".jpg").endswith(ending)]
    if skipped:
        problem = f"img_suffix={suffix!r} leaves out {preview(skipped)}"
        raise DataError(f"{folder}: {problem}. Change img_suffix, or rename the files.")


def check_metric(dataset: Any, metric: Any) -> None:
    """Raise DataError if output files would share a name or a COCO metric has other images or categories."""
    coco: Any = getattr(metric, "_coco_api", None)
    has_files = getattr(metric, "output_dir", None)
    infos = [dataset.get_data_info(i) for i in range(len(dataset) if coco or has_files else 0)]
    stems = Counter(Path(info["img_path"]).stem for info in infos)
    if has_files and (same := preview([stem for stem, count in stems.items() if count > 1])):
        raise DataError(f"--out: images in different folders are named {same}. Test each folder separately.")
    classes = list(dataset.metainfo.get("classes") or ())
    names = [coco.cats[i]["name"] for i in coco.getCatIds(catNms=classes)] if coco else classes
    if names != classes:  # the metric reads class indices in the order of its file
        problem = f"metainfo.classes is {classes}, but {names} in the evaluator's ann_file"
        raise DataError(f"{dataset.ann_file}: {problem}. Set it to the dataset's ann_file.")
    for info in infos if coco else ():
        name = coco.imgs.get(info["img_id"], {}).get("file_name")
        if not name or os.path.basename(info["img_path"]) != os.path.basename(name):
            problem = f"image is {name} in the evaluator's ann_file"
            raise DataError(f"{info['img_path']}: {problem}. Set it to the dataset's ann_file.")


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
        if mask.shape != shape:
            raise DataError(f"{path}: shape is {mask.shape}. Save one class index per pixel of the image, {shape}.")
        invalid = mask[(mask >= self.num_classes) & (mask != self.ignore_index)]
        if invalid.size:
            valid = f"{self.first_class} to {self.first_class + self.num_classes - 1} for metainfo.classes"
            problem = f"invalid class index {invalid[0] + self.first_class}"
            raise DataError(f"{path}: {problem}. Use {valid}, and {self.ignore_index} to ignore a pixel.")


def check_loaded_files(pipeline: Compose, dataset: Any) -> None:
    """Wrap the loading steps of a dataset's pipeline in :class:`CheckedStep`, in place."""
    for i, step in enumerate(pipeline.transforms):
        for branch in getattr(step, "subroutines", ()):  # TestTimeAug has one pipeline per augmentation
            check_loaded_files(branch, dataset)
        if isinstance(step, (LoadImageFromFile, LoadAnnotations)):
            pipeline.transforms[i] = CheckedStep(step, dataset)


def check_masks(datasets: Sequence[Any], *, required: bool) -> None:
    """Raise DataError for invalid masks. If a class occurs in no dataset, raise it if required, else log a warning."""
    steps = {dataset: [s for s in dataset.pipeline.transforms if isinstance(s, CheckedStep)] for dataset in datasets}
    datasets = [d for d in datasets if any(s.num_classes and isinstance(s.step, LoadAnnotations) for s in steps[d])]
    if not datasets:
        return
    classes, ignore_index = datasets[0].metainfo["classes"], datasets[0].ignore_index
    source = ", ".join(dataset.ann_file or dataset.data_prefix["seg_map_path"] for dataset in datasets)
    if len(classes) == 1:
        raise DataError(f"metainfo.classes={classes}: one class cannot be told apart. Add a class, as background.")

    def count(item: tuple[Any, int]) -> np.ndarray:
        dataset, i = item
        results: dict[str, Any] | None = dataset.get_data_info(i)
        for step in steps[dataset]:
            results = results and step(results)
        labels = results["gt_seg_map"] if results else np.zeros(0, int)
        return np.bincount(labels[(labels < len(classes)) & (labels != dataset.ignore_index)], minlength=len(classes))

    items = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
    order = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    pixels, num_masks = np.zeros(len(classes), np.int64), 0
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        total = min(len(order), MAX_MASKS)
        for counts in tqdm(pool.imap(count, order), "counting classes", total, delay=2, disable=None):
            pixels, num_masks = pixels + counts, num_masks + 1
            if num_masks >= MAX_MASKS and pixels.all():
                break
    if num_masks < len(items):
        print_log(f"{source}: counted the classes in {num_masks} of {len(items)} masks.", "current")
    if absent := [name for name, count in zip(classes, pixels) if not count]:
        zeros = " and, with reduce_zero_label=True, 0" if datasets[0].reduce_zero_label else ""
        advice = "Fix the masks, remove it, or set allow_absent_classes=True." if required else "Fix the masks."
        problem = f"class {preview(absent)} occurs in none of {num_masks} masks"
        text = f"{source}: {problem}, which ignore {ignore_index}{zeros}."
        if required or not pixels.any():
            raise DataError(f"{text} {advice}")
        print_log(text, "current", 30)
