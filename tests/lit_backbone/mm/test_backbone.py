"""Dense backbone: reference features, classifier checkpoints, freezing and activation checkpointing."""

import ast
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from lit_backbone import CheckpointError
from lit_backbone.lit import ARCHS
from lit_backbone.mm import LITBackbone
from tests.goldens.compare import assert_agrees
from tests.goldens.fill import fill, image
from tests.lit_backbone.small import SHRUNK, SMALL, shrunk_released

REFERENCE = {
    "lit_ti_det": dict(arch="lit_ti"),
    "lit_ti_seg": dict(arch="lit_ti"),
    "lit_s_det": dict(arch="lit_s", img_size=800, out_norms=(1, 2, 3)),
    "lit_s_seg": dict(arch="lit_s", img_size=512, out_norms=(0, 1, 2, 3)),
}
ARCH = {key: value for key, value in SMALL.items() if key not in ("img_size", "num_classes")}


def small(**kwargs: Any) -> LITBackbone:
    torch.manual_seed(0)
    model = LITBackbone(ARCH, **(dict(img_size=64, out_norms=(1, 3)) | kwargs))
    with torch.no_grad():
        for parameter in model.parameters():  # also changes offsets, which are initialized to zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", REFERENCE)
def test_features_match_reference(name: str, goldens: dict[str, Any]) -> None:
    model = LITBackbone(**REFERENCE[name]).eval()
    model.load_state_dict(fill(goldens["state_dicts"][name]["keys"]), strict=True)
    for size, figures in goldens["outputs"]["features"][name].items():
        with torch.no_grad():
            features = model(image((1, 3, *ast.literal_eval(size)), 7))
        assert isinstance(features, tuple) and len(features) == len(figures) == 4
        for x, figure in zip(features, figures, strict=True):
            assert x.is_contiguous()
            assert_agrees(x, figure)


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_registered_in_both_libraries(scope: str) -> None:
    assert isinstance(MODELS.build(dict(type="LITBackbone", arch=ARCH, _scope_=scope)), LITBackbone)


@pytest.mark.parametrize(
    "kwargs",
    [dict(arch="lit_x"), dict(out_indices=(2, 1)), dict(out_indices=(3, 4)), dict(out_norms=(1,), out_indices=(2, 3))],
)
def test_invalid_arguments(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        LITBackbone(**({"arch": ARCH} | kwargs))


def test_unused_stages_are_not_built() -> None:
    full, part = small(out_norms=()).eval(), small(out_indices=(0, 2), out_norms=()).eval()
    part.load_state_dict({key: value for key, value in full.state_dict().items() if key in part.state_dict()})
    assert not any(key.startswith("stages.3") for key in part.state_dict())
    x = image((1, 3, 70, 90), 1)
    for a, b in zip(part(x), (full(x)[0], full(x)[2]), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_stages_do_not_change_under_activation_checkpointing() -> None:
    model = small(frozen_stages=2, with_cp=True)
    assert all(stage.grad_checkpointing for stage in model.stages)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sum(features.square().mean() for features in model.train()(image((2, 3, 64, 96), 3))).backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    for keys in (trained, changed):
        assert {key.split(".")[1] for key in keys if key.startswith("stages.")} == {"2", "3"}


# ---- pretrained weights


def pretrained(path: Path, **kwargs: Any) -> LITBackbone:
    model = LITBackbone(init_cfg=dict(type="Pretrained", checkpoint=str(path), **kwargs.pop("init", {})), **kwargs)
    parent = BaseModule()  # a detector initializes its backbone in this way
    parent.backbone = model
    parent.init_weights()
    return model


@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_init_from_released_classifier_resizes_tables(tmp_path: Path, name: str, goldens: dict[str, Any]) -> None:
    released = shrunk_released(name, goldens["state_dicts"][name]["keys"])
    torch.save({"model": released}, tmp_path / "r.pth")
    keywords = {"class_token": False, "global_pool": "avg"} if name == "lit_ti" else {}
    classifier = timm.create_model(name, **SHRUNK[name], **keywords, num_classes=0).eval()
    classifier.load_state_dict(released, strict=False)
    model = pretrained(tmp_path / "r.pth", arch=ARCHS[name] | SHRUNK[name], img_size=128).eval()
    tables = [key for key in model.state_dict() if key.endswith(("pos_embed", "rel_pos_bias"))]
    assert all(model.state_dict()[key].shape != classifier.state_dict()[key].shape for key in tables)
    x = image((1, 3, 128, 128), 5)
    for a, b in zip(model(x), classifier.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_init_from_detector(tmp_path: Path) -> None:
    source = small()
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state | {"neck.weight": torch.zeros(1)}}, tmp_path / "d.pth")
    model = pretrained(tmp_path / "d.pth", arch=ARCH, img_size=64, out_norms=(1, 3), init=dict(prefix="backbone."))
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    with pytest.raises(CheckpointError, match="d.pth: .*keys missing"):
        pretrained(tmp_path / "d.pth", arch=ARCH, init=dict(prefix="body."))


def test_mismatched_weights_are_an_error(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    torch.save({key: value * torch.nan for key, value in small().state_dict().items()}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="x.pth: .*missing"):
        pretrained(tmp_path / "x.pth", arch=ARCH)
    with pytest.raises(CheckpointError, match="nan.pth: .*not finite"):
        pretrained(tmp_path / "nan.pth", arch=ARCH, img_size=64)
    with pytest.raises(CheckpointError, match="absent.pth: no such file"):
        pretrained(tmp_path / "absent.pth", arch=ARCH)
    with pytest.raises(ValueError, match="Pretrained"):
        LITBackbone(ARCH, init_cfg=dict(type="Kaiming")).init_weights()
