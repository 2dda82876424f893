"""From data sets to batches: augmentation, loader processes, mixup."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lit_backbone.checkpoints import printable
from lit_backbone.images import DataError, open_rgb
from lit_classification.config import Config
from lit_classification.datasets import build_dataset
from lit_classification.distributed import Processes
from lit_classification.sampler import TrainSampler
from lit_classification.signals import end_with_parent

FILES_BATCH, FILES_WORKERS = 32, 8  # at most, where single files are read
LOADER_FAILURES = {  # what PyTorch says, what it means
    "DataLoader worker (pid": "a data loader's process was killed, often for want of memory: lower DATA.NUM_WORKERS",
    "DataLoader timed out": "no data came for RUNTIME.TIMEOUT minutes: see to the disk or network that "
    "DATA.DATA_PATH is on, or raise the limit",
    "Too many open files": "raise the number of files that a process may open, ulimit -n, or lower DATA.NUM_WORKERS",
}


def loader_failure(error: Exception) -> str:
    """What to do about an error of PyTorch's data loading, on one line; empty if the error is none of these."""
    meanings = [meaning for words, meaning in LOADER_FAILURES.items() if words in str(error)]
    if not meanings:
        return ""
    end_loaders()
    return f"{meanings[0]} ({printable(str(error).strip().splitlines()[-1])})"


def end_loaders() -> None:
    """End the loaders' processes, of which a stopped or waiting one would keep this process from ending."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which PyTorch would raise an error
    for worker in torch.multiprocessing.active_children():
        worker.kill()


def build_train_loader(config: Config, processes: Processes) -> DataLoader:
    """Loader of this process's training batches, `(images (b, 3, H, W), classes (b,))`.

    Its `batch_sampler`, a :class:`TrainSampler`, can start at any update.

    Raises:
        DataError: the data set is unusable, or smaller than one global batch.
    """
    images = build_dataset(config, is_training=True)
    if len(images) < config.TRAIN.GLOBAL_BATCH:
        raise DataError(
            f"{config.DATA.DATA_PATH}: its {len(images)} training images do not fill TRAIN.GLOBAL_BATCH "
            f"{config.TRAIN.GLOBAL_BATCH}; lower it"
        )
    sampler = TrainSampler(
        len(images),
        config.TRAIN.GLOBAL_BATCH,
        config.DATA.BATCH_SIZE,
        repeats=config.AUG.REPEATED,
        seed=config.SEED,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    return DataLoader(images, batch_sampler=sampler, **_loader_options(config, processes))


def build_val_loader(config: Config, processes: Processes) -> DataLoader:
    """Loader of this process's share of the validation images; over all processes each image comes exactly once."""
    images = build_dataset(config, is_training=False)
    own = Subset(images, range(processes.rank, len(images), processes.world_size))
    return DataLoader(own, batch_size=config.DATA.BATCH_SIZE, **_loader_options(config, processes))


def sample_images(loader: DataLoader, count: int = 32) -> Tensor:
    """`(count, 3, H, W)`: images spread evenly over a loader's data set, whose classes follow each other."""
    step = max(len(loader.dataset) // count, 1)
    return torch.stack([loader.dataset[i][0] for i in range(0, len(loader.dataset), step)][:count])


def image_loader(paths: list[str], transform: Callable[[Image.Image], Tensor]) -> DataLoader:
    """Lists of `(path, image (3, H, W) float32)`, read by as many processes as pay for so many images.

    What is wrong with an image is in its place.
    """
    workers = min(len(paths) // FILES_BATCH, FILES_WORKERS, os.cpu_count() or 1)
    options = dict(num_workers=workers, collate_fn=partial(_read, transform), worker_init_fn=leave_process_group)
    return DataLoader(paths, FILES_BATCH, **options)


def _read(transform: Callable[[Image.Image], Tensor], paths: list[str]) -> list[tuple[str, Tensor | DataError]]:
    found = []
    for path in paths:
        try:
            found.append((path, transform(open_rgb(path))))
        except DataError as error:
            found.append((path, error))
    return found


def _loader_options(config: Config, processes: Processes) -> dict:
    pin_memory = config.DATA.PIN_MEMORY and processes.device.type == "cuda"
    workers = config.DATA.NUM_WORKERS
    if workers:
        _allow_files(64 + 16 * workers, workers)
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory)
    timeout = 60 * config.RUNTIME.TIMEOUT if workers else 0
    return options | dict(worker_init_fn=leave_process_group, timeout=timeout)


def _allow_files(count: int, workers: int) -> None:
    """Make room for the pipes and shared tensors of loaders; short of it, PyTorch's may wait for ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < count:  # -1: there is no limit
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
        except (OSError, ValueError) as error:
            problem = f"DATA.NUM_WORKERS {workers}: needs {count} open files, of which this process may have {hard}"
            raise DataError(f"{problem}; raise the limit (ulimit -n {count}), or lower the number") from error


def leave_process_group(worker: int) -> None:
    """Ctrl-C and torchrun signal the whole group; a loader's process that died of it would keep the run from saving.

    It must not outlive the run, either, however that ends.
    """
    end_with_parent(signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended before, which PyTorch would not notice
        os._exit(1)
    os.setsid()
