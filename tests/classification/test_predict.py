"""Classification of images with checkpoints of the trainer and released ones."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import predict
from lit_backbone import datasets
from lit_classification.config import Config
from lit_classification.model import build_model, find_config
from tests.classification.conftest import CLASSES, TINY_LIT, refusal
from tests.goldens.fill import fill

VARIANTS = ("lit_ti", "lit_s", "lit_m", "lit_b", "pvt_small_full_msa")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("on_cpu")


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
    """Return a function that writes a checkpoint with a config, as the trainer does, and returns it with its model."""

    def save(**sections):
        tree = {"DATA": {"IMG_SIZE": [32, 64]}, "TEST": {"CROP": False}, **sections}
        config = Config.model_validate(tree | {"MODEL": {"NUM_CLASSES": 3, "LIT": TINY_LIT, "PRETRAINED": "gone.pth"}})
        model = randomize(build_model(Config(MODEL=config.MODEL, DATA=config.DATA), CPU))
        content = {"model": model.state_dict(), "classes": list(CLASSES), "config": config.model_dump(mode="json")}
        torch.save(content, tmp_path / "latest.pth")
        return tmp_path / "latest.pth", model

    return save


def randomize(model: nn.Module) -> nn.Module:
    """Change the weights so that outputs depend on the image."""
    generator = torch.Generator().manual_seed(0)
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


def test_stored_config_sets_crop_and_interpolation(trained, photos, capsys):
    data = {"IMG_SIZE": 64, "INTERPOLATION": "bilinear"}
    path, model = trained(DATA=data, TEST={"CROP": True}, RUNTIME={"COMPILE": True, "DEVICE": "cuda"})
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


@pytest.mark.slow  # each comparison builds all variants
@pytest.mark.parametrize("name", VARIANTS)
def test_released_layouts_are_recognized(name, goldens):
    """So are other numbers of classes and input sizes."""
    released = goldens["state_dicts"][name]["keys"]
    model = timm.create_model(name, img_size=(160, 256), num_classes=7, device="meta")
    fine_tuned = {key: value.shape for key, value in model.state_dict().items()}
    for shapes, num_classes, size in ((released, 1000, (224, 224)), (fine_tuned, 7, (160, 256))):
        config = find_config({"model": {key: torch.empty(shape) for key, shape in shapes.items()}}, "x.pth")
        assert (config.MODEL.NAME, config.MODEL.NUM_CLASSES, config.DATA.IMG_SIZE) == (name, num_classes, size)


@pytest.mark.parametrize("batch_size", [2, 32])  # with and without workers
def test_folder_is_read_in_natural_order(batch_size, trained, photos, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "PREDICT_BATCH", batch_size)
    path, model = trained()
    lines = run_json(capsys, photos, "--checkpoint", path, "--topk", "2")
    order = ("2.JPG", "9.jpeg", "10.png", "a/1.png", "a/b/0.png")
    assert [line["image"] for line in lines] == [str(photos / name) for name in order]
    for line, name in zip(lines, order):
        expected = sorted(probabilities(model, squash(photos / name, 32, 64)))[:-3:-1]
        assert [entry["probability"] for entry in line["predictions"]] == pytest.approx(expected, abs=1e-5)
        assert set(line) == {"image", "predictions"} and set(line["predictions"][0]) == {"class", "probability"}


def test_missing_images_and_bad_options(trained, tmp_path, capsys):
    path, _ = trained()
    (tmp_path / "empty").mkdir()
    for name, problem in (("gone.png", "no such file"), (tmp_path / "empty", "no images")):
        assert refusal(predict, name, "--checkpoint", path).startswith(f"{name}: {problem}")
    with pytest.raises(SystemExit):
        predict.main(["a.png", "--checkpoint", "x.pth", "--topk", "0"])
    assert "--topk: expected 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 32])
def test_unreadable_images_are_reported_and_skipped(batch_size, trained, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "PREDICT_BATCH", batch_size)
    path, _ = trained()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((photos / "10.png").read_bytes()[:2000])
    with pytest.raises(SystemExit) as info:
        predict.main([*map(str, (photos / "10.png", damaged, photos / "9.jpeg")), "--checkpoint", str(path), "--json"])
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(photos / "10.png"), str(photos / "9.jpeg")]
    assert info.value.code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: {damaged}: unreadable image")


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
