"""Comparison with figures in `tests/goldens`, measured on the reference with weights in its released layouts.

Arrays are compared by their largest difference in units of the reference array's standard deviation.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_backbone import LIT
from lit_backbone.dtm import captured_offsets
from lit_backbone.released import convert_released
from tests.goldens.compare import assert_agrees, meta_state, parameter_count
from tests.goldens.fill import fill, image, soft_target

BACKBONES = ["lit_ti_det", "lit_s_det", "lit_ti_seg", "lit_s_seg"]  # mm/test_backbone.py
DETECTORS = ["retinanet_lit_ti", "retinanet_lit_s", "mask_rcnn_lit_ti", "mask_rcnn_lit_s"]  # detection/test_configs.py
SEGMENTORS = ["sem_fpn_lit_ti", "sem_fpn_lit_s"]
CLASSIFIERS = ["lit_ti", "lit_s", "lit_m", "lit_b", "pvt_small_full_msa"]


# ---- layouts and sizes


def test_every_figure_is_used(goldens: dict[str, Any]) -> None:
    assert goldens["state_dicts"].keys() == {*CLASSIFIERS, *BACKBONES, *DETECTORS, *SEGMENTORS}
    assert goldens["outputs"]["logits"].keys() == {"lit_s", "lit_ti", "pvt_small_full_msa"}
    assert goldens["outputs"]["offsets"].keys() == {"lit_ti"}
    assert goldens["outputs"]["features"].keys() == {*BACKBONES}
    assert goldens["train_step"].keys() == goldens["train_step_zero_offsets"].keys() == {"lit_s", "lit_ti"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_layout_and_parameter_count(name: str, goldens: dict[str, Any]) -> None:
    model = timm.create_model(name, device="meta")
    assert parameter_count(model) == goldens["state_dicts"][name]["parameters"]
    model.load_state_dict(meta_state(goldens["state_dicts"][name]["keys"]), strict=True)


@pytest.mark.parametrize("name, giga", list(zip(CLASSIFIERS, [3.61, 4.08, 8.59, 15.03, 8.38], strict=True)))
def test_multiply_adds(name: str, giga: float) -> None:
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.01)


# ---- values


@pytest.fixture(scope="module")
def filled(request: pytest.FixtureRequest, goldens: dict[str, Any]) -> tuple[str, LIT, dict[str, Tensor]]:
    """Return name, model and its weights in the released layout."""
    state = fill(goldens["state_dicts"][request.param]["keys"])
    model = timm.create_model(request.param)
    model.load_state_dict(state, strict=True)
    return request.param, model, state


@pytest.mark.parametrize("filled", ["lit_s", "lit_ti", "pvt_small_full_msa"], indirect=True)
def test_logits_and_offsets(filled: tuple[str, LIT, dict[str, Tensor]], goldens: dict[str, Any]) -> None:
    name, model, state = filled
    model.load_state_dict(state)
    with torch.no_grad(), captured_offsets(model) as captured:
        logits = model.eval()(image((2, 3, 224, 224), 0))
    assert_agrees(logits, goldens["outputs"]["logits"][name])
    assert [size for _, size in captured] == ([] if name == "pvt_small_full_msa" else [(56, 56), (28, 28), (14, 14)])
    for (offset, _), figure in zip(captured, goldens["outputs"]["offsets"].get(name, []), strict=False):
        assert_agrees(offset, figure)


def training_step(model: LIT, state: Mapping[str, Tensor]) -> float:
    """Load the weights, run forward and backward in training mode and return the loss."""
    model.load_state_dict(state)
    model.train().zero_grad()
    device = next(model.parameters()).device
    logits = model(image((4, 3, 224, 224), 11).to(device))
    loss = (-soft_target(4, 1000, 12).to(device) * F.log_softmax(logits, dim=-1)).sum(-1).mean()
    loss.backward()
    return loss.item()


def converted_name(key: str) -> str:
    """Convert the name of a released parameter; the shape of the dummy is valid for every table."""
    return next(iter(convert_released({key: torch.empty(1, 1, 1)})))


@pytest.mark.parametrize("filled", ["lit_s", "lit_ti"], indirect=True)
def test_training_step(filled: tuple[str, LIT, dict[str, Tensor]], goldens: dict[str, Any]) -> None:
    name, model, state = filled
    figures = goldens["train_step"][name]
    assert training_step(model, state) == pytest.approx(figures["loss"], rel=1e-5)

    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    if "stages.3.cls_pos_embed" in norms:  # part of the table in the released layout
        cls_norm = norms.pop("stages.3.cls_pos_embed")
        norms["stages.3.pos_embed"] = (norms["stages.3.pos_embed"] ** 2 + cls_norm**2) ** 0.5
    expected = {converted_name(key): norm for key, norm in figures["grad_norms"].items()}
    before_batch_norm = {f"stages.{i}.merge.proj.bias" for i in (1, 2, 3)}  # zero gradient up to rounding
    assert norms.keys() == expected.keys()
    assert all(norms[key] < 1e-6 for key in before_batch_norm)
    for key in norms.keys() - before_batch_norm:
        assert norms[key] == pytest.approx(expected[key], rel=1e-3), key

    buffers = dict(model.named_buffers())
    assert len(figures["bn_after"]) == 6
    for key, (mean, norm) in figures["bn_after"].items():
        assert buffers[converted_name(key)].mean().item() == pytest.approx(mean, rel=1e-4, abs=1e-7), key
        assert buffers[converted_name(key)].norm().item() == pytest.approx(norm, rel=1e-5), key


@pytest.mark.parametrize("filled", ["lit_s", "lit_ti"], indirect=True)
def test_training_step_from_zero_offsets(filled: tuple[str, LIT, dict[str, Tensor]], goldens: dict[str, Any]) -> None:
    name, model, state = filled
    figures = goldens["train_step_zero_offsets"][name]
    state = {key: torch.zeros_like(value) if "conv_offset" in key else value for key, value in state.items()}
    assert training_step(model, state) == pytest.approx(figures["loss"], rel=1e-5)

    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert len(figures["offset_grads"]) == 6
    for key, figure in figures["offset_grads"].items():
        gradient = gradients[converted_name(key)]
        sample, expected = gradient.flatten()[figure["index"]], torch.tensor(figure["value"])
        assert torch.cosine_similarity(sample, expected, dim=0) > 1 - 1e-6, key
        assert (sample - expected).norm() / expected.norm() < 1e-3, key
        assert gradient.norm().item() == pytest.approx(figure["l2"], rel=1e-3), key
