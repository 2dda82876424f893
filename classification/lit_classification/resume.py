"""Checkpoints of a run: written whole or not at all, and enough to continue as if it had never stopped."""

import json
import logging
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from annotated_types import Predicate
from pydantic import Field
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import check_optimizer_state, class_mismatch, fit_state_dict, printable
from lit_classification.config import Config, differences
from lit_classification.distributed import Processes
from lit_classification.model import Records, stored_records
from lit_classification.recipe import check_unchanged, describe_settings
from lit_classification.run_folder import write_atomically
from lit_classification.signals import Preempted, StopRequest

_logger = logging.getLogger(__name__)

Weights = Annotated[dict[str, torch.Tensor], Field(min_length=1)]

LATEST, PREVIOUS, BEST, FAILED = "latest.pth", "previous.pth", "best.pth", "failed.pth"
DAMAGED = "latest.pth.damaged"


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
    classes: list[str] = field(default_factory=list)  # of the data, by label
    update: int = 0  # updates done, over the whole run
    best: float = -math.inf  # highest validation accuracy so far, in percent
    recipe: dict[str, str] = field(default_factory=dict)  # of the run, see `recipe.py`

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.update // self.updates_per_epoch

    def load_weights(self, weights: dict[str, torch.Tensor], average: dict[str, torch.Tensor] | None = None) -> None:
        """Load weights, from which the moving average starts anew unless it is given."""
        self.model.load_state_dict(weights)
        if self.ema:
            self.ema.module.load_state_dict(average or weights)


@dataclass
class Saver:
    """When a run's `latest.pth` and `best.pth` are written; only the first process writes.

    Attributes:
        stop: tells which signal asked to stop.
        check: called before the state is saved within an epoch; raises if it is not worth it.
        saved: the update that is in `latest.pth`, as far as this run has written it.
    """

    config: Config
    processes: Processes
    state: TrainState
    folder: Path
    stop: StopRequest
    check: Callable[[], None]
    saved: int = -1

    def sync_statistics(self) -> None:
        """Average BatchNorm's statistics over the processes, to evaluate and save one model."""
        if self.processes.world_size > 1:
            for model in (self.state.model, self.state.ema):
                if model is not None:
                    distribute_bn(model, self.processes.world_size, reduce=True)

    def after_update(self) -> None:
        """Within an epoch, save every SAVE_STEPS updates; the epoch's end is saved once it is evaluated."""
        steps, state = self.config.TRAIN.SAVE_STEPS, self.state
        if steps and state.update % steps == 0 and state.update % state.updates_per_epoch:
            self._check_and_save()

    def after_epoch(self, accuracy: float) -> None:
        """Save every SAVE_FREQ epochs and after the last; and a new best `accuracy`, in percent."""
        state = self.state
        if accuracy > state.best:
            state.best = accuracy
            self._save(BEST)
        if state.epoch % self.config.SAVE_FREQ == 0 or state.epoch == self.config.TRAIN.EPOCHS:
            self._save(LATEST)

    def leave(self) -> NoReturn:
        """Save what was done, unless it is, and end the run; to be called on all processes.

        Raises:
            Preempted: always.
        """
        if self.saved != self.state.update:
            self._check_and_save()
        by = self.stop.signal or "a signal to another process"
        message = f"stopped by {by} at update {self.state.update}, saved in {self.folder}"
        how = "" if self.config.TRAIN.AUTO_RESUME else " without TRAIN.AUTO_RESUME false"
        raise Preempted(f"{message}; the same command{how} continues there")

    def after_failure(self, details: dict[str, Any]) -> str:
        """Save the state before an update that was not finite, and `details` of it; returns how to run it again."""
        main = Path(__file__).parents[1] / "main.py"
        replay = ["python", main, "--cfg", self.folder / "config.yaml", "--tag", f"{self.folder.name}-replay"]
        replay += ["--opts", "TRAIN.AUTO_RESUME", "false", "--resume", self.folder / FAILED]
        details = details | {"replay": shlex.join(map(str, replay)), "config": self.config.model_dump(mode="json")}
        if self.processes.is_main:
            # average and loss scale may have gone on without the weights; both start anew
            before = replace(self.state, ema=None, scaler=GradScaler(enabled=False))
            # BatchNorm's statistics have seen the update, which does not use them
            for buffer in filter(torch.is_floating_point, before.model.buffers()):
                buffer.nan_to_num_(0.0, 0.0, 0.0)
            try:
                save_checkpoint(self.folder / FAILED, before, self.config)
                (self.folder / "failed.json").write_text(json.dumps(details, indent=1) + "\n")
            except (CheckpointError, OSError) as error:
                _logger.warning(f"the failed update is not recorded: {error}")
        self.processes.any(False)  # torchrun ends all when one leaves
        return details["replay"]

    def _check_and_save(self) -> None:
        self.check()
        self.sync_statistics()
        self._save(LATEST)

    def _save(self, name: str) -> None:
        with self.processes.together():  # none leaves before the first has saved: torchrun ends all when one does
            if self.processes.is_main:
                save_checkpoint(self.folder / name, self.state, self.config)
        if name == LATEST:
            self.saved = self.state.update


