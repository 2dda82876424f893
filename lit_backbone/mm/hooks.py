"""Hooks: average BatchNorm statistics, check the data before the first step, watch DTM, and name output files."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from mmengine.dist import broadcast_object_list, get_world_size, is_main_process
from mmengine.evaluator import DumpResults
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import Runner
from timm.utils import distribute_bn
from torch.utils.data import DataLoader

from ..dtm import captured_offsets, offset_statistics
from ..images import DataError
from . import data
from .coco import repair_ground_truth
from .labels import ascii_labels, matplotlib_labels


@HOOKS.register_module()
class AverageBuffersHook(Hook):
    """Average BatchNorm statistics over ranks before validation and before a checkpoint is saved.

    mmengine's SyncBuffersHook runs at the end of an epoch only.
    """

    priority = "NORMAL"  # before CheckpointHook

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Average if CheckpointHook saves after this step."""
        for hook in (hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and not hook.by_epoch):
            is_last = hook.save_last and hook.is_last_train_iter(runner)
            if is_last or hook.every_n_train_iters(runner, hook.interval, hook.save_begin):
                return self.after_train_epoch(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Average the statistics of the model and of its EMA."""
        for model in (runner.model, *(hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))):
            if get_world_size() > 1:
                distribute_bn(model, get_world_size(), reduce=True)

    before_val_epoch = after_train_epoch


class KeepCheckpointHook(CheckpointHook):
    """CheckpointHook that deletes old checkpoints after it has saved a new one. mmengine's deletes them before."""

    def _save_checkpoint_with_step(self, *args: Any, **kwargs: Any) -> None:
        with self._delete_at_end():
            super()._save_checkpoint_with_step(*args, **kwargs)

    def _save_best_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._delete_at_end():
            super()._save_best_checkpoint(*args, **kwargs)

    @contextmanager
    def _delete_at_end(self) -> Iterator[None]:
        """Postpone the deletion of files. Omit it after an exception."""
        remove, paths = self.file_backend.remove, []
        self.file_backend.remove = paths.append
        try:
            yield
        finally:
            self.file_backend.remove = remove
        for path in paths:
            remove(path)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check datasets, class names and heads before the first step, and each image and annotation when it is loaded."""

    def before_train(self, runner: Runner) -> None:
        """Check the training and validation data."""
        data.check_num_classes(runner.model, runner.train_dataloader.dataset.metainfo.get("classes"))
        train = self._check(runner.train_dataloader, all_classes=not runner.cfg.get("allow_absent_classes", False))
        if runner.val_loop is not None:
            data.check_equal_classes(train + self._check(runner.val_dataloader, runner.val_evaluator))

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        self._check(runner.test_dataloader, runner.test_evaluator, required=False)

    def _check(
        self, loader: DataLoader, evaluator: Any = None, *, required: bool = True, all_classes: bool = False
    ) -> list[Any]:
        """Check datasets and return them. `required` is that of `check_dataset`, `all_classes` of `check_masks`."""
        datasets, metrics = data.unwrap_datasets(loader), evaluator.metrics if evaluator else ()
        for metric in metrics:
            if coco := getattr(metric, "_coco_api", None):
                repair_ground_truth(coco)
        data.check_equal_classes(datasets)
        is_single, problem = len(datasets) == 1, [""]
        for dataset in datasets:
            data.check_loaded_files(dataset.pipeline, dataset)
        if is_main_process():  # the others wait, and raise the same error
            try:
                for dataset in datasets:
                    data.check_dataset(dataset, required=required, is_single=is_single)
                    for metric in metrics if is_single else ():
                        data.check_metric(dataset, metric)
                data.check_masks(datasets, required=all_classes)
            except DataError as error:
                problem = [str(error)]
        broadcast_object_list(problem)
        if problem[0]:
            raise DataError(problem[0])
        return datasets


@HOOKS.register_module()
class DrawingHook(Hook):
    """Draw readable labels in a test, into the folders of the images so that equal file names do not collide."""

    def before_test(self, runner: Runner) -> None:
        """Change the labels and the output paths of the visualizer."""
        visualizer, dataset = runner.visualizer, runner.test_dataloader.dataset
        is_detection = runner.cfg.get("default_scope") == "mmdet"  # mmsegmentation numbers its files, and draws ASCII
        labels = (matplotlib_labels if is_detection else ascii_labels)(visualizer.dataset_meta.get("classes") or ())
        visualizer.dataset_meta = dict(visualizer.dataset_meta, classes=labels)
        draw, infos = visualizer.add_datasample, map(dataset.get_data_info, range(len(dataset)))
        root = os.path.commonpath({os.path.dirname(info["img_path"]) for info in infos})

        def draw_in_folder(*args: Any, data_sample: Any, out_file: str | None = None, **kwargs: Any) -> None:
            if out_file:
                out_file = os.path.join(os.path.dirname(out_file), os.path.relpath(data_sample.img_path, root))
            draw(*args, data_sample=data_sample, out_file=out_file, **kwargs)

        visualizer.add_datasample = draw_in_folder


@METRICS.register_module()
class DumpMasks(DumpResults):
    """Write the path and the predicted classes `(1, H, W)` of each image to a pickle file."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the predictions on the CPU."""
        for sample in data_samples:
            self.results.append(dict(img_path=sample["img_path"], pred_sem_seg=sample["pred_sem_seg"]["data"].cpu()))


@HOOKS.register_module()
class OffsetHook(Hook):
    """Log the largest share of DTM's samples outside the feature map every `interval` steps. Warn if above a half."""

    def __init__(self, interval: int = 50):
        self.interval, self.has_warned = interval, False
        self.stack = ExitStack()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Capture the offsets of this step."""
        if self.every_n_train_iters(runner, self.interval):
            self.captured = self.stack.enter_context(captured_offsets(runner.model))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Log the share."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        self.stack.close()
        if self.captured:
            share = max(offset_statistics(offset, size)[1].item() for offset, size in self.captured)
            runner.message_hub.update_scalar("train/dtm_outside", share)
            if share > 0.5 and not self.has_warned:
                self.has_warned = True
                advice = "Set optim_wrapper.paramwise_cfg.custom_keys.offset.lr_mult=0.01, or lower the learning rate."
                runner.logger.warning(f"{share:.0%} of the samples of a DTM are outside the feature map. {advice}")
