"""Classification of images with checkpoints of the trainer and released ones."""

import json
import subprocess
import sys
from pathlib import Path
from traceback import clear_frames

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import predict
from lit_backbone import datasets
from lit_classification.checkpointing import TrainState, save_checkpoint
from lit_classification.config import Config
from lit_classification.distributed import Ranks
from lit_classification.model import build_model, default_classes, find_config
from tests.classification.conftest import TINY_LIT
from tests.goldens.fill import fill

VARIANTS = ("lit_ti", "lit_s", "lit_m", "lit_b", "pvt_small_full_msa")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write five images of several modes and sizes, and a text file."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name, mode, size in (
        ("10.png", "RGB", (80, 60)),
        ("2.JPG", "RGB", (50, 90)),
        ("9.jpeg", "L", (70, 70)),
        ("a/1.png", "RGBA", (64, 64)),
        ("a/b/0.png", "P", (300, 280)),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def trained(tmp_path):
    """Return a function that writes a checkpoint of the trainer for a tiny LIT, and returns it with its two models."""

    def save(classes=("cat", "dog", "owl"), **sections):
        model = {"NUM_CLASSES": len(classes), "LIT": TINY_LIT, "PRETRAINED": "gone.pth"}
        tree = {"DATA": {"IMG_SIZE": [32, 64]}, "MODEL": model, "TEST": {"CROP": False}, **sections}
        config = Config.model_validate(tree)
        raw, average = (randomize(build_model(Config.model_validate(tree | {"RUNTIME": {}}), CPU), i) for i in (1, 2))
        ema = ModelEmaV3(average, decay=0.9) if config.TRAIN.EMA else None
        optimizer = torch.optim.AdamW(raw.parameters())
        state = TrainState(raw, optimizer, GradScaler(enabled=False), ema, 1, tmp_path, list(classes))
        save_checkpoint("latest.pth", state, config, Ranks(0, 1, CPU))
        return tmp_path / "latest.pth", raw, average

    return save


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Change the weights so that outputs depend on model and image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            scale = 0.001 if ".offset." in name else 0.3  # long offsets amplify rounding, which differs by CPU
            param.add_(scale * torch.randn(param.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def probabilities(model: nn.Module, image: Image.Image) -> list[float]:
    """Classify an image of the model's input size."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return model(((pixels - MEAN) / STD).permute(2, 0, 1)[None]).softmax(-1)[0].tolist()


def squash(path: Path, height: int, width: int) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def run_json(capsys, *argv) -> list[dict]:
    predict.main([*map(str, argv), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def error(*argv) -> str:
    with pytest.raises(SystemExit) as info:
        predict.main([str(arg) for arg in argv])
    clear_frames(info.value.__context__.__traceback__)  # frees workers, which end slowly in a reference cycle
    message = info.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message.removeprefix("error: ")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_checkpoint_of_the_trainer(ema, trained, photos, capsys):
    path, raw, average = trained(TRAIN={"EMA": ema})
    expected = probabilities(average if ema else raw, squash(photos / "a/1.png", 32, 64))
    [line] = run_json(capsys, photos / "a/1.png", "--checkpoint", path)
    assert line["image"] == str(photos / "a/1.png")
    actual = {entry["class"]: entry["probability"] for entry in line["predictions"]}
    assert actual == pytest.approx(dict(zip(("cat", "dog", "owl"), expected)), abs=1e-5)


def test_stored_config_sets_crop_and_interpolation(trained, photos, capsys):
    data = {"IMG_SIZE": 64, "INTERPOLATION": "bilinear"}
    path, model, _ = trained(DATA=data, TEST={"CROP": True}, RUNTIME={"COMPILE": True, "DEVICE": "cuda"})
    with Image.open(photos / "2.JPG") as image:
        resized = TF.resize(image, 73, InterpolationMode.BILINEAR)  # 64 * 256 / 224
    expected = probabilities(model, TF.center_crop(resized, 64))
    [line] = run_json(capsys, photos / "2.JPG", "--checkpoint", path)
    assert [entry["probability"] for entry in line["predictions"]] == pytest.approx(sorted(expected)[::-1], abs=1e-5)


def test_released_checkpoint_has_the_classes_of_imagenet(goldens, photos, tmp_path, capsys):
    weights = fill(goldens["state_dicts"]["lit_ti"]["keys"])
    torch.save({"model": weights, "epoch": 299}, tmp_path / "lit_ti.pth")
    model = timm.create_model("lit_ti").eval()
    model.load_state_dict(weights, strict=False)  # num_batches_tracked is missing
    with Image.open(photos / "10.png") as image:
        resized = TF.resize(image, 256, InterpolationMode.BICUBIC)
    expected = torch.tensor(probabilities(model, TF.center_crop(resized, 224)))
    [line] = run_json(capsys, photos / "10.png", "--checkpoint", tmp_path / "lit_ti.pth", "--topk", 3)
    names = timm.data.ImageNetInfo().label_descriptions()
    assert [entry["class"] for entry in line["predictions"]] == [names[i] for i in expected.topk(3).indices]
    actual = [entry["probability"] for entry in line["predictions"]]
    assert actual == pytest.approx(expected.topk(3).values.tolist(), rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_released_layouts_are_recognized(name, goldens):
    keys = goldens["state_dicts"][name]["keys"]
    config = find_config({"model": {key: torch.empty(shape) for key, shape in keys.items()}}, "x.pth")
    assert (config.MODEL.NAME, config.MODEL.NUM_CLASSES, config.DATA.IMG_SIZE) == (name, 1000, (224, 224))


@pytest.mark.parametrize("name", ["lit_m", "pvt_small_full_msa"])
def test_input_size_and_number_of_classes_are_recognized(name):
    model = timm.create_model(name, img_size=(160, 256), num_classes=7, device="meta")
    config = find_config({key: torch.empty(value.shape) for key, value in model.state_dict().items()}, "x.pth")
    assert (config.MODEL.NAME, config.MODEL.NUM_CLASSES, config.DATA.IMG_SIZE) == (name, 7, (160, 256))


def test_class_names_default_to_those_of_imagenet_or_numbers():
    assert default_classes(1000)[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert default_classes(3) == ["0", "1", "2"]


def test_folder_names_of_imagenet_become_descriptions(trained, photos, capsys):
    path, *_ = trained(classes=["n01440764", "n01443537", "robot"])
    [line] = run_json(capsys, photos / "2.JPG", "--checkpoint", path)
    names = {entry["class"] for entry in line["predictions"]}
    assert names == {"tench, Tinca tinca", "goldfish, Carassius auratus", "robot"}


@pytest.mark.parametrize("batch_size", [2, 32])  # with and without workers
def test_folder_is_read_in_natural_order(batch_size, trained, photos, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "PREDICT_BATCH", batch_size)
    path, model, _ = trained()
    lines = run_json(capsys, photos, "--checkpoint", path, "--topk", "2")
    order = ("2.JPG", "9.jpeg", "10.png", "a/1.png", "a/b/0.png")
    assert [line["image"] for line in lines] == [str(photos / name) for name in order]
    for line, name in zip(lines, order):
        expected = sorted(probabilities(model, squash(photos / name, 32, 64)))[:-3:-1]
        assert [entry["probability"] for entry in line["predictions"]] == pytest.approx(expected, abs=1e-5)
        assert set(line) == {"image", "predictions"} and set(line["predictions"][0]) == {"class", "probability"}


def test_text_is_aligned(trained, photos, capsys):
    path, *_ = trained(classes=["cat", "dog"])
    [line] = run_json(capsys, photos / "9.jpeg", "--checkpoint", path)
    predict.main([str(photos / "9.jpeg"), "--checkpoint", str(path)])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == str(photos / "9.jpeg")
    expected = [(f"{100 * entry['probability']:.2f}%", entry["class"]) for entry in line["predictions"]]
    assert [tuple(row.split()) for row in rows] == expected
    assert {row.index("%") for row in rows} == {7}


def test_missing_images(trained, tmp_path):
    path, *_ = trained()
    assert error("gone.png", "--checkpoint", path) == "gone.png: no such file or directory."
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty", "--checkpoint", path).startswith(
        f"{tmp_path}/empty: no images. Supported file names end in .jpg"
    )


@pytest.mark.parametrize("batch_size", [1, 32])
def test_unreadable_images_are_reported_and_skipped(batch_size, trained, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "PREDICT_BATCH", batch_size)
    path, *_ = trained()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((photos / "10.png").read_bytes()[:2000])
    with pytest.raises(SystemExit) as info:
        predict.main([*map(str, (photos / "10.png", damaged, photos / "9.jpeg")), "--checkpoint", str(path), "--json"])
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(photos / "10.png"), str(photos / "9.jpeg")]
    assert info.value.code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: {damaged}: unreadable image (")


def test_unusable_checkpoints(photos, tmp_path):
    path = tmp_path / "weights.pth"
    command = (photos / "10.png", "--checkpoint", path)
    assert error(*command).startswith(f"{path}: no such file")
    path.write_bytes(b"no checkpoint")
    assert error(*command).startswith(f"{path}: corrupt, truncated or unreadable")
    torch.save({"classes": ["cat"], "config": {"DATA": {"IMG_SIZE": "5"}}, "model": {}}, path)
    assert error(*command).startswith(f"{path}: config: DATA.IMG_SIZE: expected a valid tuple, got '5'")


def test_number_of_class_names_must_be_that_of_the_head(trained, photos):
    path, *_ = trained()
    torch.save(torch.load(path) | {"classes": ["cat", "dog"]}, path)
    assert error(photos / "10.png", "--checkpoint", path) == f"{path}: has 2 classes for 3 outputs."


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "lit_ti_det"])
def test_checkpoint_of_another_model_is_refused(name, goldens, photos, tmp_path):
    if name in goldens["state_dicts"]:
        weights = {key: torch.zeros(shape) for key, shape in goldens["state_dicts"][name]["keys"].items()}
    else:
        weights = timm.create_model(name).state_dict()
    path = tmp_path / "other.pth"
    torch.save(weights, path)
    message = error(photos / "10.png", "--checkpoint", path)
    assert message.startswith(
        f"{path}: holds weights of no known LIT (lit_b, lit_m, lit_s, lit_ti, pvt_small_full_msa)"
    )


def test_topk_below_one_is_refused(photos, capsys):
    with pytest.raises(SystemExit):
        predict.main([str(photos), "--checkpoint", "x.pth", "--topk", "0"])
    assert "argument --topk: expected 1 or more, got 0" in capsys.readouterr().err


IMPORTS = """
import sys
sys.modules.update(dict.fromkeys(["fcntl", "resource", "termios"]))  # None: as on a system that lacks them
import predict, visualize_attention, visualize_offset
print(*sys.modules)
"""


def test_inference_needs_no_training_code_and_no_posix():
    folder = Path(predict.__file__).parent
    modules = subprocess.check_output([sys.executable, "-c", IMPORTS], cwd=folder, text=True).split()
    names = {name.rpartition(".")[2] for name in modules if name.startswith("lit_classification.")}
    assert "model" in names and not names & {"engine", "optim", "checkpointing", "logs"}
    assert "main" not in modules
