"""Changes that turn a sound checkpoint of `main.py` into a crafted one, with the words of the answer."""

from collections.abc import Callable
from typing import Any

import timm
import torch

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
    "shared name": (config("MODEL", NAME=shared()), UNKNOWN),
    "depths": (lit(depths=[10**6] * 4), "MODEL.LIT.depths: expected less than or equal to 64, got 1000000"),
    "widths": (lit(embed_dims=[4096] * 4, depths=[4] * 4, num_heads=[1] * 4), "not a checkpoint of lit_s"),
    "heads": (lit(num_heads=[5] * 4), "MODEL.LIT: makes no model: num_heads=5: does not divide"),
    "stages": (lit(depths=[1] * 10**5), "MODEL.LIT.depths: Tuple should have at most 4 items"),
    "sides": (config("DATA", IMG_SIZE=[64000, 64000]), "DATA.IMG_SIZE: expected less than or equal to 2048, got 64000"),
    "outputs": (config("MODEL", NUM_CLASSES=10**9), "MODEL.NUM_CLASSES: expected less than or equal to 100000"),
    "large integer": (config("TRAIN", EPOCHS=10**600), ""),
    "large number": (config("TRAIN", BASE_LR=10**600), "TRAIN.BASE_LR: expected a valid number"),
    "tensor": (config("TRAIN", EPOCHS=torch.ones(10**5)), "TRAIN.EPOCHS: expected a valid integer, got tensor("),
    "long text": (config("TRAIN", EPOCHS="9" * 10**6), "TRAIN.EPOCHS: expected a valid integer, got '999"),
    "escapes": (config("TRAIN", **{"\x1b[2Jx\n": 1}), ""),
    "cycle": (config("AUG", SCALE=cycle()), "AUG.SCALE: expected a valid number, got [[[[[[[...]]]]]]]"),
    "shared list": (config("AUG", SCALE=shared()), "AUG.SCALE: expected a valid number, got [[[["),
    "shared dictionary": (config("AUG", NEW=shared(dict)), ""),
    "no sections": (entry("config", None), UNKNOWN),
    "section": (entry("config", {"DATA": 5}), "config: DATA: expected a valid dictionary"),
}
WEIGHTS: dict[str, tuple[Change, str]] = {
    "smaller model": (lit(embed_dims=[800, 1600, 2400, 3200], depths=[3] * 4), "not a checkpoint of lit_s"),
    "sparse": (weight(OFFSETS, lambda x: x.to_sparse()), "offset.weight"),
    "quantized": (weight(OFFSETS, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), "offset.weight"),
    "meta": (weight(OFFSETS, lambda x: x.to("meta")), "offset.weight"),
    "complex": (weight(OFFSETS, lambda x: x.to(torch.complex64)), "offset.weight"),
    "float8": (weight(OFFSETS, lambda x: x.to(torch.float8_e4m3fn)), "offset.weight"),
    "expanded": (weight(BIAS, lambda x: torch.ones(1).expand(1, 3, 10**5, 10**5)), "rel_pos_bias"),
    "empty table": (weight(BIAS, lambda x: torch.ones(1, 3, 0, 9)), "1 shapes different"),
    "flat table": (weight(BIAS, lambda x: torch.ones(0, 3)), "1 shapes different"),
    "many tables": (weight(BIAS, lambda x: torch.ones(1, 10**6, 1, 1)), "1 shapes different"),
    "0-d head": (weight("head.weight", lambda x: torch.ones(())), "its head has no classes"),
    "0-d weight": (weight(OFFSETS, lambda x: torch.ones(())), f"1 shapes different ({OFFSETS})"),
    "text": (weight(OFFSETS, lambda x: "no tensor"), f"1 keys missing ({OFFSETS})"),
    "nan": (weight(OFFSETS, lambda x: x * torch.nan), f"1 weights are not finite real numbers ({OFFSETS})"),
    "infinite": (weight("stages.1.merge.norm.running_var", lambda x: x / 0), "1 weights are not finite real numbers"),
    "escapes": (weight("\x1b]0;x\x07\n", lambda x: torch.ones(1)), "1 keys unexpected (\\x1b]0;x\\x07\\n)"),
    "long key": (weight("x" * 10**6, lambda x: torch.ones(1)), ""),
    "no weights": (entry("model", {}), "holds no weights"),
    "list of weights": (entry("model", [1]), "holds no weights"),
    "fewer classes": (entry("classes", ["ant"]), "classes"),
    "another model": (become_resnet, UNKNOWN),
}
MALFORMED, OPTIMIZER = "is not as main.py writes it", "the optimizer state does not fit"
# The state of a run, which only a run that resumes it reads.
RUNS: dict[str, tuple[Change, str]] = {
    "update": (entry("update", "5"), f"'update' {MALFORMED}"),
    "negative update": (entry("update", -1), f"'update' {MALFORMED}"),
    "huge update": (entry("update", 10**600), f"'update' {MALFORMED}"),
    "no update": (without("update"), f"'update' {MALFORMED}"),
    "updates per epoch": (entry("updates_per_epoch", 0), MALFORMED),
    "best": (entry("best", torch.nan), MALFORMED),
    "nan best": (entry("best", float("nan")), MALFORMED),
    "model_ema": (entry("model_ema", 5), f"'model_ema' {MALFORMED}"),
    "scaler": (entry("scaler", [1]), f"'scaler' {MALFORMED}"),
    "classes": (entry("classes", 5), f"'classes' {MALFORMED}"),
    "config": (without("config"), f"'config' {MALFORMED}"),
    "recipe": (entry("recipe", {"SEED": shared(), 5: 6}), ""),
    "optimizer": (entry("optimizer", []), f"'optimizer' {MALFORMED}"),
    "groups": (entry("optimizer", {"state": {}, "param_groups": 5}), OPTIMIZER),
    "state": (entry("optimizer", {"state": [], "param_groups": []}), OPTIMIZER),
    "text moment": (moments(exp_avg="text"), OPTIMIZER),
    "nan moment": (moments(exp_avg_sq=torch.full((8, 3, 4, 4), torch.nan)), OPTIMIZER),
}
