"""The models for `torch.hub`, with random weights or a checkpoint's, ours or released, its classes and its input size:

    model = torch.hub.load(REPO, "lit_s", checkpoint="lit_s.pth")

REPO is an address `owner/name`, or a folder with `source="local"`. Further keywords are those of `timm.create_model`.
"""

import os
import types

dependencies = ["safetensors", "timm", "torch"]

import timm  # noqa: E402
from torch import nn  # noqa: E402

import lit_backbone  # noqa: E402
from lit_backbone import fit  # noqa: E402


def _entry(create: types.FunctionType) -> types.FunctionType:
    def load(pretrained: bool = False, checkpoint: str | os.PathLike | None = None, **kwargs: object) -> nn.Module:
        if checkpoint is None:
            return timm.create_model(create.__name__, pretrained=pretrained, **kwargs)
        weights = lit_backbone.load_checkpoint(checkpoint)
        size, classes = fit.input_and_outputs(weights)
        kwargs = dict(num_classes=classes, img_size=size) | kwargs
        size = timm.layers.to_2tuple(kwargs["img_size"])
        overlay = dict(input_size=(3, *size)) | kwargs.pop("pretrained_cfg_overlay", {})
        model = timm.create_model(create.__name__, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
        model.load_state_dict(fit.fit_state_dict(weights, model, checkpoint))
        return model

    load.__name__ = create.__name__
    load.__doc__ = f"{create.__doc__} With `checkpoint`, it has the weights of that file."
    return load


lit_ti = _entry(lit_backbone.lit_ti)
lit_s = _entry(lit_backbone.lit_s)
lit_m = _entry(lit_backbone.lit_m)
lit_b = _entry(lit_backbone.lit_b)
pvt_small_full_msa = _entry(lit_backbone.pvt_small_full_msa)
