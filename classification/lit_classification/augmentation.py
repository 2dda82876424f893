"""timm's transforms and mixup, as a configuration asks for them."""

from typing import Any

from timm.data import Mixup, create_transform

from lit_classification.config import Config


def build_transform(config: Config, is_training: bool):
    """timm's transform of PIL images to normalised `(3, H, W)` tensors."""
    data, aug = config.DATA, config.AUG
    if is_training:
        return create_transform(
            data.IMG_SIZE,
            is_training=True,
            scale=aug.SCALE,
            ratio=aug.RATIO,
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=aug.AUTO_AUGMENT or None,
            interpolation=data.INTERPOLATION,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
        )
    return create_transform(**evaluation_input(config))


def evaluation_input(config: Config) -> dict[str, Any]:
    """How evaluation prepares an image, in timm's terms."""
    interpolation = "bilinear" if config.DATA.INTERPOLATION == "random" else config.DATA.INTERPOLATION
    crop = dict(crop_pct=224 / 256) if config.TEST.CROP else dict(crop_pct=1.0, crop_mode="squash")
    return dict(input_size=(3, *config.DATA.IMG_SIZE), interpolation=interpolation, **crop)


def build_mixup(config: Config) -> Mixup | None:
    """timm's Mixup, which also smooths the labels; None where mixup and cutmix are off."""
    aug = config.AUG
    if not aug.mixing:
        return None
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )
