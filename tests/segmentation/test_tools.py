"""Tools for training, resuming, testing and drawing, also with two processes, and their error messages."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmseg.apis import inference_model
from PIL import Image

from demo.digit_scenes import write_scenes
from lit_backbone.mm import DataError, cli, load_file
from lit_backbone.mm.inference import build_parser, load_model
from tests.dense import check_offset_tool, derive, error_of, output_of, output_of_script
from tests.programs import Program
from tests.segmentation.conftest import DEMO, SEGMENTATION, build_options

CONFIG = DEMO / "fpn_lit_digit_scenes.py"
TOOLS = SEGMENTATION / "tools"


def train(config: Path, *args: str) -> str:
    return output_of(TOOLS / "train.py", config, *args)


@pytest.fixture(scope="module")
def fixed_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo config without randomness, except for the image order, which depends on the seed."""
    changes = "model = dict(backbone=dict(drop_path_rate=0.0))\nrandomness = dict(seed=0)"
    return derive(tmp_path_factory.mktemp("configs") / "fixed.py", CONFIG, changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fixed_config: Path, scenes: Path) -> Path:
    """Work directory of a run of four iterations."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(fixed_config, *build_options(scenes, folder, train_cfg__max_iters=4, param_scheduler__1__begin=0))
    return folder


# ---- runs


def test_work_dir(trained: Path) -> None:
    assert {"iter_1.pth", "iter_4.pth", "last_checkpoint", "fixed.py"} <= {path.name for path in trained.iterdir()}
    scalars = next(trained.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert sum("loss" in record for record in records) == sum("mIoU" in record for record in records) == 4


def test_resumed_run_matches_uninterrupted_run(trained: Path, fixed_config: Path, options: Any) -> None:
    arguments = options("again", train_cfg__max_iters=4)
    work_dir = Path(arguments[1])
    work_dir.mkdir()
    shutil.copy(trained / "iter_1.pth", work_dir)
    (work_dir / "last_checkpoint").write_text(str(trained / "iter_1.pth"))  # path before the directory was copied
    train(fixed_config, *arguments, "--resume")
    start, resumed, expected = (
        load_file(str(path))["state_dict"]
        for path in (trained / "iter_1.pth", work_dir / "iter_4.pth", trained / "iter_4.pth")
    )
    assert resumed.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(resumed[key], expected[key], msg=key)
    assert not torch.equal(start["decode_head.conv_seg.weight"], expected["decode_head.conv_seg.weight"])


def test_resume_without_checkpoint_starts_a_run(trained: Path, fixed_config: Path, options: Any) -> None:
    output = train(fixed_config, *options(load_from=trained / "iter_1.pth"), "--resume")
    assert f"Loaded checkpoint {trained}/iter_1.pth" in output


def test_best_checkpoint_after_resume(trained: Path, options: Any, tmp_path: Path) -> None:
    """Keep the best score, and replace the best checkpoint only inside the work directory."""
    content = torch.load(trained / "iter_1.pth", weights_only=False)
    info, hub = dict(best_score=np.float64(-1), best_ckpt=str(tmp_path / "best_x.pth")), content["message_hub"]
    torch.save(content | {"message_hub": hub | {"runtime_info": info}}, tmp_path / "iter_1.pth")
    arguments = options(train_cfg__max_iters=2, default_hooks__checkpoint__save_best="mIoU")
    Path(arguments[1]).mkdir()
    for folder in (tmp_path, Path(arguments[1])):
        (folder / "best_x.pth").touch()
    output = train(CONFIG, *arguments, "--resume", tmp_path / "iter_1.pth")
    assert "dataset metainfo from the resumed checkpoint is different" not in output
    assert (tmp_path / "best_x.pth").exists()
    assert [path.name for path in Path(arguments[1]).glob("best_*")] == ["best_mIoU_iter_2.pth"]
    content["meta"]["iter"] = 10**9
    torch.save(content, tmp_path / "far.pth")
    message = error_of(cli.train, "", [str(CONFIG), *arguments, "--resume", str(tmp_path / "far.pth")])
    assert "far.pth: iter 1000000000 is past the end of this run. Raise max_iters=2." in message


@pytest.mark.parametrize("flags", [[], pytest.param(["--tta"], marks=pytest.mark.slow)], ids=["plain", "tta"])
def test_test(trained: Path, options: Any, flags: list[str], tmp_path: Path) -> None:
    arguments = [trained / "iter_4.pth", *options(), "--out", tmp_path / "out", "--show-dir", tmp_path / "drawn"]
    output = output_of(TOOLS / "test.py", CONFIG, *arguments, *flags)
    assert float(re.findall(r"mIoU: (\S+)", output)[-1]) > 0
    maps = [np.array(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(maps) == 4 and all(classes.max() <= 10 for classes in maps)
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4


def test_whole_and_sliding_inference(trained: Path) -> None:
    model = load_model(str(CONFIG), str(trained / "iter_4.pth"), "cpu")
    image = np.random.default_rng(0).integers(256, size=(101, 135, 3), dtype=np.uint8)  # not divisible by 4
    expected = inference_model(model, image)
    assert expected.pred_sem_seg.data.shape == (1, 101, 135) and expected.seg_logits.data.shape == (11, 101, 135)
    model.test_cfg.update(mode="slide", crop_size=(101, 135), stride=(64, 64))
    torch.testing.assert_close(inference_model(model, image).seg_logits.data, expected.seg_logits.data)
    model.test_cfg.update(crop_size=(64, 64), stride=(48, 48))
    sliding = inference_model(model, image).seg_logits.data
    assert sliding.shape == expected.seg_logits.data.shape and not torch.equal(sliding, expected.seg_logits.data)


@pytest.mark.slow
def test_two_processes_train_and_test(fixed_config: Path, options: Any, tmp_path: Path) -> None:
    output = output_of_script(TOOLS / "dist_train.sh", fixed_config, 2, *options("two", train_cfg__max_iters=2))
    assert re.search("GPU number: 2|Distributed training: True", output)
    checkpoint = tmp_path / "two" / "iter_2.pth"
    assert load_file(str(checkpoint))["meta"]["iter"] == 2
    output = output_of_script(TOOLS / "dist_test.sh", CONFIG, checkpoint, 2, *options("two"))
    assert re.search(r"mIoU: \d", output)


def test_segment_draws(trained: Path, scenes: Path, tmp_path: Path) -> None:
    command = [scenes / "images" / "val", "--config", CONFIG, "--checkpoint", trained / "iter_4.pth"]
    output = output_of(TOOLS / "segment.py", *command, "--out-dir", tmp_path / "drawn")
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert len(drawn) == 4 and output.count("drawn in") == 4
    for path in drawn:
        width, height = Image.open(path).size
        assert height == 512 and width > 512  # enlarged, with a legend on the right


def test_visualize_offset(trained: Path, tmp_path: Path) -> None:
    check_offset_tool(TOOLS / "visualize_offset.py", CONFIG, trained / "iter_4.pth", tmp_path)


# ---- invalid input


def train_error(options: Any, **changes: Any) -> str:
    return error_of(cli.train, "", [str(CONFIG), *options(**changes)])


def test_missing_images(options: Any) -> None:
    message = train_error(options, train_dataloader__dataset__data_prefix__img_path="images/none")
    assert "images/none" in message and "No such file" in message


def test_missing_masks(options: Any, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes" / "semantic" / "train" / "00001.png").unlink()
    message = train_error(options, train_dataloader__dataset__data_root=f"{tmp_path}/scenes/")
    assert "semantic/train/00001.png: no such file" in message and "Files missing in" in message


def test_wrong_number_of_classes(options: Any) -> None:
    assert "model.decode_head.num_classes=150: the data has 11 classes" in train_error(
        options, model__decode_head__num_classes=150
    )


def test_bad_images_are_skipped(trained: Path, scenes: Path, tmp_path: Path) -> None:
    """Skip a small and an unreadable image, and write the class indices of the others."""
    Image.new("RGB", (40, 20)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("not an image")
    images = [tmp_path / "small.png", tmp_path / "text.png", scenes / "images" / "val" / "00000.jpg"]
    command = [*images, "--config", CONFIG, "--checkpoint", trained / "iter_4.pth", "--masks"]
    printed = Program(TOOLS / "segment.py", *command, "--out-dir", tmp_path / "drawn").finish(status=1)
    assert "Traceback" not in printed and "00000.png" in printed
    assert f"error: {tmp_path}/small.png: input of 20 x 40 pixels is smaller than 32 x 32" in printed
    assert f"error: {tmp_path}/text.png: unreadable image" in printed
    mask = np.array(Image.open(tmp_path / "drawn" / "masks" / "00000.png"))
    result = inference_model(load_model(str(CONFIG), str(trained / "iter_4.pth"), "cpu"), str(images[2]))
    assert np.mean(mask == result.pred_sem_seg.data[0].numpy()) > 0.99


def test_predictions_in_a_file(trained: Path, options: Any, tmp_path: Path) -> None:
    arguments = [trained / "iter_4.pth", *options(), "--out", tmp_path / "results.pkl"]
    output_of(TOOLS / "test.py", CONFIG, *arguments)
    results = pickle.loads((tmp_path / "results.pkl").read_bytes())
    assert len(results) == 4 and results[0]["pred_sem_seg"].shape == (1, 128, 128)


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_unavailable_device(device: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        build_parser("").parse_args(["a.jpg", "--config", "c.py", "--checkpoint", "c.pth", "--device", device])
    assert (
        f"argument --device: {device}: device is not available. Use cpu or cuda."
        in capsys.readouterr().err.splitlines()[-1]
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "keys are missing (model, "),
        ("model = 3", "keys are missing (model, "),
        ("model = dict(", "reading the config failed (SyntaxError: "),
        ("1 / 0", "reading the config failed (ZeroDivisionError: division by zero)"),
        ("_base_ = 'none.py'", "none.py"),
    ],
)
def test_invalid_configs(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert message in error_of(cli.train, "", [str(path)])
    assert message in error_of(cli.test, "", [str(path), "none.pth"])
    with pytest.raises((DataError, FileNotFoundError), match=re.escape(message)):
        load_model(str(path), "none.pth", "cpu")


def test_mismatched_checkpoints(trained: Path, options: Any, tmp_path: Path) -> None:
    def test_error(checkpoint: Path, config: Path = CONFIG, **changes: Any) -> str:
        return error_of(cli.test, "", [str(config), str(checkpoint), *options(**changes)])

    last = trained / "iter_4.pth"
    names = dict(dataset=dict(metainfo=dict(classes=("background", *"1023456789"))))
    swapped = derive(tmp_path / "swapped.py", CONFIG, f"test_dataloader = {names}")
    assert "Set metainfo.classes to those of the checkpoint" in test_error(last, swapped)
    message = test_error(last, model__backbone__arch="lit_s", model__neck__in_channels="[96,192,384,768]")
    assert "iter_4.pth: " in message and "EncoderDecoder with lit_s" in message
    assert "none.pth: no such file" in test_error(tmp_path / "none.pth")
    content = load_file(str(last))
    content["meta"]["dataset_meta"] = dict(classes=["one"])
    torch.save(content, tmp_path / "one.pth")
    with pytest.raises(DataError, match="model.decode_head.num_classes=11: .*one.pth has 1 classes"):
        load_model(str(CONFIG), str(tmp_path / "one.pth"), "cpu")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_demo_learns(tmp_path: Path) -> None:
    """Check the mIoU on the validation scenes after half of the demo's iterations."""
    write_scenes(tmp_path / "scenes")
    changes = dict(train_cfg__max_iters=1000, train_cfg__val_interval=1000)
    changes |= dict(default_hooks__checkpoint__interval=1000, default_hooks__logger__interval=50)
    changes |= dict(train_dataloader__batch_size=8, randomness__seed=0)
    output = train(CONFIG, *build_options(tmp_path / "scenes", tmp_path / "run", **changes))
    assert float(re.findall(r"mIoU: (\S+)", output)[-1]) > 50  # typically 68; 0.6 after one iteration
