"""Train, evaluate or time a classifier: `python main.py --cfg configs/lit-s.yaml --data-path /data/imagenet`."""

import argparse
import json
import logging
import math
import multiprocessing
import platform
import shlex
import signal
import sys
from contextlib import nullcontext
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch.amp import GradScaler
from tqdm.contrib.logging import logging_redirect_tqdm

from lit_backbone import original, read_checkpoint
from lit_backbone.checkpoints import stored_classes
from lit_backbone.dtm import dtm_statistics
from lit_backbone.precision import amp_dtype
from lit_classification import checkpointing, data, distributed
from lit_classification.checkpointing import BEST, LATEST, TrainState, save_checkpoint
from lit_classification.config import Config, ConfigError, import_modules, one_line_errors, result_settings
from lit_classification.config_reader import adopt_keywords, config_from_checkpoint, dump_config, find_run, load_config
from lit_classification.distributed import STOPPED, Ranks, catch_stop_signals, init_distributed
from lit_classification.engine import epoch_averages, evaluate, measure_throughput, to_device, train_one_epoch
from lit_classification.logs import RunLog, setup_logging, worst_classes, write_evaluation
from lit_classification.model import build_model, find_config, freeze, load_model, load_pretrained, load_teacher
from lit_classification.optim import Schedule, build_optimizer

_logger = logging.getLogger(__name__)

