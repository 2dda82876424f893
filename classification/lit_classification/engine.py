"""Training and evaluation loops, and the published throughput measurement."""

import datetime
import logging
import math
import time
from collections.abc import Sequence
from functools import cache
from typing import cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import Module
from torch.utils.data import DataLoader

from lit_backbone.precision import autocast
from lit_classification.checkpointing import LATEST, TrainState, save_checkpoint
from lit_classification.config import Config
from lit_classification.distributed import Ranks, no_sync
from lit_classification.logs import RunLog, progress
from lit_classification.optim import Schedule
from lit_classification.sampler import TrainSampler, seed_everything

_logger = logging.getLogger(__name__)

WARMUP_ITERATIONS, TIMED_ITERATIONS = 50, 30  # iterations of the published throughput measurement


def build_criterion(config: Config) -> Module:
    """Build the cross-entropy. Mixup smooths its labels itself."""
    return nn.CrossEntropyLoss(label_smoothing=0.0 if config.AUG.mixing else config.MODEL.LABEL_SMOOTHING)


def build_mixup(config: Config) -> Mixup | None:
    """Build timm's Mixup, which also smooths the labels; None if mixup and cutmix are off."""
    aug, options = config.AUG, dict(label_smoothing=config.MODEL.LABEL_SMOOTHING, num_classes=config.MODEL.NUM_CLASSES)
    probabilities = dict(prob=aug.MIXUP_PROB, switch_prob=aug.MIXUP_SWITCH_PROB, mode=aug.MIXUP_MODE)
    return Mixup(aug.MIXUP, aug.CUTMIX, aug.CUTMIX_MINMAX, **probabilities, **options) if aug.mixing else None


def mix_distillation(loss: Tensor, logits: Tensor, images: Tensor, teacher: Module | None, config: Config) -> Tensor:
    """Mix the loss with DeiT's distillation loss: KL divergence (soft) or cross-entropy with the decision (hard)."""
    if teacher is None:
        return loss
    with torch.no_grad():
        target = teacher(images)  # (b, classes)
    if config.DISTILL.TYPE == "hard":
        distill = nn.functional.cross_entropy(logits, target.argmax(dim=1))
    else:
        tau = config.DISTILL.TAU
        log_p, log_q = (nn.functional.log_softmax(x / tau, dim=1) for x in (logits, target))
        distill = nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True) * tau**2 / logits.numel()
    return (1 - config.DISTILL.ALPHA) * loss + config.DISTILL.ALPHA * distill


