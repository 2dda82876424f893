"""The comparison goes on where it was interrupted, compares like with like, and tells differences from chance."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from demo.cifar10 import CLASSES
from demo.digit_scenes import write_scenes
from lit_classification.config_file import load_config
from lit_classification.model import load_classifier
from tools import paper, paper_tables
from tools.paper_runs import CONFIGS, DENSE, LIT, MODELS, ROOT, Run, TrainingError

SHORT = ("TRAIN.EPOCHS", "2", "TRAIN.GLOBAL_BATCH", "8", "DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", "0")


@pytest.fixture
def bar() -> Iterator[tqdm]:
    with tqdm(disable=True) as bar:
        yield bar


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """For the real trainer to train for two epochs on a few images of noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, name, number in np.ndindex(2, len(CLASSES), 1):
        path = root / ("train", "val")[split] / CLASSES[name] / f"{number}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return ("DATA.DATA_PATH", str(root), *SHORT)


def test_every_training_is_planned_once(tmp_path: Path) -> None:
    runs = paper.classification_runs(tmp_path, [*MODELS], [0, 1, 2]) + paper.dense_runs(
        tmp_path, [*DENSE], [0, 1, 2], tmp_path / "lit.pth"
    )
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == len(runs) == 3 * (9 + 2 * 2)
    assert len({run.digest for run in runs}) == len(runs)
    assert [run.key for run in runs[:2]] == ["lit, seed 0", "lit-1111, seed 0"]


def test_schedules_are_shorter_than_the_demos() -> None:
    Config = pytest.importorskip("mmengine.config").Config
    for name, task in DENSE.items():
        values = set()
        demo = Config.fromfile(ROOT / name / "configs" / "demo" / f"{task.config}.py")
        for setting in task.schedule:
            key, value = setting.split("=")
            whole = demo
            for part in key.split("."):
                whole = whole[int(part) if part.isdigit() else part]
            values.add((int(value), whole))
        ((ours, demos),) = values  # as long everywhere, and evaluated at the end
        assert ours < demos


