"""Scripts in processes of their own, without the seconds that each would spend on importing."""

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
    """`python SCRIPT ARGS`, forked from the tests, which have imported what it needs.

    It leads a session of its own, where Ctrl-C is heard. `prepare` is called in it first.
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
        torch.cuda.is_available = lambda: False  # what the tests' own process has begun there cannot be forked
        forget_runs()
        self.prepare()
        sys.argv = self.command
        sys.path.insert(0, str(Path(self.command[0]).parent))
        runpy.run_path(self.command[0], run_name="__main__")

    def poll(self) -> int | None:
        return self.exitcode

    def printed(self) -> str:
        """What it has printed so far, on both streams."""
        return os.pread(self.file.fileno(), 2**24, 0).decode()

    def finish(self, *parts: str, status: int = 0) -> str:
        """What it printed, once it has ended with that status."""
        self.join()
        printed = self.printed()
        assert self.exitcode == status, printed
        assert all(part in printed for part in parts), printed
        return printed


def forget_runs() -> None:
    """Drops the visualizer, logger and the like of runs so far, which mmengine keeps for a whole process."""
    kinds = [sys.modules["mmengine.utils"].ManagerMixin] if "mmengine.utils" in sys.modules else []
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


def start_pair(*commands: list[str | Path]) -> list[Program]:
    """Two processes that train together, started as on two nodes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    places = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [Program(*args, prepare=partial(os.environ.update, place)) for args, place in zip(commands, places)]


@pytest.fixture(scope="package", autouse=True)
def single_thread() -> Iterator[None]:
    """Models this small lose more to waiting for threads than they gain, ten times over on a busy machine."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
