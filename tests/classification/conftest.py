"""A tiny run for the trainer's tests: image files, a LIT of a few thousand parameters, a few steps."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from traceback import clear_frames
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import main
from tests.programs import single_thread  # noqa: F401, a fixture

CLASSES = ("ant", "bee", "cat")
TRAIN_IMAGES, VAL_IMAGES = 11, 4  # per class
TINY_LIT = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4], "mlp_ratios": 2}


def refusal(program: ModuleType, *args: str | Path) -> str:
    """Run a program that must fail, and return its message of one line."""
    with pytest.raises(SystemExit) as info:
        program.main(list(map(str, args)))
    message = info.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    if info.value.__context__:
        clear_frames(info.value.__context__.__traceback__)  # frees workers, which end slowly in a reference cycle
    return message.removeprefix("error: ")


def read_log(run_dir: Path, tag: str) -> list[float]:
    """Return a value of every epoch."""
    return [json.loads(line)[tag] for line in (run_dir / "log.jsonl").read_text().splitlines()]


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write `count` random JPEGs into each class folder. The brightest channel is the label."""
    random = np.random.RandomState(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.randint(0, 128, (40 + i, 48, 3))
            pixels[..., label] += 127
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.jpg")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `train/` and `val/` with three classes of 11 and 4 images, which no test changes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", TRAIN_IMAGES, seed=0)
    write_images(root / "val", VAL_IMAGES, seed=1)
    return root


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return the directory of a run with the config of `tiny_cfg`."""
    return tmp_path / "output" / "tiny" / "default"


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Write a small image folder that the test may change."""
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split, 4, seed=0)
    return tmp_path / "images"


def write_cfg(root: Path, image_folder: Path, name: str = "tiny", **sections: dict) -> Path:
    """Write the YAML file of a tiny run; keyword arguments replace keys of its sections."""
    settings = {
        "DATA": {"BATCH_SIZE": 4, "DATA_PATH": str(image_folder), "IMG_SIZE": 32, "NUM_WORKERS": 0},
        "MODEL": {"NUM_CLASSES": len(CLASSES), "LIT": TINY_LIT},
        "TRAIN": {"EPOCHS": 2, "GLOBAL_BATCH": 8, "WARMUP_EPOCHS": 1, "BASE_LR": 0.5},
        "RUNTIME": {"DEVICE": "cpu"},
        "OUTPUT": str(root / "output"),
        "PRINT_FREQ": 2,
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def tiny_cfg(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return :func:`write_cfg` for the directory of the test."""
    return partial(write_cfg, tmp_path, image_folder)


@pytest.fixture(scope="session")
def finished(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny run to its end, and return its directory, which no test changes."""
    root = tmp_path_factory.mktemp("finished")
    main.main(["--cfg", str(write_cfg(root, image_folder))])
    return root / "output" / "tiny" / "default"


@pytest.fixture
def finished_run(finished: Path, run_dir: Path) -> Path:
    """Copy the directory of the finished run to that of this test's runs."""
    return shutil.copytree(finished, run_dir)
