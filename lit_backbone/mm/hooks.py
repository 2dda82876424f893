"""What mmengine's loops lack: the same BatchNorm on all processes, and a look at the data before the first batch."""

from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from timm.utils import distribute_bn
from torch.utils.data import DataLoader

from ..images import DataError
from ..text import printable
from .data import check_dataset, check_heads, check_metric, leaves, name_files


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
            averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
            for module in (model, *averages):
                distribute_bn(module, get_world_size(), reduce=True)

    before_val_epoch = after_train_epoch


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Stops before the first batch if a data set lacks files or categories, or a head is for another number of these,
    and later at a file that cannot be used, with its name.

    (mmdetection's NumClassCheckHook does the second for detectors alone, by an assertion that names no key.)
    """

    def before_train(self, runner: Runner) -> None:
        check_heads(runner.model, runner.train_dataloader.dataset.metainfo.get("classes"))
        self._check(runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner.val_dataloader, runner.val_evaluator)
            loaders = (runner.train_dataloader, runner.val_dataloader)
            classes = [part.metainfo.get("classes") or () for loader in loaders for part in leaves(loader)]
            if odd := [names for names in classes if tuple(names) != tuple(classes[0])]:
                problem = f"a data set for validation or training has the classes {odd[0]}, another {classes[0]}"
                raise DataError(printable(f"{problem}; give all the same, in one order", 500))

    def before_test(self, runner: Runner) -> None:
        self._check(runner.test_dataloader, runner.test_evaluator)

    def _check(self, loader: DataLoader, evaluator: Evaluator | None = None) -> None:
        parts = leaves(loader)
        for part in parts:
            if is_main_process():
                check_dataset(part)
                for metric in evaluator.metrics if evaluator and len(parts) == 1 else ():
                    check_metric(part, metric)
            name_files(part.pipeline, part)
