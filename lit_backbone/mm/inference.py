"""Shared parts of the inference tools: arguments, model loading, output files and offset visualization."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
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

from ..checkpoints import CheckpointError, stored_classes
from ..images import DataError, find_images, open_rgb
from ..safe_reader import printable
from ..visualize import add_offset_arguments, write_offsets
from .checkpoints import fit_weights, load_file
from .cli import add_cfg_options, one_line_errors, read_config
from .data import check_num_classes, unwrap_datasets


def build_parser(description: str) -> argparse.ArgumentParser:
    """Build a parser with the options that all inference tools share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, or folders that are searched")
    parser.add_argument("--config", required=True, metavar="FILE", help="config of the training run")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="trained here or released by the authors")
    add_cfg_options(parser, "for example model.backbone.arch=lit_ti, as in training")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs"), metavar="DIR", help="(%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_usable_device, default=device, help="(%(default)s)")
    return parser


def _usable_device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{name}: device is not available. Use cpu or cuda.") from error
    return torch.device(name)


def load_model(config: str, checkpoint: str, device: str | torch.device, **overrides: Any) -> nn.Module:
    """Build the model of a config and load a checkpoint, in evaluation mode.

    The class names in the checkpoint take precedence over those of the test data in the config.

    Raises:
        CheckpointError: the checkpoint cannot be read safely, or does not match the model.
    """
    cfg = read_config(config, "model", "test_dataloader", **overrides)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    cfg.model.backbone.init_cfg = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    content = load_file(checkpoint)
    model.load_state_dict(fit_weights(content, model, checkpoint))
    cfg.test_pipeline = unwrap_datasets(cfg.test_dataloader.dataset)[0].pipeline  # used by inference_model of mmseg
    model.cfg = cfg
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    classes = stored_classes(content) or dataset.metainfo.get("classes")
    model.dataset_meta = dict(dataset.metainfo, classes=classes)
    try:
        check_num_classes(model, classes)
    except DataError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    return model.to(device).eval()


def output_paths(images: list[str], folder: Path, suffix: str = ".png") -> Iterator[tuple[str, Path]]:
    """Yield (image, unique output path) with a progress bar. No output path is an input."""
    folder.mkdir(parents=True, exist_ok=True)
    used = set(map(os.path.realpath, images))
    for image in tqdm(images, disable=None, delay=1):
        output, number = folder / f"{Path(image).stem}{suffix}", 1
        while os.path.realpath(output) in used:
            number += 1
            output = folder / f"{Path(image).stem}-{number}{suffix}"
        used.add(os.path.realpath(output))
        yield image, output


def process_images(images: list[str], folder: Path, process: Callable[[str, Path], str], suffix: str = ".png") -> None:
    """Process each image and print a message. Skip and report unusable images, and exit with status 1 at the end.

    Args:
        images: image files.
        folder: output directory.
        process: function of the image and its output path that returns the message.
        suffix: suffix of the output paths.
    """
    num_errors = 0
    for path, output in output_paths(images, folder, suffix):
        try:
            tqdm.write(printable(process(path, output)))
        except (DataError, cv2.error) as error:
            num_errors += 1
            text = str(error) if str(error).startswith(path) else f"{path}: {error}"
            tqdm.write(f"error: {printable(text)}", file=sys.stderr)
    if num_errors:
        sys.exit(1)


def visualize_offset(description: str, argv: list[str] | None = None) -> None:
    """Draw the sampling positions of the DTM layers of a backbone, at the size of each image."""
    parser = build_parser(description)
    add_offset_arguments(parser)
    args = parser.parse_args(argv)
    with one_line_errors():
        images = find_images(args.images)
        if args.html and len(images) > 1:
            raise DataError(f"--html {args.html}: {len(images)} images, but the viewer shows one. Pass a single image.")
        model: Any = load_model(args.config, args.checkpoint, args.device, **args.cfg_options)
        mean, std = model.data_preprocessor.mean, model.data_preprocessor.std  # (3, 1, 1)
        options = dict(grid=args.grid, html=args.html, at_most=args.at_most)

        def visualize(path: str, output: Path) -> str:
            image = np.array(open_rgb(path, upright=True))  # (H, W, 3)
            x = (torch.from_numpy(image).to(mean.device).permute(2, 0, 1) - mean) / std  # (H, W, 3) -> (3, H, W)
            return write_offsets(model.backbone, x, Image.fromarray(image), output, **options)

        process_images(images, args.out_dir, visualize, suffix="")
