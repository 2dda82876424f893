"""Processes, devices and signals: a CPU, one GPU, or N processes under torchrun, through one interface."""

import ctypes
import fcntl
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_classification.config import ConfigError
from lit_classification.logs import writing

_logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit status of a run that saved and stopped because it was asked to; sysexits calls it "try again"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOCK = "run.lock"
T = TypeVar("T")


class Preempted(Exception):
    """A signal asked the run to stop; its state is saved."""


class StopAsked(BaseException):
    """Training cannot go on, as a process was asked to stop; no `except Exception` on the way shall take it for its."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: name of the one that asked, empty as long as none did.
        waiting: whether a signal shall interrupt what this process is doing.
    """

    signal: str = ""
    waiting: bool = False

    def next_of(self, batches: Iterator[T]) -> T | None:
        """The next batch; None once this process is asked to stop, also while it waits for data that may never come."""
        try:
            try:
                self.waiting = True
                return None if self.signal else next(batches)
            finally:
                self.waiting = False
        except StopAsked:
            return None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals that ask to stop, instead of dying of them; a second Ctrl-C ends the process at once."""
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        if request.signal and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.signal = signal.Signals(number).name
        if request.waiting:
            raise StopAsked

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as in `nohup ... &`
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run, and the device it works on.

    Attributes:
        hosts: the processes as they meet without their GPUs; None for a single one.
    """

    rank: int
    world_size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes; BatchNorm statistics stay each process's own."""
        if self.world_size == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether the value is true on any process; waits for none of their GPUs."""
        if self.world_size == 1:
            return value
        found = torch.tensor(int(value))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.hosts)
        return bool(found)

    def gather(self, value: Any) -> list[Any]:
        """The plain value of every process, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.hosts)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step, without communication, that fails on all processes if it does on one; the first such says why."""
        error = None
        try:
            yield
        except Exception as found:
            error = found
        failed = [rank for rank, has_failed in enumerate(self.gather(error is not None)) if has_failed]
        if failed:
            if self.hosts:
                dist.destroy_process_group()  # as all leave, none waits for another
            raise error if failed[0] == self.rank else SystemExit(1)

    def check_same(self, value: Any, remedy: str) -> None:
        """Raise ConfigError unless the update that was reached is the same on all processes."""
        values = self.gather(value)
        with self.together():
            if len(set(values)) > 1:
                raise ConfigError(f"the processes stand at updates {values}: {remedy}")


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients of all but the last of accumulated batches need no averaging over the processes."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process a signal as soon as that which started it has died, however it did."""
    with suppress(AttributeError):  # other systems
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


@contextmanager
def join_processes(device: str = "auto", minutes: float = 30) -> Iterator[Processes]:
    """Join the processes that torchrun started, or stand alone.

    Args:
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        minutes: a process that waits longer for the others fails instead of hanging for ever.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # by torchrun
        end_with_parent(signal.SIGTERM)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("RUNTIME.DEVICE: is cuda, but PyTorch sees no GPU; use auto or cpu, or check the driver")
    world_size = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun, as is LOCAL_RANK
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(f"{local_rank + 1} or more processes for {torch.cuda.device_count()} GPUs; start one per GPU")
    where = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    if world_size == 1:
        yield Processes(0, 1, where)
        return
    timeout = timedelta(minutes=minutes)
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps one store over all its restarts, in which the addresses of processes that died would be found
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    hosts = dist.new_group(backend="gloo", timeout=timeout)
    yield Processes(dist.get_rank(), world_size, where, hosts)
    dist.destroy_process_group()  # not after an error, when others may wait in a collective until torchrun ends them


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
