"""Command lines for segmentors small enough for tests."""

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

SEGMENTATION = Path(__file__).parents[2] / "segmentation"
DEMO = SEGMENTATION / "configs" / "demo"
PUBLISHED = SEGMENTATION / "configs" / "lit"


def build_options(scenes: Path, work_dir: Path, **changes: Any) -> list[str]:
    """:func:`dense.build_options` of a segmentor, for one iteration with a batch of 2, then validation and saving."""
    keys = dict(train_dataloader__batch_size=2, train_cfg__max_iters=1, train_cfg__val_interval=1)
    keys |= dict(default_hooks__checkpoint__interval=1, default_hooks__logger__interval=1)
    return dense.build_options(scenes, work_dir, **(keys | changes))


@pytest.fixture(scope="package", autouse=True)
def imported() -> None:
    """What the forked programs import, once for all of them."""
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@pytest.fixture
def options(scenes: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """:func:`build_options` for a run below `tmp_path`; its first argument names the run's folder."""
    return lambda work_dir="run", **changes: build_options(scenes, tmp_path / work_dir, **changes)
