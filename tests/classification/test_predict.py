import json
from traceback import clear_frames

import numpy as np
import pytest
import timm
import torch
from lit_classification.resume import TrainState, save_checkpoint
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import predict
from lit_backbone.released import convert_released
from lit_classification import loaders
from lit_classification.config import Config
from lit_classification.model import build_model, recognize, usual_classes
from tests.goldens.fill import fill

VARIANTS = ("lit_ti", "lit_s", "lit_m", "lit_b", "pvt_small_full_msa")
TINY = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4])
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images, of several modes and sizes, among other files."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name, mode, size in (
        ("10.png", "RGB", (80, 60)),
        ("2.JPG", "RGB", (50, 90)),
        ("9.jpeg", "L", (70, 70)),
        ("a/1.png", "RGBA", (64, 64)),
        ("a/b/0.png", "P", (300, 280)),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def trained(tmp_path):
    """Writes what the trainer writes, for a tiny LIT with three classes; returns file, weights and their average."""

    def save(classes=("cat", "dog", "owl"), **sections):
        tree = {
            "DATA": {"IMG_SIZE": [32, 64]},
            "MODEL": {"NAME": "lit_s", "NUM_CLASSES": len(classes), "LIT": TINY, "PRETRAINED": "gone.pth"},
            "TEST": {"CROP": False},
            **sections,
        }
        config = Config.model_validate(tree)
        start = Config.model_validate(tree | {"MODEL": tree["MODEL"] | {"PRETRAINED": ""}, "RUNTIME": {}})
        model, average = (randomized(build_model(start, torch.device("cpu")), seed) for seed in (1, 2))
        ema = ModelEmaV3(average, decay=0.9) if config.TRAIN.EMA else None
        optimizer = torch.optim.AdamW(model.parameters())
        state = TrainState(model, optimizer, GradScaler(enabled=False), ema, 1, list(classes))
        path = tmp_path / "latest.pth"
        save_checkpoint(path, state, config)
        return path, model, average

    return save


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """The model with weights that set it apart from any other and tell images apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.001 if ".offset." in name else 0.3  # long offsets would blow rounding up, which differs by CPU
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def probabilities(model: nn.Module, image: Image.Image) -> list[float]:
    """A forward pass by hand on an image of the right size."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return model(((pixels - MEAN) / STD).permute(2, 0, 1)[None]).softmax(-1)[0].tolist()


