"""Checkpoint files: layouts, wrappers, unusable files, fitting to a model, loading through timm."""

import argparse
import copy
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lit_backbone import LIT, CheckpointError, load_checkpoint
from tests.lit_backbone.small import SHRUNK, shrunk_released, small_lit

Weights = dict[str, Tensor]
RELEASES = "https://github.com/ziplab/LIT/releases/download"
RELEASED_FILES = {name: f"v1.0/{name}.pth" for name in ("lit_ti", "lit_s", "lit_m", "lit_b")}
RELEASED_FILES |= {"pvt_small_full_msa": "v2.1/pvt_full_msa.pth"}


def shrunk_model(name: str, **kwargs: Any) -> LIT:
    return timm.create_model(name, **(SHRUNK[name] | kwargs))


def assert_same_state(model: nn.Module, state: Weights) -> None:
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def without_head(state: Weights) -> Weights:
    return {key: value for key, value in state.items() if not key.startswith("head.")}


@pytest.fixture(params=["lit_s", "lit_ti"])
def released(request: pytest.FixtureRequest, goldens: dict[str, Any]) -> tuple[str, Weights]:
    """Return the name of a model and weights in its released layout."""
    return request.param, shrunk_released(request.param, goldens["state_dicts"][request.param]["keys"])


@pytest.fixture
def expected(released: tuple[str, Weights]) -> Weights:
    """Return the same weights in this package's layout; test_goldens.py checks the conversion."""
    name, state = released
    model = shrunk_model(name)
    model.load_state_dict(state)
    return dict(model.state_dict())


# ---- layouts


def test_both_layouts_load_strictly_also_under_a_prefix_and_into_copies(
    released: tuple[str, Weights], expected: Weights
) -> None:
    name, state = released
    keys, model = list(state), shrunk_model(name)
    for twin in (model, copy.deepcopy(model), ModelEmaV3(model).module):
        for weights in (state, expected):
            nn.init.zeros_(twin.norm.weight)
            twin.load_state_dict(weights, strict=True)
            assert_same_state(twin, expected)
    assert list(state) == keys  # the argument is not modified
    with pytest.raises(RuntimeError, match="patch_embed_extra"):
        model.load_state_dict(state | {"patch_embed_extra": torch.ones(1)})

    detector = nn.ModuleDict({"backbone": shrunk_model(name), "neck": nn.Linear(2, 3)})
    neck = {"neck.weight": torch.ones(3, 2), "neck.bias": torch.ones(3)}
    detector.load_state_dict({f"backbone.{key}": value for key, value in state.items()} | neck, strict=True)
    assert_same_state(detector, {f"backbone.{key}": value for key, value in expected.items()} | neck)


WRAPPERS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state, "meta": {"epoch": 12}},
    "model_ema": lambda state: {"model_ema": state},
    "module.": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "optimizer": {}},
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "safetensors": lambda state: state,
}


@pytest.mark.parametrize("released", ["lit_s"], indirect=True)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_weights_are_unwrapped(kind: str, released: tuple[str, Weights], expected: Weights, tmp_path: Path) -> None:
    name, state = released
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    (save_file if kind == "safetensors" else torch.save)(WRAPPERS[kind](state), file)
    for model in (None, shrunk_model(name)):
        fresh = shrunk_model(name)
        fresh.load_state_dict(load_checkpoint(file, model), strict=True)
        assert_same_state(fresh, expected)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["model", "model_ema", "updates_per_epoch"], "model_ema"),  # this package
        (["state_dict", "state_dict_ema"], "state_dict_ema"),  # timm
        (["model", "model_ema"], "model"),  # DeiT and the authors
    ],
)
def test_ema_weights_are_used_if_the_trainer_evaluates_them(tmp_path: Path, keys: list[str], expected: str) -> None:
    content = {key: {"norm.weight": torch.full((2,), float(i))} for i, key in enumerate(keys)}
    torch.save(content, tmp_path / "run.pth")
    assert torch.equal(load_checkpoint(tmp_path / "run.pth")["norm.weight"], content[expected]["norm.weight"])
    torch.save(content | dict.fromkeys(keys[1:]), tmp_path / "run.pth")  # a run without EMA
    assert torch.equal(load_checkpoint(tmp_path / "run.pth")["norm.weight"], content[keys[0]]["norm.weight"])


# ---- files