def save_checkpoint(path: Path, state: TrainState, config: Config) -> None:
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
        "classes": state.classes,
        "recipe": state.recipe,
    }
    write_atomically(path, content, path.with_name(PREVIOUS) if path.name == LATEST else None)


def find_resumable(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Path and content of a run's latest sound checkpoint, None if it has none yet; on the first process only.

    A damaged `latest.pth` is put aside, so that it never becomes `previous.pth`.

    Raises:
        CheckpointError: it has some, and all are damaged.
    """
    latest, damaged = folder / LATEST, {}
    for path in filter(Path.exists, (latest, folder / PREVIOUS)):
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        if latest in damaged:
            os.replace(latest, latest.with_name(DAMAGED))
            _logger.warning(f"{damaged[latest]}; put aside as {DAMAGED}, {path} is continued instead")
        return str(path), content
    for error in damaged.values():
        raise CheckpointError(f"{error}, or remove {LATEST} and {PREVIOUS} to start anew")
    return None


class RunRecords(Records):
    """All that :func:`save_checkpoint` writes."""

    model: Weights
    model_ema: Weights | None
    optimizer: dict[str, Any]
    scaler: dict[str, Annotated[int | float, Field(ge=0)]]
    updates_per_epoch: Annotated[int, Field(ge=1, lt=2**53)]
    update: Annotated[int, Field(ge=0, lt=2**53)]
    best: Annotated[float, Predicate(lambda percent: percent <= 100)]  # which NaN is not
    recipe: dict[str, str]


def describe_end(path: str, content: dict[str, Any], config: Config) -> str:
    """What to say of a checkpoint that has no epoch of a configuration left to train; nothing of others."""
    if "updates_per_epoch" not in content:
        return ""
    records = stored_records(content, path, RunRecords)
    epochs = records.update // records.updates_per_epoch
    if epochs < config.TRAIN.EPOCHS:
        return ""
    asked, before = describe_settings(config), records.recipe
    changed = [key for key in asked if asked[key] != before.get(key, asked[key])]
    ignored = "".join(f", {key} {asked[key]} (not {before[key]}) has no effect" for key in changed)
    remedy = f"--opts TRAIN.RESUME_CHANGED true TRAIN.EPOCHS {epochs + 1} or more go on, --tag NAME begins a new run"
    return printable(f"{path}: finished already, after {epochs} epochs{ignored}; {remedy}")


def restore_checkpoint(path: str, content: dict[str, Any], state: TrainState, config: Config) -> None:
    """Continue from the content of a checkpoint written by :func:`save_checkpoint`.

    Raises:
        CheckpointError: it is another model's, knows other classes than the data, was not written by this trainer, or
            by a run with other settings or files and TRAIN.RESUME_CHANGED is false.
    """
    if "optimizer" not in content or "updates_per_epoch" not in content:
        raise CheckpointError(f"{path}: holds weights, not a run to resume; start from them with --pretrained instead")
    run = stored_records(content, path, RunRecords)
    misfit = class_mismatch(content, state.classes)
    if misfit and not config.TRAIN.RESUME_CHANGED:
        remedy = f"use data of its classes, or start another run from its weights: --tag NAME --pretrained {path}"
        if len(run.classes) == len(state.classes):
            remedy += "; if they have only been renamed, in the same order, go on with --opts TRAIN.RESUME_CHANGED true"
        raise CheckpointError(f"{path}: {misfit}; {remedy}")
    if run.updates_per_epoch != state.updates_per_epoch:
        raise CheckpointError(
            f"{path}: its epochs have {run.updates_per_epoch} updates, this run's {state.updates_per_epoch}; "
            "resume with the same data set and TRAIN.GLOBAL_BATCH"
        )
    own = state.model.state_dict()
    if any(value.shape != own[key].shape for key, value in run.model.items() if "pos_" in key and key in own):
        raise CheckpointError(f"{path}: is for another DATA.IMG_SIZE; start from its weights with --pretrained instead")
    weights = fit_state_dict(run.model, state.model, path, new_head=False)
    average = None  # a run that switches EMA on starts it here
    if state.ema and run.model_ema:
        average = fit_state_dict(run.model_ema, state.model, path, new_head=False)
    check_optimizer_state(run.optimizer, state.optimizer, path)
    if run.update and not run.optimizer.get("state"):
        raise CheckpointError(f"{path}: its optimiser state is empty; start from its weights with --pretrained")
    if run.scaler and state.scaler.is_enabled() and run.scaler.keys() != state.scaler.state_dict().keys():
        raise CheckpointError(f"{path}: 'scaler' is not as main.py writes it; start from its weights with --pretrained")
    check_unchanged(path, run.recipe, state.recipe, config.TRAIN.RESUME_CHANGED)
    state.load_weights(weights, average)
    # with this run's learning rate, weight decay, betas
    pairs = zip(state.optimizer.param_groups, run.optimizer["param_groups"], strict=True)
    groups = [own | {"params": saved["params"]} for own, saved in pairs]
    state.optimizer.load_state_dict(run.optimizer | {"param_groups": groups})
    if run.scaler:  # empty where the checkpoint's run scaled no losses
        state.scaler.load_state_dict(run.scaler)
    state.update = run.update
    changes = [key for key, *_ in differences(run.recipe, state.recipe)]
    if not any(key.startswith(("DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.", "val/")) for key in changes):
        state.best = run.best
