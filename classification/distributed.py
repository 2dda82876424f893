"""Processes, devices and signals: a CPU, one GPU, or N processes under torchrun, through one interface."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError

PREEMPTED = 75  # exit status of a run that saved and stopped because it was asked to; sysexits calls it "try again"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class StopRequest:
    """The name of the signal that asked this process to stop, empty as long as none did."""

    signal: str = ""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals that ask to stop, instead of dying of them."""
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        request.signal = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
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

    def check_same(self, value: int, remedy: str) -> None:
        """Raise ConfigError on processes whose value is not that of all."""
        total = self.sum(torch.tensor(value, device=self.device)).item()
        if total != value * self.world_size:
            raise ConfigError(f"process {self.rank} stands at update {value}, others elsewhere: {remedy}")


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients of all but the last of accumulated batches need no averaging over the processes."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def join_processes(device: str = "auto", minutes: float = 30) -> Iterator[Processes]:
    """Join the processes that torchrun started, or stand alone.

    Args:
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        minutes: a process that waits longer for the others fails instead of hanging for ever.
    """
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
