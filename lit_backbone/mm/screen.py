"""What a run prints: a header, progress and results. The rest is in its log file only."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO

from mmengine.config import Config

FILE_ONLY = ("\n" + 60 * "-" + "\nSystem environment:", "Config:\n", "Hooks will be executed", "paramwise_options")
FILE_ONLY += ("Distributed training is not used", '"FileClient" will be', '"HardDiskBackend" is', "Exp name: ")


def is_of_interest(record: logging.LogRecord) -> bool:
    """Whether one of mmengine's records is for the screen, too."""
    return not record.getMessage().startswith(FILE_ONLY)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides that packages are missing which mmdetection and mmsegmentation can use, and nothing here does."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.filterwarnings("ignore", "faster_coco_eval is not installed")
        yield


def import_package(cfg: Config) -> None:
    """Import all that a config can name of mmdetection or mmsegmentation, as its registries would by and by."""
    if (scope := cfg.get("default_scope")) in ("mmdet", "mmseg"):
        with quiet_imports():
            import_module(f"{scope}.utils").register_all_modules(init_default_scope=False)
