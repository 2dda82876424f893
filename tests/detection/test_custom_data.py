"""One's own categories, by the config to copy and the README's words; and what a mistake in the data is told."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from lit_backbone.mm import DataError, commands, load_file, runner
from lit_backbone.mm.data import check_classes, check_dataset
from tests.dense import TINY, draw_shapes, error_of
from tests.detection.conftest import DETECTION
from tests.programs import Program

OWN, TOOLS = DETECTION / "configs" / "own" / "retinanet_lit_s_own.py", DETECTION / "tools"
SMALL = [*TINY, "model.bbox_head.in_channels=16", "model.bbox_head.feat_channels=16", "model.bbox_head.stacked_convs=1"]
SHORT = ["train_cfg.max_epochs=1"]
for _split, _resize in (("train", 2), ("val", 1), ("test", 1)):
    SHORT += [f"{_split}_dataloader.num_workers=0", f"{_split}_dataloader.persistent_workers=False"]
    SHORT += [f"{_split}_dataloader.dataset.pipeline.{_resize}.scale=(96,72)"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten pictures of two categories in `data/own`, as the README wants them."""
    home = tmp_path_factory.mktemp("home")
    write_pictures(home / "data" / "own")
    return home


def write_pictures(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for name, seeds in (("train", range(6)), ("val", range(6, 10))):
        coco = dict(images=[], annotations=[], categories=[dict(id=3, name="disc"), dict(id=7, name="square")])
        for seed in seeds:
            picture, _, boxes = draw_shapes(seed)
            picture.save(root / "images" / f"{seed}.png")
            coco["images"].append(dict(id=seed, file_name=f"{seed}.png", width=96, height=72))
            for category, box in zip((3, 7), boxes):
                labels = dict(image_id=seed, category_id=category, bbox=box, area=900, iscrowd=0)
                coco["annotations"].append(labels | dict(id=10 * seed + category))
        (root / f"{name}.json").write_text(json.dumps(coco))


@pytest.fixture(scope="module")
def trained(home: Path) -> tuple[Path, str]:
    """The folder of a run by the config, and what it printed, from a process that had imported nothing before."""
    command = [sys.executable, TOOLS / "train.py", OWN, "--cfg-options", *SMALL, *SHORT]
    run = subprocess.run(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert run.returncode == 0, run.stdout
    return home / "work_dirs" / OWN.stem, run.stdout


def test_own_categories_train_and_validate(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    meta = load_file(str(folder / "epoch_1.pth"))["meta"]
    assert meta["iter"] == 3 and meta["dataset_meta"]["classes"] == ("disc", "square")
    cfg = Config.fromfile(OWN)
    assert cfg.load_from.endswith("/retina_lit_s.pth")
    assert cfg.optim_wrapper.optimizer.lr == 1e-4 * cfg.train_dataloader.batch_size / 16
    assert len(OWN.read_text().splitlines()) <= 40


def test_the_screen_shows_a_header_and_the_file_the_rest(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    before, _, after = printed.partition("Epoch(train)")
    assert len(before.splitlines()) <= 8, before
    assert "retinanet_lit_s_own.py: on 1 x CPU, in " in before and after
    for alarm in ("OneDL", "faster_coco_eval", "paramwise_options", "Hooks will be", "System environment"):
        assert alarm not in printed
    log = next(folder.glob("*/*.log")).read_text()
    for part in ("System environment", "max_epochs", "Hooks will be executed", "paramwise_options"):
        assert part in log
    assert str(next(folder.glob("*/*.log")).relative_to(folder)) in before


def test_a_model_is_applied_as_it_was_trained(trained: tuple[Path, str], home: Path) -> None:
    """With the options of its training, or by the config beside its checkpoint."""
    folder, _ = trained
    options = [["--config", OWN, "--cfg-options", *SMALL, *SHORT], ["--config", folder / OWN.name]]
    drawn = []
    for i, config in enumerate(options):
        flags = ["--checkpoint", folder / "epoch_1.pth", *config]
        out, images = home / f"drawn{i}", home / "data" / "own" / "images" / "9.png"
        Program(TOOLS / "detect.py", images, "--score-thr", "0", "--out-dir", out, *flags).finish()
        Program(TOOLS / "visualize_offset.py", images, "--grid", "--out-dir", out, *flags).finish()
        drawn.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")})
    assert len(drawn[0]) == 2 and drawn[0] == drawn[1]


def test_augmented_tests_scale_with_the_tests_own_size(trained: tuple[Path, str], home: Path) -> None:
    folder, _ = trained
    command = [folder / OWN.name, folder / "epoch_1.pth", "--tta", "--work-dir", "tta"]
    Program(TOOLS / "test.py", *command, prepare=partial(os.chdir, home)).finish()
    assert not (home / "tta" / OWN.name).exists()  # a config that the next test or tool might take for the training's
    cfg = Config.fromfile(next(home.glob("tta/*/vis_data/config.py")))
    scales = [step.scale for step in cfg.test_dataloader.dataset.pipeline[1].transforms[0]]
    assert scales == [(96, 72), (48, 36), (144, 108)]


def test_pictures_have_one_box_for_each_thing() -> None:
    one_per_thing = runpy.run_path(str(TOOLS / "detect.py"))["one_per_thing"]
    boxes = torch.tensor([[0, 0, 30, 30], [50, 0, 80, 30], [1, 0, 31, 30], [20, 0, 50, 30]]).float()
    found = InstanceData(bboxes=boxes, scores=torch.tensor([0.4, 0.5, 0.9, 0.3]), labels=torch.tensor([5, 6, 6, 5]))
    kept = one_per_thing(found, 0.5)
    assert kept.labels.tolist() == [5, 6, 6] and kept.bboxes.tolist() == boxes[[3, 1, 2]].tolist()
    assert len(one_per_thing(found[:0], 0.5)) == 0


# ---- mistakes


@pytest.mark.parametrize(
    "classes, message",
    [
        ("(disc,sqare)", "has no category sqare; name its own in metainfo.classes: disc, square"),
        ("(square,disc)", "another order; in metainfo.classes, write ['disc', 'square']"),  # names would be swapped
    ],
)
def test_categories_that_are_not_the_files(
    classes: str, message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    options = [*SMALL, *SHORT, f"train_dataloader.dataset.metainfo.classes={classes}"]
    found = error_of(commands.train, "", [str(OWN), "--work-dir", str(tmp_path), "--cfg-options", *options])
    assert "train.json: has " in found and message in found


@pytest.mark.parametrize(
    "classes, message",
    [
        ("disc", r"""metainfo.classes='disc': is a string; a single class needs a comma: \("disc",\)"""),
        (("disk", "sqare"), "train.json: has no category disk, sqare; name its own in"),
    ],
)
def test_classes_without_an_image(
    classes: str | tuple[str, ...], message: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    cfg = commands.read_config(str(OWN), **{"train_dataloader.dataset.metainfo.classes": classes})
    init_default_scope(cfg.default_scope)
    with pytest.raises(DataError, match=message):
        runner.StrictRunner.build_dataloader(cfg.train_dataloader)


def change(file: Path, name: str, entries: list[dict] | dict) -> None:
    """Replaces a list in a file of annotations, or some values in all of its entries."""
    content = json.loads(file.read_text())
    content[name] = entries if isinstance(entries, list) else [entry | entries for entry in content[name]]
    file.write_text(json.dumps(content))


COCO = [dict(id=i, name=name) for i, name in enumerate(sorted(CocoDataset.METAINFO["classes"]))]
MISTAKES = {  # made in one of the files, by what is said of it
    "train.json: has several categories named disc; give": ("train", "categories", [dict(id=3, name="disc")] * 2),
    "the classes .*square.*disc.*, another .*disc.*square": (
        "val",
        "categories",
        [dict(id=3, name="square"), dict(id=7, name="disc")],
    ),
    "png: has height and width .72, 96., its annotations say .96, 72.": ("train", "images", dict(width=72, height=96)),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_annotations_of_something_else(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "data" / "own")
    split, *mistake = MISTAKES[said]
    change(tmp_path / "data" / "own" / f"{split}.json", *mistake)
    options = [*SMALL, *SHORT]
    if split == "val":  # as the first message's remedy says
        options += ["val_dataloader.dataset.metainfo.classes=(square,disc)"]
    assert re.search(said, error_of(commands.train, "", [str(OWN), "--cfg-options", *options]))


def test_a_test_that_compares_with_other_annotations(
    trained: tuple[Path, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    file = str(trained[0] / "epoch_1.pth")
    options = [*SMALL, *SHORT, "test_evaluator.ann_file=data/own/train.json"]
    found = error_of(commands.test, "", [str(OWN), file, "--cfg-options", *options])
    assert "images/6.png: the evaluator's ann_file has None in its place; name that of the data set there" in found


@pytest.mark.parametrize("categories", [COCO, COCO[:2]], ids=["alphabetical", "two"])
def test_coco_numbered_otherwise(categories: list[dict], tmp_path: Path) -> None:
    write_pictures(tmp_path)
    change(tmp_path / "val.json", "categories", categories)
    annotations = [dict(id=1, image_id=6, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)]
    change(tmp_path / "val.json", "annotations", annotations)
    dataset = CocoDataset(ann_file=str(tmp_path / "val.json"), data_prefix=dict(img=str(tmp_path / "images")))
    with pytest.raises(DataError, match="val.json: has "):
        check_dataset(dataset)


def test_another_number_of_colours() -> None:
    with pytest.raises(DataError, match="has 1 colours for 2 classes"):
        check_classes(dict(metainfo=dict(classes=("disc", "square"), palette=[(0, 0, 0)])))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data" / "own")
    (tmp_path / "data" / "own" / "images" / "4.png").write_text("no picture")
    command = [TOOLS / "train.py", OWN, "--cfg-options", *SMALL, *SHORT, "train_dataloader.num_workers=1"]
    printed = Program(*command, prepare=partial(os.chdir, tmp_path)).finish(status=1)
    assert re.match(r"error: data/own/images/4.png: it, or its annotations, cannot be read", printed.splitlines()[-1])
