"""Train, evaluate or time a classifier: `python main.py --cfg configs/lit-s.yaml --data-path /data/imagenet`."""

import argparse
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    if __name__ == "__main__":
        import lit_classification.interrupts  # noqa: F401, before what takes long to import
    from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `bash setup_env.sh` and activate its environment")
import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.amp import GradScaler
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm

from lit_classification.config import Config, ConfigError, accumulation_steps, dump, load_config
from lit_classification.data import (
    DataError,
    build_train_loader,
    build_val_loader,
    check_same_classes,
    end_loaders,
    loader_failure,
    sample_images,
)
from lit_classification.distributed import (
    PREEMPTED,
    Preempted,
    Processes,
    StopRequest,
    join_processes,
    sole_writer,
    stop_requests,
)
from lit_classification.engine import (
    NonFiniteError,
    Trainer,
    amp_dtype,
    dtm_statistics,
    evaluate,
    measure_throughput,
    print_accuracy,
    to_device,
)
from lit_classification.logs import RunLog, rewrite, setup_logging, writing
from lit_classification.model import as_trained, build_model, model_of
from lit_classification.optim import Schedule, build_optimizer
from lit_classification.recipe import check_processes, describe_recipe
from lit_classification.resume import Saver, TrainState, describe_end, find_resumable, restore_checkpoint

_logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cfg",
        required=True,
        metavar="FILE",
        help="YAML file of the run, e.g. configs/lit-s.yaml, or config.yaml of one to continue",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate the checkpoint named by --resume")
    mode.add_argument("--throughput", action="store_true", help="measure images per second of inference")
    overrides = dict(nargs="+", action="extend", default=[], metavar="KEY VALUE")
    parser.add_argument("--opts", **overrides, help="override keys of the configuration, e.g. TRAIN.EPOCHS 100")
    parser.add_argument("--resume", metavar="FILE", help="MODEL.RESUME: checkpoint to continue or evaluate")
    parser.add_argument("--pretrained", metavar="FILE", help="MODEL.PRETRAINED: checkpoint to start from")
    parser.add_argument("--data-path", metavar="DIR", help="DATA.DATA_PATH: data set with train/ and val/")
    parser.add_argument("--batch-size", type=int, metavar="N", help="DATA.BATCH_SIZE: images per process")
    parser.add_argument("--output", metavar="DIR", help="OUTPUT: where runs are written")
    parser.add_argument("--tag", help="TAG: name of this run")
    return parser.parse_args(argv)


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
        with processes.together(), writing(folder):
            checkpoint, content = find_checkpoint(config, folder) if processes.is_main else ("", {})
        checkpoint = processes.gather(checkpoint)[0]
        with processes.together():
            content = content or (read_checkpoint(checkpoint) if checkpoint else {})
            end = describe_end(content, checkpoint, config)
        if end:
            _logger.info(end)
        else:
            train(config, processes, folder, stop, *loaders, recipe, checkpoint, content)


def train(
    config: Config,
    processes: Processes,
    folder: Path,
    stop: StopRequest,
    train_loader: DataLoader,
    val_loader: DataLoader,
    recipe: dict[str, str],
    checkpoint: str,
    content: dict[str, Any],
) -> None:
    """Train to the last epoch, from a checkpoint's content if there is one; writes the run's folder."""
    classes = train_loader.dataset.classes
    with processes.together(), writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        setup_logging(processes.rank, folder)
    model = build_model(config, processes.device)
    if config.MODEL.PRETRAINED and not checkpoint:
        model.load_state_dict(load_checkpoint(config.MODEL.PRETRAINED, model, classes=classes))
    if config.TRAIN.USE_CHECKPOINT:
        model.set_grad_checkpointing()
    updates_per_epoch = train_loader.batch_sampler.updates
    dtype = amp_dtype(config.RUNTIME.AMP_DTYPE, processes.device)
    state = TrainState(
        model,
        optimizer=build_optimizer(model, config),
        scaler=GradScaler(processes.device.type, enabled=dtype == torch.float16),
        ema=ModelEmaV3(model, decay=config.TRAIN.EMA) if config.TRAIN.EMA else None,
        updates_per_epoch=updates_per_epoch,
        world_size=processes.world_size,
        recipe=recipe,
    )
    if state.ema and config.RUNTIME.COMPILE:
        state.ema.module.compile()  # a copy is not compiled
    schedule = Schedule(state.optimizer, config, updates_per_epoch)
    with processes.together():
        if checkpoint:
            restore_checkpoint(content, checkpoint, state, config, classes)
            content.clear()  # frees memory for the run
    processes.check_same(state.update, f"{folder} must be one folder that all nodes share")
    if checkpoint:
        _logger.info(f"continuing {checkpoint} at epoch {state.epoch}, update {state.update % updates_per_epoch}")
    with processes.together():
        if processes.is_main:
            with writing(folder):
                describe_run(config, processes, state, folder)
        log = RunLog(folder if processes.is_main else None, state.epoch, state.update)
    trainer = Trainer(config, processes, state, processes.wrap(model), train_loader, schedule, log, stop)
    saver = Saver(config, processes, state, folder, classes, stop, trainer.check_finite)
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


