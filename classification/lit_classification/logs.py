"""Logging: console, one file per rank, TensorBoard, log.jsonl and progress bars."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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
            with open(temp, "x") as file:
                file.writelines(f"{line}\n" for line in lines)
            os.replace(temp, self.path)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write TensorBoard scalars at a step of the run."""
        if self.writer:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def epoch(self, epoch: int, results: dict[str, float], step: int) -> None:
        """Log the results of an epoch."""
        acc1, acc5, loss = (results[f"val/{name}"] for name in ("acc1", "acc5", "loss"))
        images = results["val/images"]
        _logger.info(f"epoch {epoch}: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f} on {images} images")
        self.scalars(results, step)
        if self.path and self.writer:
            self.writer.flush()
            finite = {tag: value if math.isfinite(value) else None for tag, value in results.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps({"epoch": epoch} | finite) + "\n")


def _epoch_of(line: str) -> float:
    """Return the epoch of a line of `log.jsonl`, or infinity if the line is broken."""
    try:
        return json.loads(line)["epoch"]
    except (KeyError, TypeError, ValueError):
        return math.inf
