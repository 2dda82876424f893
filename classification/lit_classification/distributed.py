"""Ranks, devices and stop signals: a CPU, one GPU, or N ranks under torchrun."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_backbone.precision import amp_dtype, cpu_has_bf16

if TYPE_CHECKING:
    from lit_classification.config import Config

STOPPED = 75  # exit status of a run that saved and stopped on a signal: EX_TEMPFAIL, "try again"


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run, its device, and the stop signals that it has received."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None  # communicates without waiting for GPUs
    stop_signals: list[str] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DDP if there are several ranks. BatchNorm statistics stay local until they are saved."""
        if self.world_size == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Gather a picklable value from every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def stop_signal(self) -> str:
        """Return the name of a stop signal that any rank has received, the same on all ranks, or ""."""
        return "".join(sum(self.gather(self.stop_signals), [])[:1])


def init_distributed(config: "Config") -> Ranks:
    """Join the ranks that torchrun started, or return a single rank.

    Exit with a message if this rank has no device. Raise DataError if the device lacks a configured precision.
    """
    if sys.platform == "linux":
        import resource

        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # open files, which DataLoader workers use up
        if "TORCHELASTIC_RUN_ID" in os.environ:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: receive SIGTERM when torchrun is killed
    device = config.RUNTIME.DEVICE
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not getattr(torch, device).is_available():
        sys.exit(f"error: RUNTIME.DEVICE: {device}: PyTorch sees no such GPU. Use auto or cpu, or check the driver.")
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if world_size > 1 and "RANK" not in os.environ:
        sys.exit(f"error: WORLD_SIZE is {world_size}, but RANK is not set. Start with torchrun, or unset WORLD_SIZE.")
    place = torch.device(device)
    if device == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            sys.exit(f"error: local rank {local_rank}: this node has {gpus} GPUs. Start one rank per GPU.")
        place = torch.device(device, local_rank)
        torch.cuda.set_device(place)
    for section in (config.RUNTIME, config.TEST):
        amp_dtype(section.AMP_DTYPE, place)
    if world_size == 1:
        return Ranks(0, 1, place)
    wait = timedelta(minutes=config.RUNTIME.TIMEOUT)
    store, rank, _ = next(dist.rendezvous("env://", timeout=wait))
    # torchrun keeps one store over its restarts, which still holds the addresses of ranks that died
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world_size)
    return Ranks(rank, world_size, place, dist.new_group(backend="gloo", timeout=wait))  # pyrefly: ignore


@contextmanager
def catch_stop_signals(received: list[str]) -> Iterator[None]:
    """Append the names of SIGTERM, SIGUSR1 and SIGINT to `received`. A second Ctrl-C ends the process at once."""

    def handler(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}  # nohup
    try:
        yield
    finally:
        for number, previous in handlers.items():
            signal.signal(number, previous)


def describe_precision(precision: str, device: torch.device) -> str:
    """Describe for the log what a model computes in, and where."""
    if dtype := amp_dtype(precision, device):
        return f"{dtype} autocast on {device}"
    if precision == "auto" and device.type == "cpu" and cpu_has_bf16():
        return "float32 on cpu, which also has bfloat16 (RUNTIME.AMP_DTYPE bf16)"
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device)[0] > 7
    return f"float32 on {device}{', with TF32 convolutions' if tf32 else ''}"


def no_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """Skip DDP's gradient averaging for all but the last of the accumulated micro-batches."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
