"""Processes and devices: a CPU, one GPU, or N processes under torchrun, through one interface."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError

TIMEOUT = timedelta(minutes=30)  # of a collective; a process that waits longer fails instead of hanging for ever


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run, and the device it works on."""

    rank: int
    world_size: int
    device: torch.device

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

    def check_same(self, value: int, remedy: str) -> None:
        """Raise ConfigError on processes whose value is not that of all."""
        total = self.sum(torch.tensor(value, device=self.device)).item()
        if total != value * self.world_size:
            raise ConfigError(f"process {self.rank} stands at update {value}, others elsewhere: {remedy}")


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients of all but the last of accumulated batches need no averaging over the processes."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started, or stand alone.

    Args:
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
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
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    yield Processes(dist.get_rank(), world_size, where)
    dist.destroy_process_group()  # not after an error, when others may wait in a collective until torchrun ends them
