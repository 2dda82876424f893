"""Tests that a crafted checkpoint is harmless: one line answers it, and nothing is written, fetched or started."""

import socket
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from lit_backbone import read_checkpoint
from lit_classification.checkpointing import PREVIOUS

Content = dict[str, Any]
Change = Callable[[Content], object]
OFFSETS, BIAS = "stages.1.merge.offset.weight", "stages.2.blocks.0.attn.rel_pos_bias"  # keys of the tiny LIT


def config(section: str, **settings: Any) -> Change:
    return lambda content: content["config"][section].update(settings)


def lit(**keywords: Any) -> Change:
    return lambda content: content["config"]["MODEL"]["LIT"].update(keywords)


def entry(name: str, value: Any) -> Change:
    return lambda content: content.update({name: value})


def without(name: str) -> Change:
    return lambda content: content.pop(name)


def weight(key: str, make: Callable[[torch.Tensor], Any]) -> Change:
    return lambda content: content["model"].update({key: make(content["model"].get(key))})


def moments(**values: Any) -> Change:
    return lambda content: content["optimizer"]["state"][0].update(values)


def cycle() -> list:
    endless: list = []
    endless.append(endless)
    return endless


def shared(kind: type = list) -> Any:
    """Return a list or dictionary of 2**40 entries that takes a few hundred bytes."""
    value: Any = kind()
    for _ in range(40):
        value = {"a": value, "b": value} if kind is dict else [value, value]
    return value


def become_resnet(content: Content) -> None:
    content["model"] = timm.create_model("resnet18", num_classes=3).state_dict()
    content["config"]["MODEL"].update(NAME="resnet18", LIT={})


UNKNOWN = "holds weights of no known LIT"
DOWNLOAD = {"pretrained": True, "cache_dir": "CACHE", "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.pth"}}
# Stored configs, with words of the refusal, or "" if the commands that read a config work and ignore the change.
CONFIGS: dict[str, tuple[Change, str]] = {
    "download": (lit(**DOWNLOAD), ""),
    "hub": (config("MODEL", NAME="hf-hub:timm/resnet18.a1_in1k"), UNKNOWN),
    "depths": (lit(depths=[10**6] * 4), "MODEL.LIT.depths: "),
    "widths": (lit(embed_dims=[4096] * 4, depths=[4] * 4, num_heads=[1] * 4), "not a checkpoint of lit_s"),
    "heads": (lit(num_heads=[5] * 4), "MODEL.LIT: makes no model"),
    "sides": (config("DATA", IMG_SIZE=[64000, 64000]), "DATA.IMG_SIZE: "),
    "outputs": (config("MODEL", NUM_CLASSES=10**9), "MODEL.NUM_CLASSES: "),
    "large number": (config("TRAIN", BASE_LR=10**600), "TRAIN.BASE_LR: "),
    "tensor": (config("TRAIN", EPOCHS=torch.ones(10**5)), "TRAIN.EPOCHS: "),
    "escapes": (config("TRAIN", **{"\x1b[2Jx\n": 1}), ""),
    "cycle": (config("AUG", SCALE=cycle()), "AUG.SCALE: "),
    "shared list": (config("AUG", SCALE=shared()), "AUG.SCALE: "),
    "shared dictionary": (config("AUG", NEW=shared(dict)), ""),
    "section": (entry("config", {"DATA": 5}), "config: DATA: "),
}
WEIGHTS: dict[str, tuple[Change, str]] = {
    "smaller model": (lit(embed_dims=[800, 1600, 2400, 3200], depths=[3] * 4), "not a checkpoint of lit_s"),
    "meta": (weight(OFFSETS, lambda x: x.to("meta")), OFFSETS),
    "expanded": (weight(BIAS, lambda x: torch.ones(1).expand(1, 3, 10**5, 10**5)), BIAS),
    "empty table": (weight(BIAS, lambda x: torch.ones(1, 3, 0, 9)), BIAS),
    "many tables": (weight(BIAS, lambda x: torch.ones(1, 10**6, 1, 1)), BIAS),
    "0-d head": (weight("head.weight", lambda x: torch.ones(())), "head"),
    "text": (weight(OFFSETS, lambda x: "no tensor"), OFFSETS),
    "escapes": (weight("\x1b]0;x\x07\n", lambda x: torch.ones(1)), "(\\x1b]0;x\\x07\\n)"),
    "long key": (weight("x" * 10**6, lambda x: torch.ones(1)), ""),
    "no weights": (entry("model", {}), "holds no weights"),
    "fewer classes": (entry("classes", ["ant"]), "classes"),
    "another model": (become_resnet, UNKNOWN),
}
OPTIMIZER = "the optimizer state does not fit"
# The state of a run, which only a run that resumes it reads.
RUNS: dict[str, tuple[Change, str]] = {
    "update": (entry("update", "5"), "'update'"),
    "negative update": (entry("update", -1), "'update'"),
    "huge update": (entry("update", 10**600), "'update'"),
    "no update": (without("update"), "'update'"),
    "updates per epoch": (entry("updates_per_epoch", 0), "--pretrained"),
    "best": (entry("best", float("nan")), "--pretrained"),
    "model_ema": (entry("model_ema", 5), "'model_ema'"),
    "scaler": (entry("scaler", [1]), "'scaler'"),
    "classes": (entry("classes", 5), "'classes'"),
    "config": (without("config"), "'config'"),
    "recipe": (entry("recipe", {"SEED": shared(), 5: 6}), ""),
    "optimizer": (entry("optimizer", []), "'optimizer'"),
    "groups": (entry("optimizer", {"state": {}, "param_groups": 5}), OPTIMIZER),
    "text moment": (moments(exp_avg="text"), OPTIMIZER),
    "nan moment": (moments(exp_avg_sq=torch.full((8, 3, 4, 4), torch.nan)), OPTIMIZER),
}

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
def places(tiny_cfg, finished, image_folder, tmp_path, monkeypatch, on_cpu) -> dict[str, str]:
    """Return what the words in `COMMANDS` stand for, and the place of a sound checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: pytest.fail(f"connects to {address}"))
    image = next((image_folder / "val").glob("*/*.jpg"))
    places = {"FILE": tmp_path / "crafted.pth", "CFG": tiny_cfg(), "IMAGE": image, "FOLDER": image_folder}
    return {word: str(path) for word, path in places.items()} | {"SOUND": finished / PREVIOUS}


def answer(command: str, change: Change, places: dict[str, str]) -> str:
    """Run a command on a changed checkpoint, and return its error message, or "" if it succeeds."""
    content = read_checkpoint(places["SOUND"])
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
def test_configs(name, places):
    """Two cases pass through all commands that read a config, the others through the first and the last."""
    change, words = CONFIGS[name]
    readers = READERS if name in ("download", "depths") else READERS[:1] if words == UNKNOWN else READERS[::4]
    for command in readers:  # the comparison with all variants takes seconds
        message = answer(command, change, places)
        assert words in message and bool(words) == bool(message), command
    if name in ("download", "depths"):
        assert answer("main --pretrained", change, places) == ""  # reads the weights only


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, places):
    change, words = WEIGHTS[name]
    for command in READERS[:1] if words == UNKNOWN else READERS[::4]:
        message = answer(command, change, places)
        assert message and words in message, command
    if name != "smaller model":  # the config is that of the command
        assert answer("main", change, places)


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, places):
    change, words = RUNS[name]
    message = answer("main", change, places)
    assert words in message and bool(words) == bool(message)
