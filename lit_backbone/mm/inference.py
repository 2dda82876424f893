"""What the tools that draw share: their command line, a trained model, pictures and the files to draw into."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..checkpoints import CheckpointError, stored_classes
from ..command_line import add_offset_arguments
from ..images import DataError, find_images, open_rgb
from ..offsets import write_offsets
from ..text import printable
from .commands import add_cfg_options, read_config
from .data import check_heads, leaves
from .loading import fit_weights, load_file
from .screen import import_package


def build_parser(description: str) -> argparse.ArgumentParser:
    """The command line that the tools share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="pictures, or folders of them at any depth")
    parser.add_argument("--config", required=True, metavar="FILE", help="config that the checkpoint was trained with")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="ours or the original's")
    add_cfg_options(parser, "model.backbone.arch=lit_ti, as in training")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs"), metavar="DIR", help="(%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_usable_device, default=device, help="(%(default)s)")
    return parser


def _usable_device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{name}: not usable here; use cpu, or cuda where there is a GPU") from error
    return torch.device(name)


def load_model(config: str, checkpoint: str, device: str | torch.device, **overrides: Any) -> nn.Module:
    """The model of a config, less some of its values, with a checkpoint's weights, in evaluation mode.

    As mmdetection's and mmsegmentation's own functions expect, it has the config as `cfg`, and names and colours of
    the classes as `dataset_meta`: those of the config's test data, but the names in the checkpoint where it has any.

    Raises:
        CheckpointError: the checkpoint cannot be read safely, or is another model's or that of other classes.
        DataError: the config cannot be read.
    """
    cfg = read_config(config, "model", "test_dataloader", **overrides)
    import_package(cfg)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    cfg.model.backbone.init_cfg = None  # the checkpoint brings all weights
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    content = load_file(checkpoint)
    model.load_state_dict(fit_weights(content, model, checkpoint))
    cfg.test_pipeline = leaves(cfg.test_dataloader.dataset)[0].pipeline  # which mmsegmentation's functions take
    model.cfg = cfg
    tested = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    classes = stored_classes(content) or tested.metainfo.get("classes")
    model.dataset_meta = dict(tested.metainfo, classes=classes)
    try:
        check_heads(model, classes)
    except DataError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    return model.to(device).eval()


def outputs(pictures: list[str], folder: Path, suffix: str = ".png") -> Iterator[tuple[str, Path]]:
    """Each picture with a path of its own to draw its result into, none of the pictures, under a progress bar."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = set(map(os.path.realpath, pictures))
    for picture in tqdm(pictures, disable=None, delay=1):
        output, number = folder / f"{Path(picture).stem}{suffix}", 1
        while os.path.realpath(output) in taken:
            number += 1
            output = folder / f"{Path(picture).stem}-{number}{suffix}"
        taken.add(os.path.realpath(output))
        yield picture, output


def visualize_offset(description: str, argv: list[str] | None = None) -> None:
    """The body of `tools/visualize_offset.py`: draw where a backbone's DTM samples pictures, each at its own size.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is another model's.
        DataError: a picture cannot be read or is too small, or the backbone has no DTM.
    """
    parser = build_parser(description)
    add_offset_arguments(parser)
    args = parser.parse_args(argv)
    pictures = find_images(args.images)
    if args.html and len(pictures) > 1:
        raise DataError(f"--html {args.html}: a page shows one picture, not {len(pictures)}; name one")
    model = load_model(args.config, args.checkpoint, args.device, **args.cfg_options)
    for picture, output in outputs(pictures, args.out_dir, suffix=""):
        image = np.array(open_rgb(picture, upright=True))  # (H, W, 3)
        flags = dict(grid=args.grid, html=args.html, at_most=args.at_most)
        mean, std = model.data_preprocessor.mean, model.data_preprocessor.std  # (3, 1, 1)
        x = (torch.from_numpy(image).to(mean.device).permute(2, 0, 1) - mean) / std  # (H, W, 3) -> (3, H, W)
        try:
            line = write_offsets(model.backbone, x, Image.fromarray(image), output, **flags)
        except DataError as error:
            raise DataError(f"{picture}: {error}") from error
        tqdm.write(printable(line))
