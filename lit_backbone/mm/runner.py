"""mmengine's runner, stricter about what it reads."""

import re
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import mmcv.ops  # noqa: F401, fails here, with a name, where mmcv was built without its operators
import torch
import torch.distributed
from mmengine.config import ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoints import CheckpointError, other_classes, unwrap_state_dict
from ..fit import check_optimizer_state
from ..text import printable
from .data import check_classes, check_dataset, leaves
from .loading import fit_weights, load_file
from .screen import is_of_interest

HALF = (torch.float16, torch.bfloat16)
PROGRESS = {"last_step", "_global_step", "_last_value", "best", "num_bad_epochs", "cooldown_counter"}  # of a schedule
PROGRESS |= {"params", "foreach", "fused"}  # and what of a group of parameters is no setting


class StrictRunner(Runner):
    """mmengine's runner, except that it refuses a checkpoint that is not its model's, where mmengine warns."""

    new_head = False  # whether a checkpoint may differ from the model outside the backbone: fine-tuning

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """As mmengine's; raises DataError where classes are one string, or a data set turns out to be empty."""
        configs = [leaf for leaf in leaves(dataloader) if isinstance(leaf, dict)]
        for config in configs:
            check_classes(config)
        try:
            with redirect_stdout(StringIO()):  # pycocotools counts its steps
                return Runner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError as error:
            if "need at least one array" not in str(error):  # numpy, on no samples at all
                raise
            for config in configs:
                check_dataset(DATASETS.build(dict(config, serialize_data=False)))
            raise

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        with redirect_stdout(StringIO()):
            return super().build_evaluator(evaluator)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """As mmengine's, but for what is in the file only; begins with a header."""
        logger = super().build_logger(*args, **kwargs)
        logger.handlers[0].addFilter(is_of_interest)  # the screen's
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        where = f"on {self._world_size} x {device}, in {self.work_dir}"
        logger.info(f"{self.cfg.filename}: {where}; environment and config are in {logger.log_file}")
        return logger

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """As mmengine's, with float32 arithmetic, and BN for SyncBN without a GPU, for which alone PyTorch has it."""
        if not torch.cuda.is_available():
            model = revert_sync_batchnorm(model)
        keep_float32(model)
        return super().wrap_model(model_wrapper_cfg, model)

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", **_: Any) -> dict[str, Any]:
        """Load a checkpoint's weights into the model.

        Raises:
            CheckpointError: the file cannot be read safely, is another model's, or knows other classes than the data;
                or it is to be resumed, and holds no optimiser or another one's.
        """
        checkpoint = load_file(filename, map_location)
        checkpoint.setdefault("state_dict", unwrap_state_dict(checkpoint))  # which EMAHook reads
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model, anew = self.model, ()
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        dataset = (self.train_dataloader if self._train_loop is not None else self.test_dataloader).dataset
        if misfit := other_classes(checkpoint, getattr(dataset, "metainfo", {}).get("classes", ())):
            if not self.new_head:
                raise CheckpointError(f"{filename}: {misfit}; give the data sets those by metainfo.classes")
            anew = class_dependent(self.cfg.model, model)
            self.logger.warning(f"{filename}: {misfit}; what depends on them starts anew")
        weights = fit_weights(checkpoint, model, filename, new_head=self.new_head, anew=anew)
        if self._resume:
            if "optimizer" not in checkpoint:
                remedy = "start from them with --cfg-options load_from=FILE instead"
                raise CheckpointError(f"{filename}: holds weights, not a run to resume; {remedy}")
            check_optimizer_state(checkpoint["optimizer"], self.optim_wrapper.optimizer, filename)
            if change := self.changed_setting(checkpoint):
                remedy = "resume with the run's own, or start from its weights with --cfg-options load_from=FILE"
                raise CheckpointError(f"{filename}: {printable(change, 300)}; {remedy}")
            # the classes have been compared; the rest, which mmengine compares too, has not been read
            checkpoint["meta"]["dataset_meta"] = getattr(self.train_dataloader.dataset, "metainfo", None)
        model.load_state_dict(weights)
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return checkpoint

    def changed_setting(self, checkpoint: dict[str, Any]) -> str:
        """A setting that resuming would overwrite by the checkpoint's, in words; empty if all are the same."""
        schedulers, groups = checkpoint.get("param_schedulers") or [], checkpoint["optimizer"]["param_groups"]
        own = [scheduler.state_dict() for scheduler in self.param_schedulers or []]
        pairs = {"param_scheduler": (schedulers, own), "group": (groups, self.optim_wrapper.optimizer.param_groups)}
        for name, (theirs, ours) in pairs.items():
            if len(theirs) != len(ours):
                return f"has {len(theirs)} {name}s, this run {len(ours)}"
            for i, (old, new) in enumerate(zip(theirs, ours)):
                for key in sorted((old.keys() & new.keys()) - PROGRESS):
                    if f"initial_{key}" in new or (key == "betas" and "initial_momentum" in new):
                        continue  # follows a schedule
                    if type(old[key]) is not type(new[key]) or old[key] != new[key]:
                        return f"{name} {i} has {key} {shortened(old[key])}, this run {shortened(new[key])}"
        return ""

    def dump_config(self) -> None:
        """As mmengine's, but not in tests, whose options would replace those of the training in the same folder."""
        if self._train_loop is not None:
            super().dump_config()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """As mmengine's; raises CheckpointError also for records that are no run's, those of a longer run, or those of
        one with other settings of optimiser and schedule, which mmengine would take in place of this run's."""
        try:
            super().resume(filename, *args, **kwargs)
            for key, value in self.message_hub.runtime_info.items():
                if key.startswith("best_ckpt"):  # mmengine deletes this file when it has a better one
                    own = re.fullmatch(r"best_.*\.pth", Path(value).name)
                    self.message_hub.update_info(key, str(Path(self.work_dir, own[0])) if own else "")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            remedy = "start from its weights with --cfg-options load_from=FILE instead"
            raise CheckpointError(f"{filename}: holds no run that can be resumed; {remedy}") from error
        unit, done, end = "epoch", self.epoch, self.max_epochs
        if isinstance(self.train_loop, IterBasedTrainLoop):
            unit, done, end = "iteration", self.iter, self.max_iters
        if done > end:
            raise CheckpointError(f"{filename}: is at {unit} {done}, and this run ends at {end}")


