"""Published detectors: parameters, released layouts, recipes, one training step and validation, mixed precision."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import apply_to
from torch import Tensor, nn

from lit_backbone.mm import load_file
from lit_backbone.mm.cli import train
from lit_backbone.mm.runner import StrictRunner
from tests.dense import TINY_BACKBONE, derive
from tests.detection.conftest import DEMO, PUBLISHED, classes_of_all_splits
from tests.goldens.compare import meta_state, parameter_count

# name: parameters, learning rate
DETECTORS = {
    "retinanet_lit_ti": (29_621_708, 1e-4),
    "retinanet_lit_s": (38_904_292, 1e-4),
    "mask_rcnn_lit_ti": (39_539_144, 2e-4),
    "mask_rcnn_lit_s": (48_240_096, 2e-4),
}
CLASS_TOKEN_SLOT = 512  # parameters in the last position table of lit_ti, unused in dense prediction


@pytest.mark.parametrize("name", DETECTORS)
def test_released_layout_and_recipe(name: str, goldens: dict[str, Any]) -> None:
    cfg = Config.fromfile(PUBLISHED / f"{name}_fpn_1x_coco.py")
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    parameters, learning_rate = DETECTORS[name]
    figures = goldens["state_dicts"][name]
    assert figures["parameters"] == parameters
    assert parameter_count(model) == parameters - (CLASS_TOKEN_SLOT if name.endswith("ti") else 0)

    assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.001, 500, False)
    assert (steps.milestones, steps.gamma) == ([8, 11], 0.1)
    resize = next(step for step in cfg.train_dataloader.dataset.pipeline if step.type == "Resize")
    assert resize.scale == (1333, 800) and resize.keep_ratio

    small = name.endswith("lit_s")
    assert cfg.optim_wrapper.pop("type") == ("AmpOptimWrapper" if small else "OptimWrapper")
    assert bool(cfg.model.backbone.get("with_cp")) == small
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper | dict(type="OptimWrapper")).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = optimizer.param_groups
    assert {(group["lr"], group["betas"]) for group in groups} == {(learning_rate, (0.9, 0.999))}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    no_decay = {key for key, p in model.named_parameters() if decays[id(p)] == 0}
    expected = {key for key, _ in model.named_parameters() if "norm" in key or "rel_pos_bias" in key}
    assert set(decays.values()) <= {0.0, 1e-4}
    assert no_decay == (expected if small else set()) and len(expected) > 20
    model.load_state_dict(meta_state(figures["keys"]), strict=True, assign=True)


@pytest.mark.parametrize("name", ["retinanet_lit_ti", pytest.param("mask_rcnn_lit_s", marks=pytest.mark.slow)])
def test_trains_and_validates(name: str, options: Any, tmp_path: Any) -> None:
    """Run one step and one validation of the config with a small backbone on other data with smaller images."""
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
    inherited = classes_of_all_splits(tuple("0123456789"))
    config = derive(tmp_path / "config.py", PUBLISHED / f"{name}_fpn_1x_coco.py", inherited)
    train("", [str(config), *options(**changes), *TINY_BACKBONE])
    saved = load_file(str(tmp_path / "run" / "epoch_1.pth"))
    assert saved["meta"]["iter"] == 1 and saved["meta"]["dataset_meta"]["classes"] == tuple("0123456789")


@pytest.mark.usefixtures("bfloat16_attention")
@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_mixed_precision_keeps_boxes_and_losses_in_float32(name: str, tmp_path: Path) -> None:
    """Compare losses and boxes under autocast with those in float32, from the same outputs of the head."""
    cfg = Config.fromfile(DEMO / f"{name}_lit_digit_scenes.py")
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)
    plain = MODELS.build(cfg.model)
    wrapped = StrictRunner(deepcopy(plain), str(tmp_path), experiment_name=tmp_path.name).model.cpu()
    model = deepcopy(wrapped)  # EMA copies the model; the copy must not call methods of the original
    head = "rpn_head" if hasattr(plain, "roi_head") else "bbox_head"
    getattr(wrapped, head).prior_generator = None

    data = plain.data_preprocessor(demo_mm_inputs(2, [[3, 128, 160]] * 2, num_classes=10, with_mask=True), True)
    metas = [sample.metainfo for sample in data["data_samples"]]
    targets = [sample.gt_instances for sample in data["data_samples"]]
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)

    def boxes(model: nn.Module, outputs: Any) -> list[Tensor]:
        results = getattr(model, head).predict_by_feat(*outputs, batch_img_metas=metas)
        return [tensor for instances in results for tensor in (instances.bboxes, instances.scores)]

    def losses(model: nn.Module, outputs: Any) -> dict[str, list[Tensor]]:
        torch.manual_seed(0)  # anchors are sampled
        return getattr(model, head).loss_by_feat(*outputs, deepcopy(targets), metas)

    with bfloat16(), torch.no_grad():
        features = [x.bfloat16() for x in plain.extract_feat(data["inputs"])]
        outputs = getattr(plain, head)(features)
    assert {x.dtype for level in outputs for x in level} == {torch.bfloat16}
    outputs_float32 = apply_to(outputs, torch.is_tensor, Tensor.float)
    for compute in (boxes, losses):
        expected = compute(plain, outputs_float32)
        with bfloat16():
            torch.testing.assert_close(compute(model, outputs), expected, rtol=0, atol=0)
    if hasattr(plain, "roi_head"):
        rois = torch.tensor([[0, 10.3, 20.6, 40.1, 90.7], [1, 90.2, 5.9, 150.8, 33.3]])
        with bfloat16():
            pooled = model.roi_head.bbox_roi_extractor(features, rois)
        expected = plain.roi_head.bbox_roi_extractor([x.float() for x in features], rois)
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
