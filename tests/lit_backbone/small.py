"""Small models for tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_backbone import LIT
from tests.goldens.fill import fill

SMALL = dict(
    img_size=64, num_classes=10, embed_dims=(8, 16, 24, 32), depths=(1, 2, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratios=2
)
KINDS = {
    "relative": dict(),
    "class_token": dict(pos_embed="absolute", class_token=True, global_pool="token", pad_input=False),
    "reduced": dict(merging="swin", pos_embed="none", attention=(True, True, True, True), sr_ratios=(8, 4, 2, 1)),
    "conv_merging": dict(merging="conv", pos_embed="none", attention=(True, True, True, True)),
}

# Divisors of the widths in the released layouts, and keywords of the resulting models
SHRINK = {"lit_s": 12, "lit_ti": 16}
SHRUNK = {
    "lit_s": dict(embed_dims=(8, 16, 32, 64), num_heads=(1, 1, 1, 2)),
    "lit_ti": dict(embed_dims=(4, 8, 20, 32), num_heads=(1, 1, 5, 8)),
}


def small_lit(kind: str = "relative", **kwargs: Any) -> LIT:
    """Build a LIT in evaluation mode without zero parameters and default statistics."""
    model = LIT(**(SMALL | KINDS[kind] | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.5 * torch.rand_like(buffer))
    return model


def shrunk_released(name: str, layout: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Create weights in the released layout of `lit_s` or `lit_ti` for the model with `SHRUNK[name]`."""

    def shrink(key: str, shape: Sequence[int]) -> list[int]:
        widths = range(2, 3) if "pos_embed" in key else range(len(shape))  # (1, positions, channels)
        return [n // SHRINK[name] if i in widths and n % SHRINK[name] == 0 else n for i, n in enumerate(shape)]

    return fill({key: shrink(key, shape) for key, shape in layout.items()})
