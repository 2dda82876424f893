"""What mmengine's loops lack: the same BatchNorm on all processes, and a look at the data before the first batch."""

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from mmengine.dist import get_world_size, master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from timm.utils import distribute_bn
from torch import nn
from tqdm import tqdm

from ..images import DataError


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Averages BatchNorm's running statistics over the processes before validation and before saving.

    Then every process validates the model that is in the file. (mmengine's SyncBuffersHook knows epochs only: a
    checkpoint saved by iterations would hold the statistics of the first process.)
    """

    priority = "NORMAL"  # before CheckpointHook

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not hook.by_epoch:
                last = hook.save_last and hook.is_last_train_iter(runner)
                if last or hook.every_n_train_iters(runner, hook.interval, hook.save_begin):
                    return self.after_train_epoch(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        if get_world_size() > 1:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            distribute_bn(model, get_world_size(), reduce=True)

    before_val_epoch = after_train_epoch


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Stops before the first batch if a data set lacks files or categories, or a head is for another number of these.

    (mmdetection's NumClassCheckHook does the last for detectors alone, by an assertion that names no key.)
    """

    def before_train(self, runner: Runner) -> None:
        check_heads(runner.model, runner.train_dataloader.dataset.metainfo["classes"])
        check_dataset(runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            check_dataset(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        check_dataset(runner.test_dataloader.dataset)


def check_heads(model: nn.Module, classes: Sequence[str] | None) -> None:
    """Raise DataError if a detector's or segmentor's head is not for as many classes as the data have, if these say."""
    for name, module in model.named_modules():
        number = getattr(module, "num_classes", None)
        if not classes or number in (None, len(classes)):
            continue
        if re.search(r"(bbox|mask|decode)_head(\.\d+)?$", name):  # in a cascade they are numbered
            key = f"model.{name.removeprefix('module.')}.num_classes"
            raise DataError(f"{key}={number}: the data has {len(classes)} classes; set it so")


@master_only
def check_dataset(dataset: Any) -> None:
    """Raise DataError if a category or file of a data set is missing, or all images are; opens no image."""
    wrapped = getattr(dataset, "datasets", None) or ([dataset.dataset] if hasattr(dataset, "dataset") else [])
    for part in wrapped:
        check_dataset(part)
    if wrapped:
        return
    source = getattr(dataset, "ann_file", "") or dataset.data_root
    classes, found = dataset.metainfo["classes"], getattr(dataset, "cat_ids", None)
    if found is not None and len(found) != len(classes):
        remedy = "name the file's own in metainfo.classes of the data set"
        raise DataError(f"{source}: holds {len(found)} of the config's {len(classes)} categories; {remedy}")
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
