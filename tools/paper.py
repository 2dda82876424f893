"""The paper's argument in miniature: what attention, DTM and pretraining are worth on digits, within a few hours.

    python -m tools.paper        # or: make paper

Trains a small LIT with attention in ever fewer stages, and with other mergings than DTM, on cluttered digits
(demo/cluttered_digits.py); then a detector and a segmentor on scenes of digits (demo/digit_scenes.py), from that LIT's
weights and from random ones, by a part of their demos' schedules. Three seeds each. What was interrupted goes on,
within a training, too; after a change of settings, name another --output. Writes results.json (what each training
reached), tables.md and paper.png.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import timm
import torch
from scipy.stats import ttest_ind
from torch import nn
from tqdm import tqdm

from demo.cluttered_digits import write_images
from demo.digit_scenes import write_scenes
from lit_classification.config_file import load_config
from tools import benchmark
from tools.benchmark import Bench, infer, multiply_adds

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
LIT = "lit-0011"
VARIANTS = {
    "lit-1111": "all stages",
    "lit-0111": "stages 2 to 4",
    LIT: "stages 3 and 4: LIT",
    "lit-0001": "stage 4",
    "lit-0000": "none",
    "lit-0011-conv": "stages 3 and 4, plain merging",
    "lit-0011-conv-bn": "stages 3 and 4, DTM without offsets",
}


class Task(NamedTuple):
    """What trainings are judged by, and for a dense task its demo's config, in the folder of the task's name."""

    words: str
    metric: str  # in the last line of the last log
    percent: float = 1  # what brings the metric to percent
    logs: str = "*/[0-9]*_[0-9]*.json"  # in a training's folder; mmengine writes one for each test
    config: str = ""
    schedule: tuple[str, ...] = ()  # shorter than the demo's
    last: str = ""  # its last checkpoint


CLASSIFICATION = Task("accuracy", "val/acc1", logs="log.jsonl")
DENSE = {
    "detection": Task(
        "box AP",
        "coco/bbox_mAP",
        percent=100,
        config="retinanet_lit_digit_scenes",
        schedule=("train_cfg.max_epochs=1", "param_scheduler.1.T_max=1"),
        last="epoch_1.pth",
    ),
    "segmentation": Task(
        "mIoU",
        "mIoU",
        config="fpn_lit_digit_scenes",
        schedule=("train_cfg.max_iters=1000", "param_scheduler.1.end=1000"),
        last="iter_1000.pth",
    ),
}
NO_VALIDATION = ("val_cfg=None", "val_dataloader=None", "val_evaluator=None")  # the last checkpoint is tested instead
STARTS = ("pretrained", "from scratch")
COMPARISONS = len(VARIANTS) - 1 + len(DENSE)
RESOLVED = 0.05 / COMPARISONS  # largest p of Welch's t-test for a difference to count, by Bonferroni


class Run(NamedTuple):
    """One training: what it compares, its seed, the folder it writes, and the commands that start or continue it."""

    name: str
    seed: int
    task: Task
    folder: Path
    commands: tuple[tuple[str, ...], ...]

    @property
    def key(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def printed(self) -> Path:
        return self.folder / "printed.txt"

    def start(self, step: int) -> subprocess.Popen[bytes]:
        """Start one of the commands, in a session of its own: Ctrl-C comes to the comparison, which ends it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder, script = self.commands[step][0].split("/", 1)
        command = [sys.executable, script, *self.commands[step][1:]]
        with open(self.printed, "a") as file:
            return subprocess.Popen(
                command, cwd=ROOT / folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def reached(self) -> float:
        """What the last evaluation found, in percent."""
        log = max(self.folder.glob(self.task.logs))
        return self.task.percent * json.loads(log.read_text().splitlines()[-1])[self.task.metric]


class TrainingError(Exception):
    """A training failed; the message says which, and ends with the last lines that it printed."""


def classification_runs(output: Path) -> list[Run]:
    return [_classification_run(output, name, seed) for seed, name in product(SEEDS, VARIANTS)]


def _classification_run(output: Path, name: str, seed: int) -> Run:
    tag = f"seed-{seed}"
    cfg = ("--cfg", f"configs/paper/{name}.yaml", "--output", str(output), "--tag", tag, "--opts", "SEED", str(seed))
    return Run(name, seed, CLASSIFICATION, output / name / tag, (("classification/main.py", *cfg),))


def dense_runs(output: Path) -> list[Run]:
    """From random weights and from those of `classification_runs`."""
    runs = []
    for seed, (name, task), start in product(SEEDS, DENSE.items(), STARTS):
        weights = f".checkpoint={_classification_run(output, LIT, seed).folder / 'latest.pth'}"
        init_cfg = f"model.backbone.init_cfg{weights if start == 'pretrained' else '=None'}"
        folder = output / f"{name}-{start.replace(' ', '-')}" / f"seed-{seed}"
        cfg = (f"configs/demo/{task.config}.py", "--work-dir", str(folder))
        options = ("--cfg-options", f"randomness.seed={seed}", init_cfg, *task.schedule, *NO_VALIDATION)
        train = (f"{name}/tools/train.py", *cfg, "--resume", *options)
        test = (f"{name}/tools/test.py", *cfg, str(folder / task.last))
        runs.append(Run(f"{name}, {start}", seed, task, folder, (train, test)))
    return runs


def train_all(runs: list[Run], jobs: int, bar: tqdm) -> Iterator[tuple[Run, float]]:
    """Yield each training and what it reached, as they end; `jobs` of them run at a time, and none is left behind.

    Raises:
        TrainingError: one failed.
    """
    steps = deque((run, 0) for run in runs)
    processes: dict[subprocess.Popen[bytes], tuple[Run, int]] = {}
    try:
        while steps or processes:
            while steps and len(processes) < jobs:
                run, step = steps.popleft()
                processes[run.start(step)] = run, step
            bar.set_postfix_str("; ".join(run.key for run, _ in processes.values()))
            time.sleep(1)
            for process in [process for process in processes if process.poll() is not None]:
                run, step = processes.pop(process)
                if process.returncode:
                    end = "\n".join(run.printed.read_text().splitlines()[-5:])
                    raise TrainingError(
                        f"{run.key}: ended with status {process.returncode}; {run.printed} ends in\n{end}"
                    )
                if step + 1 < len(run.commands):
                    steps.appendleft((run, step + 1))
                else:
                    yield run, run.reached()
    finally:
        for process in processes:
            process.terminate()  # it saves where it stands
        for process in processes:
            process.wait()


def measure(bench: Bench) -> dict[str, dict[str, float]]:
    """Parameters, multiply-adds and images/s in inference of every variant, timed by turns."""
    models = {name: _build(name).eval() for name in VARIANTS}
    size = load_config(ROOT / f"classification/configs/paper/{LIT}.yaml").DATA.IMG_SIZE
    images = torch.randn(bench.batch, 3, *size).contiguous(memory_format=torch.channels_last)
    calls = {name: lambda model=model: infer(model, images) for name, model in models.items()}
    ms = bench.compare("paper", "inference", calls, bench.batch)
    return {
        name: {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "multiply_adds": multiply_adds(lambda name=name: _build(name), size),
            "images_per_s": 1e3 * bench.batch / ms[name],
        }
        for name, model in models.items()
    }


def _build(name: str) -> nn.Module:
    return timm.create_model(**load_config(ROOT / f"classification/configs/paper/{name}.yaml").model_keywords)


def summary(values: list[float]) -> str:
    """Mean and standard error."""
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def difference(values: list[float], others: list[float]) -> str:
    """How much higher the first are, and whether chance explains that."""
    p = ttest_ind(values, others, equal_var=False).pvalue
    return f"{mean(values) - mean(others):+.2f} ({'resolved' if p < RESOLVED else 'not resolved'}, p = {p:.2g})"


def tables(found: dict[str, list[float]], measured: dict[str, dict[str, float]], where: str) -> str:
    """Two tables in Markdown; `where` names the machine."""
    lines = [
        f"Mean and standard error of {len(SEEDS)} seeds; images/s in inference, on {where}. A difference is resolved "
        f"where Welch's t-test gives p < 0.05 / {COMPARISONS}, for there are {COMPARISONS} comparisons.",
        "",
        "| attention in | accuracy (%) | against LIT | parameters (M) | multiply-adds (M) | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in VARIANTS.items():
        m = measured[name]
        against = "" if name == LIT else difference(found[name], found[LIT])
        numbers = f"{m['parameters'] / 1e6:.2f} | {m['multiply_adds'] / 1e6:.1f} | {m['images_per_s']:.0f}"
        lines.append(f"| {words} | {summary(found[name])} | {against} | {numbers} |")
    lines += ["", "| task | pretrained | from scratch | difference |", "|---|---|---|---|"]
    for name, task in DENSE.items():
        pretrained, scratch = (found[f"{name}, {start}"] for start in STARTS)
        cells = f"{summary(pretrained)} | {summary(scratch)} | {difference(pretrained, scratch)}"
        lines.append(f"| {name}, {task.words} (%) | {cells} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[float]], measured: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy against multiply-adds and against measured speed, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, key, scale, label in zip(
        axes, ("multiply_adds", "images_per_s"), (1e6, 1), ("multiply-adds (M)", "images/s, measured")
    ):
        ladder = [name for name in VARIANTS if "conv" not in name]
        ax.plot(
            [measured[name][key] / scale for name in ladder], [mean(found[name]) for name in ladder], ":", color="0.6"
        )
        for i, (name, words) in enumerate(VARIANTS.items()):
            values, x = found[name], measured[name][key] / scale
            error = stdev(values) / len(values) ** 0.5
            ax.errorbar(
                x, mean(values), error, fmt="o" if name in ladder else "s", color=f"C{i}", capsize=3, label=words
            )
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy (%), mean and standard error")
    figure.suptitle("Accuracy on cluttered digits, by the stages that attend (dotted) and by merging")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def stop(signum: int, frame: object) -> None:
    sys.exit(f"interrupted by {signal.Signals(signum).name}; the same command goes on")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "paper", help="folder (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, which share the cores (%(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs} is not positive")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    write_images(ROOT / "data" / "cluttered_digits")
    write_scenes(ROOT / "data" / "digit_scenes")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))  # of each training
    results, phases = output / "results.json", (classification_runs(output), dense_runs(output))
    done: dict[str, float] = json.loads(results.read_text()) if results.exists() else {}
    runs = [run for phase in phases for run in phase]
    print(f"each training prints into its {output}/*/*/printed.txt")
    with tqdm(None, "trainings", total=len(runs), initial=sum(run.key in done for run in runs)) as bar:
        for phase in phases:
            for run, reached in train_all([run for run in phase if run.key not in done], args.jobs, bar):
                done[run.key] = reached
                unfinished = results.with_suffix(".tmp")
                unfinished.write_text(json.dumps(done, indent=1) + "\n")
                unfinished.replace(results)
                bar.write(f"{run.key}: {reached:.2f} %")
                bar.update()
    found = {run.name: [done[f"{run.name}, seed {seed}"] for seed in SEEDS] for run in runs}
    bench = Bench(benchmark.parse_args(["--device", "cpu", "--batch-size", "64", "--repeats", "51"]))
    measured = measure(bench)
    where = ", ".join(f"{key} {value}" for key, value in benchmark.machine(bench).items())
    (output / "tables.md").write_text(tables(found, measured, where))
    draw(found, measured, output / "paper.png")
    print((output / "tables.md").read_text(), f"{output}: results.json, tables.md, paper.png", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except TrainingError as error:
        sys.exit(f"error: {error}")
