"""Helpers for the tests of detection and segmentation: short runs of the tools on a few scenes."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.programs import Program


def derive(path: Path, base: Path, changes: str) -> Path:
    """Write a config that inherits from another one, for changes that --cfg-options cannot express."""
    path.write_text(f"_base_ = {str(base)!r}\n{changes}\n")
    return path


# Options that turn the LIT of a published config into a small, randomly initialized one
TINY_BACKBONE = ["load_from=None", "model.backbone.init_cfg=None", "model.backbone.arch._delete_=True"]
TINY_BACKBONE += ["model.backbone.arch.embed_dims=(8,16,32,64)", "model.backbone.arch.num_heads=(1,2,4,8)"]
TINY_BACKBONE += ["model.backbone.arch.depths=(1,1,1,1)", "model.neck.in_channels=[8,16,32,64]"]
TINY = [*TINY_BACKBONE, "model.neck.out_channels=16"]


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
    """Omit steps that take longer than the runs.

    These are yapf, descriptions of compilers, and a search in the model indices of mmdet and mmseg, which are 300 YAML
    files. The indices do not list what is in `_base_`, and configs inherit from that alone.
    """
    if importlib.util.find_spec("mmengine") is None:  # an environment for classification
        yield
        return

    def is_base(package: str, config: str) -> NoReturn:
        raise ValueError(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda code, **_: (code, True))
        patch.setattr("mmengine.config.utils._get_cfg_metainfo", is_base)
        patch.setattr("mmengine.runner.runner.collect_env", dict)
        yield
