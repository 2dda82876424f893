"""Checkpoints of a run: written whole or not at all, and enough to continue as if it had never stopped."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from config import Config
from distributed import Processes
from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import fit_state_dict, weights_of

_logger = logging.getLogger(__name__)

LATEST, BEST = "latest.pth", "best.pth"


@dataclass
class TrainState:
    """All that the rest of a run depends on besides its configuration.

    Learning rates and randomness follow from the number of updates done; there are no generator states to keep.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    ema: ModelEmaV3 | None
    updates_per_epoch: int
    update: int = 0  # updates done, over the whole run
    best: float = -math.inf  # highest validation accuracy so far, in percent

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.update // self.updates_per_epoch


@dataclass
class Saver:
    """When a run's `latest.pth` and `best.pth` are written; only the first process writes.

    Attributes:
        check: called before the state is saved within an epoch; raises if it is not worth it.
    """

    config: Config
    processes: Processes
    state: TrainState
    folder: Path
    classes: list[str]
    check: Callable[[], None]

    def sync_statistics(self) -> None:
        """Average BatchNorm's statistics over the processes, so that all evaluate and any one saves the same model."""
        if self.processes.world_size > 1:
            for model in (self.state.model, self.state.ema):
                if model is not None:
                    distribute_bn(model, self.processes.world_size, reduce=True)

    def after_update(self) -> None:
        """Save every SAVE_STEPS updates within an epoch; its end is saved once it is evaluated."""
        steps, state = self.config.TRAIN.SAVE_STEPS, self.state
        if steps and state.update % steps == 0 and state.update % state.updates_per_epoch:
            self.check()
            self.sync_statistics()
            self._save(LATEST)

    def after_epoch(self, accuracy: float) -> None:
        """Save every SAVE_FREQ epochs and after the last, and whenever `accuracy`, in percent, is a new best."""
        state = self.state
        improved = accuracy > state.best
        state.best = max(state.best, accuracy)
        if improved:
            self._save(BEST)
        if state.epoch % self.config.SAVE_FREQ == 0 or state.epoch == self.config.TRAIN.EPOCHS:
            self._save(LATEST)

    def _save(self, name: str) -> None:
        if self.processes.is_main:
            save_checkpoint(self.folder / name, self.state, self.config, self.classes)


def save_checkpoint(path: Path, state: TrainState, config: Config, classes: list[str]) -> None:
    """Write all of `state` and what a reader of the weights needs to know; plain data and tensors only."""
    content = {
        "model": state.model.state_dict(),
        "model_ema": state.ema.module.state_dict() if state.ema else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "updates_per_epoch": state.updates_per_epoch,
        "update": state.update,
        "best": state.best,
        "config": config.model_dump(mode="json"),
        "classes": classes,
    }
    write_atomically(path, content)


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` that leaves either the old file or the whole new one, also when the machine fails."""
    temporary = path.with_name(f".{path.name}.tmp")  # always the same, so that a killed run leaves at most one
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def restore_checkpoint(path: str | Path, state: TrainState, config: Config) -> None:
    """Continue from a checkpoint written by :func:`save_checkpoint`.

    Raises:
        CheckpointError: the file cannot be read, is another model's, or was not written by this trainer.
    """
    content = read_checkpoint(path)
    if "optimizer" not in content or "updates_per_epoch" not in content:
        raise CheckpointError(f"{path}: holds weights, not a run to resume; start from them with --pretrained instead")
    if content["updates_per_epoch"] != state.updates_per_epoch:
        raise CheckpointError(
            f"{path}: its epochs have {content['updates_per_epoch']} updates, this run's {state.updates_per_epoch}; "
            "resume with the same data set and TRAIN.GLOBAL_BATCH"
        )
    own = state.model.state_dict()
    if any(value.shape != own[key].shape for key, value in content["model"].items() if "pos_" in key and key in own):
        raise CheckpointError(f"{path}: is for another DATA.IMG_SIZE; start from its weights with --pretrained instead")
    state.model.load_state_dict(fit_state_dict(content["model"], state.model, path, new_head=False))
    if state.ema:
        average = content["model_ema"] or content["model"]  # a run that switches EMA on starts it here
        state.ema.module.load_state_dict(fit_state_dict(average, state.ema.module, path, new_head=False))
    settings = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    try:
        state.optimizer.load_state_dict(content["optimizer"])
        for group, setting in zip(state.optimizer.param_groups, settings):
            group.update(setting)  # this run's weight decay and betas, not the checkpoint's
        if content["scaler"]:  # empty where the checkpoint's run scaled no losses
            state.scaler.load_state_dict(content["scaler"])
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: its optimiser state does not fit this run: {error}") from error
    state.update, state.best = content["update"], content["best"]
    for key, old, new in _differences(content["config"], config.model_dump(mode="json")):
        _logger.warning(f"{path} was written with {key} {old}, this run has {new}")


def load_weights(path: str | Path, model: nn.Module, *, new_head: bool) -> None:
    """Give `model` the weights that a checkpoint is judged by: the moving average of a run that keeps one.

    Raises:
        CheckpointError: the file cannot be read or is another model's; without `new_head`, another head's.
    """
    content = read_checkpoint(path)
    written_here = "updates_per_epoch" in content  # the authors published accuracies of the weights themselves
    model.load_state_dict(weights_of(content, path, model, use_ema=written_here, new_head=new_head))


def _differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every setting that differs, apart from those that only say where things are."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b and key not in ("RESUME", "PRETRAINED", "OUTPUT", "TAG", "BASE", "DATA_PATH"):
            found.append((prefix + key, a, b))
    return found
