"""Hooks: average BatchNorm statistics over ranks, and check the data before the first step."""

from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from timm.utils import distribute_bn
from torch.utils.data import DataLoader

from . import data


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Average BatchNorm statistics over ranks before validation and before a checkpoint is saved.

    mmengine's SyncBuffersHook runs at the end of an epoch only.
    """

    priority = "NORMAL"  # before CheckpointHook

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Average if CheckpointHook saves after this step."""
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not hook.by_epoch:
                last = hook.save_last and hook.is_last_train_iter(runner)
                if last or hook.every_n_train_iters(runner, hook.interval, hook.save_begin):
                    return self.after_train_epoch(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Average the statistics of the model and of its EMA."""
        if get_world_size() > 1:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
            for module in (model, *averages):
                distribute_bn(module, get_world_size(), reduce=True)

    before_val_epoch = after_train_epoch


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check datasets, class names and heads before the first step, and each image and annotation when it is loaded."""

    def before_train(self, runner: Runner) -> None:
        """Check the training and validation data."""
        data.check_num_classes(runner.model, runner.train_dataloader.dataset.metainfo.get("classes"))
        self._check(runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner.val_dataloader, runner.val_evaluator)
            data.check_equal_classes(
                data.unwrap_datasets(runner.train_dataloader) + data.unwrap_datasets(runner.val_dataloader)
            )

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        self._check(runner.test_dataloader, runner.test_evaluator)

    def _check(self, loader: DataLoader, evaluator: Evaluator | None = None) -> None:
        datasets = data.unwrap_datasets(loader)
        for dataset in datasets:
            if is_main_process():
                data.check_dataset(dataset)
                for metric in evaluator.metrics if evaluator and len(datasets) == 1 else ():
                    data.check_metric(dataset, metric)
            data.check_loaded_files(dataset.pipeline, dataset)
