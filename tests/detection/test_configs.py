"""The published detectors: sizes, released layouts, recipes; and that each of them trains and validates."""

from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from lit_backbone.mm import load_file
from lit_backbone.mm.runner import train
from tests.dense import derive
from tests.detection.conftest import PUBLISHED, classes_of_all_splits
from tests.goldens.compare import meta_state, parameter_count

# name of the figures: config, parameters, learning rate
DETECTORS = {
    "retinanet_lit_ti": (29_621_708, 1e-4),
    "retinanet_lit_s": (38_904_292, 1e-4),
    "mask_rcnn_lit_ti": (39_539_144, 2e-4),
    "mask_rcnn_lit_s": (48_240_096, 2e-4),
}
CLASS_TOKEN_SLOT = 512  # of lit_ti's last position table, which dense prediction has no use for


def load(name: str) -> Config:
    return Config.fromfile(PUBLISHED / f"{name}_fpn_1x_coco.py")


def build(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize("name", DETECTORS)
def test_size_and_released_layout(name: str, goldens: dict[str, Any]) -> None:
    model = build(load(name))
    parameters, _ = DETECTORS[name]
    figures = goldens["state_dicts"][name]
    assert figures["parameters"] == parameters
    assert parameter_count(model) == parameters - (CLASS_TOKEN_SLOT if name.endswith("ti") else 0)
    model.load_state_dict(meta_state(figures["keys"]), strict=True, assign=True)


@pytest.mark.parametrize("name", DETECTORS)
def test_recipe(name: str) -> None:
    cfg = load(name)
    assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (steps.milestones, steps.gamma) == ([8, 11], 0.1)
    resize = next(step for step in cfg.train_dataloader.dataset.pipeline if step.type == "Resize")
    assert resize.scale == (1333, 800) and resize.keep_ratio

    small = name.endswith("lit_s")
    assert cfg.optim_wrapper.type == ("AmpOptimWrapper" if small else "OptimWrapper")
    assert bool(cfg.model.backbone.get("with_cp")) == small
    cfg.optim_wrapper.type = "OptimWrapper"
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert {group["lr"] for group in optimizer.param_groups} == {DETECTORS[name][1]}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    kept = {key for key, p in model.named_parameters() if decays[id(p)] == 0}
    expected = {key for key, _ in model.named_parameters() if "norm" in key or "rel_pos_bias" in key}
    assert set(decays.values()) <= {0.0, 1e-4}
    assert kept == (expected if small else set()) and len(expected) > 20


@pytest.mark.parametrize("name", DETECTORS)
def test_trains_and_validates(name: str, options: Any, tmp_path: Any) -> None:
    """One step and one validation of the config itself, on other data: fewer classes, smaller images."""
    heads = ["bbox_head"] if name.startswith("retinanet") else ["roi_head__bbox_head", "roi_head__mask_head"]
    changes: dict[str, Any] = {f"model__{head}__num_classes": 10 for head in heads}
    for split, file, resize in (("train", "train", 2), ("val", "val", 1), ("test", "val", 1)):
        dataset = f"{split}_dataloader__dataset__"
        changes |= {
            f"{dataset}ann_file": f"annotations/{file}.json",
            f"{dataset}data_prefix__img": f"images/{file}/",
            f"{dataset}indices": 2,
            f"{dataset}pipeline__{resize}__scale": "(128,128)",
        }
    inherited = classes_of_all_splits(tuple("0123456789")) + "\nmodel = dict(backbone=dict(init_cfg=None))"
    config = derive(tmp_path / "config.py", PUBLISHED / f"{name}_fpn_1x_coco.py", inherited)
    train("", [str(config), *options(model__backbone__init_cfg__checkpoint=None, **changes)])
    saved = load_file(str(tmp_path / "run" / "epoch_1.pth"))
    assert saved["meta"]["iter"] == 1 and saved["meta"]["dataset_meta"]["classes"] == tuple("0123456789")
