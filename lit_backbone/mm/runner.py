"""Runner of mmengine with strict checkpoint loading and float32 losses."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoints import CheckpointError, check_optimizer_state, class_mismatch
from ..images import DataError
from .checkpoints import FROM_WEIGHTS, check_finite, fit_weights, load_file
from .coco import read_coco
from .data import check_dataset, unwrap_datasets
from .hooks import KeepCheckpointHook

# Keys of schedulers and parameter groups that are not settings
STATE_KEYS = {"last_step", "_global_step", "_last_value", "best", "num_bad_epochs", "cooldown_counter", "params"}
STATE_KEYS |= {"foreach", "fused"}


class StrictRunner(Runner):
    """Runner that raises an error if a checkpoint does not match the model. mmengine only logs a warning.

    Set `allow_new_head` for fine-tuning: mismatched weights outside the backbone then keep their initialization.
    """

    allow_new_head = False

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Build a dataloader. Raise DataError if an annotation file is invalid or the dataset is empty."""
        try:
            return Runner.build_dataloader(dataloader, *args, **kwargs)
        except Exception as error:  # mmdetection raises many types, and names neither the file nor the reason
            configs = [config for config in unwrap_datasets(dataloader) if isinstance(config, dict)]
            for config in configs:
                dataset = DATASETS.build(dict(config, lazy_init=True, serialize_data=False))
                read_coco(dataset)
                if "need at least one array" in str(error):  # NumPy's error for an empty dataset
                    dataset.full_init()
                    check_dataset(dataset)
            raise

    def register_hook(self, hook: Hook | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Register a hook. Replace CheckpointHook, which deletes an old checkpoint before it saves a new one."""
        if isinstance(hook, dict) and hook.get("type") in ("CheckpointHook", CheckpointHook):
            hook = dict(hook, type=KeepCheckpointHook)
        super().register_hook(hook, *args, **kwargs)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Wrap the model for training. Keep losses in float32, and replace SyncBN by BN without a GPU."""
        model = model if torch.cuda.is_available() else revert_sync_batchnorm(model)
        keep_float32(model)
        return super().wrap_model(model_wrapper_cfg, model)

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", **kwargs: Any) -> dict[str, Any]:
        """Load the weights of a checkpoint. Raise CheckpointError if model, classes or optimizer do not match."""
        checkpoint = load_file(filename, map_location)
        model, reset_keys = self.model, ()
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        dataset = (self.train_dataloader if self._train_loop is not None else self.test_dataloader).dataset
        if mismatch := class_mismatch(checkpoint, getattr(dataset, "metainfo", {}).get("classes", ())):
            if not self.allow_new_head:
                raise CheckpointError(f"{filename}: {mismatch}. Set metainfo.classes to those of the checkpoint.")
            reset_keys = class_dependent_keys(self.cfg.model, model)
            self.logger.warning(f"{filename}: {mismatch}. Weights that depend on the classes are reinitialized.")
        fit = partial(fit_weights, allow_new_head=self.allow_new_head, reset_keys=reset_keys)
        # EMAHook reads these keys, and exchanges them if the run is resumed
        checkpoint["state_dict"] = fit(checkpoint, model, filename)
        if self._resume and isinstance(ema := checkpoint.get("ema_state_dict"), dict):
            averages = {key.removeprefix("module."): x for key, x in ema.items() if key.startswith("module.")}
            fitted = fit({"state_dict": averages}, model, filename)
            checkpoint["ema_state_dict"] = ema | {f"module.{key}": x for key, x in fitted.items()}
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        if self._resume:
            check_optimizer_state(checkpoint.get("optimizer", {}), self.optim_wrapper.optimizer, filename)
            if checkpoint["meta"].get("within_epoch"):
                advice = "Resume one from the end of an epoch (default_hooks.checkpoint.by_epoch=True)"
                raise CheckpointError(f"{filename}: was saved within an epoch. {advice}, or {FROM_WEIGHTS}.")
            if changes := ", ".join(self.changed_settings(checkpoint)):
                problem = f"the checkpoint was written with other settings: {changes}"
                advice = f"Its optimizer and schedule override the config. To use those of the config, {FROM_WEIGHTS}."
                self.logger.warning(f"{filename}: {problem}. {advice}")
            # mmengine compares the metainfo; the classes are compared above, other fields are not read
            checkpoint["meta"]["dataset_meta"] = getattr(dataset, "metainfo", None)
        model.load_state_dict(checkpoint["state_dict"])
        self._has_loaded = True
        self.logger.info(f"Loaded checkpoint {filename}")
        return checkpoint

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Save a checkpoint atomically on rank 0. Raise FloatingPointError on all ranks if a weight is not finite."""
        path = Path(out_dir, filename)
        kwargs["meta"] = (meta or {}) | self.data_size()
        if isinstance(self.train_loop, EpochBasedTrainLoop) and kwargs["meta"].get("iter", 0) > self.iter:
            kwargs["meta"]["within_epoch"] = True  # CheckpointHook saves after a step
        check_finite(self.model, str(path), self.message_hub.get_info("iter", self.iter) + 1)
        if "://" in out_dir:  # not a local file
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
        elif is_main_process():
            temp = Path(out_dir, f"{filename}.tmp")
            temp.unlink(missing_ok=True)  # a link would be followed
            try:
                super().save_checkpoint(out_dir, f"{filename}.tmp", *args, **kwargs)
                with open(temp, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temp, path)
            finally:
                temp.unlink(missing_ok=True)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """Build the schedulers. Warn if one does not end with the training, raise DataError if it cannot begin."""
        for i, config in enumerate(scheduler if isinstance(scheduler, list) else [scheduler]):
            if not isinstance(config, dict) or "type" not in config:
                continue
            key = "max_epochs" if config.get("by_epoch", True) else "max_iters"
            length = getattr(self, key)
            begin, end = config.get("begin", 0), config.get("end", length)
            if begin >= end:
                raise DataError(f"param_scheduler.{i}.begin={begin}: is not before its end ({end}). Lower it.")
            last = begin + config["T_max"] if config.get("T_max") else end
            last = max(config.get("milestones", [last]))
            decays_to_end = str(config["type"]).endswith(("CosineAnnealingLR", "PolyLR"))
            if last > length or (decays_to_end and max(last, config.get("end", 0)) < length):
                advice = "Change its milestones, T_max or end. Without T_max and end, it ends with the training."
                self.logger.warning(f"param_scheduler.{i}: ends at {last}, but {key} is {length}. {advice}")
        return super().build_param_scheduler(scheduler)

    def data_size(self) -> dict[str, int]:
        """Count the training images, and the images per step over all ranks and accumulated batches."""
        loader, accumulation = self.train_dataloader, getattr(self.optim_wrapper, "_accumulative_counts", 1)
        batch_size = getattr(loader.batch_sampler, "batch_size", 1)
        return dict(num_images=len(loader.dataset), global_batch=batch_size * self.world_size * accumulation)

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """Scale the learning rate by the images per step. mmengine omits the accumulated batches."""
        if auto_scale_lr and auto_scale_lr.get("enable"):
            accumulation = getattr(optim_wrapper, "_accumulative_counts", 1)
            auto_scale_lr = dict(auto_scale_lr, base_batch_size=auto_scale_lr["base_batch_size"] / accumulation)
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def changed_settings(self, checkpoint: dict[str, Any]) -> list[str]:
        """List the settings of optimizer, schedule and data that differ between the checkpoint and the config."""
        schedulers = [scheduler.state_dict() for scheduler in self.param_schedulers or []]
        ckpt_schedulers = checkpoint.get("param_schedulers") or []
        pairs = [(checkpoint["meta"], self.data_size()), *zip(ckpt_schedulers, schedulers)]
        pairs += [(dict(num_schedulers=len(ckpt_schedulers)), dict(num_schedulers=len(schedulers)))]
        pairs += zip(checkpoint["optimizer"]["param_groups"], self.optim_wrapper.optimizer.param_groups)
        changes = {}
        for ckpt, config in pairs:
            for key in sorted((ckpt.keys() & config.keys()) - STATE_KEYS):
                scheduled = f"initial_{key}" in config or (key == "betas" and "initial_momentum" in config)
                if not scheduled and (type(ckpt[key]) is not type(config[key]) or ckpt[key] != config[key]):
                    changes[f"{key}={short_repr(ckpt[key])} (config: {short_repr(config[key])})"] = None
        return list(changes)

    def dump_config(self) -> None:
        """Write the config to the work directory, except in a test: its options would replace those of the training."""
        if self._train_loop is not None:
            super().dump_config()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume a run. Raise CheckpointError if the training state is invalid or past the end of this run."""
        try:
            super().resume(filename, *args, **kwargs)
            for key, value in self.message_hub.runtime_info.items():
                if key.startswith("best_ckpt"):  # CheckpointHook deletes this file: restrict it to the work directory
                    name = re.fullmatch(r"best_.*\.pth", Path(value).name)
                    self.message_hub.update_info(key, str(Path(self.work_dir, name[0])) if name else "")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{filename}: no valid training state. Instead, {FROM_WEIGHTS}.") from error
        unit = "iter" if isinstance(self.train_loop, IterBasedTrainLoop) else "epoch"
        done, end = getattr(self, unit), getattr(self, f"max_{unit}s")
        if done > end:
            raise CheckpointError(f"{filename}: {unit} {done} is past the end of this run. Raise max_{unit}s={end}.")


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Optimizer wrapper for training under bfloat16 autocast on a CPU or GPU.

    bfloat16 has the range of float32, so the loss is not scaled. mmengine's AmpOptimWrapper needs a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter autocast for the forward pass."""
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield


def class_dependent_keys(config: ConfigDict, model: nn.Module) -> list[str]:
    """List the keys of weights whose shape depends on the number of classes."""

    def add_class(node: Any) -> Any:
        if isinstance(node, dict):
            return ConfigDict({key: x + 1 if key == "num_classes" else add_class(x) for key, x in node.items()})
        return type(node)(map(add_class, node)) if isinstance(node, (list, tuple)) else node

    with torch.device("meta"):
        larger = MODELS.build(add_class(config)).state_dict()
    return [key for key, value in model.state_dict().items() if value.shape != larger[key].shape]


def keep_float32(model: nn.Module) -> None:
    """Run losses, box arithmetic and RoIAlign in float32 under autocast, as mmdetection 2 did."""
    for module in model.modules():
        for name in ("loss_by_feat", "loss_and_target", "predict_by_feat", "forward"):
            if hasattr(module, name) and (name != "forward" or hasattr(module, "roi_layers")):  # RoIAlign
                setattr(module, name, partial(_call_in_float32, getattr(module, name)))  # deepcopy copies a partial


def _call_in_float32(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    half = (torch.float16, torch.bfloat16)
    args, kwargs = apply_to((args, kwargs), lambda x: isinstance(x, Tensor) and x.dtype in half, Tensor.float)
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return function(*args, **kwargs)
