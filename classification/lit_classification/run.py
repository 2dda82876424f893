"""A training, an evaluation or a measurement of speed, from its configuration to its end."""

import json
import logging
import math
import platform
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch.amp import GradScaler
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm

from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
from lit_backbone.images import DataError
from lit_classification.config import Config, ConfigError
from lit_classification.config_file import dump
from lit_classification.datasets import check_same_classes
from lit_classification.distributed import Processes, amp_dtype, describe_precision, join_processes, to_device
from lit_classification.evaluation import evaluate, measure_throughput, print_accuracy, validate
from lit_classification.loaders import build_train_loader, build_val_loader, end_loaders, loader_failure, sample_images
from lit_classification.logs import RunLog, setup_logging
from lit_classification.model import as_trained, build_model, model_of
from lit_classification.optim import Schedule, build_optimizer
from lit_classification.recipe import check_processes, describe_recipe
from lit_classification.resume import Saver, TrainState, describe_end, find_resumable, restore_checkpoint
from lit_classification.run_folder import rewrite, sole_writer, writing
from lit_classification.sampler import accumulation_steps
from lit_classification.signals import PREEMPTED, Preempted, StopRequest, stop_requests
from lit_classification.training import NonFiniteError, Trainer

_logger = logging.getLogger(__name__)


def run(mode: str, config: Config, load: Callable[..., Config], name: str) -> None:
    """What a command asks for; ends the process where it fails or is stopped.

    Args:
        mode: train, eval or throughput.
        config: what `load()` gives.
        load: :func:`load_config` for the command's files and options.
        name: of the run's folder.
    """
    try:
        with join_processes(config.RUNTIME.DEVICE, config.RUNTIME.TIMEOUT) as processes:
            setup_logging(processes.rank)
            if mode == "throughput":
                run_throughput(config, processes)
            elif mode == "eval":
                run_evaluation(config, processes, load)
            else:
                with stop_requests() as stop:
                    run_training(config, processes, Path(config.OUTPUT) / name / config.TAG, stop)
    except Preempted as goodbye:
        _logger.warning(goodbye)
        end_loaders()
        sys.exit(PREEMPTED)
    except (ConfigError, DataError, CheckpointError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, OSError) as error:
        if message := loader_failure(error):
            sys.exit(f"error: {message}")
        raise


def run_throughput(config: Config, processes: Processes) -> None:
    speed = measure_throughput(build_model(config, processes.device), config, processes)
    _logger.info(f"{config.MODEL.NAME}: {speed:.1f} images/s per process at batch size {config.DATA.BATCH_SIZE}")


def run_evaluation(config: Config, processes: Processes, load: Callable[..., Config]) -> None:
    path = config.MODEL.RESUME
    if not path:
        raise ConfigError("--eval: needs a checkpoint; name it with --resume FILE")
    content = read_checkpoint(path)
    config = as_trained(config, content, load)
    loader = build_val_loader(config, processes)
    model = model_of(content, path, config, processes.device, loader.dataset.dataset.classes)
    precision = describe_precision(config.TEST.AMP_DTYPE, processes.device)
    _logger.info(f"evaluating {path} in {precision} on {processes.device}")
    stats = evaluate(model, loader, config, processes)
    if processes.is_main:
        print_accuracy(stats)


def run_training(config: Config, processes: Processes, folder: Path, stop: StopRequest) -> None:
    with processes.together():
        accumulation_steps(config, processes.world_size)  # or an error
        loaders = build_train_loader(config, processes), build_val_loader(config, processes)
        images = {"train": loaders[0].dataset, "val": loaders[1].dataset.dataset}
        check_same_classes(*images.values())
        recipe = describe_recipe(config, images)
    check_processes(recipe, images, processes)
    with sole_writer(folder, processes):
        path, content = find_start(config, folder, processes)
        with processes.together():
            end = describe_end(path, content, config)
        if end:
            _logger.info(end)
            return
        with processes.together(), writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            setup_logging(processes.rank, folder)
        state = build_state(config, processes, recipe, loaders[0])
        with processes.together():
            if path:
                restore_checkpoint(path, content, state, config)
                if Path(path).resolve().parent != folder.resolve():
                    state.best = -math.inf  # its best.pth is not in this folder
                content.clear()  # of the size of model and optimiser
            elif file := config.MODEL.PRETRAINED:
                weights = load_checkpoint(file, state.model, classes=state.classes)
                state.load_weights(weights)
                _logger.info(f"starting from {file}: {len(weights)} tensors, all but what is said to be anew")
        updates = processes.gather(state.update)
        with processes.together():
            if len(set(updates)) > 1:
                raise ConfigError(f"the processes stand at updates {updates}: all nodes must share {folder}")
        if path:
            within = state.update % state.updates_per_epoch
            _logger.info(f"continuing {path} at epoch {state.epoch}, update {within}")
        train(config, processes, folder, stop, *loaders, state)


