"""The comparison goes on where it was interrupted, and counts a difference only where chance does not explain it."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import paper

    return paper


def test_every_training_is_planned_once(paper, tmp_path: Path) -> None:
    runs = paper.plan(tmp_path)
    assert len({run.key for run in runs}) == len({run.folder for run in runs}) == len(runs) == 3 * (6 + 2 * 2)
    pretrained = next(run for run in runs if run.key == "segmentation, pretrained, seed 2")
    classifier = next(run for run in runs if run.key == "lit-0011, seed 2")
    assert f"model.backbone.init_cfg.checkpoint={classifier.folder}/latest.pth" in pretrained.command
    assert runs.index(classifier) < runs.index(pretrained)


def test_a_training_is_continued_and_read(paper, tmp_path: Path) -> None:
    """An epoch on a few images, by the real trainer; started again, it only reports."""
    paper.write_images(tmp_path / "data", train=70, val=10)
    run = paper.plan(tmp_path / "out")[0]
    options = ["DATA.DATA_PATH", str(tmp_path / "data"), "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1"]
    run = run._replace(command=[*run.command, *options, "DATA.NUM_WORKERS", "0"])
    accuracy = paper.train(run)
    log = run.folder / "log.jsonl"
    assert accuracy == [json.loads(line)["val/acc1"] for line in log.read_text().splitlines()][-1]
    before = log.read_text()
    assert paper.train(run) == accuracy and log.read_text() == before
    assert "continuing" in (run.folder / "printed.txt").read_text()


def test_a_training_that_fails_stops_all(paper, tmp_path: Path) -> None:
    run = paper.plan(tmp_path)[0]
    with pytest.raises(SystemExit, match="(?s)lit-1111, seed 0: ended with status 1; .*error: .*NONE"):
        paper.train(run._replace(command=[*run.command, "TRAIN.NONE", "1"]))


def test_differences_by_chance_are_not_resolved(paper) -> None:
    assert paper.difference([90.0, 92.0, 91.0], [90.5, 91.5, 90.0]).startswith("+0.33 (not resolved")
    assert paper.difference([80.0, 80.2, 80.1], [90.0, 90.2, 90.3]).startswith("-10.07 (resolved")
    assert paper.summary([1.0, 2.0, 3.0]) == "2.00 ± 0.58"


def test_tables_and_plot(paper, tmp_path: Path) -> None:
    found = {run.name: [90.0, 91.0, 92.5] for run in paper.plan(tmp_path)} | {"lit-0000": [50.0, 51.0, 52.0]}
    cost = dict(parameters=1_234_567, multiply_adds=9.04e6, images_per_s=3210.4)
    text = paper.tables(found, dict.fromkeys(paper.VARIANTS, cost), "a machine")
    assert "| none | 51.00 ± 0.58 | -40.17 (resolved, p =" in text and "| 1.23 | 9.0 | 3210 |" in text
    assert "| detection, box AP (%) | 91.17 ± 0.73 | 91.17 ± 0.73 | +0.00 (not resolved" in text
    paper.draw(found, dict.fromkeys(paper.VARIANTS, cost), tmp_path / "paper.png")
    assert (tmp_path / "paper.png").stat().st_size > 10_000


def test_variants_differ_in_the_model_alone(paper) -> None:
    configs = {path.stem: paper.load_config(path) for path in (ROOT / "classification/configs/paper").iterdir()}
    assert configs.keys() == paper.VARIANTS.keys()
    lit = configs[paper.LIT]
    for config in configs.values():
        assert config.model_copy(update={"MODEL": lit.MODEL, "BASE": lit.BASE}) == lit
        extra = {key: value for key, value in config.MODEL.LIT.items() if key not in lit.MODEL.LIT}
        assert config.MODEL.model_copy(update={"LIT": lit.MODEL.LIT}) == lit.MODEL and len(extra) == (config != lit)


def test_models_cost_what_attention_costs(paper) -> None:
    costs = {name: paper.multiply_adds(lambda name=name: paper._build(name), (64, 64)) for name in paper.VARIANTS}
    stages = [f"lit-{code}" for code in ("0000", "0001", "0011", "0111", "1111")]
    assert [costs[name] for name in stages] == sorted(costs[name] for name in stages)
    assert costs["lit-0011-conv"] < costs["lit-0011"]