def test_what_starts_from_another_lit_is_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its weights lie in the same file; what starts from random weights stays done."""
    ten, hundred = (
        paper.dense_runs(tmp_path, ["detection"], [0], tmp_path / "lit.pth", "TRAIN.EPOCHS", n) for n in ("10", "100")
    )
    same = {run.name: run.digest == other.digest for run, other in zip(ten, hundred, strict=True)}
    assert same == {"detection, pretrained": False, "detection, from scratch": True}
    assert all((run.folder == other.folder) == same[run.name] for run, other in zip(ten, hundred))  # is not continued
    monkeypatch.setattr(paper, "write_scenes", lambda _: None)
    command = ["--output", str(tmp_path), "--results", str(tmp_path), "--models", "detection", "--epochs", "20"]
    with pytest.raises(TrainingError, match="lit, seed 0: not trained with these options; add --models lit --seeds 0"):
        paper.main(command)


def test_other_settings_neither_continue_nor_replace_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ten, five = (paper.classification_runs(tmp_path, [LIT], [0], "TRAIN.EPOCHS", n)[0] for n in ("10", "5"))
    assert ten.folder != five.folder and ten.folder.name in ten.command
    kept = {"settings": ten.digest, "reached": [70.0], "cpu_seconds": 1}
    paper.keep(tmp_path / "results.json", ten.key, kept)
    monkeypatch.setattr(paper, "write_images", lambda _: None)
    started = []
    monkeypatch.setattr(paper, "train_all", lambda runs, *_: started.extend(runs) or iter(()))
    monkeypatch.setattr(paper, "report", lambda *_: "")
    command = ["--models", LIT, "--seeds", "0", "--epochs", "5", "--results"]
    with pytest.raises(TrainingError, match=r"results.json: has lit, seed 0 by other settings; name another folder"):
        paper.main([*command, str(tmp_path)])
    assert not started and paper.read(tmp_path / "results.json") == {ten.key: kept}
    paper.main([*command, str(tmp_path / "five")])
    assert [run.key for run in started] == [five.key]


def test_what_the_repository_keeps_is_of_the_settings_of_now() -> None:
    folder = ROOT / "docs/paper"
    options = ("TRAIN.EPOCHS", "10", "RUNTIME.DEVICE", "cpu", "RUNTIME.COMPILE", "False")
    runs = paper.classification_runs(ROOT, [*MODELS], [0, 1, 2], *options)
    runs += paper.dense_runs(ROOT, [*DENSE], [0, 1, 2], folder / "lit.pth", *options)
    kept = paper.read(folder / "results.json")
    assert paper.finished(folder / "results.json", runs) == kept != {}
    assert load_classifier(folder / "lit.pth", torch.device("cpu")).classes == [*CLASSES]
    for name in MODELS:
        last = [entry["reached"][-1] for key, entry in kept.items() if key.startswith(f"{name}, ")]
        obtained = f"{mean(last):.1f} % of the test photographs, {len(last)} of 3 seeds" if last else "not run yet"
        assert f"#   obtained      {obtained}\n" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.slow
def test_a_training_is_continued_and_counted(options: tuple[str, ...], tmp_path: Path, bar: tqdm) -> None:
    """Started again, it only reports; with other settings, it is not done."""
    run, other = (paper.classification_runs(tmp_path, [LIT], [0], *options, "TRAIN.EPOCHS", n)[0] for n in "23")
    results = tmp_path / "results" / "results.json"
    assert paper.finished(results, [run]) == {}
    ((_, result),) = paper.train_all([run], 1, bar)
    log = (run.folder / "log.jsonl").read_text()
    assert (
        result["reached"] == [json.loads(line)["val/acc1"] for line in log.splitlines()] and len(log.splitlines()) == 2
    )
    paper.keep(results, run.key, result)
    paper.keep(results, "another, seed 1", result)
    assert paper.finished(results, [run, other]) == {run.key: result}
    assert paper.finished(results, [other]) == {}
    ((_, again),) = paper.train_all([run], 1, bar)
    assert again["reached"] == result["reached"] and again["cpu_seconds"] > result["cpu_seconds"] > 0


def test_trainings_end_with_the_comparison(
    options: tuple[str, ...], tmp_path: Path, bar: tqdm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fails, and the other is not left behind."""
    started = []
    start = Run.start
    monkeypatch.setattr(Run, "start", lambda run: started.append(start(run)) or started[-1])
    long, broken = paper.classification_runs(tmp_path, ["resnet", LIT], [0], *options, "TRAIN.EPOCHS", "100000")
    broken = broken._replace(command=(*broken.command, "TRAIN.NONE", "1"))
    with pytest.raises(TrainingError, match="(?s)lit, seed 0: ended with status 1; .*error: .*NONE"):
        list(paper.train_all([long, broken], 2, bar))
    assert len(started) == 2 and all(process.returncode for process in started)
    assert long.has_ended(started[0]) and broken.has_ended(started[1])  # still, as where both end in the same second
    assert (long.folder / "seconds.txt").exists()


