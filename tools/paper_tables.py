"""Tables and plot of what tools/paper.py found so far, with the models' costs, measured in one run."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
from PIL import Image
from scipy.stats import ttest_ind
from torch import nn

from lit_backbone.offsets import draw_points, draw_sheet, sampling_chains
from lit_classification.config_file import load_config
from lit_classification.model import load_classifier
from tools import benchmark
from tools.benchmark import Bench, infer, multiply_adds, random_images, training_step
from tools.paper_runs import CONFIGS, DENSE, LIT, MODELS, STARTS

SIDE, IMAGES = 64, 50_000  # of a photograph in pixels, of an epoch
RESOLVED = 0.05 / (len(MODELS) - 1 + len(DENSE))  # largest p for a difference to count, by Bonferroni
Found = dict[str, list[list[float]]]  # by name, what each seed's evaluations reached
Costs = dict[str, dict[str, float]]  # of a model by its name


def report(finished: dict[str, dict[str, Any]], device: str, plot: Path) -> str:
    """Tables in Markdown of finished trainings, by key; draws those of CIFAR-10 into `plot`."""
    found: Found = {}
    for key, entry in finished.items():
        found.setdefault(key.rpartition(", seed ")[0], []).append(entry["reached"])
    bench = Bench(benchmark.parse_args(["--device", device, "--batch-size", "64"]))
    costs = measure(bench)
    draw(found, costs, plot)
    hours = sum(entry["cpu_seconds"] for entry in finished.values()) / 3600
    where = ", ".join(f"{key} {value}" for key, value in benchmark.machine(bench).items())
    return "\n".join([*tables(found, costs), "", f"{hours:.1f} hours of CPU time in all; images/s on {where}"])


def build(name: str) -> nn.Module:
    return timm.create_model(**load_config(CONFIGS / f"{name}.yaml").model_keywords)


def measure(bench: Bench) -> Costs:
    """Parameters, multiply-adds, and images/s in inference and training of every model, timed by turns."""
    images = random_images(bench, bench.batch, SIDE, SIDE).contiguous()  # as main.py has them
    models = {name: build(name).to(bench.device) for name in MODELS}
    costs = {name: {"parameters": sum(p.numel() for p in model.parameters())} for name, model in models.items()}
    calls = {name: partial(infer, model.eval(), images) for name, model in models.items()}
    inference = bench.compare("paper", "inference", calls, bench.batch)
    training = bench.compare("paper", "training", {n: training_step(m, images) for n, m in models.items()}, bench.batch)
    for name, cost in costs.items():
        cost["multiply_adds"] = multiply_adds(partial(build, name), (SIDE, SIDE))
        cost |= {"inference": 1e3 * bench.batch / inference[name], "training": 1e3 * bench.batch / training[name]}
    return costs


def summary(values: list[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.2f} (1 seed so far)" if values else "not run yet"
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f} ({len(values)} seeds)"


def difference(values: list[float], others: list[float]) -> str:
    """How much higher the first are, and whether chance explains that, by Welch's t-test; empty for single ones."""
    if min(len(values), len(others)) < 2:
        return ""
    p = ttest_ind(values, others, equal_var=False).pvalue
    return f"{mean(values) - mean(others):+.2f} ({'resolved' if p < RESOLVED else 'not resolved'}, p = {p:.2g})"


def tables(found: Found, costs: Costs) -> Iterator[str]:
    """Lines of two tables."""
    last = {name: [reached[-1] for reached in seeds] for name, seeds in found.items()}
    yield "| model | accuracy (%) | against LIT | parameters (M) | multiply-adds (M) | images/s | training, images/s |"
    yield "|---|---|---|---|---|---|---|"
    for name, words in MODELS.items():
        values, cost = last.get(name, []), costs[name]
        against = "" if name == LIT else difference(values, last.get(LIT, []))
        size = f"{cost['parameters'] / 1e6:.2f} | {cost['multiply_adds'] / 1e6:.1f}"
        yield f"| {words} | {summary(values)} | {against} | {size} | {cost['inference']:.0f} | {cost['training']:.0f} |"
    yield from ("", "| task | pretrained | from scratch | difference |", "|---|---|---|---|")
    for name, task in DENSE.items():
        pretrained, scratch = ([task.scale * value for value in last.get(f"{name}, {start}", [])] for start in STARTS)
        cells = f"{summary(pretrained)} | {summary(scratch)} | {difference(pretrained, scratch)}"
        yield f"| {name}, {task.words} (%) | {cells} |"


def draw(found: Found, costs: Costs, path: Path) -> None:
    """Accuracy against the time spent on training, and in the end against speed, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    time, speed = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(MODELS):
        if name not in found:
            continue
        epochs = [mean(values) for values in zip(*found[name])]
        minutes = [IMAGES * (epoch + 1) / costs[name]["training"] / 60 for epoch in range(len(epochs))]
        error = stdev([reached[-1] for reached in found[name]]) / len(found[name]) ** 0.5 if found[name][1:] else 0
        time.plot(minutes, epochs, ".-", color=f"C{i}", label=MODELS[name])
        speed.errorbar(costs[name]["inference"], epochs[-1], error, fmt="o", color=f"C{i}", capsize=3)
    time.set(xlabel="minutes of training, by measured images/s", ylabel="accuracy (%) after each epoch, mean of seeds")
    speed.set(xlabel="images/s in inference", ylabel="after the last, with standard errors")
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def draw_sampling(weights: Path, photographs: list[Path]) -> Image.Image:
    """Where a LIT's DTM samples photographs, below each other for the first and the last of 2 x 2 tokens."""
    classifier = load_classifier(weights, torch.device("cpu"))
    inputs = [Image.open(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for path in photographs]
    chains = [sampling_chains(classifier.model, classifier.transform(image)) for image in inputs]
    pictures = [draw_points(*pair, *token) for token in ((0, 0), (1, 1)) for pair in zip(inputs, chains)]
    return draw_sheet(pictures, len(pictures), len(photographs))
