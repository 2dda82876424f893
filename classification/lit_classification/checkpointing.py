"""Training state: saved and restored exactly, in a run directory that one training uses at a time."""

import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import check_optimizer_state, class_mismatch, fit_state_dict, unwrap_state_dict
from lit_backbone.images import DataError
from lit_backbone.run_lock import lock_directory
from lit_classification.config import Config, ConfigError
from lit_classification.distributed import Ranks

_logger = logging.getLogger(__name__)

LATEST, PREVIOUS, BEST, DAMAGED = "latest.pth", "previous.pth", "best.pth", "latest.pth.damaged"
NEW_RUN = "Start a new run from its weights with --pretrained."
STORED_TYPES = {  # what save_checkpoint writes
    **{"model": dict, "model_ema": (dict, type(None)), "optimizer": dict, "scaler": dict, "config": dict},
    **{"updates_per_epoch": int, "update": int, "best": (int, float), "classes": list, "recipe": dict},
}
# Settings that two evaluations must share for their accuracies to compare
EVALUATION_KEYS = ("DATA.DATASET", "DATA.VAL_SPLIT", "DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.", "val images")


@dataclass
class TrainState:
    """Everything that the rest of a run depends on besides its config.

    Learning rates and random numbers follow from the number of steps, so no generator states are stored.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler  # disabled unless training runs in fp16
    ema: ModelEmaV3 | None
    steps_per_epoch: int  # optimizer steps
    run_dir: Path
    classes: list[str] = field(default_factory=list)  # names in the order of the labels
    fingerprint: dict[str, str] = field(default_factory=dict)  # settings that affect results, number of images
    step: int = 0  # steps done over the whole run
    evaluated: int = 0  # epochs evaluated; a checkpoint is saved before its epoch is evaluated
    frozen: list[nn.Module] = field(default_factory=list)  # modules in evaluation mode also in training
    teacher: nn.Module | None = None
    history: list[Tensor] = field(default_factory=list)  # (loss, gradient norm) of each step of the last epoch
    best: float = -math.inf  # highest validation accuracy so far, in percent

    @property
    def epoch(self) -> int:
        """Number of epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def eval_model(self) -> nn.Module:
        """Model that a run is judged by: the EMA if it keeps one."""
        return self.ema.module if self.ema else self.model

    def load_weights(self, weights: dict[str, Tensor], ema: dict[str, Tensor] | None = None) -> None:
        """Load weights. The EMA starts from them unless it is given."""
        self.model.load_state_dict(weights)
        if self.ema:
            self.ema.module.load_state_dict(ema or weights)


@cache  # the code may be edited while the run goes on
def git_commit() -> str:
    """Return the commit of this code, with `-dirty` if files were changed; empty outside a Git repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return ""
    return result.stdout.strip()


@contextmanager
def run_lock(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Create the run directory and lock it on rank 0, or raise DataError on all ranks if another training has."""
    lock, problem = nullcontext(), ""
    if ranks.is_main:
        try:
            lock = lock_directory(run_dir, "--tag")
        except DataError as error:
            problem = str(error)
    if problem := ranks.gather(problem)[0]:  # other ranks wait for the directory
        raise DataError(problem)
    with lock:
        yield


def save_checkpoint(name: str, state: TrainState, config: Config, ranks: Ranks) -> None:
    """Average BatchNorm statistics over ranks and write a checkpoint on rank 0. Call this on all ranks."""
    sync_batchnorm(state, ranks)
    history = ranks.sum(torch.stack(state.history)) / ranks.world_size if state.history else torch.zeros(0, 2)
    if ranks.is_main:
        content = {
            "model": state.model.state_dict(),
            "model_ema": state.ema.module.state_dict() if state.ema else None,
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "updates_per_epoch": state.steps_per_epoch,
            "update": state.step,
            "evaluated": state.evaluated,
            "history": history.cpu(),
            "best": state.best,
            "config": config.model_dump(mode="json"),
            "classes": state.classes,
            "recipe": state.fingerprint,
            "git": git_commit(),
        }
        atomic_save(content, state.run_dir / name, state.run_dir / PREVIOUS if name == LATEST else None)
    ranks.gather(None)  # torchrun kills all ranks when one exits, so wait until rank 0 has saved


def sync_batchnorm(state: TrainState, ranks: Ranks) -> None:
    """Average BatchNorm statistics over ranks, so that all evaluate and save the same model."""
    if ranks.world_size > 1:
        for model in filter(None, (state.model, state.ema)):
            distribute_bn(model, ranks.world_size, reduce=True)


