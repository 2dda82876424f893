"""Models: from a config, and from a checkpoint with its classes and preprocessing."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import infer_img_size_and_num_classes, load_checkpoint, stored_classes, unwrap_state_dict
from lit_backbone.released import convert_released
from lit_classification.config import Config, is_lit
from lit_classification.config_reader import config_from_checkpoint
from lit_classification.data import build_transform
from lit_classification.sampler import seed_everything


def build_model(config: Config, device: torch.device) -> nn.Module:
    """Build the configured model, its weights drawn from the seed alone."""
    seed_everything("weights", config.SEED)
    model = timm.create_model(**config.model_keywords)
    model.to(device)
    if config.RUNTIME.COMPILE:
        model.compile()
    return model


def load_model(
    content: dict[str, Any], path: str | Path, config: Config, device: torch.device, classes: Sequence[str] = ()
) -> nn.Module:
    """Build the configured model with a checkpoint's weights, EMA weights if it has any.

    Raise CheckpointError if they are of another model, or of other `classes` than those of the data.
    """
    if is_lit(config.MODEL.NAME):  # compare shapes before memory is allocated
        with torch.device("meta"):
            outline = timm.create_model(**config.model_keywords)
        load_checkpoint(path, outline, new_head=False, content=content)
    model = build_model(config, device)
    model.load_state_dict(load_checkpoint(path, model, classes=classes, new_head=False, content=content))
    return model.eval()


class Classifier(NamedTuple):
    """A LIT in evaluation mode with everything that inference needs."""

    model: nn.Module
    config: Config
    classes: list[str]  # descriptions by label
    transform: Callable[[Image.Image], Tensor]
    class_names: list[str]  # names stored in the checkpoint; empty if it has none


def load_classifier(
    path: str | Path, device: torch.device, name: str | None = None, img_size: Sequence[int] | None = None
) -> Classifier:
    """Load a LIT from a checkpoint of `main.py`, from a released one, or from bare weights of a registered variant.

    Raise CheckpointError if the file cannot be read, holds no LIT, or another one than `name`. `img_size`, `[side]` or
    `[height, width]`, replaces the input size of the checkpoint.
    """
    content = read_checkpoint(path)
    config = find_config(content, path)
    if name not in (None, config.MODEL.NAME):
        raise CheckpointError(f"{path}: holds {config.MODEL.NAME}, not {name}. Omit --model, or use another file.")
    class_names = stored_classes(content)
    classes = class_descriptions(class_names) or default_classes(config.MODEL.NUM_CLASSES)
    if len(classes) != config.MODEL.NUM_CLASSES:
        raise CheckpointError(f"{path}: has {len(classes)} classes for {config.MODEL.NUM_CLASSES} outputs.")
    model = load_model(content, path, config, device)
    if img_size:
        data = config.DATA.model_copy(update={"IMG_SIZE": (img_size[0], img_size[-1])})
        config = config.model_copy(update={"DATA": data})
    return Classifier(model, config, classes, build_transform(config, is_training=False), class_names)


def find_config(content: dict[str, Any], path: str | Path, opts: Sequence[str] = (), **shortcuts: Any) -> Config:
    """Return the config in a checkpoint or, without one, that of the LIT whose weights these are, or raise."""
    config = config_from_checkpoint(content, path, opts, **shortcuts)
    if config:
        return config
    state_dict = convert_released(unwrap_state_dict(content))
    shapes, variants = _shapes(state_dict), timm.list_models(module="lit")
    size, num_classes = infer_img_size_and_num_classes(state_dict)
    for name in variants:
        tree = {"MODEL": {"NAME": name, "NUM_CLASSES": num_classes}, "DATA": {"IMG_SIZE": size}}
        with suppress(CheckpointError), torch.device("meta"):
            config = config_from_checkpoint({"classes": [], "config": tree}, path, opts, **shortcuts)
            if config and _shapes(timm.create_model(**config.model_keywords).state_dict()) == shapes:
                return config
    fix = "Use a checkpoint of main.py, or main.py --eval with --cfg for another model."
    raise CheckpointError(f"{path}: holds weights of no known LIT ({', '.join(variants)}). {fix}")


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return shapes by name, without BatchNorm's counters, which early versions of PyTorch did not store."""
    return {key: value.shape for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}


def class_descriptions(names: list[str]) -> list[str]:
    """Replace ImageNet's identifiers (n01440764) by descriptions (tench, Tinca tinca)."""
    descriptions = cast(dict[str, str], ImageNetInfo().label_descriptions(as_dict=True))
    return [descriptions.get(name, name) for name in names]


def default_classes(count: int) -> list[str]:
    """Return ImageNet's class descriptions if it has as many, else numbers."""
    subset = infer_imagenet_subset({"num_classes": count})
    return list(ImageNetInfo(subset).label_descriptions()) if subset else [str(i) for i in range(count)]
