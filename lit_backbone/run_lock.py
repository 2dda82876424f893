"""Lock of a run directory, in which one training at a time may write."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .images import DataError


def lock_directory(path: str | Path, option: str) -> AbstractContextManager[Any]:
    """Create a directory and lock it until the end of the context, or raise DataError if another process has.

    The message names the command line option that chooses another directory.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(Path(path, "run.lock"), timeout=0).acquire()
    except Timeout:
        raise DataError(f"{path}: another training runs there. Wait, or choose another {option}.") from None
