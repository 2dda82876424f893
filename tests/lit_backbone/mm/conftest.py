import importlib.util
import os

from tests.dense import quick_configs  # noqa: F401, fixture

if not os.environ.get("CI") and importlib.util.find_spec("mmengine") is None:
    collect_ignore_glob = ["*"]  # environment without mmcv; CI always runs these tests