def squashed(path, height, width):
    with Image.open(path) as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def run_json(capsys, *argv) -> list[dict]:
    predict.main([*map(str, argv), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def complaint(*argv) -> str:
    with pytest.raises(SystemExit) as info:
        predict.main([str(arg) for arg in argv])
    clear_frames(info.value.__context__.__traceback__)  # lets go of loader processes, which are slow to end in a cycle
    message = info.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message.removeprefix("error: ")


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_own_checkpoint_classifies_with_the_weights_it_is_judged_by(ema, trained, photos, capsys):
    path, model, average = trained(TRAIN={"EMA": ema})
    expected = probabilities(average if ema else model, squashed(photos / "a/1.png", 32, 64))
    other = probabilities(model if ema else average, squashed(photos / "a/1.png", 32, 64))
    assert expected != pytest.approx(other, abs=1e-2)
    [line] = run_json(capsys, photos / "a/1.png", "--checkpoint", path)
    assert line["image"] == str(photos / "a/1.png")
    found = {entry["class"]: entry["probability"] for entry in line["predictions"]}
    assert found == pytest.approx(dict(zip(("cat", "dog", "owl"), expected)), abs=1e-5)


def test_configuration_in_a_checkpoint_decides_crop_and_interpolation(trained, photos, capsys):
    data = {"IMG_SIZE": 64, "INTERPOLATION": "bilinear"}
    path, model, _ = trained(DATA=data, TEST={"CROP": True}, RUNTIME={"COMPILE": True, "DEVICE": "cuda"})
    with Image.open(photos / "2.JPG") as image:
        resized = TF.resize(image, 73, InterpolationMode.BILINEAR)  # 64 * 256 / 224
    expected = probabilities(model, TF.center_crop(resized, 64))
    [line] = run_json(capsys, photos / "2.JPG", "--checkpoint", path)
    assert [entry["probability"] for entry in line["predictions"]] == pytest.approx(sorted(expected)[::-1], abs=1e-5)


def test_released_checkpoint_classifies_into_imagenet(goldens, photos, tmp_path, capsys):
    weights = fill(goldens["state_dicts"]["lit_ti"]["keys"])
    torch.save({"model": weights, "epoch": 299}, tmp_path / "lit_ti.pth")
    model = timm.create_model("lit_ti").eval()
    model.load_state_dict(weights, strict=False)  # fill leaves out num_batches_tracked
    with Image.open(photos / "10.png") as image:
        resized = TF.resize(image, 256, InterpolationMode.BICUBIC)
    expected = torch.tensor(probabilities(model, TF.center_crop(resized, 224)))
    [line] = run_json(capsys, photos / "10.png", "--checkpoint", tmp_path / "lit_ti.pth", "--topk", 3)
    names = timm.data.ImageNetInfo().label_descriptions()
    assert [entry["class"] for entry in line["predictions"]] == [names[i] for i in expected.topk(3).indices]
    found = [entry["probability"] for entry in line["predictions"]]
    assert found == pytest.approx(expected.topk(3).values.tolist(), rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_released_layout_is_recognized(name, goldens):
    keys = goldens["state_dicts"][name]["keys"]
    config = recognize(convert_released({k: torch.empty(s, device="meta") for k, s in keys.items()}), "x.pth")
    assert (config.MODEL.NAME, config.MODEL.NUM_CLASSES, config.DATA.IMG_SIZE) == (name, 1000, (224, 224))


@pytest.mark.parametrize("name", ["lit_m", "pvt_small_full_msa"])
def test_input_size_and_class_count_are_recognized(name):
    model = timm.create_model(name, img_size=(160, 256), num_classes=7, device="meta")
    config = recognize(model.state_dict(), "x.pth")
    assert (config.MODEL.NAME, config.MODEL.NUM_CLASSES, config.DATA.IMG_SIZE) == (name, 7, (160, 256))


def test_classes_are_imagenets_or_numbers_where_a_file_names_none():
    assert usual_classes(1000)[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert usual_classes(3) == ["0", "1", "2"]


def test_folders_of_imagenet_are_named_in_words(trained, photos, capsys):
    path, *_ = trained(classes=["n01440764", "n01443537", "robot"])
    [line] = run_json(capsys, photos / "2.JPG", "--checkpoint", path)
    found = {entry["class"] for entry in line["predictions"]}
    assert found == {"tench, Tinca tinca", "goldfish, Carassius auratus", "robot"}


@pytest.mark.parametrize("batch_size", [2, 32])  # with loader processes and without
def test_folder_comes_in_natural_order(batch_size, trained, photos, capsys, monkeypatch):
    monkeypatch.setattr(loaders, "FILES_BATCH", batch_size)
    path, model, _ = trained()
    lines = run_json(capsys, photos, "--checkpoint", path, "--topk", "1")
    order = ("2.JPG", "9.jpeg", "10.png", "a/1.png", "a/b/0.png")
    assert [line["image"] for line in lines] == [str(photos / name) for name in order]
    likeliest = [max(probabilities(model, squashed(photos / name, 32, 64))) for name in order]
    assert [line["predictions"][0]["probability"] for line in lines] == pytest.approx(likeliest, abs=1e-5)


def test_json_holds_nothing_but_images_and_their_likeliest_classes(trained, photos, capsys):
    path, *_ = trained()
    for line in run_json(capsys, photos, "--checkpoint", path, "--topk", "2"):
        assert set(line) == {"image", "predictions"}
        assert [set(entry) for entry in line["predictions"]] == [{"class", "probability"}] * 2
        first, second = (entry["probability"] for entry in line["predictions"])
        assert 1 > first > second > 0


def test_text_is_aligned(trained, photos, capsys):
    path, *_ = trained(classes=["cat", "dog"])
    [line] = run_json(capsys, photos / "9.jpeg", "--checkpoint", path)
    predict.main([str(photos / "9.jpeg"), "--checkpoint", str(path)])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == str(photos / "9.jpeg")
    expected = [(f"{100 * entry['probability']:.2f}%", entry["class"]) for entry in line["predictions"]]
    assert [tuple(row.split()) for row in rows] == expected
    assert {row.index("%") for row in rows} == {7}


def test_missing_image(trained):
    path, *_ = trained()
    assert complaint("gone.png", "--checkpoint", path) == "gone.png: no such file or folder"


def test_folder_without_images(trained, tmp_path):
    path, *_ = trained()
    folder = tmp_path / "empty"
    folder.mkdir()
    assert complaint(folder, "--checkpoint", path).startswith(f"{folder}: holds no images (.jpg")


@pytest.mark.parametrize("batch_size", [1, 32])
def test_unreadable_images_are_named_and_the_others_classified(
    batch_size, trained, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loaders, "FILES_BATCH", batch_size)
    path, *_ = trained()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((photos / "10.png").read_bytes()[:2000])
    with pytest.raises(SystemExit) as info:
        predict.main([*map(str, (photos / "10.png", damaged, photos / "9.jpeg")), "--checkpoint", str(path), "--json"])
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(photos / "10.png"), str(photos / "9.jpeg")]
    assert info.value.code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: {damaged}: no readable image (")


def test_unusable_checkpoints(photos, tmp_path):
    path = tmp_path / "weights.pth"
    photo = photos / "10.png"
    assert complaint(photo, "--checkpoint", path).startswith(f"{path}: no such file")
    path.write_bytes(b"no checkpoint")
    assert complaint(photo, "--checkpoint", path).startswith(f"{path}: damaged, unreadable or truncated")
    torch.save({"classes": ["cat"], "config": {"MODEL": {"NAME": 5}}, "model": {}}, path)
    assert complaint(photo, "--checkpoint", path).startswith(f"{path}: its configuration: MODEL.NAME: expected a valid")


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "lit_ti_det"])
def test_checkpoint_of_no_known_variant(name, goldens, photos, tmp_path):
    if name in goldens["state_dicts"]:
        weights = {key: torch.zeros(shape) for key, shape in goldens["state_dicts"][name]["keys"].items()}
    else:
        weights = timm.create_model(name).state_dict()
    torch.save(weights, tmp_path / "other.pth")
    message = complaint(photos / "10.png", "--checkpoint", tmp_path / "other.pth")
    assert message.startswith(f"{tmp_path / 'other.pth'}: weights of no known classifier; expected those of ")
    assert all(variant in message for variant in VARIANTS)


def test_topk_below_one_is_refused(photos, capsys):
    with pytest.raises(SystemExit):
        predict.main([str(photos), "--checkpoint", "x.pth", "--topk", "0"])
    assert "argument --topk: expected 1 or more, got 0" in capsys.readouterr().err
