"""What mmengine's loops lack: one model on all processes, and a look at the data before the first batch."""

import os
import re
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
    """Averages BatchNorm's running statistics over processes before validation and before saving.

    Then every process validates the same model, and that is the model in the file. (mmengine's SyncBuffersHook knows
    epochs only: a checkpoint saved by iterations would hold the statistics of the first process.)
    """

    priority = "NORMAL"  # before CheckpointHook

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if any(_saves_after_iteration(hook, runner) for hook in runner.hooks if isinstance(hook, CheckpointHook)):
            _average(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        _average(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        _average(runner)


def _saves_after_iteration(hook: CheckpointHook, runner: Runner) -> bool:
    last = hook.save_last and hook.is_last_train_iter(runner)
    return not hook.by_epoch and (last or hook.every_n_train_iters(runner, hook.interval, hook.save_begin))


def _average(runner: Runner) -> None:
    if get_world_size() > 1:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        distribute_bn(model, get_world_size(), reduce=True)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Stops before the first batch if files or categories of a data set are missing, or a head has others."""

    def before_train(self, runner: Runner) -> None:
        check_heads(runner.model, runner.train_dataloader.dataset)
        check_dataset(runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            check_dataset(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        check_dataset(runner.test_dataloader.dataset)


def check_heads(model: nn.Module, dataset: Any) -> None:
    """Compare the number of classes of a detector's or segmentor's heads with that of the data.

    Raises:
        DataError: they differ.
    """
    classes = len(dataset.metainfo["classes"])
    for name, module in model.named_modules():
        if not re.search(r"(bbox|mask|decode)_head(\.\d+)?$", name):
            continue
        if getattr(module, "num_classes", classes) != classes:  # in a cascade they are a list's
            name = name.removeprefix("module.")
            raise DataError(f"model.{name}.num_classes={module.num_classes}: the data has {classes} classes; set it so")


@master_only
def check_dataset(dataset: Any) -> None:
    """Look for all categories and files of a data set of mmdetection or mmsegmentation, without opening the files.

    Raises:
        DataError: a category or a file is missing, or there is no image at all.
    """
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
    contents: dict[str, set[str]] = {}
    missing = []
    for i in tqdm(range(len(dataset)), f"checking {source}", delay=2, disable=None):
        info = dataset.get_data_info(i)
        for path in filter(None, (info.get("img_path"), info.get("seg_map_path"))):
            folder, name = os.path.split(path)
            if folder not in contents:
                contents[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in contents[folder] and "://" not in path:
                missing.append(path)
    if missing:
        raise DataError(f"{missing[0]}: no such file; {source} names {len(missing)} files that are not there")