def atomic_save(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint so that `path` is always the whole old or new file. Keep the old one as `previous`."""
    temp = path.with_name(f".{path.name}.tmp")
    temp.unlink(missing_ok=True)  # left by a killed run
    with open(temp, "xb") as file:  # does not follow a link
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, previous)
    os.replace(temp, path)


def find_resumable(run_dir: Path) -> tuple[str, dict[str, Any]] | None:
    """Return path and content of the latest sound checkpoint, None if there is none; raise if all are damaged.

    A damaged `latest.pth` is renamed, so that it never becomes `previous.pth`. Call this on rank 0.
    """
    paths = [path for path in (run_dir / LATEST, run_dir / PREVIOUS) if path.exists()]
    for path in paths:
        try:
            return str(path), read_checkpoint(path)
        except CheckpointError as error:
            if path == paths[-1]:
                raise CheckpointError(f"{error} Remove it to start from the beginning.") from error
            os.replace(path, run_dir / DAMAGED)
            _logger.warning(f"{error} Renamed to {DAMAGED}; resuming {PREVIOUS}.")
    return None


def restore_checkpoint(path: str, content: dict[str, Any], state: TrainState, config: Config) -> None:
    """Continue from a checkpoint of :func:`save_checkpoint`, with the hyperparameters of this run.

    Raise CheckpointError if it is of another model, other data or other settings.
    """
    wrong = [name for name, kind in STORED_TYPES.items() if not isinstance(content.get(name), kind)]
    if wrong or not (0 <= content["update"] < 2**53 and content["updates_per_epoch"] > 0 and content["best"] <= 100):
        problem = f"{(wrong or ['update'])[0]!r} is missing or not as main.py writes it"
        others = "Weights alone, or a run of the original or another trainer, cannot be continued."
        raise CheckpointError(f"{path}: {problem}. {others} {NEW_RUN}")
    if mismatch := class_mismatch(content, state.classes):
        fix = "If they were only renamed, pass --opts TRAIN.RESUME_CHANGED true."
        if not config.TRAIN.RESUME_CHANGED:
            raise CheckpointError(f"{path}: {mismatch}. Use data with its classes. {fix} {NEW_RUN}")
        _logger.warning(f"{path}: {mismatch}")
    if (steps := content["updates_per_epoch"]) != state.steps_per_epoch:
        problem = f"its epochs have {steps} steps, those of this run {state.steps_per_epoch}"
        raise CheckpointError(f"{path}: {problem}. Resume with the same dataset and TRAIN.GLOBAL_BATCH.")
    weights = fit_state_dict(unwrap_state_dict({"model": content["model"]}), state.model, path, new_head=False)
    average = unwrap_state_dict({"model": content["model_ema"]})
    ema = fit_state_dict(average, state.model, path, new_head=False) if content["model_ema"] else None
    check_optimizer_state(content["optimizer"], state.optimizer, path)
    if content["update"] and not content["optimizer"].get("state"):
        raise CheckpointError(f"{path}: its optimizer state is empty. {NEW_RUN}")
    changed = check_unchanged(path, content["recipe"], state.fingerprint, config.TRAIN.RESUME_CHANGED)
    state.load_weights(weights, ema)
    pairs = zip(state.optimizer.param_groups, content["optimizer"]["param_groups"], strict=True)
    groups = [stored | group | {"params": stored["params"]} for group, stored in pairs]
    state.optimizer.load_state_dict(content["optimizer"] | {"param_groups": groups})
    if content["scaler"].keys() == state.scaler.state_dict().keys():  # else one run does not scale its loss
        if not all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in content["scaler"].values()):
            raise CheckpointError(f"{path}: 'scaler' is not as main.py writes it. {NEW_RUN}")
        state.scaler.load_state_dict(content["scaler"])
    state.step = content["update"]
    state.evaluated = content.get("evaluated", state.epoch)
    state.history = list(content.get("history", torch.zeros(0, 2)).to(next(state.model.parameters()).device))
    if not mismatch and not any(key.startswith(EVALUATION_KEYS) for key in changed):
        state.best = content["best"]


def check_ranks_agree(values: dict[str, str], ranks: Ranks) -> None:
    """Raise ConfigError, which names the first difference, unless the values are the same on all ranks."""
    first, *others = ranks.gather(values)
    for rank, other in enumerate(others, 1):
        for key in (key for key in first if first[key] != other.get(key)):
            problem = f"is {other.get(key)} on rank {rank} and {first[key]} on rank 0"
            raise ConfigError(f"{key}: {problem}; give all ranks the same config and data")


def check_unchanged(path: str, stored: dict[str, str], current: dict[str, str], allow: bool) -> list[str]:
    """Return the keys that differ between a checkpoint's fingerprint and this run's; raise unless `allow`."""
    stored = {key: value for key, value in stored.items() if isinstance(value, str)}
    changed = [key for key in current if stored.get(key, current[key]) != current[key]]
    changes = [f"{key} {stored[key]} (this run: {current[key]})" for key in changed]
    if changes and not allow:
        fix = "To resume anyway, pass --opts TRAIN.RESUME_CHANGED true; to start a new run, pass --tag NAME."
        raise CheckpointError(f"{path}: was written with {', '.join(changes[:5])}. {fix}")
    for change in changes:
        _logger.warning(f"{path} was written with {change}")
    return changed
