import argparse
import copy
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_backbone import LIT, CheckpointError, load_checkpoint, read_checkpoint
from lit_backbone.checkpoints import check_optimizer_state, class_mismatch, fit_state_dict
from tests.lit_backbone.small import SHRUNK, shrunk_released, small_lit

RELEASES = "https://github.com/ziplab/LIT/releases/download"
RELEASED_FILES = {
    "lit_ti": f"{RELEASES}/v1.0/lit_ti.pth",
    "lit_s": f"{RELEASES}/v1.0/lit_s.pth",
    "lit_m": f"{RELEASES}/v1.0/lit_m.pth",
    "lit_b": f"{RELEASES}/v1.0/lit_b.pth",
    "pvt_small_full_msa": f"{RELEASES}/v2.1/pvt_full_msa.pth",
}


class CfgNode(dict):
    """Pickle-compatible copy of `yacs.config.CfgNode`: a dictionary with attributes, some of them sets."""

    def __init__(self, content: dict[str, Any]):
        super().__init__({key: CfgNode(v) if isinstance(v, dict) else v for key, v in content.items()})
        self.__dict__["__immutable__"] = False
        self.__dict__["__deprecated_keys__"] = set()
        self.__dict__["__renamed_keys__"] = {}
        self.__dict__["__new_allowed__"] = False

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


def save_with_config(content: dict[str, Any], path: Path) -> None:
    """Save weights and configurations as the reference's trainers do; yacs is not importable afterwards."""
    config = CfgNode({"MODEL": {"NAME": "lit_s", "DEPTHS": [2, 2, 6, 2]}, "BASE": [""], "TRAIN": {"BASE_LR": 5e-4}})
    arguments = argparse.Namespace(lr=5e-4, data_path="/imagenet", betas=(0.9, 0.999), opt_eps=None)
    yacs = {"yacs": ModuleType("yacs"), "yacs.config": ModuleType("yacs.config")}
    yacs["yacs.config"].CfgNode = CfgNode
    with pytest.MonkeyPatch.context() as patch:
        for name, module in yacs.items():
            patch.setitem(sys.modules, name, module)
        torch.save(content | {"config": config, "args": arguments, "epoch": 299, "max_accuracy": 81.5}, path)
    assert "yacs" not in sys.modules


def shrunk_model(name: str, **kwargs: Any) -> LIT:
    return timm.create_model(name, **(SHRUNK[name] | kwargs))


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


