"""Processes and devices: a CPU, one GPU, or N processes under torchrun, through one interface; mixed precision."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_classification.config import Config, ConfigError


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run, and the device it works on.

    Attributes:
        cpu_group: of all processes, which communicate without their GPUs; None for a single one.
    """

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes; BatchNorm statistics stay each process's own."""
        if self.world_size == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)

    @property
    def wide(self) -> torch.dtype:
        """For sums over many images: float64 where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

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
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(found)

    def gather(self, value: Any) -> list[Any]:
        """The plain value of every process, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.cpu_group)
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
            if self.cpu_group:
                dist.destroy_process_group()  # as all leave, none waits for another
            raise error if failed[0] == self.rank else SystemExit(1)


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients of all but the last of accumulated batches need no averaging over the processes."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def join_processes(device: str = "auto", minutes: float = 30) -> Iterator[Processes]:
    """Join the processes that torchrun started, or stand alone.

    Args:
        device: `cpu`, `cuda`, `mps`, or `auto` for a GPU of CUDA's where there is one.
        minutes: a process that waits longer for the others fails instead of hanging for ever.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not getattr(torch, device).is_available():
        raise ConfigError(
            f"RUNTIME.DEVICE: is {device}, but PyTorch sees no GPU for it; use auto or cpu, or check the driver"
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun, as is LOCAL_RANK
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(f"{local_rank + 1} or more processes for {torch.cuda.device_count()} GPUs; start one per GPU")
    if device == "mps" and world_size > 1:
        raise ConfigError("RUNTIME.DEVICE: is mps, which serves a single process; start without torchrun")
    where = torch.device(device, local_rank if device == "cuda" else None)
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
    cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    yield Processes(dist.get_rank(), world_size, where, cpu_group)
    dist.destroy_process_group()  # not after an error, when others may wait in a collective until torchrun ends them


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a configuration's `bf16 | fp16 | off`; None for float32, which all but CUDA's GPUs use."""
    if name == "off" or device.type != "cuda":
        return None
    if name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


def describe_precision(name: str, device: torch.device) -> str:
    """What a model computes in by a configuration's `bf16 | fp16 | off`."""
    if dtype := amp_dtype(name, device):
        return f"{dtype} by autocast"
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if has_tf32 and torch.backends.cudnn.allow_tf32:
        return "float32, but convolutions in TF32, other than those of DTM's offsets"
    return "float32"


def autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def to_device(images: Tensor, device: torch.device, config: Config) -> Tensor:
    memory_format = torch.channels_last if config.RUNTIME.CHANNELS_LAST else torch.contiguous_format
    return images.to(device, non_blocking=True, memory_format=memory_format)
