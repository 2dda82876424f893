"""The updates of a training: accumulation, mixed precision, clipping, averaging."""

import datetime
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_classification.augmentation import build_mixup
from lit_classification.config import Config
from lit_classification.distributed import Processes, amp_dtype, autocast, no_sync, to_device
from lit_classification.evaluation import progress
from lit_classification.logs import RunLog, peak_memory
from lit_classification.optim import Schedule
from lit_classification.resume import Saver, TrainState
from lit_classification.sampler import seed_everything
from lit_classification.signals import StopAsked, StopRequest

_logger = logging.getLogger(__name__)

SMALLEST_SCALE = 1.0  # of fp16's loss scaling; where even this overflows, the gradients themselves are not finite


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the update was not applied.

    Attributes:
        details: number of the update over the whole run, its files, loss, gradient norm and learning rates.
    """

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.details = details


def build_criterion(config: Config) -> nn.Module:
    """Cross-entropy for the targets the configuration makes: mixed ones, smoothed ones or plain classes."""
    if config.AUG.mixing:
        return SoftTargetCrossEntropy()
    if config.MODEL.LABEL_SMOOTHING > 0:
        return LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
    return nn.CrossEntropyLoss()


@dataclass
class Trainer:
    """Runs updates: accumulation, mixed precision, clipping, averaging.

    On a GPU the host waits for results only where it prints or saves. An update that is not finite is skipped on the
    GPU, and so are all after it, until the host looks and stops the run.

    Attributes:
        network: the model as it is called in training, wrapped for several processes where there are any.
        loader: of this process's micro-batches; `accumulation` of them make an update.
        checks_every_update: whether the host looks at every update before it is applied.
        sums: of loss and finite gradient norms over the epoch, and the number of each; then the last of both.
        loss_gate: 1, or NaN once an update was not finite; a factor of the loss.
        failure: number, loss and gradient norm of that update; its number is -1 as long as there is none.
    """

    config: Config
    processes: Processes
    state: TrainState
    network: nn.Module
    loader: DataLoader
    schedule: Schedule
    log: RunLog
    stop: StopRequest

    def __post_init__(self):
        device = self.processes.device
        self.mixup = build_mixup(self.config)
        self.criterion = build_criterion(self.config)
        self.amp_dtype = amp_dtype(self.config.RUNTIME.AMP_DTYPE, device)
        self.checks_every_update = device.type == "cpu"  # elsewhere, the fused optimiser can skip an update by itself
        self.sums = torch.zeros(6, dtype=self.processes.wide, device=device)
        self.loss_gate = torch.ones((), device=device)
        self.failure = torch.full((3,), -1.0, dtype=self.processes.wide, device=device)

    def train_epoch(self, saver: Saver) -> dict[str, float]:
        """Train to the end of the current epoch, from wherever in it the state stands.

        Args:
            saver: told of each update, and of a stop.

        Returns:
            Mean loss, over all processes, and mean gradient norm of the updates that were run.

        Raises:
            NonFiniteError: a loss or gradient was not finite; the state is that before this update.
            Preempted: a process was asked to stop; the state is saved.
        """
        state, config = self.state, self.config
        epoch, first = divmod(state.update, state.updates_per_epoch)
        self.loader.batch_sampler.seek(epoch, first)
        self.network.train()
        self.sums.zero_()
        batches = iter(self.loader)
        began = time.perf_counter()
        for i in progress(range(first, state.updates_per_epoch), self.processes.is_main, desc=f"epoch {epoch}"):
            try:
                self.run_update(batches)
            except StopAsked:
                saver.leave()
            saver.after_update()
            if (i + 1) % config.PRINT_FREQ == 0 or i + 1 == state.updates_per_epoch:
                self.check_finite()
                self._report(epoch, i + 1, (time.perf_counter() - began) / (i + 1 - first))
        skipped = self.loader.dataset.skipped
        sums = torch.cat((self.sums[:4], self.sums.new_full((1,), skipped.value)))
        loss, losses, norm, norms, images = self.processes.sum(sums).tolist()
        skipped.value = 0
        record = {"train/loss_epoch": loss / losses, "train/grad_norm_epoch": norm / max(norms, 1)}
        if self.config.DATA.ON_BAD_IMAGE == "skip":
            _logger.info(f"epoch {epoch}: skipped {images:.0f} unreadable images")
            record["train/skipped_images"] = images
        return record

    def run_update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimiser update, which leaves the model as it is if loss or gradient is not finite.

        Raises:
            NonFiniteError: at once where every update is checked, else from :meth:`check_finite`. An overflow that
                fp16's loss scaling handles is none.
            StopAsked: on all processes, where one is to stop; nothing was applied.
        """
        state, model = self.state, self.state.model
        self.schedule.set(state.update)
        accumulation = len(self.loader.batch_sampler.local_micro_batches)
        loss = torch.zeros((), device=self.processes.device)
        for i, group in enumerate(self.loader.batch_sampler.local_micro_batches):
            batch = self.stop.next_of(batches)
            if self.processes.any(batch is None):  # asked before all others, one that waits for data could never tell
                raise StopAsked
            images, targets = batch
            images = to_device(images, self.processes.device, self.config)
            targets = targets.to(self.processes.device, non_blocking=True)
            seed_everything("mixup and drop path", self.config.SEED, state.update, group)
            if self.mixup:
                images, targets = self.mixup(images, targets)
            with no_sync(self.network, last=i + 1 == accumulation):
                with autocast(self.amp_dtype, self.processes.device):
                    part = self.criterion(self.network(images), targets) / accumulation * self.loss_gate
                state.scaler.scale(part).backward()
            loss += part.detach()
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.config.TRAIN.CLIP_GRAD or math.inf)
        finite = self._record(loss, norm)
        if self.checks_every_update:
            self.check_finite()
        elif not state.scaler.is_enabled():  # a scaler does this itself
            state.optimizer.found_inf = (~finite).float()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update(model)
        state.update += 1

    def _record(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Add loss and gradient norm to the epoch's sums; returns whether they are finite in all processes, and closes
        the loss gate if not. A gradient that overflowed under fp16's loss scaling passes."""
        finite_norm = norm.isfinite()
        scale = self.state.scaler.scale(torch.ones_like(norm))  # 1 where none is in force
        finite = loss.isfinite() & (finite_norm | (scale > SMALLEST_SCALE))
        finite = self.processes.sum((~finite).float()) == 0
        found = torch.stack((loss, norm)).to(self.sums.dtype)
        count = torch.ones_like(found[0])
        terms = (found[0], count, torch.where(finite_norm, found[1], 0.0), count * finite_norm)
        self.sums[:4] += torch.stack(terms)
        self.sums[4:] = found
        first = ~finite & self.loss_gate.isfinite()
        update = torch.full_like(count, self.state.update)
        self.failure = torch.where(first, torch.stack((update, *found)), self.failure)
        self.loss_gate = torch.where(finite, self.loss_gate, torch.nan)
        return finite

    def check_finite(self) -> None:
        """Wait for the device, and stop the run if an update was not finite.

        Raises:
            NonFiniteError: names the first such update.
        """
        update, loss, norm = self.failure.tolist()
        if update >= 0:
            self.state.update = int(update)  # what came after it was not applied, either
            raise self._diagnose(loss, norm)

    def _diagnose(self, loss: float, norm: float) -> NonFiniteError:
        """Where to look for the cause of a loss or gradient that is not finite in the coming update."""
        state, sampler, images = self.state, self.loader.batch_sampler, self.loader.dataset
        epoch, update = divmod(state.update, state.updates_per_epoch)
        self.schedule.set(state.update)
        rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
        order = sampler.order().unflatten(0, (-1, sampler.global_batch))  # (updates, images)
        files = [images.name(i) for i in order[update].tolist()]
        message = (
            f"loss {loss}, gradient norm {norm} in epoch {epoch}, update {update}; this was not applied. Look at "
            f"its {len(files)} images ({', '.join(files[:3])}, ...), at the learning rates "
            f"({', '.join(f'{rate:.3g}' for rate in rates.values())}), or try RUNTIME.AMP_DTYPE off "
            "(changed settings need TRAIN.RESUME_CHANGED true)"
        )
        details = {"update": state.update, "files": files, "loss": str(loss), "grad_norm": str(norm), "lr": rates}
        return NonFiniteError(message, details)

    def _report(self, epoch: int, done: int, seconds: float) -> None:
        """Print and log where the epoch stands; an update took so many seconds on average."""
        state, config = self.state, self.config
        total, count, _, _, loss, norm = self.sums.tolist()
        remaining = config.TRAIN.EPOCHS * state.updates_per_epoch - state.update
        eta = datetime.timedelta(seconds=int(remaining * seconds))
        rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
        _logger.info(
            f"epoch {epoch} [{done}/{state.updates_per_epoch}] eta {eta} lr {rates['decay']:.3e} "
            f"loss {loss:.4f} ({total / count:.4f}) grad norm {norm:.3f} "
            f"{config.TRAIN.GLOBAL_BATCH / seconds:.1f} img/s mem {peak_memory(self.processes.device):.2f} GiB"
        )
        scalars = {"train/loss": loss, "train/grad_norm": norm}
        scalars |= {f"lr/{name}": rate for name, rate in rates.items()}
        self.log.scalars(scalars, state.update)
