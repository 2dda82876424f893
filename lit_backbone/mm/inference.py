"""Shared parts of the inference tools: arguments, model loading, output files and offset visualization."""

import argparse
import os
import sys
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..checkpoints import stored_classes
from ..images import DataError, find_images, open_rgb
from ..precision import PRECISIONS, amp_dtype, autocast
from ..safe_reader import printable
from ..visualize import add_offset_arguments, write_offsets
from .checkpoints import fit_weights, load_file
from .cli import CFG_OPTIONS, one_line_errors, read_config
from .data import check_num_classes, unwrap_datasets
from .runner import keep_float32


def build_parser(description: str) -> argparse.ArgumentParser:
    """Build a parser with the options that all inference tools share."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, or folders that are searched")
    parser.add_argument("--config", required=True, metavar="FILE", help="config of the training run")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="trained here or released by the authors")
    parser.add_argument("--cfg-options", **CFG_OPTIONS, help="override keys of the config, as in training")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs"), metavar="DIR", help="(%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(%(default)s)")
    help = "precision; auto = bf16 on a GPU (%(default)s)"
    parser.add_argument("--amp", choices=PRECISIONS, default="off", help=help)
    return parser


def load_model(config: str, checkpoint: str, device: str | torch.device, **overrides: Any) -> nn.Module:
    """Build the model of a config in evaluation mode and load a checkpoint.

    The class names in the checkpoint take precedence over those of the test data in the config.
    """
    cfg = read_config(config, "model", "test_dataloader", **overrides)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    cfg.model.backbone.init_cfg = None
    model, content = revert_sync_batchnorm(MODELS.build(cfg.model)), load_file(checkpoint)
    model.load_state_dict(fit_weights(content, model, checkpoint))
    cfg.test_pipeline = unwrap_datasets(cfg.test_dataloader.dataset)[0].pipeline  # used by inference_model of mmseg
    metainfo = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True)).metainfo
    classes = stored_classes(content) or metainfo.get("classes")
    model.cfg, model.dataset_meta = cfg, dict(metainfo, classes=classes)
    check_num_classes(model, classes, checkpoint)
    keep_float32(model)
    return model.to(device).eval()


def load_inputs(args: argparse.Namespace) -> tuple[list[str], Any]:
    """List the images and load the model that the options of :func:`build_parser` name."""
    amp_dtype(args.amp, torch.device(args.device))  # raises DataError if the device lacks it
    return find_images(args.images), load_model(args.config, args.checkpoint, args.device, **args.cfg_options)


def process_images(
    images: list[str], args: argparse.Namespace, process: Callable[[np.ndarray, str, Path], str], suffix: str = ".png"
) -> None:
    """Process each image and print a message. Skip and report unusable images, and exit with status 1 at the end.

    `process` is a function of an image `(H, W, 3)` in RGB, its path and its output path. It runs in the precision of
    `--amp` and returns the message. Output paths are in `--out-dir`, end in `suffix`, are unique and never an input.
    """
    folder, device = args.out_dir, torch.device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    inputs, has_errors = list(map(os.path.realpath, images)), False
    used = {*inputs, *map(os.path.dirname, inputs)}  # an output may be a folder
    for path in tqdm(images, disable=None, delay=1):
        names = (f"{Path(path).stem}{number}{suffix}" for number in chain([""], map("-{}".format, count(2))))
        output = next(folder / name for name in names if os.path.realpath(folder / name) not in used)
        used.add(os.path.realpath(output))
        try:
            image = np.array(open_rgb(path, upright=True))
            with autocast(args.amp, device):
                message = process(image, path, output)
            tqdm.write(printable(message))
        except (DataError, cv2.error) as error:
            has_errors = True
            text = str(error) if str(error).startswith(path) else f"{path}: {error}"
            tqdm.write(f"error: {printable(text)}", file=sys.stderr)
    if has_errors:
        sys.exit(1)


@one_line_errors()
def visualize_offset(description: str, argv: list[str] | None = None) -> None:
    """Draw the sampling positions of the DTM layers of a backbone, at the size of each image."""
    parser = build_parser(description)
    add_offset_arguments(parser)
    args = parser.parse_args(argv)
    images, model = load_inputs(args)
    if args.html and len(images) > 1:
        raise DataError(f"--html {args.html}: {len(images)} images, but the viewer shows one. Pass a single image.")
    mean, std = model.data_preprocessor.mean, model.data_preprocessor.std  # (3, 1, 1)
    options = dict(grid=args.grid, plain=args.plain, html=args.html, at_most=args.at_most)

    def visualize(image: np.ndarray, path: str, output: Path) -> str:
        x = (torch.from_numpy(image).to(mean.device).permute(2, 0, 1) - mean) / std  # (H, W, 3) -> (3, H, W)
        return write_offsets(model.backbone, x, Image.fromarray(image), output, **options)

    process_images(images, args, visualize, suffix="")