def find_start(config: Config, folder: Path, processes: Processes) -> tuple[str, dict[str, Any]]:
    """Path and content of the run's own latest checkpoint if it may be continued, else of MODEL.RESUME, if any."""
    path, content = config.MODEL.RESUME, {}
    with processes.together(), writing(folder):
        if processes.is_main and config.TRAIN.AUTO_RESUME and (own := find_resumable(folder)):
            if ignored := path or config.MODEL.PRETRAINED:
                remedy = "name another run with --tag to start anew"
                _logger.warning(f"{own[0]} exists and is continued, not {ignored}; {remedy}")
            path, content = own
    path = processes.gather(path)[0]
    with processes.together():
        return path, content or (read_checkpoint(path) if path else {})


def build_state(config: Config, processes: Processes, recipe: dict[str, str], loader: DataLoader) -> TrainState:
    """Model, optimiser, loss scale and moving average as they are before the first update."""
    model = build_model(config, processes.device)
    if config.TRAIN.USE_CHECKPOINT:
        model.set_grad_checkpointing()
    fp16 = amp_dtype(config.RUNTIME.AMP_DTYPE, processes.device) == torch.float16
    ema = ModelEmaV3(model, decay=config.TRAIN.EMA) if config.TRAIN.EMA else None
    if ema and config.RUNTIME.COMPILE:
        ema.module.compile()  # a copy is not compiled
    return TrainState(
        model,
        optimizer=build_optimizer(model, config),
        scaler=GradScaler(processes.device.type, enabled=fp16),
        ema=ema,
        updates_per_epoch=loader.batch_sampler.updates,
        classes=loader.dataset.classes,
        recipe=recipe,
    )


def describe_run(config: Config, processes: Processes, state: TrainState, folder: Path) -> None:
    """Write configuration, command and versions beside the run, and log what the recipe amounts to here."""
    rewrite(folder / "config.yaml", dump(config))
    start = {
        "command": shlex.join(sys.argv),
        "started": datetime.now().isoformat(timespec="seconds"),
        "update": state.update,
        "processes": processes.world_size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: version(name) for name in ("torchvision", "timm", "lit-backbone")},
    }
    with open(folder / "starts.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")
    parameters = sum(p.numel() for p in state.model.parameters())
    precision = describe_precision(config.RUNTIME.AMP_DTYPE, processes.device)
    _logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, written to {folder}")
    _logger.info(f"training in {precision} on {processes.device}")
    _logger.info(
        f"batch {config.DATA.BATCH_SIZE} x {processes.world_size} processes x "
        f"{accumulation_steps(config, processes.world_size)} accumulated = "
        f"{config.TRAIN.GLOBAL_BATCH} images per update, {state.updates_per_epoch} updates per epoch, "
        f"learning rate {config.learning_rates[0]:.3g}"
    )
    for group in state.optimizer.param_groups:
        if group["lr"] < (1 - 1e-6) * (floor := config.learning_rates[2]):
            _logger.warning(f"learning rates of {group['name']} rise from {group['lr']:.3g} to MIN_LR, {floor:.3g}")
    if (start := config.TRAIN.EMA ** (config.TRAIN.EPOCHS * state.updates_per_epoch)) > 0.01:
        _logger.warning(f"TRAIN.EMA {config.TRAIN.EMA}: {start:.0%} of the last average are initial weights; lower it")


def train(
    config: Config,
    processes: Processes,
    folder: Path,
    stop: StopRequest,
    train_loader: DataLoader,
    val_loader: DataLoader,
    state: TrainState,
) -> None:
    """Train from where the state stands to the last epoch; writes the run's folder."""
    with processes.together():
        if processes.is_main:
            with writing(folder):
                describe_run(config, processes, state, folder)
        log = RunLog(folder if processes.is_main else None, state.epoch, state.update)
    schedule = Schedule(state.optimizer, config, state.updates_per_epoch)
    trainer = Trainer(config, processes, state, processes.wrap(state.model), train_loader, schedule, log, stop)
    saver = Saver(config, processes, state, folder, stop, trainer.check_finite)
    probe = to_device(sample_images(val_loader), processes.device, config) if processes.is_main else None
    try:
        with logging_redirect_tqdm() if processes.is_main else nullcontext():
            while state.epoch < config.TRAIN.EPOCHS:
                record = {"epoch": state.epoch} | trainer.train_epoch(saver)
                saver.sync_statistics()
                record |= validate(state, val_loader, probe, config, processes)
                log.epoch(record, state.update)
                saver.after_epoch(record["val/acc1"])
    except NonFiniteError as error:
        replay = saver.after_failure(error.details)
        raise NonFiniteError(f"{error}; in one process again: {replay}", error.details) from error
    _logger.info(f"finished {config.TRAIN.EPOCHS} epochs, best Acc@1 {state.best:.3f}: {folder}")