LOADER_FAILURES = {  # what PyTorch says, and what to do
    "DataLoader worker (pid": "a DataLoader worker was killed, often for lack of memory. Lower DATA.NUM_WORKERS.",
    "shared memory": "DataLoader workers need shared memory (/dev/shm). Provide it or set DATA.NUM_WORKERS 0.",
    "DataLoader timed out": "no data for RUNTIME.TIMEOUT minutes. Check the disk of DATA.DATA_PATH or raise the limit.",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    help = "YAML file such as configs/lit-s.yaml, or config.yaml of a run to continue; optional with --eval"
    parser.add_argument("--cfg", metavar="FILE", help=help)
    mode, flag = parser.add_mutually_exclusive_group(), dict(dest="mode", action="store_const", default="train")
    mode.add_argument("--eval", const="eval", **flag, help="evaluate the checkpoint named by --resume")
    mode.add_argument("--throughput", const="throughput", **flag, help="measure images per second of inference")
    overrides = dict(nargs="+", action="extend", default=[], metavar="KEY VALUE")
    parser.add_argument("--opts", **overrides, help="override keys of the config, e.g. TRAIN.EPOCHS 100")
    parser.add_argument("--import", dest="imports", nargs="+", metavar="MODULE", help="IMPORTS: modules to import")
    parser.add_argument("--resume", metavar="FILE", help="MODEL.RESUME: checkpoint to continue or evaluate")
    parser.add_argument("--pretrained", metavar="FILE", help="MODEL.PRETRAINED: checkpoint to start from")
    parser.add_argument("--data-path", metavar="DIR", help="DATA.DATA_PATH: dataset with train/ and val/")
    parser.add_argument("--batch-size", type=int, metavar="N", help="DATA.BATCH_SIZE: images per rank")
    parser.add_argument("--output", metavar="DIR", help="OUTPUT: parent directory of all runs")
    parser.add_argument("--tag", help="TAG: name of this run")
    args = original.parse_args(parser, argv, "main")
    if args.mode == "throughput" and (args.resume or args.pretrained):
        parser.error("argument --throughput: measures the model of --cfg and reads no checkpoint")
    if not args.cfg and args.mode != "eval":
        parser.error("the following arguments are required: --cfg")
    return args


def train(config: Config, ranks: Ranks, run_dir: Path) -> None:
    """Train to the last epoch, from scratch, from pretrained weights, or from where the run was interrupted."""
    train_set, val_set = (data.build_dataset(config, is_training) for is_training in (True, False))
    data.check_classes(config, train_set, val_set)
    train_loader = data.build_train_loader(train_set, config, ranks)
    val_loader = data.build_val_loader(val_set, config, ranks)
    probe, _ = to_device((data.sample_images(val_set), torch.zeros(0)), config, ranks)
    model = build_model(config, ranks.device)
    frozen = freeze(model, config)
    if config.TRAIN.USE_CHECKPOINT:
        model.set_grad_checkpointing()
    ema = ModelEmaV3(model, decay=config.TRAIN.EMA) if config.TRAIN.EMA else None
    if ema and config.RUNTIME.COMPILE:
        ema.module.compile()  # a copy is not compiled
    optimizer = build_optimizer(model, config)
    scaler = GradScaler(ranks.device.type, enabled=amp_dtype(config.RUNTIME.AMP_DTYPE, ranks.device) == torch.float16)
    schedule = Schedule(optimizer, config, steps_per_epoch := train_loader.batch_sampler.steps)
    settings = result_settings(config) | {"train images": str(len(train_set)), "val images": str(len(val_set))}
    state = TrainState(model, optimizer, scaler, ema, steps_per_epoch, run_dir, train_set.classes, settings)
    state.frozen, state.teacher = frozen, load_teacher(config, ranks.device, train_set.classes)
    load_weights(state, config, ranks)
    checkpointing.check_ranks_agree(settings | {"classes": str(state.classes), "step": str(state.step)}, ranks)
    if state.evaluated >= config.TRAIN.EPOCHS:
        _logger.info(f"{run_dir}: finished already, after {state.epoch} epochs; to start a new run, pass --tag NAME")
        return
    log = RunLog(run_dir if ranks.is_main else None, state.evaluated, state.step)
    log_start(config, ranks, state)
    model = ranks.wrap(model)

    while (epoch := state.evaluated) < config.TRAIN.EPOCHS:
        if state.epoch == epoch:
            train_one_epoch(model, train_loader, state, schedule, config, ranks, log)
            if state.epoch == epoch:  # a signal asked to stop
                save_and_exit(state, config, ranks)
            if state.epoch % config.SAVE_FREQ == 0 or state.epoch == config.TRAIN.EPOCHS:
                save_checkpoint(LATEST, state, config, ranks)
        checkpointing.sync_batchnorm(state, ranks)
        stats, predictions = evaluate(state.eval_model, val_loader, config, ranks)
        is_best, state.best = stats["acc1"] > state.best, max(stats["acc1"], state.best)
        results = epoch_averages(state, ranks) | {f"val/{name}": value for name, value in stats.items()}
        results |= dtm_statistics(state.eval_model, probe)
        log.epoch(epoch, results, state.step, worst_classes(predictions, state.classes))
        state.evaluated += 1
        if is_best:
            save_checkpoint(BEST, state, config, ranks)
        if state.evaluated == config.TRAIN.EPOCHS:
            save_checkpoint(LATEST, state, config, ranks)
        elif ranks.stop_signal():
            save_and_exit(state, config, ranks)
    _logger.info(f"finished {config.TRAIN.EPOCHS} epochs, best Acc@1 {state.best:.3f}: {run_dir}")


def load_weights(state: TrainState, config: Config, ranks: Ranks) -> None:
    """Resume the latest checkpoint of the run or MODEL.RESUME, or start from MODEL.PRETRAINED."""
    latest = checkpointing.find_resumable(state.run_dir) if ranks.is_main else None
    if latest and not config.TRAIN.AUTO_RESUME:
        raise ConfigError(f"{state.run_dir}: holds a run, and TRAIN.AUTO_RESUME is false; choose another --tag")
    path = ranks.gather(latest[0] if latest else config.MODEL.RESUME)[0]
    if latest and (ignored := config.MODEL.RESUME or config.MODEL.PRETRAINED):
        _logger.warning(f"resuming {path}, not {ignored}; to start a new run, pass --tag NAME")
    if path:
        checkpointing.restore_checkpoint(path, latest[1] if latest else read_checkpoint(path), state, config)
        if Path(path).resolve().parent != state.run_dir.resolve():
            state.best = -math.inf  # its best.pth is elsewhere
        _logger.info(f"resuming {path} at epoch {state.epoch}, step {state.step % state.steps_per_epoch}")
    elif config.MODEL.PRETRAINED:
        state.load_weights(load_pretrained(config, state.model, state.classes))
        _logger.info(f"starting from {config.MODEL.PRETRAINED}")
    elif state.frozen:
        _logger.warning("MODEL.FREEZE, FREEZE_BN: the frozen layers are random; name a checkpoint in MODEL.PRETRAINED")


def save_and_exit(state: TrainState, config: Config, ranks: Ranks) -> NoReturn:
    """Save and exit with status 75, by which job schedulers can tell that the run is to be started again."""
    save_checkpoint(LATEST, state, config, ranks)
    _logger.warning(f"stopped by {ranks.stop_signal()} at step {state.step}; the same command resumes {state.run_dir}")
    sys.exit(STOPPED)


def log_start(config: Config, ranks: Ranks, state: TrainState) -> None:
    """Write config.yaml and starts.jsonl, and log what the config amounts to on these ranks."""
    if ranks.is_main:
        start = {"command": shlex.join(sys.argv), "started": datetime.now().isoformat(timespec="seconds")}
        start |= {"step": state.step, "ranks": ranks.world_size, "python": platform.python_version()}
        start |= {name: version(name) for name in ("torchvision", "timm", "lit-backbone")}
        start |= {"torch": torch.__version__, "git": checkpointing.git_commit()}
        (state.run_dir / "config.yaml").write_text(dump_config(config))
        with open(state.run_dir / "starts.jsonl", "a") as file:
            file.write(json.dumps(start) + "\n")
    batch, (peak, _, floor) = config.DATA.BATCH_SIZE, config.learning_rates
    params = sum(p.numel() for p in state.model.parameters())
    precision = distributed.describe_precision(config.RUNTIME.AMP_DTYPE, ranks.device)
    _logger.info(f"{config.MODEL.NAME}, {params:,} parameters, {precision}, run directory {state.run_dir}")
    _logger.info(
        f"global batch {config.TRAIN.GLOBAL_BATCH} = {batch} images x {ranks.world_size} ranks x "
        f"{config.TRAIN.GLOBAL_BATCH // (batch * ranks.world_size)} accumulation steps, "
        f"{state.steps_per_epoch} steps per epoch, learning rate {peak:.3g}"
    )
    if rising := [g["name"] for g in state.optimizer.param_groups if g["initial_lr"] < (1 - 1e-6) * floor]:
        _logger.warning(f"learning rates of {', '.join(rising)} rise to MIN_LR, {floor:.3g}, from below")
    if (share := config.TRAIN.EMA ** (config.TRAIN.EPOCHS * state.steps_per_epoch)) > 0.01:
        _logger.warning(f"TRAIN.EMA {config.TRAIN.EMA}: {share:.0%} of the last average are initial weights; lower it")


def evaluate_checkpoint(args: argparse.Namespace, shortcuts: dict[str, Any]) -> None:
    """Evaluate --resume with the config that it stores or, if it stores none, with --cfg."""
    config = load_config(args.cfg, args.opts, training=False, **shortcuts) if args.cfg else None
    path = args.resume or (config and config.MODEL.RESUME)
    if not path:
        raise ConfigError("--eval: needs a checkpoint; name it with --resume FILE")
    if config and config.DATA.DATA_PATH:
        shortcuts["data_path"] = config.DATA.DATA_PATH  # the place of the data is not a property of the checkpoint
    content = read_checkpoint(path)
    stored = config_from_checkpoint(content, path, args.opts, **shortcuts)
    config = stored or config or find_config(content, path, args.opts, **shortcuts)
    ranks = init_distributed(config)
    setup_logging(ranks.rank)
    if stored and args.cfg:
        _logger.info(f"{path} stores its config, which replaces {args.cfg} except for DATA_PATH; --opts overrides it")
    elif not stored and isinstance(recipe := content.get("recipe"), dict):  # another timm model
        keys = ("MODEL.", "DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP")
        settings = {key: value for key, value in result_settings(config).items() if key.startswith(keys)}
        checkpointing.check_unchanged(path, recipe, settings, allow=True)
    images = data.build_dataset(config, is_training=False)
    names, columns = stored_classes(content), None
    if len(images.classes) > 1 and set(images.classes) < set(names):
        columns = [names.index(name) for name in images.classes]
        _logger.info(f"{path}: evaluating the logits of the {len(columns)} of its {len(names)} classes in the data")
    else:
        data.check_classes(config, images)
    model = load_model(content, path, config, ranks.device, () if columns else images.classes)
    _logger.info(f"evaluating {path} in {distributed.describe_precision(config.TEST.AMP_DTYPE, ranks.device)}")
    stats, predictions = evaluate(model, data.build_val_loader(images, config, ranks), config, ranks, columns)
    if ranks.is_main:
        _logger.info(f"loss {stats['loss']:.3f}")
        print(f" * Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f}", flush=True)
        print(f"Accuracy of the network on the {stats['images']} test images: {stats['acc1']:.1f}%", flush=True)
        folder = find_run(path) or Path(config.OUTPUT, Path(path).stem)
        write_evaluation(folder, {"checkpoint": str(path)} | stats, predictions, images)
        _logger.info(f"{folder}: wrote eval.json, predictions.csv and confusion.png")


def run(args: argparse.Namespace) -> None:
    """Read the config, join the other ranks, and do what the command asks for."""
    shortcuts = {name: value for name, value in vars(args).items() if name not in ("cfg", "mode", "opts")}
    import_modules(args.imports or ())  # a checkpoint's config may need them
    if args.mode == "eval":
        return evaluate_checkpoint(args, shortcuts)
    config = load_config(args.cfg, args.opts, training=args.mode == "train", **shortcuts)
    ranks = init_distributed(config)
    if args.mode == "throughput":
        setup_logging(ranks.rank)
        speed = measure_throughput(build_model(config, ranks.device), config, ranks)
        _logger.info(f"{config.MODEL.NAME}: {speed:.1f} images/s per rank at batch size {config.DATA.BATCH_SIZE}")
        return
    started = find_run(args.cfg)
    run_dir = Path(config.OUTPUT, started.parent.name if started else Path(args.cfg).stem, config.TAG)
    with checkpointing.run_lock(run_dir, ranks), catch_stop_signals(ranks.stop_signals):
        setup_logging(ranks.rank, run_dir)
        with logging_redirect_tqdm() if ranks.is_main else nullcontext():  # it logs to the console
            train(adopt_keywords(config, run_dir), ranks, run_dir)


def main(argv: list[str] | None = None) -> None:
    try:
        with one_line_errors():
            run(parse_args(argv))
    except RuntimeError as error:
        fixes = [fix for words, fix in LOADER_FAILURES.items() if words in str(error)]
        if not fixes:
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error for a killed worker
        for worker in multiprocessing.active_children():
            worker.kill()  # one that hangs would keep this process from exiting
        sys.exit(f"error: {fixes[0]}")
    if dist.is_initialized():
        dist.destroy_process_group()  # not after an error, when other ranks may still wait in a collective


if __name__ == "__main__":
    main()
