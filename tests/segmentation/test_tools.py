"""Tools for training, resuming, testing and drawing, also with two processes, and their error messages."""

import argparse
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

from lit_backbone.mm import DataError, cli, load_file
from lit_backbone.mm.inference import load_model, process_images
from lit_backbone.visualize import sampling_chains
from tests.dense import derive, error_of, output_of, output_of_script
from tests.programs import Program, start_pair
from tests.segmentation.conftest import DEMO, SEGMENTATION, build_options

CONFIG = DEMO / "fpn_lit_digit_scenes.py"
TOOLS = SEGMENTATION / "tools"


def train(config: Path, *args: str | Path) -> str:
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


def test_resumed_run_matches_uninterrupted_run(trained: Path, fixed_config: Path, options: Any) -> None:
    scalars = next(trained.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert sum("loss" in record for record in records) == sum("mIoU" in record for record in records) == 4

    arguments = options("again", train_cfg__max_iters=4)
    work_dir = Path(arguments[1])
    work_dir.mkdir()
    shutil.copy(trained / "iter_1.pth", work_dir)
    (work_dir / "last_checkpoint").write_text(str(trained / "iter_1.pth"))  # path before the directory was copied
    train(fixed_config, *arguments, "--resume")
    resumed, expected = (load_file(str(folder / "iter_4.pth"))["state_dict"] for folder in (work_dir, trained))
    torch.testing.assert_close(resumed, expected)


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


@pytest.mark.parametrize("flags", [[], pytest.param(["--tta"], marks=pytest.mark.slow)], ids=["plain", "tta"])
def test_test_writes_masks_drawings_or_a_file(trained: Path, options: Any, flags: list[str], tmp_path: Path) -> None:
    arguments = [CONFIG, trained / "iter_4.pth", *options(), *flags]
    output = output_of(TOOLS / "test.py", *arguments, "--out", tmp_path / "out", "--show-dir", tmp_path / "drawn")
    assert float(re.findall(r"mIoU: (\S+)", output)[-1]) > 0
    maps = [np.array(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(maps) == 4 and all(classes.max() <= 10 for classes in maps)
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4
    config = derive(tmp_path / "list.py", CONFIG, "test_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU'])]")
    if not flags:
        cli.test("", [str(config), *map(str, arguments[1:]), "--out", str(tmp_path / "again")])
        assert len(list((tmp_path / "again").glob("*.png"))) == 4
    cli.test("", [*map(str, arguments), "--out", str(tmp_path / "results.pkl")])
    results = pickle.loads((tmp_path / "results.pkl").read_bytes())
    assert len(results) == 4 and results[0]["pred_sem_seg"].shape == (1, 128, 128)


def test_segment_draws_with_a_legend_and_skips_bad_images(trained: Path, scenes: Path, tmp_path: Path) -> None:
    """Skip a small and an unreadable image, and write the class indices of the others."""
    Image.new("RGB", (40, 20)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("not an image")
    images = [tmp_path / "small.png", tmp_path / "text.png", scenes / "images" / "val" / "00000.jpg"]
    command = [*images, "--config", CONFIG, "--checkpoint", trained / "iter_4.pth", "--masks"]
    printed = Program(TOOLS / "segment.py", *command, "--out-dir", tmp_path / "drawn").finish(status=1)
    assert "Traceback" not in printed and printed.count("drawn in") == 1
    assert f"error: {tmp_path}/small.png: input of 20 x 40 pixels is smaller than 32 x 32" in printed
    assert f"error: {tmp_path}/text.png: unreadable image" in printed
    width, height = Image.open(tmp_path / "drawn" / "00000.png").size
    assert height == 512 and width > 512  # enlarged, with a legend on the right
    mask = np.array(Image.open(tmp_path / "drawn" / "masks" / "00000.png"))
    result = inference_model(load_model(str(CONFIG), str(trained / "iter_4.pth"), "cpu"), str(images[2]))
    assert np.mean(mask == result.pred_sem_seg.data[0].numpy()) > 0.99


def test_masks_do_not_overwrite_input_images(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "masks" / "1.png"
    path.parent.mkdir()
    Image.new("RGB", (64, 64)).save(path)
    before = path.read_bytes()
    command = [path, "--config", CONFIG, "--checkpoint", trained / "iter_4.pth", "--out-dir", tmp_path, "--masks"]
    printed = Program(TOOLS / "segment.py", *command).finish(status=2)
    assert f"argument --masks: {path.parent} holds input images" in printed and path.read_bytes() == before


def test_output_folder_is_none_of_an_input(tmp_path: Path) -> None:
    """Choose another folder if the inputs are results of `visualize_offset.py`."""
    images = [tmp_path / "1.png", tmp_path / "1" / "grid.png"]
    images[1].parent.mkdir()
    for path in images:
        Image.new("RGB", (64, 64)).save(path)
    outputs = []
    args = argparse.Namespace(out_dir=tmp_path, device="cpu", amp="off")
    process_images(list(map(str, images)), args, lambda image, path, output: outputs.append(output.name) or "", "")
    assert outputs == ["1-2", "grid"]


def test_weights_that_are_not_finite_end_the_training(options: Any, tmp_path: Path) -> None:
    changes = dict(train_cfg__max_iters=4, train_cfg__val_interval=4, optim_wrapper__optimizer__lr=1e30)
    changes |= dict(default_hooks__checkpoint__max_keep_ckpts=1)
    message = error_of(cli.train, "", [str(CONFIG), *options(**changes)])
    assert "weights are not finite" in message and "--resume" in message
    saved = [path.name for path in (tmp_path / "run").glob("*.pth*")]
    assert saved == [Path((tmp_path / "run" / "last_checkpoint").read_text()).name]
    assert all(value.isfinite().all() for value in load_file(str(tmp_path / "run" / saved[0]))["state_dict"].values())


@pytest.mark.slow
def test_two_processes_train_and_test(fixed_config: Path, options: Any, tmp_path: Path) -> None:
    command = [TOOLS / "train.py", fixed_config, *options("two", train_cfg__max_iters=2), "--launcher", "pytorch"]
    for program in start_pair(command, command):
        program.finish()
    output = output_of_script(TOOLS / "dist_test.sh", CONFIG, tmp_path / "two" / "iter_2.pth", 2, *options("two"))
    assert re.search(r"mIoU: \d", output)


def test_visualize_offset(trained: Path, tmp_path: Path) -> None:
    """Run the tool on an image, with large offsets, and compare the drawing with the sampling points."""
    content = torch.load(trained / "iter_4.pth", weights_only=False)
    torch.manual_seed(0)
    for name, value in content["state_dict"].items():
        if ".offset." in name:
            content["state_dict"][name] = torch.randn_like(value) * (2 if name.endswith("bias") else 0.05)
    torch.save(content, tmp_path / "offsets.pth")
    pixels = np.random.default_rng(0).integers(128, size=(101, 135, 3), dtype=np.uint8)  # not divisible by 4
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    x = ((torch.from_numpy(pixels) - mean) / std).permute(2, 0, 1)
    chains = sampling_chains(load_model(str(CONFIG), str(tmp_path / "offsets.pth"), "cpu").backbone, x)
    kept = sum(len(chains.of(row, column)) for row in range(3) for column in range(4))

    command = [
        tmp_path / "image.png",
        "--config",
        CONFIG,
        "--checkpoint",
        tmp_path / "offsets.pth",
        "--out-dir",
        tmp_path,
    ]
    output = output_of(TOOLS / "visualize_offset.py", *command, "--at-most", "2")
    assert 0 < kept < 768
    counts = f"{kept} sampling points, {768 - kept} dropped outside the feature map"
    assert f"image: 3 x 4 tokens, {counts}; 4 tokens" in output
    drawn = {path.name: np.array(Image.open(path)) for path in (tmp_path / "image").iterdir()}
    assert drawn.keys() == {f"{row}-{column}.png" for row in (0, 2) for column in (1, 3)}
    for y, x in chains.of(2, 1).tolist():
        if y < 100 and x < 134:  # the padded feature map is three pixels larger
            y, x = round(5 * y), round(5 * x)
            assert (255, 0, 0) in map(tuple, drawn["2-1.png"][y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).tolist())


# ---- invalid input


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "keys are missing (model, "),
        ("model = dict(", "reading the config failed (SyntaxError: "),
        ("_base_ = 'none.py'", "none.py"),
        (f"_base_ = {str(CONFIG)!r}\nmodel = dict(backbone=dict(type=dict(a={[*range(99)]})))", "set `_delete_=True`"),
    ],
)
def test_invalid_configs(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert message in error_of(cli.train, "", [str(path)])
    assert message in error_of(cli.test, "", [str(path), "none.pth"])
    with pytest.raises((DataError, FileNotFoundError), match=re.escape(message)):
        load_model(str(path), "none.pth", "cpu")


def test_mismatched_checkpoints_are_refused(trained: Path, options: Any, tmp_path: Path) -> None:
    path = tmp_path / "changed.pth"
    content = torch.load(trained / "iter_4.pth", weights_only=False)
    content["meta"] |= dict(iter=10**9, dataset_meta=dict(classes=("background", *"1023456789")))
    torch.save(content, path)
    message = error_of(cli.test, "", [str(CONFIG), str(path), *options()])
    assert "changed.pth: " in message and "Set metainfo.classes" in message
    content["meta"]["dataset_meta"] = dict(classes=["one"])
    torch.save(content, path)
    with pytest.raises(DataError, match="model.decode_head.num_classes=11: .*changed.pth has 1 classes"):
        load_model(str(CONFIG), str(path), "cpu")
    del content["meta"]["dataset_meta"]
    torch.save(content, path)
    message = error_of(cli.train, "", [str(CONFIG), *options(), "--resume", str(path)])
    assert "changed.pth: iter 1000000000 is past the end of this run" in message
