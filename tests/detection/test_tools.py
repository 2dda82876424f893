"""Tools for training, resuming, testing and drawing, also with two processes, and their error messages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from mmengine.config import Config
from PIL import Image
from torch import Tensor

from lit_backbone.mm import cli, labels, load_file
from tests.dense import derive, error_of, output_of, output_of_script
from tests.detection.conftest import DEMO, DETECTION, build_options, classes_of_all_splits
from tests.programs import Program, start_pair

CONFIG = DEMO / "retinanet_lit_digit_scenes.py"
TOOLS = DETECTION / "tools"
DIGITS, SWAPPED = tuple("0123456789"), tuple("1023456789")


def train(config: Path, *args: str | Path) -> str:
    return output_of(TOOLS / "train.py", config, *args)


def weights(path: Path, key: str = "state_dict") -> dict[str, Tensor]:
    """Return the weights of a checkpoint. EMAHook stores the average as `state_dict`, the model as `ema_state_dict`."""
    return load_file(str(path))[key]


def edited(path: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Write an edited copy of a checkpoint."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, target)
    return target


@pytest.fixture(scope="module")
def fixed_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo config without randomness, except for the image order, which depends on seed and epoch, and with EMA."""
    changes = "model = dict(backbone=dict(drop_path_rate=0.0), test_cfg=dict(score_thr=0.0))\nrandomness = dict(seed=0)"
    changes += "\ncustom_hooks = [dict(type='EMAHook', momentum=0.5)]"
    return derive(tmp_path_factory.mktemp("configs") / "fixed.py", CONFIG, changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fixed_config: Path, scenes: Path) -> Path:
    """Work directory of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    train(fixed_config, *build_options(scenes, folder / "run", train_cfg__max_epochs=2))
    return folder / "run"


# ---- runs


def test_resumed_run_matches_uninterrupted_run(trained: Path, fixed_config: Path, options: Any, tmp_path: Path) -> None:
    """Settings in the checkpoint override those of the config, with a warning. Config text in it is not executed."""
    scalars = next(trained.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert sum("coco/bbox_mAP_50" in record for record in records) == 2  # one validation per epoch

    text = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})"

    def add_text(content: dict[str, Any]) -> None:
        content["meta"] |= dict(config=text, cfg=text)  # mmengine would execute these
        content["meta"] |= dict(num_images=8, global_batch=4)
        content["param_schedulers"].append({})
        content["message_hub"]["runtime_info"]["cfg"] = text

    changes = dict(optim_wrapper__optimizer__weight_decay=0.5, param_scheduler__1__T_max=1)
    arguments = options("again", train_cfg__max_epochs=2, **changes)
    work_dir = Path(arguments[1])
    work_dir.mkdir()
    edited(trained / "epoch_1.pth", work_dir / "epoch_1.pth", add_text)
    output = train(fixed_config, *arguments, "--resume", work_dir / "epoch_1.pth")
    assert not (tmp_path / "mark").exists()
    copied = Config.fromfile(work_dir / fixed_config.name)
    assert not copied.resume and not copied.load_from
    assert "T_max=6 (config: 3)" in output and "weight_decay=0.05 (config: 0.5)" in output
    assert "global_batch=4 (config: 2), num_images=8 (config: 6)" in output and "num_schedulers=3 (config: 2)" in output
    states = {}
    for key in ("state_dict", "ema_state_dict"):
        states[key] = weights(work_dir / "epoch_2.pth", key)
        torch.testing.assert_close(states[key], weights(trained / "epoch_2.pth", key))
    key = "bbox_head.retina_cls.weight"
    others = [weights(trained / "epoch_1.pth")[key], states["ema_state_dict"][f"module.{key}"]]
    assert not any(torch.equal(states["state_dict"][key], other) for other in others)


@pytest.mark.slow
def test_two_processes_train_and_test(fixed_config: Path, options: Any, tmp_path: Path) -> None:
    arguments = [*options("two", optim_wrapper__type="AmpOptimWrapper"), "--auto-scale-lr"]
    output = output_of_script(TOOLS / "dist_train.sh", fixed_config, 2, *arguments)
    assert "No GPU is available. Training in float32" in output
    assert "Scaling the original LR by 0.5" in output  # batch size 2 x 2 instead of 8
    checkpoint = tmp_path / "two" / "epoch_1.pth"
    assert load_file(str(checkpoint))["meta"]["iter"] == 2  # 6 images, 2 ranks x 2
    command = [TOOLS / "test.py", CONFIG, checkpoint, *options("two"), "--launcher", "pytorch"]
    for program in start_pair(command, command):
        program.finish()


@pytest.mark.parametrize(
    "classes", [pytest.param(("0", "1", "2"), marks=pytest.mark.slow), SWAPPED], ids=["number", "names"]
)
def test_fine_tuning_with_other_classes_and_image_size(
    classes: tuple[str, ...], trained: Path, fixed_config: Path, scenes: Path, options: Any, tmp_path: Path
) -> None:
    """Keep the weights that do not depend on the classes, resize tables, and start the average from these."""
    config = derive(tmp_path / "other.py", fixed_config, classes_of_all_splits(classes))
    changes = dict(model__bbox_head__num_classes=len(classes), optim_wrapper__optimizer__lr=0.0)
    changes |= dict(load_from=trained / "epoch_2.pth", model__backbone__img_size=192)
    for split in ("train", "val"):
        coco = json.loads((scenes / "annotations" / f"{split}.json").read_text())
        coco["categories"].sort(key=lambda category: [*classes, *DIGITS].index(category["name"]))
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
        changes |= {f"{split}_dataloader__dataset__ann_file": tmp_path / f"{split}.json"}
    changes |= dict(val_evaluator__ann_file=tmp_path / "val.json")
    output = train(config, *options("fine", **changes))
    assert "retina_cls.weight" in output.split("keep their initialization")[0]
    before = weights(trained / "epoch_2.pth")
    average, model = (weights(tmp_path / "fine" / "epoch_1.pth", key) for key in ("state_dict", "ema_state_dict"))
    for key, value in before.items():
        if key.endswith("rel_pos_bias"):
            assert average[key].shape > value.shape
            center, expected = (x[..., x.shape[-2] // 2, x.shape[-1] // 2] for x in (average[key], value))
            torch.testing.assert_close(center, expected, atol=0.02, rtol=0.2)
        elif not any(part in key for part in ("running", "num_batches")):
            assert torch.equal(average[key], value) != key.startswith("bbox_head.retina_cls"), key
            assert torch.equal(average[key], model[f"module.{key}"]), key


@pytest.mark.parametrize("flags", [[], pytest.param(["--tta"], marks=pytest.mark.slow)], ids=["plain", "tta"])
def test_test_draws_into_the_folders_of_images(
    flags: list[str], trained: Path, scenes: Path, options: Any, tmp_path: Path
) -> None:
    """Draw two images with the same name. One class name is no valid formula of Matplotlib, one is in Chinese."""
    coco = json.loads((scenes / "annotations" / "val.json").read_text())
    names = ("a/1.jpg", "b/1.jpg", "b/c/1.jpg", "2.jpg")
    for image, name in zip(coco["images"], names):
        path = tmp_path / "images" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "images" / "val" / image["file_name"], path)
        image["file_name"] = name
    classes = (r"$\frac{$", "猫", *"23456789")
    for category, name in zip(coco["categories"], classes):
        category["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(coco))
    checkpoint = edited(
        trained / "epoch_2.pth", tmp_path / "named.pth", lambda x: x["meta"]["dataset_meta"].update(classes=classes)
    )
    config = derive(tmp_path / "named.py", CONFIG, classes_of_all_splits(classes))
    changes = {"test_dataloader__dataset__data_root": f"{tmp_path}/", "test_evaluator__ann_file": tmp_path / "val.json"}
    changes |= dict(test_dataloader__dataset__ann_file="val.json", model__test_cfg__score_thr=0.0)
    changes |= dict(default_hooks__visualization__score_thr=0.0)
    outputs = ["--show-dir", tmp_path / "drawn", "--out", tmp_path / "predictions.pkl"]
    output = output_of(TOOLS / "test.py", config, checkpoint, *options(**changes), *outputs, *flags)
    drawn = {str(path.relative_to(tmp_path / "drawn")) for path in (tmp_path / "drawn").rglob("*.jpg")}
    assert drawn == {*names} and (tmp_path / "predictions.pkl").is_file() and "coco/bbox_mAP_50: " in output


def test_labels_without_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels.drawable_labels(["cat", "naïve"])[0] == ["cat", "naïve"]
    fonts = [font for font in labels.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(labels.fontManager, "ttflist", fonts)
    assert labels.drawable_labels(["cat", "猫"])[0] == ["cat", "class 1"]
    assert labels.matplotlib_labels(["$", "a\nb"]) == [r"\$", r"a\nb"]


# ---- invalid input


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train_dataloader__dataset__data_prefix__img="images/none/"), "Files missing in "),
        (dict(train_dataloder__batch_size=1), "has no key 'train_dataloder'. Did you mean train_dataloader?"),
        (dict(model__bbox_head__num_classes=80), "model.bbox_head.num_classes=80: the data has 10 classes"),
        (
            dict(param_scheduler__1__by_epoch=False, param_scheduler__1__begin=100)
            | dict(param_scheduler__1__convert_to_iter_based=False),
            "param_scheduler.1.begin=100: is not before its end (3)",
        ),
    ],
)
def test_invalid_settings_are_found_before_the_first_step(
    changes: dict, message: str, fixed_config: Path, options: Any
) -> None:
    """The config has its own list of custom hooks."""
    assert message in error_of(cli.train, "", [str(fixed_config), *options(**changes)])


def test_mismatched_checkpoints_are_not_tested(trained: Path, options: Any, tmp_path: Path) -> None:
    def test_error(checkpoint: Path, **changes: Any) -> str:
        return error_of(cli.test, "", [str(CONFIG), str(checkpoint), *options(**changes)])

    last = trained / "epoch_2.pth"
    torch.save(dict(meta=dict(CLASSES=SWAPPED), state_dict=weights(last)), tmp_path / "swapped.pth")  # mmdetection 2
    assert "Set metainfo.classes" in test_error(tmp_path / "swapped.pth")
    message = test_error(last, model__backbone__arch="lit_s", model__neck__in_channels="[96,192,384,768]")
    assert "epoch_2.pth: " in message and "RetinaNet with lit_s" in message
    torch.save({"state_dict": {key: value * torch.nan for key, value in weights(last).items()}}, tmp_path / "nan.pth")
    assert "nan.pth: " in (message := test_error(tmp_path / "nan.pth")) and "not finite" in message


INVALID_STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "schedule": (lambda content: content.update(param_schedulers=[3, 4]), "no valid training state"),
    "position": (lambda content: content["meta"].update(within_epoch=True), "was saved within an epoch"),
    "moments": (lambda content: content["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "optimizer state"),
}


@pytest.mark.parametrize("name", INVALID_STATES)
def test_invalid_training_states_are_not_resumed(name: str, trained: Path, options: Any, tmp_path: Path) -> None:
    edit, message = INVALID_STATES[name]
    path = edited(trained / "epoch_1.pth", tmp_path / f"{name}.pth", edit)
    error = error_of(cli.train, "", [str(CONFIG), *options(train_cfg__max_epochs=2), "--resume", str(path)])
    assert f"{name}.pth: " in error and message in error


@pytest.mark.parametrize("tool", ["detect.py", "visualize_offset.py"])
def test_images_are_drawn_or_skipped_and_none_is_overwritten(
    tool: str, trained: Path, fixed_config: Path, scenes: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    Image.new("RGB", (4000, 1)).save(tmp_path / "flat.png")
    source, out = tmp_path / "drawn" / "00000.png", tmp_path / "drawn"  # the source has the name of an output
    out.mkdir()
    Image.new("RGB", (128, 128)).save(source)
    before = source.read_bytes()
    images = [tmp_path / "text.jpg", tmp_path / "flat.png", source, scenes / "images" / "val"]
    flags = ["--config", fixed_config, "--checkpoint", trained / "epoch_2.pth", "--out-dir", out]
    flags += ["--json", "--score-thr", "0"] if tool == "detect.py" else ["--grid"]
    printed = Program(TOOLS / tool, *images, *flags).finish(status=1)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed and len(errors) == 2
    assert all(f"error: {path}: " in error for path, error in zip(images, errors))
    assert source.read_bytes() == before
    if tool == "visualize_offset.py":
        assert len(list(out.glob("*/grid.png"))) == 5
        return
    assert len(list(out.glob("*.png"))) == 6
    content = json.loads((out / "00001.json").read_text())
    scores = [detection["score"] for detection in content["detections"]]
    assert content["image"] == str(images[3] / "00001.jpg") and scores and scores == sorted(scores, reverse=True)
    assert {detection["class"] for detection in content["detections"]} <= set(DIGITS)


# ---- accuracy and other backbones


@pytest.mark.slow
def test_resnet_baseline_trains(options: Any, tmp_path: Path) -> None:
    """Train and test a detector with another backbone, initialized by a reader of mmengine."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "resnet18.pth"))
    backbone = dict(_delete_=True, type="ResNet", depth=18, init_cfg=init)
    model = dict(backbone=backbone, neck=dict(in_channels=[64, 128, 256, 512]), test_cfg=dict(score_thr=0.0))
    config = derive(tmp_path / "resnet.py", CONFIG, f"model = {model}")
    train(config, *options())
    assert "coco/bbox_mAP_50" in cli.test("", [str(config), str(tmp_path / "run" / "epoch_1.pth"), *options()])
