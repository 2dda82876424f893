"""Crafted checkpoints end in one line, at every door: nothing is written, fetched or started."""

import copy
import re
import socket
import warnings
from pathlib import Path

import pytest
import torch
from lit_classification.config_file import load_config
from lit_classification.datasets import build_dataset
from lit_classification.recipe import describe_recipe
from lit_classification.resume import TrainState, save_checkpoint

import main
import predict
import visualize_attention
import visualize_offset
from lit_backbone import read_checkpoint
from lit_classification.model import build_model
from lit_classification.optim import build_optimizer
from tests.classification.conftest import CLASSES
from tests.crafted import CONFIGS, RUNS, WEIGHTS, become_a_resnet
from tools import export

DOORS = {
    "predict": (predict, ["PHOTO", "--checkpoint", "FILE"]),
    "export": (export, ["FILE", "--format", "safetensors"]),
    "visualize_offset": (visualize_offset, ["--resume", "FILE", "--vis_image", "PHOTO"]),
    "visualize_attention": (visualize_attention, ["--resume", "FILE", "--data-path", "IMAGES"]),
    "--eval": (main, ["--cfg", "CFG", "--eval", "--resume", "FILE"]),
    "--resume": (main, ["--cfg", "CFG", "--resume", "FILE"]),
    "--pretrained": (main, ["--cfg", "CFG", "--pretrained", "FILE"]),
}
ODD_HEAD = re.compile("class|head|smaller model")
READERS = ("predict", "export", "visualize_offset", "visualize_attention", "--eval")


@pytest.fixture
def places(tiny_cfg, image_folder, tmp_path, monkeypatch):
    """A sound checkpoint's content, and what stands for the words in `DOORS`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: pytest.fail(f"connects to {address}"))
    cfg = tiny_cfg()
    config = load_config(cfg)
    model = build_model(config, torch.device("cpu"))
    optimizer = build_optimizer(model, config)
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    images = {split: build_dataset(config, is_training=split == "train") for split in ("train", "val")}
    scaler, recipe = torch.amp.GradScaler(enabled=False), describe_recipe(config, images)
    state = TrainState(model, optimizer, scaler, None, 4, list(CLASSES), recipe=recipe, update=1)
    save_checkpoint(tmp_path / "sound.pth", state, config)
    photo = next((image_folder / "val").glob("*/*.jpg"))
    places = {"FILE": tmp_path / "crafted.pth", "CFG": cfg, "PHOTO": photo, "IMAGES": image_folder}
    return read_checkpoint(tmp_path / "sound.pth"), {name: str(path) for name, path in places.items()}


def complaint(door: str, places: dict[str, str]) -> str:
    program, argv = DOORS[door]
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as info:
        program.main([places.get(word, word) for word in argv])
    message = info.value.code
    assert isinstance(message, str) and message.startswith(f"error: {places['FILE']}: "), (door, message)
    assert message.isprintable() and len(message) < 3000
    assert [path for path in sorted(Path().rglob("*")) if path not in before and "output" not in path.parts] == []
    return message


def craft(change, places) -> dict[str, str]:
    content, paths = places
    content = copy.deepcopy(content)
    change(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's of kinds of tensors
        torch.save(content, paths["FILE"])
    return paths


@pytest.mark.parametrize("door", DOORS)
def test_a_sound_checkpoint_comes_through_every_door(door, places):
    program, argv = DOORS[door]
    paths = craft(lambda content: None, places)
    program.main([paths.get(word, word) for word in argv])


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, places):
    change, words = CONFIGS[name]
    paths = craft(change, places)
    for door in READERS:
        assert words in complaint(door, paths), door


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, places):
    change, words = WEIGHTS[name]
    paths = craft(change, places)
    for door in READERS:
        assert words in complaint(door, paths), door
    if name != "of a smaller model":  # to resume is to bring one's own
        complaint("--resume", paths)
    if not ODD_HEAD.search(name):  # which is replaced
        complaint("--pretrained", paths)


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, places):
    change, words = RUNS[name]
    assert words in complaint("--resume", craft(change, places))


@pytest.mark.parametrize("door", ["export", "visualize_offset", "visualize_attention"])
def test_another_kind_of_model(door, places):
    assert "holds a ResNet; expected a LIT" in complaint(door, craft(become_a_resnet, places))
