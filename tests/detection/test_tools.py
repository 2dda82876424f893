"""The tools as they are used: training, resuming, testing, drawing, several processes, and what goes wrong."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from demo.digit_scenes import write_scenes
from lit_backbone.images import find_images
from lit_backbone.mm import DataError, commands, load_file
from tests.dense import check_offset_tool, derive, error_of, output_of, output_of_script
from tests.detection.conftest import DEMO, DETECTION, PUBLISHED, build_options, classes_of_all_splits
from tests.programs import Program, start_pair

CONFIG = DEMO / "retinanet_lit_digit_scenes.py"
TOOLS = DETECTION / "tools"


def train(config: Path, *args: str) -> str:
    return output_of(TOOLS / "train.py", config, *args)


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(str(path))["state_dict"]


@pytest.fixture(scope="module")
def still_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's config less all chance but the order of images, which follows from seed and epoch."""
    still = "model = dict(backbone=dict(drop_path_rate=0.0), test_cfg=dict(score_thr=0.0))\nrandomness = dict(seed=0)"
    return derive(tmp_path_factory.mktemp("configs") / "still.py", CONFIG, still)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, still_config: Path, scenes: Path) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    train(still_config, *build_options(scenes, folder / "run", train_cfg__max_epochs=2))
    return folder / "run"


# ---- runs


