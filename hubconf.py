"""Models for torch.hub. `checkpoint` loads a file and sets classes, input size and preprocessing by it.

model = torch.hub.load("OWNER/NAME", "lit_s", checkpoint="lit_s.pth")  # or a directory with source="local"
"""

import timm

import lit_backbone
from lit_backbone import checkpoints

dependencies = ["safetensors", "timm", "torch"]


def _entry(name: str):
    def load(pretrained=False, checkpoint=None, **kwargs):
        if checkpoint is None:
            return timm.create_model(name, pretrained, **kwargs)
        content = lit_backbone.read_checkpoint(checkpoint)
        weights = lit_backbone.load_checkpoint(checkpoint, content=content)
        size, num_classes = checkpoints.infer_img_size_and_num_classes(weights)
        kwargs = dict(img_size=size, num_classes=num_classes) | kwargs
        if missing := checkpoints.stored_keywords(content).keys() - kwargs.keys():
            problem = f"was trained with other keywords ({', '.join(sorted(missing))})"
            raise lit_backbone.CheckpointError(f"{checkpoint}: {problem}. Pass them to torch.hub.load.")
        data_config = checkpoints.stored_data_config(content)
        data_config["input_size"] = (3, *timm.layers.to_2tuple(kwargs["img_size"]))
        kwargs["pretrained_cfg_overlay"] = data_config | kwargs.get("pretrained_cfg_overlay", {})
        model = timm.create_model(name, **kwargs)
        model.load_state_dict(lit_backbone.load_checkpoint(checkpoint, model, content=content))
        return model

    load.__name__, load.__doc__ = name, f"Create {name}. Other keywords are those of `timm.create_model`."
    return load


lit_ti, lit_s, lit_m, lit_b, pvt_small_full_msa = map(_entry, lit_backbone.lit.ARCHS)
