"""Helpers for the tests of detection and segmentation: short runs of the tools on a few scenes."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lit_backbone.visualize import sampling_chains
from tests.programs import Program


def derive(path: Path, base: Path, changes: str) -> Path:
    """Write a config that inherits from another one, for changes that --cfg-options cannot express."""
    path.write_text(f"_base_ = {str(base)!r}\n{changes}\n")
    return path


# Options that turn LIT-S of a published config into a small, randomly initialized LIT
TINY = ["load_from=None", "model.backbone.init_cfg=None", "model.backbone.arch._delete_=True"]
TINY += ["model.backbone.arch.embed_dims=(8,16,32,64)", "model.backbone.arch.num_heads=(1,2,4,8)"]
TINY += ["model.backbone.arch.depths=(1,1,1,1)", "model.neck.in_channels=[8,16,32,64]", "model.neck.out_channels=16"]


def draw_shapes(seed: int) -> tuple[Image.Image, Image.Image, list[tuple[int, int, int, int]]]:
    """Draw an image of 96 x 72 pixels, its mask (1: disc, 2: square) and the boxes (x, y, w, h) of both shapes."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(100, size=(72, 96, 3), dtype=np.uint8))
    mask, boxes = Image.new("L", image.size), []
    for left, number, color, shape in ((0, 1, "red", "ellipse"), (48, 2, "blue", "rectangle")):
        x, y = left + int(rng.integers(16)), int(rng.integers(40))
        for canvas, fill in ((image, color), (mask, number)):
            getattr(ImageDraw.Draw(canvas), shape)((x, y, x + 29, y + 29), fill=fill)
        boxes.append((x, y, 30, 30))
    return image, mask, boxes


def build_options(scenes: Path, work_dir: Path, **changes: Any) -> list[str]:
    """Build the options of a run on the scenes in one process, without DataLoader workers.

    Keyword arguments override keys of the config. `__` stands for a dot.
    """
    keys = {f"{split}_dataloader__dataset__data_root": f"{scenes}/" for split in ("train", "val", "test")}
    keys |= {f"{split}_dataloader__num_workers": 0 for split in ("train", "val", "test")}
    keys |= {f"{split}_dataloader__persistent_workers": False for split in ("train", "val", "test")}
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in (keys | changes).items()]
    return ["--work-dir", str(work_dir), "--cfg-options", *pairs]


def output_of(*command: str | Path) -> str:
    """Run a tool in a separate process and return its output."""
    return Program(*command).finish()


def output_of_script(*command: str | Path) -> str:
    """Run a bash script in the environment of the tests and return its output."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.run(["bash", *map(str, command)], env=environment, timeout=600, **output)
    assert process.returncode == 0, process.stdout
    return process.stdout


def error_of(tool: Callable[..., Any], *args: Any) -> str:
    """Run a tool that fails and return its one-line message."""
    with pytest.raises(SystemExit) as exit:
        tool(*args)
    message = str(exit.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture(scope="package", autouse=True)
def quick_configs() -> Iterator[None]:
    """Write configs without yapf, which takes longer than the runs, and read model indices once."""
    from mmengine.config import utils  # not installed in an environment for classification

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda code, **_: (code, True))
        patch.setattr(utils, "_get_cfg_metainfo", functools.cache(utils._get_cfg_metainfo))
        yield


def check_offset_tool(tool: Path, config: Path, checkpoint: Path, folder: Path) -> None:
    """Run `visualize_offset.py` on an image, with large offsets, and compare the drawing with the sampling points."""
    from lit_backbone.mm.inference import load_model  # not installed in an environment for classification

    content = torch.load(checkpoint, weights_only=False)
    torch.manual_seed(0)
    for name, value in content["state_dict"].items():
        if ".offset." in name:
            content["state_dict"][name] = torch.randn_like(value) * (2 if name.endswith("bias") else 0.05)
    torch.save(content, folder / "offsets.pth")
    pixels = np.random.default_rng(0).integers(128, size=(101, 135, 3), dtype=np.uint8)  # not divisible by 4
    Image.fromarray(pixels).save(folder / "image.png")
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    x = ((torch.from_numpy(pixels) - mean) / std).permute(2, 0, 1)
    chains = sampling_chains(load_model(str(config), str(folder / "offsets.pth"), "cpu").backbone, x)
    kept = sum(len(chains.of(row, column)) for row in range(3) for column in range(4))

    command = [folder / "image.png", "--config", config, "--checkpoint", folder / "offsets.pth", "--out-dir", folder]
    output = output_of(tool, *command, "--at-most", "2")
    assert 0 < kept < 768
    counts = f"{kept} sampling points, {768 - kept} dropped outside the feature map"
    assert f"image: 3 x 4 tokens, {counts}; 4 tokens" in output
    drawn = {path.name: np.array(Image.open(path)) for path in (folder / "image").iterdir()}
    assert drawn.keys() == {f"{row}-{column}.png" for row in (0, 2) for column in (1, 3)}
    for y, x in chains.of(2, 1).tolist():
        if y < 100 and x < 134:  # the padded feature map is three pixels larger
            y, x = round(5 * y), round(5 * x)
            assert (255, 0, 0) in map(tuple, drawn["2-1.png"][y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).tolist())
