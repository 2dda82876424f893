"""Dense backbone: reference features, classifier checkpoints, freezing and activation checkpointing."""

import ast
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

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
    "kwargs, message",
    [
        (dict(arch="lit_x"), "lit_ti, lit_s, lit_m, lit_b"),
        (dict(out_indices=(2, 1)), "out_indices"),
        (dict(out_indices=(3, 4)), "out_indices"),
        (dict(out_indices=(2, 3), out_norms=(1,)), "out_norms"),
    ],
)
def test_invalid_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LITBackbone(**({"arch": ARCH} | kwargs))


def test_unused_stages_are_not_built() -> None:
    full, part = small(out_norms=()).eval(), small(out_indices=(0, 2), out_norms=()).eval()
    part.load_state_dict({key: value for key, value in full.state_dict().items() if key in part.state_dict()})
    assert not any(key.startswith("stages.3") for key in part.state_dict())
    x = image((1, 3, 70, 90), 1)
    for a, b in zip(part(x), (full(x)[0], full(x)[2]), strict=True):
        torch.testing.assert_close(a, b)


def train_step(model: LITBackbone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    features = model.train()(image((2, 3, 64, 96), 3))
    sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).mean() for x in features).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


def test_activation_checkpointing_matches_plain() -> None:
    plain, checkpointed = (train_step(small(drop_path_rate=0.3, with_cp=with_cp)) for with_cp in (False, True))
    assert plain[0].keys() == checkpointed[0].keys()
    for a, b in zip(plain, checkpointed, strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], msg=key)
    assert any(key.endswith("running_mean") for key in plain[1])


def test_frozen_stages_do_not_change() -> None:
    model = small(frozen_stages=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradients, _ = train_step(model)
    assert {key.split(".")[1] for key in gradients if key.startswith("stages.")} == {"2", "3"}
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.split(".")[1] for key in changed} == {"2", "3"}


# ---- pretrained weights


def pretrained(path: Path, **kwargs: Any) -> LITBackbone:
    model = LITBackbone(init_cfg=dict(type="Pretrained", checkpoint=str(path), **kwargs.pop("init", {})), **kwargs)
    parent = BaseModule()  # a detector initializes its backbone in this way
    parent.backbone = model
    parent.init_weights()
    return model


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_init_from_classifier(tmp_path: Path, wrapper: str | None) -> None:
    torch.manual_seed(3)
    classifier = timm.create_model("lit_s", **SHRUNK["lit_s"], img_size=64, num_classes=10)
    state = classifier.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "c.pth")
    model = pretrained(tmp_path / "c.pth", arch=SHRUNK["lit_s"], img_size=128, out_norms=(0, 3))
    loaded = model.state_dict()
    for key in state.keys() & loaded.keys():
        if key.endswith("rel_pos_bias"):
            assert loaded[key].shape[2:] == {2: (15, 15), 3: (7, 7)}[int(key.split(".")[1])]
        else:
            assert torch.equal(loaded[key], state[key]), key
    assert loaded.keys() - state.keys() == {"norm0.weight", "norm0.bias", "norm3.weight", "norm3.bias"}


@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_init_from_released_classifier(tmp_path: Path, name: str, goldens: dict[str, Any]) -> None:
    released = shrunk_released(name, goldens["state_dicts"][name]["keys"])
    torch.save({"model": released}, tmp_path / "r.pth")
    keywords = {"class_token": False, "global_pool": "avg"} if name == "lit_ti" else {}
    classifier = timm.create_model(name, **SHRUNK[name], **keywords, num_classes=0).eval()
    classifier.load_state_dict(released, strict=False)
    model = pretrained(tmp_path / "r.pth", arch=ARCHS[name] | SHRUNK[name]).eval()
    x = image((1, 3, 224, 224), 5)
    for a, b in zip(model(x), classifier.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(a, b)


def test_init_from_detector(tmp_path: Path) -> None:
    source = small()
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state | {"neck.weight": torch.zeros(1)}}, tmp_path / "d.pth")
    model = pretrained(tmp_path / "d.pth", arch=ARCH, img_size=64, out_norms=(1, 3), init=dict(prefix="backbone."))
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    with pytest.raises(CheckpointError, match="d.pth: .*keys missing"):
        pretrained(tmp_path / "d.pth", arch=ARCH, init=dict(prefix="body."))


class Detector(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = small()

    def forward(self, *inputs: Tensor, mode: str = "tensor") -> Any:
        return {"loss": self.backbone(torch.stack(inputs))[-1].square().mean()}


def test_init_from_ema_of_detector(tmp_path: Path) -> None:
    """Load the EMA weights, which EMAHook stores as `state_dict`."""
    runner = Runner(
        Detector(),
        str(tmp_path),
        train_dataloader=dict(
            dataset=list(image((4, 3, 64, 64), 1)), batch_size=2, sampler=dict(type="DefaultSampler")
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2)),
        custom_hooks=[dict(type="EMAHook", momentum=0.1)],
    )
    runner.train()
    ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module.backbone
    init = dict(prefix="backbone.")
    model = pretrained(tmp_path / "epoch_2.pth", arch=ARCH, img_size=64, out_norms=(1, 3), init=init)
    for key, value in ema.named_parameters():
        assert torch.equal(model.state_dict()[key], value), key
    key = "stages.0.blocks.0.mlp.fc1.weight"
    assert not torch.equal(runner.model.backbone.state_dict()[key], ema.state_dict()[key])


def test_mismatched_weights_are_an_error(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    torch.save(small().state_dict(), tmp_path / "small.pth")
    for path, kwargs in [("x.pth", dict(arch=ARCH)), ("small.pth", dict(arch="lit_s"))]:
        with pytest.raises(CheckpointError, match=f"{path}: .*missing"):
            pretrained(tmp_path / path, **kwargs)
    with pytest.raises(CheckpointError, match="absent.pth: no such file"):
        pretrained(tmp_path / "absent.pth", arch=ARCH)
    with pytest.raises(ValueError, match="Pretrained"):
        LITBackbone(ARCH, init_cfg=dict(type="Kaiming")).init_weights()
