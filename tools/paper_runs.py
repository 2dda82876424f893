"""The trainings that tools/paper.py compares: classifiers of CIFAR-10, and detectors and segmentors of digits."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lit_classification.config import settings
from lit_classification.config_file import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "classification/configs/cifar10"
LIT = "lit"
MODELS = {  # of CONFIGS, LIT first
    LIT: "LIT: attention in stages 3 and 4",
    "lit-1111": "attention in all stages",
    "lit-0000": "attention in no stage",
    "lit-conv": "plain merging",
    "lit-conv-bn": "DTM without offsets",
    "swin": "Swin",
    "pvt-v2": "PVT v2",
    "convnext": "ConvNeXt",
    "resnet": "ResNet",
}
STARTS = {"pretrained": ".checkpoint={}", "from scratch": "=None"}  # of the backbone's init_cfg


class Dense(NamedTuple):
    """A dense task: its demo, by a part of its schedule."""

    words: str
    metric: str
    scale: int  # that makes it percent
    config: str
    schedule: tuple[str, ...]


DETECTION = ("train_cfg.max_epochs=1", "param_scheduler.1.T_max=1", "train_cfg.val_interval=1")
SEGMENTATION = ("train_cfg.max_iters=1000", "param_scheduler.1.end=1000", "train_cfg.val_interval=1000")
DENSE = {
    "detection": Dense("box AP", "coco/bbox_mAP", 100, "retinanet_lit_digit_scenes", DETECTION),
    "segmentation": Dense("mIoU", "mIoU", 1, "fpn_lit_digit_scenes", SEGMENTATION),
}


class TrainingError(Exception):
    """A training failed; the message says which, and ends with the last lines that it printed."""


class Run(NamedTuple):
    """One training."""

    name: str  # of what is compared
    seed: int
    folder: Path  # that it writes
    command: tuple[str, ...]  # that starts or continues it
    settings: Any  # all that its result depends on, as JSON, less the defaults
    logs: str  # of evaluations, in the folder
    metric: str  # in a log's lines

    @property
    def key(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def digest(self) -> str:
        return digest(self.settings)

    def start(self) -> subprocess.Popen[bytes]:
        """Start it in a session of its own: Ctrl-C comes to the comparison, which ends it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder, script = self.command[0].split("/", 1)
        command = [sys.executable, script, *self.command[1:]]
        with open(self.folder / "printed.txt", "a") as out:
            return subprocess.Popen(command, cwd=ROOT / folder, stdout=out, stderr=out, start_new_session=True)

    def has_ended(self, process: subprocess.Popen[bytes], wait: bool = False) -> bool:
        """Whether a process that this started is no more; its CPU time is noted in the folder."""
        if process.returncode is not None:
            return True
        pid, status, usage = os.wait4(process.pid, 0 if wait else os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            with open(self.folder / "seconds.txt", "a") as file:
                print(usage.ru_utime + usage.ru_stime, file=file)
        return bool(pid)

    def result(self, status: int) -> dict[str, Any]:
        """What each evaluation found, and the CPU time that all processes took.

        Raises:
            TrainingError: the last process ended with another status than 0, or without an evaluation.
        """
        lines = [json.loads(line) for log in sorted(self.folder.glob(self.logs)) for line in open(log)]
        reached = [found[self.metric] for found in lines if self.metric in found]
        printed = self.folder / "printed.txt"
        if status or not reached:
            end = "\n".join(printed.read_text().splitlines()[-5:])
            raise TrainingError(f"{self.key}: ended with status {status}; {printed} ends in\n{end}")
        seconds = sum(map(float, (self.folder / "seconds.txt").read_text().split()))
        return {"settings": self.digest, "reached": reached, "cpu_seconds": round(seconds)}


def digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def classification_runs(output: Path, models: Sequence[str], seeds: Sequence[int], *options: str) -> list[Run]:
    """By main.py, with further KEY VALUE pairs."""
    runs = []
    for seed, name in product(seeds, models):
        path, opts = str(CONFIGS / f"{name}.yaml"), ("SEED", str(seed), *options)
        computed = [_settings(path, *opts), options]
        tag = f"seed-{seed}-{digest(computed)}"  # main.py takes a run of other settings that has ended for this one
        command = ("classification/main.py", "--cfg", path, "--output", str(output), "--tag", tag, "--opts", *opts)
        runs.append(Run(name, seed, output / name / tag, command, computed, "log.jsonl", "val/acc1"))
    return runs


def _settings(path: str, *opts: str) -> dict[str, Any]:
    """What a classifier's result depends on."""
    return settings(load_config(path, opts).model_dump(mode="json", exclude_defaults=True))


def dense_runs(output: Path, tasks: Sequence[str], seeds: Sequence[int], weights: Path, *options: str) -> list[Run]:
    """By mmengine's tools, from the weights of LIT's seed 0, trained with these options, and from random ones."""
    runs, origin = [], _settings(str(CONFIGS / f"{LIT}.yaml"), "SEED", "0", *options)
    for seed, name, start in product(seeds, tasks, STARTS):
        task = DENSE[name]
        path = f"configs/demo/{task.config}.py"
        bases = [ROOT / name / path, *sorted((ROOT / name / "configs/_base_").glob("*.py")), ROOT / "demo/small_lit.py"]
        lines = [line for file in bases for line in file.read_text().splitlines() if not line.startswith("#")]
        computed = [lines, origin if start == "pretrained" else start, seed, task.schedule]
        folder = output / f"{name}-{start.replace(' ', '-')}" / f"seed-{seed}-{digest(computed)}"
        init_cfg = f"model.backbone.init_cfg{STARTS[start].format(weights)}"
        changes = (f"randomness.seed={seed}", init_cfg, *task.schedule)
        command = (f"{name}/tools/train.py", path, "--work-dir", str(folder), "--resume", "--cfg-options", *changes)
        runs.append(Run(f"{name}, {start}", seed, folder, command, computed, "*/vis_data/[0-9]*.json", task.metric))
    return runs