class CfgNode(dict):
    """Pickle-compatible copy of `yacs.config.CfgNode`: a dictionary with attributes, some of them sets."""

    def __init__(self, content: dict[str, Any]):
        super().__init__({key: CfgNode(v) if isinstance(v, dict) else v for key, v in content.items()})
        self.__dict__.update(__immutable__=False, __deprecated_keys__=set(), __renamed_keys__={})

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


def save_with_config(weights: Weights, path: Path) -> None:
    """Save weights and configurations as the reference's trainers do; yacs is not importable afterwards."""
    config = CfgNode({"MODEL": {"NAME": "lit_s", "DEPTHS": [2, 2, 6, 2]}, "BASE": [""], "TRAIN": {"BASE_LR": 5e-4}})
    arguments = argparse.Namespace(lr=5e-4, data_path="/imagenet", betas=(0.9, 0.999), opt_eps=None)
    yacs = {"yacs": ModuleType("yacs"), "yacs.config": ModuleType("yacs.config")}
    yacs["yacs.config"].CfgNode = CfgNode
    with pytest.MonkeyPatch.context() as patch:
        for name, module in yacs.items():
            patch.setitem(sys.modules, name, module)
        torch.save({"model": weights, "config": config, "args": arguments, "epoch": 299}, path)
    assert "yacs" not in sys.modules


class Call:
    """An object that pickles as a function call, followed by a state."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.call = function, arguments, state

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
        return self.call


def write_truncated(path: Path) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(small_lit().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_compressed(path: Path) -> None:
    """Write a compressed archive, which could expand to any size."""
    torch.save({"norm.weight": torch.zeros(10**5)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


BAD_FILES = {
    "missing.pth": (lambda path: None, "no such file"),
    "directory.pth": (lambda path: path.mkdir(), "no such file"),
    "empty.pth": (lambda path: path.touch(), "unreadable"),
    "html.pth": (lambda path: path.write_text("<!DOCTYPE html>\n<title>Not found</title>\n"), "unreadable"),
    "truncated.pth": (write_truncated, "unreadable"),
    "compressed.pth": (write_compressed, "unreadable"),
    "truncated.safetensors": (write_truncated, "unreadable"),
    "text.safetensors": (lambda path: path.write_text("no tensors"), "unreadable"),
    "list.pth": (lambda path: torch.save([torch.ones(1)], path), "holds a list"),
    "no-weights.pth": (lambda path: torch.save({"epoch": 3, "model": {"name": "lit_s"}}, path), "holds no weights"),
    "numbered.pth": (lambda path: torch.save({0: torch.ones(1)}, path), "holds no weights"),
}
PAYLOADS: dict[str, Callable[[Path], Any]] = {
    "system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "getattr": lambda mark: Call(getattr, "text", "upper"),
    "Path": lambda mark: mark,  # harmless, but not plain data
}


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files_are_refused(name: str, tmp_path: Path) -> None:
    write, reason = BAD_FILES[name]
    write(tmp_path / name)
    assert_refused(tmp_path / name, reason)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", PAYLOADS)
def test_files_that_would_run_code_are_refused(name: str, legacy: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "code-ran", tmp_path / "crafted.pth"
    content = {"model": small_lit().state_dict(), "config": PAYLOADS[name](mark)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_refused(path, f"{name}, which could run code")
    assert not mark.exists()


# ---- fitting a model


@pytest.mark.parametrize("new_head", [True, False])
def test_checkpoint_of_another_model_names_keys(
    new_head: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": small_lit("relative").state_dict()}, path)
    for model, keys in (
        (small_lit("class_token"), ["missing", "stages.0.pos_embed", "unexpected", "attn.rel_pos_bias"]),
        (small_lit(depths=(1, 1, 1, 1)), ["unexpected", "stages.1.blocks.1.norm2.weight"]),
        (small_lit(embed_dims=(16, 32, 48, 64)), ["shapes different", "stages.0.merge.proj.weight"]),
        (shrunk_model("lit_ti"), ["lit_ti", "missing"]),
    ):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path, model, new_head=new_head)
        assert str(error.value).startswith(f"{path}: not a checkpoint of ") and "\n" not in str(error.value)
        assert all(key in str(error.value) for key in keys), str(error.value)
    assert caplog.records == []  # no warning about the head


def test_head_is_replaced_if_the_number_of_classes_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, source = tmp_path / "ten.pth", small_lit(num_classes=10)
    torch.save(source.state_dict(), path)
    for model, warning in ((small_lit(num_classes=7), "10 classes, the model 7"), (small_lit(num_classes=0), "")):
        caplog.clear()
        head = copy.deepcopy(model.head.state_dict())
        model.load_state_dict(load_checkpoint(path, model), strict=True)
        assert_same_state(model.head, dict(head))
        body, expected = (without_head(dict(module.state_dict())) for module in (model, source))
        torch.testing.assert_close(body, expected, rtol=0, atol=0)
        assert warning in caplog.text and bool(caplog.records) == bool(warning)
    with pytest.raises(CheckpointError, match="10 classes, the model 7"):
        load_checkpoint(path, small_lit(num_classes=7), new_head=False)

    torch.save(model.state_dict(), path)  # without a head
    source.load_state_dict(load_checkpoint(path, source), strict=True)
    assert "no classes, the model 10" in caplog.text


@pytest.mark.parametrize("classes, kept", [("abcdefg", True), ("gfedcba", False), ("", True)])
def test_head_is_replaced_if_class_names_differ(classes: str, kept: bool, tmp_path: Path) -> None:
    source, model = small_lit(num_classes=7), small_lit(num_classes=7)
    initial = copy.deepcopy(model.head.state_dict())
    torch.save({"model": source.state_dict(), "classes": list("abcdefg")}, tmp_path / "named.pth")
    model.load_state_dict(load_checkpoint(tmp_path / "named.pth", model, classes=classes))
    assert_same_state(model.head, dict(source.head.state_dict() if kept else initial))


@pytest.mark.parametrize("through_timm", [False, True])
def test_tables_are_resized_for_another_input_size(
    through_timm: bool, released: tuple[str, Weights], tmp_path: Path
) -> None:
    """The result is that of the checkpoint's model, which resizes the tables in each forward pass."""
    (name, state), path, x = released, tmp_path / "weights.pth", torch.randn(1, 3, 128, 160)
    torch.save({"model": state}, path)
    keywords = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path))) if through_timm else {}
    model, original = (shrunk_model(name, img_size=size, **keywords).eval() for size in ((128, 160), 224))
    with pytest.raises(RuntimeError, match="size mismatch"):  # load_state_dict never resizes
        model.load_state_dict(state)
    if not through_timm:
        for each in (model, original):
            each.load_state_dict(load_checkpoint(path, each), strict=True)
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)


