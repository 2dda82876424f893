"""The training and test tools of detection and segmentation: mmdet 3's command line, on GPUs or a CPU."""

import argparse
import atexit
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from reprlib import repr
from typing import Any

import mmcv.ops  # noqa: F401, fails here, with a name, where mmcv was built without its operators
import torch
import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import IterBasedTrainLoop, Runner, find_latest_checkpoint
from mmengine.utils import apply_to
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoints import CheckpointError, other_classes, unwrap_state_dict
from ..fit import check_optimizer_state
from ..images import DataError
from ..text import printable
from .data import check_classes, check_dataset, leaves
from .loading import fit_weights, load_file
from .screen import import_package, is_of_interest

HALF = (torch.float16, torch.bfloat16)
PROGRESS = {"last_step", "_global_step", "_last_value", "best", "num_bad_epochs", "cooldown_counter"}  # of a schedule
PROGRESS |= {"params", "foreach", "fused"}  # and what of a group of parameters is no setting
KEYS = {*inspect.signature(Runner).parameters, "model_wrapper_cfg", "find_unused_parameters", "sync_bn", "compile"}
KEYS |= {"efficient_conv_bn_eval", "activation_checkpointing"}  # of a config, which it need not have


class StrictRunner(Runner):
    """mmengine's runner, except that it refuses a checkpoint that is not its model's, where mmengine warns."""

    new_head = False  # whether a checkpoint may differ from the model outside the backbone: fine-tuning

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """As mmengine's; raises DataError where classes are one string, or a data set turns out to be empty."""
        configs = [leaf for leaf in leaves(dataloader) if isinstance(leaf, dict)]
        for config in configs:
            check_classes(config)
        try:
            with redirect_stdout(StringIO()):  # pycocotools counts its steps
                return Runner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError as error:
            if "need at least one array" not in str(error):  # numpy, on no samples at all
                raise
            for config in configs:
                check_dataset(DATASETS.build(dict(config, serialize_data=False)))
            raise

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        with redirect_stdout(StringIO()):
            return super().build_evaluator(evaluator)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """As mmengine's, but for what is in the file only; begins with a header."""
        logger = super().build_logger(*args, **kwargs)
        logger.handlers[0].addFilter(is_of_interest)  # the screen's
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        where = f"on {self._world_size} x {device}, in {self.work_dir}"
        logger.info(f"{self.cfg.filename}: {where}; environment and config are in {logger.log_file}")
        return logger

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """As mmengine's, with float32 arithmetic, and BN for SyncBN without a GPU, for which alone PyTorch has it."""
        if not torch.cuda.is_available():
            model = revert_sync_batchnorm(model)
        keep_float32(model)
        return super().wrap_model(model_wrapper_cfg, model)

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", **_: Any) -> dict[str, Any]:
        """Load a checkpoint's weights into the model.

        Raises:
            CheckpointError: the file cannot be read safely, is another model's, or knows other classes than the data;
                or it is to be resumed, and holds no optimiser or another one's.
        """
        checkpoint = load_file(filename, map_location)
        checkpoint.setdefault("state_dict", unwrap_state_dict(checkpoint))  # which EMAHook reads
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model, anew = self.model, ()
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        dataset = (self.train_dataloader if self._train_loop is not None else self.test_dataloader).dataset
        if misfit := other_classes(checkpoint, getattr(dataset, "metainfo", {}).get("classes", ())):
            if not self.new_head:
                raise CheckpointError(f"{filename}: {misfit}; give the data sets those by metainfo.classes")
            anew = class_dependent(self.cfg.model, model)
            self.logger.warning(f"{filename}: {misfit}; what depends on them starts anew")
        weights = fit_weights(checkpoint, model, filename, new_head=self.new_head, anew=anew)
        if self._resume:
            if "optimizer" not in checkpoint:
                remedy = "start from them with --cfg-options load_from=FILE instead"
                raise CheckpointError(f"{filename}: holds weights, not a run to resume; {remedy}")
            check_optimizer_state(checkpoint["optimizer"], self.optim_wrapper.optimizer, filename)
            if change := self.changed_setting(checkpoint):
                remedy = "resume with the run's own, or start from its weights with --cfg-options load_from=FILE"
                raise CheckpointError(f"{filename}: {printable(change, 300)}; {remedy}")
            # the classes have been compared; the rest, which mmengine compares too, has not been read
            checkpoint["meta"]["dataset_meta"] = getattr(self.train_dataloader.dataset, "metainfo", None)
        model.load_state_dict(weights)
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return checkpoint

    def changed_setting(self, checkpoint: dict[str, Any]) -> str:
        """A setting that resuming would overwrite by the checkpoint's, in words; empty if all are the same."""
        schedulers, groups = checkpoint.get("param_schedulers") or [], checkpoint["optimizer"]["param_groups"]
        own = [scheduler.state_dict() for scheduler in self.param_schedulers or []]
        pairs = {"param_scheduler": (schedulers, own), "group": (groups, self.optim_wrapper.optimizer.param_groups)}
        for name, (theirs, ours) in pairs.items():
            if len(theirs) != len(ours):
                return f"has {len(theirs)} {name}s, this run {len(ours)}"
            for i, (old, new) in enumerate(zip(theirs, ours)):
                for key in sorted((old.keys() & new.keys()) - PROGRESS):
                    if f"initial_{key}" in new or (key == "betas" and "initial_momentum" in new):
                        continue  # follows a schedule
                    if type(old[key]) is not type(new[key]) or old[key] != new[key]:
                        return f"{name} {i} has {key} {repr(old[key])}, this run {repr(new[key])}"
        return ""

    def dump_config(self) -> None:
        """As mmengine's, but not in tests, whose options would replace those of the training in the same folder."""
        if self._train_loop is not None:
            super().dump_config()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """As mmengine's; raises CheckpointError also for records that are no run's, those of a longer run, or those of
        one with other settings of optimiser and schedule, which mmengine would take in place of this run's."""
        try:
            super().resume(filename, *args, **kwargs)
            for key, value in self.message_hub.runtime_info.items():
                if key.startswith("best_ckpt"):  # mmengine deletes this file when it has a better one
                    own = re.fullmatch(r"best_.*\.pth", Path(value).name)
                    self.message_hub.update_info(key, str(Path(self.work_dir, own[0])) if own else "")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            remedy = "start from its weights with --cfg-options load_from=FILE instead"
            raise CheckpointError(f"{filename}: holds no run that can be resumed; {remedy}") from error
        unit, done, end = "epoch", self.epoch, self.max_epochs
        if isinstance(self.train_loop, IterBasedTrainLoop):
            unit, done, end = "iteration", self.iter, self.max_iters
        if done > end:
            raise CheckpointError(f"{filename}: is at {unit} {done}, and this run ends at {end}")