@pytest.fixture(params=["lit_s", "lit_ti"])
def released(request: pytest.FixtureRequest, goldens: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return the name of a model and weights in its released layout."""
    return request.param, shrunk_released(request.param, goldens["state_dicts"][request.param]["keys"])


@pytest.fixture
def expected(released: tuple[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the same weights in this package's layout; test_goldens.py checks the conversion."""
    name, state = released
    model = shrunk_model(name)
    model.load_state_dict(state)
    return dict(model.state_dict())


# ---- load_state_dict


def test_load_state_dict_accepts_both_layouts(released: tuple[str, dict[str, Tensor]]) -> None:
    name, state = released
    keys = list(state)
    model = shrunk_model(name)
    model.load_state_dict(state, strict=True)
    assert list(state) == keys  # the argument is not modified
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == sum(value.numel() for key, value in state.items() if "running" not in key)
    twin = shrunk_model(name)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert_same_state(twin, dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="patch_embed_extra"):
        model.load_state_dict(state | {"patch_embed_extra": torch.ones(1)})


def test_released_layout_loads_under_a_prefix(
    released: tuple[str, dict[str, Tensor]], expected: dict[str, Tensor]
) -> None:
    name, state = released
    detector = nn.ModuleDict({"backbone": shrunk_model(name), "neck": nn.Linear(2, 3)})
    neck = {"neck.weight": torch.ones(3, 2), "neck.bias": torch.ones(3)}
    detector.load_state_dict({f"backbone.{key}": value for key, value in state.items()} | neck, strict=True)
    assert_same_state(detector["backbone"], expected)
    assert_same_state(detector["neck"], {"weight": neck["neck.weight"], "bias": neck["neck.bias"]})


def test_released_layout_loads_into_copies(
    released: tuple[str, dict[str, Tensor]], expected: dict[str, Tensor]
) -> None:
    name, state = released
    model = shrunk_model(name)
    for twin in (copy.deepcopy(model), ModelEmaV3(model).module):
        twin.load_state_dict(state, strict=True)
        assert_same_state(twin, expected)


# ---- reading files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "meta": {"epoch": 12}},
        lambda state: {"model_ema": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "optimizer": {"state": {}}},
        lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "model", "state_dict", "model_ema", "module.", "compiled"],
)
def test_load_checkpoint_unwraps(
    wrap: Callable[[dict[str, Tensor]], dict[str, Any]],
    released: tuple[str, dict[str, Tensor]],
    expected: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    name, state = released
    torch.save(wrap(state), tmp_path / "weights.pth")
    for model in (None, shrunk_model(name)):
        fresh = shrunk_model(name)
        fresh.load_state_dict(load_checkpoint(tmp_path / "weights.pth", model), strict=True)
        assert_same_state(fresh, expected)


def test_load_checkpoint_reads_safetensors(
    released: tuple[str, dict[str, Tensor]], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    name, state = released
    save_file(state, tmp_path / "weights.safetensors")
    model = shrunk_model(name)
    model.load_state_dict(load_checkpoint(str(tmp_path / "weights.safetensors"), model))
    assert_same_state(model, expected)


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


def test_pickled_configurations_are_plain_data(tmp_path: Path) -> None:
    state = small_lit().state_dict()
    save_with_config({"model": state}, tmp_path / "trained.pth")
    content = read_checkpoint(tmp_path / "trained.pth")
    assert content["config"]["MODEL"] == {"NAME": "lit_s", "DEPTHS": [2, 2, 6, 2]}
    assert content["args"].betas == (0.9, 0.999)
    assert content["epoch"] == 299
    torch.testing.assert_close(load_checkpoint(tmp_path / "trained.pth"), dict(state), rtol=0, atol=0)


# ---- unreadable files


class Call:
    """An object that pickles as a function call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def write_truncated(path: Path) -> None:
    torch.save(small_lit().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_truncated_safetensors(path: Path) -> None:
    save_file(small_lit().state_dict(), path)
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
    "truncated.pth": (write_truncated, "truncated or unreadable"),
    "compressed.pth": (write_compressed, "truncated or unreadable"),
    "truncated.safetensors": (write_truncated_safetensors, "truncated or unreadable"),
    "text.safetensors": (lambda path: path.write_text("no tensors"), "unreadable"),
    "list.pth": (lambda path: torch.save([torch.ones(1)], path), "holds a list. Expected a dictionary"),
    "no-weights.pth": (lambda path: torch.save({"epoch": 3, "model": {"name": "lit_s"}}, path), "holds no weights"),
    "numbered.pth": (lambda path: torch.save({0: torch.ones(1)}, path), "holds no weights"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files(name: str, tmp_path: Path) -> None:
    write, reason = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=reason) as error:
        load_checkpoint(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert re.search(r"\. (Use|Expected) ", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["system", "eval", "getattr", "Path"])
def test_files_that_would_run_code_are_refused(name: str, legacy: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "code-ran", tmp_path / "crafted.pth"
    payload = {
        "system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, f"open({str(mark)!r}, 'w')"),
        "getattr": Call(getattr, "text", "upper"),
        "Path": mark,  # harmless, but not plain data
    }[name]
    content = {"model": small_lit().state_dict(), "config": payload}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=f"pickles .*{name}, which could run code") as error:
        load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
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
        assert str(error.value).startswith(f"{path}: not a checkpoint of ")
        assert all(key in str(error.value) for key in keys), str(error.value)
        assert "\n" not in str(error.value)
    assert caplog.records == []  # no warning about the head


def test_head_is_replaced_if_classes_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ten.pth"
    source = small_lit(num_classes=10)
    torch.save(source.state_dict(), path)
    model = small_lit(num_classes=7)
    head = copy.deepcopy(model.head.state_dict())
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(load_checkpoint(path, model), strict=True)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: ")
    assert "10 classes, the model 7" in record.getMessage()
    assert_same_state(model.head, dict(head))
    torch.save({"model": model.state_dict(), "classes": list("abcdefg")}, tmp_path / "named.pth")
    for classes, kept in (("abcdefg", True), ("gfedcba", False), ("", True)):
        other = small_lit(num_classes=7)
        initial = copy.deepcopy(other.head.state_dict())
        other.load_state_dict(load_checkpoint(tmp_path / "named.pth", other, classes=classes))
        assert_same_state(other.head, dict(head if kept else initial))
    expected = {key: value for key, value in source.state_dict().items() if not key.startswith("head.")}
    body = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    torch.testing.assert_close(body, expected, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="10 classes, the model 7"):
        load_checkpoint(path, model, new_head=False)


@pytest.mark.parametrize("in_chans", [1, 5])
def test_other_input_channels(tmp_path: Path, in_chans: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rgb.pth"
    torch.save(shrunk_model("lit_s").state_dict(), path)
    expected = shrunk_model(
        "lit_s", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), in_chans=in_chans, num_classes=1000
    )
    model = shrunk_model("lit_s", in_chans=in_chans)
    model.load_state_dict(load_checkpoint(path, model))
    assert_same_state(model, dict(expected.state_dict()))
    assert f"3 input channels, adapted to the model's {in_chans}" in caplog.text


def test_models_and_files_without_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "weights.pth"
    source, headless = small_lit(), small_lit(num_classes=0)
    torch.save(source.state_dict(), path)
    headless.load_state_dict(load_checkpoint(path, headless), strict=True)
    torch.testing.assert_close(headless.norm.weight, source.norm.weight)
    assert caplog.records == []

    torch.save(headless.state_dict(), path)
    source.load_state_dict(load_checkpoint(path, source), strict=True)
    assert "no classes, the model 10" in caplog.text


def resized_by_hand(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resize the tables of a released layout from 224 x 224 to 256 x 320 as the reference does."""
    sizes = [(64, 80), (32, 40), (16, 20), (8, 10)]
    tables = {}
    for key, table in state.items():
        if name == "lit_s" and key.endswith("relative_position_bias_table"):
            stage, side = int(key.split(".")[1]), int(len(table) ** 0.5)
            (height, width), heads = sizes[stage], table.shape[1]
            table = table.permute(1, 0).view(1, heads, side, side)
            key = key.replace("layers", "stages").replace("relative_position_bias_table", "rel_pos_bias")
            size = (2 * height - 1, 2 * width - 1)
            tables[key] = F.interpolate(table, size=size, mode="bicubic", align_corners=False)
        elif name == "lit_ti" and key.startswith("pos_embed"):
            stage = int(key[-1]) - 1
            if stage == 3:
                tables["stages.3.cls_pos_embed"], table = table[:, :1], table[:, 1:]
            side = int(table.shape[1] ** 0.5)
            table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            size = sizes[stage]
            tables[f"stages.{stage}.pos_embed"] = F.interpolate(table, size=size, mode="bilinear", align_corners=False)
    return tables


@pytest.mark.parametrize("through_timm", [False, True])
def test_tables_are_resized_for_another_input_size(
    through_timm: bool, released: tuple[str, dict[str, Tensor]], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    name, state = released
    path = tmp_path / "weights.pth"
    torch.save({"model": state}, path)
    if through_timm:
        overlay = dict(file=str(path))
        model = shrunk_model(name, img_size=(256, 320), pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        model = shrunk_model(name, img_size=(256, 320))
        model.load_state_dict(load_checkpoint(path, model), strict=True)
    tables = resized_by_hand(name, state)
    assert len(tables) == {"lit_s": 8, "lit_ti": 5}[name]
    torch.testing.assert_close(dict(model.state_dict()), expected | tables, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="size mismatch"):  # load_state_dict never resizes
        shrunk_model(name, img_size=(256, 320)).load_state_dict(state)


def test_class_mismatch() -> None:
    content = {"meta": {"dataset_meta": {"classes": ("ant", "bee", "cat")}}}
    assert class_mismatch(content, ("ant", "bee", "cat")) == ""
    assert class_mismatch(content, ()) == class_mismatch({}, ["ant"]) == ""
    assert "3 / 3 in checkpoint / data (bee / cat, cat / bee)" in class_mismatch(content, ["ant", "cat", "bee"])
    assert "3 / 2 in checkpoint / data (cat / None)" in class_mismatch(content, ["ant", "bee"])


def test_order_of_unnamed_classes_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path, model = tmp_path / "weights.pth", small_lit(num_classes=3)
    torch.save(model.state_dict(), path)
    load_checkpoint(path, model)
    assert caplog.records == []
    load_checkpoint(path, model, classes=["9", "10", "11"])
    message = f"{path}: has no class names. Its labels are taken in the order of the data: 9, 10, 11."
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", message)]


UNUSABLE = {
    "sparse": lambda x: x.to_sparse(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "meta": lambda x: x.to("meta"),
    "expanded": lambda x: torch.ones(1).expand(1, 3, 10**5, 10**5),
    "text": lambda x: "no tensor",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_tensors_count_as_missing(kind: str, tmp_path: Path) -> None:
    model, key = small_lit(), "stages.2.blocks.0.attn.rel_pos_bias"
    torch.save(model.state_dict() | {key: UNUSABLE[kind](model.state_dict()[key])}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=f"1 keys missing \\({key}\\)"):
        load_checkpoint(tmp_path / "weights.pth", model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value: float) -> None:
    model = small_lit()
    state = model.state_dict() | {"stages.1.merge.norm.running_var": torch.full((16,), value)}
    with pytest.raises(CheckpointError, match="1 weights are not finite real numbers .stages.1.merge.norm.running_var"):
        fit_state_dict(state, model, "weights.pth")


# ---- optimizer state


def trained(optimizer: Callable[..., Optimizer], sizes: Sequence[int] = (3, 4), **keywords: Any) -> Optimizer:
    """Create an optimizer that has taken one step."""
    params = [torch.ones(size, requires_grad=True) for size in sizes]
    result = optimizer([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, **keywords)
    sum(param.sum() for param in params).backward()
    result.step()
    return result


ADAM, SGD = torch.optim.AdamW, torch.optim.SGD


@pytest.mark.parametrize("optimizer", [ADAM, partial(SGD, momentum=0.9), SGD, torch.optim.Adafactor])
def test_optimizer_state_that_fits(optimizer: Callable[..., Optimizer]) -> None:
    state = trained(optimizer).state_dict()
    check_optimizer_state(state, trained(optimizer), "run.pth")
    check_optimizer_state({**state, "state": {}}, trained(optimizer), "run.pth")  # saved before the first step


MISMATCHES: dict[str, Callable[[], Any]] = {
    "another optimizer": lambda: trained(SGD, momentum=0.9).state_dict(),
    "other shapes": lambda: trained(ADAM, (3, 5)).state_dict(),
    "other groups": lambda: trained(ADAM, (3, 4, 5)).state_dict(),
    "no dictionary": lambda: [],
    "malformed groups": lambda: {"state": {}, "param_groups": 5},
    "text": lambda: changed_moments(exp_avg="text"),
    "not finite": lambda: changed_moments(exp_avg_sq=torch.full((3,), torch.nan)),
}


def changed_moments(**moments: Any) -> dict[str, Any]:
    state = trained(ADAM).state_dict()
    state["state"][0].update(moments)
    return state


@pytest.mark.parametrize("kind", MISMATCHES)
def test_optimizer_state_that_does_not_fit(kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"^run.pth: the optimizer state does not fit .*\. Start a new run"):
        check_optimizer_state(MISMATCHES[kind](), trained(ADAM), "run.pth")


# ---- loading through timm


@pytest.mark.parametrize("name", RELEASED_FILES)
def test_default_configuration_names_the_release(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.url == RELEASED_FILES[name]
    assert cfg.input_size == (3, 224, 224)
    assert (cfg.crop_pct, cfg.interpolation) == (0.875, "bicubic")
    assert cfg.mean == (0.485, 0.456, 0.406)
    assert cfg.std == (0.229, 0.224, 0.225)


def test_timm_checkpoint_path(
    released: tuple[str, dict[str, Tensor]], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    name, state = released
    save_with_config({"model": state}, tmp_path / "weights.pth")
    assert_same_state(shrunk_model(name, checkpoint_path=str(tmp_path / "weights.pth")), expected)


def test_timm_pretrained_file_for_other_classes_and_channels(
    released: tuple[str, dict[str, Tensor]], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    name, state = released
    save_with_config({"model": state}, tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    model = shrunk_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert model.head.weight.shape[0] == 5
    first = "stages.0.merge.proj.weight"
    expected[first] = expected[first].sum(1, keepdim=True)  # gray is equal red, green and blue
    loaded = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    kept = {key: value for key, value in expected.items() if not key.startswith("head.")}
    torch.testing.assert_close(loaded, kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize("features_only", [False, True])
def test_timm_pretrained_reads_the_hub_cache(
    features_only: bool,
    released: tuple[str, dict[str, Tensor]],
    expected: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Test `pretrained=True` without the download."""
    name, state = released
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    save_with_config({"model": state}, cache / RELEASED_FILES[name].rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *_, **__: pytest.fail(f"downloads {url}"))
    model = shrunk_model(name, pretrained=True, features_only=features_only)
    if features_only:
        expected = {f"model.{key}": v for key, v in expected.items() if not key.startswith(("head.", "norm."))}
    assert_same_state(model, expected)
