"""Order of the training images and seeds of all randomness: pure functions of the run's seed and position."""

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def derive_seed(purpose: str, *key: int) -> int:
    """Derive a 32-bit seed from a purpose and integers, independent for different arguments."""
    entropy = (zlib.crc32(purpose.encode()), len(key), *key)  # SeedSequence does not tell (1,) from (1, 0)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_everything(purpose: str, *key: int, devices: bool = True) -> None:
    """Seed Python, NumPy and PyTorch by :func:`derive_seed`; without devices, PyTorch on the CPU only.

    For a GPU not in use, `torch.manual_seed` formats a stack trace, which takes as long as reading a small image.
    """
    seed = derive_seed(purpose, *key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed) if devices else torch.default_generator.manual_seed(seed)


class SampleKey(NamedTuple):
    """One training sample: its epoch, its position in the epoch's order, and the index of its image."""

    epoch: int
    position: int
    index: int


class TrainSampler(Sampler[list[SampleKey]]):
    """Batch sampler of one rank whose global order follows from (seed, epoch) alone, and which can start at any step.

    An epoch has `num_images // global_batch` steps. Each global batch is split into `global_batch // batch_size`
    micro-batches, which the ranks take in turn. So neither order nor micro-batches depend on the number of ranks, as
    they do in timm's RepeatAugSampler. `repeats` puts copies of an image, each augmented differently, into different
    micro-batches where there are enough; the length of an epoch stays the same.
    """

    def __init__(self, num_images: int, global_batch: int, batch_size: int, repeats=1, seed=0, rank=0, world_size=1):
        self.num_images, self.global_batch, self.repeats, self.seed = num_images, global_batch, repeats, seed
        self.steps = num_images // global_batch
        self.groups = global_batch // batch_size  # micro-batches per step, over all ranks
        self.local_groups = range(rank, self.groups, world_size)
        self.epoch = self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Select the epoch, and the step within it, at which the next iteration starts."""
        self.epoch, self.first_step = epoch, first_step

    def order(self) -> Tensor:
        """Return the image index at each position of the epoch, `(steps * global_batch,)`."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.steps * self.global_batch]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self.order()
        for step in range(self.first_step, self.steps):
            start, end = step * self.global_batch, (step + 1) * self.global_batch
            for group in self.local_groups:
                positions = range(start + group, end, self.groups)
                indices = order[list(positions)].tolist()
                yield [SampleKey(self.epoch, p, i) for p, i in zip(positions, indices, strict=True)]
