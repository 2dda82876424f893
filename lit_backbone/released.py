"""The layouts of the authors' released checkpoints, and this package's.

LIT-S/M/B follow Swin's names, LIT-Ti and `pvt_small_full_msa` PVT's. Both are accepted wherever this package's
layout is. Converting never resizes; `fit.py` resizes position tables to a model's.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .layers import displacements

RELEASED_PREFIXES = {"patch_embed.": "stages.0.merge.", "cls_token": "stages.3.cls_token"}
for _i in range(4):
    RELEASED_PREFIXES |= {
        f"layers.{_i}.blocks.": f"stages.{_i}.blocks.",  # LIT-S/M/B: merging stands at the end of the stage before
        f"layers.{_i}.downsample.": f"stages.{_i + 1}.merge.",
        f"block{_i + 1}.": f"stages.{_i}.blocks.",  # LIT-Ti, PVT: stages count from 1
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
    """A released state dict in this package's layout; one in this package's layout comes back as it is.

    Tables become maps: relative biases `((2H-1)(2W-1), heads)` to `(1, heads, 2H-1, 2W-1)`, absolute embeddings
    `(1, HW, C)` to `(1, C, H, W)`, with the class token's slot apart. All released tables are square; others stay as
    they are. Dropped are `relative_position_index`, which is derived, and the slot of a class token that is not there.
    """
    out = {}
    for released, value in state_dict.items():
        key = _renamed(released)
        if key.endswith("relative_position_index"):
            continue
        if not value.numel():
            out[key] = value  # is no table of any size
        elif key.endswith("rel_pos_bias") and value.ndim == 2 and _is_square(value.shape[0]):
            side = math.isqrt(value.shape[0])
            value = value.t().reshape(1, -1, side, side)  # (side^2, heads) -> (1, heads, side, side)
        elif key.endswith("pos_embed") and key != released and value.ndim == 3:
            prefix = 0 if _is_square(value.shape[1]) else 1  # the class token's slot
            side = math.isqrt(value.shape[1] - prefix)
            if prefix and "cls_token" in state_dict:
                out[key.replace("pos_embed", "cls_pos_embed")] = value[:, :1]
            if prefix + side**2 == value.shape[1]:
                value = value[:, prefix:].transpose(1, 2).reshape(1, -1, side, side)  # (1, HW, C) -> (1, C, H, W)
        out[key] = value
    return out


def _renamed(key: str) -> str:
    """This package's name of a released key; other names stay."""
    for released, ours in RELEASED_PREFIXES.items():
        if key.startswith(released):
            key = ours + key.removeprefix(released)
            for part, our_part in RELEASED_PARTS.items():
                key = key.replace(part, our_part)
            return key
    return key


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def load_released_layout(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: converts a released layout below `prefix`, in place."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    ours = convert_released({key.removeprefix(prefix): state_dict.pop(key) for key in keys})
    state_dict.update({prefix + key: value for key, value in ours.items()})


def to_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`convert_released`: a classifier's state dict in the layout that the authors' code loads.

    With absolute position embeddings that is the layout of LIT-Ti and PVT, else that of LIT-S/M/B.

    Raises:
        ValueError: a position table is not square, or none of the authors' models has such a parameter.
    """
    absolute = any(key.endswith(".pos_embed") for key in state_dict)
    prefixes = {
        ours: released
        for released, ours in RELEASED_PREFIXES.items()
        if released.startswith(("layers.", "patch_embed.")) != absolute
    }
    out = {}
    for key, value in state_dict.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        name, part = prefixes.get(prefix, ""), key.removeprefix(prefix)
        if f"{prefix}offset.weight" in state_dict:
            part = next(theirs + part.removeprefix(p) for theirs, p in RELEASED_PARTS.items() if part.startswith(p))
        if key.endswith((".pos_embed", "rel_pos_bias")) and value.shape[2] != value.shape[3]:
            raise ValueError(f"{key}: {tuple(value.shape[2:])} is not square, as tables of the authors are")
        if key.endswith("rel_pos_bias"):
            height, width = ((size + 1) // 2 for size in value.shape[2:])
            query, of_key = displacements(height, width, value.device)
            part = part.removesuffix("rel_pos_bias")
            out[f"{name}{part}relative_position_index"] = (query[:, None] - of_key).long()
            part += "relative_position_bias_table"
            value = value[0].flatten(1).t()  # (1, heads, 2H-1, 2W-1) -> ((2H-1)(2W-1), heads)
        elif key.endswith(".pos_embed"):
            value = value.flatten(2).transpose(1, 2)  # (1, C, H, W) -> (1, HW, C)
            slot = state_dict.get(key.replace("pos_embed", "cls_pos_embed"))
            value = value if slot is None else torch.cat((slot, value), dim=1)
        elif key.endswith("cls_pos_embed"):
            continue
        plain = ".merge." in prefix and prefix != "stages.0.merge." and f"{prefix}offset.weight" not in state_dict
        plain = plain and not (absolute and f"{prefix}norm.running_mean" not in state_dict)  # as PVT's is
        if plain or (name + part).startswith("stages."):
            raise ValueError(f"{key}: no model of the authors has it beside the others")
        out[name + part] = value.contiguous()
    return out
