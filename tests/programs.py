"""Scripts in separate processes that skip the seconds of importing packages."""

import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch


class Program(multiprocessing.get_context("fork").Process):
    """`python SCRIPT ARGS` in a fork of the test process, which has already imported the packages.

    The process leads a new session and handles Ctrl-C. It calls `prepare` before the script.
    """

    def __init__(self, script: Path, *args: str | Path, prepare: Callable[[], object] = lambda: None):
        super().__init__()
        self.command, self.prepare = list(map(str, [script, *args])), prepare
        self.file = tempfile.TemporaryFile()
        self.start()

    def run(self) -> None:
        os.setsid()
        for number in (1, 2):
            os.dup2(self.file.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        torch.cuda.is_available = lambda: False  # CUDA does not survive a fork
        forget_runs()
        forget_log_handlers()
        self.prepare()
        sys.argv = self.command
        sys.path.insert(0, str(Path(self.command[0]).parent))
        runpy.run_path(self.command[0], run_name="__main__")

    def poll(self) -> int | None:
        return self.exitcode

    def printed(self) -> str:
        """Return the output so far, stdout and stderr together."""
        return os.pread(self.file.fileno(), 2**24, 0).decode()

    def finish(self, *parts: str, status: int = 0) -> str:
        """Wait for the process, check its exit status and the `parts` of its output, and return the output."""
        self.join()
        printed = self.printed()
        assert self.exitcode == status, printed
        assert all(part in printed for part in parts), printed
        return printed


def forget_runs() -> None:
    """Drop the visualizers and loggers of earlier runs, which mmengine keeps until the process ends."""
    kinds = [sys.modules["mmengine.utils"].ManagerMixin] if "mmengine.utils" in sys.modules else []
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


def forget_log_handlers() -> None:
    """Drop handlers that write to pytest's captured streams, which may be closed by now."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()


def write_echo(folder: Path) -> Path:
    """Write a `python` that prints its arguments, and return its path."""
    path = folder / "bin" / "python"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\n[ "$1" = -I ] || echo "$@"\n')
    path.chmod(0o755)
    return path


def start_pair(*commands: list[str | Path]) -> list[Program]:
    """Start two ranks of one training, as on two nodes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [Program(*args, prepare=partial(os.environ.update, rank)) for args, rank in zip(commands, ranks)]


@pytest.fixture(scope="package", autouse=True)
def single_thread() -> Iterator[None]:
    """Use one thread: with more, small models are slower, by up to ten times on a busy machine."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