# ---- optimizer state; tests/crafted.py has malformed ones


# ---- loading through timm


@pytest.mark.parametrize("name", RELEASED_FILES)
def test_default_configuration_names_the_release(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.url == f"{RELEASES}/{RELEASED_FILES[name]}"
    assert (cfg.input_size, cfg.crop_pct, cfg.interpolation) == ((3, 224, 224), 0.875, "bicubic")
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_timm_reads_files_also_for_other_classes_and_channels(
    released: tuple[str, Weights], expected: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, state = released
    path = tmp_path / "weights.pth"
    save_with_config(state, path)
    assert_same_state(shrunk_model(name, checkpoint_path=str(path)), expected)

    overlay = dict(file=str(path))
    model = shrunk_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert model.head.weight.shape[0] == 5
    first = "stages.0.merge.proj.weight"
    expected[first] = expected[first].sum(1, keepdim=True)  # gray is equal red, green and blue
    body = without_head(dict(model.state_dict()))
    torch.testing.assert_close(body, without_head(expected), rtol=0, atol=1e-6)

    for channels in (1, 5):  # load_checkpoint does the same
        model = shrunk_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels)
        adapted = shrunk_model(name, in_chans=channels)
        adapted.load_state_dict(load_checkpoint(path, adapted))
        assert_same_state(adapted, dict(model.state_dict()))
        assert f"3 input channels, adapted to the model's {channels}" in caplog.text


def test_timm_pretrained_reads_the_hub_cache(
    released: tuple[str, Weights], expected: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test `pretrained=True` without the download."""
    name, state = released
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    save_with_config(state, cache / f"{name}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *_, **__: pytest.fail(f"downloads {url}"))
    assert_same_state(shrunk_model(name, pretrained=True), expected)
    features = shrunk_model(name, pretrained=True, features_only=True)
    kept = {f"model.{key}": x for key, x in expected.items() if not key.startswith(("head.", "norm."))}
    assert_same_state(features, kept)
