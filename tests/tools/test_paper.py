"""The comparison goes on where it was interrupted, and counts a difference only where chance does not explain it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from demo.digit_scenes import write_scenes
from tools import paper

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bar() -> Iterator[tqdm]:
    with tqdm(disable=True) as bar:
        yield bar


def test_every_training_is_planned_once(tmp_path: Path) -> None:
    classification, dense = paper.classification_runs(tmp_path), paper.dense_runs(tmp_path)
    runs = classification + dense
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == len(runs) == 3 * (7 + 2 * 2)
    pretrained = next(run for run in dense if run.key == "segmentation, pretrained, seed 2")
    classifier = next(run for run in classification if run.key == "lit-0011, seed 2")
    assert f"model.backbone.init_cfg.checkpoint={classifier.folder}/latest.pth" in pretrained.commands[0]


def test_schedules_are_shorter_than_the_demos() -> None:
    Config = pytest.importorskip("mmengine.config").Config
    for name, task in paper.DENSE.items():
        values = set()
        demo = Config.fromfile(ROOT / name / "configs" / "demo" / f"{task.config}.py")
        for setting in task.schedule:
            key, value = setting.split("=")
            whole = demo
            for part in key.split("."):
                whole = whole[int(part) if part.isdigit() else part]
            values.add((int(value), whole))
        ((ours, demos),) = values  # as long everywhere
        assert ours < demos and str(ours) in task.last


def shorten(run, *options: str):
    """The training with options at the end of all its commands."""
    return run._replace(commands=tuple((*command, *options) for command in run.commands))


def small_classification(data: Path, output: Path) -> list:
    """Trainings by the real trainer, for two epochs on a few images."""
    paper.write_images(data, train=70, val=10)
    options = ("DATA.DATA_PATH", str(data), "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "2")
    return [shorten(run, *options) for run in paper.classification_runs(output)]


@pytest.fixture
def small_runs(tmp_path: Path) -> list:
    return small_classification(tmp_path / "data", tmp_path / "out")[:2]


def test_a_training_is_continued_and_read(small_runs: list, bar: tqdm) -> None:
    """Started again, it only reports."""
    run = small_runs[0]
    ((_, accuracy),) = paper.train_all([run], 1, bar)
    log = run.folder / "log.jsonl"
    assert accuracy == [json.loads(line)["val/acc1"] for line in log.read_text().splitlines()][-1]
    before = log.read_text()
    assert list(paper.train_all([run], 1, bar)) == [(run, accuracy)] and log.read_text() == before
    assert "finished already" in run.printed.read_text()


def test_trainings_end_with_the_comparison(small_runs: list, bar: tqdm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the first, it leaves no process behind; the second can be gone on with."""
    started = []
    start = paper.Run.start
    monkeypatch.setattr(paper.Run, "start", lambda *args: started.append(start(*args)) or started[-1])
    first, second = small_runs
    slow = shorten(second, "TRAIN.EPOCHS", "1000")
    trainings = paper.train_all([first, slow], 2, bar)
    assert next(trainings)[0] == first
    trainings.close()
    assert [process.poll() is None for process in started] == [False, False] and started[1].returncode != 0
    shorter = shorten(second, "TRAIN.RESUME_CHANGED", "true")
    assert [run for run, _ in paper.train_all([shorter], 1, bar)] == [shorter]


def test_a_training_that_fails_stops_all(small_runs: list, bar: tqdm) -> None:
    run = small_runs[0]
    broken = shorten(run, "TRAIN.NONE", "1")
    with pytest.raises(paper.TrainingError, match="(?s)lit-1111, seed 0: ended with status 1; .*error: .*NONE"):
        list(paper.train_all([broken, *small_runs], 1, bar))
    assert not small_runs[1].folder.exists()


