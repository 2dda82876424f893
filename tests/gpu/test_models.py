"""Whole models: figures of the reference, compilation, mixed precision and export."""

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.goldens.compare import assert_agrees
from tests.goldens.fill import fill, image
from tests.gpu.conftest import DEVICE, autocast, relative_error
from tests.lit_backbone.small import KINDS, small_lit
from tests.lit_backbone.test_goldens import converted_name, training_step


def released(name: str, goldens: Mapping[str, Any]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    state = fill(goldens["state_dicts"][name]["keys"])
    model = timm.create_model(name).to(DEVICE)
    model.load_state_dict(state)
    return model, state


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ["lit_s", "lit_ti", "pvt_small_full_msa"])
def test_logits(name: str, dtype: torch.dtype, tolerance: float, goldens: dict[str, Any]) -> None:
    model, _ = released(name, goldens)
    with torch.inference_mode(), autocast(dtype):
        logits = model.eval()(image((2, 3, 224, 224), 0).to(DEVICE))
    assert_agrees(logits.cpu(), goldens["outputs"]["logits"][name], tolerance)


@pytest.mark.parametrize("dtype, loss, tolerance", [(torch.float32, 1e-4, 1e-3), (torch.bfloat16, 5e-3, 0.12)])
@pytest.mark.parametrize("start", ["train_step", "train_step_zero_offsets"])
@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_training_step(
    name: str, start: str, dtype: torch.dtype, loss: float, tolerance: float, goldens: dict[str, Any]
) -> None:
    """Compare loss and gradient norms. bfloat16 changes the norms of LIT-S by 5 % on a CPU, by 8 % on an H100."""
    model, state = released(name, goldens)
    figures = goldens[start][name]
    if "offset_grads" in figures:
        state = {key: torch.zeros_like(value) if "conv_offset" in key else value for key, value in state.items()}
        norms = {key: figure["l2"] for key, figure in figures["offset_grads"].items()}
    else:
        norms = figures["grad_norms"]
    with autocast(dtype):
        assert training_step(model, state) == pytest.approx(figures["loss"], rel=loss)
    gradients = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    expected = {converted_name(key): norm for key, norm in norms.items()}
    # a bias before BatchNorm has no gradient up to rounding, and lit_ti's last table is two parameters here
    excluded = {f"stages.{i}.merge.proj.bias" for i in (1, 2, 3)} | {"stages.3.pos_embed"}
    keys = sorted(expected.keys() - excluded)
    assert relative_error(*(torch.tensor([norms[key] for key in keys]) for norms in (gradients, expected))) < tolerance
    for key in keys if dtype == torch.float32 else ():  # in half precision, gradients that nearly cancel are far off
        assert gradients[key] == pytest.approx(expected[key], rel=3 * tolerance), key


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_for_all_batch_sizes(kind: str) -> None:
    model = small_lit(kind).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    for batch in (4, 7, 3):
        images = torch.randn(batch, 3, 64, 64, device=DEVICE)
        torch._dynamo.mark_dynamic(images, 0)
        with torch.compiler.set_stance("default" if batch == 4 else "fail_on_recompile"):
            actual = compiled(images)
        expected = model(images)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(logits.square().sum(), parameters) for logits in (actual, expected)]
        for name, gradient, reference in zip(dict(model.named_parameters()), *gradients, strict=True):
            assert relative_error(gradient, reference) < 1e-3 or reference.norm() < 1e-4, name
