"""Comparing tensors and modules with the figures in this folder."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def assert_agrees(actual: Tensor, figure: Mapping[str, Any], tolerance: float = 1e-4) -> None:
    actual = actual.detach().double()
    assert list(actual.shape) == figure["shape"]
    expected = torch.tensor(figure["value"], dtype=torch.float64)
    error = (actual.flatten()[figure["index"]] - expected).abs().max() / figure["std"]
    assert error < tolerance, f"{error:.1e} standard deviations"
    assert actual.norm().item() == pytest.approx(figure["l2"], rel=tolerance)


def meta_state(layout: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in layout.items()}


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
