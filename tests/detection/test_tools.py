"""Tools for training, resuming, testing and drawing, also with two processes, and their error messages."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from demo.digit_scenes import write_scenes
from lit_backbone.images import find_images
from lit_backbone.mm import DataError, cli, labels, load_file
from tests.dense import check_offset_tool, derive, error_of, output_of, output_of_script
from tests.detection.conftest import DEMO, DETECTION, build_options, classes_of_all_splits
from tests.programs import Program, start_pair

CONFIG = DEMO / "retinanet_lit_digit_scenes.py"
TOOLS = DETECTION / "tools"


def train(config: Path, *args: str) -> str:
    return output_of(TOOLS / "train.py", config, *args)


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(str(path))["state_dict"]


@pytest.fixture(scope="module")
def fixed_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo config without randomness, except for the image order, which depends on seed and epoch."""
    changes = "model = dict(backbone=dict(drop_path_rate=0.0), test_cfg=dict(score_thr=0.0))\nrandomness = dict(seed=0)"
    return derive(tmp_path_factory.mktemp("configs") / "fixed.py", CONFIG, changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fixed_config: Path, scenes: Path) -> Path:
    """Work directory of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    train(fixed_config, *build_options(scenes, folder / "run", train_cfg__max_epochs=2))
    return folder / "run"


# ---- runs


def test_work_dir(trained: Path) -> None:
    assert {"epoch_1.pth", "epoch_2.pth", "last_checkpoint", "fixed.py"} <= {path.name for path in trained.iterdir()}
    scalars = next(trained.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert sum("coco/bbox_mAP_50" in record for record in records) == 2  # one validation per epoch
    assert next(trained.glob("*/*.log")).stat().st_size > 0


def test_resumed_run_matches_uninterrupted_run(trained: Path, fixed_config: Path, options: Any) -> None:
    arguments = options("again", train_cfg__max_epochs=2)
    work_dir = Path(arguments[1])
    work_dir.mkdir()
    shutil.copy(trained / "epoch_1.pth", work_dir)
    train(fixed_config, *arguments, "--resume", str(work_dir / "epoch_1.pth"))
    resumed, expected = weights(work_dir / "epoch_2.pth"), weights(trained / "epoch_2.pth")
    start = weights(trained / "epoch_1.pth")
    assert resumed.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(resumed[key], expected[key], msg=key)
    assert not torch.equal(start["bbox_head.retina_cls.weight"], expected["bbox_head.retina_cls.weight"])
    # the saved config has resume=True and can still be used for a test
    assert "coco/bbox_mAP_50" in cli.test("", [str(work_dir / "fixed.py"), str(work_dir / "epoch_2.pth")])


def test_config_in_checkpoint_is_not_executed(trained: Path, options: Any, tmp_path: Path) -> None:
    content = torch.load(trained / "epoch_1.pth", weights_only=False)
    text = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})"
    content["meta"] |= dict(config=text, cfg=text)  # mmengine would execute these
    content["message_hub"]["runtime_info"]["cfg"] = text
    torch.save(content, tmp_path / "malicious.pth")
    config = derive(tmp_path / "no_test.py", CONFIG, "test_dataloader = test_evaluator = test_cfg = None")
    arguments = [option for option in options(train_cfg__max_epochs=2) if not option.startswith("test_")]
    train(config, *arguments, "--resume", tmp_path / "malicious.pth")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("flags", [[], pytest.param(["--tta"], marks=pytest.mark.slow)], ids=["plain", "tta"])
def test_test(trained: Path, fixed_config: Path, options: Any, flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "predictions.pkl"
    arguments = [trained / "epoch_2.pth", *options(test_dataloader__dataset__indices=2), "--out", out, *flags]
    output = output_of(TOOLS / "test.py", fixed_config, *arguments, "--show-dir", tmp_path / "drawn")
    assert "coco/bbox_mAP_50: " in output
    assert out.is_file() and len(list((tmp_path / "drawn").glob("*.jpg"))) == 2


@pytest.mark.slow
def test_two_processes_train_and_test(fixed_config: Path, options: Any, tmp_path: Path) -> None:
    flags = ["--amp", "--auto-scale-lr"]
    output = output_of_script(TOOLS / "dist_train.sh", fixed_config, 2, *options("two"), *flags)
    assert "No GPU is available. Training in float32" in output
    assert "Scaling the original LR by 0.5" in output  # batch size 2 x 2 instead of 8
    assert load_file(str(tmp_path / "two" / "epoch_1.pth"))["meta"]["iter"] == 2  # 6 images, 2 ranks x 2
    command = [TOOLS / "test.py", CONFIG, tmp_path / "two" / "epoch_1.pth", *options("two"), "--launcher", "pytorch"]
    for program in start_pair(command, command):
        program.finish()


def test_fine_tuning_with_other_number_of_classes(
    trained: Path, fixed_config: Path, options: Any, tmp_path: Path
) -> None:
    config = derive(tmp_path / "three.py", fixed_config, classes_of_all_splits(("0", "1", "2")))
    output = train(config, *options("fine", model__bbox_head__num_classes=3, load_from=trained / "epoch_2.pth"))
    assert "retina_cls.weight" in output.split("keep their initialization")[0]


def test_fine_tuning_with_other_class_names(trained: Path, fixed_config: Path, options: Any, tmp_path: Path) -> None:
    content = torch.load(trained / "epoch_2.pth", weights_only=False)
    content["meta"]["dataset_meta"]["classes"] = tuple("1023456789")
    torch.save(content, tmp_path / "swapped.pth")
    changes = dict(optim_wrapper__optimizer__lr=0.0, train_cfg__max_epochs=1)
    output = train(fixed_config, *options("fine", load_from=tmp_path / "swapped.pth", **changes))
    assert "Weights that depend on the classes are reinitialized" in output
    before, after = weights(trained / "epoch_2.pth"), weights(tmp_path / "fine" / "epoch_1.pth")
    changed = [key for key in before if key.startswith("bbox_head") and not torch.equal(before[key], after[key])]
    assert changed == ["bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias"]


def test_detect_draws(trained: Path, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("a", "b"):
        shutil.copytree(scenes / "images" / "val", folder / name)
    source = tmp_path / "drawn" / "00000.png"  # has the name of an output
    source.parent.mkdir()
    Image.new("RGB", (128, 128)).save(source)
    before = source.read_bytes()
    command = [source, folder, scenes / "images" / "train" / "00000.jpg", "--config", CONFIG]
    command += ["--checkpoint", trained / "epoch_2.pth", "--out-dir", tmp_path / "drawn", "--score-thr", "0.01"]
    output = output_of(TOOLS / "detect.py", *command)
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert len(drawn) == 11 and output.count("detections, drawn in") == 10 and source.read_bytes() == before
    assert all(Image.open(path).size == (512, 512) for path in drawn if path != source)


def test_visualize_offset(trained: Path, tmp_path: Path) -> None:
    check_offset_tool(TOOLS / "visualize_offset.py", CONFIG, trained / "epoch_2.pth", tmp_path)


# ---- invalid input


def train_error(options: Any, config: Path = CONFIG, **changes: Any) -> str:
    return error_of(cli.train, "", [str(config), *options(**changes)])


def test_missing_annotation_file(options: Any) -> None:
    assert "annotations/none.json" in train_error(options, train_dataloader__dataset__ann_file="annotations/none.json")


def test_missing_image(options: Any, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes" / "images" / "val" / "00002.jpg").unlink()
    message = train_error(options, val_dataloader__dataset__data_root=f"{tmp_path}/scenes/")
    assert "images/val/00002.jpg: no such file" in message and "Files missing in" in message


def test_wrong_number_of_classes(options: Any) -> None:
    assert "model.bbox_head.num_classes=80: the data has 10 classes" in train_error(
        options, model__bbox_head__num_classes=80
    )


def test_mismatched_checkpoints(trained: Path, options: Any, tmp_path: Path) -> None:
    def test_error(checkpoint: Path, config: Path = CONFIG, **changes: Any) -> str:
        return error_of(cli.test, "", [str(config), str(checkpoint), *options(**changes)])

    last = trained / "epoch_2.pth"
    swapped = derive(tmp_path / "swapped.py", CONFIG, classes_of_all_splits(tuple("1023456789")))
    assert "Set metainfo.classes to those of the checkpoint" in test_error(last, swapped)
    mmdet2 = dict(meta=dict(CLASSES=tuple("1023456789")), state_dict=weights(last))
    torch.save(mmdet2, tmp_path / "mmdet2.pth")
    assert "Set metainfo.classes to those of the checkpoint" in test_error(tmp_path / "mmdet2.pth")
    message = test_error(last, model__backbone__arch="lit_s", model__neck__in_channels="[96,192,384,768]")
    assert "epoch_2.pth: " in message and "RetinaNet with lit_s" in message
    cut = tmp_path / "cut.pth"
    cut.write_bytes(last.read_bytes()[:10_000])
    assert "cut.pth: " in test_error(cut)
    assert "none.pth: no such file" in test_error(tmp_path / "none.pth")
    assert "none.pth: no such file" in train_error(options, model__backbone__init_cfg__checkpoint=tmp_path / "none.pth")


def test_resume_from_invalid_checkpoints(trained: Path, options: Any, tmp_path: Path) -> None:
    def resume_error(name: str, content: dict[str, Any], *changes: str) -> str:
        torch.save(content, tmp_path / name)
        arguments = [*options(train_cfg__max_epochs=2), *changes, "--resume", str(tmp_path / name)]
        return error_of(cli.train, "", [str(CONFIG), *arguments])

    content = torch.load(trained / "epoch_1.pth", weights_only=False)
    weights = {"state_dict": content["state_dict"], "meta": content["meta"]}
    assert "weights.pth: the optimizer state does not fit" in resume_error("weights.pth", weights)
    for key, value in dict(message_hub=None, meta={}, param_schedulers=[3, 4]).items():
        message = resume_error("invalid.pth", content | {key: value})
        assert "invalid.pth: no valid training state" in message and "--cfg-options load_from" in message
    late = content | {"meta": content["meta"] | {"epoch": 3}}
    assert "late.pth: epoch 3 is past the end of this run. Raise max_epochs=2." in resume_error("late.pth", late)
    next(iter(content["optimizer"]["state"].values()))["exp_avg"] = torch.zeros(3)
    assert "optimizer.pth: " in resume_error("optimizer.pth", content)


def test_resume_warns_of_overridden_settings(trained: Path, options: Any) -> None:
    arguments = options(
        train_cfg__max_epochs=2, optim_wrapper__optimizer__weight_decay=0.5, param_scheduler__1__T_max=1
    )
    output = train(CONFIG, *arguments, "--resume", trained / "epoch_1.pth")
    assert "the checkpoint overrides settings of the config: T_max=6 (config: 3)" in output
    assert "weight_decay=0.05 (config: 0.5)" in output


def test_detect_names_unreadable_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in [("none.jpg", "no such file"), ("empty", "no images")]:
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            find_images([str(tmp_path / name)])


@pytest.mark.parametrize("tool", ["detect.py", "visualize_offset.py"])
def test_bad_images_are_skipped(tool: str, trained: Path, fixed_config: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    Image.new("RGB", (4000, 1)).save(tmp_path / "flat.png")
    images = [tmp_path / "text.jpg", tmp_path / "flat.png", scenes / "images" / "val" / "00000.jpg"]
    flags = ["--config", fixed_config, "--checkpoint", trained / "epoch_2.pth", "--out-dir", tmp_path / "drawn"]
    flags += ["--json", "--score-thr", "0"] if tool == "detect.py" else ["--grid"]
    printed = Program(TOOLS / tool, *images, *flags).finish(status=1)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed and len(errors) == 2
    assert all(f"error: {path}: " in error for path, error in zip(images, errors))
    assert f"{tmp_path}/drawn/00000" in printed
    if tool == "detect.py":
        content = json.loads((tmp_path / "drawn" / "00000.json").read_text())
        assert content["image"] == str(images[2]) and len(content["detections"]) > 0
        scores = [detection["score"] for detection in content["detections"]]
        assert scores == sorted(scores, reverse=True) and scores[-1] >= 0


def test_show_dir_keeps_folders(trained: Path, scenes: Path, options: Any, tmp_path: Path) -> None:
    """Draw two images with the same name. One class name is no valid formula of Matplotlib, one is in Chinese."""
    coco = json.loads((scenes / "annotations" / "val.json").read_text())
    for image, name in zip(coco["images"], ("a/1.jpg", "b/1.jpg", "b/c/1.jpg", "2.jpg")):
        path = tmp_path / "images" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "images" / "val" / image["file_name"], path)
        image["file_name"] = name
    classes = (r"$\frac{$", "猫", *"23456789")
    for category, name in zip(coco["categories"], classes):
        category["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(coco))
    content = torch.load(trained / "epoch_2.pth", weights_only=False)
    content["meta"]["dataset_meta"]["classes"] = classes
    torch.save(content, tmp_path / "named.pth")
    config = derive(tmp_path / "named.py", CONFIG, classes_of_all_splits(classes))
    changes = {"test_dataloader__dataset__data_root": f"{tmp_path}/", "test_evaluator__ann_file": tmp_path / "val.json"}
    changes |= dict(test_dataloader__dataset__ann_file="val.json", model__test_cfg__score_thr=0.0)
    changes |= dict(default_hooks__visualization__score_thr=0.0)
    output_of(TOOLS / "test.py", config, tmp_path / "named.pth", *options(**changes), "--show-dir", tmp_path / "drawn")
    drawn = {str(path.relative_to(tmp_path / "drawn")) for path in (tmp_path / "drawn").rglob("*.jpg")}
    assert drawn == {"a/1.jpg", "b/1.jpg", "b/c/1.jpg", "2.jpg"}
    command = [tmp_path / "images", "--config", config, "--checkpoint", tmp_path / "named.pth", "--score-thr", "0"]
    output_of(TOOLS / "detect.py", *command, "--out-dir", tmp_path / "detected", "--json")
    names = {
        x["class"]
        for path in (tmp_path / "detected").glob("*.json")
        for x in json.loads(path.read_text())["detections"]
    }
    assert len(list((tmp_path / "detected").glob("*.png"))) == 4 and names <= set(classes)


def test_labels_without_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels.drawable_labels(["cat", "naïve"])[0] == ["cat", "naïve"]
    monkeypatch.setattr(
        labels.fontManager, "ttflist", [x for x in labels.fontManager.ttflist if x.name == "DejaVu Sans"]
    )
    assert labels.drawable_labels(["cat", "猫"])[0] == ["cat", "class 1"]
    assert labels.matplotlib_labels(["$", "a\nb"]) == [r"\$", r"a\nb"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_learns(tmp_path: Path) -> None:
    """Check the mask AP50 of Mask R-CNN on the validation scenes after one epoch."""
    write_scenes(tmp_path / "scenes", train=2400)
    changes = dict(train_dataloader__batch_size=8, randomness__seed=0)
    arguments = build_options(tmp_path / "scenes", tmp_path / "run", **changes)
    output = train(DEMO / "mask_rcnn_lit_digit_scenes.py", *arguments)
    assert float(re.findall(r"coco/segm_mAP_50: (\S+)", output)[-1]) > 0.8


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