def class_dependent(config: ConfigDict, model: nn.Module) -> list[str]:
    """Keys of the weights that depend on the classes: with one class more, they would have another shape."""

    def one_more(node: Any) -> Any:
        if isinstance(node, dict):
            return ConfigDict({key: x + 1 if key == "num_classes" else one_more(x) for key, x in node.items()})
        return type(node)(map(one_more, node)) if isinstance(node, (list, tuple)) else node

    with torch.device("meta"):
        other = MODELS.build(one_more(config)).state_dict()
    return [key for key, value in model.state_dict().items() if value.shape != other[key].shape]


def keep_float32(model: nn.Module) -> None:
    """Run losses, the arithmetic of boxes and RoIAlign in float32 under autocast, too, as mmdetection 2 did.

    Layers of the heads, which produce what goes into it, stay in mixed precision.
    """
    for module in model.modules():
        names = ["loss_by_feat", "loss_and_target", "predict_by_feat"]
        names += ["forward"] * hasattr(module, "roi_layers")  # RoIAlign
        for name in filter(partial(hasattr, module), names):
            setattr(module, name, partial(_in_float32, getattr(module, name)))  # a partial is copied with its module


def _in_float32(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = apply_to((args, kwargs), lambda x: isinstance(x, Tensor) and x.dtype in HALF, Tensor.float)
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return function(*args, **kwargs)
