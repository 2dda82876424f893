"""Command lines of tools/train.py and tools/test.py, with the options of mmdetection 3. They run on GPUs or a CPU."""

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from ..checkpoints import CheckpointError
from ..images import DataError
from ..original import parse_args, report
from ..precision import amp_dtype, cpu_has_bf16
from ..run_lock import lock_directory
from ..safe_reader import preview
from .data import unwrap_datasets
from .hooks import AverageBuffersHook, CheckDataHook, OffsetHook
from .runner import StrictRunner

# Keys of the config that have an effect although no config sets them
OPTIONAL_KEYS = {*inspect.signature(StrictRunner).parameters, "allow_absent_classes", "compile", "model_wrapper_cfg"}
OPTIONAL_KEYS |= {"activation_checkpointing", "efficient_conv_bn_eval", "find_unused_parameters", "sync_bn"}
RANK_VARIABLES = {"pytorch": "RANK", "slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}  # set by the launchers
CFG_OPTIONS: dict[str, Any] = dict(nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with a one-line message on an error in the user's files or settings. Other exceptions propagate."""
    try:
        yield
    except (CheckpointError, DataError, FloatingPointError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]  # a DataLoader worker prepends its traceback
        sys.exit(f"error: {lines[-1]}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # keep the process group until all ranks are done
        torch.distributed.destroy_process_group()


@one_line_errors()
def train(description: str, argv: list[str] | None = None) -> None:
    """Train the model of a config."""
    parser = _build_parser(description)
    add = parser.add_argument
    add("--amp", action="store_true", help="train in mixed precision: fp16 on a GPU, bfloat16 on a CPU that has it")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate by the global batch size")
    help = "resume from a checkpoint; without FILE, from the latest checkpoint in the work directory"
    add("--resume", nargs="?", const="auto", metavar="FILE", help=help)
    add("--overwrite", action="store_true", help="start a new run in a work directory with checkpoints of another run")
    args = parse_args(parser, argv, "train")
    scaling = ["auto_scale_lr"] if args.auto_scale_lr else []
    cfg = _load_config(args, "model", "train_dataloader", "train_cfg", "optim_wrapper", *scaling)
    if args.amp and torch.cuda.is_available():
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    elif args.amp:
        amp_dtype("bf16", torch.device("cpu"))
        _replace_amp(cfg, "BFloat16OptimWrapper")
    if args.auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    resume = args.resume
    if cfg.get("resume"):
        resume, cfg.load_from = resume or cfg.get("load_from") or "auto", None
    if resume and args.overwrite:
        raise DataError("--overwrite: starts a new run, but --resume or resume=True continues one. Remove one of them.")
    cfg.resume = False  # the copy of the config in the work directory starts new runs
    with run_lock(cfg.work_dir, args.launcher):
        checkpoint = _find_latest(cfg.work_dir) if resume == "auto" else resume
        if not checkpoint:
            _start_new(cfg.work_dir, args.overwrite, bool(resume))
        runner = build_runner(cfg)
        runner.allow_new_head = not checkpoint
        if checkpoint:
            runner._resume, runner._load_from = True, checkpoint
        runner.train()


def run_lock(work_dir: str, launcher: str) -> AbstractContextManager[Any]:
    """Create the work directory and lock it on rank 0, or raise DataError if another training has locked it."""
    if int(os.environ.get(RANK_VARIABLES.get(launcher, ""), 0)):
        return nullcontext()  # other ranks end with rank 0
    return lock_directory(work_dir, "--work-dir")


@one_line_errors()
def test(description: str, argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a checkpoint and return the metrics."""
    parser = _build_parser(description)
    add = parser.add_argument
    add("checkpoint", help="checkpoint file, trained here or released by the authors")
    add("--out", metavar="PATH", help="write the predictions to a .pkl file, or masks to a directory")
    add("--show", action="store_true", help="show the predictions in a window")
    add("--show-dir", metavar="DIR", help="save images with the predictions")
    add("--wait-time", type=float, default=2, metavar="S", help="seconds per window (%(default)s)")
    add("--tta", action="store_true", help="use test-time augmentation")
    add("--amp", action="store_true", help="use mixed precision: fp16 on a GPU, bfloat16 on a CPU that has it")
    args = parse_args(parser, argv, "test")
    cfg = _load_config(args, "model", "test_dataloader", "test_evaluator", "test_cfg")
    cfg.load_from, cfg.resume = args.checkpoint, False
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        cfg.pop(key, None)
    _configure_outputs(cfg, args)
    if args.amp:
        device = get_device()
        amp_dtype("fp16" if device == "cuda" else "bf16", torch.device(device))
        cfg.test_cfg.fp16 = True
    if args.tta:
        if "mask_head" in cfg.model.get("roi_head", ()):
            raise DataError("--tta: mmdetection cannot average masks. Test a model with a mask head without --tta.")
        for dataset in unwrap_datasets(cfg.test_dataloader.dataset):
            dataset.pipeline = cfg.tta_pipeline
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    return build_runner(cfg).test()


def _build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file, for example one in configs/lit")
    parser.add_argument("--work-dir", metavar="DIR", help="work directory (work_dirs/<name of the config>)")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    help = "override keys of the config, for example train_dataloader.batch_size=4 model.backbone.with_cp=True"
    parser.add_argument("--cfg-options", **CFG_OPTIONS, help=help)
    return parser


def _load_config(args: argparse.Namespace, *required: str) -> Config:
    cfg = read_config(args.config, *required, **args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    return cfg


def read_config(path: str, *required: str, **overrides: Any) -> Config:
    """Execute a config file and override some keys. Raise DataError if it fails or lacks one of the `required` keys."""
    try:
        cfg = Config.fromfile(path)
        known = sorted({*cfg, *OPTIONAL_KEYS})
        cfg.merge_from_dict(overrides)
    except Exception as error:  # a program can raise any exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"  # mmengine's advice is at the end
        raise DataError(f"{path}: reading the config failed ({reason}). Fix the config or --cfg-options.") from error
    for name in (key.partition(".")[0] for key in overrides):
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            advice = f"Did you mean {close[0]}?" if close else "Check its spelling."
            raise DataError(f"--cfg-options: the config has no key {name!r}. {advice}")
    if missing := [key for key in required if not isinstance(cfg.get(key), dict | list) or not cfg[key]]:
        raise DataError(f"{path}: keys are missing ({', '.join(missing)}). Inherit from a config in configs/lit.")
    _translate_model(cfg.get("model") or {}, path)
    return cfg


def _translate_model(model: dict[str, Any], path: str) -> None:
    """Translate the overrides that the original's README documents. Refuse the original's types."""
    backbone = model.get("backbone", {})
    kind = backbone.get("type")
    if kind in ("LIT", "LIT_Ti"):
        advice = "Use type='LITBackbone', or inherit from a config in configs/lit."
        raise DataError(f"{path}: model.backbone.type={kind!r} is a type of the original. {advice}")
    if kind == "LITBackbone" and (weights := model.pop("pretrained", None)):
        backbone["init_cfg"] = dict(type="Pretrained", checkpoint=weights)
        report(f"{path}: model.pretrained: read as model.backbone.init_cfg.checkpoint")
    if kind == "LITBackbone" and "use_checkpoint" in backbone:
        backbone["with_cp"] = backbone.pop("use_checkpoint")
        report(f"{path}: model.backbone.use_checkpoint: read as with_cp")


def build_runner(cfg: Config) -> StrictRunner:
    """Build the runner of a config, with the hooks of this package that the config does not list.

    Without a GPU, train in float32 and communicate with gloo.
    """
    if not torch.cuda.is_available():
        if cfg.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
            advice = " For bfloat16, pass --amp." if cpu_has_bf16() else ""
            print_log(f"No GPU is available. Training in float32 instead of mixed precision.{advice}")
            _replace_amp(cfg, "OptimWrapper")
        if cfg.launcher == "pytorch":  # mmengine would assign a GPU to each process
            torch.distributed.init_process_group("gloo")
            cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    runner = StrictRunner.from_cfg(cfg)
    for hook in (AverageBuffersHook, CheckDataHook, OffsetHook):
        if not any(isinstance(x, hook) for x in runner.hooks):
            runner.register_hook(hook())
    return runner


def _replace_amp(cfg: Config, wrapper: str) -> None:
    """Replace AmpOptimWrapper, which needs a GPU, and remove its keywords."""
    cfg.optim_wrapper.type = wrapper
    for key in ("loss_scale", "dtype", "use_fsdp"):
        cfg.optim_wrapper.pop(key, None)


def _start_new(work_dir: str, overwrite: bool, resume: bool) -> None:
    """Raise DataError if a work directory holds checkpoints, or forget the latest one with `overwrite`.

    With `resume`, the latest checkpoint is unknown.
    """
    old = sorted(path.name for kind in ("best", "epoch", "iter") for path in Path(work_dir).glob(f"{kind}_*.pth"))
    if old and resume:
        raise DataError(f"{work_dir}: last_checkpoint is missing. Pass --resume FILE to choose one ({preview(old)}).")
    if old and not overwrite:
        advice = "Add --resume to continue that run, --work-dir for another directory, or --overwrite."
        raise DataError(f"{work_dir}: holds checkpoints of another run ({preview(old)}). {advice}")
    Path(work_dir, "last_checkpoint").unlink(missing_ok=True)  # --resume must not find it if this run is killed early


def _find_latest(work_dir: str) -> str:
    """Find the latest checkpoint, or return "". The path stored by mmengine is outdated in a moved directory."""
    latest = find_latest_checkpoint(work_dir) or ""
    moved = Path(work_dir, Path(latest).name)
    return str(moved) if moved.is_file() else latest


def _configure_outputs(cfg: Config, args: argparse.Namespace) -> None:
    """Show, draw and write predictions as requested on the command line."""
    is_detection = cfg.get("default_scope") == "mmdet"
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, show=args.show, wait_time=args.wait_time)
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="DrawingHook")]
    if args.show_dir and is_detection:
        cfg.default_hooks.visualization.test_out_dir = os.path.abspath(args.show_dir)  # else below the work directory
    elif args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if args.out and args.out.endswith((".pkl", ".pickle")):
        metric = dict(type="DumpDetResults" if is_detection else "DumpMasks", out_file_path=args.out)
        cfg.test_evaluator = [*metrics, metric]
    elif args.out and is_detection:
        raise DataError(f"--out {args.out}: unknown file type. Use a name that ends in .pkl.")
    elif args.out:
        metrics[0].output_dir = args.out
