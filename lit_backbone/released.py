"""Conversion of the authors' released checkpoints to this package's layout.

Released LIT-S/M/B checkpoints use the parameter names of Swin, those of LIT-Ti and PVT the names of PVT. Conversion
renames and reshapes only. `checkpoints.py` resizes position tables.
"""

import math
from typing import Any

from torch import Tensor, nn

RELEASED_PREFIXES = {"patch_embed.": "stages.0.merge.", "cls_token": "stages.3.cls_token"}
for _i in range(4):
    RELEASED_PREFIXES |= {
        f"layers.{_i}.blocks.": f"stages.{_i}.blocks.",  # LIT-S/M/B; merging belongs to the preceding stage
        f"layers.{_i}.downsample.": f"stages.{_i + 1}.merge.",
        f"block{_i + 1}.": f"stages.{_i}.blocks.",  # LIT-Ti, PVT; stages are 1-based
        f"patch_embed{_i + 1}.": f"stages.{_i}.merge.",
        f"pos_embed{_i + 1}": f"stages.{_i}.pos_embed",
    }
RELEASED_PARTS = {
    "dconv.conv_offset.": "offset.",
    "dconv.": "proj.",
    "norm_layer.": "norm.",
    "relative_position_bias_table": "rel_pos_bias",
}


def convert_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in this package's layout; keys of neither layout are kept.

    Relative bias tables become `(1, heads, 2H-1, 2W-1)` and absolute embeddings `(1, C, H, W)`, with the class token's
    embedding apart. `relative_position_index` is dropped, and so is the class token's embedding if there is no class
    token. Released tables are square; others keep their shape.
    """
    out = {}
    for released_key, value in state_dict.items():
        if released_key.endswith("relative_position_index"):
            continue
        key = released_key
        if prefix := next(filter(key.startswith, RELEASED_PREFIXES), None):
            key = RELEASED_PREFIXES[prefix] + key.removeprefix(prefix)
            for released_part, part in RELEASED_PARTS.items():
                key = key.replace(released_part, part)
        if not value.numel():
            pass  # an empty tensor cannot be reshaped
        elif key.endswith("rel_pos_bias") and value.ndim == 2 and _is_square(value.shape[0]):
            side = math.isqrt(value.shape[0])
            value = value.t().reshape(1, -1, side, side)  # (side^2, heads) -> (1, heads, side, side)
        elif key.endswith("pos_embed") and key != released_key and value.ndim == 3:
            first = 0 if _is_square(value.shape[1]) else 1  # 1 with the embedding of the class token
            side = math.isqrt(value.shape[1] - first)
            if first and "cls_token" in state_dict:
                out[key.replace("pos_embed", "cls_pos_embed")] = value[:, :1]
            if first + side**2 == value.shape[1]:
                value = value[:, first:].transpose(1, 2).reshape(1, -1, side, side)  # (1, HW, C) -> (1, C, H, W)
        out[key] = value
    return out


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def convert_released_hook(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: convert the keys below `prefix` in place."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    converted = convert_released({key.removeprefix(prefix): state_dict.pop(key) for key in keys})
    state_dict.update({prefix + key: value for key, value in converted.items()})
