"""Print the tables of the CIFAR-10 study and draw its figures.

    python -m experiments.cifar10.table                          # the results.json of this directory
    python -m experiments.cifar10.table --runs outputs/cifar10   # the runs of run.sh; also writes their results.json

Measure speeds on the CPU of this machine, print both tables, write accuracy.png and, given data/cifar10, sampling.png.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import ttest_ind
from torch import nn

from lit_backbone.visualize import draw_points, draw_sheet, sampling_chains
from lit_classification.config_reader import load_config
from lit_classification.model import load_classifier
from tools import benchmark

ROOT = Path(__file__).parent
MODELS = {"lit": "LIT: attention in stages 3 and 4", "lit-1111": "attention in all stages"}  # name of a config: row
MODELS |= {"lit-0000": "attention in no stage", "lit-conv": "plain merging", "lit-conv-bn": "DTM without offsets"}
MODELS |= {"swin": "Swin", "pvt-v2": "PVT v2", "convnext": "ConvNeXt", "resnet": "ResNet"}
TASKS = {"detection": ("box AP", 100), "segmentation": ("mIoU", 1)}  # metric, factor to percent
METRICS = ("val/acc1", "coco/bbox_mAP", "mIoU")
SIGNIFICANCE_LEVEL = 0.05 / (len(MODELS) - 1 + len(TASKS))  # Bonferroni
IMG_SIZE, EPOCH_IMAGES = 64, 50_000
Results = dict[str, list[list[float]]]  # name: for each seed, the metric after each evaluation


def read_runs(root: Path) -> dict[str, Any]:
    """Read the metrics that the runs in `root` have logged."""
    runs = {}
    for run in sorted(root.glob("**/seed-*")):
        logs = sorted([*run.glob("log.jsonl"), *run.glob("*/vis_data/[0-9]*.json")])
        records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        if values := [record[key] for record in records for key in METRICS if key in record]:
            runs[run.relative_to(root).as_posix()] = {"metric": values}
    return runs


def build(name: str) -> nn.Module:
    return timm.create_model(**load_config(ROOT / "configs" / f"{name}.yaml").model_keywords)


def measure(bench: benchmark.Bench) -> dict[str, dict[str, float]]:
    """Return millions of parameters and multiply-adds, and images/s in inference and training, of every model."""
    images = benchmark.random_images(bench, bench.batch, IMG_SIZE, IMG_SIZE).contiguous()
    models = {name: build(name) for name in MODELS}
    calls = {
        name: partial(benchmark.infer, model.eval(), images, bench.precisions[0]) for name, model in models.items()
    }
    inference = bench.compare("cifar10", "inference", calls, bench.batch)
    calls = {name: benchmark.training_step(model, images, bench.precisions[0]) for name, model in models.items()}
    training = bench.compare("cifar10", "training", calls, bench.batch)
    return {
        name: {
            "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "multiply_adds": benchmark.multiply_adds(partial(build, name), (IMG_SIZE, IMG_SIZE)) / 1e6,
            "inference": 1e3 * bench.batch / inference[name],
            "training": 1e3 * bench.batch / training[name],
        }
        for name, model in models.items()
    }


def summary(values: list[float]) -> str:
    """Format the mean with its standard error."""
    if len(values) < 2:
        return f"{values[0]:.2f} (1 seed)" if values else "not run"
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f} ({len(values)} seeds)"


def difference(values: list[float], baseline: list[float]) -> str:
    """Format the difference of the means with the p-value of Welch's t-test."""
    if min(len(values), len(baseline)) < 2:
        return ""
    p = ttest_ind(values, baseline, equal_var=False).pvalue
    significance = "significant" if p < SIGNIFICANCE_LEVEL else "not significant"
    return f"{mean(values) - mean(baseline):+.2f} ({significance}, p = {p:.2g})"


def tables(results: Results, costs: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield the lines of both tables, in Markdown."""
    last = {name: [values[-1] for values in seeds] for name, seeds in results.items()}
    yield "| model | accuracy (%) | against LIT | parameters (M) | multiply-adds (M) | images/s | training, images/s |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in MODELS.items():
        gain = "" if name == "lit" else difference(last.get(name, []), last.get("lit", []))
        cost = "{parameters:.2f} | {multiply_adds:.1f} | {inference:.0f} | {training:.0f}".format(**costs[name])
        yield f"| {row} | {summary(last.get(name, []))} | {gain} | {cost} |"
    yield from ("", "| task | pretrained | from scratch | difference |", "|---|---|---|---|")
    for name, (metric, factor) in TASKS.items():
        pair = [[factor * x for x in last.get(f"{name}/{init}", [])] for init in ("pretrained", "scratch")]
        yield f"| {name}, {metric} (%) | {summary(pair[0])} | {summary(pair[1])} | {difference(*pair)} |"


def draw_accuracy(results: Results, costs: dict[str, dict[str, float]]) -> Figure:
    """Plot accuracy against training time and against inference speed."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    time, speed = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(name for name in MODELS if name in results):
        epochs = [mean(values) for values in zip(*results[name])]
        minutes = [EPOCH_IMAGES * n / costs[name]["training"] / 60 for n in range(1, len(epochs) + 1)]
        last = [values[-1] for values in results[name]]
        error = stdev(last) / len(last) ** 0.5 if len(last) > 1 else 0
        time.plot(minutes, epochs, ".-", color=f"C{i}", label=MODELS[name])
        speed.errorbar(costs[name]["inference"], epochs[-1], error, fmt="o", color=f"C{i}", capsize=3)
    time.set(xlabel="training time at the measured speed (min)", ylabel="accuracy after each epoch (%), mean of seeds")
    speed.set(xlabel="inference (images/s)", ylabel="accuracy after the last epoch (%), with standard errors")
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def draw_sampling(weights: Path, paths: list[Path]) -> Image.Image:
    """Draw where DTM samples each image, for the first and the last of the 2 x 2 tokens."""
    classifier = load_classifier(weights, torch.device("cpu"))
    images = [Image.open(path).resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC) for path in paths]
    chains = [sampling_chains(classifier.model, classifier.transform(image)) for image in images]
    tiles = [draw_points(*pair, *token) for token in ((0, 0), (1, 1)) for pair in zip(images, chains)]
    return draw_sheet(tiles, columns=len(images))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=Path, help="output directory of run.sh")
    parser.add_argument("--output", type=Path, default=Path("outputs/cifar10"), help="directory (%(default)s)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    runs, weights = json.loads((ROOT / "results.json").read_text()), ROOT / "lit.pth"
    if args.runs:
        runs, weights = read_runs(args.runs), args.runs / "lit/seed-0/latest.pth"
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(run)}" for key, run in runs.items())
        (args.output / "results.json").write_text(f"{{\n{lines}\n}}\n")
    results: Results = {}
    for key, run in runs.items():
        results.setdefault(key.rpartition("/")[0], []).append(run["metric"])
    options = ["--device", "cpu", "--batch-size", "64", "--output", str(args.output)]
    bench = benchmark.Bench(benchmark.parse_args(options))
    costs = measure(bench)
    print("\n".join(tables(results, costs)))
    print("\nmeasured on " + ", ".join(f"{key} {value}" for key, value in bench.machine().items()))
    draw_accuracy(results, costs).savefig(args.output / "accuracy.png", dpi=120)
    paths = [min(folder.iterdir()) for folder in sorted(Path("data/cifar10/val").glob("*"))]
    if paths and weights.exists():
        draw_sampling(weights, paths).save(args.output / "sampling.png")


if __name__ == "__main__":
    main()