def class_dependent(config: ConfigDict, model: nn.Module) -> list[str]:
    """Keys of the weights that depend on the classes: with one class more, they would have another shape."""

    def one_more(node: Any) -> Any:
        if isinstance(node, dict):
            return ConfigDict({key: x + 1 if key == "num_classes" else one_more(x) for key, x in node.items()})
        return type(node)(map(one_more, node)) if isinstance(node, (list, tuple)) else node

    with torch.device("meta"):
        other = MODELS.build(one_more(config)).state_dict()
    return [key for key, value in model.state_dict().items() if value.shape != other[key].shape]


def keep_float32(model: nn.Module) -> None:
    """Run losses, the arithmetic of boxes and RoIAlign in float32 under autocast, too, as mmdetection 2 did.

    Layers of the heads, which produce what goes into it, stay in mixed precision.
    """
    for module in model.modules():
        names = ["loss_by_feat", "loss_and_target", "predict_by_feat"]
        names += ["forward"] * hasattr(module, "roi_layers")  # RoIAlign
        for name in filter(partial(hasattr, module), names):
            setattr(module, name, partial(_in_float32, getattr(module, name)))  # a partial is copied with its module


def _in_float32(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = apply_to((args, kwargs), lambda x: isinstance(x, Tensor) and x.dtype in HALF, Tensor.float)
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return function(*args, **kwargs)


# ---- the tools


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
        if unknown := {key.split(".")[0] for key in overrides} - cfg.keys() - KEYS:
            raise DataError(f"--cfg-options: {min(unknown)}: neither {path} nor mmengine has this key")
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
