"""A tiny run for the trainer's tests: image files, a LIT of a few thousand parameters, a few steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.programs import single_thread  # noqa: F401, a fixture

CLASSES = ("ant", "bee", "cat")
TRAIN_IMAGES, VAL_IMAGES = 11, 4  # per class
TINY_LIT = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4], "mlp_ratios": 2}


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
def own_folder(tmp_path: Path) -> Path:
    """Write a small image folder that the test may change."""
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split, 4, seed=0)
    return tmp_path / "images"


@pytest.fixture
def tiny_cfg(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the YAML file of a tiny run; keyword arguments replace keys of its sections."""

    def write(name: str = "tiny", **sections: dict) -> Path:
        settings = {
            "DATA": {"BATCH_SIZE": 4, "DATA_PATH": str(image_folder), "IMG_SIZE": 32, "NUM_WORKERS": 0},
            "MODEL": {"NUM_CLASSES": len(CLASSES), "LIT": TINY_LIT},
            "TRAIN": {"EPOCHS": 2, "GLOBAL_BATCH": 8, "WARMUP_EPOCHS": 1, "BASE_LR": 0.5},
            "RUNTIME": {"DEVICE": "cpu"},
            "OUTPUT": str(tmp_path / "output"),
            "PRINT_FREQ": 2,
        }
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
