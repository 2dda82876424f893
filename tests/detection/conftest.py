"""Options and configs of small detectors."""

import copy
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import dense
from tests.dense import quick_configs  # noqa: F401, fixture
from tests.programs import single_thread  # noqa: F401, fixture

if not os.environ.get("CI") and importlib.util.find_spec("mmengine") is None:
    collect_ignore_glob = ["*"]  # environment without mmcv; CI always runs these tests

DETECTION = Path(__file__).parents[2] / "detection"
DEMO = DETECTION / "configs" / "demo"
PUBLISHED = DETECTION / "configs" / "lit"


def build_options(scenes: Path, work_dir: Path, **changes: Any) -> list[str]:
    """Build the options of a detector for one epoch with batch size 2."""
    keys: dict[str, Any] = {
        f"{split}_evaluator__ann_file": f"{scenes}/annotations/val.json" for split in ("val", "test")
    }
    keys |= dict(train_dataloader__batch_size=2, train_cfg__max_epochs=1, train_cfg__val_interval=1)
    return dense.build_options(scenes, work_dir, **(keys | changes))


@functools.cache
def read_config(path: Path) -> Any:
    """Read a config once. Tests must copy it before they change it."""
    from mmengine.config import Config

    return Config.fromfile(path)


def check_data(path: Path, root: Path, split: str = "train", *, all_classes: bool = True, **overrides: Any) -> None:
    """Check the data of a config as a training does. Keyword arguments override keys of the dataset."""
    from mmengine.registry import init_default_scope

    from lit_backbone.mm.data import check_dataset, check_loaded_files, check_masks
    from lit_backbone.mm.runner import StrictRunner

    cfg = copy.deepcopy(read_config(path))
    init_default_scope(cfg.default_scope)
    loader = cfg[f"{split}_dataloader"] | dict(num_workers=0, persistent_workers=False)
    loader["dataset"] |= dict(data_root=f"{root}/") | overrides
    dataset = StrictRunner.build_dataloader(loader, seed=0).dataset
    check_dataset(dataset)
    check_loaded_files(dataset.pipeline, dataset)
    check_masks([dataset], required=all_classes)
    dataset[0]


def classes_of_all_splits(classes: tuple[str, ...]) -> str:
    """Return lines of a config that set the classes of all datasets."""
    dataset = dict(dataset=dict(metainfo=dict(classes=classes)))
    return "\n".join(f"{split}_dataloader = {dataset}" for split in ("train", "val", "test"))


@pytest.fixture(scope="package", autouse=True)
def imported() -> None:
    """Import the packages that the forked programs need."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@pytest.fixture
def options(scenes: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that builds the options of a run in a subdirectory of `tmp_path`."""
    return lambda work_dir="run", **changes: build_options(scenes, tmp_path / work_dir, **changes)
