"""The order of training images: a pure function of seed and position in the run, dealt out to the processes."""

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lit_classification.config import MIXING_ODD, Config, ConfigError


def derive_seed(purpose: str, *key: int) -> int:
    """A 32-bit seed that follows from what it is for and from the numbers in `key`, unrelated for any other call."""
    entropy = (zlib.crc32(purpose.encode()), len(key), *key)  # SeedSequence itself takes (1,) and (1, 0) for the same
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_everything(purpose: str, *key: int, devices: bool = True) -> None:
    """Seed the generators of Python, NumPy and PyTorch, see :func:`derive_seed`.

    Without devices, PyTorch's on the CPU alone: for a device not in use, torch.manual_seed formats a stack trace to
    remember, and that takes as long as reading a small image.
    """
    seed = derive_seed(purpose, *key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed) if devices else torch.default_generator.manual_seed(seed)


def accumulation_steps(config: Config, world_size: int) -> int:
    """How many batches of each of `world_size` processes make up TRAIN.GLOBAL_BATCH."""
    batch, total = config.DATA.BATCH_SIZE, config.TRAIN.GLOBAL_BATCH
    if config.AUG.mixing and batch % 2:  # checked here, as evaluation and timing may use any batch
        raise ConfigError(f"DATA.BATCH_SIZE: {MIXING_ODD.format(batch, batch + 1)}")
    if total % (batch * world_size) == 0:
        return total // (batch * world_size)
    step = 2 if config.AUG.mixing else 1  # mixup pairs images
    processes = next(n for n in range(world_size, 0, -1) if total % (n * step) == 0)
    share = total // processes
    size = next(n for n in range(min(batch, share), 0, -1) if share % n == 0 and n % step == 0)
    problem = f"{batch} images on each of {world_size} processes do not divide TRAIN.GLOBAL_BATCH {total}"
    remedy = f"--batch-size {size}" + (f" on {processes} processes" if processes < world_size else "")
    raise ConfigError(f"DATA.BATCH_SIZE: {problem}; use {remedy}")


class SampleKey(NamedTuple):
    """One sample of training: its epoch, its position in the epoch's order, and the image that stands there."""

    epoch: int
    position: int
    index: int


class TrainSampler(Sampler[list[SampleKey]]):
    """Batches of one process, in an order that follows from (seed, epoch) alone.

    An epoch is `len(images) // global_batch` updates. The global batch of each is dealt out to `global_batch //
    batch_size` micro-batches, which the processes take in turn, so that neither order nor the composition of
    micro-batches depends on the number of processes. timm's RepeatAugSampler has neither property, ignores the seed and
    cannot start within an epoch. With `repeats`, the copies of an image go to different micro-batches, if there are as
    many.

    Args:
        num_images: size of the data set.
        global_batch: images of an update, over all processes.
        batch_size: images of a micro-batch; divides `global_batch`.
        repeats: how often an image stands in the order, each time augmented differently; an epoch keeps its length.
        seed, rank, world_size: of the run and of this process.
    """

    def __init__(
        self,
        num_images: int,
        global_batch: int,
        batch_size: int,
        *,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_images = num_images
        self.global_batch = global_batch
        self.groups = global_batch // batch_size  # micro-batches of an update, over all processes
        self.updates = num_images // global_batch
        self.repeats = repeats
        self.seed = seed
        self.local_micro_batches = range(rank, self.groups, world_size)
        self.epoch = self.first_update = 0

    def seek(self, epoch: int, update: int = 0) -> None:
        """Begin the next pass at an update within an epoch."""
        self.epoch, self.first_update = epoch, update

    def order(self) -> Tensor:
        """`(updates * global_batch,)`: index of the image at each position of the epoch."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.updates * self.global_batch]

    def micro_batches(self, order: Tensor, update: int) -> list[list[SampleKey]]:
        """This process's micro-batches of one update."""
        end = (update + 1) * self.global_batch
        own = [range(end - self.global_batch + group, end, self.groups) for group in self.local_micro_batches]
        return [[SampleKey(self.epoch, p, i) for p, i in zip(ps, order[list(ps)].tolist(), strict=True)] for ps in own]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self.order()
        for update in range(self.first_update, self.updates):
            yield from self.micro_batches(order, update)
