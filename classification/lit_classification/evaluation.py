"""Accuracy, what DTM does, and the published throughput measurement."""

import logging
import time

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lit_backbone import DeformableTokenMerging
from lit_backbone.dtm import captured_offsets, offset_statistics
from lit_classification.config import Config
from lit_classification.distributed import Processes, amp_dtype, autocast, to_device
from lit_classification.resume import TrainState

_logger = logging.getLogger(__name__)

WARMUP_ITERATIONS, TIMED_ITERATIONS = 50, 30  # of the throughput measurement, as published


def progress(iterable, enable: bool, **options) -> tqdm:
    """A progress bar in a terminal, nothing elsewhere."""
    return tqdm(iterable, disable=None if enable else True, leave=False, dynamic_ncols=True, **options)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, config: Config, processes: Processes) -> dict[str, float]:
    """Accuracy on the validation images, each counted once, whatever the number of processes.

    Returns:
        `acc1`, `acc5` in percent, mean cross-entropy `loss` and the number of `images`, over all processes.
    """
    model.eval()
    dtype = amp_dtype(config.TEST.AMP_DTYPE, processes.device)
    totals = torch.zeros(4, dtype=processes.wide, device=processes.device)  # right in 1, right in 5, loss, images
    for images, targets in progress(loader, processes.is_main, desc="evaluate", unit="batch"):
        images = to_device(images, processes.device, config)
        targets = targets.to(processes.device, non_blocking=True)
        with autocast(dtype, processes.device):
            logits = model(images).float()  # (B, classes)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        counts = (hits[:, 0].sum(), hits.sum(), loss, torch.full((), len(targets), device=processes.device))
        totals += torch.stack([count.to(totals.dtype) for count in counts])
    right1, right5, loss, images = processes.sum(totals).tolist()
    return {"acc1": 100 * right1 / images, "acc5": 100 * right5 / images, "loss": loss / images, "images": int(images)}


def print_accuracy(stats: dict[str, float]) -> None:
    """The two lines that the original prints."""
    _logger.info(f"loss {stats['loss']:.3f}")
    print(f" * Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f}", flush=True)
    print(f"Accuracy of the network on the {stats['images']} test images: {stats['acc1']:.1f}%", flush=True)


@torch.no_grad()
def dtm_statistics(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Mean offset length in pixels of the map, and share of samples off the map, of each DTM on a batch of images."""
    names = [name for name, module in model.named_modules() if isinstance(module, DeformableTokenMerging)]
    model.eval()
    with captured_offsets(model) as captured:
        model.forward(images)  # not model(images), which may be compiled and then calls no hooks
    found = {}
    for name, (offset, size) in zip(names, captured, strict=True):
        length, outside = offset_statistics(offset, size)
        found |= {f"dtm/{name}/length": length.item(), f"dtm/{name}/outside": outside.item()}
    return found


def validate(
    state: TrainState, loader: DataLoader, probe: Tensor | None, config: Config, processes: Processes
) -> dict[str, float]:
    """Accuracy of the weights a run is judged by, their moving average where there is one, and what DTM does.

    Args:
        probe: images `(b, 3, H, W)` on which DTM is looked at; None not to look.
    """
    model = state.ema.module if state.ema else state.model
    stats = evaluate(model, loader, config, processes)
    record = {f"val/{name}": value for name, value in stats.items()}
    _logger.info(
        f"epoch {state.epoch - 1}: Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f} "
        f"on {stats['images']} images, best so far {max(state.best, stats['acc1']):.3f}"
    )
    if probe is not None:
        record |= dtm_statistics(model, probe)
    return record


@torch.no_grad()
def measure_throughput(model: nn.Module, config: Config, processes: Processes) -> float:
    """Images per second of inference on random images, after a warm-up, as published."""
    device = processes.device
    model.eval()
    images = to_device(torch.randn(config.DATA.BATCH_SIZE, 3, *config.DATA.IMG_SIZE), device, config)
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    dtype = amp_dtype(config.TEST.AMP_DTYPE, device)

    def repeat(times: int, what: str) -> None:
        for _ in progress(range(times), processes.is_main, desc=what):
            with autocast(dtype, device):  # anew each time, as it keeps the weights' copies
                model(images)
        wait()

    repeat(WARMUP_ITERATIONS, "warm-up")
    began = time.perf_counter()
    repeat(TIMED_ITERATIONS, "timing")
    return TIMED_ITERATIONS * len(images) / (time.perf_counter() - began)
