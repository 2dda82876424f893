"""Crafted checkpoints: changes to a valid checkpoint, and a part of the error message for each."""

from collections.abc import Callable
from typing import Any

import timm
import torch

Content = dict[str, Any]
OFFSETS = "stages.1.merge.offset.weight"  # parameters of the tiny LIT in the valid checkpoint
BIAS = "stages.2.blocks.0.attn.rel_pos_bias"


def config(section: str, **settings: Any) -> Callable[[Content], None]:
    return lambda content: content["config"][section].update(settings)


def lit(**keywords: Any) -> Callable[[Content], None]:
    return lambda content: content["config"]["MODEL"]["LIT"].update(keywords)


def record(name: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content.update({name: value})


def without(name: str) -> Callable[[Content], None]:
    return lambda content: content.pop(name)


def weight(key: str, make: Callable[[torch.Tensor], Any]) -> Callable[[Content], None]:
    return lambda content: content["model"].update({key: make(content["model"].get(key))})


def moment(name: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content["optimizer"]["state"][0].update({name: value})


def cycle() -> list:
    endless: list = []
    endless.append(endless)
    return endless


def shared(depth: int = 40) -> list:
    """Create a list of 2 ** depth entries that takes a few hundred bytes."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


def become_a_resnet(content: Content) -> None:
    content["model"] = timm.create_model("resnet18", num_classes=3).state_dict()
    content["config"]["MODEL"].update(NAME="resnet18", LIT={})


FETCHING = {
    "pretrained": True,
    "cache_dir": "CACHE",
    "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.pth", "file": "", "hf_hub_id": ""},
}
# Name: change, part of the error message.
CONFIGS = {
    "download": (lit(**FETCHING), "MODEL.LIT.pretrained: unknown key"),
    "hub": (config("MODEL", NAME="hf-hub:timm/resnet18.a1_in1k"), "MODEL.NAME: timm knows no model"),
    "folder": (config("MODEL", NAME="local-dir:CACHE"), "MODEL.NAME: timm knows no model"),
    "depths": (lit(depths=[10**6] * 4), "MODEL.LIT.depths: expected less than or equal to 64, got 1000000"),
    "widths": (lit(embed_dims=[4096] * 4, depths=[16] * 4, num_heads=[1] * 4), "MODEL.LIT: makes a model of"),
    "heads": (lit(num_heads=[5] * 4), "does not divide"),
    "stages": (lit(depths=[1] * 10**5), "MODEL.LIT.depths: Tuple should have at most 4 items"),
    "sides": (config("DATA", IMG_SIZE=[64000, 64000]), "DATA.IMG_SIZE: expected less than or equal to 2048, got 64000"),
    "outputs": (config("MODEL", NUM_CLASSES=10**9), "MODEL.NUM_CLASSES: expected less than or equal to 100000"),
    "digits": (config("TRAIN", EPOCHS=10**600), "TRAIN.EPOCHS: "),
    "digits of a number": (config("TRAIN", BASE_LR=10**600), "TRAIN.BASE_LR: "),
    "tensor": (config("TRAIN", EPOCHS=torch.ones(10**5)), "TRAIN.EPOCHS: expected a valid integer, got tensor("),
    "long text": (config("TRAIN", EPOCHS="9" * 10**6), "TRAIN.EPOCHS: expected a valid integer, got '999"),
    "escapes": (config("TRAIN", **{"\x1b[2Jx\n": 1}), "TRAIN.\\x1b[2Jx\\n: unknown key"),
    "cycle": (config("AUG", SCALE=cycle()), "AUG.SCALE: expected a valid number, got [[[[[[[...]]]]]]]"),
    "shared": (config("AUG", SCALE=shared()), "AUG.SCALE: expected a valid number, got [[[["),
    "no sections": (record("config", None), "'config' is not as main.py writes it"),
    "numbered": (record("config", {5: 6}), "is not as main.py writes it"),
}
WEIGHTS = {
    "of a smaller model": (lit(embed_dims=[800, 1600, 2400, 3200], depths=[3] * 4), "not a checkpoint of lit_s"),
    "sparse": (weight(OFFSETS, lambda x: x.to_sparse()), f"1 keys missing ({OFFSETS})"),
    "meta": (weight(OFFSETS, lambda x: x.to("meta")), f"1 keys missing ({OFFSETS})"),
    "complex": (weight(OFFSETS, lambda x: x.to(torch.complex64)), f"1 keys missing ({OFFSETS})"),
    "expanded": (weight(BIAS, lambda x: torch.ones(1).expand(1, 3, 10**5, 10**5)), f"1 keys missing ({BIAS})"),
    "empty table": (weight(BIAS, lambda x: torch.ones(1, 3, 0, 9)), f"1 shapes different ({BIAS})"),
    "flat table": (weight(BIAS, lambda x: torch.ones(0, 3)), f"1 shapes different ({BIAS})"),
    "many tables": (weight(BIAS, lambda x: torch.ones(1, 10**6, 1, 1)), f"1 shapes different ({BIAS})"),
    "0-d head": (weight("head.weight", lambda x: torch.ones(())), "its head has no classes"),
    "0-d weight": (weight(OFFSETS, lambda x: torch.ones(())), f"1 shapes different ({OFFSETS})"),
    "text": (weight(OFFSETS, lambda x: "no tensor"), f"1 keys missing ({OFFSETS})"),
    "nan": (weight(OFFSETS, lambda x: x * torch.nan), f"1 weights are not finite real numbers ({OFFSETS})"),
    "infinite": (weight("stages.1.merge.norm.running_var", lambda x: x / 0), "1 weights are not finite real numbers"),
    "escapes": (weight("\x1b]0;x\x07\n", lambda x: torch.ones(1)), "1 keys unexpected (\\x1b]0;x\\x07\\n)"),
    "long key": (weight("x" * 10**6, lambda x: torch.ones(1)), "1 keys unexpected (xxx"),
    "no weights": (record("model", {}), "holds no weights"),
    "list of weights": (record("model", [1]), "holds no weights"),
    "classes by number": (record("classes", [1, 2, 3]), "'classes.0' is not as main.py writes it"),
    "class": (record("classes", 5), "'classes' is not as main.py writes it"),
    "fewer classes": (record("classes", ["ant"]), "classes"),
}
RUNS = {
    "update": (record("update", "5"), "'update' is not as main.py writes it"),
    "negative update": (record("update", -1), "'update' is not as main.py writes it"),
    "huge update": (record("update", 10**600), "'update' is not as main.py writes it"),
    "no update": (without("update"), "'update' is not as main.py writes it"),
    "updates per epoch": (record("updates_per_epoch", 0), "'updates_per_epoch' is not as main.py writes it"),
    "best": (record("best", torch.nan), "'best' is not as main.py writes it"),
    "average": (record("model_ema", 5), "'model_ema' is not as main.py writes it"),
    "scale": (record("scaler", [1]), "'scaler' is not as main.py writes it"),
    "configuration": (without("config"), "'config' is not as main.py writes it"),
    "optimizer": (record("optimizer", []), "'optimizer' is not as main.py writes it"),
    "groups": (record("optimizer", {"state": {}, "param_groups": 5}), "the optimizer state does not fit"),
    "state": (record("optimizer", {"state": [], "param_groups": []}), "the optimizer state does not fit"),
    "moment": (moment("exp_avg", "text"), "the optimizer state does not fit"),
    "nan": (moment("exp_avg_sq", torch.full((8, 3, 4, 4), torch.nan)), "the optimizer state does not fit"),
}
