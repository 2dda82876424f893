"""Train, evaluate or time a classifier: `python main.py --cfg configs/lit-s.yaml --data-path /data/imagenet`."""

import argparse
import json
import logging
import platform
import shlex
import sys
from contextlib import nullcontext
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

try:
    import lit_backbone  # noqa: F401, registers the models
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `bash setup_env.sh` and activate its environment")
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm

from config import Config, ConfigError, accumulation_steps, dump, load_config
from data import (
    DataError,
    build_train_loader,
    build_val_loader,
    check_same_classes,
    one_line,
    sample_images,
    seed_everything,
)
from distributed import PREEMPTED, Preempted, Processes, StopRequest, join_processes, stop_requests
from engine import (
    NonFiniteError,
    Trainer,
    amp_dtype,
    dtm_statistics,
    evaluate,
    measure_throughput,
    print_accuracy,
    to_device,
)
from lit_backbone import CheckpointError
from logs import RunLog, setup_logging
from optim import Schedule, build_optimizer
from resume import Saver, TrainState, find_own, load_weights, restore_checkpoint

_logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file of the run, e.g. configs/lit-s.yaml")
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


def build_model(config: Config, device: torch.device) -> nn.Module:
    """The configured model, its weights drawn from the seed alone."""
    seed_everything("weights", config.SEED)
    keywords = dict(config.MODEL.LIT)
    if timm.models.is_model_in_modules(config.MODEL.NAME, ["lit"]):
        keywords["img_size"] = config.DATA.IMG_SIZE
    model = timm.create_model(
        config.MODEL.NAME,
        num_classes=config.MODEL.NUM_CLASSES,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        **keywords,
    )
    model.to(device)
    if config.RUNTIME.COMPILE:
        model.compile()
    return model


def run_throughput(config: Config, processes: Processes) -> None:
    speed = measure_throughput(build_model(config, processes.device), config, processes)
    _logger.info(f"{config.MODEL.NAME}: {speed:.1f} images/s per process at batch size {config.DATA.BATCH_SIZE}")


def run_evaluation(config: Config, processes: Processes) -> None:
    if not config.MODEL.RESUME:
        raise ConfigError("--eval: needs a checkpoint; name it with --resume FILE")
    loader = build_val_loader(config, processes)
    model = build_model(config, processes.device)
    load_weights(config.MODEL.RESUME, model, new_head=False)
    stats = evaluate(model, loader, config, processes)
    if processes.is_main:
        print_accuracy(stats)


def run_training(config: Config, processes: Processes, folder: Path, stop: StopRequest) -> None:
    accumulation = accumulation_steps(config, processes.world_size)
    train_loader, val_loader = build_train_loader(config, processes), build_val_loader(config, processes)
    check_same_classes(train_loader.dataset, val_loader.dataset.dataset)
    checkpoint = find_checkpoint(config, folder)
    model = build_model(config, processes.device)
    if config.MODEL.PRETRAINED and not checkpoint:
        load_weights(config.MODEL.PRETRAINED, model, new_head=True)
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
    )
    schedule = Schedule(state.optimizer, config, updates_per_epoch)
    folder.mkdir(parents=True, exist_ok=True)
    setup_logging(processes.rank, folder)
    if checkpoint:
        restore_checkpoint(checkpoint, state, config)
    processes.check_same(state.update, f"{folder} must be one folder that all nodes share")
    if checkpoint:
        _logger.info(f"continuing {checkpoint} at epoch {state.epoch}, update {state.update % updates_per_epoch}")
    if processes.is_main:
        describe_run(config, processes, state, accumulation, folder)
    log = RunLog(folder if processes.is_main else None, state.epoch, state.update)
    trainer = Trainer(config, processes, state, processes.wrap(model), train_loader, schedule, log)
    saver = Saver(config, processes, state, folder, train_loader.dataset.classes, stop, trainer.check_finite)
    probe = to_device(sample_images(val_loader), processes.device, config) if processes.is_main else None
    try:
        with logging_redirect_tqdm() if processes.is_main else nullcontext():
            while state.epoch < config.TRAIN.EPOCHS:
                record = {"epoch": state.epoch} | trainer.train_epoch(after_update=saver.after_update)
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


def find_checkpoint(config: Config, folder: Path) -> str:
    """The run's own latest checkpoint if it may be continued, else MODEL.RESUME."""
    own = find_own(folder) if config.TRAIN.AUTO_RESUME else None
    if own is None:
        return config.MODEL.RESUME
    if ignored := config.MODEL.RESUME or config.MODEL.PRETRAINED:
        _logger.warning(f"{own} exists and is continued, not {ignored}; name another run with --tag to start anew")
    return str(own)


def describe_run(config: Config, processes: Processes, state: TrainState, accumulation: int, folder: Path) -> None:
    """Write configuration, command and versions beside the run, and log what the recipe amounts to here."""
    (folder / "config.yaml").write_text(dump(config))
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
        f"batch {config.DATA.BATCH_SIZE} x {processes.world_size} processes x {accumulation} accumulated = "
        f"{config.TRAIN.GLOBAL_BATCH} images per update, {state.updates_per_epoch} updates per epoch, "
        f"learning rate {config.learning_rates[0]:.3g}"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shortcuts = {name: value for name, value in vars(args).items() if name not in ("cfg", "eval", "throughput", "opts")}
    try:
        config = load_config(args.cfg, args.opts, **shortcuts)
        with join_processes(config.RUNTIME.DEVICE, config.RUNTIME.TIMEOUT) as processes:
            setup_logging(processes.rank)
            if args.throughput:
                run_throughput(config, processes)
            elif args.eval:
                run_evaluation(config, processes)
            else:
                with stop_requests() as stop:
                    run_training(config, processes, Path(config.OUTPUT) / Path(args.cfg).stem / config.TAG, stop)
    except Preempted as goodbye:
        _logger.warning(goodbye)
        sys.exit(PREEMPTED)
    except (ConfigError, DataError, CheckpointError, NonFiniteError) as error:
        message = one_line(error) if isinstance(error, DataError) else str(error)
        sys.exit(f"error: {message}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        remedy = "often for want of memory: lower DATA.NUM_WORKERS"
        sys.exit(f"error: a data loader's process was killed ({one_line(error)}), {remedy}")


if __name__ == "__main__":
    main()
