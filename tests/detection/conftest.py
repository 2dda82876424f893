"""Scenes and a pretrained classifier for detectors small enough for tests."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

if not os.environ.get("CI") and importlib.util.find_spec("mmengine") is None:
    collect_ignore_glob = ["*"]  # an environment for classification alone; continuous integration has all

DETECTION = Path(__file__).parents[2] / "detection"
DEMO = DETECTION / "configs" / "demo"
PUBLISHED = DETECTION / "configs" / "lit"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of digits, 6 to train on and 4 held out; read only."""
    from demo.digit_scenes import write_scenes

    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, size=128, train=6, val=4)
    return root


@pytest.fixture(scope="session")
def digits_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as the demo's, untrained, in the form that the trainer writes."""
    torch.manual_seed(0)
    arch = dict(embed_dims=(24, 48, 96, 192), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    path = tmp_path_factory.mktemp("digits") / "latest.pth"
    torch.save({"model": timm.create_model("lit_s", **arch, img_size=64, num_classes=10).state_dict()}, path)
    return path


def build_options(scenes: Path, digits_checkpoint: Path, folder: Path, work_dir: str, **changes: Any) -> list[str]:
    """Command-line options of a short run on the scenes, in `folder / work_dir`.

    Keyword arguments replace keys of the config, with `__` for a point.
    """
    keys = {
        "train_dataloader.dataset.data_root": f"{scenes}/",
        "val_dataloader.dataset.data_root": f"{scenes}/",
        "test_dataloader.dataset.data_root": f"{scenes}/",
        "val_evaluator.ann_file": f"{scenes}/annotations/val.json",
        "test_evaluator.ann_file": f"{scenes}/annotations/val.json",
        "train_dataloader.batch_size": 2,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "val_dataloader.num_workers": 0,
        "val_dataloader.persistent_workers": False,
        "test_dataloader.num_workers": 0,
        "test_dataloader.persistent_workers": False,
        "model.backbone.init_cfg.checkpoint": digits_checkpoint,
        "train_cfg.max_epochs": 1,
        "train_cfg.val_interval": 1,
    }
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    pairs = [f"{key}={value}" for key, value in keys.items() if value is not None]
    return ["--work-dir", str(folder / work_dir), "--cfg-options", *pairs]


def derive(path: Path, base: Path, changes: str) -> Path:
    """Writes a config that inherits from another one; for what options cannot say, such as class names of digits."""
    path.write_text(f"_base_ = {str(base)!r}\n{changes}\n")
    return path


def classes_of_all_splits(classes: tuple[str, ...]) -> str:
    """Lines of a config that give the three data sets their categories."""
    dataset = dict(dataset=dict(metainfo=dict(classes=classes)))
    return "\n".join(f"{split}_dataloader = {dataset}" for split in ("train", "val", "test"))


@pytest.fixture
def options(scenes: Path, digits_checkpoint: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """:func:`build_options` for a run below `tmp_path`; its first argument names the run's folder."""
    return lambda work_dir="run", **changes: build_options(scenes, digits_checkpoint, tmp_path, work_dir, **changes)


@pytest.fixture(scope="package", autouse=True)
def single_thread() -> Iterator[None]:
    """Models this small lose more to waiting for threads than they gain."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