@pytest.mark.slow
def test_the_whole_comparison(options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers, and segmentors with LIT's weights and without, a few steps each; then nothing is left to train."""
    load_file = pytest.importorskip("lit_backbone.mm.loading").load_file
    scenes, output = tmp_path / "scenes", tmp_path / "out"
    write_scenes(scenes, size=64, train=16, val=2)
    plan = paper.classification_runs
    monkeypatch.setattr(paper, "classification_runs", lambda *args: plan(*args, *options))
    weights = tmp_path / "lit.pth"
    task = DENSE["segmentation"]
    schedule = tuple(setting.replace("1000", "1") for setting in task.schedule if setting.startswith("train_cfg"))
    monkeypatch.setitem(DENSE, "segmentation", task._replace(schedule=schedule))
    data = tuple(f"{split}_dataloader.dataset.data_root={scenes}/" for split in ("train", "val"))
    planned = paper.dense_runs(output, ["segmentation"], [0], weights)
    dense = [run._replace(command=(*run.command, *data)) for run in planned]
    monkeypatch.setattr(paper, "dense_runs", lambda *_: dense)
    for name in ("write_images", "write_scenes"):
        monkeypatch.setattr(paper, name, lambda _: None)
    monkeypatch.setattr(paper_tables, "MODELS", {name: MODELS[name] for name in (LIT, "resnet")})  # to be timed
    command = ["--output", str(output), "--results", str(tmp_path), "--seeds", "0", "--jobs", "1"]
    command += ["--models", LIT, "resnet", "segmentation"]
    paper.main(command)
    done = json.loads((tmp_path / "results.json").read_text())
    assert done.keys() == {"lit, seed 0", "resnet, seed 0", *(run.key for run in dense)}
    classifier = load_file(str(weights))["model"]
    for run in dense:
        weight = load_file(str(run.folder / "iter_1.pth"))["state_dict"]["backbone.stages.0.merge.proj.weight"]
        moved = (weight - classifier["stages.0.merge.proj.weight"]).abs().max()
        assert (moved < 1e-3) == ("pretrained" in run.name), run.key
    monkeypatch.setattr(Run, "start", None)
    paper.main(command)
    assert json.loads((tmp_path / "results.json").read_text()) == done
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_differences_by_chance_are_not_resolved() -> None:
    assert paper_tables.difference([90.0, 92.0, 91.0], [90.5, 91.5, 90.0]).startswith("+0.33 (not resolved")
    assert paper_tables.difference([80.0, 80.2, 80.1], [90.0, 90.2, 90.3]).startswith("-10.07 (resolved")
    assert paper_tables.difference([80.0], [90.0, 90.2, 90.3]) == ""
    assert paper_tables.summary([1.0, 2.0, 3.0]) == "2.00 ± 0.58 (3 seeds)"


def test_tables_and_plot_show_what_there_is(tmp_path: Path) -> None:
    found = {LIT: [[80.0, 90.0], [81.0, 91.0]], "lit-0000": [[40.0, 50.0], [41.0, 51.0]], "swin": [[70.0, 85.0]]}
    found["detection, pretrained"] = [[0.9], [0.92]]
    cost = dict(parameters=1_234_567, multiply_adds=9.04e6, inference=3210.4, training=654.3)
    costs = dict.fromkeys(MODELS, cost)
    text = "\n".join(paper_tables.tables(found, costs))
    assert "| attention in no stage | 50.50 ± 0.50 (2 seeds) | -40.00 (resolved, p =" in text
    assert "| Swin | 85.00 (1 seed so far) |  | 1.23 | 9.0 | 3210 | 654 |" in text
    assert "| ResNet | not run yet |" in text
    assert "| detection, box AP (%) | 91.00 ± 1.00 (2 seeds) | not run yet |  |" in text
    paper_tables.draw(found, costs, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_models_differ_in_the_model_alone() -> None:
    configs = {path.stem: load_config(path) for path in CONFIGS.iterdir() if path.stem != "base"}
    assert configs.keys() == MODELS.keys()
    lit = configs[LIT]
    for name, config in configs.items():
        assert config.model_copy(update={"MODEL": lit.MODEL, "BASE": lit.BASE}) == lit
        extra = config.MODEL.LIT.model_dump().items() - lit.MODEL.LIT.model_dump().items()
        assert len(extra) == (name.startswith("lit-"))
        own = {"NAME": lit.MODEL.NAME, "LIT": lit.MODEL.LIT, "KEYWORDS": {}}
        assert config.MODEL.model_copy(update=own) == lit.MODEL


@pytest.mark.slow
def test_peers_cost_what_lit_costs() -> None:
    """Multiply-adds within ten percent, and as many blocks."""
    costs = {name: paper_tables.multiply_adds(partial(paper_tables.build, name), (64, 64)) for name in MODELS}
    for name in ("lit-conv", "lit-conv-bn", "swin", "pvt-v2", "convnext", "resnet"):
        assert costs[name] == pytest.approx(costs[LIT], rel=0.1), name
        keywords = load_config(CONFIGS / f"{name}.yaml").model_keywords
        assert sum(keywords.get("depths") or keywords["layers"]) == 5, name
    assert costs["lit-0000"] < costs[LIT] < costs["lit-1111"]
