"""The folder that a run writes: its name, its lock, and what says how it was started."""

import fcntl
import json
import logging
import os
import platform
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch

from lit_classification.config import Config, ConfigError
from lit_classification.config_file import dump
from lit_classification.distributed import Processes, describe_precision
from lit_classification.resume import TrainState
from lit_classification.sampler import accumulation_steps

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


def describe_run(config: Config, processes: Processes, state: TrainState, folder: Path) -> None:
    """Write configuration, command and versions beside the run, and log what the recipe amounts to here."""
    rewrite(folder / "config.yaml", dump(config))
    start = {
        "command": shlex.join(sys.argv),
        "started": datetime.now().isoformat(timespec="seconds"),
        "update": state.update,
        "processes": processes.world_size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: version(name) for name in ("torchvision", "timm", "lit-backbone")},
    }
    with open(folder / "starts.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")
    parameters = sum(p.numel() for p in state.model.parameters())
    precision = describe_precision(config.RUNTIME.AMP_DTYPE, processes.device)
    _logger.info(f"{config.MODEL.NAME}: {parameters:,} parameters, written to {folder}")
    _logger.info(f"training in {precision} on {processes.device}")
    _logger.info(
        f"batch {config.DATA.BATCH_SIZE} x {processes.world_size} processes x "
        f"{accumulation_steps(config, processes.world_size)} accumulated = "
        f"{config.TRAIN.GLOBAL_BATCH} images per update, {state.updates_per_epoch} updates per epoch, "
        f"learning rate {config.learning_rates[0]:.3g}"
    )
