"""What a run tells: console, a file per process, TensorBoard and one JSON line per epoch."""

import json
import logging
import math
import resource
import sys
import threading
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from lit_classification.run_folder import rewrite, writing


def setup_logging(rank: int, folder: Path | None = None) -> None:
    """Send log records to the console (first process only) and to `folder/log_rank{rank}.txt`.

    What cannot be written to either, as nobody reads it or the disk is full, is lost without a word.
    """
    logging.raiseExceptions = False
    handlers: list[logging.Handler] = [logging.NullHandler()]  # or warnings without a handler go to the console
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    if folder is not None:
        handlers.append(logging.FileHandler(folder / f"log_rank{rank}.txt"))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%m-%d %H:%M:%S", handlers=handlers, force=True
    )


def peak_memory(device: torch.device) -> float:
    """Highest memory use so far, in GiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _epoch(line: str) -> float:
    """Of a line of `log.jsonl`; a line that a killed run left unfinished belongs to none."""
    try:
        return json.loads(line)["epoch"]
    except json.JSONDecodeError:
        return math.inf


def _report_other_than_disk(failed: threading.ExceptHookArgs) -> None:
    """For threads: what TensorBoard's cannot write is an error of the next call."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


class RunLog:
    """TensorBoard events and `log.jsonl` in a run's folder; without a folder, silent.

    A run that continues at an epoch and update takes back what an interrupted one had written beyond them.

    Raises:
        ConfigError: where the disk is full or read-only, here and in all methods.
    """

    def __init__(self, folder: Path | None, epoch: int = 0, update: int = 0):
        self.folder = folder
        self.writer = None
        if folder:
            threading.excepthook = _report_other_than_disk
            with writing(folder):
                self.writer = SummaryWriter(str(folder), purge_step=update + 1)
                path = folder / "log.jsonl"
                lines = path.read_text().splitlines(keepends=True) if path.exists() else []
                rewrite(path, "".join(line for line in lines if _epoch(line) < epoch))

    def scalars(self, values: dict[str, float], update: int) -> None:
        """Write scalars under their tags at an update of the run."""
        if self.writer:
            with writing(self.folder):
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, update)

    def epoch(self, record: dict[str, float], update: int) -> None:
        """Append an epoch's record to `log.jsonl` and TensorBoard."""
        if self.folder:
            self.scalars({tag: value for tag, value in record.items() if tag != "epoch"}, update)
            with writing(self.folder), open(self.folder / "log.jsonl", "a") as file:
                finite = {tag: value if math.isfinite(value) else None for tag, value in record.items()}
                file.write(json.dumps(finite) + "\n")
                self.writer.flush()
