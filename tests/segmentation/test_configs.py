"""Published segmentors: parameters, released layouts, recipes, one training step and validation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from lit_backbone.mm import load_file
from lit_backbone.mm.cli import train
from tests.dense import TINY_BACKBONE
from tests.goldens.compare import meta_state, parameter_count
from tests.segmentation.conftest import PUBLISHED, build_options

SEGMENTORS = {"lit_ti": 23_638_382, "lit_s": 31_850_502}  # parameters
CLASS_TOKEN_SLOT = 512  # parameters in the last position table of lit_ti, unused in dense prediction


def path_of(name: str) -> Path:
    return PUBLISHED / f"{name}_fpn_r50_512x512_80k_ade20k.py"


@pytest.mark.parametrize("name", SEGMENTORS)
def test_released_layout_and_recipe(name: str, goldens: dict[str, Any]) -> None:
    cfg = Config.fromfile(path_of(name))
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    figures = goldens["state_dicts"][f"sem_fpn_{name}"]
    assert figures["parameters"] == SEGMENTORS[name]
    assert parameter_count(model) == SEGMENTORS[name] - (CLASS_TOKEN_SLOT if name == "lit_ti" else 0)

    assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_cfg.type == "IterBasedTrainLoop" and cfg.train_cfg.max_iters == 80_000
    (poly,) = cfg.param_scheduler
    assert (poly.type, poly.power, poly.eta_min, poly.begin, poly.end) == ("PolyLR", 0.9, 1e-6, 0, 80_000)
    assert poly.by_epoch is False
    pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert pipeline["RandomResize"].scale == (2048, 512) and pipeline["RandomResize"].ratio_range == (0.5, 2.0)
    assert tuple(pipeline["RandomCrop"].crop_size) == cfg.model.data_preprocessor.size == (512, 512)
    assert cfg.model.test_cfg.mode == "whole"
    head = cfg.model.decode_head
    assert (head.channels, head.dropout_ratio, head.num_classes) == (128, 0.1, 150)
    assert bool(cfg.model.backbone.get("with_cp")) == (name == "lit_s")
    assert cfg.optim_wrapper.type == "OptimWrapper" and cfg.optim_wrapper.clip_grad is None

    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(optimizer) is torch.optim.AdamW
    settings = {(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups}
    assert settings == {(1e-4, 1e-4, (0.9, 0.999))}
    model.load_state_dict(meta_state(figures["keys"]), strict=True, assign=True)


@pytest.mark.parametrize("name", SEGMENTORS)
def test_trains_and_validates(name: str, scenes: Path, tmp_path: Path) -> None:
    """Run one step and one validation of the config with a small backbone on other data with smaller images."""
    changes: dict[str, Any] = dict(
        model__data_preprocessor__size="(128,128)",
        train_dataloader__dataset__pipeline__2__scale="(128,128)",
        train_dataloader__dataset__pipeline__3__crop_size="(128,128)",
        val_dataloader__dataset__pipeline__1__scale="(160,160)",
        val_dataloader__dataset__indices=2,
        allow_absent_classes=True,
    )
    for split, folder in (("train", "train"), ("val", "val"), ("test", "val")):
        changes[f"{split}_dataloader__dataset__data_prefix__img_path"] = f"images/{folder}"
        changes[f"{split}_dataloader__dataset__data_prefix__seg_map_path"] = f"semantic/{folder}"
    train("", [str(path_of(name)), *build_options(scenes, tmp_path / "run", **changes), *TINY_BACKBONE])
    saved = load_file(str(tmp_path / "run" / "iter_1.pth"))
    assert saved["meta"]["iter"] == 1 and len(saved["meta"]["dataset_meta"]["classes"]) == 150
