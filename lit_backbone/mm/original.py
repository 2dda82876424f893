"""Models in configs of the original, for mmdetection 2 and mmsegmentation 0, translated."""

from typing import Any

from mmengine.config import Config

from ..images import DataError
from ..original import report

LIT_S: dict[str, dict[str, Any]] = {
    "mmdet": dict(type="LITBackbone", arch="lit_s", img_size=800, out_norms=(1, 2, 3), drop_path_rate=0.2),
    "mmseg": dict(type="LITBackbone", arch="lit_s", img_size=512, out_norms=(0, 1, 2, 3), drop_path_rate=0.2),
}
LIT_S_KEYWORDS: dict[str, Any] = {  # keywords of the original's LIT that lit_s implies
    **dict(
        pretrain_img_size=224, patch_size=4, in_chans=3, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]
    ),
    **dict(window_size=7, mlp_ratio=4, qkv_bias=True, qk_scale=None, drop_rate=0, attn_drop_rate=0, ape=False),
    **dict(patch_norm=True, frozen_stages=-1, has_msa=[0, 0, 1, 1]),
}


def translate_model(cfg: Config, path: str) -> None:
    """Replace names of the original in `cfg.model`, with one line for each, or raise DataError."""
    model = cfg.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("backbone"), dict):
        return
    backbone: dict[str, Any] = model["backbone"]
    kind = backbone.get("type")
    if kind not in ("LIT", "LIT_Ti", "LITBackbone"):
        return
    if kind == "LIT":
        other = {k: v for k, v in backbone.items() if k in LIT_S_KEYWORDS and v != LIT_S_KEYWORDS[k]}
        if other:
            advice = "Use type='LITBackbone', whose arch can be a dictionary."
            raise DataError(f"{path}: model.backbone: {other} cannot be translated for type='LIT'. {advice}")
        kept = {k: v for k, v in backbone.items() if k not in ("type", *LIT_S_KEYWORDS)}
        backbone = LIT_S[cfg.get("default_scope", "mmdet")] | kept
    elif kind == "LIT_Ti":  # ignores the keywords of ResNet in the original's configs
        kept = {k: v for k, v in backbone.items() if k in ("drop_path_rate", "init_cfg", "use_checkpoint", "with_cp")}
        backbone = dict(type="LITBackbone", arch="lit_ti", drop_path_rate=0.1) | kept
    if kind != "LITBackbone":
        report(f"{path}: model.backbone.type {kind}: read as LITBackbone with arch={backbone['arch']!r}")
    if weights := model.pop("pretrained", None):
        backbone["init_cfg"] = dict(type="Pretrained", checkpoint=weights)
        report(f"{path}: model.pretrained: read as model.backbone.init_cfg.checkpoint")
    if "use_checkpoint" in backbone:
        backbone["with_cp"] = backbone.pop("use_checkpoint")
        report(f"{path}: model.backbone.use_checkpoint: read as with_cp")
    model["backbone"] = backbone
