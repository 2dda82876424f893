"""The models for `torch.hub`, with random weights or a checkpoint's, ours or released:

    model = torch.hub.load(REPO, "lit_s", checkpoint="lit_s.pth")

REPO is an address `owner/name`, or a folder with `source="local"`. Further keywords are those of `timm.create_model`
(`features_only` takes no checkpoint).
"""

import os
import types

dependencies = ["safetensors", "timm", "torch"]

import timm  # noqa: E402
from torch import nn  # noqa: E402

import lit_backbone  # noqa: E402


def _entry(create: types.FunctionType) -> types.FunctionType:
    def load(pretrained: bool = False, checkpoint: str | os.PathLike | None = None, **kwargs: object) -> nn.Module:
        model = timm.create_model(create.__name__, pretrained=pretrained, **kwargs)
        if checkpoint is not None:
            model.load_state_dict(lit_backbone.load_checkpoint(checkpoint, model))
        return model

    load.__name__ = create.__name__
    load.__doc__ = f"{create.__doc__} With `checkpoint`, it has the weights of that file."
    return load


lit_ti = _entry(lit_backbone.lit_ti)
lit_s = _entry(lit_backbone.lit_s)
lit_m = _entry(lit_backbone.lit_m)
lit_b = _entry(lit_backbone.lit_b)
pvt_small_full_msa = _entry(lit_backbone.pvt_small_full_msa)
