"""The training and test tools of detection and segmentation: mmdet 3's command line, on GPUs or a CPU."""

import argparse
import atexit
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmcv.ops  # noqa: F401, fails here, with a name, where mmcv was built without its operators
import torch
import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.runner import Runner, find_latest_checkpoint
from timm.layers import to_2tuple

from ..checkpoints import CheckpointError
from ..images import DataError
from .runner import StrictRunner
from .screen import import_package

KEYS = {*inspect.signature(Runner).parameters, "model_wrapper_cfg", "find_unused_parameters", "sync_bn", "compile"}
KEYS |= {"efficient_conv_bn_eval", "activation_checkpointing", "auto_scale_lr", "tta_model", "tta_pipeline"}


def train(description: str, argv: list[str] | None = None) -> None:
    """Train the model of a config: the body of `tools/train.py`."""
    parser = _parser(description)
    parser.add_argument("--amp", action="store_true", help="train in mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate by the global batch")
    help = "continue from a checkpoint; without FILE, from the latest in the working directory"
    parser.add_argument("--resume", nargs="?", const="auto", metavar="FILE", help=help)
    args = parser.parse_args(argv)
    with one_line_errors():
        cfg = load_config(args, "model", "train_dataloader", "train_cfg", "optim_wrapper")
        if args.amp:
            cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
        if args.auto_scale_lr:
            if "auto_scale_lr" not in cfg:
                raise DataError(f"{args.config}: --auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) there")
            cfg.auto_scale_lr.enable = True
        if args.resume == "auto" and (latest := find_latest_checkpoint(cfg.work_dir)):
            own = Path(cfg.work_dir, Path(latest).name)  # in this folder, though it was moved or copied
            args.resume = str(own) if own.exists() else latest
        if args.resume not in (None, "auto"):
            cfg.resume, cfg.load_from = True, args.resume
        runner = build_runner(cfg)
        runner.new_head = not cfg.get("resume")
        runner.train()


def test(description: str, argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a checkpoint: the body of `tools/test.py`. Returns the metrics by name."""
    parser = _parser(description)
    parser.add_argument("checkpoint", help="file to evaluate, ours or the original's")
    parser.add_argument("--out", metavar="PATH", help="write the predictions")
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument("--show-dir", metavar="DIR", help="draw the predictions into pictures")
    parser.add_argument("--wait-time", type=float, default=2, metavar="S", help="seconds to show each (%(default)s)")
    parser.add_argument("--tta", action="store_true", help="average over test-time augmentations")
    args = parser.parse_args(argv)
    with one_line_errors():
        cfg = load_config(args, "model", "test_dataloader", "test_evaluator", "test_cfg")
        cfg.load_from, cfg.resume = args.checkpoint, False  # a run that was resumed says so in its config
        for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
            cfg.pop(key, None)
        _show_and_write(cfg, args)
        if args.tta:
            _augment_tests(cfg)
        return build_runner(cfg).test()


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="file of the run, e.g. one of configs/lit")
    parser.add_argument("--work-dir", metavar="DIR", help="where the run is written (work_dirs/<name of the config>)")
    add_cfg_options(parser, "e.g. train_dataloader.batch_size=4 model.backbone.with_cp=True")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    return parser


def add_cfg_options(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the option by which a command line replaces values of a config."""
    help = f"override keys of the config, {example}"
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE", help=help)


def load_config(args: argparse.Namespace, *needed: str) -> Config:
    """The config that a command line names, with its overrides; see :func:`read_config`."""
    cfg = read_config(args.config, *needed, **args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir or not cfg.get("work_dir"):
        cfg.work_dir = args.work_dir or str(Path("work_dirs", Path(args.config).stem))
    return cfg


def read_config(path: str, *needed: str, **overrides: Any) -> Config:
    """A config file, which is Python and runs, with some values replaced.

    Raises:
        DataError: it fails, or lacks one of the `needed` keys.
        FileNotFoundError: the file is not there, or one that it names.
    """
    try:
        cfg = Config.fromfile(path)
        if unread := {key.split(".")[0] for key in overrides} - KEYS:
            problem = f"{min(unread)}: neither {path} nor mmengine has this key"
            if min(unread) in cfg:  # a variable
                remedy = "change the key that it went into, such as train_dataloader.dataset.data_root"
                problem = f"{min(unread)}: mmengine does not read this key of {path}; {remedy}"
            raise DataError(f"--cfg-options: {problem}")
        cfg.merge_from_dict(overrides)
    except (DataError, FileNotFoundError):
        raise
    except Exception as error:  # a program can fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path}: no config that can be read ({reason:.300})") from error
    if missing := [key for key in needed if not isinstance(cfg.get(key), dict | list) or not cfg[key]]:
        raise DataError(f"{path}: defines no {', '.join(missing)}; start from one of those in configs/lit")
    return cfg


def build_runner(cfg: Config) -> StrictRunner:
    """The runner of a config; without a GPU in float32, and with gloo between processes."""
    import_package(cfg)
    if torch.cuda.is_available():
        return StrictRunner.from_cfg(cfg)
    if cfg.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
        print_log("no GPU: training in float32 in place of mixed precision")
        amp = ("type", "loss_scale", "dtype", "use_fsdp")
        cfg.optim_wrapper = {key: value for key, value in cfg.optim_wrapper.items() if key not in amp}
    if cfg.launcher == "pytorch":  # mmengine would choose a GPU for each process
        torch.distributed.init_process_group("gloo")
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    return StrictRunner.from_cfg(cfg)


def _show_and_write(cfg: Config, args: argparse.Namespace) -> None:
    """Make a config show, draw and write predictions as the command line says."""
    is_detection = cfg.get("default_scope") == "mmdet"
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, show=args.show, wait_time=args.wait_time)
    if args.show_dir and is_detection:
        cfg.default_hooks.visualization.test_out_dir = os.path.abspath(args.show_dir)  # else within the run's folder
    elif args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
    if args.out and is_detection:
        if not args.out.endswith((".pkl", ".pickle")):
            raise DataError(f"--out {args.out}: use a name that ends in .pkl")
        cfg.test_evaluator = [cfg.test_evaluator, dict(type="DumpDetResults", out_file_path=args.out)]
    elif args.out:
        cfg.test_evaluator.output_dir = args.out


def _augment_tests(cfg: Config) -> None:
    if "mask_head" in cfg.model.get("roi_head", ()):
        raise DataError("--tta: mmdetection averages boxes only, and this model finds masks too; leave it out")
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    steps = [step for aug in cfg.tta_pipeline for group in aug.get("transforms", ()) for step in group]
    own, scales = ([x["scale"] for x in part if "scale" in x] for part in (dataset.pipeline, steps))
    if scales and not own:
        raise DataError("--tta: scales the size that is tested at, and no step of the test pipeline has a scale")
    for step in filter(lambda step: "scale" in step, steps):  # mmdetection's are COCO's, the test's own first
        step["scale"] = tuple(round(a * b / c) for a, b, c in zip(step["scale"], to_2tuple(own[0]), scales[0]))
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line where the user's files or settings are at fault; other errors pass through."""
    try:
        yield
    except (CheckpointError, DataError, OSError) as error:
        # what fails in a loader's worker carries its traceback along
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.exit(f"error: {lines[-1]}")
    if torch.distributed.is_initialized():  # not after an error, when others may wait until torchrun ends them
        torch.distributed.barrier()  # nobody leaves while another one still talks
        torch.distributed.destroy_process_group()
        # skips the interpreter's own end, which sometimes aborts while threads of a process group are still there
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
