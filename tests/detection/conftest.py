"""Scenes and command lines for detectors small enough for tests."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import dense
from tests.dense import quick_configs  # noqa: F401, a fixture
from tests.programs import single_thread  # noqa: F401, a fixture

if not os.environ.get("CI") and importlib.util.find_spec("mmengine") is None:
    collect_ignore_glob = ["*"]  # an environment for classification alone; continuous integration has all

DETECTION = Path(__file__).parents[2] / "detection"
DEMO = DETECTION / "configs" / "demo"
PUBLISHED = DETECTION / "configs" / "lit"


def build_options(scenes: Path, work_dir: Path, **changes: Any) -> list[str]:
    """:func:`dense.build_options` of a detector, for one epoch of batches of 2."""
    keys: dict[str, Any] = {
        f"{split}_evaluator__ann_file": f"{scenes}/annotations/val.json" for split in ("val", "test")
    }
    keys |= dict(train_dataloader__batch_size=2, train_cfg__max_epochs=1, train_cfg__val_interval=1)
    return dense.build_options(scenes, work_dir, **(keys | changes))


def classes_of_all_splits(classes: tuple[str, ...]) -> str:
    """Lines of a config that give the three data sets their categories."""
    dataset = dict(dataset=dict(metainfo=dict(classes=classes)))
    return "\n".join(f"{split}_dataloader = {dataset}" for split in ("train", "val", "test"))


@pytest.fixture(scope="package", autouse=True)
def imported() -> None:
    """What the forked programs import, once for all of them."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@pytest.fixture
def options(scenes: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """:func:`build_options` for a run below `tmp_path`; its first argument names the run's folder."""
    return lambda work_dir="run", **changes: build_options(scenes, tmp_path / work_dir, **changes)