@pytest.mark.slow
def test_the_whole_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers, and segmentors from their weights, each a few steps long; a second time nothing is trained."""
    load_file = pytest.importorskip("lit_backbone.mm.loading").load_file
    scenes, output = tmp_path / "scenes", tmp_path / "out"
    write_scenes(scenes, size=64, train=16, val=2)
    monkeypatch.setattr(paper, "SEEDS", (0, 1))
    monkeypatch.setattr(paper, "VARIANTS", {name: paper.VARIANTS[name] for name in (paper.LIT, "lit-0000")})
    task = paper.DENSE["segmentation"]._replace(schedule=("train_cfg.max_iters=1",), last="iter_1.pth")
    monkeypatch.setattr(paper, "DENSE", {"segmentation": task})
    options = [f"{split}_dataloader.dataset.data_root={scenes}/" for split in ("train", "test")]
    classification = small_classification(tmp_path / "digits", output)
    dense = [shorten(run, "--cfg-options", *options) for run in paper.dense_runs(output)]
    monkeypatch.setattr(paper, "classification_runs", lambda _: classification)
    monkeypatch.setattr(paper, "dense_runs", lambda _: dense)
    for data in ("write_images", "write_scenes"):
        monkeypatch.setattr(paper, data, lambda _: None)
    paper.main(["--output", str(output)])
    done = json.loads((output / "results.json").read_text())
    assert done.keys() == {run.key for run in classification + dense}
    for run in dense:
        weight = load_file(str(run.folder / "iter_1.pth"))["state_dict"]["backbone.stages.0.merge.proj.weight"]
        classifier = load_file(str(output / paper.LIT / f"seed-{run.seed}" / "latest.pth"))["model"]
        moved = (weight - classifier["stages.0.merge.proj.weight"]).abs().max()
        assert (moved < 1e-3) == ("pretrained" in run.name), run.key
    assert "segmentation, mIoU (%)" in (output / "tables.md").read_text() and (output / "paper.png").is_file()
    monkeypatch.setattr(paper.Run, "start", None)
    paper.main(["--output", str(output)])
    assert json.loads((output / "results.json").read_text()) == done


def test_differences_by_chance_are_not_resolved() -> None:
    assert paper.difference([90.0, 92.0, 91.0], [90.5, 91.5, 90.0]).startswith("+0.33 (not resolved")
    assert paper.difference([80.0, 80.2, 80.1], [90.0, 90.2, 90.3]).startswith("-10.07 (resolved")
    assert paper.summary([1.0, 2.0, 3.0]) == "2.00 ± 0.58"


def test_tables_and_plot(tmp_path: Path) -> None:
    runs = paper.classification_runs(tmp_path) + paper.dense_runs(tmp_path)
    found = {run.name: [90.0, 91.0, 92.5] for run in runs} | {"lit-0000": [50.0, 51.0, 52.0]}
    cost = dict(parameters=1_234_567, multiply_adds=9.04e6, images_per_s=3210.4)
    text = paper.tables(found, dict.fromkeys(paper.VARIANTS, cost), "a machine")
    assert "| none | 51.00 ± 0.58 | -40.17 (resolved, p =" in text and "| 1.23 | 9.0 | 3210 |" in text
    assert "| detection, box AP (%) | 91.17 ± 0.73 | 91.17 ± 0.73 | +0.00 (not resolved" in text
    paper.draw(found, dict.fromkeys(paper.VARIANTS, cost), tmp_path / "paper.png")
    assert (tmp_path / "paper.png").stat().st_size > 10_000


def test_variants_differ_in_the_model_alone() -> None:
    configs = {path.stem: paper.load_config(path) for path in (ROOT / "classification/configs/paper").iterdir()}
    assert configs.keys() == paper.VARIANTS.keys()
    lit = configs[paper.LIT]
    for config in configs.values():
        assert config.model_copy(update={"MODEL": lit.MODEL, "BASE": lit.BASE}) == lit
        extra = config.MODEL.LIT.model_dump().items() - lit.MODEL.LIT.model_dump().items()
        assert config.MODEL.model_copy(update={"LIT": lit.MODEL.LIT}) == lit.MODEL and len(extra) == (config != lit)


def test_models_cost_what_attention_costs() -> None:
    costs = {name: paper.multiply_adds(lambda name=name: paper._build(name), (64, 64)) for name in paper.VARIANTS}
    stages = [f"lit-{code}" for code in ("0000", "0001", "0011", "0111", "1111")]
    assert [costs[name] for name in stages] == sorted(costs[name] for name in stages)
    assert costs["lit-0011-conv"] < costs["lit-0011"]
