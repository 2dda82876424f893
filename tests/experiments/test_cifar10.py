"""The CIFAR-10 study: its commands, tables and figures."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.cifar10.data import CLASSES
from experiments.cifar10.table import MODELS, TASKS, difference, draw_accuracy, draw_sampling, summary, tables
from lit_classification.config_reader import load_config
from lit_classification.model import load_classifier
from tests.programs import write_echo

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "cifar10"


def run(folder: Path, *args: str, python: Path = Path(sys.executable), **variables: str | Path) -> str:
    """Run run.sh and return its stdout."""
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    variables = {name: str(value) for name, value in variables.items()}
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PATH": path, "OUTPUT": str(folder / "out")} | variables
    command = ["bash", str(STUDY / "run.sh"), *args]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    return write_echo(tmp_path)


def test_run_starts_every_training_once(echo: Path, tmp_path: Path) -> None:
    commands = run(tmp_path, "RUNTIME.DEVICE", "cuda", python=echo, DATA=tmp_path).splitlines()
    classifiers = [line for line in commands if line.startswith("main.py")]
    assert len(set(classifiers)) == len(classifiers) == 3 * len(MODELS)
    assert all(line.endswith("TRAIN.EPOCHS 10 RUNTIME.DEVICE cpu RUNTIME.DEVICE cuda") for line in classifiers)
    for line in classifiers:
        assert (ROOT / "classification" / line.split()[2]).is_file()
    dense = [line for line in commands if line.startswith("tools/train.py")]
    assert len(set(dense)) == len(dense) == 3 * 2 * 2
    assert sum(f"init_cfg.checkpoint={tmp_path}/out/lit/seed-0/latest.pth" in line for line in dense) == 6
    assert sum("init_cfg=None" in line for line in dense) == 6
    assert commands[-1].startswith("-m experiments.cifar10.table")


@pytest.mark.slow
def test_run_trains(echo: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, name in np.ndindex(2, len(CLASSES)):
        path = tmp_path / "data" / ("train", "val")[split] / CLASSES[name] / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    options = ["TRAIN.GLOBAL_BATCH", "8", "DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", "0"]
    train = partial(run, tmp_path, *options, DATA=tmp_path / "data", MODELS="lit", TASKS="", SEEDS="0", EPOCHS="2")
    out, results = train(), tmp_path / "out" / "results.json"
    log = (tmp_path / "out/lit/seed-0/log.jsonl").read_text()
    metric = [json.loads(line)["val/acc1"] for line in log.splitlines()]
    assert json.loads(results.read_text()) == {"lit/seed-0": {"metric": metric}} and len(metric) == 2
    assert f"| LIT: attention in stages 3 and 4 | {metric[-1]:.2f} (1 seed) |" in out
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 10_000
    assert "main.py" not in train(python=echo)


def test_results_of_the_repository() -> None:
    results = json.loads((STUDY / "results.json").read_text())
    names = [*MODELS, *(f"{task}/{init}" for task in TASKS for init in ("pretrained", "scratch"))]
    assert results.keys() == {f"{name}/seed-{seed}" for name in names for seed in range(3)}
    assert load_classifier(STUDY / "lit.pth", torch.device("cpu")).classes == [*CLASSES]
    for name in MODELS:
        accuracy = mean(results[f"{name}/seed-{seed}"]["metric"][-1] for seed in range(3))
        header = f"#   obtained      {accuracy:.1f} % top-1 on the test images, mean of 3 seeds\n"
        assert header in (STUDY / "configs" / f"{name}.yaml").read_text()


def test_differences_by_chance_are_not_significant() -> None:
    assert difference([90.0, 92.0, 91.0], [90.5, 91.5, 90.0]).startswith("+0.33 (not significant")
    assert difference([80.0, 80.2, 80.1], [90.0, 90.2, 90.3]).startswith("-10.07 (significant")
    assert difference([80.0], [90.0, 90.2, 90.3]) == ""
    assert summary([1.0, 2.0, 3.0]) == "2.00 ± 0.58 (3 seeds)"


def test_tables_and_figures(tmp_path: Path) -> None:
    results = {"lit": [[80.0, 90.0], [81.0, 91.0]], "lit-0000": [[40.0, 50.0], [41.0, 51.0]], "swin": [[70.0, 85.0]]}
    results["detection/pretrained"] = [[0.9], [0.92]]
    costs = dict.fromkeys(MODELS, dict(parameters=1.234567, multiply_adds=9.04, inference=3210.4, training=654.3))
    text = "\n".join(tables(results, costs))
    assert "| attention in no stage | 50.50 ± 0.50 (2 seeds) | -40.00 (significant, p =" in text
    assert "| Swin | 85.00 (1 seed) |  | 1.23 | 9.0 | 3210 | 654 |" in text
    assert "| ResNet | not run |" in text
    assert "| detection, box AP (%) | 91.00 ± 1.00 (2 seeds) | not run |  |" in text
    draw_accuracy(results, costs).savefig(tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    assert draw_sampling(STUDY / "lit.pth", [tmp_path / "red.png"] * 2).size[0] > 2 * 64


def test_models_differ_only_in_the_model() -> None:
    configs = {path.stem: load_config(path) for path in (STUDY / "configs").iterdir() if path.stem != "base"}
    assert configs.keys() == MODELS.keys()
    lit = configs["lit"]
    for name, config in configs.items():
        assert config.model_copy(update={"MODEL": lit.MODEL, "BASE": lit.BASE}) == lit
        keywords, lit_keywords = (c.MODEL.LIT.model_dump(exclude_none=True) for c in (config, lit))
        assert len(keywords.items() - lit_keywords.items()) == name.startswith("lit-")
        shared = {"NAME": lit.MODEL.NAME, "LIT": lit.MODEL.LIT, "KEYWORDS": {}}
        assert config.MODEL.model_copy(update=shared) == lit.MODEL