def test_a_run_leaves_what_is_promised(trained: Path) -> None:
    assert {"epoch_1.pth", "epoch_2.pth", "last_checkpoint", "still.py"} <= {path.name for path in trained.iterdir()}
    scalars = next(trained.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert sum("coco/bbox_mAP_50" in record for record in records) == 2  # one validation for each epoch
    assert next(trained.glob("*/*.log")).stat().st_size > 0


def test_a_resumed_run_ends_as_an_uninterrupted_one(trained: Path, still_config: Path, options: Any) -> None:
    arguments = options("again", train_cfg__max_epochs=2)
    work_dir = Path(arguments[1])
    work_dir.mkdir()
    shutil.copy(trained / "epoch_1.pth", work_dir)
    train(still_config, *arguments, "--resume", str(work_dir / "epoch_1.pth"))
    again, whole = weights(work_dir / "epoch_2.pth"), weights(trained / "epoch_2.pth")
    start = weights(trained / "epoch_1.pth")
    assert again.keys() == whole.keys()
    for key in whole:
        torch.testing.assert_close(again[key], whole[key], msg=key)
    assert not torch.equal(start["bbox_head.retina_cls.weight"], whole["bbox_head.retina_cls.weight"])
    # the config that the run leaves says that it resumes; its checkpoints can be tested with it nevertheless
    found = commands.test("", [str(work_dir / "still.py"), str(work_dir / "epoch_2.pth")])
    assert "coco/bbox_mAP_50" in found


def test_resuming_runs_no_config_of_the_checkpoint(trained: Path, options: Any, tmp_path: Path) -> None:
    content = torch.load(trained / "epoch_1.pth", weights_only=False)
    text = f"import os\nos.mkdir({str(tmp_path / 'mark')!r})"
    content["meta"] |= dict(config=text, cfg=text)  # mmengine would run the first to resume, the other to infer
    content["message_hub"]["runtime_info"]["cfg"] = text
    torch.save(content, tmp_path / "crafted.pth")
    # nor does it need the test set
    config = derive(tmp_path / "no_test.py", CONFIG, "test_dataloader = test_evaluator = test_cfg = None")
    arguments = [option for option in options(train_cfg__max_epochs=2) if not option.startswith("test_")]
    train(config, *arguments, "--resume", tmp_path / "crafted.pth")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("flags", [[], pytest.param(["--tta"], marks=pytest.mark.slow)], ids=["plain", "tta"])
def test_test(trained: Path, still_config: Path, options: Any, flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "predictions.pkl"
    arguments = [trained / "epoch_2.pth", *options(test_dataloader__dataset__indices=2), "--out", out, *flags]
    output = output_of(TOOLS / "test.py", still_config, *arguments, "--show-dir", tmp_path / "drawn")
    assert "coco/bbox_mAP_50: " in output
    assert out.is_file() and len(list((tmp_path / "drawn").glob("*.jpg"))) == 2


def test_masks_are_not_averaged() -> None:
    arguments = [str(PUBLISHED / "mask_rcnn_lit_ti_fpn_1x_coco.py"), "none.pth", "--tta"]
    assert "--tta: mmdetection averages boxes only" in error_of(commands.test, "", arguments)


@pytest.mark.slow
def test_two_processes_train_and_test(still_config: Path, options: Any, tmp_path: Path) -> None:
    flags = ["--amp", "--auto-scale-lr"]
    output = output_of_script(TOOLS / "dist_train.sh", still_config, 2, *options("two"), *flags)
    assert "no GPU: training in float32" in output
    assert "Scaling the original LR by 0.5" in output  # 2 x 2 images, where the recipe has 8
    assert load_file(str(tmp_path / "two" / "epoch_1.pth"))["meta"]["iter"] == 2  # 6 images, 2 processes x 2
    command = [TOOLS / "test.py", CONFIG, tmp_path / "two" / "epoch_1.pth", *options("two"), "--launcher", "pytorch"]
    for program in start_pair(command, command):
        program.finish()


def test_fine_tuning_starts_a_head_for_other_classes_anew(
    trained: Path, still_config: Path, options: Any, tmp_path: Path
) -> None:
    config = derive(tmp_path / "three.py", still_config, classes_of_all_splits(("0", "1", "2")))
    output = train(config, *options("fine", model__bbox_head__num_classes=3, load_from=trained / "epoch_2.pth"))
    assert "retina_cls.weight" in output.split("stay as initialised")[0]


def test_fine_tuning_starts_a_head_for_as_many_other_classes_anew(
    trained: Path, still_config: Path, options: Any, tmp_path: Path
) -> None:
    content = torch.load(trained / "epoch_2.pth", weights_only=False)
    content["meta"]["dataset_meta"]["classes"] = tuple("1023456789")
    torch.save(content, tmp_path / "swapped.pth")
    still = dict(optim_wrapper__optimizer__lr=0.0, train_cfg__max_epochs=1)
    output = train(still_config, *options("fine", load_from=tmp_path / "swapped.pth", **still))
    assert "its classes are not those of the data: 10 with 1, 0 against 10 with 0, 1; what depends on them" in output
    before, after = weights(trained / "epoch_2.pth"), weights(tmp_path / "fine" / "epoch_1.pth")
    changed = [key for key in before if key.startswith("bbox_head") and not torch.equal(before[key], after[key])]
    assert changed == ["bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias"]


def test_detect_draws(trained: Path, scenes: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for folder in ("a", "b"):
        shutil.copytree(scenes / "images" / "val", pictures / folder)
    own = tmp_path / "drawn" / "00000.png"  # where the first would be drawn
    own.parent.mkdir()
    Image.new("RGB", (128, 128)).save(own)
    before = own.read_bytes()
    command = [own, pictures, scenes / "images" / "train" / "00000.jpg", "--config", CONFIG]
    command += ["--checkpoint", trained / "epoch_2.pth", "--out-dir", tmp_path / "drawn", "--score-thr", "0.01"]
    output = output_of(TOOLS / "detect.py", *command)
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert len(drawn) == 11 and output.count("detections, drawn in") == 10 and own.read_bytes() == before
    assert all(Image.open(path).size == (512, 512) for path in drawn if path != own)


def test_offsets_are_drawn_at_a_pictures_own_size(trained: Path, tmp_path: Path) -> None:
    check_offset_tool(TOOLS / "visualize_offset.py", CONFIG, trained / "epoch_2.pth", tmp_path)


# ---- bad input


def train_error(options: Any, config: Path = CONFIG, **changes: Any) -> str:
    return error_of(commands.train, "", [str(config), *options(**changes)])


def test_missing_annotations(options: Any) -> None:
    assert "annotations/none.json" in train_error(options, train_dataloader__dataset__ann_file="annotations/none.json")


def test_missing_image(options: Any, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes" / "images" / "val" / "00002.jpg").unlink()
    message = train_error(options, val_dataloader__dataset__data_root=f"{tmp_path}/scenes/")
    assert "images/val/00002.jpg: no such file" in message and "names 1 files that are not there" in message


def test_a_head_for_another_number_of_classes(options: Any) -> None:
    assert "num_classes" in train_error(options, model__bbox_head__num_classes=80)


def test_checkpoints_that_are_not_the_models(trained: Path, options: Any, tmp_path: Path) -> None:
    def test_error(checkpoint: Path, config: Path = CONFIG, **changes: Any) -> str:
        return error_of(commands.test, "", [str(config), str(checkpoint), *options(**changes)])

    last = trained / "epoch_2.pth"
    other = derive(tmp_path / "other.py", CONFIG, classes_of_all_splits(tuple("1023456789")))
    message = test_error(last, other)
    assert "epoch_2.pth: its classes are not those of the data" in message
    mmdet2 = dict(meta=dict(CLASSES=tuple("1023456789")), state_dict=weights(last))
    torch.save(mmdet2, tmp_path / "mmdet2.pth")
    assert "mmdet2.pth: its classes are not those of the data" in test_error(tmp_path / "mmdet2.pth")
    message = test_error(last, model__backbone__arch="lit_s", model__neck__in_channels="[96,192,384,768]")
    assert "epoch_2.pth: not a checkpoint of RetinaNet with lit_s" in message
    cut = tmp_path / "cut.pth"
    cut.write_bytes(last.read_bytes()[:10_000])
    assert "cut.pth: damaged, unreadable or truncated" in test_error(cut)
    assert "none.pth: no such file" in test_error(tmp_path / "none.pth")
    assert "none.pth: no such file" in train_error(options, model__backbone__init_cfg__checkpoint=tmp_path / "none.pth")


def test_runs_that_cannot_be_resumed(trained: Path, options: Any, tmp_path: Path) -> None:
    def resume_error(name: str, content: dict[str, Any], *changes: str) -> str:
        torch.save(content, tmp_path / name)
        arguments = [*options(train_cfg__max_epochs=2), *changes, "--resume", str(tmp_path / name)]
        return error_of(commands.train, "", [str(CONFIG), *arguments])

    content = torch.load(trained / "epoch_1.pth", weights_only=False)
    bare = {"state_dict": content["state_dict"], "meta": content["meta"]}
    assert "bare.pth: holds weights, not a run to resume" in resume_error("bare.pth", bare)
    for key, value in dict(message_hub=None, meta={}, param_schedulers=[3, 4]).items():
        assert "odd.pth: holds no run that can be resumed" in resume_error("odd.pth", content | {key: value})
    assert "(it is none of PyTorch's)" in resume_error("odd.pth", content | {"optimizer": []})
    for option, change in {
        "param_scheduler.1.T_max=2": "param_scheduler 1 has T_max 12, this run 6",  # in iterations
        "optim_wrapper.optimizer.weight_decay=0.5": "group 0 has weight_decay 0.05, this run 0.5",
    }.items():
        message = resume_error("odd.pth", content, option)
        assert f"odd.pth: {change}" in message and "or start from its weights with --cfg-options load_from" in message
    late = content | {"meta": content["meta"] | {"epoch": 3}}
    assert "late.pth: is at epoch 3, and this run ends at 2" in resume_error("late.pth", late)
    next(iter(content["optimizer"]["state"].values()))["exp_avg"] = torch.zeros(3)
    assert "foreign.pth: its optimiser state does not fit" in resume_error("foreign.pth", content)


def test_options_of_other_versions(options: Any) -> None:
    message = train_error(options, lr_config__step=3)
    assert re.search("--cfg-options: lr_config: neither .*py nor mmengine has this key", message)


def test_variables_of_a_config_are_no_options() -> None:
    """They went into other keys when the file was read, and would change nothing there."""
    with pytest.raises(DataError, match="max_epochs: mmengine does not read this key of .*; change the key that"):
        commands.read_config(str(CONFIG), max_epochs=3)
    for key in ("train_cfg.max_epochs", "auto_scale_lr.enable", "tta_model.tta_cfg.max_per_img"):
        assert commands.read_config(str(CONFIG), **{key: 3})


def test_detect_names_what_it_cannot_read(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in [("none.jpg", "no such file"), ("empty", "no images")]:
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            find_images([str(tmp_path / name)])
    (tmp_path / "text.jpg").write_text("no picture")
    flags = ["--config", CONFIG, "--checkpoint", trained / "epoch_2.pth", "--out-dir", tmp_path / "drawn"]
    printed = Program(TOOLS / "detect.py", tmp_path / "text.jpg", *flags).finish(status=1)
    assert "Traceback" not in printed and "text.jpg: no readable image" in printed.splitlines()[-1]


# ---- what takes minutes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_learns(tmp_path: Path) -> None:
    """Mask R-CNN's mask AP50 on held-out scenes, after one epoch."""
    write_scenes(tmp_path / "scenes", train=2400)
    changes = dict(train_dataloader__batch_size=8, param_scheduler__1__T_max=1, randomness__seed=0)
    arguments = build_options(tmp_path / "scenes", tmp_path / "run", **changes)
    output = train(DEMO / "mask_rcnn_lit_digit_scenes.py", *arguments)
    assert float(re.findall(r"coco/segm_mAP_50: (\S+)", output)[-1]) > 0.8
