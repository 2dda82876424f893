"""Checkpoints of a run: written whole or not at all, and enough to continue as if it had never stopped."""

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from config import Config
from distributed import Preempted, Processes, StopRequest
from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import check_integrity, check_optimizer_state, fit_state_dict, seal, weights_of

_logger = logging.getLogger(__name__)

LATEST, PREVIOUS, BEST, FAILED = "latest.pth", "previous.pth", "best.pth", "failed.pth"


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
    world_size: int = 1  # processes that train
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
        stop: whether this process was asked to stop; all of them stop together.
        check: called before the state is saved within an epoch; raises if it is not worth it.
    """

    config: Config
    processes: Processes
    state: TrainState
    folder: Path
    classes: list[str]
    stop: StopRequest
    check: Callable[[], None]

    def sync_statistics(self) -> None:
        """Average BatchNorm's statistics over the processes, so that all evaluate and any one saves the same model."""
        if self.processes.world_size > 1:
            for model in (self.state.model, self.state.ema):
                if model is not None:
                    distribute_bn(model, self.processes.world_size, reduce=True)

    def after_update(self) -> None:
        """Within an epoch, save every SAVE_STEPS updates, and before stopping; its end is saved once it is evaluated.

        Raises:
            Preempted: a process was asked to stop; the state is saved.
        """
        steps, state = self.config.TRAIN.SAVE_STEPS, self.state
        stop = self._must_stop()
        if (stop or steps and state.update % steps == 0) and state.update % state.updates_per_epoch:
            self.check()
            self.sync_statistics()
            self._save(LATEST)
            if stop:
                self._leave()

    def after_epoch(self, accuracy: float) -> None:
        """Save every SAVE_FREQ epochs, after the last and before stopping; and a new best `accuracy`, in percent.

        Raises:
            Preempted: a process was asked to stop and this is not the last epoch; the state is saved.
        """
        state = self.state
        improved = accuracy > state.best
        state.best = max(state.best, accuracy)
        if improved:
            self._save(BEST)
        last, stop = state.epoch == self.config.TRAIN.EPOCHS, self._must_stop()
        if state.epoch % self.config.SAVE_FREQ == 0 or last or stop:
            self._save(LATEST)
        if stop and not last:
            self._leave()

    def after_failure(self, details: dict[str, Any]) -> str:
        """Save the state before an update that was not finite, and `details` of it; returns how to run it again."""
        replay = ["python", "main.py", "--cfg", self.folder / "config.yaml", "--tag", "replay"]
        replay += ["--opts", "TRAIN.AUTO_RESUME", "false", "--resume", self.folder / FAILED]
        details = details | {"replay": shlex.join(map(str, replay)), "config": self.config.model_dump(mode="json")}
        if self.processes.is_main:
            # average and loss scale may have gone on without the weights; both start anew
            before = replace(self.state, ema=None, scaler=GradScaler(enabled=False))
            try:
                save_checkpoint(self.folder / FAILED, before, self.config, self.classes)
                (self.folder / "failed.json").write_text(json.dumps(details, indent=1) + "\n")
            except (CheckpointError, OSError) as error:
                _logger.warning(f"the failed update is not recorded: {error}")
        self.processes.any(False)  # torchrun ends all when one leaves
        return details["replay"]

    def _must_stop(self) -> bool:
        return self.processes.any(bool(self.stop.signal))

    def _leave(self) -> NoReturn:
        self.processes.any(False)  # wait until the first process has saved: torchrun ends all when one leaves
        by = self.stop.signal or "a signal to another process"
        message = f"stopped by {by} at update {self.state.update}, saved in {self.folder}"
        raise Preempted(f"{message}; the same command continues there")

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
        "world_size": state.world_size,
        "update": state.update,
        "best": state.best,
        "config": config.model_dump(mode="json"),
        "classes": classes,
    }
    write_atomically(path, content, path.with_name(PREVIOUS) if path.name == LATEST else None)


def write_atomically(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """`torch.save` with a checksum that leaves either the old file or the whole new one, also when the machine fails.

    Args:
        path: where to write.
        content: what to write.
        previous: where to keep the old file; for a moment, it is then the only one.

    Raises:
        CheckpointError: the file cannot be written; the old one is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # always the same, so that a killed run leaves at most one
    try:
        torch.save(content, temporary)
        seal(temporary)
        _to_disk(temporary)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("StreamWriter|inline_container", str(error)):
            raise  # not by PyTorch's writer
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); what was saved before is intact. Make room, then run again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_own(folder: Path) -> Path | None:
    """The latest sound checkpoint of a run, None if it has none yet.

    Raises:
        CheckpointError: it has some, and all are damaged.
    """
    errors = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if path.exists():
            try:
                check_integrity(path, archive=True)
            except CheckpointError as error:
                errors.append(error)
                _logger.warning(str(error))
                continue
            if errors:
                _logger.warning(f"{path} is continued instead")
            return path
    if errors:
        raise CheckpointError(f"{errors[0]}, or remove {LATEST} and {PREVIOUS} to start anew")
    return None


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
    weights = fit_state_dict(content["model"], state.model, path, new_head=False)
    average = content["model_ema"] or content["model"]  # a run that switches EMA on starts it here
    average = fit_state_dict(average, state.model, path, new_head=False) if state.ema else None
    check_optimizer_state(content["optimizer"], state.optimizer, path)
    state.model.load_state_dict(weights)
    if state.ema:
        state.ema.module.load_state_dict(average)
    for saved, group in zip(content["optimizer"]["param_groups"], state.optimizer.param_groups, strict=True):
        saved.update({key: value for key, value in group.items() if key != "params"})  # this run's weight decay, betas
    state.optimizer.load_state_dict(content["optimizer"])
    if content["scaler"]:  # empty where the checkpoint's run scaled no losses
        state.scaler.load_state_dict(content["scaler"])
    state.update, state.best = content["update"], content["best"]
    for key, old, new in _differences(content["config"], config.model_dump(mode="json")):
        _logger.warning(f"{path} was written with {key} {old}, this run has {new}")
    if content.get("world_size", state.world_size) != state.world_size:
        _logger.warning(
            f"{path} was written by a run of {content['world_size']} processes, this one has {state.world_size}: "
            "global batch, order and augmentation of the images stay, the random numbers of mixup and drop path do not"
        )


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
