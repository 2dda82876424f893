"""Tests that a crafted checkpoint is harmless: one line answers it, and nothing is written, fetched or started."""

import copy
import socket
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.amp import GradScaler

from lit_backbone import read_checkpoint
from lit_classification.checkpointing import TrainState, save_checkpoint
from lit_classification.config import result_settings
from lit_classification.config_reader import load_config
from lit_classification.distributed import Ranks
from lit_classification.model import build_model
from lit_classification.optim import build_optimizer
from tests.classification.conftest import CLASSES
from tests.crafted import CONFIGS, RUNS, UNKNOWN, WEIGHTS, Change

COMMANDS = {  # commands that take a checkpoint; the first five also take its config
    "predict": "IMAGE --checkpoint FILE",
    "tools.export": "FILE --format safetensors",
    "visualize_offset": "--resume FILE --vis_image IMAGE",
    "visualize_attention": "--resume FILE --data-path FOLDER",
    "main --eval": "--resume FILE --data-path FOLDER",
    "main": "--cfg CFG --resume FILE",
    "main --pretrained": "FILE --cfg CFG",
}
READERS = list(COMMANDS)[:5]


@pytest.fixture
def places(tiny_cfg, image_folder, tmp_path, monkeypatch) -> dict[str, str]:
    """Write a sound checkpoint, and return what the words in `COMMANDS` stand for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: pytest.fail(f"connects to {address}"))
    cfg = tiny_cfg(TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0})
    config = load_config(cfg)
    model = build_model(config, torch.device("cpu"))
    optimizer = build_optimizer(model, config)
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    settings, scaler = result_settings(config) | {"train images": "33", "val images": "12"}, GradScaler(enabled=False)
    state = TrainState(model, optimizer, scaler, None, 4, tmp_path, list(CLASSES), settings, step=3)
    save_checkpoint("sound.pth", state, config, Ranks(0, 1, torch.device("cpu")))
    image = next((image_folder / "val").glob("*/*.jpg"))
    places = {"FILE": tmp_path / "crafted.pth", "CFG": cfg, "IMAGE": image, "FOLDER": image_folder}
    return {word: str(path) for word, path in places.items()}


def answer(command: str, change: Change, places: dict[str, str]) -> str:
    """Run a command on a changed checkpoint, and return its error message, or "" if it succeeds."""
    content = copy.deepcopy(read_checkpoint("sound.pth"))
    change(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about kinds of tensors
        torch.save(content, places["FILE"])
    before, (module, *flags) = set(Path().rglob("*")), command.split()
    try:
        import_module(module).main([*flags, *(places.get(word, word) for word in COMMANDS[command].split())])
    except SystemExit as error:
        if not error.code:
            return ""
        assert isinstance(error.code, str) and error.code.startswith(f"error: {places['FILE']}: "), error.code
        assert error.code.isprintable() and len(error.code) < 3000
        created = set(Path().rglob("*")) - before
        assert not [path for path in created if "output" not in path.parts]
        return error.code
    return ""


@pytest.mark.parametrize("command", COMMANDS)
def test_sound_checkpoint_is_accepted(command, places):
    assert answer(command, lambda content: None, places) == ""


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, places, monkeypatch):
    change, words = CONFIGS[name]
    for command in READERS[:: 4 if words == UNKNOWN else 1]:  # the comparison with all variants takes seconds
        message = answer(command, change, places)
        assert words in message and bool(words) == bool(message), command
    assert answer("main --pretrained", change, places) == ""  # reads the weights only


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, places):
    change, words = WEIGHTS[name]
    for command in READERS[:: 4 if words == UNKNOWN else 1]:  # the comparison with all variants takes seconds
        message = answer(command, change, places)
        assert message and words in message, command
    if name != "smaller model":  # the config is that of the command
        assert answer("main", change, places)
    if not any(word in name for word in ("class", "head", "smaller model")):  # a head is replaced
        assert answer("main --pretrained", change, places)


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, places):
    change, words = RUNS[name]
    message = answer("main", change, places)
    assert words in message and bool(words) == bool(message)