def to_device(batch: Sequence[Tensor], config: Config, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Copy uint8 images and targets to this rank's device, and normalize the images there, in float32."""
    images, targets = (tensor.to(ranks.device, non_blocking=True) for tensor in batch)
    memory_format = torch.channels_last if config.RUNTIME.CHANNELS_LAST else torch.contiguous_format
    images = images.to(torch.float32, memory_format=memory_format) / 255  # (B, 3, H, W)
    mean, std = _mean_and_std(ranks.device)
    return images.sub_(mean).div_(std), targets


@cache
def _mean_and_std(device: torch.device) -> list[Tensor]:
    """Return ImageNet's mean and standard deviation, each `(3, 1, 1)`; copying them in each step would block it."""
    values = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return [torch.tensor(value, device=device).view(3, 1, 1) for value in values]


def build_erasing(config: Config, ranks: Ranks) -> RandomErasing:
    """Build timm's random erasing of normalized batches."""
    return RandomErasing(config.AUG.REPROB, mode=config.AUG.REMODE, max_count=config.AUG.RECOUNT, device=ranks.device)


def train_one_epoch(
    model: Module, loader: DataLoader, state: TrainState, schedule: Schedule, config: Config, ranks: Ranks, log: RunLog
) -> None:
    """Train `model`, `state.model` or its DDP wrapper, to the end of the epoch, or until a stop signal is received.

    Append loss and gradient norm of each step to `state.history`. Raise FloatingPointError if one is not finite.
    """
    sampler, optimizer, scaler = cast(TrainSampler, loader.batch_sampler), state.optimizer, state.scaler
    criterion, mixup, erase = build_criterion(config), build_mixup(config), build_erasing(config, ranks)
    sampler.set_epoch(state.epoch, first_step=state.step % state.steps_per_epoch)
    # on the device, so that no step waits for it
    history = state.history = state.history if sampler.first_step else []
    batches, start = iter(loader), time.perf_counter()
    model.train()
    for module in state.frozen:
        module.eval()
    for i in progress(range(sampler.first_step, sampler.steps), ranks.is_main, desc=f"epoch {state.epoch}"):
        schedule.set(state.step)
        step_loss = torch.zeros((), device=ranks.device)
        for group in sampler.local_groups:  # micro-batches, whose gradients accumulate
            images, targets = to_device(next(batches), config, ranks)
            seed_everything("erasing, mixup and drop path", config.SEED, state.step, group)
            images, targets = mixup(erase(images), targets) if mixup else (erase(images), targets)
            with no_sync(model, last=group == sampler.local_groups[-1]):
                with autocast(config.RUNTIME.AMP_DTYPE, ranks.device):
                    logits = model(images)  # (b, classes)
                    loss = mix_distillation(criterion(logits, targets), logits, images, state.teacher, config)
                    loss = loss / len(sampler.local_groups)
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update(state.model)
        state.step += 1
        history.append(torch.stack((step_loss, norm)))
        is_last = i + 1 == sampler.steps
        is_save = config.TRAIN.SAVE_STEPS and state.step % config.TRAIN.SAVE_STEPS == 0 and not is_last
        is_print = (i + 1) % config.PRINT_FREQ == 0 or is_last
        if is_print or is_save:
            check_finite(history, state)
        if is_print:
            log_progress(history, (time.perf_counter() - start) / (i + 1 - sampler.first_step), state, config, log)
        if is_save:
            save_checkpoint(LATEST, state, config, ranks)
        if is_print and not is_last and ranks.stop_signal():
            break


def epoch_averages(state: TrainState, ranks: Ranks) -> dict[str, float]:
    """Return loss and gradient norm averaged over the last epoch and over ranks, without norms that overflowed."""
    history = torch.stack(state.history)  # (steps, 2)
    history = history.where(history.isfinite(), math.nan)
    loss, norm = ranks.sum(history.nanmean(dim=0)) / ranks.world_size
    return {"train/loss_epoch": loss.item(), "train/grad_norm_epoch": norm.item()}


def check_finite(history: list[Tensor], state: TrainState) -> None:
    """Raise FloatingPointError if the loss or the gradient of a step was not finite.

    A gradient that overflows under fp16's loss scaling makes the scaler skip the step and lower the scale. This is an
    error only once the scale is below 1.
    """
    is_scaled = state.scaler.is_enabled() and state.scaler.get_scale() >= 1
    for i, (loss, norm) in enumerate(torch.stack(history).tolist()):
        if not math.isfinite(loss) or not (math.isfinite(norm) or is_scaled):
            epoch, step = divmod(state.step - len(history) + i, state.steps_per_epoch)
            rates = ", ".join(f"{group['name']} {group['lr']:.3g}" for group in state.optimizer.param_groups)
            latest = state.run_dir / LATEST
            resume = f"The same command resumes {latest}." if latest.exists() else "No checkpoint was saved before."
            fix = "Lower TRAIN.BASE_LR or try RUNTIME.AMP_DTYPE off (to resume, with TRAIN.RESUME_CHANGED true)."
            place = f"in epoch {epoch}, step {step}, learning rates {rates}"
            raise FloatingPointError(f"loss {loss}, gradient norm {norm} {place}. {resume} {fix}")


def log_progress(history: list[Tensor], seconds: float, state: TrainState, config: Config, log: RunLog) -> None:
    """Log the last step, the epoch's mean loss, and the speed, given the mean time of a step in seconds."""
    eta = datetime.timedelta(seconds=int((config.TRAIN.EPOCHS * state.steps_per_epoch - state.step) * seconds))
    rates = {f"lr/{group['name']}": group["lr"] for group in state.optimizer.param_groups}
    epoch, step = divmod(state.step - 1, state.steps_per_epoch)
    device = history[0].device
    memory = f" mem {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB" if device.type == "cuda" else ""
    (loss, norm), mean = history[-1].tolist(), torch.stack(history)[:, 0].mean().item()
    _logger.info(
        f"epoch {epoch} [{step + 1}/{state.steps_per_epoch}] eta {eta} lr {max(rates.values()):.3e} loss {loss:.4f} "
        f"({mean:.4f}) grad norm {norm:.3f} {config.TRAIN.GLOBAL_BATCH / seconds:.1f} img/s{memory}"
    )
    log.scalars({"train/loss": loss, "train/grad_norm": norm} | rates, state.step)


@torch.no_grad()
def evaluate(
    model: Module, loader: DataLoader, config: Config, ranks: Ranks, columns: list[int] | None = None
) -> tuple[dict[str, float], Tensor]:
    """Evaluate a model over all ranks, on the logits in `columns` if they are given.

    Returns:
        `acc1` and `acc5` in percent, mean cross-entropy `loss` and number of `images`; and for each image of the
        dataset its label, predicted label and their probability, `(images, 3)` on the CPU.
    """
    model.eval()
    rows = [torch.empty(0, 5, device=ranks.device)]
    for batch in progress(loader, ranks.is_main, desc="evaluate", unit="batch"):
        images, targets = to_device(batch, config, ranks)
        with autocast(config.TEST.AMP_DTYPE, ranks.device):
            logits = model(images).float()  # (B, classes)
        logits = logits if columns is None else logits[:, columns]
        top5 = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        is_hit = (top5 == targets[:, None]).any(dim=1)
        loss = nn.functional.cross_entropy(logits, targets, reduction="none")
        rows.append(torch.stack((targets, top5[:, 0], logits.softmax(dim=1).amax(dim=1), is_hit, loss), dim=1))
    shares = ranks.gather(torch.cat(rows).cpu())
    results = torch.empty(sum(map(len, shares)), 5)
    for rank, share in enumerate(shares):
        results[rank :: ranks.world_size] = share  # see build_val_loader
    labels, predicted, _, is_hit, loss = results.double().unbind(dim=1)
    acc1, acc5 = (100 * hits.double().mean().item() for hits in (labels == predicted, is_hit))
    return {"acc1": acc1, "acc5": acc5, "loss": loss.mean().item(), "images": len(results)}, results[:, :3]


@torch.no_grad()
def measure_throughput(model: Module, config: Config, ranks: Ranks) -> float:
    """Measure images per second of inference on random images, after a warm-up, as published."""
    model.eval()
    images = torch.randint(256, (config.DATA.BATCH_SIZE, 3, *config.DATA.IMG_SIZE), dtype=torch.uint8)
    images, _ = to_device((images, torch.zeros(0)), config, ranks)

    start = 0.0
    for i in progress(range(WARMUP_ITERATIONS + TIMED_ITERATIONS), ranks.is_main, desc="throughput"):
        if i == WARMUP_ITERATIONS:
            _synchronize(ranks)
            start = time.perf_counter()
        with autocast(config.TEST.AMP_DTYPE, ranks.device):  # inside the loop: it caches casts of the weights
            model(images)
    _synchronize(ranks)
    return TIMED_ITERATIONS * len(images) / (time.perf_counter() - start)


def _synchronize(ranks: Ranks) -> None:
    if ranks.device.type != "cpu":
        torch.accelerator.synchronize()
