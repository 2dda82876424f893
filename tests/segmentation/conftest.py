"""Options of small segmentors."""

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

SEGMENTATION = Path(__file__).parents[2] / "segmentation"
DEMO = SEGMENTATION / "configs" / "demo"
PUBLISHED = SEGMENTATION / "configs" / "lit"


def build_options(scenes: Path, work_dir: Path, **changes: Any) -> list[str]:
    """Build the options of a segmentor for one iteration with batch size 2, followed by validation and saving."""
    keys = dict(train_dataloader__batch_size=2, train_cfg__max_iters=1, train_cfg__val_interval=1)
    keys |= dict(default_hooks__checkpoint__interval=1, default_hooks__logger__interval=1)
    return dense.build_options(scenes, work_dir, **(keys | changes))


@pytest.fixture(scope="package", autouse=True)
def imported() -> None:
    """Import the packages that the forked programs need."""
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@pytest.fixture
def options(scenes: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that builds the options of a run in a subdirectory of `tmp_path`."""
    changes_of_demo = dict(param_scheduler__1__begin=0)  # after 100 iterations in the config
    return lambda work_dir="run", **changes: build_options(scenes, tmp_path / work_dir, **(changes_of_demo | changes))
