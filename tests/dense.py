"""What the tests of detection and segmentation share: short runs of the tools, on a few scenes."""

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

from lit_backbone.offsets import sampling_chains
from tests.programs import Program


def derive(path: Path, base: Path, changes: str) -> Path:
    """Writes a config that inherits from another one; for what options cannot say, such as class names of digits."""
    path.write_text(f"_base_ = {str(base)!r}\n{changes}\n")
    return path


# Options that make LIT-S in a published config small, as a user would, and its start random
TINY = ["load_from=None", "model.backbone.init_cfg=None", "model.backbone.arch._delete_=True"]
TINY += ["model.backbone.arch.embed_dims=(8,16,32,64)", "model.backbone.arch.num_heads=(1,2,4,8)"]
TINY += ["model.backbone.arch.depths=(1,1,1,1)", "model.neck.in_channels=[8,16,32,64]", "model.neck.out_channels=16"]


def draw_shapes(seed: int) -> tuple[Image.Image, Image.Image, list[tuple[int, int, int, int]]]:
    """A picture of 96 x 72 pixels, its mask (1 in a disc, 2 in a square), and the boxes of the two: x, y, w, h."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(100, size=(72, 96, 3), dtype=np.uint8))
    mask, boxes = Image.new("L", picture.size), []
    for left, number, color, shape in ((0, 1, "red", "ellipse"), (48, 2, "blue", "rectangle")):
        x, y = left + int(rng.integers(16)), int(rng.integers(40))
        for image, fill in ((picture, color), (mask, number)):
            getattr(ImageDraw.Draw(image), shape)((x, y, x + 29, y + 29), fill=fill)
        boxes.append((x, y, 30, 30))
    return picture, mask, boxes


def build_options(scenes: Path, work_dir: Path, **changes: Any) -> list[str]:
    """Command-line options of a run on the scenes in one process, without workers.

    Keyword arguments replace keys of the config, with `__` for a point.
    """
    keys = {f"{split}_dataloader__dataset__data_root": f"{scenes}/" for split in ("train", "val", "test")}
    keys |= {f"{split}_dataloader__num_workers": 0 for split in ("train", "val", "test")}
    keys |= {f"{split}_dataloader__persistent_workers": False for split in ("train", "val", "test")}
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in (keys | changes).items()]
    return ["--work-dir", str(work_dir), "--cfg-options", *pairs]


def output_of(*command: str | Path) -> str:
    """What a tool that succeeds has printed; it has a process of its own."""
    return Program(*command).finish()


def output_of_script(*command: str | Path) -> str:
    """What a bash script that succeeds has printed, in the environment of the tests."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finished = subprocess.run(["bash", *map(str, command)], env=environment, timeout=600, **output)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def error_of(tool: Callable[..., Any], *args: Any) -> str:
    """The line by which a tool ends."""
    with pytest.raises(SystemExit) as ended:
        tool(*args)
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture(scope="package", autouse=True)
def quick_configs() -> Iterator[None]:
    """A run's config is written without yapf, whose layout takes longer than the runs; model indices are read once."""
    from mmengine.config import utils  # not in an environment for classification alone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda code, **_: (code, True))
        patch.setattr(utils, "_get_cfg_metainfo", functools.cache(utils._get_cfg_metainfo))
        yield


def check_offset_tool(tool: Path, config: Path, checkpoint: Path, folder: Path) -> None:
    """Runs `visualize_offset.py` on a picture, with offsets that reach far, and compares with the sampling points."""
    from lit_backbone.mm.inference import load_model  # not in an environment for classification alone

    content = torch.load(checkpoint, weights_only=False)
    torch.manual_seed(0)
    for name, value in content["state_dict"].items():
        if ".offset." in name:
            content["state_dict"][name] = torch.randn_like(value) * (2 if name.endswith("bias") else 0.05)
    torch.save(content, folder / "far.pth")
    pixels = np.random.default_rng(0).integers(128, size=(101, 135, 3), dtype=np.uint8)  # 4 divides neither side
    Image.fromarray(pixels).save(folder / "own.png")
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    x = ((torch.from_numpy(pixels) - mean) / std).permute(2, 0, 1)
    chains = sampling_chains(load_model(str(config), str(folder / "far.pth"), "cpu").backbone, x)
    kept = sum(len(chains.of(row, column)) for row in range(3) for column in range(4))

    command = [folder / "own.png", "--config", config, "--checkpoint", folder / "far.pth", "--out-dir", folder]
    output = output_of(tool, *command, "--at-most", "2")
    assert 0 < kept < 768
    assert f"own: 3 x 4 tokens, {kept} sampling points, {768 - kept} dropped outside the map; 4 tokens drawn" in output
    drawn = {path.name: np.array(Image.open(path)) for path in (folder / "own").iterdir()}
    assert drawn.keys() == {f"{row}-{column}.png" for row in (0, 2) for column in (1, 3)}
    for y, x in chains.of(2, 1).tolist():
        if y < 100 and x < 134:  # the map reaches three pixels further
            y, x = round(5 * y), round(5 * x)
            assert (255, 0, 0) in map(tuple, drawn["2-1.png"][y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).tolist())
