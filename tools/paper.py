"""The paper's argument in miniature: what attention, DTM and pretraining are worth on digits, within a few hours.

    python tools/paper.py        # or: make paper

Trains a small LIT with attention in ever fewer stages, and one without DTM, on cluttered digits
(demo/cluttered_digits.py); then a detector and a segmentor on scenes of digits (demo/digit_scenes.py), from that LIT's
weights and from random ones. Three seeds each. Where it was interrupted it goes on, within a training, too; after a
change of settings, name another --output. Writes results.json (what each training reached), tables.md and paper.png.
"""

import argparse
import json
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import benchmark
import timm
import torch
from benchmark import Bench, infer, multiply_adds
from scipy.stats import ttest_ind
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "classification")]

from config import load_config  # noqa: E402
from demo.cluttered_digits import write_images  # noqa: E402
from demo.digit_scenes import write_scenes  # noqa: E402

SEEDS = (0, 1, 2)
LIT = "lit-0011"
VARIANTS = {
    "lit-1111": "all stages",
    "lit-0111": "stages 2 to 4",
    LIT: "stages 3 and 4: LIT",
    "lit-0001": "stage 4",
    "lit-0000": "none",
    "lit-0011-conv": "stages 3 and 4, no DTM",
}


class Task(NamedTuple):
    """A dense task: the config of its demo, in the folder of its name, and what it is judged by."""

    config: str
    metric: str
    percent: float  # what brings the metric to percent
    words: str


TASKS = {
    "detection": Task("retinanet_lit_digit_scenes", "coco/bbox_mAP", 100, "box AP"),
    "segmentation": Task("fpn_lit_digit_scenes", "mIoU", 1, "mIoU"),
}
STARTS = ("pretrained", "from scratch")
COMPARISONS = len(VARIANTS) - 1 + len(TASKS)
RESOLVED = 0.05 / COMPARISONS  # largest p of Welch's t-test for a difference to count, by Bonferroni


class Run(NamedTuple):
    """One training: what it compares, its seed, the folder it writes, the command that starts or continues it."""

    name: str
    seed: int
    folder: Path
    command: list[str]
    metric: str
    percent: float = 1
    test: tuple[str, ...] = ()  # command that judges its last checkpoint, where the training itself does not

    @property
    def key(self) -> str:
        return f"{self.name}, seed {self.seed}"


def plan(output: Path) -> list[Run]:
    """All trainings, in an order in which each finds the weights it starts from."""
    runs = [_classification(output, name, seed) for name, seed in product(VARIANTS, SEEDS)]
    for task, start, seed in product(TASKS, STARTS, SEEDS):
        config, metric, percent, _ = TASKS[task]
        weights = f".checkpoint={_classification(output, LIT, seed).folder / 'latest.pth'}"
        init_cfg = f"model.backbone.init_cfg{weights if start == 'pretrained' else '=None'}"
        work_dir = output / f"{task}-{start.replace(' ', '-')}" / f"seed-{seed}"
        arguments = [f"configs/demo/{config}.py", "--work-dir", str(work_dir)]
        options = ["--resume", "--cfg-options", f"randomness.seed={seed}", init_cfg]
        command, test = [f"{task}/tools/train.py", *arguments, *options], (f"{task}/tools/test.py", *arguments)
        runs.append(Run(f"{task}, {start}", seed, work_dir, command, metric, percent, test))
    return runs


def _classification(output: Path, name: str, seed: int) -> Run:
    tag = f"seed-{seed}"
    command = ["classification/main.py", "--cfg", f"configs/paper/{name}.yaml", "--output", str(output), "--tag", tag]
    return Run(name, seed, output / name / tag, [*command, "--opts", "SEED", str(seed)], "val/acc1")


def train(run: Run) -> float:
    """Start or continue a training, printing into a file; returns what its last evaluation found, in percent.

    Raises:
        SystemExit: it failed; shows the end of what it printed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    execute(run, run.command)
    if run.test:  # mmengine saves before it validates, and does not catch up on that
        execute(run, [*run.test, (run.folder / "last_checkpoint").read_text()])
    logs = sorted(run.folder.glob("log.jsonl")) or sorted(run.folder.glob("*/[0-9]*_[0-9]*.json"))
    return run.percent * json.loads(logs[-1].read_text().splitlines()[-1])[run.metric]


def execute(run: Run, command: list[str]) -> None:
    folder, script = command[0].split("/", 1)
    with open(run.folder / "printed.txt", "a") as printed:
        arguments = [sys.executable, script, *command[1:]]
        status = subprocess.run(arguments, cwd=ROOT / folder, stdout=printed, stderr=subprocess.STDOUT).returncode
    if status:
        end = "\n".join(Path(printed.name).read_text().splitlines()[-5:])
        sys.exit(f"error: {run.key}: ended with status {status}; {printed.name} ends in\n{end}")


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
    config = load_config(ROOT / f"classification/configs/paper/{name}.yaml")
    keywords = dict(config.MODEL.LIT, num_classes=config.MODEL.NUM_CLASSES, img_size=config.DATA.IMG_SIZE)
    return timm.create_model(config.MODEL.NAME, **keywords)


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
    for task, (*_, metric) in TASKS.items():
        pretrained, scratch = (found[f"{task}, {start}"] for start in STARTS)
        cells = f"{summary(pretrained)} | {summary(scratch)} | {difference(pretrained, scratch)}"
        lines.append(f"| {task}, {metric} (%) | {cells} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[float]], measured: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy against multiply-adds and against measured speed, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, key, scale, label in zip(
        axes, ("multiply_adds", "images_per_s"), (1e6, 1), ("multiply-adds (M)", "images/s, measured")
    ):
        for name, words in VARIANTS.items():
            values, x = found[name], measured[name][key] / scale
            error = stdev(values) / len(values) ** 0.5
            style = dict(fmt="s" if name.endswith("conv") else "o", color="C3" if name == LIT else "C0", capsize=3)
            ax.errorbar(x, mean(values), error, **style)
            ax.annotate(words, (x, mean(values)), xytext=(6, 6), textcoords="offset points", fontsize=8)
        ax.set_xlabel(label)
        ax.margins(0.25, 0.15)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy (%), mean and standard error")
    figure.suptitle("Accuracy on cluttered digits, by the stages that attend")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "paper", help="folder (%(default)s)")
    output = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    write_images(ROOT / "data" / "cluttered_digits")
    write_scenes(ROOT / "data" / "digit_scenes")
    results, runs = output / "results.json", plan(output)
    done: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the training it waits for ends, too
    todo = [run for run in runs if run.key not in done]
    with tqdm(todo, "trainings", total=len(runs), initial=len(runs) - len(todo)) as bar:
        for run in bar:
            bar.write(f"{run.key}: prints into {run.folder / 'printed.txt'}")
            done[run.key] = train(run)
            unfinished = results.with_suffix(".tmp")
            unfinished.write_text(json.dumps(done, indent=1) + "\n")
            unfinished.replace(results)
            bar.write(f"{run.key}: {done[run.key]:.2f} %")
    found = {run.name: [done[f"{run.name}, seed {seed}"] for seed in SEEDS] for run in runs}
    bench = Bench(benchmark.parse_args(["--device", "cpu", "--batch-size", "64", "--repeats", "51"]))
    measured = measure(bench)
    where = ", ".join(f"{key} {value}" for key, value in benchmark.machine(bench).items())
    (output / "tables.md").write_text(tables(found, measured, where))
    draw(found, measured, output / "paper.png")
    print((output / "tables.md").read_text(), f"{output}: results.json, tables.md, paper.png", sep="\n")


if __name__ == "__main__":
    main()
