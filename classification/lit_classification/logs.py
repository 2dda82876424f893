"""Logging: console, one file per rank, TensorBoard, log.jsonl and progress bars."""

import csv
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lit_backbone.safe_reader import printable

_logger = logging.getLogger(__name__)


def setup_logging(rank: int, run_dir: Path | None = None) -> None:
    """Send log records to the console (rank 0 only) and to `run_dir/log_rank{rank}.txt`."""
    handlers: list[logging.Handler] = [logging.NullHandler()]  # without any handler, warnings go to the console
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    if run_dir is not None:
        handlers.append(logging.FileHandler(run_dir / f"log_rank{rank}.txt"))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%m-%d %H:%M:%S", handlers=handlers, force=True
    )


def progress(iterable: Any, enable: bool, **options: Any) -> tqdm:
    """Show a progress bar in a terminal, and nothing elsewhere."""
    return tqdm(iterable, disable=None if enable else True, leave=False, dynamic_ncols=True, **options)


class RunLog:
    """TensorBoard events and `log.jsonl` in a run directory; without a run directory, nothing is written.

    Remove what an interrupted run has written beyond its checkpoint, given the epochs and steps done.
    """

    def __init__(self, run_dir: Path | None, epoch: int = 0, step: int = 0):
        self.path = run_dir / "log.jsonl" if run_dir else None
        self.writer = SummaryWriter(str(run_dir), purge_step=step + 1) if run_dir else None
        if self.path and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _epoch_of(line) < epoch]
            temp = self.path.with_suffix(".tmp")
            temp.unlink(missing_ok=True)
            with open(temp, "x") as file:  # does not follow a link
                file.writelines(f"{line}\n" for line in lines)
            os.replace(temp, self.path)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write TensorBoard scalars at a step of the run."""
        if self.writer:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def epoch(self, epoch: int, results: dict[str, float], step: int, worst: str) -> None:
        """Log the results of an epoch, and its worst classes."""
        acc1, acc5, loss = (results[f"val/{name}"] for name in ("acc1", "acc5", "loss"))
        images = f"on {results['val/images']} images, worst classes {worst}"
        _logger.info(f"epoch {epoch}: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f} {images}")
        self.scalars(results, step)
        if self.path and self.writer:
            self.writer.flush()
            finite = {tag: value if math.isfinite(value) else None for tag, value in results.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps({"epoch": epoch} | finite) + "\n")


def confusion_matrix(predictions: Tensor, num_classes: int) -> Tensor:
    """Count the images of each label (row) and predicted label (column), given :func:`evaluate`'s predictions."""
    labels, predicted = predictions[:, :2].long().unbind(dim=1)
    return (labels * num_classes + predicted).bincount(minlength=num_classes**2).view(num_classes, num_classes)


def worst_classes(predictions: Tensor, classes: Sequence[str], count: int = 3) -> str:
    """Name the classes of the lowest accuracy, with the accuracy in percent, given :func:`evaluate`'s predictions."""
    labels, predicted = predictions[:, :2].long().unbind(dim=1)
    correct, images = (x.bincount(minlength=len(classes)) for x in (labels[labels == predicted], labels))
    accuracy = correct / images  # nan for a class without images
    worst = accuracy.nan_to_num(nan=2.0).argsort()[:count].tolist()
    return printable(", ".join(f"{classes[i]} {accuracy[i]:.1%}" for i in worst))


def write_evaluation(folder: Path, stats: dict[str, Any], predictions: Tensor, images: Any) -> None:
    """Write eval.json, predictions.csv and confusion.png for a dataset with `classes` and `name(index)`."""
    folder.mkdir(parents=True, exist_ok=True)
    confusion = confusion_matrix(predictions, len(images.classes))
    pairs = zip(confusion.diagonal().tolist(), confusion.sum(dim=1).tolist())
    classes = [{"class": name, "correct": k, "images": n} for name, (k, n) in zip(images.classes, pairs)]
    content = stats | {"classes": classes, "confusion": confusion.tolist()}
    (folder / "eval.json").write_text(json.dumps(content) + "\n")
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class", "prediction", "probability"])
        for i, (label, predicted, probability) in enumerate(predictions.tolist()):
            names = images.classes[int(label)], images.classes[int(predicted)]
            writer.writerow([images.name(i), *names, f"{probability:.4f}"])
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="Blues"), label="share of the images of a class")
    axes.set(xlabel="predicted class", ylabel="class", title=f"Acc@1 {stats['acc1']:.2f} % of {stats['images']} images")
    if len(images.classes) <= 30:
        labels = list(map(printable, images.classes))
        axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
    figure.savefig(folder / "confusion.png", dpi=150)


def _epoch_of(line: str) -> float:
    """Return the epoch of a line of `log.jsonl`, or infinity if the line is broken."""
    try:
        return json.loads(line)["epoch"]
    except (KeyError, TypeError, ValueError):
        return math.inf
