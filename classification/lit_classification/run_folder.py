"""Writing to a run's folder: by one training at a time, each file whole or not at all."""

import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from lit_backbone import CheckpointError
from lit_classification.config import ConfigError
from lit_classification.distributed import Processes

_logger = logging.getLogger(__name__)

LOCK = "run.lock"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the operating system has against writing to a run's folder into one line."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or folder}: cannot be written ({error.strerror or error})"
        raise ConfigError(f"{problem}; make room there, or name another place with --output") from error


def rewrite(path: Path, text: str) -> None:
    """Replace a file's text at once, so that a kill leaves the old or the new one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


@contextmanager
def sole_writer(folder: Path, processes: Processes) -> Iterator[None]:
    """Keep other trainings out of a run's folder. The first process holds the lock, which dies with it.

    Raises:
        ConfigError: another training holds it, or the folder cannot be written.
    """
    lock = None
    with processes.together():
        if processes.is_main:
            with writing(folder):
                lock = _lock(folder)
    try:
        yield
    finally:
        if lock:
            with suppress(OSError):
                (folder / LOCK).unlink()  # before another may have it
            lock.close()


def _lock(folder: Path) -> TextIO:
    """The open and locked file, which names this process."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(folder / LOCK, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which is one host's own on some NFS
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            remedy = "name another run with --tag, or wait until it has ended"
            raise ConfigError(f"{folder}: {holder} trains there; {remedy}") from None
        except OSError as error:
            _logger.warning(f"{folder}: cannot be locked ({error.strerror}); see to it that nothing else trains there")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                break
        file.close()  # it was the lock of a run that has just ended
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def write_atomically(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """`torch.save` that leaves either the old file or the whole new one, also when the machine fails.

    Args:
        path: where to write.
        content: what to write.
        previous: where to keep the old file; for a moment, it is then the only one.

    Raises:
        CheckpointError: the file cannot be written; the old one is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # always the same, so that a killed run leaves at most one
    try:
        torch.save(content, temporary)
        _to_disk(temporary)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("StreamWriter|inline_container", str(error)):
            raise  # not by PyTorch's writer
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rpartition("strerror: ")[2]
        if "unexpected pos" in reason:  # so PyTorch's writer says that bytes did not arrive
            reason = "no room left, or a broken disk"
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); what was saved before is intact. Make room, then run again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