def validate(
    state: TrainState, loader: DataLoader, probe: Tensor | None, config: Config, processes: Processes
) -> dict[str, float]:
    """Accuracy of the weights a run is judged by, their moving average where there is one, and what DTM does.

    Args:
        probe: images `(b, 3, H, W)` on which DTM is looked at; None not to look.
    """
    model = state.ema.module if state.ema else state.model
    stats = evaluate(model, loader, config, processes)
    record = {f"val/{name}": value for name, value in stats.items()}
    _logger.info(
        f"epoch {state.epoch - 1}: Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f} "
        f"on {stats['images']} images, best so far {max(state.best, stats['acc1']):.3f}"
    )
    if probe is not None:
        record |= dtm_statistics(model, probe)
    return record


def find_checkpoint(config: Config, folder: Path) -> tuple[str, dict[str, Any]]:
    """Path and content of the run's own latest checkpoint if it may be continued, else MODEL.RESUME, yet to be read."""
    own = find_resumable(folder) if config.TRAIN.AUTO_RESUME else None
    if own is None:
        return config.MODEL.RESUME, {}
    if ignored := config.MODEL.RESUME or config.MODEL.PRETRAINED:
        _logger.warning(f"{own[0]} exists and is continued, not {ignored}; name another run with --tag to start anew")
    return str(own[0]), own[1]


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
    dtype = amp_dtype(config.RUNTIME.AMP_DTYPE, processes.device) or torch.float32
    _logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, {dtype} on {processes.device}, written to {folder}")
    _logger.info(
        f"batch {config.DATA.BATCH_SIZE} x {processes.world_size} processes x "
        f"{accumulation_steps(config, processes.world_size)} accumulated = "
        f"{config.TRAIN.GLOBAL_BATCH} images per update, {state.updates_per_epoch} updates per epoch, "
        f"learning rate {config.learning_rates[0]:.3g}"
    )


def locate_run(cfg: str) -> tuple[str, list[str]]:
    """Name of the run that a file configures, and options that come before the command's.

    The `config.yaml` that a run has left continues this run, wherever it lies and whatever the command's folder.
    """
    folder = Path(os.path.abspath(cfg)).parent
    if Path(cfg).name != "config.yaml" or not (folder / "starts.jsonl").is_file():
        return Path(cfg).stem, []
    own = {"OUTPUT": str(folder.parent.parent), "TAG": folder.name, "TRAIN.AUTO_RESUME": True}
    return folder.parent.name, [text for key, value in own.items() for text in (key, json.dumps(value))]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shortcuts = {name: value for name, value in vars(args).items() if name not in ("cfg", "eval", "throughput", "opts")}
    try:
        name, own = locate_run(args.cfg)
        training = not (args.eval or args.throughput)
        load = partial(load_config, args.cfg, [*own, *args.opts], training=training, **shortcuts)
        config = load()
        with join_processes(config.RUNTIME.DEVICE, config.RUNTIME.TIMEOUT) as processes:
            setup_logging(processes.rank)
            if args.throughput:
                run_throughput(config, processes)
            elif args.eval:
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


if __name__ == "__main__":
    main()
